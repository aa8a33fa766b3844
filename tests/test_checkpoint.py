"""Checkpoints: every form in which the same weights are found loads to the same modules, and every wrong file is
refused with a line of its own that says what it is. The oracles are the files that diffusers writes, its own readers of
them, and its converter of LDM files."""

import inspect
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig

import cli
import generate
from model import ldm
from model.checkpoint import SkipInit, load_pipeline, load_vae, mend_text_names, read_single_file, save_pipeline
from model.clip import CLIP, CLIPTextEncoder
from model.configs import check_scheduler, clip_arguments, text_arguments, unet_arguments, vae_arguments
from model.errors import UserError
from model.tokenizer import Tokenizer
from model.unet import UNet
from model.vae import VAE
from sampling.dpm_solver import dpm_solver_schedule
from sampling.schedule import make_alphas_cumprod, timesteps

UNET, VAE_FILE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
INDEX = UNET + ".index.json"
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def plain(tiny):
    return load_pipeline(tiny)


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of `tiny` that a test may change, by `rewrite` and `edit`: its files are links, so never in place."""
    return shutil.copytree(tiny, tmp_path / "model", copy_function=os.link)


def rewrite(path: Path, content: dict[str, Tensor] | bytes | str) -> None:
    path.unlink(missing_ok=True)
    if isinstance(content, dict):
        save_file(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(path: Path, absent: tuple[str, ...] = (), **values) -> None:
    """Changes keys of a JSON file."""
    config = json.loads(path.read_text()) | values
    rewrite(path, json.dumps({key: value for key, value in config.items() if key not in absent}))


def weights(pipeline) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor for part in ("unet", "vae", "text_encoder")
        for name, tensor in getattr(pipeline, part).state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different, different[:5]


def refusal(call, *args, **kwargs) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500, message
    return message


# The same weights, however they are written

def vae_attention(ndim: int, old: bool):
    def write(folder):
        tensors = {}
        for name, tensor in load_file(folder / VAE_FILE).items():
            if ".attentions.0." in name and "group_norm" not in name:
                tensor = tensor.reshape(*tensor.shape, *[1] * (ndim - 2)) if tensor.ndim == 2 else tensor
                for new, before in OLD_NAMES.items() if old else ():
                    name = name.replace(f".{new}.", f".{before}.")
            tensors[name] = tensor
        assert sum(".query." in name for name in tensors) == (4 if old else 0)      # 2 sides, weight and bias
        rewrite(folder / VAE_FILE, tensors)
    return write


def text_names(prefix: str, position_ids: Tensor | None):
    def write(folder):
        tensors = {prefix + name.removeprefix("text_model."): t for name, t in load_file(folder / TEXT).items()}
        if position_ids is not None:
            tensors[f"{prefix}embeddings.position_ids"] = position_ids
        rewrite(folder / TEXT, tensors)
    return write


def by_diffusers(**how):
    """Written again by diffusers itself, in another way."""
    def write(folder):
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        shutil.rmtree(folder / "unet")
        unet.save_pretrained(folder / "unet", **how)
        assert not (folder / UNET).exists()
    return write


def renamed(folder):
    """Only a variant, and in full precision: a name does not tell what a file holds."""
    for name in (UNET, VAE_FILE, TEXT):
        (folder / name).rename((folder / name).with_suffix(".fp16.safetensors"))


def pickled(folder):
    torch.save(load_file(folder / UNET), folder / "unet/diffusion_pytorch_model.bin")
    torch.save(load_file(folder / TEXT), folder / "text_encoder/pytorch_model.bin")
    (folder / UNET).unlink()
    (folder / TEXT).unlink()


def beside_others(folder):
    """What else a repository holds is not what is read."""
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
                 "unet/diffusion_pytorch_model.bin", "text_encoder/model.fp16.safetensors"):
        (folder / name).write_text("not to be read")


POSITIONS = torch.arange(77)[None]
WAYS = {
    "old VAE names, linear": vae_attention(2, old=True),
    "old VAE names, [C, C, 1]": vae_attention(3, old=True),
    "old VAE names, [C, C, 1, 1]": vae_attention(4, old=True),
    "new VAE names, [C, C, 1, 1]": vae_attention(4, old=False),
    "flat text": text_names("", None), "prefixed text": text_names("text_model.", None),
    "int64 position_ids": text_names("text_model.", POSITIONS),
    "damaged position_ids": text_names("", POSITIONS * 0.993),
    "half position_ids": text_names("text_model.", POSITIONS.half()),
    "sharded": by_diffusers(max_shard_size="3MB"),
    "sharded variant": by_diffusers(max_shard_size="3MB", variant="fp16"),
    "variant": renamed, "bin": pickled, "beside others": beside_others}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_gives_the_same_modules(way, folder, plain):
    WAYS[way](folder)
    assert_same(weights(load_pipeline(folder)), weights(plain))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, folder, plain):
    """Half files load to either precision; `dtype` rounds full ones; the VAE is float32 in every case."""
    for name in (UNET, VAE_FILE, TEXT):
        rewrite(folder / name, {key: tensor.to(dtype) for key, tensor in load_file(folder / name).items()})
    rounded = {name: tensor.to(dtype) for name, tensor in weights(plain).items()}
    assert_same(weights(load_pipeline(folder)), {name: tensor.float() for name, tensor in rounded.items()})

    pipeline = load_pipeline(folder, "cpu", dtype)
    assert pipeline.dtype == dtype and pipeline.device == torch.device("cpu")
    assert_same(weights(pipeline), {
        name: tensor.float() if name.startswith("vae.") else tensor for name, tensor in rounded.items()})
    assert not any(p.requires_grad or p.is_meta for m in (pipeline.unet, pipeline.vae) for p in m.parameters())
    assert not (pipeline.unet.training or pipeline.vae.training or pipeline.text_encoder.training)


def test_absent_keys_have_the_defaults_of_the_classes_that_wrote_them(folder, plain):
    """Official configs leave most keys out. Leaving out every key that has diffusers' (transformers') own default
    changes nothing, and our defaults are those."""
    def defaults(function) -> dict:
        return {key: p.default for key, p in inspect.signature(function).parameters.items()}

    unet, vae = defaults(UNet2DConditionModel.__init__), defaults(AutoencoderKL.__init__)
    text = CLIPTextConfig().to_dict()
    found = unet_arguments({}, "")
    assert found.pop("attention") == (True, True, True, False)
    assert found == {key: unet[key] for key in found} and found["cross_attention_dim"] == 1280
    found = vae_arguments({}, "")
    assert found == {key: vae[key] for key in found} and found["scaling_factor"] == 0.18215
    found = text_arguments({}, "")
    assert found == {key: text[key] for key in found}

    for part, default in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        path = folder / part / "config.json"
        config = json.loads(path.read_text())
        absent = [key for key in config if key in default and default[key] == config[key]]
        assert len(absent) > 3
        edit(path, absent, **({"upcast_attention": None} if part == "unet" else {}))       # null, as some files have it
    assert_same(weights(load_pipeline(folder)), weights(plain))


def test_our_defaults_are_the_official_config():
    """An LDM file's config, the constructors' defaults and the official files' shapes are one and the same."""
    checks = {
        "unet": (UNet, unet_arguments), "vae": (VAE, vae_arguments), "text_encoder": (CLIPTextEncoder, text_arguments)}
    for part, (module, arguments) in checks.items():
        defaults = {key: p.default for key, p in inspect.signature(module).parameters.items()}
        found = arguments(ldm.SD15[part], "")
        assert found == {key: defaults[key] for key in found}
    check_scheduler(ldm.SD15["scheduler"], "")


def test_the_prediction_type_of_a_model_whose_files_do_not_tell(tiny, plain):
    assert plain.configs["scheduler"].get("prediction_type", "epsilon") == "epsilon"
    assert load_pipeline(tiny, prediction_type="v_prediction").configs["scheduler"]["prediction_type"] == "v_prediction"


# What is not SD1.5

NOT_SD15 = [
    (unet_arguments, "use_linear_projection", True), (unet_arguments, "class_embed_type", "timestep"),
    (unet_arguments, "in_channels", 9), (unet_arguments, "in_channels", 8), (unet_arguments, "out_channels", 8),
    (unet_arguments, "attention_head_dim", [5, 10, 20, 20]), (unet_arguments, "cross_attention_dim", [768] * 4),
    (unet_arguments, "num_attention_heads", 8), (unet_arguments, "addition_embed_type", "text_time"),
    (unet_arguments, "encoder_hid_dim", 768), (unet_arguments, "time_cond_proj_dim", 256),
    (unet_arguments, "transformer_layers_per_block", [1, 2, 10]), (unet_arguments, "only_cross_attention", True),
    (unet_arguments, "dual_cross_attention", True), (unet_arguments, "resnet_time_scale_shift", "scale_shift"),
    (unet_arguments, "flip_sin_to_cos", False), (unet_arguments, "freq_shift", 1), (unet_arguments, "act_fn", "gelu"),
    (unet_arguments, "mid_block_type", "UNetMidBlock2D"), (unet_arguments, "a_key_of_tomorrow", 3),
    (unet_arguments, "down_block_types", ["AttnDownBlock2D"] * 3),
    (unet_arguments, "up_block_types", ["UpBlock2D"] * 3),
    (unet_arguments, "down_block_types", "DownBlock2D"), (unet_arguments, "block_out_channels", [32, 64]),
    (unet_arguments, "block_out_channels", 32), (unet_arguments, "layers_per_block", [1, 2, 2]),
    (unet_arguments, "layers_per_block", 0), (unet_arguments, "norm_num_groups", 5),
    (unet_arguments, "norm_num_groups", None), (unet_arguments, "attention_head_dim", 5),
    (unet_arguments, "sample_size", "64"), (unet_arguments, "sample_size", -64),
    (unet_arguments, "sample_size", [64]), (unet_arguments, "layers_per_block", 65),
    (unet_arguments, "block_out_channels", [33, 64, 96]), (vae_arguments, "block_out_channels", [16] * 9),
    (vae_arguments, "latent_channels", 16), (vae_arguments, "use_quant_conv", False),
    (vae_arguments, "shift_factor", 0.1159), (vae_arguments, "latents_mean", [0.0] * 4),
    (vae_arguments, "mid_block_add_attention", False), (vae_arguments, "block_out_channels", []),
    (vae_arguments, "down_block_types", ["DownEncoderBlock2D"]), (vae_arguments, "up_block_types", None),
    (vae_arguments, "scaling_factor", "0.18"), (vae_arguments, "scaling_factor", float("inf")),
    (vae_arguments, "scaling_factor", 0),
    (vae_arguments, "norm_num_groups", 7), (vae_arguments, "layers_per_block", None),
    (text_arguments, "hidden_act", "relu"), (text_arguments, "hidden_act", ["gelu"]),
    (text_arguments, "layer_norm_eps", 1e-6), (text_arguments, "num_attention_heads", 5),
    (text_arguments, "vocab_size", -1), (text_arguments, "num_hidden_layers", "12"),
    (check_scheduler, "rescale_betas_zero_snr", True), (check_scheduler, "num_train_timesteps", 500),
    (check_scheduler, "prediction_type", "sample"), (check_scheduler, "prediction_type", None),
    (check_scheduler, "beta_schedule", "squaredcos_cap_v2"), (check_scheduler, "timestep_spacing", "log"),
    (check_scheduler, "trained_betas", [0.1] * 10), (check_scheduler, "trained_betas", [0.1] * 999 + ["x"]),
    (check_scheduler, "trained_betas", []), (check_scheduler, "beta_end", "0.012"), (check_scheduler, "beta_start", -1),
    (check_scheduler, "steps_offset", "1"), (check_scheduler, "steps_offset", 2),
    (check_scheduler, "algorithm_type", "sde-dpmsolver++")]


@pytest.mark.parametrize("check, key, value", NOT_SD15, ids=[f"{key}={str(v):.20}" for _, key, v in NOT_SD15])
def test_a_config_that_asks_for_something_else_is_refused_by_the_key(check, key, value, plain):
    part = {unet_arguments: "unet", vae_arguments: "vae", text_arguments: "text_encoder"}.get(check, "scheduler")
    check(plain.configs[part], "")
    message = refusal(check, plain.configs[part] | {key: value}, "folder/config.json")
    assert message.startswith("folder/config.json: ") and key in message


def taken_or_refused(call, *args) -> None:
    """Nothing is raised but one line, and a short one."""
    try:
        call(*args)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500, error


def clip_tower(part: str, other: dict):
    return lambda config, where: clip_arguments({**other, part: config}, where)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "clip", "text_config", "vision_config"])
def test_whatever_a_config_says_it_is_refused_in_one_line_or_a_network_can_be_made_of_it(part, plain, tiny_scorer):
    clip = json.loads((tiny_scorer / "config.json").read_text())
    check, network = {
        "unet": (unet_arguments, UNet), "vae": (vae_arguments, VAE), "text_encoder": (text_arguments, CLIPTextEncoder),
        "scheduler": (check_scheduler, None), "clip": (clip_arguments, CLIP),
    }.get(part) or (clip_tower(part, clip), CLIP)
    config = plain.configs.get(part) or clip.get(part, clip)
    usual = check(config, "")

    def make(config):
        arguments = check(config, "config.json")
        if network is None:
            alphas_cumprod = make_alphas_cumprod(config)
            assert alphas_cumprod.isfinite().all()
            for n in (1, 50, 1000):
                assert timesteps(n, config) and dpm_solver_schedule(n, alphas_cumprod, config)
        elif arguments != usual:
            with torch.device("meta"), SkipInit():
                network(**arguments)

    for key in [*config, "a_key_of_tomorrow"]:
        for value in [None, True, -1, 0, 1.5, float("inf"), "x", [], {}, [None], [[1]], 10**30]:
            taken_or_refused(make, config | {key: value})


@pytest.mark.parametrize("content", [
    lambda text: text[:len(text) // 2], lambda text: b"\xef\xbb\xbf" + text, lambda text: text + b"\xe9",
    lambda text: b"[" * 100_000, lambda text: text.decode().encode("utf-16")],
    ids=["cut", "byte order mark", "latin-1", "deep", "UTF-16"])
def test_whatever_a_text_file_holds_it_is_refused_in_one_line_or_loads(content, folder, tokenizer_folder, tmp_path):
    for path in sorted(folder.rglob("*.json")):
        text = path.read_bytes()
        rewrite(path, content(text))
        taken_or_refused(load_pipeline, folder)
        rewrite(path, text)
    shutil.copytree(tokenizer_folder, tmp_path / "words")                            # of the older, two-file form
    for path in sorted((tmp_path / "words").iterdir()):
        text = path.read_bytes()
        rewrite(path, content(text))
        taken_or_refused(Tokenizer.from_folder, tmp_path / "words")
        rewrite(path, text)


def test_parts_of_different_models_are_refused(folder):
    edit(folder / "unet/config.json", cross_attention_dim=768)
    assert "the U-Net expects text features 768 wide and the text encoder makes 32" in refusal(load_pipeline, folder)
    edit(folder / "unet/config.json", cross_attention_dim=32)
    edit(folder / "text_encoder/config.json", vocab_size=1000)
    assert "up to 77 of 49408 tokens and the text encoder takes up to 77 of 1000" in refusal(load_pipeline, folder)


# Out and in again

def test_what_is_saved_is_what_was_loaded(folder, plain, tmp_path):
    """Our own reader and diffusers' both find the same weights, settings and token ids; every file is whole."""
    vae_attention(4, old=True)(folder)                                                # mended names are written
    out = tmp_path / "saved"
    save_pipeline(load_pipeline(folder), out)
    again = load_pipeline(out)
    assert_same(weights(again), weights(plain))
    assert again.configs == plain.configs and again.native_size == (32, 32)
    assert torch.equal(again.alphas_cumprod, plain.alphas_cumprod)

    oracle = StableDiffusionPipeline.from_pretrained(out, local_files_only=True)
    theirs = {f"unet.{k}": v for k, v in oracle.unet.state_dict().items()}
    theirs |= {f"vae.{k}": v for k, v in oracle.vae.state_dict().items()}
    theirs |= {f"text_encoder.{k}": v for k, v in mend_text_names(oracle.text_encoder.state_dict()).items()}
    assert_same(theirs, weights(plain))
    assert dict(oracle.scheduler.config).items() >= plain.configs["scheduler"].items() - {"_diffusers_version"}
    ids = oracle.tokenizer("a Café, 2 dogs' (tails)").input_ids
    assert ids == again.tokenizer.encode(["a Café, 2 dogs' (tails)"])[0].tolist()[:len(ids)]

    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"model_index.json", UNET, VAE_FILE, TEXT, "scheduler/scheduler_config.json"} <= written
    assert not any(name.endswith(".part") for name in written)
    (out / "anyone's").touch()
    assert {(out / name).stat().st_mode for name in written} == {(out / "anyone's").stat().st_mode}      # as the umask
    save_pipeline(again, out, torch.float16)                                          # onto itself, and rounded
    assert_same(weights(load_pipeline(out)), {name: t.half().float() for name, t in weights(plain).items()})


def test_a_save_that_breaks_off_leaves_the_old_file(folder, plain, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = (folder / UNET).read_bytes()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_pipeline(plain, folder)
    assert (folder / UNET).read_bytes() == before and not list(folder.rglob("*.part"))


# Memory

@pytest.mark.parametrize("way", ["plain", "bin"])
def test_changing_a_loaded_parameter_leaves_the_file_alone(way, folder, plain):
    if way == "bin":
        pickled(folder)
    pipeline = load_pipeline(folder)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        for parameter in part.parameters():
            parameter.add_(1.0)
    assert_same(weights(load_pipeline(folder)), weights(plain))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_tensors_are_mapped_and_never_held_twice(folder):
    """270 MB of one part: after loading no memory is taken up by them (only the page cache), and at no moment twice
    their size. The program also starts without torch._dynamo, whose import takes a second."""
    wide = 350_000
    tensors = load_file(folder / TEXT)
    for name in [name for name in tensors if ".mlp." in name]:
        shape = [wide if n == 64 else n for n in tensors[name].shape]
        tensors[name] = torch.full(shape, 0.5)
    rewrite(folder / TEXT, tensors)
    edit(folder / "text_encoder/config.json", intermediate_size=wide)
    code = """
import sys
from model.checkpoint import load_pipeline
def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
anonymous, peak = kib("RssAnon"), kib("VmHWM")
pipeline = load_pipeline(sys.argv[1])
assert pipeline.text_encoder.text_model.encoder.layers[2].mlp.fc2.weight.sum() == 32 * 350_000 / 2
print(kib("RssAnon") - anonymous, kib("VmHWM") - peak, "torch._dynamo" in sys.modules)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=root, capture_output=True, text=True, check=True)
    anonymous, peak, dynamo = done.stdout.split()
    size = sum((folder / name).stat().st_size for name in (UNET, VAE_FILE, TEXT)) // 1024
    assert size > 260_000
    assert int(anonymous) < 0.3 * size and int(peak) < 1.7 * size, done.stdout
    assert dynamo == "False"


# Damage

def damaged(name: str, change):
    """A file of weights with its tensors changed by change(tensors)."""
    def damage(folder):
        tensors = load_file(folder / name)
        change(tensors)
        rewrite(folder / name, tensors)
    return damage


def replaced(name: str, content):
    """A file replaced by bytes or text, or by content(what it was)."""
    def damage(folder):
        rewrite(folder / name, content((folder / name).read_bytes()) if callable(content) else content)
    return damage


def removed(name: str):
    def damage(folder):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    return damage


CONV1 = "mid_block.resnets.1.conv1.weight"


def poisoned(value: float, name: str = CONV1):
    def change(tensors):
        tensors[name].view(-1)[7] = value
    return change


def without_a_shard(folder):
    by_diffusers(max_shard_size="3MB")(folder)
    next(folder.glob("unet/*-00002-of-*")).unlink()


def index(content: str):
    def damage(folder):
        (folder / UNET).unlink()
        (folder / INDEX).write_text(content)
    return damage


def bin_of(content):
    def damage(folder):
        (folder / UNET).unlink()
        path = folder / "unet/diffusion_pytorch_model.bin"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return damage


class Code:
    def __reduce__(self):
        return os.abort, ()


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
OUTSIDE = '{"weight_map": {"a": "../../b.safetensors"}}'
DAMAGE = {        # what was done, and what the line says after the folder's path
    "cut off": (replaced(UNET, lambda b: b[:-1000]), f"{UNET}: 12,570,144 bytes where its header says 12,571,144"),
    "cut off in the header": (replaced(UNET, lambda b: b[:5000]), f"{UNET}: cut off after 5,000 bytes"),
    "too long": (replaced(UNET, lambda b: b + b"\0"), f"{UNET}: 12,571,145 bytes where its header says 12,571,144"),
    "empty": (replaced(UNET, b""), f"{UNET}: not a safetensors file (0 bytes)"),
    "zeros": (replaced(UNET, bytes(1000)), f"{UNET}: not a safetensors file (1,000 bytes)"),
    "text": (replaced(UNET, "Access denied"), f"{UNET}: not a safetensors file"),
    "HTML": (replaced(VAE_FILE, "\n<!DOCTYPE html><html>..."), f"{VAE_FILE}: a web page"),
    "git-lfs": (replaced(TEXT, LFS), f"{TEXT}: a git-lfs pointer"),
    "pickle": (replaced(UNET, pickle.dumps({}, 2) + bytes(20)), f"{UNET}: a pickle, which can run code"),
    "zipped pickle": (replaced(UNET, b"PK\3\4" + bytes(600)), f"{UNET}: a pickle, which can run code"),
    "no JSON header": (replaced(UNET, lambda b: b[:9] + b"?" + b[10:]), f"{UNET}: its safetensors header is damaged"),
    "odd header": (
        replaced(UNET, b'\x14\0\0\0\0\0\0\0{"a": {"shape": []}}'), f"{UNET}: its safetensors header is damaged"),
    "odd shape": (
        replaced(UNET, b'\x2f\0\0\0\0\0\0\0{"a": {"shape": [[1]], "data_offsets": [0, 0]}}'),
        f"{UNET}: its safetensors header is damaged"),
    "NaN": (
        damaged(UNET, poisoned(float("nan"))),
        f"{UNET}: NaN or infinite values in {CONV1} as torch.float32; the file is damaged"),
    "infinity": (
        damaged(VAE_FILE, poisoned(float("inf"), "quant_conv.bias")),
        f"{VAE_FILE}: NaN or infinite values in quant_conv.bias"),
    "missing key": (
        damaged(UNET, lambda t: t.pop("conv_in.bias")),
        f"{UNET}: 496 tensors expected; missing: 1 (conv_in.bias); unexpected: 0"),
    "quantised": (
        damaged(UNET, lambda t: t.update({CONV1: t[CONV1].to(torch.int8)})),
        f"{UNET}: {CONV1} is of torch.int8, not a weight as it is; get it in float16 or float32"),
    "complex": (damaged(UNET, lambda t: t.update({CONV1: t[CONV1] * 1j})), f"{UNET}: {CONV1} is of torch.complex64"),
    "extra key": (damaged(VAE_FILE, lambda t: t.update(x=torch.ones(1))), "missing: 0; unexpected: 1 (x)"),
    "wrong shape": (
        damaged(UNET, lambda t: t.update({"conv_in.weight": torch.ones(32, 9, 3, 3)})),
        f"{UNET}: conv_in.weight is (32, 9, 3, 3), expected (32, 4, 3, 3)"),
    "missing tokenizer": (removed("tokenizer"), "tokenizer: no tokenizer here"),
    "missing part": (removed("vae"), "vae: this part of the checkpoint is missing"),
    "missing weights": (removed(UNET), "unet: no weights here; expected diffusion_pytorch_model.safetensors"),
    "missing config": (removed("unet/config.json"), "unet/config.json: not there"),
    "missing scheduler": (removed("scheduler"), "scheduler/scheduler_config.json: not there"),
    "missing index": (removed("model_index.json"), "no model_index.json here"),
    "missing shard": (without_a_shard, "a shard of diffusion_pytorch_model is missing"),
    "index without map": (index("{}"), f"{INDEX}: no weight_map"),
    "index that leaves the folder": (index(OUTSIDE), "unet/b.safetensors: a shard"),
    "cut JSON": (replaced("unet/config.json", '{"act_fn": '), "unet/config.json: not JSON"),
    "binary JSON": (replaced("vae/config.json", b"\xff\xfe\0"), "vae/config.json: not JSON"),
    "JSON list": (replaced("unet/config.json", "[1, 2]"), "unet/config.json: [1, 2] where an object in"),
    "bad model_index": (replaced("model_index.json", "model"), "model_index.json: not JSON"),
    "bad .bin": (bin_of(b"<html>"), "unet/diffusion_pytorch_model.bin: cannot be read as plain tensors"),
    "no tensors in .bin": (bin_of({"a": "b"}), "unet/diffusion_pytorch_model.bin: cannot be read as plain tensors"),
    "code in .bin": (bin_of({"a": Code()}), "unet/diffusion_pytorch_model.bin: cannot be read as plain tensors"),
    **{f"{kind} in .bin": (bin_of(content), "unet/diffusion_pytorch_model.bin: cannot be read as plain tensors")
       for kind, content in {
           "no contents": {CONV1: torch.empty(2, device="meta")}, "sparse": {CONV1: torch.ones(2).to_sparse()},
           "one number shown as billions": {CONV1: torch.ones(1).expand(10**5, 10**5)},
           "no name": {7: torch.ones(1)}}.items()},
    "SDXL folder": (
        lambda f: edit(f / "model_index.json", text_encoder_2=[], _class_name="StableDiffusionXLPipeline"),
        ": a StableDiffusionXLPipeline; only Stable Diffusion 1.x is supported"),
    "SD3 folder": (
        lambda f: edit(f / "model_index.json", transformer=[], _class_name="StableDiffusion3Pipeline"),
        ": a StableDiffusion3Pipeline; only Stable Diffusion 1.x is supported"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage, folder):
    change, line = DAMAGE[damage]
    change(folder)
    message = refusal(load_pipeline, folder)
    assert message.startswith(str(folder)) and line in message, message


def test_a_weight_too_large_for_the_precision_is_not_called_damage(folder):
    damaged(UNET, poisoned(1e6))(folder)
    assert refusal(load_pipeline, folder, "cpu", torch.float16).endswith(f"infinite values in {CONV1} as torch.float16")


@pytest.mark.parametrize("length", [640, 15392, 19280])
def test_a_header_whose_length_reads_as_another_format(length, tmp_path):
    """In little-endian bytes these lengths begin as pickles (80 02), web pages (20 3c) and zip archives (PK) do."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + header + bytes(4))
    assert "no Stable Diffusion checkpoint (1 tensors, the first 'a')" in refusal(load_pipeline, path)


# LDM single files

def full_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of SD1.5's parts."""
    with torch.device("meta"):
        modules = {"unet": UNet(), "vae": VAE(), "text_encoder": CLIPTextEncoder()}
    return {part: {k: tuple(t.shape) for k, t in m.state_dict().items()} for part, m in modules.items()}


FULL = full_shapes()
LDM_NAME = {"unet": lambda n: ldm.UNET + ldm.unet_name(n), "vae": lambda n: ldm.VAE + ldm.vae_name(n),
            "text_encoder": lambda n: ldm.TEXT + n}


@pytest.mark.parametrize("part, count", [("unet", 686), ("vae", 248), ("text_encoder", 196)])
def test_ldm_names_are_those_that_diffusers_reads(part, count):
    """diffusers' converter, given every name of ours in LDM form, gives every one of them back."""
    names, ndim = list(FULL[part]), {}
    if part == "vae":
        ndim = {n: 4 for n in names if ".attentions.0.to_" in n and n.endswith("weight")}       # 1x1 convolutions there
    tensors = {LDM_NAME[part](n): torch.full([1] * ndim.get(n, 1), float(i)) for i, n in enumerate(names)}
    assert len(names) == len(tensors) == count
    if part == "unet":
        theirs = convert_ldm_unet_checkpoint(tensors, {"layers_per_block": 2})
    elif part == "vae":
        theirs = convert_ldm_vae_checkpoint(tensors, {"down_block_types": [0] * 4, "up_block_types": [0] * 4})
    else:
        theirs = mend_text_names(convert_ldm_clip_checkpoint(tensors))
    assert {n: t.item() for n, t in theirs.items()} == {n: float(i) for i, n in enumerate(names)}


def test_ldm_names_worked_out_by_hand():
    block = "transformer_blocks.0"
    for ours, theirs in {
            f"down_blocks.0.attentions.0.{block}.attn1.to_q.weight": f"input_blocks.1.1.{block}.attn1.to_q.weight",
            f"down_blocks.2.attentions.1.{block}.attn2.to_k.weight": f"input_blocks.8.1.{block}.attn2.to_k.weight",
            "down_blocks.3.resnets.0.conv1.weight": "input_blocks.10.0.in_layers.2.weight",
            "down_blocks.1.resnets.0.conv_shortcut.bias": "input_blocks.4.0.skip_connection.bias",
            "down_blocks.1.downsamplers.0.conv.bias": "input_blocks.6.0.op.bias",
            f"mid_block.attentions.0.{block}.attn1.to_out.0.bias": f"middle_block.1.{block}.attn1.to_out.0.bias",
            "mid_block.resnets.1.time_emb_proj.weight": "middle_block.2.emb_layers.1.weight",
            f"up_blocks.1.attentions.2.{block}.attn1.to_v.weight": f"output_blocks.5.1.{block}.attn1.to_v.weight",
            f"up_blocks.3.attentions.2.{block}.ff.net.0.proj.bias": f"output_blocks.11.1.{block}.ff.net.0.proj.bias",
            "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
            "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
            "time_embedding.linear_2.bias": "time_embed.2.bias", "conv_norm_out.weight": "out.0.weight"}.items():
        assert ldm.unet_name(ours) == theirs
    for ours, theirs in {
            "decoder.up_blocks.0.resnets.2.conv1.weight": "decoder.up.3.block.2.conv1.weight",
            "decoder.up_blocks.3.resnets.0.conv_shortcut.bias": "decoder.up.0.block.0.nin_shortcut.bias",
            "decoder.up_blocks.2.upsamplers.0.conv.bias": "decoder.up.1.upsample.conv.bias",
            "encoder.mid_block.attentions.0.to_out.0.weight": "encoder.mid.attn_1.proj_out.weight",
            "encoder.mid_block.attentions.0.group_norm.weight": "encoder.mid.attn_1.norm.weight",
            "decoder.mid_block.resnets.1.norm2.bias": "decoder.mid.block_2.norm2.bias",
            "quant_conv.weight": "quant_conv.weight"}.items():
        assert ldm.vae_name(ours) == theirs


def marks(i: int, n: int) -> Tensor:
    """The first values of the i-th tensor, unlike every other's and exact in half precision; the rest of it are 0."""
    return (torch.arange(min(n, 8)) * 64 + torch.tensor([i % 64, i // 64] * 4)[:min(n, 8)]) / 1024


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A half-precision safetensors file of full size that takes hardly any disk: each tensor is `marks`, then a hole.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i, (name, shape) in enumerate(shapes.items()):
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(marks(i, torch.Size(shape).numel()).half().numpy().tobytes())
        file.truncate(8 + len(text) + end)


def ldm_shapes(*parts: str) -> dict[str, tuple[int, ...]]:
    """An LDM file's tensors: those of `parts`, with the VAE's attention as convolutions."""
    return {
        LDM_NAME[part](n): (*shape, 1, 1) if part == "vae" and ".attentions.0.to_" in n and len(shape) == 2 else shape
        for part in parts for n, shape in FULL[part].items()}


def assert_marked(tensors: dict[str, Tensor], first: int = 0) -> None:
    for i, (name, tensor) in enumerate(tensors.items(), first):
        head = tensor.flatten()[:8].float()
        assert torch.equal(head, marks(i, len(head))), name


def test_a_full_size_single_file_becomes_a_folder(tmp_path):
    """SD1.5 in one file of 2 GB, with what else such files hold: an EMA copy, the schedule, a damaged position_ids, and
    the projection that ComfyUI saved in early 2024."""
    path, out = tmp_path / "model v1.5.safetensors", tmp_path / "folder"
    extras = {"model_ema.diffusion_modelinput_blocks00weight": (4,), "model_ema.decay": (), "betas": (1000,),
              "alphas_cumprod": (1000,), "cond_stage_model.logit_scale": (), f"{ldm.VAE}loss.logvar": (),
              f"{ldm.TEXT}text_model.embeddings.position_ids": (1, 77),
              f"{ldm.TEXT}text_projection.weight": (768, 768)}
    write_sparse(path, ldm_shapes("unet", "vae", "text_encoder") | extras)
    try:
        pipeline = load_pipeline(path, dtype=torch.float16)
        assert pipeline.native_size == (512, 512) and pipeline.dtype == torch.float16
        assert pipeline.vae.decoder.conv_in.weight.dtype == torch.float32
        assert_marked(weights(pipeline))
        save_pipeline(pipeline, out, torch.float16)
        assert (out / UNET).stat().st_size == pytest.approx(1_719_125_304, rel=1e-4)         # as the official fp16 file
        again = load_pipeline(out, dtype=torch.float16)
        assert_marked(weights(again))
        assert again.configs == ldm.SD15
    finally:
        shutil.rmtree(out, ignore_errors=True)
        path.unlink()


def test_a_single_file_without_a_vae_and_novelai_names(tmp_path):
    """Text keys without `text_model.`, as in the NovelAI lineage; and no VAE, which --vae then brings."""
    path = tmp_path / "novae.safetensors"
    write_sparse(path, {n.replace("text_model.", ""): s for n, s in ldm_shapes("unet", "text_encoder").items()})
    assert refusal(load_pipeline, path).startswith(f"{path}: no VAE inside; pass one with --vae")
    assert refusal(load_vae, path) == f"{path}: an SD1.5 checkpoint without a VAE"
    parts = read_single_file(path, with_vae=False)
    assert_marked(parts["unet"])
    assert_marked({n: mend_text_names(parts["text_encoder"])[n] for n in FULL["text_encoder"]}, first=686)
    assert "vae" not in parts


def test_a_vae_of_its_own_in_every_form(tiny, folder, plain, tmp_path):
    """--vae: a file under LDM names (bare, or inside a whole checkpoint), one under diffusers' names, a folder that is
    the VAE, a folder that has one. It replaces the model's own, config and all."""
    path = tmp_path / "vae-ft-mse-840000-ema-pruned.safetensors"
    bare = {n.removeprefix(ldm.VAE): s for n, s in ldm_shapes("vae").items()}
    write_sparse(path, bare | {"model_ema.decay": (), "model_ema.num_updates": (), "loss.logvar": ()})
    pipeline = load_pipeline(tiny, vae=path)
    assert_marked(pipeline.vae.state_dict())
    assert pipeline.configs["vae"] == ldm.SD15["vae"] and pipeline.native_size == (64, 64)     # 8 latents of 8 pixels
    assert torch.equal(pipeline.unet.conv_in.weight, plain.unet.conv_in.weight)
    write_sparse(path, ldm_shapes("vae", "unet"))                                     # a whole checkpoint's will do
    assert_marked(load_vae(path)[0].state_dict())
    write_sparse(path, FULL["vae"])
    assert_marked(load_vae(path)[0].state_dict())
    assert "a VAE alone; pass it with --vae" in refusal(load_pipeline, path)

    damaged(VAE_FILE, lambda tensors: tensors["quant_conv.bias"].fill_(3.0))(folder)
    edit(folder / "vae/config.json", scaling_factor=0.5)
    shutil.copytree(folder / "vae", tmp_path / "root")
    for source in (folder, folder / "vae", tmp_path / "root"):
        pipeline = load_pipeline(tiny, vae=source)
        assert (pipeline.vae.quant_conv.bias == 3.0).all() and pipeline.vae.scaling_factor == 0.5
        assert pipeline.configs["vae"]["scaling_factor"] == 0.5
    edit(folder / "vae/config.json", scaling_factor=0.13025)
    assert "SDXL's VAE, by its scaling factor of 0.13025" in refusal(load_pipeline, tiny, vae=folder)
    shutil.rmtree(folder / "vae")
    assert load_pipeline(folder, vae=tiny).vae.scaling_factor == 0.18215              # its own may then be missing


def test_words_that_were_added_are_refused(folder):
    """Textual inversion's: each would be split into others, and its learned vector never be used."""
    for damaged_by_hand in ([1], {"49408": "x", "49409": {"content": None}}, None):
        edit(folder / "tokenizer" / "tokenizer_config.json", added_tokens_decoder=damaged_by_hand)
        load_pipeline(folder)
    (folder / "tokenizer" / "added_tokens.json").write_text('{"<sks-man>": 49408, "<|startoftext|>": 49406}')
    assert "words were added to its vocabulary (<sks-man>)" in refusal(load_pipeline, folder)
    (folder / "tokenizer" / "added_tokens.json").write_text('{"half \\ud83d": 49408}')
    assert "words were added to its vocabulary (half " in refusal(load_pipeline, folder)


def test_a_scheduler_of_deis_or_unipc_is_read_as_diffusers_makes_it_one_of_ours(folder):
    for kind, more in ((diffusers.DEISMultistepScheduler, {}), (diffusers.UniPCMultistepScheduler, {})):
        config = dict(kind(**more).config)
        theirs = diffusers.DPMSolverMultistepScheduler.from_config(config)
        assert (theirs.config.algorithm_type, theirs.config.solver_type) == ("dpmsolver++", "midpoint")
        check_scheduler({key: config[key] for key in ("algorithm_type", "solver_type") if key in config}, "it")


# What a single file is

CONV, ATTN = f"{ldm.UNET}input_blocks.0.0.weight", f"{ldm.UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SD1 = {CONV: (320, 4, 3, 3), ATTN: (320, 768)}
X = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
FILES = {
    "SDXL": (SD1 | {"conditioner.embedders.0.transformer.text_model.x": (1,)}, "an SDXL checkpoint; only"),
    "SDXL refiner": ({CONV: (384, 4, 3, 3), f"{ldm.UNET}label_emb.0.0.weight": (1,)}, "an SDXL checkpoint; only"),
    "SD2": ({CONV: (320, 4, 3, 3), ATTN: (320, 1024)}, "an SD2.x checkpoint; only"),
    "inpainting": (SD1 | {CONV: (320, 9, 3, 3)}, "an inpainting model (9 input channels); only"),
    "SD2 inpainting": ({CONV: (320, 9, 3, 3), ATTN: (320, 1024)}, "an inpainting model (9 input channels); only"),
    "pix2pix": (SD1 | {CONV: (320, 8, 3, 3)}, "an instruct-pix2pix model (8 input channels)"),
    "depth": (SD1 | {CONV: (320, 5, 3, 3)}, "a depth model (5 input channels)"),
    "upscaler": (SD1 | {CONV: (320, 7, 3, 3)}, "an upscaling model (7 input channels)"),
    "other channels": (SD1 | {CONV: (320, 6, 3, 3)}, "another model (6 input channels)"),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "a ControlNet"),
    "diffusers ControlNet": ({"controlnet_cond_embedding.conv_in.bias": (1,), "down_blocks.0.x": (1,)}, "a ControlNet"),
    "kohya LoRA": ({f"lora_unet_{X.replace('.', '_')}_to_q.lora_down.weight": (8, 1)}, "a LoRA; pass it with --lora"),
    "kohya text LoRA": ({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": ()}, "a LoRA; pass it with --lora"),
    "peft LoRA": ({f"unet.{X}.to_q.lora_A.weight": (8, 1)}, "a LoRA; pass it with --lora"),
    "diffusers LoRA": ({f"unet.{X}.to_q.lora.down.weight": (8, 1)}, "a LoRA; pass it with --lora"),
    "attention-processor LoRA": ({f"unet.{X}.processor.to_q_lora.up.weight": (1, 8)}, "a LoRA; pass it with --lora"),
    "LoHa": ({"lycoris_x.hada_w1_a": (1,)}, "a LoRA; pass it with --lora"),
    "norms by LyCORIS": ({"lycoris_conv_norm_out.w_norm": (1,)}, "a LoRA; pass it with --lora"),
    "ComfyUI LoRA": ({"diffusion_model.out.2.lora_up.weight": (4, 1, 1, 1)}, "a LoRA; pass it with --lora"),
    "embedding": ({"emb_params": (2, 768)}, "a textual-inversion embedding"),
    "SD3": ({f"{ldm.UNET}joint_blocks.0.x_block.attn.qkv.weight": (1,)}, "an SD3 or Flux checkpoint; only"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (1,)}, "an SD3 or Flux checkpoint; only"),
    "VAE": ({"encoder.conv_in.weight": (1,), "decoder.conv_in.weight": (1,)}, "a VAE alone; pass it with --vae"),
    "VAE with its prefix": ({f"{ldm.VAE}encoder.conv_in.weight": (1,)}, "a VAE alone; pass it with --vae"),
    "unet of a folder": ({"conv_in.weight": (1,), f"{X}.to_q.weight": (1,)}, "one part of a diffusers folder; pass"),
    "text encoder of a folder": ({"text_model.final_layer_norm.bias": (1,)}, "a text encoder alone; pass"),
    "another width": ({CONV: (128, 4, 3, 3), ATTN: (128, 768)}, "not shaped like SD1.5 (first convolution (128, 4"),
    "no attention": ({CONV: (320, 4, 3, 3)}, "not shaped like SD1.5"),
    "a scalar": ({CONV: (), ATTN: ()}, "not shaped like SD1.5"),
    "something else": ({"layers.0.weight": (2, 2)}, "no Stable Diffusion checkpoint (1 tensors, the first 'layers.0."),
    "nothing": ({}, "no Stable Diffusion checkpoint (0 tensors"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_model_is_told_what_it_is(kind, tmp_path):
    shapes, line = FILES[kind]
    path = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}, path)
    message = refusal(load_pipeline, path)
    assert message.startswith(f"{path}: {line}"), message


def test_a_single_file_with_parts_missing_is_refused_by_name(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({n: torch.zeros(s) for n, s in (SD1 | {f"{ldm.VAE}encoder.conv_in.bias": (128,)}).items()}, path)
    assert "686 tensors expected; missing: 684 (" in refusal(load_pipeline, path)


# The program

NO_SUCH, NO_INDEX = "no such file or folder, and no Hub id", "no model_index.json here"


@pytest.mark.parametrize("source, line", [
    ("", NO_INDEX), ("empty folder", NO_INDEX), ("unet", NO_INDEX), ("notes.txt", "not a safetensors file"),
    ("empty.safetensors", "not a safetensors file (0 bytes)"), ("a model.ckpt", "a pickle, which can run code"),
    ("missing.safetensors", NO_SUCH), ("./missing", NO_SUCH), ("../missing", NO_SUCH), ("gpt2", NO_SUCH),
    ("x" * 300, "File name too long")], ids=lambda value: value[:20])
@pytest.mark.parametrize("option", ["--model", "--vae"])
def test_the_program_ends_with_one_line_and_2(source, line, option, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "notes.txt").write_text("a list of things to do")
    (tmp_path / "empty.safetensors").touch()
    torch.save({}, tmp_path / "a model.ckpt")
    shutil.copytree(folder / "unet", tmp_path / "unet")
    rewrite(tmp_path / "unet/config.json", "[]")
    line = line if option == "--model" else line.replace(NO_INDEX, "config.json: ")
    others = [] if option == "--model" else ["--model", str(folder)]
    monkeypatch.setattr(sys, "argv", ["generate.py", "--prompt", "x", "--out", "out", *others, option, source])
    with pytest.raises(SystemExit) as caught:
        cli.run(generate.main)
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.err.count("\n") == 1 and captured.err.startswith("generate.py: ") and line in captured.err
    assert not captured.out and not (tmp_path / "out").exists()
