"""LoRA: what it does to a U-Net, against diffusers with peft, and every kind of file there is.

The oracle of a file's meaning is the weight: base + weight * (alpha / rank) * B A, worked out here; the oracle of that
is diffusers, which loads our files, and whose files (and training) we load. float64, so that nothing hides in rounding.
"""

import contextlib
import copy
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import (
    convert_all_state_dict_to_peft,
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import ldm
from model.checkpoint import load_pipeline, save_pipeline
from model.errors import UserError
from model.lora import (
    base_state_dict,
    inject_lora,
    load_lora,
    lora_disabled,
    lora_layers,
    merge_lora,
    save_lora,
    set_lora_weight,
    split_lora,
    unmerge_lora,
)
from model.lora.files import UNET, stems
from model.unet import UNet

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = ATTENTION + ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
                          "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"]
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TO_Q = f"{BLOCK}.attn1.to_q"


@pytest.fixture(scope="module")
def base(tiny):
    return load_pipeline(tiny, dtype=torch.float64)


@pytest.fixture
def unet(base):
    return copy.deepcopy(base.unet)


@pytest.fixture(scope="module")
def module_pipe(tiny):
    return StableDiffusionPipeline.from_pretrained(tiny).to(torch.float64)


@pytest.fixture
def pipe(module_pipe):
    yield module_pipe
    module_pipe.unload_lora_weights()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return randn(2, 4, 9, 6).to(dtype), torch.tensor([7, 640]), randn(2, 5, 32).to(dtype)


@torch.no_grad()
def run(unet: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    return unet(*inputs(dtype))


@torch.no_grad()
def run_diffusers(pipe, **kwargs) -> Tensor:
    return pipe.unet.double()(*inputs(), **kwargs).sample


def assert_same(got: Tensor, wanted: Tensor, base: Tensor | None = None, tolerance: float = 1e-12) -> None:
    """Equal, relative to the largest value; and neither is the `base`, which would say nothing."""
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    print(f"{error:.1e}", end=" ")
    assert error < tolerance
    assert base is None or (wanted - base).abs().max() > 0.01 * base.abs().max()


def trained(unet: nn.Module, rank: int = 4, alpha: float = 4.0, name: str = "default", seed: int = 0) -> nn.Module:
    """With a LoRA that is no longer at its start."""
    inject_lora(unet, rank, alpha, name, generator=torch.Generator().manual_seed(seed))
    for i, layer in enumerate(lora_layers(unet).values()):
        if name in layer.lora_B:
            layer.lora_B[name].data = 0.1 * randn(*layer.lora_B[name].shape, seed=100 * seed + i).float()
    return unet


def layers(unet: nn.Module, ends: list[str]) -> dict[str, nn.Module]:
    ends = tuple(f".{end}" for end in ends)
    return {path: layer for path, layer in unet.named_modules() if f".{path}".endswith(ends)}


def random_pairs(unet: nn.Module, ends: list[str], rank: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) in float32 for every layer whose name ends so; a convolution's A has its kernel, its B is 1 x 1."""
    pairs = {}
    for i, (path, layer) in enumerate(layers(unet, ends).items()):
        out, into, *kernel = layer.weight.shape
        A = randn(rank, into, *kernel, seed=2 * i) / layer.weight[0].numel() ** 0.5
        pairs[path] = A.float(), 0.2 * randn(out, rank, *[1] * len(kernel), seed=2 * i + 1).float()
    assert pairs
    return pairs


def assert_weights(unet: nn.Module, base: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]], scale: float) -> None:
    """Once merged the weights are the base's plus scale * B A, at the layers in `pairs` and nowhere else."""
    merge_lora(unet)
    for name, weight in base_state_dict(unet).items():
        wanted = base.state_dict()[name]
        if name.removesuffix(".weight") in pairs and name.endswith(".weight"):
            A, B = (x.double() for x in pairs[name.removesuffix(".weight")])
            wanted = wanted + scale * torch.einsum("ri...,or->oi...", A, B.flatten(1))
            assert (wanted - base.state_dict()[name]).abs().max() > 1e-3
        torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-12, msg=name)


# What it does to a U-Net

def test_the_base_is_there_bit_for_bit_whenever_the_lora_is_off(base):
    """At the start (B is zero), and in `lora_disabled` ever after: DPO's reference. In float32, as it is used."""
    unet = copy.deepcopy(base.unet).float()
    before = run(unet, torch.float32)
    assert torch.equal(run(trained(unet), torch.float32), before) is False
    unet = copy.deepcopy(base.unet).float()
    inject_lora(unet)
    assert torch.equal(run(unet, torch.float32), before)
    on = run(trained(unet), torch.float32)
    with lora_disabled(unet):
        with lora_disabled(unet):
            pass
        assert torch.equal(run(unet, torch.float32), before)
    with contextlib.suppress(KeyError), lora_disabled(unet):
        raise KeyError
    assert torch.equal(run(unet, torch.float32), on) and not torch.equal(on, before)
    set_lora_weight(unet, 0.0)
    assert torch.equal(run(unet, torch.float32), before)


def test_what_is_adapted_in_sd15():
    """Every linear of every attention and nothing else: 16 blocks of self- and cross-attention."""
    with torch.device("meta"):
        unet = UNet()
    parameters = inject_lora(unet, rank=8)
    paths = set(lora_layers(unet))
    assert len(paths) == 128 and sum(p.numel() for p in parameters) == 1_594_368
    assert paths == {
        path for path, layer in unet.named_modules() if isinstance(layer, nn.Linear) and ".attn" in path}
    assert len(parameters) == 256 and [p for p in unet.parameters() if p.requires_grad] == parameters
    with pytest.raises(UserError, match="nothing to train"):
        inject_lora(nn.Conv2d(3, 3, 1))


def test_the_start(unet):
    """A gaussian with deviation 1 / rank, from the generator alone; B zero; float32 whatever the model is."""
    inject_lora(unet, rank=5, generator=torch.Generator().manual_seed(3))
    A = torch.cat([layer.lora_A["default"].flatten() for layer in lora_layers(unet).values()])
    assert A.dtype == torch.float32 and abs(A.std() * 5 - 1) < 0.01 and abs(A.mean()) < 0.005
    assert abs((A.abs() < 0.2).float().mean() - 0.6827) < 0.01                   # one sigma: normal, not uniform
    assert all(layer.lora_B["default"].count_nonzero() == 0 for layer in lora_layers(unet).values())
    again = inject_lora(copy.deepcopy(unet), rank=5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(A, torch.cat([p.flatten() for p in again[::2]]))


def test_only_the_lora_trains_in_float32_over_a_base_in_bfloat16(base):
    unet = copy.deepcopy(base.unet).to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    parameters = inject_lora(unet, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(4):
        out = unet(*inputs(torch.bfloat16))
        assert out.dtype == torch.bfloat16
        loss = out.float().pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in parameters)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.grad.count_nonzero() > 0 for p in parameters)
    assert [name for name, p in unet.named_parameters() if p.grad is not None and ".lora_" not in name] == []
    after = base_state_dict(unet)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_merged_model_is_saved_as_a_model(tiny, tmp_path):
    """A checkpoint that diffusers reads and that draws as the LoRA did; one whose LoRA would be lost is refused."""
    pipeline = load_pipeline(tiny)
    for parameter in inject_lora(pipeline.unet):
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="merge_lora first"):
        save_pipeline(pipeline, tmp_path / "merged")
    wanted = run(pipeline.unet, torch.float32)
    merge_lora(pipeline.unet)
    save_pipeline(pipeline, tmp_path / "merged")
    assert_same(run(load_pipeline(tmp_path / "merged").unet, torch.float32), wanted, tolerance=1e-5)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", safety_checker=None).to(torch.float64)
    assert_same(run_diffusers(theirs).float(), wanted, tolerance=1e-5)


def test_merging(unet, base):
    """The merged model draws what the LoRA does, as a plain U-Net with the checkpoint's names; it comes apart again."""
    off = run(unet)
    on = run(trained(unet, rank=4, alpha=6.0))
    set_lora_weight(unet, 0.5)
    half = run(unet)
    merge_lora(unet)
    merge_lora(unet)                                                             # it already is
    assert_same(run(unet), half, off)
    with torch.device("meta"):
        plain = UNet((32, 64, 96), (True, True, False), 2, 4, 32, 16)
    plain.load_state_dict(base_state_dict(unet), strict=True, assign=True)
    assert_same(run(plain), half, off)
    for change in (lambda: inject_lora(unet, name="second"), lambda: set_lora_weight(unet, 1.0)):
        with pytest.raises(UserError, match="unmerge_lora first"):               # neither would do what it says
            change()
    unmerge_lora(unet)
    unmerge_lora(unet)
    assert_same(run(unet), half, off)
    set_lora_weight(unet, 1.0)
    assert_same(run(unet), on, half)
    for name, weight in base_state_dict(unet).items():
        torch.testing.assert_close(weight, base.unet.state_dict()[name], rtol=0, atol=1e-14)
    in_bf16 = trained(copy.deepcopy(base.unet).to(torch.bfloat16))
    merge_lora(in_bf16)
    assert all(weight.dtype == torch.bfloat16 for weight in base_state_dict(in_bf16).values())


# Beside diffusers

@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_our_file_draws_the_same_in_diffusers_and_here(unet, base, pipe, tmp_path, format):
    off = run(unet)
    assert_same(run_diffusers(pipe), off)
    on = run(trained(unet, rank=3, alpha=5.0))
    set_lora_weight(unet, 0.5)
    half = run(unet)                                           # as drawn with; the file holds what was trained
    save_lora(tmp_path / "lora.safetensors", unet, format=format)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="ours")
    tolerance = 1e-6 if format == "peft" else 1e-12            # there alpha is folded into B, which is float32
    assert_same(run_diffusers(pipe), on, off, tolerance)
    assert_same(run_diffusers(pipe, cross_attention_kwargs={"scale": 0.5}), half, off, tolerance)
    pipe.set_adapters("ours", 0.5)
    assert_same(run_diffusers(pipe), half, on, tolerance)
    again = copy.deepcopy(base.unet)
    load_lora(tmp_path / "lora.safetensors", again, weight=0.5)
    assert_same(run(again), half, on, tolerance)


def test_what_a_file_says_of_itself(unet, tmp_path):
    trained(unet, rank=3, alpha=5.0)
    save_lora(tmp_path / "kohya.safetensors", unet, metadata={"ss_output_name": "mine"})
    save_lora(tmp_path / "peft.safetensors", unet, format="peft")
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt", "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora",
            "ss_network_dim": "3", "ss_network_alpha": "5.0", "ss_output_name": "mine"}
        stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
        keys = list(file.keys())
        assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} < set(keys)
        assert all(key.startswith("lora_unet_") for key in keys)                 # one other, and diffusers injects none
        assert file.get_tensor(f"{stem}.alpha").item() == 5 and file.get_tensor(f"{stem}.alpha").shape == ()
        assert {file.get_tensor(key).dtype for key in keys} == {torch.float32}
    with safe_open(tmp_path / "peft.safetensors", "pt") as file:
        assert all("lora" in key and key.startswith("unet.") for key in file.keys()) and len(file.keys()) == 2 * 88
    with pytest.raises(UserError, match="no LoRA named 'other'"):
        save_lora(tmp_path / "x.safetensors", unet, name="other")


def test_several_loras_add_up_as_in_diffusers(unet, pipe, tmp_path):
    off = run(unet)
    for seed, name in enumerate(("one", "two")):
        save_lora(tmp_path / f"{name}.safetensors", trained(copy.deepcopy(unet), 2 + seed, 3.0, name, seed), name)
        load_lora(tmp_path / f"{name}.safetensors", unet, name=name)
        pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    last = off
    for weights in ((1.0, 1.0), (0.5, -0.3), (0.0, 1.0)):
        set_lora_weight(unet, weights[0], "one")
        set_lora_weight(unet, weights[1], "two")
        pipe.set_adapters(["one", "two"], list(weights))
        assert_same(run(unet), run_diffusers(pipe), last)
        last = run(unet)
    with lora_disabled(unet):
        assert torch.equal(run(unet), off)


@pytest.mark.parametrize("names", ["lora_A", "lora.down"])
@pytest.mark.parametrize("header", [True, False], ids=["header", "no header"])
def test_a_lora_that_peft_trained_draws_the_same_here(unet, base, pipe, tmp_path, names, header):
    """As diffusers' training scripts make and save it, with alpha != rank, which only the header tells: without it all
    readers take the rank. On more layers than attention's, and on the text encoder with another alpha.

    (Without a header, diffusers 0.42 skips the attention layers of a file that has both kinds of names.)"""
    text = copy.deepcopy(base.text_encoder)
    ids = torch.tensor([[49406, 320, 1125, 49407, 49407]])
    off, off_text = run(unet), text(ids).detach()
    more = [] if names == "lora.down" and not header else ["proj_in", "conv1", "ff.net.2"]
    pipe.unet.add_adapter(LoraConfig(
        r=4, lora_alpha=2, init_lora_weights="gaussian", target_modules=ATTENTION + more,
        alpha_pattern={"mid_block.attentions.0.proj_in": 9, "attn2.to_out.0": 3}))
    pipe.text_encoder.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "out_proj"]))
    for part in (pipe.unet, pipe.text_encoder):
        for i, (name, parameter) in enumerate(part.named_parameters()):
            if ".lora_B." in name:
                parameter.data = 0.1 * randn(*parameter.shape, seed=i)
    state = {part: get_peft_model_state_dict(getattr(pipe, part)) for part in ("unet", "text_encoder")}
    if names == "lora.down":
        state = {part: convert_state_dict_to_diffusers(tensors) for part, tensors in state.items()}
    assert any(names in key for key in state["unet"])
    modules = {"unet": pipe.unet, "text_encoder": pipe.text_encoder} if header else {}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state["unet"], text_encoder_lora_layers=state["text_encoder"],
        **_collate_lora_metadata(modules))
    if not header:                                             # what diffusers itself then makes of the file
        pipe.unload_lora_weights()
        pipe.load_lora_weights(tmp_path)
    load_lora(tmp_path / "pytorch_lora_weights.safetensors", unet, text_encoder=text)
    assert_same(run(unet), run_diffusers(pipe), off, 1e-6)     # the file is float32
    with torch.no_grad():
        assert_same(text(ids), pipe.text_encoder.double()(ids).last_hidden_state, off_text, 1e-6)


def test_kohya_names_by_diffusers(unet, base, pipe, tmp_path):
    """What its advanced DreamBooth script for SD1.5 writes for other programs: the only text encoder is lora_te1_."""
    text = copy.deepcopy(base.text_encoder)
    ids = torch.tensor([[49406, 320, 1125, 49407, 49407]])
    off, off_text = run(unet), text(ids).detach()
    for part, targets in ((pipe.unet, ATTENTION), (pipe.text_encoder, ["q_proj", "out_proj"])):
        part.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
        for i, (name, parameter) in enumerate(part.named_parameters()):
            if ".lora_B." in name:
                parameter.data = 0.1 * randn(*parameter.shape, seed=i)
    StableDiffusionPipeline.save_lora_weights(tmp_path, *(
        convert_state_dict_to_diffusers(get_peft_model_state_dict(part)) for part in (pipe.unet, pipe.text_encoder)))
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    tensors = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(tensors))
    assert {key.split("_")[1] for key in tensors} == {"unet", "te1"}
    save_file(tensors, tmp_path / "kohya.safetensors")
    load_lora(tmp_path / "kohya.safetensors", unet, text_encoder=text)
    assert_same(run(unet), run_diffusers(pipe), off, 1e-6)
    with torch.no_grad():
        assert_same(text(ids), pipe.text_encoder.double()(ids).last_hidden_state, off_text, 1e-6)
    load_lora(tmp_path / "kohya.safetensors", copy.deepcopy(base.unet))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_of_the_unet_alone_and_one_of_pefts_own(unet, base, pipe, tmp_path, rslora):
    """`unet.save_lora_adapter` prefixes neither names nor header; peft's own folder has alpha beside the file."""
    config = LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION, use_rslora=rslora)
    pipe.unet.add_adapter(config)
    for i, (name, parameter) in enumerate(pipe.unet.named_parameters()):
        if ".lora_B." in name:
            parameter.data = (0.1 * randn(*parameter.shape, seed=i)).float()
    wanted = run_diffusers(pipe)
    pipe.unet.save_lora_adapter(tmp_path)
    own = {f"base_model.model.{k}": x.float() for k, x in get_peft_model_state_dict(pipe.unet).items()}
    save_file(own, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 2
    off = run(unet)
    for file in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        unet = copy.deepcopy(base.unet)
        load_lora(tmp_path / file, unet)
        assert_same(run(unet), wanted, off)


def test_a_kohya_file_that_covers_everything_draws_the_same(unet, pipe, tmp_path):
    """As trainers on Civitai make them: projections, feed-forward, and (LoCon) the convolutions of the resnets."""
    off = run(unet)
    tensors = {}
    for path, (A, B) in random_pairs(unet, EVERYTHING).items():
        tensors |= kohya(path, A, B)
    save_file(tensors, tmp_path / "locon.safetensors")
    load_lora(tmp_path / "locon.safetensors", unet)
    pipe.load_lora_weights(tmp_path, weight_name="locon.safetensors")
    assert_same(run(unet), run_diffusers(pipe), off, 1e-6)


# Files

def peft(path: str, A: Tensor, B: Tensor, prefix: str = "unet.") -> dict[str, Tensor]:
    return {f"{prefix}{path}.lora_A.weight": A, f"{prefix}{path}.lora_B.weight": B}


def diffusers(path: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {f"unet.{path}.lora.down.weight": A, f"unet.{path}.lora.up.weight": B}


def processors(path: str, A: Tensor, B: Tensor, prefix: str = "unet.") -> dict[str, Tensor]:
    """to_out.0 was to_out_lora then."""
    attention, leaf = path.removesuffix(".0").rsplit(".", 1)
    stem = f"{prefix}{attention}.processor.{leaf}_lora"
    return {f"{stem}.down.weight": A, f"{stem}.up.weight": B}


def kohya(path: str, A: Tensor, B: Tensor, alpha: float | None = 1.5, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    stem = prefix + path.replace(".", "_")
    tensors = {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B}
    return tensors if alpha is None else tensors | {f"{stem}.alpha": torch.tensor(alpha, dtype=A.dtype)}


RANK_3 = {                 # name -> how a layer is written, the layers, alpha / rank
    "peft": (peft, ATTENTION, 1),
    "diffusers": (diffusers, ATTENTION, 1),
    "attention processors": (processors, ATTENTION, 1),
    "attention processors, bare": (lambda *x: processors(*x, prefix=""), ATTENTION, 1),
    "peft's own": (lambda *x: peft(*x, prefix="base_model.model."), ATTENTION, 1),
    "kohya": (kohya, EVERYTHING, 0.5),
    "kohya without alpha": (lambda *x: kohya(*x, alpha=None), EVERYTHING, 1),
    "kohya, alpha zero": (lambda *x: kohya(*x, alpha=0.0), EVERYTHING, 1),
    "kohya in float16": (lambda path, A, B: kohya(path, A.half(), B.half()), EVERYTHING, 0.5),
    "kohya in bfloat16": (lambda path, A, B: kohya(path, A.bfloat16(), B.bfloat16()), EVERYTHING, 0.5),
    "LyCORIS's own": (lambda *x: kohya(*x, prefix="lycoris_"), EVERYTHING, 0.5),
    "peft, everything": (peft, EVERYTHING, 1)}


@pytest.mark.parametrize("write, ends, scale", RANK_3.values(), ids=RANK_3)
def test_every_format_says_the_same(unet, base, tmp_path, write, ends, scale):
    pairs = random_pairs(unet, ends)
    tensors = {}
    for path, (A, B) in pairs.items():
        written = write(path, A, B)
        tensors |= written
        _, _, *_ = pairs[path] = [x.float() for x in written.values() if x.ndim > 1]         # as rounded
    save_file(tensors, tmp_path / "lora.safetensors")          # and without any metadata
    load_lora(tmp_path / "lora.safetensors", unet, weight=-0.7)
    assert len(lora_layers(unet)) == len(pairs) >= 88
    assert not any(parameter.requires_grad for parameter in unet.parameters())             # whoever trains it says so
    assert_weights(unet, base.unet, pairs, -0.7 * scale)


def test_linears_and_1x1_convolutions_are_stored_as_either(unet, base, tmp_path):
    """Trainers differ in which of the two they take them for."""
    pairs = random_pairs(unet, ["proj_in", "proj_out", "to_q", "ff.net.2"])
    tensors = {}
    for path, (A, B) in pairs.items():
        flip = (lambda x: x[:, :, None, None]) if A.ndim == 2 else lambda x: x.flatten(1)
        tensors |= kohya(path, flip(A), flip(B))
    save_file(tensors, tmp_path / "lora.safetensors")
    load_lora(tmp_path / "lora.safetensors", unet)
    assert_weights(unet, base.unet, pairs, 0.5)


LDM = {                    # diffusers' name -> the name on LDM's blocks
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_1_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k": "input_blocks_8_1_transformer_blocks_0_attn2_to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0":
        "middle_block_1_transformer_blocks_0_attn1_to_out_0",
    "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_v": "output_blocks_5_1_transformer_blocks_0_attn1_to_v",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj":
        "output_blocks_11_1_transformer_blocks_0_ff_net_0_proj",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.3.resnets.1.time_emb_proj": "input_blocks_11_0_emb_layers_1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_1_conv",
    "up_blocks.2.upsamplers.0.conv": "output_blocks_8_2_conv"}


def test_names_on_ldm_blocks(tmp_path):
    """At SD1.5's size, of which they count the blocks; a file of all 128 lands on the layers it is for."""
    with torch.device("meta"):
        unet = UNet()
    names = stems(unet, UNET)
    for path, ldm_name in LDM.items():
        assert names[f"lora_unet_{ldm_name}"] == names["lora_unet_" + path.replace(".", "_")] == path
    starts = tuple(f"lora_unet_{s}_" for s in ("input_blocks", "middle_block", "output_blocks", "time_embed", "out"))
    on_ldm = {stem: path for stem, path in names.items() if stem.startswith(starts)}
    assert len(on_ldm) == 282 and set(on_ldm.values()) == {
        path for path, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}

    tensors = {}
    for stem, path in on_ldm.items():
        if path.endswith(tuple(f".{end}" for end in ATTENTION)):
            out, into = unet.get_submodule(path).weight.shape
            tensors |= kohya(stem, torch.ones(1, into), torch.ones(out, 1), prefix="")
    save_file(tensors, tmp_path / "ldm.safetensors")
    load_lora(tmp_path / "ldm.safetensors", unet)
    assert len(lora_layers(unet)) == 128


def test_a_lora_that_comfyui_saved(tmp_path):
    """Of every matrix and convolution under LDM's names, without alpha; and the differences of norms and biases, which
    are zero where a LoRA alone made the difference. Others are refused."""
    torch.manual_seed(0)
    base = UNet((32, 32, 64, 64), (True, True, True, False), 2, 4, 32, 16).double()        # of SD1.5's depth
    unet, tensors = copy.deepcopy(base), {}
    matrices = nn.Linear | nn.Conv2d
    pairs = random_pairs(unet, [path for path, layer in unet.named_modules() if isinstance(layer, matrices)])
    for name, weight in unet.state_dict().items():
        stem = "diffusion_model." + ldm.unet_name(name).rpartition(".")[0]
        path, _, kind = name.rpartition(".")
        if path in pairs and kind == "weight":
            tensors |= {f"{stem}.lora_down.weight": pairs[path][0], f"{stem}.lora_up.weight": pairs[path][1]}
        else:
            tensors[stem + (".diff_b" if kind == "bias" else ".diff")] = torch.zeros_like(weight)
    save_file(tensors, tmp_path / "lora.safetensors")
    load_lora(tmp_path / "lora.safetensors", unet)
    assert_weights(unet, base, pairs, 1)
    tensors["diffusion_model.out.2.diff_b"] += 1
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_refused(tmp_path / "lora.safetensors", copy.deepcopy(base), r"a full difference.*\(diffusion_model.out.2.")


@pytest.mark.parametrize("style", [
    "lora_te1_text_model_encoder_layers_{}_self_attn_q_proj.lora_down.weight",
    "lora_te1_encoder_layers_{}_self_attn_q_proj.lora_down.weight",
    "lycoris_text_model_encoder_layers_{}_self_attn_q_proj.lora_down.weight",
    "lycoris_encoder_layers_{}_self_attn_q_proj.lora_down.weight",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.{}.self_attn.q_proj.lora_down.weight",
    "lora_te_text_model_encoder_layers_{}_self_attn_q_proj.lora_down.weight",
    "lora_te_encoder_layers_{}_self_attn_q_proj.lora_down.weight",
    "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj.lora_A.weight",
    "text_encoder.encoder.layers.{}.self_attn.q_proj.lora_A.weight",
    "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj.lora_linear_layer.down.weight"])
def test_text_encoder_keys(unet, base, tmp_path, style):
    """With `text_model` and, as newer libraries write it, without. A reader who gives no text encoder does without."""
    text = copy.deepcopy(base.text_encoder)
    pairs = random_pairs(text, ["self_attn.q_proj"])
    tensors = kohya(TO_Q, *random_pairs(unet, ["to_q"])[TO_Q])
    for i, (A, B) in enumerate(pairs.values()):
        key = style.format(i)
        tensors |= {key: A, key.replace("down", "up").replace("lora_A", "lora_B"): B}
    save_file(tensors, tmp_path / "lora.safetensors")
    load_lora(tmp_path / "lora.safetensors", unet, text_encoder=text)
    assert_weights(text, base.text_encoder, pairs, 1)
    other = copy.deepcopy(base.unet)
    load_lora(tmp_path / "lora.safetensors", other)
    assert list(lora_layers(other)) == list(lora_layers(unet)) == [TO_Q]

    del tensors["lora_unet_" + TO_Q.replace(".", "_") + ".alpha"]
    save_file({k: x for k, x in tensors.items() if "lora_unet" not in k}, tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="covers the text encoder alone"):
        load_lora(tmp_path / "text.safetensors", other)


# What is refused

def one_pair(**changes: Tensor | None) -> dict[str, Tensor]:
    tensors = kohya(TO_Q, torch.ones(2, 32), torch.ones(32, 2))
    for name, value in changes.items():
        tensors = {k: value if k.endswith(name) else x for k, x in tensors.items()}
    return {k: x for k, x in tensors.items() if x is not None}


STEM = "lora_unet_" + TO_Q.replace(".", "_")
NAN = torch.tensor([[float("nan"), 1.0]]).repeat(32, 1)
REFUSED = {
    "DoRA": (one_pair() | {f"{STEM}.dora_scale": torch.ones(32, 1)}, "DoRA, not plain LoRA"),
    "DoRA by peft": (peft(TO_Q, torch.ones(2, 32), torch.ones(32, 2)) | {
        f"unet.{TO_Q}.lora_magnitude_vector": torch.ones(32)}, "DoRA, not plain LoRA"),
    "LoHa": ({f"{STEM}.hada_w1_a": torch.ones(2, 2), f"{STEM}.alpha": torch.tensor(1.0)}, "LoHa, not plain LoRA"),
    "LoKr": ({f"{STEM}.lokr_w1": torch.ones(2, 2), f"{STEM}.alpha": torch.tensor(1.0)}, "LoKr, not plain LoRA"),
    "full difference": (one_pair() | {f"{STEM}.diff": torch.ones(32, 32)}, "a full difference, not plain LoRA"),
    "LoHa by LyCORIS": ({f"lycoris_{STEM[10:]}.hada_w1_a": torch.ones(2, 2)}, "LoHa, not plain LoRA"),
    "DoRA on LDM's names": (
        one_pair() | {"diffusion_model.middle_block.1.proj_in.dora_scale": torch.ones(4, 1)}, "DoRA, not plain LoRA"),
    "SDXL": (one_pair() | {"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)}, "a LoRA for SDXL"),
    "a checkpoint": ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, "not a LoRA"),
    "another model's layers": (
        one_pair() | kohya("transformer.blocks.0.to_q", torch.ones(2, 32), torch.ones(32, 2)),
        r"3 of 6 tensors belong to no layer.*lora_unet_transformer_blocks_0_to_q"),
    "another model's widths": (
        kohya(TO_Q, torch.ones(2, 320), torch.ones(320, 2)),
        rf"{TO_Q} is 32 -> 32 here, and the LoRA's pair is \(2, 320\) and \(320, 2\).*another model"),
    "up the other way round": (
        kohya(TO_Q, torch.ones(2, 32), torch.ones(2, 32)), rf"{TO_Q} is 32 -> 32 here, .* \(2, 32\) and \(2, 32\)"),
    "kohya's name and peft's": (
        one_pair() | peft(TO_Q, torch.ones(2, 32), torch.ones(32, 2)),
        f"{TO_Q} is in it twice, the second time as unet.{TO_Q}.lora_[AB]"),
    "NaN": (one_pair() | {f"{STEM}.lora_up.weight": NAN}, f"NaN or infinite values at {TO_Q}"),
    "alpha is infinite": (one_pair(alpha=torch.tensor(float("inf"))), f"NaN or infinite values at {TO_Q}"),
    "no up": ({k: x for k, x in one_pair().items() if "up" not in k}, f"half of the pair for {TO_Q} is missing"),
    "alpha of several numbers": (one_pair(alpha=torch.ones(2)), f"alpha at {TO_Q} is no single number"),
    "alpha is NaN": (one_pair(alpha=torch.tensor(float("nan"))), f"NaN or infinite values at {TO_Q}"),
    "quantised": (one_pair() | {f"{STEM}.lora_up.weight": torch.ones(32, 2, dtype=torch.int8)}, "of torch.int8, not a"),
    "complex": (one_pair() | {f"{STEM}.lora_up.weight": torch.ones(32, 2) * 1j}, "of torch.complex64"),
    "rank 0": (kohya(TO_Q, torch.ones(0, 32), torch.ones(32, 0)), "LoRA's pair is of rank 0"),
    "no matrices": (kohya(TO_Q, torch.ones(()), torch.ones(())), "LoRA's pair is of rank 0"),
    "alpha alone": ({k: x for k, x in one_pair().items() if "alpha" in k}, f"half of the pair for {TO_Q} is missing"),
    "empty": ({}, "not a LoRA")}


def assert_refused(path, unet: nn.Module, words: str) -> None:
    """In one line that begins with the file's name, and leaving the model as it was."""
    with pytest.raises(UserError, match=words) as caught:
        load_lora(path, unet)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and lora_layers(unet) == {}


@pytest.mark.parametrize("tensors, words", REFUSED.values(), ids=REFUSED)
def test_refused_by_name(unet, tmp_path, tensors, words):
    first = kohya(f"{BLOCK}.attn1.to_k", torch.ones(2, 32), torch.ones(32, 2)) if tensors else {}       # is all right
    if "belong to no layer" in words or words == "not a LoRA":
        first = {}
    save_file(first | tensors, tmp_path / "lora.safetensors")
    assert_refused(tmp_path / "lora.safetensors", unet, words)


def test_refused_files(unet, tmp_path):
    file = tmp_path / "lora.safetensors"
    assert_refused(file, unet, "no such LoRA file")
    assert_refused(tmp_path, unet, "no such LoRA file")
    save_lora(file, trained(copy.deepcopy(unet)))
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(file, unet, "download it again")
    file.write_text("<!doctype html><title>Not found</title>" + " " * 600)
    assert_refused(file, unet, "a web page")
    save_file(one_pair(), file, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert_refused(file, unet, "a LoRA for SDXL")


GOOD = {"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"]}
SETTINGS = {               # lora_adapter_metadata, and what is said of it, or the alpha that is read for a rank of 2
    "as it should be": (GOOD, 2), "empty": ({}, 2), "null": ({"lora_alpha": None, "alpha_pattern": None}, 2),
    "alpha 0": ({"lora_alpha": 0}, 2), "a pattern": (GOOD | {"unet.alpha_pattern": {"attn1.to_[qk]": 7}}, 7),
    "no text": ("", "not JSON"), "not JSON": ("{'unet.r': 4}", "not JSON"), "cut": ('{"unet.r": ', "not JSON"),
    "deep": ("[" * 100_000, "not JSON"), "a list": ([1], "an object in {} was expected"),
    "alpha is text": ({"unet.lora_alpha": "2"}, "lora_alpha is '2'; float was expected"),
    "alpha is a list": ({"lora_alpha": [2]}, r"lora_alpha is \[2\]; float was expected"),
    "alpha is true": ({"lora_alpha": True}, "lora_alpha is True; float was expected"),
    "alpha is NaN": ({"lora_alpha": float("nan")}, f"alpha at {TO_Q} is nan; a finite number was expected"),
    "alpha is infinite": ({"lora_alpha": float("-inf")}, f"alpha at {TO_Q} is -inf; a finite number was expected"),
    "alpha is huge": ({"lora_alpha": 10**400}, "lora_alpha is 1000.*; float was expected"),
    "patterns in a list": ({"alpha_pattern": ["to_q"]}, "alpha_pattern is .*; dict was expected"),
    "no pattern": ({"alpha_pattern": {"to_(q": 4}}, r"alpha_pattern has 'to_\(q', no regular expression"),
    "an endless pattern": ({"alpha_pattern": {"q{99999999999}": 4}}, "no regular expression"),
    "a pattern for ever": ({"alpha_pattern": {"(.*)*x": 4}}, r"alpha_pattern has '\(\.\*\)\*x'; up to 2000 patterns"),
    "three repeats": ({"alpha_pattern": {".*.*.*x": 4}}, "each with two repeats or less"),
    "a long pattern": ({"alpha_pattern": {"x" * 301: 4}}, "up to 2000 patterns"),
    "many patterns": ({"alpha_pattern": {f"x{i}": 4 for i in range(2001)}}, "up to 2000 patterns"),
    "two repeats": (GOOD | {"unet.alpha_pattern": {r".*attn1\.to_[qk]+": 7}}, 7),
    "a pattern's alpha": ({"alpha_pattern": {"to_q": "4"}}, f"alpha at {TO_Q} is '4'; a finite number was expected"),
    "rslora": ({"use_rslora": "no"}, "use_rslora is 'no'; bool was expected")}


@pytest.mark.parametrize("settings, wanted", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_cannot_be_read(unet, tmp_path, settings, wanted):
    """Of peft, in the file's header or beside the file."""
    text = settings if isinstance(settings, str) else json.dumps(settings)
    A, B = torch.ones(2, 32), torch.ones(32, 2)
    save_file(peft(TO_Q, A, B), tmp_path / "header.safetensors", {"lora_adapter_metadata": text})
    save_file(peft(TO_Q, A, B, prefix="base_model.model."), tmp_path / "peft.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    for name, where in (("header", "header.safetensors, lora_adapter_metadata"), ("peft", "adapter_config.json")):
        if isinstance(wanted, str):
            with pytest.raises(UserError, match=wanted) as caught:
                load_lora(tmp_path / f"{name}.safetensors", unet)
            message = str(caught.value)
            assert message.startswith(f"{tmp_path / where}: ") and "\n" not in message and lora_layers(unet) == {}
        else:
            load_lora(tmp_path / f"{name}.safetensors", unet, name=name)
            assert lora_layers(unet)[TO_Q].lora_alpha[name] == wanted


def test_a_file_and_its_weight():
    assert split_lora("a/b.safetensors:0.5") == ("a/b.safetensors", 0.5)
    assert split_lora("c:b.safetensors") == ("c:b.safetensors", 1.0) and split_lora(":1") == (":1", 1.0)
    for weight in ("nan", "inf", "1e999"):
        with pytest.raises(UserError, match="finite number"):
            split_lora(f"a:{weight}")
