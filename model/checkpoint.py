"""Checkpoints in, modules out: a Hub id, a folder in diffusers layout, or one LDM `.safetensors`, to a `Pipeline`.

    pipeline = load_pipeline("paper-people")                        # the miniature that ships with the repository
    pipeline = load_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5@main", dtype=torch.bfloat16, device="cuda")
    pipeline = load_pipeline("majicmixRealistic_v7.safetensors", vae="stabilityai/sd-vae-ft-mse")
    save_pipeline(pipeline, "folder")

Modules are built on the meta device and given the file's tensors by a strict `load_state_dict(assign=True)`, so that
there is never a second copy in memory and never a parameter that was not in the file. Old names are mended first: the
VAE's attention before diffusers 0.17, text encoders with `position_ids` or without `text_model.`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sampling.schedule import make_alphas_cumprod

from . import ldm
from .builtin import BUILT_IN
from .clip import CLIPTextEncoder
from .configs import check_scheduler, text_arguments, unet_arguments, vae_arguments
from .errors import UserError
from .files import check_weight, read_header, read_json, read_tensors, write_tensors, write_text
from .hub import PARTS, fetch, pipeline_files, vae_files, weight_files
from .lora import base_state_dict, load_lora, lora_disabled, lora_layers, merge_lora, split_lora
from .tokenizer import Tokenizer
from .unet import UNet
from .vae import VAE

if TYPE_CHECKING:
    from .concept import ConceptModel

SDXL_SCALE = 0.13025                           # of its VAE, whose tensors have SD1.5's names and shapes


@dataclass
class Pipeline:
    """A text-to-image model in parts. `configs` are its config.json's (unet, vae, text_encoder, scheduler)."""

    unet: UNet
    vae: VAE
    text_encoder: CLIPTextEncoder
    tokenizer: Tokenizer
    alphas_cumprod: Tensor             # (1000,) float32, on the CPU: samplers take their coefficients from it
    configs: dict[str, dict]
    name: str                          # as --model had it
    vae_name: str | None = None        # as --vae had it, where it is not the model's own
    loras: tuple[str, ...] = ()        # FILE or FILE:WEIGHT of each that was added
    concept: "ConceptModel | None" = None        # by which people are drawn who are given by pictures; see concept.py

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def predicts_v(self) -> bool:
        """Whether the U-Net predicts v in place of eps."""
        return self.configs["scheduler"].get("prediction_type") == "v_prediction"

    @property
    def context_width(self) -> int:
        """The width of the text features that the U-Net attends to: 768 for SD1.5."""
        return self.text_encoder.text_model.final_layer_norm.normalized_shape[0]

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels that the model was trained at: 512 x 512 for SD1.5."""
        size = self.configs["unet"].get("sample_size") or 64
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae.downscale, width * self.vae.downscale

    def base_unet(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """What the U-Net predicts without its LoRAs."""
        with lora_disabled(self.unet):
            return self.unet(x_t, t, context)

    def add_loras(self, specs: Sequence[str]) -> None:
        """LoRAs, each FILE or FILE:WEIGHT, for the U-Net and, where a file covers it, the text encoder."""
        for spec in specs:
            path, weight = split_lora(spec)
            load_lora(path, self.unet, weight, f"lora{len(self.loras)}", self.text_encoder)
            self.loras += (spec,)

    def merge_loras(self) -> None:
        """For drawing, except with LAN, which needs the base as well: a step takes a fifth less, and in half precision
        the LoRA's effect comes out as near to float32's as with the LoRA apart."""
        for part in (self.unet, self.text_encoder):
            merge_lora(part)


# Weights

def mend_vae_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The middle attention's names before diffusers 0.17, and its weights where they are stored as 1x1 convolutions."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    mended = {}
    for name, tensor in tensors.items():
        if ".attentions.0." in name:
            head, layer, w = name.rsplit(".", 2)
            name = f"{head}.{old.get(layer, layer)}.{w}"
            tensor = tensor.flatten(1) if tensor.ndim > 2 else tensor
        mended[name] = tensor
    return mended


def mend_text_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the index buffer of old files (merges damage it; positions are always 0, 1, 2, ...) and the projection
    that ComfyUI saved in early 2024, which nothing uses; with the `text_model.` that transformers 5 and the NovelAI
    lineage leave out."""
    return {
        "text_model." + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()
        if not name.endswith(("embeddings.position_ids", "text_projection.weight"))}


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity. The ends tell (both are NaN when any value is), ten times faster than a look at each."""
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


class SkipInit(TorchFunctionMode):
    """Leaves out `nn.init`: on the meta device there is nothing to fill, and trying imports torch._dynamo, a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **(kwargs or {}))


def load_weights(
    build: Callable[[], nn.Module], tensors: dict[str, Tensor], where: str | Path, device: str | torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """build() made on the meta device and given exactly `tensors`; UserError names what is missing, left over, of
    another shape, or not finite."""
    with torch.device("meta"), SkipInit():
        module = build()
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    if missing or extra:
        def some(names: list[str]) -> str:
            return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "0"
        raise UserError(
            f"{where}: {len(wanted)} tensors expected; missing: {some(missing)}; unexpected: {some(extra)}")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise UserError(f"{where}: {name} is {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}")
        if tensor.is_floating_point():         # not so is how many batches a norm has seen
            check_weight(tensors[name], name, where)
    state = {name: tensors[name].to(device, dtype) for name in wanted}
    for name, tensor in state.items():
        if not is_finite(tensor):
            at = "" if is_finite(tensors[name].float()) else "; the file is damaged, get another copy"
            raise UserError(f"{where}: NaN or infinite values in {name} as {dtype}{at}")
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


# Reading one part

def read_part(folder: Path, part: str, stem: str) -> tuple[dict, dict[str, Tensor], str]:
    """One part of a diffusers folder: its config, its tensors, and a name for messages."""
    config = read_json(folder / part / "config.json")
    files = [path.relative_to(folder).as_posix() for path in (folder / part).iterdir()]
    names = weight_files(files, part, stem)
    if not names:
        raise UserError(f"{folder / part}: no weights here; expected {stem}.safetensors")
    if names[0].endswith(".json"):
        shards = read_json(folder / names[0]).get("weight_map")
        if not shards or not isinstance(shards, dict):
            raise UserError(f"{folder / names[0]}: no weight_map in it; download it again")
        shards = sorted({Path(str(shard)).name for shard in shards.values()})
        names = [f"{part}/{shard}" if part else shard for shard in shards]
        for name in names:
            if not (folder / name).is_file():
                raise UserError(f"{folder / name}: a shard of {stem} is missing; download it again")
    tensors = {}
    for name in names:
        tensors |= read_tensors(folder / name)
    return config, tensors, str(folder / names[0])


def load_vae(source: str | Path, device: str | torch.device = "cpu") -> tuple[VAE, dict]:
    """A VAE of its own (--vae): a folder, a whole pipeline's folder, a Hub id, or a file under LDM or diffusers names.
    -> the VAE in float32, and its config."""
    if Path(source).is_file():
        shapes, _ = read_header(Path(source))
        if ldm.kind_of_file(shapes) != "SD1.5":                # a whole checkpoint will do for its VAE
            ldm.checked(source, ldm.kind_of_file(shapes), "VAE")
        tensors = read_tensors(Path(source))
        tensors = ldm.take(tensors, ldm.VAE) or tensors
        config, where = ldm.SD15["vae"], str(source)
        if not any(".down_blocks." in name for name in tensors):
            tensors = ldm_vae(tensors)
    else:
        folder = fetch(str(source), vae_files)
        part = "vae" if (folder / "vae" / "config.json").is_file() else ""
        config, tensors, where = read_part(folder, part, PARTS["vae"])
    return build_vae(config, tensors, where, device), config


def ldm_vae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.device("meta"):
        names = list(VAE().state_dict())
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(ldm.VAE_EXTRA)}
    return ldm.rename(tensors, names, ldm.vae_name)


def build_vae(config: dict, tensors: dict[str, Tensor], where: str, device: str | torch.device) -> VAE:
    arguments = vae_arguments(config, where)
    # Always float32: in half precision SD1.5's decoder loses shades, and NaNs are known from large pictures.
    return load_weights(lambda: VAE(**arguments), mend_vae_names(tensors), where, device, torch.float32)


# The two entrances

def load_pipeline(
    model: str | Path = "paper-people", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
    vae: str | Path | None = None, prediction_type: str | None = None,
) -> Pipeline:
    """U-Net and text encoder in `dtype`, the VAE in float32, all on `device`, frozen and in eval mode.

    `vae` replaces the checkpoint's own; `prediction_type` ('epsilon', 'v_prediction') overrides its config, for files
    that have none. Raises UserError, a line that says what the file is and what to do, on anything not SD1.5-shaped.
    """
    source = str(BUILT_IN[model].checkpoint if model in BUILT_IN else model)
    if model in BUILT_IN and not Path(source).is_dir():
        raise UserError(f"{source}: the checkpoint is not there; make it, or get the repository again")
    vae_and_config = load_vae(vae, device) if vae is not None else None
    scale = 0.18215                                            # of SD1.5's latents, where there is no config
    if Path(source).is_file():
        parts = read_single_file(Path(source), with_vae=vae is None)
        configs, tokenizer = {**ldm.SD15}, Tokenizer.clip()
        wheres = dict.fromkeys(PARTS, source)
    else:
        folder = fetch(source, pipeline_files)
        index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else None
        if index is None:
            raise UserError(f"{folder}: no model_index.json here; expected a folder in diffusers layout")
        if "text_encoder_2" in index or "transformer" in index:
            kind = index.get("_class_name", "pipeline of another kind")
            raise UserError(f"{source}: a {kind}; only Stable Diffusion 1.x is supported")
        configs, parts, wheres = {}, {}, {}
        for part, stem in PARTS.items():
            if part == "vae" and vae is not None:
                continue
            if not (folder / part).is_dir():
                raise UserError(f"{folder / part}: this part of the checkpoint is missing; download it again")
            configs[part], parts[part], wheres[part] = read_part(folder, part, stem)
        tokenizer = Tokenizer.from_folder(folder / "tokenizer")
        check_added_tokens(tokenizer, folder / "tokenizer")
        if vae is not None and (folder / "vae" / "config.json").is_file():
            scale = read_json(folder / "vae" / "config.json").get("scaling_factor", scale)
        configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    if prediction_type is not None:
        configs["scheduler"] = {**configs["scheduler"], "prediction_type": prediction_type}
    check_scheduler(configs["scheduler"], f"{source}: scheduler_config.json")

    unet_args = unet_arguments(configs["unet"], f"{source}: unet/config.json")
    text_args = text_arguments(configs["text_encoder"], f"{source}: text_encoder/config.json")
    if unet_args["cross_attention_dim"] != text_args["hidden_size"]:
        raise UserError(
            f"{source}: the U-Net expects text features {unet_args['cross_attention_dim']} wide and the text encoder "
            f"makes {text_args['hidden_size']}; the parts are from different models")
    check_tokenizer(tokenizer, text_args, source)
    unet = load_weights(lambda: UNet(**unet_args), parts["unet"], wheres["unet"], device, dtype)
    text_encoder = load_weights(
        lambda: CLIPTextEncoder(**text_args), mend_text_names(parts["text_encoder"]), wheres["text_encoder"], device,
        dtype)
    if vae_and_config is None:
        vae_module = build_vae(configs["vae"], parts["vae"], wheres["vae"], device)
    else:
        vae_module, configs["vae"] = vae_and_config
        if vae_module.scaling_factor == SDXL_SCALE != scale:
            raise UserError(f"{vae}: SDXL's VAE, by its scaling factor of {SDXL_SCALE}; {source} has {scale!r:.20}. "
                            "Take one of SD1.5, such as stabilityai/sd-vae-ft-mse")
    return Pipeline(
        unet, vae_module, text_encoder, tokenizer, make_alphas_cumprod(configs["scheduler"]), configs, str(model),
        None if vae is None else str(vae))


def check_tokenizer(tokenizer: Tokenizer, text_encoder: dict, where: str | Path) -> None:
    """UserError unless a text encoder of these arguments has an embedding for all that the tokenizer makes."""
    tokens, positions = max(tokenizer.core.get_vocab().values()) + 1, tokenizer.max_length      # ids may leave gaps
    most, places = text_encoder["vocab_size"], text_encoder["max_position_embeddings"]
    if tokens > most or positions > places:
        raise UserError(f"{where}: the tokenizer makes up to {positions} of {tokens} tokens and the text encoder takes "
                        f"up to {places} of {most}; the parts are from different models")


def check_added_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Refuses words that were added to a vocabulary, as textual inversion's are: they would be split into others."""
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    told = config.get("added_tokens_decoder")                  # id -> a token and how it is split off
    words = [one.get("content") for one in told.values() if isinstance(one, dict)] if isinstance(told, dict) else []
    if (folder / "added_tokens.json").is_file():
        words += read_json(folder / "added_tokens.json")       # token -> id
    known = tokenizer.core.get_vocab() if words else {}        # it takes what is no UTF-8, as token_to_id does not
    if added := [word for word in words if isinstance(word, str) and word not in known]:
        raise UserError(f"{folder}: words were added to its vocabulary ({', '.join(added)[:60]}), as by textual "
                        "inversion; that is not read here, take the model without them")


def read_single_file(path: Path, with_vae: bool) -> dict[str, dict[str, Tensor]]:
    """An LDM file -> tensors under our names, by part. Its EMA copy, schedule buffers and losses are never read."""
    shapes, _ = read_header(path)
    kind = ldm.kind_of_file(shapes)
    if kind == "an SD1.5 checkpoint without a VAE":
        if with_vae:
            raise UserError(f"{path}: no VAE inside; pass one with --vae, such as stabilityai/sd-vae-ft-mse")
    else:
        ldm.checked(path, kind, "SD1.5")
    tensors = read_tensors(path)
    with torch.device("meta"):
        unet_names = list(UNet().state_dict())
    parts = {
        "unet": ldm.rename(ldm.take(tensors, ldm.UNET), unet_names, ldm.unet_name),
        "text_encoder": ldm.take(tensors, ldm.TEXT)}
    if with_vae:
        parts["vae"] = ldm_vae(ldm.take(tensors, ldm.VAE))
    return parts


def save_pipeline(pipeline: Pipeline, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes diffusers' folder layout, as `load_pipeline` and `StableDiffusionPipeline.from_pretrained` read it.
    `dtype` rounds the weights first. LoRAs must be merged. Every file is written whole or not at all, model_index.json
    last."""
    folder = Path(folder)
    configs = pipeline.configs
    if any(layer.lora_on for part in PARTS for layer in lora_layers(getattr(pipeline, part)).values()):
        raise UserError(f"{folder}: a checkpoint cannot hold LoRAs that are not merged; merge_lora first")
    for part, stem in PARTS.items():
        weights = base_state_dict(getattr(pipeline, part))
        state = {name: weight.to(dtype or weight.dtype) for name, weight in weights.items()}
        write_tensors(folder / part / f"{stem}.safetensors", state)
        write_text(folder / part / "config.json", json.dumps(configs[part], indent=2) + "\n")
    pipeline.tokenizer.save(folder / "tokenizer")
    write_text(folder / "scheduler" / "scheduler_config.json", json.dumps(configs["scheduler"], indent=2) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0", "feature_extractor": [None, None],
        "requires_safety_checker": False, "safety_checker": [None, None],
        "scheduler": ["diffusers", configs["scheduler"].get("_class_name", "PNDMScheduler")],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
