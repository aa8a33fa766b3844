"""LoRA (arXiv 2106.09685): W x + weight * (alpha / rank) * B A x, with A and B small and trained, W frozen.

A layer becomes a subclass of itself that keeps its parameter's names and tensors, so that a U-Net with LoRA is still
the same U-Net: with the LoRA off its output is the base's, bit for bit, which is what the reference of DPO is.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError

ATTENTION_LINEARS = ("to_q", "to_k", "to_v", "to_out.0")


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
