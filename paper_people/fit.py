"""One training loop for every part of the miniature checkpoint: AdamW, warm-up and cosine decay, averaged weights."""

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli import progress
from model.files import atomic_write, read_tensors, write_tensors, write_text

SAVE_SECONDS = 60


def learning_rate(step: int, steps: int) -> float:
    """The share of the full learning rate: up for the first 5 %, then half a cosine down."""
    warm_up = max(1, steps // 20)
    return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))


@contextlib.contextmanager
def plain_attention():
    """For training on a CPU: matmul, softmax, matmul. With small heads they take half the time that torch's fused
    kernel and its float32 fallback take, backward in bfloat16. (torch.compile is no way here: in torch 2.13 it left
    some convolutions without a gradient.)"""
    fused = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        if is_causal:
            return fused(q, k, v, is_causal=True)
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def fit(
    name: str,
    folder: Path,
    module: nn.Module,
    loss_of_step: Callable[[int], tuple[Tensor, dict[str, Tensor]]],
    steps: int,
    lr: float,
    seed: int,
    average: float = 0.999,
) -> float:
    """Trains `module` in place and leaves it with the moving average of its weights; returns the seconds it took.

    loss_of_step(step) -> loss, values to show. It draws what it needs from torch's global generator, which is seeded
    again for every step: so a run that was killed goes on, from its state of at most a minute ago, as if it had not
    been. The result is kept in `folder`: a second call only reads it.
    """
    result, state_file = folder / f"{name}.safetensors", folder / f"{name}.state.pt"
    if result.exists():
        module.load_state_dict(read_tensors(result))
        return json.loads((folder / f"{name}.json").read_text())["seconds"]
    averaged = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)
    first, seconds, log = 0, 0.0, []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        module.load_state_dict(state["module"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, log = state["step"], state["seconds"], state["log"]

    began = saved = time.monotonic()
    for step in progress(range(first, steps), steps - first, f"training {name}"):
        torch.manual_seed(seed * 10**6 + step)
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate(step, steps)
        loss, values = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            keep = min(average, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(averaged.parameters()), list(module.parameters()), 1 - keep)
        if step % 50 == 0:
            log.append({"step": step, "loss": loss.item(), **{key: value.item() for key, value in values.items()}})
        if time.monotonic() - saved > SAVE_SECONDS and step + 1 < steps:
            saved = time.monotonic()
            with atomic_write(state_file) as part:
                torch.save({
                    "module": module.state_dict(), "averaged": averaged.state_dict(),
                    "optimizer": optimizer.state_dict(), "step": step + 1, "seconds": seconds + saved - began,
                    "log": log}, part)
    seconds += time.monotonic() - began
    module.load_state_dict(averaged.state_dict())
    write_text(folder / f"{name}.json", json.dumps({"seconds": seconds, "steps": steps, "log": log}))
    write_tensors(result, averaged.state_dict())
    state_file.unlink(missing_ok=True)
    return seconds
