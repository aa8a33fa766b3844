"""One picture's drawing taken apart, for methods that reach into it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from .drawing import Drawing, initial_noise
from .guidance import guided_eps
from .samplers import SAMPLERS

if TYPE_CHECKING:
    from model.checkpoint import Pipeline


def take_apart(
    pipeline: Pipeline, drawing: Drawing, prompt: str, seed: int,
) -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """What `sample_latents` does for a prompt and a seed, by a sampler that is not stochastic: sample(eps_fn, x,
    after_step=None) -> x0; the guided eps_fn; the noise x (1, 4, h, w); and the prompt's context (1, M, D). Without
    a gradient of the text encoder, with one of all else."""
    uncond, cond = drawing.encode([drawing.negative_prompt, prompt], pipeline)[:, None]
    v_schedule = pipeline.alphas_cumprod if pipeline.predicts_v else None
    eps_fn = guided_eps(pipeline.unet, cond, uncond, drawing.guidance, v_schedule)
    sample = partial(
        SAMPLERS[drawing.sampler].sample, alphas_cumprod=pipeline.alphas_cumprod, steps=drawing.steps,
        scheduler=pipeline.configs["scheduler"])
    downscale = pipeline.vae.downscale
    noise, _ = initial_noise([seed], drawing.height // downscale, drawing.width // downscale)
    return sample, eps_fn, noise.to(pipeline.device), cond
