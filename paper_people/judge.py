"""An independent judge of paper people: a small convolutional network that reads off a picture what it shows.

It was trained from another seed on other pictures than the preference scorer, shares no layer with it, knows no text,
and never chooses anything; so it can tell whether what the scorer chose, or a model tuned by it draws, is better.

    judge = load_judge(folder)
    verdicts = judge_pictures(judge, images, captions)     # clean? as the caption says? and a score
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from model.builtin import BUILT_IN
from model.checkpoint import load_weights
from model.errors import UserError
from model.files import read_json, read_tensors, write_tensors, write_text

from . import data, world

HEADS = {**{name: len(values) for name, values in world.ATTRIBUTES.items()}, "fault": 1 + len(world.ANATOMY_FAULTS)}


class Judge(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] -> logits (B, n) for each attribute of a person, and for the anatomy fault
    (0 for none)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 128, 160)):
        super().__init__()
        stages = []
        for c_in, c_out in zip((3, *widths), widths):
            stages += [
                nn.Conv2d(c_in, c_out, 3, padding=1), nn.GroupNorm(8, c_out), nn.ReLU(),
                nn.Conv2d(c_out, c_out, 3, padding=1), nn.GroupNorm(8, c_out), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*stages[:-1])                              # (B, 160, 4, 4)
        self.hidden = nn.Linear(16 * widths[-1], 256)
        self.heads = nn.ModuleDict({name: nn.Linear(256, n) for name, n in HEADS.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.hidden(self.features(x).flatten(1)))
        return {name: head(x) for name, head in self.heads.items()}


@dataclass
class Verdict:
    clean: bool                        # no anatomy fault
    matches: bool                      # every attribute as the caption has it
    score: float                       # log p(no fault) + log p(the caption's attributes)
    fault: str | None                  # the most probable one of world.ANATOMY_FAULTS
    shown: world.Person                 # what the picture shows

    @property
    def right(self) -> bool:
        return self.clean and self.matches


@torch.no_grad()
def judge_pictures(judge: Judge, images: list[Image.Image], captions: list[str]) -> list[Verdict]:
    """A verdict a picture; the captions must be of the form that `world.caption` writes."""
    try:
        people = [world.parse_caption(caption) for caption in captions]
    except ValueError as error:
        raise UserError(str(error)) from None
    images = [image.convert("RGB").resize((world.SIZE, world.SIZE)) for image in images]
    verdicts = []
    for start in range(0, len(images), 64):
        x = data.to_tensor(np.stack([np.asarray(image) for image in images[start:start + 64]]))
        logits = {name: F.log_softmax(values.float(), dim=1) for name, values in judge(x).items()}
        best = torch.stack([values.argmax(dim=1) for values in logits.values()], dim=1).tolist()     # (B, 7)
        for i, (*numbers, fault) in enumerate(best):
            person = people[start + i]
            score = logits["fault"][i, 0] + sum(logits[name][i, j] for name, j in zip(HEADS, data.row(person)))
            shown = data.person(numbers)
            verdicts.append(Verdict(fault == 0, shown == person, score.item(), data.FAULTS[fault], shown))
    return verdicts


def load_verdict(what: Callable[[Verdict], float]) -> Callable:
    """What evaluate.py's judges are: given the device -> judge(images, captions) -> `what` of each verdict (B,)."""
    def load(device: torch.device) -> Callable[[list[Image.Image], list[str]], Tensor]:
        judge = load_judge(BUILT_IN["paper-people"].checkpoint / "judge")
        return lambda images, captions: torch.tensor([
            float(what(verdict)) for verdict in judge_pictures(judge, images, captions)])
    return load


load_score = load_verdict(lambda verdict: verdict.score)
load_clean = load_verdict(lambda verdict: verdict.clean)
load_matches = load_verdict(lambda verdict: verdict.matches)
load_right = load_verdict(lambda verdict: verdict.right)


def load_judge(folder: str | Path) -> Judge:
    """The judge of a checkpoint: `folder` holds config.json and model.safetensors."""
    config = read_json(Path(folder) / "config.json")
    if config.get("heads") != HEADS:
        raise UserError(f"{folder}: a judge of {config.get('heads')}, expected {HEADS}; make it again")
    path = Path(folder) / "model.safetensors"
    return load_weights(lambda: Judge(tuple(config["widths"])), read_tensors(path), path, "cpu", torch.float32)


def save_judge(judge: Judge, folder: Path) -> None:
    widths = [layer.out_channels for layer in judge.features if isinstance(layer, nn.Conv2d)][::2]
    config = {"heads": HEADS, "widths": widths}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_tensors(folder / "model.safetensors", {name: weight.half() for name, weight in judge.state_dict().items()})


# Training

def make_loss(judge: Judge, triples: dict[str, np.ndarray], batch: int):
    """-> loss_of_step for `fit`. Of every triple (see data.py), one picture at random."""
    images = triples["images"]
    shown = torch.from_numpy(np.stack([triples["people"], triples["people"], triples["others"]], axis=1))  # (N, 3, 6)
    fault = torch.from_numpy(np.stack([0 * triples["faults"], triples["faults"], 0 * triples["faults"]], axis=1))

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rows, which = torch.randint(len(images), (batch,)), torch.randint(3, (batch,))
        x = data.augment(data.to_tensor(images[rows.numpy(), which.numpy()]))
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(x)
        targets = dict(zip(HEADS, [*shown[rows, which].T, fault[rows, which]]))
        losses = {name: F.cross_entropy(logits[name].float(), targets[name]) for name in HEADS}
        return sum(losses.values()) + losses["fault"], {name: loss.detach() for name, loss in losses.items()}

    return loss_of_step


def check(judge: Judge, triples: dict[str, np.ndarray]) -> dict[str, float]:
    """How good the judge is on pictures whose truth is known: the share of broken ones that it finds broken, of all
    and of each kind; of whole ones that it calls broken; and of all pictures on which it gets each attribute right."""
    n, faults = len(triples["images"]), triples["faults"]
    people = np.concatenate([triples["people"], triples["people"], triples["others"]])           # (3N, 6)
    images = [Image.fromarray(image) for image in triples["images"].swapaxes(0, 1).reshape(-1, 64, 64, 3)]
    verdicts = judge_pictures(judge, images, [world.caption(data.person(numbers)) for numbers in people])
    broken = np.array([not verdict.clean for verdict in verdicts])
    shown = np.array([data.row(verdict.shown) for verdict in verdicts])
    found = broken[n:2 * n]
    return {
        "broken found": float(found.mean()),
        "false alarm": float(np.concatenate([broken[:n], broken[2 * n:]]).mean()),
        **{f"found {data.FAULTS[k]}": float(found[faults == k].mean()) for k in np.unique(faults)},
        **{name: float((shown == people)[:, i].mean()) for i, name in enumerate(world.ATTRIBUTES)}}
