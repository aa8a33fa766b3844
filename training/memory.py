"""Less memory: what the backward pass computes again instead of keeping it, and an optimiser of 8 bits."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.compiled import compile_unet
from model.errors import UserError
from model.lora import lora_by_tensor, lora_layers
from model.unet import GEGLU, ResBlock, Upsample


def recomputed(function: Callable) -> Callable:
    """The same function, of which autograd keeps the inputs alone."""
    def call(*inputs):
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return call


def save_memory(unet: nn.Module, gradient_checkpointing: bool, compile: bool) -> None:
    """Norms, activations and upsampling are computed again, always: they cost little time and much memory. The
    convolutions behind them are not run again, for checkpoint stops at the last tensor that it misses. A compiler finds
    such places for itself. With `gradient_checkpointing` only the inputs of whole blocks are kept."""
    if gradient_checkpointing:
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            block.forward = recomputed(block.forward)
    if compile:
        if lora_layers(unet):
            lora_by_tensor(unet)
        compile_unet(unet)
        return
    for module in unet.modules():
        if isinstance(module, ResBlock):
            module.in_layers, module.out_layers = recomputed(module.in_layers), recomputed(module.out_layers)
        elif isinstance(module, GEGLU):
            module.gated = recomputed(module.gated)
        elif isinstance(module, Upsample):
            module.forward = recomputed(module.forward)


def make_optimizer(name: str, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """`name`: adamw, or adamw8bit, whose state takes a quarter of the memory."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, fused=parameters[0].is_cuda)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("--optimizer adamw8bit needs bitsandbytes; `pip install bitsandbytes`, or use adamw") from None
    return AdamW8bit(parameters, lr=lr)
