"""Whoever can say something of a picture, a scorer or a statistic, is a judge here: judge(images, prompts) -> an answer
a picture. `measure` asks them and keeps every answer, so that a killed run goes on where it was.

    judges = {"colours": ..., "pickscore": partial(load_judge, "pickscore", "cuda")}     # name -> what loads it
    problems = measure(out, ["baseline", "candidate"], chunks, picture, judges, job="0")
    rows, answers = join_scores(out, ["baseline", "candidate"], rows, list(judges), picture, problems)

A row is {file, prompt, ...}, and picture(side, row) opens its picture on one side.
"""

import argparse
import contextlib
import json
import math
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import cli
from build_dataset import encoded
from dataset.folder import in_turn, noted
from judgement import HSV, RGB, spread
from losses.diffusion_dpo import squared_error
from model.checkpoint import PAPER_PEOPLE, Pipeline
from model.errors import UserError
from model.files import digest_all, files_read, is_a, parse_object, read_json, read_lines, read_text, write_text
from model.lora import lora_disabled
from model.preprocess import clip_preprocess, to_batch
from model.scorers import load_scorer
from paper_people import judge as paper_judge
from sampling import add_noise, encode_prompts, guided_eps, seeded

PAPER_JUDGES = {                               # what they say of a picture: see paper_people/judge.py's Verdict
    "judge": "score", "judge-clean": "clean", "judge-matches": "matches", "judge-right": "right"}
DRAWS = 10                                     # steps and noises that the implicit reward is the mean of


def load_judge(name: str, device: torch.device) -> Callable:
    """Any scorer of model/scorers.py, or the paper people's own judge: its score, or 1 for a picture without an anatomy
    fault (judge-clean), for one that shows all that its caption says (judge-matches), for both (judge-right)."""
    if name not in PAPER_JUDGES:
        return load_scorer(name, device)
    judge = paper_judge.load_judge(PAPER_PEOPLE / "judge")
    return lambda images, prompts: torch.tensor([
        float(getattr(verdict, PAPER_JUDGES[name])) for verdict in paper_judge.judge_pictures(judge, images, prompts)])


def load_spread(names: list[str], device: torch.device) -> Callable:
    """How much the pictures of a prompt differ, to the eyes of the first scorer's image tower that can be loaded."""
    scorer = None
    for name in names:
        with contextlib.suppress(UserError):     # a scorer that is asked for itself says what it lacks
            scorer = scorer or load_scorer(name, device)
    if scorer is None:
        raise UserError(f"none of {', '.join(names)} could be loaded")

    @torch.no_grad()
    def distances(images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = to_batch(lambda i: clip_preprocess(i, scorer.preprocessor), images, prompts, scorer.clip.logit_scale)
        return spread(scorer.clip.embed_images(pixels), prompts)
    return distances


class ImplicitReward:
    """A LoRA's own judgement of a picture: by how much its denoising error is below its base's, the mean over DRAWS
    steps and noises. These depend on the prompt alone, so that the two pictures of a preference share them."""

    def __init__(self, args: argparse.Namespace, pipeline: Pipeline):
        self.args, self.pipeline = args, pipeline

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        return torch.stack([self.reward(image, prompt) for image, prompt in zip(images, prompts, strict=True)]).cpu()

    def reward(self, image: Image.Image, prompt: str) -> Tensor:
        args, pipeline, unet = self.args, self.pipeline, self.pipeline.unet
        alphas_cumprod = pipeline.alphas_cumprod.to(pipeline.device)
        x0 = encoded(args, pipeline, prompt, {"w": image})[1]["latents_w"]                       # (4, h, w)
        generator = seeded(f"t and noise of the implicit reward for {prompt}", args.seed)
        t = (torch.arange(DRAWS) + torch.rand(DRAWS, generator=generator)) * (1000 / DRAWS)      # one in each tenth
        t = t.long().clamp(max=999).to(pipeline.device)
        noise = torch.randn(DRAWS, *x0.shape, generator=generator).to(pipeline.device)
        x_t = add_noise(x0.expand_as(noise), noise, t, alphas_cumprod)
        of_v = alphas_cumprod if pipeline.configs["scheduler"].get("prediction_type") == "v_prediction" else None

        def error() -> Tensor:                                                                   # (DRAWS,)
            context = encode_prompts(
                [prompt], pipeline.tokenizer, pipeline.text_encoder, args.prompt_weights, args.clip_skip)
            context = context.expand(DRAWS, -1, -1)
            return squared_error(guided_eps(unet, context, context, 1.0, of_v)(x_t, t), noise)

        with lora_disabled(unet), lora_disabled(pipeline.text_encoder):
            error_ref = error()
        return (error_ref - error()).mean()


def chunked(rows: list[dict], size: int) -> list[list[dict]]:
    """Rows in chunks of `size` or a little more, so that the pictures of one prompt stay together."""
    chunks: list[list[dict]] = [[]]
    for _, pictures in groupby(rows, key=lambda row: row["prompt"]):
        if len(chunks[-1]) >= size:
            chunks.append([])
        chunks[-1] += pictures
    return chunks


def read_scores(out: Path, side: str) -> dict[str, dict]:
    """file -> all that is known of its picture."""
    known: dict[str, dict] = {}
    path = out / f"scores-{side}.jsonl"
    rows = read_lines(path, file=str) if path.is_file() else []
    for path in sorted(out.glob(f"partial/{side}.*.jsonl")):
        for line in read_text(path).split("\n"):
            with contextlib.suppress(UserError):               # where a run was killed as it wrote, or an empty line
                rows.append(parse_object(line, str(path), {"file": str}))
    for row in rows:
        for name in row.keys() - {"file", "prompt", "seed"}:
            if not is_answer(name, row[name]):
                raise UserError(f"{out}, {side}: what {name} says of {row['file']!r:.60} is damaged; make it again")
        known.setdefault(row["file"], {}).update(row)
    return known


def is_answer(name: str, value: object) -> bool:
    """Whether a judge can have said so: a finite number, or the colours of judgement.py."""
    if name != "colours":
        return is_a(value, float) and math.isfinite(value)
    return is_a(value, dict) and all(is_a(value.get(mean), float) for mean in (*HSV, *RGB, "hue_x", "hue_y"))


def known_judge(out: Path, name: str, digest: str) -> None:
    """Notes what a judge was read from; refuses one that has changed since it gave the answers that are there."""
    with in_turn(out):
        about = read_json(out / "evaluation.json", options=dict, inputs=dict, sides=dict, judges=dict)
        if about["judges"].setdefault(name, digest) != digest:
            raise Changed(f"{out}: {name} has changed since it gave the scores that are here; choose another --out")
        more = {key: about[key] for key in ("sides", "judges")}
        noted(out / "evaluation.json", about["options"], about["inputs"], **more)


class Changed(UserError):
    """Ends the work, where other problems of a judge only leave it out."""


def measure(
    out: Path, sides: list[str], chunks: list[list[dict]], picture: Callable[[str, dict], Image.Image],
    judges: dict[str, Callable[[], Callable]], job: str,
) -> dict[str, str]:
    """Asks every judge about every picture that it has not judged yet, and notes the answers, a chunk at a time, in
    OUT/partial/. -> what went wrong: {name of a judge, or a message: message}."""
    problems = {}
    known = {side: read_scores(out, side) for side in sides}
    (out / "partial").mkdir(exist_ok=True)
    judge = None
    for name, load in judges.items():
        judge = None                           # before the next is loaded: one in memory at a time
        pending = [(side, chunk) for chunk in chunks for side in sides
                if any(name not in known[side].get(row["file"], {}) for row in chunk)]
        try:
            with files_read() as files:
                judge = load()
            known_judge(out, name, digest_all(files))
            for side, chunk in cli.progress(pending, len(pending), name):
                rows, images = [], []
                for row in chunk:
                    try:
                        images.append(picture(side, row))
                        rows.append(row)
                    except UserError as error:
                        problems[str(error)] = str(error)
                answers = judge(images, [row["prompt"] for row in rows]) if rows else []
                answers = answers.tolist() if isinstance(answers, Tensor) else answers
                for row, answer in zip(rows, answers, strict=True):
                    if isinstance(answer, float) and not math.isfinite(answer):
                        raise UserError(f"{answer} for {side} {row['file']}")
                lines = [json.dumps({"file": row["file"], name: answer}) for row, answer in zip(rows, answers)]
                with open(out / "partial" / f"{side}.{job}.jsonl", "a", encoding="utf-8") as file:
                    file.write("\n".join(["", *lines, ""]))
        except Changed:
            raise
        except UserError as error:
            problems[name] = f"{name} is left out: {error}"
    return problems


def join_scores(
    out: Path, sides: list[str], rows: list[dict], judges: list[str], picture: Callable, problems: dict[str, str],
) -> tuple[list[dict], dict[str, list[dict]]] | None:
    """Writes OUT/scores-SIDE.jsonl once all jobs are done. -> the rows that all judges (but those in `problems`) have
    judged on all sides, and each side's answers; None while other jobs are at work. Pictures that cannot be read are
    added to `problems`."""
    known = {side: read_scores(out, side) for side in sides}
    judges = [name for name in judges if name not in problems]
    kept = []
    for row in rows:
        if all(name in known[side].get(row["file"], {}) for side in sides for name in judges):
            kept.append(row)
            continue
        try:
            for side in sides:
                picture(side, row)
        except UserError as error:
            problems[str(error)] = str(error)
        else:
            return None
    for side in sides:
        answers = [known[side].get(row["file"], {}) for row in rows]
        lines = [row | {key: said[key] for key in sorted(said) if key not in row} for row, said in zip(rows, answers)]
        write_text(
            out / f"scores-{side}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    shutil.rmtree(out / "partial", ignore_errors=True)
    return kept, {side: [known[side][row["file"]] for row in kept] for side in sides}
