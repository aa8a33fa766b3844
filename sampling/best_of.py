"""Best of N: of N pictures of a prompt, from N seeds, the one that a scorer likes best. It costs the U-Net rows of N
pictures, with guidance 2 * steps * N, and is what every other way to a better picture is to be compared with."""

from collections.abc import Callable, Iterable, Sequence

from PIL import Image
from torch import Tensor


def draw_best(
    draw: Callable[[str, Sequence[int]], Iterable[tuple[Tensor, Image.Image]]],
    score: Callable[[list[Image.Image], str], list[float]], candidates: int, prompt: str, seed: int,
) -> tuple[dict, Tensor, Image.Image]:
    """Of `candidates` seeds from `seed` on the best, of equal ones the first -> what is to be told, its latent (4,
    h, w), its picture. draw(prompt, seeds) -> latent and picture of each; score(pictures, prompt) -> a number each."""
    seeds = range(seed, seed + candidates)
    latents, images = zip(*draw(prompt, seeds))
    scores = score(list(images), prompt)
    best = scores.index(max(scores))
    found = {"seed": seeds[best], "score": scores[best], "mean_score": sum(scores) / candidates, "scores": scores}
    return found, latents[best], images[best]
