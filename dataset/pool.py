"""A prompt's pool of pictures, and which two of them are its pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model.errors import UserError


@dataclass(frozen=True)
class Pool:
    """How many pictures a prompt gets, and the ranks, in falling score, of its winner and loser; 1 is the best. The
    defaults are the paper's: the best and the worst of 20."""

    pool_size: int = 20
    winner_rank: int = 1
    loser_rank: int = 20
    min_gap: float = 0.0               # of the scores; what is not above it is no pair
    preview_steps: int | None = None   # the pool is drawn with so few steps, and only its ends in full
    preview_keep: int = 2              # so many at each end
    keep: str = "pair"                 # or pool: the latents of all pictures are kept

    def __post_init__(self):
        if not self.winner_rank < self.loser_rank <= self.pool_size:
            raise UserError(f"--winner-rank {self.winner_rank} --loser-rank {self.loser_rank}: must rise within 1 to "
                            f"{self.pool_size}")
        ends = max(self.winner_rank, self.pool_size + 1 - self.loser_rank)
        if self.preview_steps is not None and not ends <= self.preview_keep <= self.pool_size // 2:
            raise UserError(
                f"--preview-keep {self.preview_keep}: must be {ends} to {self.pool_size // 2} with this pool and ranks")

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Pool:
        """From build_dataset.py's options, which have these names."""
        return cls(**{name: options[name] for name in cls.__dataclass_fields__})

    def ends(self, scores: list[float]) -> list[int]:
        """Which pictures of previews are drawn in full."""
        ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        return sorted(ranked[:self.preview_keep] + ranked[-self.preview_keep:])

    def pair(self, line: dict) -> dict:
        """A line with `scores`, and now with its `winner` and `loser`; or with `left_out`, a reason, where they are too
        close to be a pair."""
        scores = line["scores"]
        winner, loser = select(scores, self.winner_rank, self.loser_rank)
        gap = scores[winner] - scores[loser]
        if gap <= self.min_gap:
            ranks = f"ranks {self.winner_rank} and {self.loser_rank} of {self.pool_size}"
            return {**line, "left_out": f"the gap of {ranks} is {gap:.6g}, not above --min-gap {self.min_gap:g}"}
        return {**line, "winner": winner, "loser": loser}


def select(scores: list[float | None], winner_rank: int, loser_rank: int) -> tuple[int, int]:
    """Indices of the pictures that have these ranks, 1 to len(scores), in falling score; of equal scores the earlier
    counts as better. A score of None, of a picture that was only previewed, lies somewhere in the middle: ranks are
    counted from both ends, the winner's from the best and the loser's from the worst."""
    ranked = sorted((i for i, score in enumerate(scores) if score is not None), key=lambda i: (-scores[i], i))
    return ranked[winner_rank - 1], ranked[loser_rank - 1 - len(scores)]
