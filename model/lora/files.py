"""LoRA files: written so that diffusers, A1111 and ComfyUI all read them (kohya's names, alpha in the file), and read
in every form there is for SD1.5: peft, diffusers' two older ones, kohya on diffusers' or LDM's block names, LoCon,
LyCORIS's own, ComfyUI's.
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import ldm
from ..errors import UserError
from ..files import check_weight, is_a, parse_object, read_header, read_json, read_tensors, write_tensors
from .layers import ATTENTION_LINEARS, adapted, lora_layers

REFUSED = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr",
    "lora_mid": "LoCon in CP form", "oft_": "OFT", ".diff.": "a full difference", ".diff_b": "a full difference",
    "w_norm": "norm training"}
ENDS = {                                                       # the end of a tensor's name -> which matrix it is
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora.down.weight": "A", ".lora.up.weight": "B",
    ".lora_down.weight": "A", ".lora_up.weight": "B", ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B", "_lora.down.weight": "A", "_lora.up.weight": "B", ".alpha": "alpha"}
# What comes before a layer's name, which is then written with underscores where this ends in one. lora_te1_ is what
# diffusers calls the only text encoder when it writes kohya's names.
UNET = ("unet.", "lora_unet_", "lycoris_")
TEXT_ENCODER = ("text_encoder.", "text_encoders.clip_l.transformer.", "lora_te_", "lora_te1_", "lycoris_")
OF_A_TEXT_ENCODER = re.compile(r"text_encoder|lora_te|lycoris_(text_model|encoder)_")


def split_lora(spec: str) -> tuple[str, float]:
    """"FILE:WEIGHT" -> the file and the weight, 1 where there is none. UserError where it is not finite."""
    path, _, weight = spec.rpartition(":")
    try:
        path, number = (path, float(weight)) if path else (spec, 1.0)
    except ValueError:                     # a colon that belongs to the path
        return spec, 1.0
    if not math.isfinite(number):
        raise UserError(f"{spec}: must have a weight that is a finite number")
    return path, number


def save_lora(
    path: str | Path, model: nn.Module, name: str = "default", format: str = "kohya",
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a U-Net's LoRA, as trained, whatever its weight at present. "kohya" is read by diffusers, A1111 and
    ComfyUI alike; "peft" by diffusers."""
    tensors, rank, alpha = {}, 0, 0.0
    for path_in_model, layer in lora_layers(model).items():
        if name not in layer.lora_A:
            continue
        A, B, alpha = layer.lora_A[name].detach(), layer.lora_B[name].detach(), layer.lora_alpha[name]
        rank = A.shape[0]
        if format == "kohya":
            stem = "lora_unet_" + path_in_model.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = A, B
            tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
        else:                              # no place for alpha: every reader takes it as the rank, so it goes into B
            tensors[f"unet.{path_in_model}.lora_A.weight"] = A
            tensors[f"unet.{path_in_model}.lora_B.weight"] = B * (alpha / rank)
    if not tensors:
        raise UserError(f"{path}: the model has no LoRA named {name!r} to save")
    header = {                              # A1111 guesses the kind of model from these
        "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora", "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha)} if format == "kohya" else {}
    write_tensors(Path(path), tensors, header | (metadata or {}))


def stems(model: nn.Module, prefixes: tuple[str, ...]) -> dict[str, str]:
    """All names that files give to a model's layers -> the layer's path. `prefixes` are UNET or TEXT_ENCODER. Made
    forward from the model's own names: kohya's underscores cannot be read backward."""
    table = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        head, _, leaf = path.removesuffix(".0").rpartition(".")
        processor = f"{head}.processor.{leaf}"                                           # diffusers' first form
        names = [path, f"base_model.model.{path}", processor, prefixes[0] + processor]
        for name in (path, path.removeprefix("text_model.")):
            names += [prefix + (name.replace(".", "_") if prefix.endswith("_") else name) for prefix in prefixes]
        if prefixes is UNET and len(model.down_blocks) == 4:                             # SD1.5's depth: LDM's blocks
            ldm_path = ldm.unet_name(f"{path}.weight").removesuffix(".weight")
            names += ["lora_unet_" + ldm_path.replace(".", "_"), f"diffusion_model.{ldm_path}"]
        table |= dict.fromkeys(names, path)
    return table


def load_lora(
    path: str | Path, model: nn.Module, weight: float = 1.0, name: str = "default",
    text_encoder: nn.Module | None = None,
) -> None:
    """Adds the LoRA in a file to a U-Net (and, where the file covers it and it is given, to the text encoder), acting
    with `weight`. Several can be loaded under different names; they add up.

    Raises UserError for other kinds of adapters, by their name, and for a LoRA of another model, by the layer.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such LoRA file")
    _, metadata = read_header(Path(path))
    tensors = read_tensors(path)
    # Tensors of zeros say nothing: ComfyUI writes them for norms, biases and embeddings that did not change.
    for key, tensor in tensors.items():
        for mark, kind in REFUSED.items():
            if mark in f"{key}." and tensor.any():
                raise UserError(f"{path}: {kind}, not plain LoRA ({key}); not supported")
    if not any(key.endswith(tuple(ENDS)) for key in tensors):
        raise UserError(f"{path}: not a LoRA; it has no lora_A, lora_down or the like")
    if any(key.startswith(("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.")) for key in tensors) \
            or metadata.get("ss_base_model_version", "").startswith("sdxl"):
        raise UserError(f"{path}: a LoRA for SDXL; only Stable Diffusion 1.x is supported")

    places = {stem: (model, layer) for stem, layer in stems(model, UNET).items()}
    if text_encoder is not None:
        places |= {stem: (text_encoder, layer) for stem, layer in stems(text_encoder, TEXT_ENCODER).items()}
    found: dict[tuple[nn.Module, str], dict[str, Tensor]] = {}
    unexpected = []
    for key, tensor in tensors.items():
        end = next((end for end in ENDS if key.endswith(end)), "")
        stem = key.removesuffix(end)
        if end and stem in places:
            if ENDS[end] != "alpha":
                check_weight(tensor, key, path)
            parts = found.setdefault(places[stem], {})
            if ENDS[end] in parts:             # as by kohya's name and by peft's
                raise UserError(f"{path}: {places[stem][1]} is in it twice, the second time as {key}; get another copy")
            parts[ENDS[end]] = tensor.float()
        elif tensor.any() and (text_encoder is not None or not OF_A_TEXT_ENCODER.match(key)):
            unexpected.append(key)
    if unexpected:
        raise UserError(
            f"{path}: {len(unexpected)} of {len(tensors)} tensors belong to no layer of this model ({unexpected[0]}, "
            "...); is the LoRA for another one?")
    if not found:
        raise UserError(f"{path}: covers the text encoder alone, and there is none here to load it into")

    where, config = peft_config(Path(path), tensors, metadata)
    ready = []
    for (module, layer_path), parts in found.items():
        layer = module.get_submodule(layer_path)
        if "A" not in parts or "B" not in parts:
            raise UserError(f"{path}: half of the pair for {layer_path} is missing; the file is damaged")
        A, B = parts["A"], parts["B"]
        rank = len(A) if A.ndim else 0
        out, into = len(layer.weight), layer.weight[0].numel()
        if not rank or A.numel() != rank * into or B.numel() != out * rank or B.shape[:2] != (out, rank):
            theirs = f"{tuple(A.shape)} and {tuple(B.shape)}" if rank else "of rank 0"
            raise UserError(
                f"{path}: {layer_path} is {into} -> {out} here, and the LoRA's pair is {theirs}; it is for another "
                "model, or damaged")
        A = A.view(rank, *layer.weight.shape[1:])              # 1x1 convolutions and linears are stored as either
        B = B.view(out, rank, *[1] * (layer.weight.ndim - 2))
        if not all(torch.isfinite(tensor).all() for tensor in parts.values()):
            raise UserError(f"{path}: NaN or infinite values at {layer_path}; the file is damaged")
        if "alpha" not in parts:
            alpha = config_alpha(config, "unet" if module is model else "text_encoder", layer_path, rank, where)
        elif parts["alpha"].numel() == 1:
            alpha = parts["alpha"].item() or rank              # kohya writes 0 for none
        else:
            raise UserError(f"{path}: alpha at {layer_path} is no single number; the file is damaged")
        place = layer.weight.device
        ready.append((layer, A.to(place), B.to(place), alpha))
    for layer, A, B, alpha in ready:                           # all of them or, where one is refused, none
        adapted(layer).add(name, A, B, alpha, weight)
        layer.requires_grad_(False)


def load_lora_to_train(
    path: str | Path, unet: nn.Module, text_encoder: nn.Module,
) -> tuple[list[nn.Parameter], int, float]:
    """A LoRA as `inject_lora` makes them, from a file -> its parameters, which train, its rank and its alpha. UserError
    where it covers anything but the U-Net's attention linears, or differs in rank or alpha from layer to layer."""
    load_lora(path, unet, text_encoder=text_encoder)
    layers = lora_layers(unet)
    unexpected = [name for name in layers if not f".{name}".endswith(tuple(f".{end}" for end in ATTENTION_LINEARS))]
    unexpected += [f"the text encoder's {name}" for name in lora_layers(text_encoder)]
    if unexpected:
        raise UserError(
            f"{path}: covers {len(unexpected)} layers that are not trained here, such as {unexpected[0]}; only the "
            "U-Net's attention linears are. Merge the file into the model instead")
    shapes = {(len(layer.lora_A["default"]), layer.lora_alpha["default"]) for layer in layers.values()}
    if len(shapes) > 1:
        raise UserError(f"{path}: its layers differ in rank or alpha: {sorted(shapes)}")
    parameters = [p for layer in layers.values() for p in (layer.lora_A["default"], layer.lora_B["default"])]
    return [parameter.requires_grad_(True) for parameter in parameters], *shapes.pop()


def peft_config(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[str, dict]:
    """What peft was told, and where: newer diffusers writes it into the header; peft's own files have it in a file
    beside them."""
    beside = path.with_name("adapter_config.json")
    if "lora_adapter_metadata" in metadata:
        where = f"{path}, lora_adapter_metadata"
        return where, parse_object(metadata["lora_adapter_metadata"], where, {})
    if beside.is_file() and any(key.startswith("base_model.model.") for key in tensors):
        return str(beside), read_json(beside)
    return str(path), {}


def config_alpha(config: dict, part: str, layer_path: str, rank: int, where: str) -> float:
    """A layer's alpha by peft's rules; `part` prefixes the keys of diffusers' pipelines."""
    def value(key: str, kind: type, default):
        found = config.get(f"{part}.{key}", config.get(key))
        if found is not None and not is_a(found, kind):
            raise UserError(f"{where}: {key} is {found!r:.40}; {kind.__name__} was expected. The file is damaged")
        return default if found is None else found

    alpha = value("lora_alpha", float, rank) or rank
    patterns = value("alpha_pattern", dict, {})
    for pattern, other in patterns.items():
        # A stranger's regular expression: (.*)*x would be matched until the end of days.
        if len(patterns) > 2000 or len(pattern) > 300 or re.search(r"\)[*+?{]", pattern) \
                or len(re.findall(r"[*+?{]", pattern)) > 2:
            raise UserError(f"{where}: alpha_pattern has {pattern!r:.40}; up to 2000 patterns are read, each with two "
                            "repeats or less, and none of a group")
        try:
            alpha = other if re.fullmatch(rf"(.*\.)?({pattern})", layer_path) else alpha
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{where}: alpha_pattern has {pattern!r:.40}, no regular expression ({error})") from None
    if not is_a(alpha, float) or not abs(alpha) < 1e30:
        raise UserError(f"{where}: alpha at {layer_path} is {alpha!r:.40}; a finite number was expected")
    return alpha * rank**0.5 if value("use_rslora", bool, False) else alpha
