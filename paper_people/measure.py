"""What the finished checkpoint is worth: samples and pools of test prompts under the judge; and the book of figures."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import cli
from model.checkpoint import Pipeline
from model.files import write_text
from model.scorers import PickScore
from pictures import sheet, write_png
from sampling import Drawing, decode, encode_prompts, sample_latents
from sampling.drawing import to_images

from . import world
from .judge import Judge, Verdict, judge_pictures

GUIDANCE, SAMPLER_STEPS = 5.0, 20


class Book:
    """Figures of the stages that are finished, kept in a file."""

    def __init__(self, path: Path):
        self.path = path
        self.figures = json.loads(path.read_text()) if path.exists() else {}

    def __contains__(self, stage: str) -> bool:
        return stage in self.figures

    def write(self, stage: str, **figures) -> None:
        self.figures[stage] = figures
        write_text(self.path, json.dumps(self.figures, indent=2) + "\n")
        print(f"{stage}: {json.dumps(figures)}")


@torch.no_grad()
def draw_pictures(pipeline: Pipeline, prompts: list[str], seeds: list[int], label: str) -> list[Image.Image]:
    """One picture a prompt and seed, at native size."""
    texts = list(dict.fromkeys(prompts))
    uncond, *contexts = encode_prompts(["", *texts], pipeline.tokenizer, pipeline.text_encoder)
    drawing = Drawing(steps=SAMPLER_STEPS, guidance=GUIDANCE).for_model(pipeline)
    images, starts = [], range(0, len(prompts), 40)
    for start in cli.progress(starts, len(starts), label):
        batch = slice(start, start + 40)
        context = torch.stack([contexts[texts.index(prompt)] for prompt in prompts[batch]])
        with torch.autocast("cpu", torch.bfloat16):
            latents = sample_latents(pipeline, drawing, context, uncond.expand_as(context), seeds[batch])
            images += to_images(decode(pipeline, latents))
    return images


def show_samples(path: Path, pipeline: Pipeline, count: int) -> None:
    if not path.exists():
        prompts = world.PROMPT_FILES["test"].read_text().splitlines()[:count]
        write_png(path, sheet(draw_pictures(pipeline, prompts, list(range(count)), "drawing"), prompts, 8, 128))


def flaw(verdict: Verdict, prompt: str) -> str:
    """What is wrong, in two words; the first attribute that differs where there are several."""
    described = world.parse_caption(prompt)
    wrong = [f"wrong {name}" for name in world.ATTRIBUTES if getattr(verdict.shown, name) != getattr(described, name)]
    return "right" if verdict.right else (verdict.fault or wrong[0]).replace("_", " ")


def measure_samples(count: int, out: Path, book: Book, pipeline: Pipeline, judge: Judge) -> None:
    """`count` pictures of the test prompts, counted by the judge."""
    prompts = world.PROMPT_FILES["test"].read_text().splitlines()
    prompts = [prompts[i % len(prompts)] for i in range(count)]
    images = draw_pictures(pipeline, prompts, list(range(count)), "drawing samples")
    verdicts = judge_pictures(judge, images, prompts)
    described = [world.parse_caption(prompt) for prompt in prompts]
    order = sorted(range(count), key=lambda i: not verdicts[i].right)[:24]
    order += sorted(range(count), key=lambda i: verdicts[i].right)[:24]
    texts = [flaw(verdicts[i], prompts[i]) for i in order]
    write_png(out / "6_right_and_wrong.png", sheet([images[i] for i in order], texts, 12, 128))
    rgb = np.array([np.asarray(image, dtype=np.float32).mean((0, 1)) for image in images])       # (count, 3)
    is_right = np.array([verdict.right for verdict in verdicts])
    book.write(
        "samples", count=count, steps=SAMPLER_STEPS, guidance=GUIDANCE,
        clean=float(np.mean([verdict.clean for verdict in verdicts])),
        matches=float(np.mean([verdict.matches for verdict in verdicts])), right=float(is_right.mean()),
        attributes={
            name: float(np.mean([getattr(v.shown, name) == getattr(d, name) for v, d in zip(verdicts, described)]))
            for name in world.ATTRIBUTES},
        rgb_of_right=rgb[is_right].mean(0).tolist() if is_right.any() else None,
        rgb_of_wrong=rgb[~is_right].mean(0).tolist() if not is_right.all() else None)


def interval(values: np.ndarray) -> list[float]:
    """The mean's 95 % interval, normal approximation."""
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return [float(values.mean() - half), float(values.mean() + half)]


def measure_pool(
    prompts: int, size: int, out: Path, book: Book, pipeline: Pipeline, judge: Judge, scorer: PickScore,
) -> None:
    """The best of a pool by the scorer against a random one of it, under the judge."""
    lines = world.PROMPT_FILES["test"].read_text().splitlines()[:prompts]
    repeated = [prompt for prompt in lines for _ in range(size)]
    images = draw_pictures(pipeline, repeated, [10**6 + i for i in range(len(repeated))], "drawing the pool")
    scores = scorer(images, repeated).reshape(prompts, size).numpy()
    verdicts = judge_pictures(judge, images, repeated)
    judged = np.array([verdict.score for verdict in verdicts]).reshape(prompts, size)
    is_right = np.array([verdict.right for verdict in verdicts], dtype=float).reshape(prompts, size)
    rows, best, worst = np.arange(prompts), scores.argmax(1), scores.argmin(1)
    # Against every other picture of its pool, that is, a random one in expectation.
    wins = (judged[rows, best][:, None] > judged).sum(1) / (size - 1)
    gains = is_right[rows, best] - is_right.mean(1)
    shown = [r * size + c for chosen in (best, worst) for r, c in zip(rows[:12], chosen)]
    texts = [f"{scores.flat[i]:.2f}, {flaw(verdicts[i], repeated[i])}" for i in shown]
    write_png(out / "7_best_and_worst.png", sheet([images[i] for i in shown], texts, min(12, prompts), 128))
    book.write(
        "pool", prompts=prompts, size=size, right_random=float(is_right.mean()),
        right_best=float(is_right[rows, best].mean()), right_worst=float(is_right[rows, worst].mean()),
        gain=float(gains.mean()), gain_ci95=interval(gains), win=float(wins.mean()), win_ci95=interval(wins),
        correlation=float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(scores, judged)])))
