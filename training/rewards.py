"""What a run that draws its own pictures has been told of them: rewards.jsonl, a line a picture."""

from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from model.errors import UserError
from model.files import read_lines

STAND_STILL = 5            # steps without any difference in reward after which a run ends


def read_rewards(path: Path, steps: int) -> tuple[list[tuple[bool, float]], dict[int, list[float]]]:
    """What a run of so many steps has been told. -> of every step whether all rewards were the same, and the judge's
    mean; of every prompt its rewards."""
    past, buffers = [], {}
    lines = read_lines(path, cut=True, step=int, prompt=int, reward=float) if path.is_file() else []
    for _, some in groupby((line for line in lines if line["step"] <= steps), key=lambda line: line["step"]):
        some = list(some)
        opinions = torch.tensor([line.get("judge", line["reward"]) for line in some])
        past.append((len({line["reward"] for line in some}) == 1, opinions.mean().item()))
        for line in some:
            buffers.setdefault(line["prompt"], []).append(line["reward"])
    if len(past) != steps:
        raise UserError(f"{path}: has {len(past)} of the {steps} steps of the checkpoint beside it; put the right one "
                        f"back, or remove {path.parent / 'checkpoint'} to begin again")
    return past, buffers


def judge_falls(past: list[tuple[bool, float]], patience: int) -> bool:
    opinions = [opinion for _, opinion in past]
    return 0 < patience <= len(past) // 2 and sum(opinions[-patience:]) < sum(opinions[-2 * patience:-patience])


def refuse_standstill(past: list[tuple[bool, float]], rewards: Tensor, limit: float | None, who: str) -> None:
    """UserError after some steps that had nothing to learn from."""
    if limit is not None and (rewards >= limit).all():
        raise UserError(f"{who} says {rewards.min():g} at least, and from --reward-limit {limit:g} on a picture has no "
                        "gradient: nothing is learned; give a limit on the scorer's scale")
    before = [same for same, _ in past[1 - STAND_STILL:]]
    if (rewards == rewards[0, 0, 0]).all() and before == [True] * (STAND_STILL - 1):
        raise UserError(f"{who} has said {rewards[0, 0, 0]:g} of every picture for {STAND_STILL} steps; there is "
                        "nothing to learn from")
