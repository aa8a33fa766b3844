"""What a run that draws its own pictures has been told of them: rewards.jsonl, a line a picture."""

from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from model.files import read_lines

STAND_STILL = 5            # steps without any difference in reward after which a run ends


@dataclass(frozen=True)
class Told:
    """Of all pictures of a step."""

    lowest: float                      # reward
    highest: float
    opinion: float                     # the judge's mean

    @classmethod
    def of(cls, rewards: list[float], opinions: list[float]) -> "Told":
        return cls(min(rewards), max(rewards), sum(opinions) / len(opinions))


def read_rewards(path: Path, steps: int, pictures: int) -> tuple[list[Told], dict[int, list[float]]]:
    """What a run of so many steps, of so many pictures each, has been told. -> of every step; and of every prompt its
    rewards."""
    lines = read_lines(path, cut=True, step=int, prompt=int, reward=float) if path.is_file() else []
    lines = [line for line in lines if line["step"] <= steps]
    if [line["step"] for line in lines] != [step for step in range(1, steps + 1) for _ in range(pictures)]:
        raise UserError(f"{path}: not the rewards of the {steps} steps, of {pictures} pictures each, of the checkpoint "
                        f"beside it; put the right file back, or remove {path.parent / 'checkpoint'} to begin again")
    past, buffers = [], {}
    for first in range(0, len(lines), pictures):
        some = lines[first:first + pictures]
        past.append(Told.of([line["reward"] for line in some], [line.get("judge", line["reward"]) for line in some]))
    for line in lines:
        buffers.setdefault(line["prompt"], []).append(line["reward"])
    return past, buffers


def judge_falls(past: list[Told], patience: int) -> bool:
    opinions = [told.opinion for told in past]
    return 0 < patience <= len(past) // 2 and sum(opinions[-patience:]) < sum(opinions[-2 * patience:-patience])


def refuse_standstill(past: list[Told], limit: float | None, who: str) -> None:
    """UserError where the last steps had nothing to learn from. A single step may be so by chance."""
    last = past[-STAND_STILL:]
    lowest, highest = min(told.lowest for told in last), max(told.highest for told in last)
    if len(last) == STAND_STILL and limit is not None and lowest >= limit:
        raise UserError(f"{who} has said {lowest:g} or more of every picture for {STAND_STILL} steps, and from "
                        f"--reward-limit {limit:g} on a picture has no gradient: nothing is learned; give a limit on "
                        "the scorer's scale")
    if len(last) == STAND_STILL and lowest == highest:
        raise UserError(f"{who} has said {lowest:g} of every picture for {STAND_STILL} steps; there is nothing to "
                        "learn from")
