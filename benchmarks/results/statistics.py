"""From a row's pictures to its figures, and how sure they are. Pure functions of arrays.

The interval is a paired hierarchical bootstrap: seeds are drawn again, and prompts, with all pictures of a prompt
together and the same prompts for every seed, since every seed has the same; and the same draws for all rows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy import ndarray

RESAMPLES = 2000
COLUMNS = ("scorer_won", "scorer_lost", "judge_won", "judge_lost", "agreed", "both", "right", "clean", "matches",
           "pictures", "red", "green", "blue", "diversity", "identity", "base_identity", "prompts")


@dataclass(frozen=True)
class Figure:
    heading: str
    digits: int
    of: Callable[[dict[str, ndarray]], ndarray]      # the sums over seeds and prompts, by column


def share(won: ndarray, lost: ndarray) -> ndarray:
    """In percent, ties left out; 50 where all are ties."""
    return np.where(won + lost > 0, 100 * won / np.maximum(won + lost, 1), 50.0)


FIGURES = {
    "scorer": Figure("win, scorer, %", 1, lambda sums: share(sums["scorer_won"], sums["scorer_lost"])),
    "judge": Figure("win, judge, %", 1, lambda sums: share(sums["judge_won"], sums["judge_lost"])),
    "right": Figure("right, by the judge, %", 1, lambda sums: 100 * sums["right"] / sums["pictures"]),
    "clean": Figure("no fault, %", 1, lambda sums: 100 * sums["clean"] / sums["pictures"]),
    "matches": Figure("as the caption says, %", 1, lambda sums: 100 * sums["matches"] / sums["pictures"]),
    "gap": Figure("scorer's wins less the judge's, points", 1, lambda sums: share(
        sums["scorer_won"], sums["scorer_lost"]) - share(sums["judge_won"], sums["judge_lost"])),
    "agree": Figure("scorer and judge agree, %", 1, lambda sums: share(sums["agreed"], sums["both"] - sums["agreed"])),
    "colour": Figure("RGB shift, of 255", 2, lambda sums: np.sqrt(
        sum((sums[name] / sums["prompts"]) ** 2 for name in ("red", "green", "blue")))),
    "diversity": Figure("diversity", 4, lambda sums: sums["diversity"] / sums["prompts"]),
    "identity": Figure("identity distance", 4, lambda sums: sums["identity"] / sums["prompts"]),
    "identity_change": Figure("its change", 4, lambda sums: (
        sums["identity"] - sums["base_identity"]) / sums["prompts"]),
}


def table(runs: Iterable[Mapping]) -> ndarray:
    """The files of a row, one a seed -> (seeds, prompts, COLUMNS)."""
    return np.stack([outcomes(run) for run in runs])


def outcomes(run: Mapping) -> ndarray:
    """(prompts, COLUMNS): how many pictures of each prompt won, lost, are right, and so on; 0 of what a row was not
    asked for."""
    prompts = len(run["diversity"])

    def count(text: str, letters: str) -> list[int]:
        n = len(text) // prompts
        return [sum(letter in letters for letter in text[k * n:(k + 1) * n]) for k in range(prompts)]

    # Of each picture: both say better, or both worse (=), they differ (/), or one of them sees a tie.
    both = "".join("t" if "t" in pair else "=" if pair[0] == pair[1] else "/"
                   for pair in zip(run["scorer"], run["judge"]))
    columns = [count(run[name], letter) for name in ("scorer", "judge") for letter in "wl"]
    columns += [count(both, "="), count(both, "=/")]
    columns += [count(run.get(name, "0" * len(run["right"])), "1") for name in ("right", "clean", "matches")]
    columns += [[len(run["right"]) / prompts] * prompts, *zip(*run["rgb"])]
    columns += [run["diversity"], *(run.get(name, [0] * prompts) for name in ("identity", "base_identity"))]
    return np.array([*columns, [1] * prompts], dtype=float).T


@cache
def draws(seeds: int, prompts: int, resamples: int = RESAMPLES) -> tuple[ndarray, ndarray]:
    """How often each seed and each prompt is in each draw: (1 + resamples, seeds), (1 + resamples, prompts). The first
    draw has each of them once: the figure itself. The same for all tables of one shape."""
    rng = np.random.default_rng(0)
    seed_counts, prompt_counts = (
        np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), resamples)]) for n in (seeds, prompts))
    return seed_counts, prompt_counts


def effect(tables: Mapping[str, ndarray], weights: Mapping[str, float], figure: str) -> ndarray:
    """Tables (seeds, prompts, COLUMNS) of one shape, by the rows' names -> the weighted sum (1 + resamples,) of the
    rows' figures in every draw."""
    total = 0.0
    for name, weight in weights.items():
        seed_counts, prompt_counts = draws(*tables[name].shape[:2])
        sums = np.einsum("rs,spk,rp->rk", seed_counts, tables[name], prompt_counts, optimize=True)
        total = total + weight * FIGURES[figure].of(dict(zip(COLUMNS, sums.T)))
    return total


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(1 + resamples,) -> the figure itself, and the ends of its 95 % interval."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return float(values[0]), float(low), float(high)


def verdict(low: float, high: float, above: float = 0.0) -> str:
    """Of a claim that an effect with this interval lies above a threshold."""
    return "held" if low > above else "not held" if high < above else "within noise"
