"""Early signs of what the loss does not tell, for it is mostly the noise of t."""

import contextlib
from pathlib import Path

import torch
from PIL import ImageStat
from torch import Tensor

from dataset.reader import Pairs
from losses.diffusion_dpo import pair_logs, squared_error
from model.checkpoint import Pipeline
from model.lora import lora_disabled
from pictures import sheet, write_png
from sampling import Drawing, add_noise, encode_prompts, sample_latents, to_picture

from .order import step_and_noise
from .run import append_lines


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


@torch.no_grad()
@torch.compiler.set_stance("force_eager")      # its shapes are others than a step's: not worth a graph of their own
def watch(
    out: Path, step: int, pipeline: Pipeline, data: Pairs, held_out: list[int], batch_size: int, seed: int,
) -> None:
    """A line of OUT/watch.jsonl and a sheet of pictures: these from fixed seeds, with their mean colour; and on
    held-out pairs, at fixed t and noise, the implicit accuracy and both errors' gains."""
    signs = {"step": step}
    device, dtype, alphas_cumprod = pipeline.device, pipeline.dtype, pipeline.alphas_cumprod.to(pipeline.device)
    if held_out:
        total: dict[str, float] = {}
        for i in range(0, len(held_out), batch_size):
            rows = held_out[i:i + batch_size]
            x0, context = data.batch(rows, device, dtype)
            numbers = range(i, i + len(rows))
            t, noise = step_and_noise(numbers, x0.shape[1:], seed, "t and noise of a held-out pair")
            t, noise, context = t.to(device).repeat(2), noise.to(device).repeat(2, 1, 1, 1), context.repeat(2, 1, 1)
            x_t, error = add_noise(x0, noise, t, alphas_cumprod).to(dtype), {}
            for which, lora in (("policy", contextlib.nullcontext()), ("reference", lora_disabled(pipeline.unet))):
                with lora:
                    error[which] = squared_error(pipeline.unet(x_t, t, context), noise)
            logs = pair_logs(error["policy"], error["reference"])
            for key, value in logs.items():
                total[key] = total.get(key, 0.0) + value.item() * len(rows)
        signs |= {f"held_out_{key}": value / len(held_out) for key, value in total.items()}
    rows = (held_out or list(range(len(data.rows))))[:8]
    _, context = data.batch(rows, device, dtype)
    size = tuple(side * pipeline.vae.downscale for side in data.latent_size)
    signs |= draw_samples(
        out / "samples" / f"{step:06d}.png", pipeline, context, [data.lines[i]["prompt"] for i in rows], size)
    append_lines(out / "watch.jsonl", [signs])
