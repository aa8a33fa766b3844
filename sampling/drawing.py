"""Drawing: a pipeline, prompts and seeds -> latents -> pictures, the way a `Drawing` says.

    drawing = Drawing(height=1024, width=704, steps=50).for_model(pipeline)
    for latent, picture in draw_pictures(pipeline, drawing, ["a woman in a red coat"], seeds=[0]): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from model.errors import UserError

from .guidance import guided_eps
from .lan import sample_lan
from .onto import onto
from .prompt import encode_prompts
from .samplers import SAMPLERS

if TYPE_CHECKING:
    from model.checkpoint import Pipeline


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn. The defaults are the paper's; a size of None is the model's own."""

    steps: int = 50
    guidance: float = 5.0              # scale of classifier-free guidance; 1 is off
    height: int | None = None          # pixels
    width: int | None = None
    sampler: str = "dpm++"             # of `SAMPLERS`
    negative_prompt: str = ""
    prompt_weights: str = "off"        # or a1111; see prompt.py
    clip_skip: int = 0                 # last text layers left out

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Drawing:
        """From a program's options, which have these names."""
        return cls(**{field.name: options[field.name] for field in fields(cls)})

    def for_model(self, pipeline: Pipeline) -> Drawing:
        """With the model's own size where none is given. UserError on what this model cannot do."""
        layers = len(pipeline.text_encoder.text_model.encoder.layers)
        if self.clip_skip >= layers:
            raise UserError(f"--clip-skip {self.clip_skip}: must be 0 to {layers - 1}; this model has {layers} layers")
        height, width = pipeline.native_size
        return replace(self, height=self.height or height, width=self.width or width)

    def encode(self, prompts: list[str], pipeline: Pipeline) -> Tensor:
        """B prompts -> contexts (B, M, D), equally long."""
        with torch.no_grad():
            return encode_prompts(
                prompts, pipeline.tokenizer, pipeline.text_encoder, self.prompt_weights, self.clip_skip)

    def settings(self) -> dict[str, object]:
        """Under A1111's names: what pictures that are compared should have in common."""
        clip_skip = {"Clip skip": self.clip_skip + 1} if self.clip_skip else {}
        return {"Steps": self.steps, "Sampler": SAMPLERS[self.sampler].label, "CFG scale": f"{self.guidance:g}",
                **clip_skip, "RNG": "CPU", "Prompt weights": self.prompt_weights}


def picture_settings(pipeline: Pipeline, drawing: Drawing, seed: int, lan: bool = False) -> dict[str, object]:
    """What A1111 writes below a picture's prompt; keys at their defaults are left out, as it does."""
    more = {"VAE": Path(pipeline.vae_name).name} if pipeline.vae_name else {}
    loras = " ".join(Path(spec).name for spec in pipeline.loras) + (" LAN" if lan else "")
    more |= ({"LoRA": loras} if loras else {}) | (pipeline.concept.settings() if pipeline.concept else {})
    return {**drawing.settings(), "Seed": seed, "Size": f"{drawing.width}x{drawing.height}",
            "Model": Path(pipeline.name).name.removesuffix(".safetensors"), **more}


def initial_noise(seeds: list[int], height: int, width: int) -> tuple[Tensor, list[torch.Generator]]:
    """Noise (B, 4, height, width) float32, drawn on the CPU by one generator a seed: the same on every device and in
    every batch, and the same as diffusers'. The generators go on where it ends, for samplers that draw more."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return torch.cat([torch.randn((1, 4, height, width), generator=g) for g in generators]), generators


@torch.no_grad()
def sample_latents(
    pipeline: Pipeline, drawing: Drawing, context: Tensor, context_uncond: Tensor, seeds: list[int], lan: bool = False,
) -> Tensor:
    """One batch: contexts (B, M, D) and B seeds -> scaled latents (B, 4, height/8, width/8), float32. With `lan` the
    U-Net's LoRA is held to its base's colours (Eq. 7)."""
    scheduler, alphas_cumprod = pipeline.configs["scheduler"], pipeline.alphas_cumprod
    x, generators = initial_noise(
        seeds, drawing.height // pipeline.vae.downscale, drawing.width // pipeline.vae.downscale)
    x = onto(pipeline.device, x)
    v_schedule = alphas_cumprod if pipeline.predicts_v else None
    sampler = SAMPLERS[drawing.sampler]
    noise = {"generators": generators} if sampler.stochastic else {}

    def sample(eps_fn: Callable, x: Tensor, after_step: Callable | None = None) -> Tensor:
        return sampler.sample(eps_fn, x, alphas_cumprod, drawing.steps, scheduler, after_step=after_step, **noise)

    eps_fn = guided_eps(pipeline.unet, context, context_uncond, drawing.guidance, v_schedule)
    if lan:
        eps_fn_ref = guided_eps(pipeline.base_unet, context, context_uncond, drawing.guidance, v_schedule)
        return sample_lan(sample, eps_fn, eps_fn_ref, x)
    return sample(eps_fn, x)


def decode(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Scaled latents (B, 4, h, w) -> pictures (B, 3, H, W), about [-1, 1], with a gradient to latents that take one."""
    return pipeline.vae.decode(pipeline.vae.from_latent(latents.float()))


def to_images(decoded: Tensor) -> list[Image.Image]:
    """Decoded (B, 3, H, W), about [-1, 1] -> B pictures. Rounded half to even, as diffusers does."""
    pixels = ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


@torch.no_grad()
def to_picture(pipeline: Pipeline, latent: Tensor, prompt: str, seed: int) -> Image.Image:
    """One scaled latent (4, h, w) -> its picture. Decoded alone, so that it does not depend on its batch. UserError,
    with the prompt and the seed, where there is none: a NaN would be a black picture, and judged as one."""
    pixels = decode(pipeline, latent[None])
    if not latent.isfinite().all() or not pixels.isfinite().all():
        raise UserError(
            f"seed {seed}, prompt {prompt[:80]!r}: NaN or infinite values instead of a picture; a lower --guidance, "
            "weight of a LoRA or of a word, or --dtype float32 may help")
    return to_images(pixels)[0]


def draw_pictures(
    pipeline: Pipeline, drawing: Drawing, prompts: list[str], seeds: list[int], lan: bool = False,
) -> Iterator[tuple[Tensor, Image.Image]]:
    """One batch: prompts and as many seeds -> scaled latents (4, h, w) and pictures. Each prompt is encoded together
    with the negative one, equally long, and apart from the others."""
    contexts = {prompt: drawing.encode([drawing.negative_prompt, prompt], pipeline)              # (2, M, D) each
                for prompt in dict.fromkeys(prompts)}
    # A batch shares one context length, M; only a1111's long prompts differ in it.
    for _, some in groupby(zip(prompts, seeds, strict=True), key=lambda one: contexts[one[0]].shape[1]):
        some = list(some)
        uncond, cond = torch.stack([contexts[prompt] for prompt, _ in some], dim=1)              # (B, M, D) each
        latents = sample_latents(pipeline, drawing, cond, uncond, [seed for _, seed in some], lan)
        for latent, (prompt, seed) in zip(latents, some, strict=True):
            yield latent, to_picture(pipeline, latent, prompt, seed)
