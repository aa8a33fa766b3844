"""Random numbers of different uses, kept apart."""

import hashlib

import torch


def seeded(purpose: str, seed: int, number: int = 0) -> torch.Generator:
    """A CPU generator for one use, such as ("noise of a training pair", the run's --seed, the pair's number). Hashed,
    so that no two uses, no two seeds and no two numbers share a stream, as sums like `seed + number` do.

    Pictures are the exception: theirs is the seed itself, so that others' programs draw the same.
    """
    content = hashlib.sha256(f"{purpose}\n{seed}\n{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(content[:8], "little"))
