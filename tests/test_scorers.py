"""PickScore against transformers: the same folder, pictures and prompts to CLIPModel and its processor, and to ours.

The other scorers are in test_more_scorers.py.
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from model.builtin import BUILT_IN, named
from model.clip import CLIP
from model.configs import clip_arguments
from model.errors import UserError
from model.preprocess import clip_preprocess
from model.scorers import has_image_tower, load_scorer, reads_prompts, scorer_files

try:
    from transformers import CLIPImageProcessorPil
except ImportError:                        # transformers 4, where it is the only one
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

# Unequal towers, heads of 8 and 10, 25 patches of 7.
TEXT = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, vocab_size=49408)
VISION = dict(
    hidden_size=40, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56, image_size=35, patch_size=7)
SCALE = math.log(100)          # as PickScore's logit_scale is, about


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter, norms and biases too, such that activations stay near 1."""
    generator = torch.Generator().manual_seed(0)
    for name, x in model.named_parameters():
        noise = torch.randn(x.shape, generator=generator) * (x[0].numel() if x.ndim > 1 else 100) ** -0.5
        x.data = 1 + noise if x.ndim == 1 and name.endswith("weight") else noise
    model.logit_scale.data = torch.tensor(SCALE)
    return model.eval().requires_grad_(False)


def write_folder(folder, tokenizer_folder, act: str, eos: int):
    """As transformers writes it."""
    CLIPTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 38}, crop_size={"height": 35, "width": 35}).save_pretrained(folder)
    config = CLIPConfig(
        text_config=dict(TEXT, hidden_act=act, eos_token_id=eos), vision_config=dict(VISION, hidden_act=act),
        projection_dim=20)
    randomise(CLIPModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder):
    """In configs of PickScore's time the end token's id was 2, which is wrong and means the largest id."""
    return write_folder(tmp_path_factory.mktemp("scorer"), tokenizer_folder, "gelu", eos=2)


@pytest.fixture(scope="module")
def openai_folder(tmp_path_factory, tokenizer_folder):
    return write_folder(tmp_path_factory.mktemp("openai"), tokenizer_folder, "quick_gelu", eos=49407)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "scorer")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A few colours in blocks of all sizes, and noise: every pixel counts in a resize."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(0, 25, (height, width, 3))
    for size in (2, 5, 17, 60):
        blocks = rng.normal(0, 50, (-(-height // size), -(-width // size), 3))
        pixels += np.kron(blocks, np.ones((size, size, 1)))[:height, :width]
    return Image.fromarray((128 + pixels).clip(0, 255).astype(np.uint8))


def of_all_kinds() -> list[Image.Image]:
    """Three with transparency, which transformers 5 puts over white (earlier versions show what is beneath)."""
    see_through = picture(64, 90, 3)
    see_through.putalpha(picture(64, 90, 4).convert("L"))
    palette = picture(61, 80, 9).convert("P")
    palette.info["transparency"] = palette.getpixel((30, 40))
    return [
        picture(704, 1024), picture(100, 37, 1), picture(36, 301, 2), picture(35, 35, 5), picture(38, 41, 6),
        picture(9, 5, 7), see_through, see_through.convert("LA"), palette, picture(80, 60, 8).convert("L"),
        picture(50, 70, 10).convert("1"), picture(50, 71, 11).convert("CMYK")]


PROMPTS = [
    "a portrait of a woman with red hair", "a cat", "", "two men shaking hands, 4k, détaillé, 美丽", "a cat",
    "one of a hundred words " * 40, "<|endoftext|> and on", "A CAT", "a  dog\n", "a", "b", "a cat"]


# Numbers

@torch.no_grad()
def oracle(folder, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """PickScore's own recipe: exp(logit_scale) times the cosine, of transformers' model and processor."""
    model, tokenizer = CLIPModel.from_pretrained(folder).float().eval(), CLIPTokenizer.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")
    ids = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    return model(**pixels, **ids).logits_per_image.diag()


@pytest.mark.parametrize("which", ["folder", "openai_folder"])
def test_scores_equal_transformers(which, request):
    folder = request.getfixturevalue(which)
    images = of_all_kinds()
    wanted = oracle(folder, images, PROMPTS)
    got = load_scorer(folder)(images, PROMPTS)
    assert got.shape == (12,) and got.dtype == torch.float32 and got.device.type == "cpu"
    assert wanted.std() > 3, "the comparison says nothing"
    error = (got - wanted).abs().max() / math.exp(SCALE)
    print(f"{error:.1e}", end=" ")
    assert error < 1e-5
    # One by one and in another order: a score depends on its own picture and prompt alone.
    scorer = load_scorer(folder)
    for i in (11, 0, 6):
        torch.testing.assert_close(scorer([images[i]], [PROMPTS[i]])[0], got[i], rtol=0, atol=1e-4)


def test_pictures_are_prepared_to_the_pixel(folder):
    """Every picture and 40 sizes at random: resize, rounding and cut are the processor's. And for a cut that is wider
    than the picture, which gets black bars."""
    sizes = np.random.default_rng(0).integers(20, 130, (40, 2)).tolist()
    images = of_all_kinds() + [picture(*size, seed) for seed, size in enumerate(sizes)]
    for changes in ({}, {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
                    {"crop_size": {"height": 48, "width": 41}},
                    {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}):
        config = json.loads((folder / "preprocessor_config.json").read_text()) | changes
        oracle = CLIPImageProcessorPil(**{k: v for k, v in config.items() if not k.endswith("_type")})
        for image in images:
            wanted = oracle(image, return_tensors="pt")["pixel_values"][0]
            got = clip_preprocess(image, config)
            assert got.shape == wanted.shape and got.dtype == torch.float32
            # A value of 255 is 0.011 or more here.
            assert (got - wanted).abs().max() < 2e-6, (image.size, image.mode, changes)


def test_one_text_embedding_a_distinct_prompt(folder, monkeypatch):
    """A pool of pictures of one prompt costs one text."""
    scorer, rows = load_scorer(folder), []
    embed = scorer.clip.embed_text
    monkeypatch.setattr(scorer.clip, "embed_text", lambda ids: rows.append(len(ids)) or embed(ids))
    images = [picture(40, 50, seed) for seed in range(7)]
    scores = scorer(images, ["x", "y", "x", "x", "z", "y", "x"])
    assert rows == [3]
    again = scorer(images, ["x"] * 7)
    torch.testing.assert_close(scores[[0, 2, 3, 6]], again[[0, 2, 3, 6]], rtol=0, atol=1e-3)
    assert rows == [3, 1]
    assert len(set(scores.tolist())) == 7


VIT_H = {      # PickScore's config.json, less what changes nothing
    "_name_or_path": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "architectures": ["CLIPModel"], "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592, "model_type": "clip", "projection_dim": 1024, "text_config_dict": None,
    "torch_dtype": "float32", "vision_config_dict": None,
    "text_config": {
        "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "gelu",
        "hidden_size": 1024, "intermediate_size": 4096, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
        "model_type": "clip_text_model", "num_attention_heads": 16, "num_hidden_layers": 24, "pad_token_id": 1,
        "projection_dim": 512, "vocab_size": 49408},
    "vision_config": {
        "attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "gelu", "hidden_size": 1280, "image_size": 224,
        "intermediate_size": 5120, "layer_norm_eps": 1e-05, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 32, "patch_size": 14,
        "projection_dim": 512}}


def test_the_real_config_asks_for_the_real_names_and_shapes():
    with torch.device("meta"):
        ours = CLIP(**clip_arguments(VIT_H, "config.json")).state_dict()
        wanted = CLIPModel(CLIPConfig.from_dict(json.loads(json.dumps(VIT_H)))).state_dict()
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in wanted.items()}
    assert sum(x.numel() for x in ours.values()) == 986_109_441                  # 3.94 GB, as the file on the Hub has


def test_one_pass_at_pickscores_widths():
    """Its widths, heads of 80 and 64, 257 and 77 tokens; two layers of each tower, and a small vocabulary."""
    config = json.loads(json.dumps(VIT_H))
    config["text_config"] |= dict(num_hidden_layers=2, vocab_size=500)
    config["vision_config"] |= dict(num_hidden_layers=2)
    with torch.device("meta"):
        model, clip = CLIPModel(CLIPConfig.from_dict(config)), CLIP(**clip_arguments(config, "config.json"), eos=499)
    randomise(model.to_empty(device="cpu"))
    for tower in (model.text_model, model.vision_model):       # a buffer, which no state dict holds
        tower.embeddings.position_ids.copy_(torch.arange(tower.embeddings.position_ids.shape[1]))
    clip.load_state_dict(model.state_dict(), strict=True, assign=True)
    ids = torch.randint(499, (3, 77), generator=torch.Generator().manual_seed(0))
    ids[0, 5:], ids[1, 40:], ids[2, 76:] = 499, 499, 499
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=pixels).logits_per_image[0] / 100
        got = clip.embed_text(ids) @ clip.embed_images(pixels)[0]
    print(f"{(got - wanted).abs().max():.1e}", end=" ")
    assert wanted.std() > 0.01 and (got - wanted).abs().max() < 1e-6


# Names

def test_what_a_built_in_model_brings():
    """It is there, with a scorer of its own; the names of its judges and of its words lead to them."""
    for model in BUILT_IN.values():
        assert (model.checkpoint / "model_index.json").is_file() and (model.checkpoint / "judge").is_dir()
        assert model.prompts_train.is_file() and model.prompts_test.is_file()
        prompt = model.prompts_test.read_text().partition("\n")[0]
        judges = {name: named(spec)(torch.device("cpu")) for name, spec in model.judges.items()}
        for name in {*judges, model.scorer, *model.scorers.split(",")}:
            judge = judges[name] if name in judges else load_scorer(name)
            assert judge([picture(64, 64)], [prompt]).isfinite().tolist() == [True]
        words = named(model.vocabulary)()
        assert "standing" in words and all(isinstance(word, str) for word in words)


def test_a_source_goes_with_every_name_of_the_kind(folder):
    images, prompts = of_all_kinds()[:2], PROMPTS[:2]
    for name in (f"pickscore:{folder}", f"paper-people:{folder}"):
        assert torch.equal(load_scorer(name)(images, prompts), load_scorer(folder)(images, prompts))


def test_who_has_an_image_tower_and_who_reads_prompts(folder):
    for name in ("pickscore", "paper-people", "clip", "clip:owner/name", "aesthetic:head.pth", str(folder)):
        assert has_image_tower(name), name
    for name in ("hpsv2", "hpsv2.1-antialias", "imagereward:x.pt", "judge", "own.py:Clip", "0.5*clip+2*pickscore",
                 "owner/name"):
        assert not has_image_tower(name), name
    for name in ("pickscore", "hpsv2", "clip:x", "own.py:Mine", "2*aesthetic", str(folder)):
        assert reads_prompts(name), name
    assert not reads_prompts("aesthetic") and not reads_prompts("aesthetic:head.pth")


# Folders

def as_half(folder):
    save_file({k: x.half() for k, x in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors")


def with_position_ids(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(26)[None]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def as_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_shards(folder):
    model = CLIPModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    assert not (folder / "model.safetensors").exists()


def with_a_processor(folder):
    """As CLIPProcessor writes it: one file, in transformers 5, for the picture's part and the whole."""
    (folder / "preprocessor_config.json").rename(folder / "old.json")
    config = json.loads((folder / "old.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": config}))


@pytest.mark.parametrize("change", [as_half, with_position_ids, as_bin, in_shards, with_a_processor])
def test_forms_of_a_folder(copied, folder, change):
    images, prompts = of_all_kinds()[:3], PROMPTS[:3]
    change(copied)
    got = load_scorer(copied)(images, prompts)
    if change is as_half:
        assert (got - oracle(copied, images, prompts)).abs().max() / math.exp(SCALE) < 1e-5
    else:
        assert torch.equal(got, load_scorer(folder)(images, prompts))
    listing = sorted(path.name for path in copied.iterdir())
    read = set(scorer_files([*listing, "README.md", "flax_model.msgpack", "optimizer.bin"]))
    assert "README.md" not in read and "flax_model.msgpack" not in read and "optimizer.bin" not in read
    for name in list(listing):                                 # what the Hub would not be asked for is not needed
        if name not in read:
            (copied / name).unlink()
    assert torch.equal(load_scorer(copied)(images, prompts), got)


def test_what_transformers_own_processor_saves_is_read(copied, folder):
    """Without a preprocessor_config.json: 38 and 35 pixels stand in its own file alone."""
    processor = CLIPProcessor(
        CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
    (copied / "preprocessor_config.json").unlink()
    processor.save_pretrained(copied)
    images, prompts = of_all_kinds()[:3], PROMPTS[:3]
    assert torch.equal(load_scorer(copied)(images, prompts), load_scorer(folder)(images, prompts))


# What is refused

def edit(name: str, **changes):
    def change(folder):
        config = json.loads((folder / name).read_text())
        for key, value in changes.items():
            part, _, key = key.rpartition("__")
            (config[part] if part else config)[key] = value
        (folder / name).write_text(json.dumps(config))
    return change


def drop(*names: str):
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def edit_weights(name: str, edited):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors |= {name: edited(tensors[name])}
        save_file({k: x for k, x in tensors.items() if x is not None}, folder / "model.safetensors")
    return change


def cut_off(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-7])


REFUSED = {
    "no weights": (drop("model.safetensors"), "no weights here; expected model.safetensors"),
    "no config": (drop("config.json"), "config.json: not there"),
    "no tokenizer": (drop("tokenizer.json", "vocab.json", "merges.txt"), "no tokenizer here"),
    "cut off": (cut_off, "download it again"),
    "a tensor missing": (
        edit_weights("text_projection.weight", lambda x: None), "missing: 1 .text_projection.weight"),
    "NaN": (edit_weights("logit_scale", lambda x: x * math.nan), "NaN or infinite values in logit_scale"),
    "another width": (edit("config.json", projection_dim=24), r"projection.weight is \(20, .*expected \(24,"),
    "another depth": (edit("config.json", vision_config__num_hidden_layers=2), "unexpected: 16 .vision_model"),
    "a text encoder's config": (edit("config.json", vision_config=None), "no vision_config"),
    "another activation": (edit("config.json", vision_config__hidden_act="relu"), "hidden_act is 'relu'"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("<html>"), "not JSON"),
    "another picture size": (edit("preprocessor_config.json", crop_size=224), "crop_size is 224, .* takes 35"),
    "another resampling": (edit("preprocessor_config.json", resample=2), "resample is 2"),
    "no normalisation": (edit("preprocessor_config.json", do_normalize=False), "do_normalize is False"),
    "a size in words": (edit("preprocessor_config.json", size={"shortest_edge": "38"}), "a shortest_edge of 70 at"),
    "two means": (edit("preprocessor_config.json", image_mean=[0.5, 0.5]), "image_mean is .*three numbers"),
    "a NaN": (edit("preprocessor_config.json", image_std=[1, 1, math.nan]), "image_std is .*three numbers"),
    "a stretched picture": (edit("preprocessor_config.json", size={"height": 35, "width": 35}), "shortest_edge of 70"),
    "a picture of gigabytes": (edit("preprocessor_config.json", size=20_000), "shortest_edge of 70 at most"),
    "a deviation of 0": (edit("preprocessor_config.json", image_std=[1, 1, 0]), "numbers from 0.001 to 1000"),
    "a mean of 400 digits": (edit("preprocessor_config.json", image_mean=[0, 0, 10**400]), "numbers from -1000 to"),
    "patches wider than the picture": (edit("config.json", vision_config__patch_size=36), "patch_size is 36"),
    "fewer words than the tokenizer has": (edit("config.json", text_config__vocab_size=49_407), "up to 77 of 49407"),
    "fewer places than the tokenizer fills": (
        edit("config.json", text_config__max_position_embeddings=76), "takes up to 76 of 49408")}


@pytest.mark.parametrize("change, words", REFUSED.values(), ids=REFUSED)
def test_bad_folders_are_refused_in_one_line(copied, change, words):
    change(copied)
    with pytest.raises(UserError, match=words) as caught:
        load_scorer(copied)
    assert str(caught.value).startswith(str(copied)) and "\n" not in str(caught.value)


def test_other_bad_input(folder, tmp_path):
    for name in (tmp_path / "nothing", "not a scorer"):
        with pytest.raises(UserError, match="no such file or folder") as caught:
            load_scorer(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="2 pictures and 1 prompts"):
        load_scorer(folder)([picture(40, 40)] * 2, ["a cat"])
