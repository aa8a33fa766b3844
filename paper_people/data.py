"""The drawn pictures that the miniature checkpoint is trained on, as arrays, drawn once by two processes and kept.

A person is a row of six numbers here: the positions of its values in `world.ATTRIBUTES`. A fault is one number: 0 for
none, then `world.ANATOMY_FAULTS` from 1 on, then `world.CONTRADICTIONS`.
"""

import math
import multiprocessing
import random
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cli import progress
from model.files import atomic_write
from model.vae import VAE

from . import world

FAULTS = (None, *world.ANATOMY_FAULTS, *world.CONTRADICTIONS)
CHUNK = 250                                                                      # pictures of one random generator


def row(person: world.Person) -> list[int]:
    return [values.index(value) for values, value in zip(world.ATTRIBUTES.values(), astuple(person))]


def person(numbers) -> world.Person:
    return world.Person(*(values[int(i)] for values, i in zip(world.ATTRIBUTES.values(), numbers)))


def training_chunk(seed: str, count: int) -> dict[str, np.ndarray]:
    """The U-Net's world: pictures with their captions' people, wrong in the share that `world.WRONG_SHARE` states."""
    rng = random.Random(seed)
    examples = [world.example(rng) for _ in range(count)]
    return {
        "images": np.stack([np.asarray(e.image) for e in examples]),             # (n, 64, 64, 3)
        "people": np.array([row(e.described) for e in examples]),                # (n, 6) what the caption says
        "faults": np.array([FAULTS.index(e.fault) for e in examples])}           # (n,)


def triple_chunk(seed: str, count: int) -> dict[str, np.ndarray]:
    """For those who judge: three pictures of the same seed, so that only what they differ in can tell them apart. A
    person; the same person with an anatomy fault; another person, who contradicts the caption of the first in one
    attribute. No colour cast: what is wrong has to be seen."""
    rng = random.Random(seed)
    images, people, others, faults, kinds = [], [], [], [], []
    for _ in range(count):
        while (described := world.random_person(rng)) in world.held_out():
            pass
        seed = rng.getrandbits(32)
        fault, kind = rng.choice(world.ANATOMY_FAULTS), rng.choice(world.CONTRADICTIONS)
        other = world.contradict(described, kind, rng)
        pictures = world.render(described, seed), world.render(described, seed, fault), world.render(other, seed)
        images.append(np.stack([np.asarray(picture) for picture in pictures]))
        people.append(row(described))
        others.append(row(other))
        faults.append(FAULTS.index(fault))
        kinds.append(FAULTS.index(kind))
    return {
        "images": np.stack(images),                                              # (n, 3, 64, 64, 3)
        "people": np.array(people), "others": np.array(others),                  # (n, 6)
        "faults": np.array(faults), "kinds": np.array(kinds)}                    # (n,)


def drawn(folder: Path, name: str, chunk, count: int, seed: str) -> dict[str, np.ndarray]:
    """`count` rows made by `chunk` (one of the two above), drawn now or read from the folder."""
    path = folder / f"{name}.npz"
    if not path.exists():
        seeds = [f"{seed} {name} {i}" for i in range(-(-count // CHUNK))]
        counts = [min(CHUNK, count - i * CHUNK) for i in range(len(seeds))]
        if len(seeds) == 1:                                                      # sooner done than a process starts
            chunks = [chunk(seeds[0], count)]
        else:
            # Fresh interpreters: a forked one would inherit torch's threads, locked as they happen to be.
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                jobs = [pool.apply_async(chunk, args) for args in zip(seeds, counts)]
                chunks = [job.get() for job in progress(jobs, len(jobs), f"drawing {name}")]
        with atomic_write(path) as part, open(part, "wb") as file:
            np.savez(file, **{key: np.concatenate([c[key] for c in chunks]) for key in chunks[0]})
    with np.load(path) as arrays:
        return dict(arrays)


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (..., H, W, 3) -> float (..., 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, -3).float() / 127.5 - 1


def to_array(images: Tensor) -> np.ndarray:
    """float (..., 3, H, W) in about [-1, 1] -> uint8 (..., H, W, 3)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def augment(x: Tensor) -> Tensor:
    """Pictures (B, 3, 64, 64) as a generator might have drawn them: each a little off in its colours, some blurred,
    some noisy. The colour cast also takes away the hint that wrong training pictures are warmer."""
    batch = (len(x), 1, 1, 1)
    x = x * (1 + 0.05 * torch.randn(len(x), 3, 1, 1)) + 0.05 * torch.randn(batch)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, blurred, (torch.rand(batch) - 0.5).clamp(min=0) * 1.6)
    return x + torch.randn_like(x) * (torch.rand(batch) - 0.5).clamp(min=0) * 0.16


@torch.no_grad()
def through_vae(vae: VAE, images: np.ndarray, label: str, noise: float = 0.0) -> np.ndarray:
    """uint8 (N, 64, 64, 3) -> the same as the VAE gives them back, from latents with noise of a random strength of up
    to `noise` of their own standard deviation."""
    generator, decoded = torch.Generator().manual_seed(0), []
    batches = np.array_split(images, math.ceil(len(images) / 64))
    for batch in progress(batches, len(batches), label):
        with torch.autocast("cpu", torch.bfloat16):
            latents, _ = vae.encode(to_tensor(batch))
            strength = noise * torch.rand(len(batch), 1, 1, 1, generator=generator)
            latents = latents + latents.std() * strength * torch.randn(latents.shape, generator=generator)
            decoded.append(to_array(vae.decode(latents)))
    return np.concatenate(decoded)
