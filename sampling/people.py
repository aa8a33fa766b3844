"""Drawing people who are given by pictures: see model/concept.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from .drawing import Drawing, sample_latents, to_picture

if TYPE_CHECKING:
    from model.checkpoint import Pipeline
    from model.concept import Person


def draw_people(
    pipeline: Pipeline, drawing: Drawing, prompts: list[str], seeds: list[int], people: Sequence[Person],
    lan: bool = False,
) -> Iterator[tuple[Tensor, Image.Image]]:
    """As `draw_pictures`, with a person for each prompt, whom the pipeline's concept puts at its placeholder. A batch
    shares one number of patches; UserError where a prompt has no placeholder."""
    for _, group in groupby(zip(prompts, seeds, people, strict=True), key=lambda one: len(one[2].patches)):
        prompts, seeds, people = zip(*group)
        contexts = [drawing.encode([drawing.negative_prompt, prompt], pipeline) for prompt in prompts]
        cond = torch.stack([pipeline.concept.say(context, prompt, person.feature, pipeline.tokenizer)
                            for (_, context), prompt, person in zip(contexts, prompts, people)])         # (B, M, D)
        uncond = torch.stack([context for context, _ in contexts])                               # (B, M, D)
        with pipeline.concept.showing(torch.stack([person.patches for person in people])):
            latents = sample_latents(pipeline, drawing, cond, uncond, list(seeds), lan)
        for latent, prompt, seed in zip(latents, prompts, seeds):
            yield latent, to_picture(pipeline, latent, prompt, seed)
