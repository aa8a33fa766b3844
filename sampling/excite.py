"""Attend-and-Excite (arXiv 2301.13826): for words that pictures leave out. Before each of the first steps x is moved,
so that some place of the picture attends to each of the words. H x W places, N = H * W, M text tokens, h heads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model.errors import UserError

from .attention import attention_maps, quarter_level
from .drawing import Drawing, to_picture
from .single import take_apart

if TYPE_CHECKING:
    from model.checkpoint import Pipeline
    from model.tokenizer import Tokenizer

REFINED = {0: 0.05, 1: 0.5, 2: 0.8}    # before the first step of this fifth: the attention that each word must reach
MOST_MOVES = 20                        # that are made for it
# exp(-(d / (2 * 0.5))^2) at the distances 1, 0, 1, as the official code has it: a Gaussian of sigma 0.71, for the 2 of
# its "sigma 0.5" is inside of the square.
BLUR = torch.tensor([math.exp(-1), 1, math.exp(-1)]) / (1 + 2 * math.exp(-1))


def split_words(text: str, prompts: list[str], tokenizer: Tokenizer) -> list[str]:
    """"hair, shirt" -> ["hair", "shirt"]. UserError on a word that none of the prompts has."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if not any(tokenizer.find(word, prompt) for prompt in prompts):
            raise UserError(f"--excite {text}: {word!r} is no word of any prompt, or behind the tokens that are read")
    if not words:
        raise UserError(f"--excite {text}: no word in it; give words of the prompt, such as hair,shirt")
    return words


def excite_loss(maps: list[Tensor], tokens: list[int], size: tuple[int, int]) -> Tensor:
    """The maps (1, h, N, M) of some layers, places among the prompt's tokens, and (H, W) -> a scalar in [0, 1]:

        A = softmax_M(100 * mean_{layers, h} maps);   loss = max_tokens (1 - max_HW blur(A))

    without the start token and the last one. It is the word that is attended to least, where it is attended to most.
    """
    mean = torch.cat(maps, dim=1).mean(dim=(0, 1))                               # (N, M)
    attention = (100 * mean[:, 1:-1]).softmax(dim=-1)                            # (N, M - 2)
    pictures = attention.T[tokens].unflatten(1, size)[:, None]                   # (tokens, 1, H, W)
    kernel = torch.outer(BLUR, BLUR).to(pictures)[None, None]
    blurred = F.conv2d(F.pad(pictures, (1, 1, 1, 1), mode="reflect"), kernel)
    return (1 - blurred.amax(dim=(1, 2, 3))).max()


def sample_excited(
    sample: Callable[..., Tensor], eps_fn: Callable[[Tensor, Tensor], Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, step_size: float = 20.0,
) -> Tensor:
    """x (1, C, H, W), pure noise -> x0. sample(eps_fn, x, after_step=None) is any deterministic sampler with the rest
    of its arguments filled in; loss_fn(x, t (1,)) -> a scalar.

        x <- x - step_size * sqrt(1 - i / (2 (S - 1))) * d loss / dx

    before step i = 0, 1, ... of S, in the first half of them; and before those of REFINED several times.
    """
    steps: list[Tensor] = []
    sample(lambda x, t: steps.append(t) or torch.zeros_like(x), x)               # to hear which steps it visits
    targets = {fifth * len(steps) // 5: 1 - least for fifth, least in REFINED.items()}

    def loss_and_gradient(x: Tensor, i: int) -> tuple[float, Tensor]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            loss = loss_fn(x, steps[i])
        return loss.item(), torch.autograd.grad(loss, x)[0]

    def move(x: Tensor, i: int) -> Tensor:
        if i >= (len(steps) + 1) // 2:
            return x
        size = step_size * (1 - i / (2 * max(len(steps) - 1, 1)))**0.5
        loss, gradient = loss_and_gradient(x, i)
        for _ in range(MOST_MOVES):
            if loss <= targets.get(i, 1):
                break
            x = x - size * gradient
            loss, gradient = loss_and_gradient(x, i)
        return x - size * gradient

    numbers = itertools.count(1)
    return sample(eps_fn, move(x, 0), after_step=lambda x: move(x, next(numbers)))


def draw_excited(
    pipeline: Pipeline, drawing: Drawing, words: list[str], prompt: str, seed: int,
) -> tuple[dict, Tensor, Image.Image]:
    """-> which of the words the prompt has, the latent (4, h, w), and the picture; the sampler must not be stochastic.
    Every token of a word counts, each time that it is there. A move costs one U-Net row, forward and backward; there is
    one before each step of the first half, and there are 60 more at most."""
    found = {word: pipeline.tokenizer.find(word, prompt) for word in words}
    found = {word: tokens for word, tokens in found.items() if tokens}
    sample, eps_fn, noise, context = take_apart(pipeline, drawing, prompt, seed)
    level = quarter_level(pipeline.unet)
    size = tuple(-(-n // 2**level) for n in noise.shape[2:])                     # a level halves, and rounds up
    if min(size) < 2:
        raise UserError(f"--excite: a picture of {drawing.width}x{drawing.height} is too small; its maps have no room")

    def loss_fn(x: Tensor, t: Tensor) -> Tensor:
        with attention_maps(pipeline.unet, level) as maps:
            pipeline.unet(x.to(context.dtype), t, context)
        return excite_loss(maps, sum(found.values(), []), size)

    with torch.no_grad():
        x0 = sample_excited(sample, eps_fn, loss_fn, noise) if found else sample(eps_fn, noise)
    return {"excited": list(found)}, x0[0], to_picture(pipeline, x0[0], prompt, seed)
