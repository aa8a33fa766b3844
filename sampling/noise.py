"""Noise optimisation (ReNO, arXiv 2406.04312): the noise that a picture is drawn from follows a reward's gradient; the
weights stay as they are.

An iteration is noise -> sampler -> VAE -> reward, and back. Of a sampler's step only x is kept: its U-Net call is
computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .drawing import Drawing, decode, to_picture
from .single import take_apart

if TYPE_CHECKING:
    from model.checkpoint import Pipeline


def recomputed(eps_fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """eps_fn that keeps nothing but its arguments for the backward pass, which calls it again."""
    return partial(checkpoint, eps_fn, use_reentrant=False, preserve_rng_state=False)


def shell_penalty(noise: Tensor) -> Tensor:
    """||z||^2 / 2 - (d - 1) log ||z||, for z of d elements: minus the log-density of the norm of normal noise, up to a
    constant. Least at ||z|| = sqrt(d - 1), near which nearly all such noise lies."""
    norm = noise.norm()
    return norm**2 / 2 - (noise.numel() - 1) * norm.log()


def optimise_noise(
    sample: Callable[[Tensor], Tensor], reward: Callable[[Tensor], Tensor], noise: Tensor, iterations: int, lr: float,
    weight: float = 0.01, max_norm: float = 0.1,
) -> tuple[Tensor, list[float]]:
    """noise (1, C, H, W) -> the x0 of the highest reward that was met, and all rewards, of `noise` and of each step:

        z <- z - lr * nesterov(clip(d/dz (weight * shell_penalty(z) - reward(sample(z))), max_norm), 0.9)

    sample(z) -> x0 and reward(x0) -> a scalar, both with a gradient. Not the last: the clipped steps are all about as
    long, and go past the top.
    """
    z = noise.clone().requires_grad_()
    optimizer = torch.optim.SGD([z], lr, momentum=0.9, nesterov=True)
    rewards: list[float] = []
    for i in range(iterations + 1):
        with torch.set_grad_enabled(i < iterations):           # the last one is only judged
            x0 = sample(z)
            r = reward(x0)
        if rewards and not r.isfinite():                       # an overflow in half precision: nothing comes after it
            break
        if not rewards or r.item() > max(rewards):
            best = x0.detach()
        rewards.append(r.item())
        if i < iterations:
            optimizer.zero_grad()
            (weight * shell_penalty(z) - r).backward()
            torch.nn.utils.clip_grad_norm_(z, max_norm)
            optimizer.step()
    return best, rewards


def draw_optimised(
    pipeline: Pipeline, drawing: Drawing, reward: Callable[[Tensor, Sequence[str]], Tensor], iterations: int, lr: float,
    prompt: str, seed: int,
) -> tuple[dict, Tensor, Image.Image]:
    """-> what is to be told, latent (4, h, w), picture, from the noise of a seed. reward(pixels (1, 3, H, W) in [0, 1],
    [prompt]) -> (1,); the sampler must not be stochastic. It costs the U-Net rows of 2 * iterations + 1 pictures
    forward, and of `iterations` backward."""
    sample, eps_fn, noise, _ = take_apart(pipeline, drawing, prompt, seed)

    def reward_of(x0: Tensor) -> Tensor:
        return reward((decode(pipeline, x0) / 2 + 0.5).clamp(0, 1), [prompt])[0]

    x0, rewards = optimise_noise(partial(sample, recomputed(eps_fn)), reward_of, noise, iterations, lr)
    found = {"score_before": rewards[0], "score": max(rewards), "scores": rewards}
    return found, x0[0], to_picture(pipeline, x0[0], prompt, seed)
