"""The learning rate over a run."""

import math

SCHEDULES = {              # the share of the rate, from the share of the steps that is done
    "constant": lambda done: 1.0, "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2}


def learning_rate(lr: float, schedule: str, warmup: int, step: int, steps: int) -> float:
    """Of `step`, 1 to `steps`: it rises over `warmup` steps to `lr`, and falls as one of `SCHEDULES`."""
    return lr * (min(1.0, step / warmup) if warmup else 1.0) * SCHEDULES[schedule]((step - 1) / steps)
