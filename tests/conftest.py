"""Small random checkpoints that diffusers and transformers made: the oracles' own files are what we load."""

import contextlib
import signal
import sys

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import cli
from model.tokenizer import Tokenizer

# What runs in the background ignores Ctrl-C, and so would the programs that the tests start and stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Three levels, unequal widths, one without attention: what hides a mistake in a network of two equal levels.
UNET = dict(
    block_out_channels=(32, 64, 96), layers_per_block=2, attention_head_dim=4, cross_attention_dim=32,
    norm_num_groups=16, sample_size=8,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))
VAE = dict(
    block_out_channels=(16, 32, 48), layers_per_block=1, norm_num_groups=8, sample_size=32,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, hidden_act="quick_gelu",
    vocab_size=49408, max_position_embeddings=77, eos_token_id=49407, bos_token_id=49406, pad_token_id=49407)
# As the official scheduler_config.json: no timestep_spacing, no prediction_type.
SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1,
    set_alpha_to_one=False, skip_prk_steps=True)


# The files that take longest come first, so that the workers end together.
LONGEST = ("test_train", "test_build_dataset", "test_evaluate", "test_generate", "test_train_online", "test_checkpoint",
           "test_paper_people", "test_concept", "test_lora", "test_networks", "test_train_scorer", "test_results")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.clip().save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer_folder):
    """A folder that diffusers' `save_pretrained` wrote: a random SD1.5-shaped pipeline of 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(**UNET), vae=AutoencoderKL(**VAE), text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_folder), scheduler=PNDMScheduler(**SCHEDULER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_scorer(tmp_path_factory, tokenizer_folder):
    """A folder as PickScore's on the Hub: a random small CLIP of 32 x 32 pixels that transformers wrote."""
    folder = tmp_path_factory.mktemp("scorer")
    torch.manual_seed(1)
    towers = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    CLIPModel(CLIPConfig(
        text_config=dict(towers, eos_token_id=49407, bos_token_id=49406),
        vision_config=dict(towers, image_size=32, patch_size=8), projection_dim=16)).save_pretrained(folder)
    Tokenizer.from_folder(tokenizer_folder).save(folder)
    (folder / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 32}, "crop_size": 32}')
    return folder


@pytest.fixture
def program(monkeypatch):
    """Runs a program's main as the command line does: program(module, "--option", value, ...) -> its exit code."""
    def run(module, *arguments) -> int:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        try:
            cli.run(module.main)
        except SystemExit as end:
            return end.code or 0
        return 0
    return run


@pytest.fixture
def interrupted():
    """with interrupted(module, 4): at its fourth update a training program's run ends as if it were killed; or, with
    interrupted(module, 4, signal.SIGTERM), it is sent that signal."""
    @contextlib.contextmanager
    def block(module, at: int, number: int | None = None):
        calls, average = [], module.average_gradients

        def average_gradients(parameters, world):
            calls.append(1)
            if len(calls) == at and number is None:
                raise KeyboardInterrupt
            if len(calls) == at:
                signal.raise_signal(number)
            average(parameters, world)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "average_gradients", average_gradients)
            yield
    return block
