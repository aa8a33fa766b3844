"""LoRA (arXiv 2106.09685): W x + weight * (alpha / rank) * B A x, with A and B small and trained, W frozen.

A layer becomes a subclass of itself that keeps its parameter's names and tensors, so that a U-Net with LoRA is still
the same U-Net: with the LoRA off its output is the base's, bit for bit, which is what the reference of DPO is.

Files are written so that diffusers, A1111 and ComfyUI all read them (kohya's names, alpha in the file), and read in
every form there is for SD1.5: peft, diffusers' two older ones, kohya on diffusers' or LDM's block names, LoCon,
LyCORIS's own, ComfyUI's.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ldm
from .errors import UserError
from .files import is_a, parse_object, read_header, read_json, read_tensors, write_tensors

ATTENTION_LINEARS = ("to_q", "to_k", "to_v", "to_out.0")
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


class Adapters(nn.Module):
    """What the two kinds of layer share: named pairs (A, B), how strongly each acts, and a switch for all of them."""

    def start(self) -> None:
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_alpha: dict[str, float] = {}                 # as trained
        self.lora_weight: dict[str, float] = {}                # as used: 1, or less to stay nearer to the base
        self.lora_on = True
        self.lora_switch: Tensor | None = None                 # 0 or 1, in a compiled model: see `lora_by_tensor`

    def add(self, name: str, A: Tensor, B: Tensor, alpha: float, weight: float = 1.0) -> None:
        self.refuse_unless_on(name)
        self.lora_A[name], self.lora_B[name] = nn.Parameter(A), nn.Parameter(B)
        self.lora_alpha[name], self.lora_weight[name] = alpha, weight

    def refuse_unless_on(self, name: str) -> None:
        """Where others are merged a new LoRA would not act, and a new weight would not come apart again."""
        if not self.lora_on:
            raise UserError(f"LoRA {name!r}: the model's LoRAs are merged or switched off; unmerge_lora first")

    def active(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, float]]:
        """(A, B, scale) of every LoRA. A and B may be kept in float32 over a base in half precision."""
        for name, weight in self.lora_weight.items():
            A, B = self.lora_A[name], self.lora_B[name]
            scale = weight * self.lora_alpha[name] / A.shape[0]
            yield A.to(dtype), B.to(dtype), scale if self.lora_switch is None else scale * self.lora_switch


class LoRALinear(nn.Linear, Adapters):
    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if self.lora_on:
            for A, B, scale in self.active(x.dtype):
                out = out + F.linear(scale * F.linear(x, A), B)          # scaled where it is only rank wide
        return out


class LoRAConv2d(nn.Conv2d, Adapters):
    """For files that also cover convolutions; nothing here trains them."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        if self.lora_on:
            for A, B, scale in self.active(x.dtype):
                out = out + F.conv2d(scale * F.conv2d(x, A, None, self.stride, self.padding), B)
        return out


def lora_layers(model: nn.Module) -> dict[str, LoRALinear | LoRAConv2d]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Adapters)}


def adapted(layer: nn.Module) -> LoRALinear | LoRAConv2d:
    """The layer itself, turned into its subclass in place: every reference to it, and its tensors, stay."""
    if not isinstance(layer, Adapters):
        layer.__class__ = LoRALinear if isinstance(layer, nn.Linear) else LoRAConv2d
        layer.start()
    return layer


def inject_lora(
    model: nn.Module, rank: int = 8, alpha: float = 8.0, name: str = "default",
    targets: tuple[str, ...] = ATTENTION_LINEARS, generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Adds a LoRA to every linear whose name ends in one of `targets`: 128 of SD1.5's U-Net, 1.6 M parameters at rank
    8. A is gaussian with a deviation of 1 / rank, B zero: the output does not change. The model is frozen.
    -> the new parameters, float32, the only ones that train."""
    model.requires_grad_(False)
    parameters = []
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and f".{path}".endswith(tuple(f".{target}" for target in targets)):
            A = torch.randn(rank, layer.in_features, generator=generator) / rank
            B = torch.zeros(layer.out_features, rank)
            adapted(layer).add(name, A.to(layer.weight.device), B.to(layer.weight.device), alpha)
            parameters += [layer.lora_A[name], layer.lora_B[name]]
    if not parameters:
        raise UserError(f"no linear layer here ends in {', '.join(targets)}; nothing to train")
    return parameters


def lora_by_tensor(model: nn.Module) -> None:
    """Makes the switch of all LoRAs a tensor that multiplies them. On and off are then one and the same compiled graph:
    two graphs, one without the LoRA, would be fused differently, and their rounding would look like a preference."""
    layers = list(lora_layers(model).values())
    switch = torch.ones((), device=layers[0].weight.device)
    for layer in layers:
        layer.lora_switch = switch


@contextlib.contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its frozen base."""
    layers = [layer for layer in lora_layers(model).values() if layer.lora_on]
    switches = {id(layer.lora_switch): layer.lora_switch for layer in layers if layer.lora_switch is not None}
    for layer in layers:
        layer.lora_on = layer.lora_switch is not None
    for switch in switches.values():
        switch.zero_()
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_on = True
        for switch in switches.values():
            switch.fill_(1)


def set_lora_weight(model: nn.Module, weight: float, name: str = "default") -> None:
    """How strongly one LoRA acts from now on: 1 as trained; the paper draws with 0.5."""
    for layer in lora_layers(model).values():
        if name in layer.lora_weight:
            layer.refuse_unless_on(name)
            layer.lora_weight[name] = weight


@torch.no_grad()
def merge_lora(model: nn.Module, sign: int = 1) -> None:
    """Adds all LoRAs, as they act at present, into the weights and switches them off: faster, and fit to be saved as
    a model. `unmerge_lora` takes them out again, up to rounding."""
    for layer in lora_layers(model).values():
        if layer.lora_on != (sign > 0):
            continue                                           # merged already, or never
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        for A, B, scale in layer.active(dtype):
            delta = (B.flatten(1) @ A.flatten(1)).view(layer.weight.shape)
            layer.weight.copy_(layer.weight.to(dtype) + sign * scale * delta)
        layer.lora_on = sign < 0


def unmerge_lora(model: nn.Module) -> None:
    merge_lora(model, sign=-1)


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without any LoRA in it: the names of the checkpoint."""
    return {k: v for k, v in model.state_dict().items() if ".lora_A." not in k and ".lora_B." not in k}


# Files

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
    about = {                              # A1111 guesses the kind of model from these
        "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora", "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha)} if format == "kohya" else {}
    write_tensors(Path(path), tensors, about | (metadata or {}))


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
    strange = []
    for key, tensor in tensors.items():
        end = next((end for end in ENDS if key.endswith(end)), "")
        stem = key.removesuffix(end)
        if end and stem in places:
            found.setdefault(places[stem], {})[ENDS[end]] = tensor.float()
        elif tensor.any() and (text_encoder is not None or not OF_A_TEXT_ENCODER.match(key)):
            strange.append(key)
    if strange:
        raise UserError(
            f"{path}: {len(strange)} of {len(tensors)} tensors belong to no layer of this model ({strange[0]}, ...); "
            "is the LoRA for another one?")
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
        if not rank or A.numel() != rank * into or B.numel() != out * rank:
            theirs = f"{A.numel() // rank} -> {B.numel() // rank}" if rank else "of rank 0"
            raise UserError(
                f"{path}: {layer_path} is {into} -> {out} here, and the LoRA's is {theirs}; it is for another model")
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
    for pattern, other in value("alpha_pattern", dict, {}).items():
        try:
            alpha = other if re.fullmatch(rf"(.*\.)?({pattern})", layer_path) else alpha
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{where}: alpha_pattern has {pattern!r:.40}, no regular expression ({error})") from None
    if not is_a(alpha, float) or not abs(alpha) < 1e30:
        raise UserError(f"{where}: alpha at {layer_path} is {alpha!r:.40}; a finite number was expected")
    return alpha * rank**0.5 if value("use_rslora", bool, False) else alpha
