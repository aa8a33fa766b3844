"""Suffix search: phrases of a list are appended to a prompt as long as they raise the score of its pictures. The score
is always for the prompt as it was asked: a phrase does not win by being drawn."""

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor

from .seeds import seeded

SEEDS = 8                                        # that choose, and as many others that check


def search_suffixes(
    choose: Callable[[str], float], check: Callable[[str], float], prompt: str, phrases: list[str],
) -> str:
    """The prompt with the phrases that a greedy search puts behind it, one after another: the one that has the highest
    choose(text), of equal ones the first, as long as check(text) rises with it.

    Both are mean scores, of different seeds: the highest of many means is so by luck as well, and that is no gain.
    """
    text, score, left = prompt, check(prompt), list(phrases)
    while left:
        phrase = max(left, key=lambda phrase: choose(f"{text}, {phrase}"))
        if (checked := check(f"{text}, {phrase}")) <= score:
            break
        text, score = f"{text}, {phrase}", checked
        left.remove(phrase)
    return text


def draw_with_suffixes(
    draw: Callable[[str, Sequence[int]], Iterable[tuple[Tensor, Image.Image]]],
    score: Callable[[list[Image.Image], str], list[float]], phrases: list[str], seed: int,
) -> Callable[[str, int], tuple[dict, Tensor, Image.Image]]:
    """-> a function: prompt, seed -> what is to be told, latent (4, h, w), picture, of the prompt with its suffixes.

    The search has seeds of its own, made from `seed`: the scores that are told, with suffixes and without, are of a
    picture that had no say. draw and score as in `draw_best`. It costs SEEDS pictures for every text that is tried, and
    as many for every one that is checked, once a prompt; and then two for each that is drawn.
    """
    seeds = torch.randint(2**63 - 1, (2, SEEDS), generator=seeded("suffix search", seed)).tolist()

    @functools.cache                             # once for all pictures of a prompt
    def found_for(prompt: str) -> str:
        def mean_score(seeds: list[int], text: str) -> float:
            return sum(score([image for _, image in draw(text, seeds)], prompt)) / SEEDS
        return search_suffixes(*(functools.partial(mean_score, some) for some in seeds), prompt, phrases)

    def draw_one(prompt: str, seed: int) -> tuple[dict, Tensor, Image.Image]:
        text = found_for(prompt)
        [(_, before)], [(latent, image)] = draw(prompt, [seed]), draw(text, [seed])
        score_before, after = score([before, image], prompt)
        return {"prompt": text, "asked": prompt, "score_before": score_before, "score": after}, latent, image
    return draw_one
