"""Pictures from fixed seeds, drawn as training goes on."""

from pathlib import Path

import torch
from PIL import ImageStat
from torch import Tensor

from model.checkpoint import Pipeline
from pictures import sheet, write_png
from sampling import Drawing, encode_prompts, sample_latents, to_picture


def draw_samples(path: Path, pipeline: Pipeline, context: Tensor, prompts: list[str], size: tuple[int, int]) -> dict:
    """One picture for each of context's rows (B, M, D), of `size` (height, width) pixels, as a sheet at `path`. -> the
    means of red, green and blue over all of them, in levels of 255."""
    uncond = encode_prompts([""], pipeline.tokenizer, pipeline.text_encoder).to(context.dtype)    # (1, 77, D)
    uncond = uncond.repeat(len(context), context.shape[1] // uncond.shape[1], 1)
    seeds, drawing = list(range(len(context))), Drawing(height=size[0], width=size[1], steps=20)
    latents = sample_latents(pipeline, drawing, context, uncond, seeds)
    images = [to_picture(pipeline, *one) for one in zip(latents, prompts, seeds)]
    write_png(path, sheet(images, prompts, columns=4))
    means = torch.tensor([ImageStat.Stat(image).mean for image in images]).mean(dim=0).tolist()
    return {f"mean_{name}": value for name, value in zip("RGB", means)}
