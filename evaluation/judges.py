"""Whoever can say something of a picture, a scorer or a statistic, is a judge here: judge(images, prompts) -> an answer
a picture. `measure` asks them and keeps every answer, so that a killed run goes on where it was.

    judges = {"colours": ..., "pickscore": partial(load_judge, "pickscore", "cuda")}     # name -> what loads it
    left_out, unreadable = measure(out, ["baseline", "candidate"], chunks, picture, judges, "0", cli.progress)
    rows, answers, unreadable = join_scores(out, ["baseline", "candidate"], rows, list(judges), picture)

A row is {file, prompt, ...}, and picture(side, row) opens its picture on one side.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dataset.folder import in_turn, write_manifest
from dataset.images import fit, open_picture, to_latent
from losses.diffusion_dpo import squared_error
from model.builtin import BUILT_IN, named
from model.checkpoint import Pipeline
from model.errors import UserError
from model.files import (
    digest_all,
    files_read,
    is_a,
    parse_object,
    read_json,
    read_lines,
    read_text,
    was_read,
    write_text,
)
from model.identity import Distance, FaceDistance, align, load_identity
from model.lora import lora_disabled
from model.preprocess import clip_preprocess, to_batch
from model.scorers import load_scorer
from sampling import Drawing, add_noise, guided_eps, seeded

from .statistics import HSV, RGB, colours, spread

Judge = Callable[[list[Image.Image], list[str]], list | Tensor]
IDENTITY = "identity:"                         # before the name of one of model/identity.py
DRAWS = 10                                     # steps and noises that the implicit reward is the mean of


def load_named(spec: str, device: torch.device) -> Judge:
    return named(spec)(device)


# Judges that are no scorers: name -> what loads one, given the device. A new one is a function and a line here.
JUDGES: dict[str, Callable[[torch.device], Judge]] = {
    **{name: partial(load_named, spec) for model in BUILT_IN.values() for name, spec in model.judges.items()},
}


def load_judge(name: str, device: torch.device, people: Sequence[tuple[Path, list[str] | None]] = ()) -> Judge:
    """One of `JUDGES`, any scorer of model/scorers.py, or identity:NAME, any distance of model/identity.py, which
    judges `people` alone: drawn pictures, and the pictures of their concepts."""
    if name.startswith(IDENTITY):
        return judge_identity(load_identity(name.removeprefix(IDENTITY), device), people)
    return JUDGES[name](device) if name in JUDGES else load_scorer(name, device)


def judge_identity(distance: Distance, people: Sequence[tuple[Path, list[str] | None]]) -> Judge:
    """-> judge(images, of each its file and its concept's) -> minus the distance: higher is nearer, as of scorers. Of a
    network of faces it is that of the faces that landmarks.jsonl tells of, beside the pictures."""
    if not people:
        raise UserError("an identity is judged by evaluate.py, of pictures that were drawn with a concept")
    if strangers := [file.name for file, concept in people if not concept]:
        raise UserError(f"{strangers[0]} was drawn without a concept, so that it has no one to resemble")
    shown = {Path(file) for _, concept in people for file in concept}
    if lost := [path for path in sorted(shown) if not was_read(path).is_file()]:
        raise UserError(f"{lost[0]}: no such picture, which others were drawn from")
    faces = isinstance(distance, FaceDistance)
    folders = {file.parent for file in (*shown, *(file for file, _ in people))} if faces else set()
    landmarks = {folder: read_landmarks(folder) for folder in sorted(folders)}

    def face(image: Image.Image, file: Path) -> Image.Image:
        points = landmarks[file.parent].get(file.name) if faces else None
        return align(image, points, distance.size) if points else image

    def judge(images: list[Image.Image], told: list[tuple[Path, list[str]]]) -> Tensor:
        drawn, nearness = [face(image, file) for image, (file, _) in zip(images, told, strict=True)], []
        for concept, some in groupby(zip(drawn, told), key=lambda one: one[1][1]):
            pictures = [face(open_picture(Path(file), keep_alpha=True).convert("RGB"), Path(file)) for file in concept]
            nearness.append(-distance([image for image, _ in some], pictures))
        return torch.cat(nearness)
    return judge


def read_landmarks(folder: Path) -> dict[str, list]:
    """A folder's landmarks.jsonl, as a detector of one's own wrote it: file -> five points, see `align`. {} where there
    is none."""
    path = folder / "landmarks.jsonl"
    lines = read_lines(path, file=str, landmarks=list) if path.is_file() else []
    return {line["file"]: line["landmarks"] for line in lines}


def read_by(name: str, folder: Path, row: dict) -> str | tuple[Path, list[str]]:
    """What a judge is told of a picture in `folder`: its prompt, or, where that has a concept's placeholder, its
    caption; and who judges identity, its file and the concept's pictures."""
    if name.startswith(IDENTITY):
        return folder / row["file"], row["concept_images"]
    return row.get("caption", row["prompt"])


def judge_colours(images: list[Image.Image], prompts: list[str]) -> list[dict[str, float]]:
    return [colours(image) for image in images]


def load_spread(names: list[str], device: torch.device) -> Judge:
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

    def __init__(self, pipeline: Pipeline, drawing: Drawing, seed: int):
        self.pipeline, self.drawing, self.seed = pipeline, drawing, seed

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        return torch.stack([self.reward(image, prompt) for image, prompt in zip(images, prompts, strict=True)]).cpu()

    def reward(self, image: Image.Image, prompt: str) -> Tensor:
        pipeline, unet = self.pipeline, self.pipeline.unet
        alphas_cumprod = pipeline.alphas_cumprod.to(pipeline.device)
        x0 = to_latent(fit(image, self.drawing.width, self.drawing.height), pipeline)            # (4, h, w)
        generator = seeded(f"t and noise of the implicit reward for {prompt}", self.seed)
        t = (torch.arange(DRAWS) + torch.rand(DRAWS, generator=generator)) * (1000 / DRAWS)      # one in each tenth
        t = t.long().clamp(max=999).to(pipeline.device)
        noise = torch.randn(DRAWS, *x0.shape, generator=generator).to(pipeline.device)
        x_t = add_noise(x0.expand_as(noise), noise, t, alphas_cumprod)
        v_schedule = alphas_cumprod if pipeline.predicts_v else None

        def error() -> Tensor:                                                                   # (DRAWS,)
            context = self.drawing.encode([prompt], pipeline).expand(DRAWS, -1, -1)
            return squared_error(guided_eps(unet, context, context, 1.0, v_schedule)(x_t, t), noise)

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
    """file -> {judge: answer}, with the row that the picture is of."""
    answers: dict[str, dict] = {}
    path = out / f"scores-{side}.jsonl"
    rows = read_lines(path, file=str) if path.is_file() else []
    for path in sorted(out.glob(f"partial/{side}.*.jsonl")):
        for line in read_text(path).split("\n"):
            with contextlib.suppress(UserError):               # where a run was killed as it wrote, or an empty line
                rows.append(parse_object(line, str(path), {"file": str}))
    for row in rows:
        for name in row.keys() - {"file", "prompt", "seed", "concept_images", "caption"}:
            if not is_answer(name, row[name]):
                raise UserError(f"{out}, {side}: what {name} says of {row['file']!r:.60} is damaged; make it again")
        answers.setdefault(row["file"], {}).update(row)
    return answers


def is_answer(name: str, value: object) -> bool:
    """Whether a judge can have said so: a finite number, or the colours of statistics.py."""
    if name != "colours":
        return is_a(value, float) and math.isfinite(value)
    return is_a(value, dict) and all(is_a(value.get(mean), float) for mean in (*HSV, *RGB, "hue_x", "hue_y"))


def note_judge(out: Path, sides: list[str], name: str, digest: str) -> None:
    """Notes what a judge was read from; refuses one that has changed since it gave the answers that are there."""
    with in_turn(out):
        manifest = read_json(out / "evaluation.json", options=dict, inputs=dict, sides=dict, judges=dict)
        before, manifest["judges"][name] = manifest["judges"].get(name, digest), digest
        if before != digest and any(name in row for side in sides for row in read_scores(out, side).values()):
            raise Changed(f"{out}: {name} has changed since it gave the scores that are here; choose another --out")
        more = {key: manifest[key] for key in ("sides", "judges")}
        write_manifest(out / "evaluation.json", manifest["options"], manifest["inputs"], **more)


class Changed(UserError):
    """Ends the work, where other problems of a judge only leave it out."""


def measure(
    out: Path, sides: list[str], chunks: list[list[dict]], picture: Callable[[str, dict], Image.Image],
    judges: dict[str, Callable[[], Judge]], job: str, progress: Callable,
    told: Callable[[str, str, dict], object] = lambda name, side, row: row["prompt"],
) -> tuple[dict[str, str], set[str]]:
    """Asks every judge about every picture that it has not judged yet, and notes the answers, a chunk at a time, in
    OUT/partial/. told(judge, side, row) is what it hears beside the picture. -> the judges that are left out, each with
    the reason; and messages on unreadable pictures."""
    left_out: dict[str, str] = {}
    unreadable: set[str] = set()
    answered = {side: read_scores(out, side) for side in sides}
    judge = None
    for name, load in judges.items():
        judge = None                           # before the next is loaded: one in memory at a time
        pending = [(side, chunk) for chunk in chunks for side in sides
                   if any(name not in answered[side].get(row["file"], {}) for row in chunk)]
        try:
            with files_read() as files:
                judge = load()
            digest = digest_all(files)
            note_judge(out, sides, name, digest)
            for side, chunk in progress(pending, len(pending), name):
                rows, images = [], []
                for row in chunk:
                    try:
                        images.append(picture(side, row))
                        rows.append(row)
                    except UserError as error:
                        unreadable.add(str(error))
                answers = judge(images, [told(name, side, row) for row in rows]) if rows else []
                answers = answers.tolist() if isinstance(answers, Tensor) else answers
                for row, answer in zip(rows, answers, strict=True):
                    if isinstance(answer, float) and not math.isfinite(answer):
                        raise UserError(f"{answer} for {side} {row['file']}")
                lines = [json.dumps({"file": row["file"], name: answer}) for row, answer in zip(rows, answers)]
                with in_turn(out):                             # another job may clear what it has joined
                    if read_json(out / "evaluation.json", judges=dict)["judges"][name] != digest:
                        raise Changed(f"{out}: another job asks another {name}; choose another --out")
                    (out / "partial").mkdir(exist_ok=True)
                    with open(out / "partial" / f"{side}.{job}.jsonl", "a", encoding="utf-8") as file:
                        file.write("\n".join(["", *lines, ""]))
        except Changed:
            raise
        except UserError as error:
            left_out[name] = f"{name} is left out: {error}"
    return left_out, unreadable


def join_scores(
    out: Path, sides: list[str], rows: list[dict], judges: list[str], picture: Callable,
) -> tuple[list[dict], dict[str, list[dict]], set[str]] | None:
    """Writes OUT/scores-SIDE.jsonl once all jobs are done. -> the rows that all `judges` have judged on all sides, each
    side's answers, and messages on pictures that cannot be read; None while other jobs are at work."""
    answered = {side: read_scores(out, side) for side in sides}
    kept, unreadable = [], set()
    for row in rows:
        if all(name in answered[side].get(row["file"], {}) for side in sides for name in judges):
            kept.append(row)
            continue
        try:
            for side in sides:
                picture(side, row)
        except UserError as error:
            unreadable.add(str(error))
        else:
            return None
    for side in sides:
        lines = []
        for row in rows:
            answers = answered[side].get(row["file"], {})
            lines.append(row | {name: answers[name] for name in sorted(answers) if name not in row})
        write_text(
            out / f"scores-{side}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    shutil.rmtree(out / "partial", ignore_errors=True)
    return kept, {side: [answered[side][row["file"]] for row in kept] for side in sides}, unreadable
