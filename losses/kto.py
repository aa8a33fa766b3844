"""Diffusion-KTO (arXiv 2404.04465): from single pictures, each good or bad, without pairs."""

import torch
from torch import Tensor

from .diffusion_dpo import squared_error
from .processes import mean_of_processes


def baseline(gain: Tensor) -> Tensor:
    """z: the mean of the gains (B,) of all processes, at least 0; a constant to the gradient.

    Of all processes: a GPU with one or two pictures would compare them with themselves, and learn next to nothing.
    Their batches are equally large, so the mean of their means is the mean."""
    return mean_of_processes(gain.mean()).clamp(min=0)


def kto_loss(
    eps: Tensor, eps_ref: Tensor, noise: Tensor, labels: Tensor, beta: float = 5000.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """eps, eps_ref, noise (B, C, H, W), a picture a row, each with t and noise of its own; labels (B,), +1 desirable,
    -1 not. -> the scalar loss and logged scalars.

        gain = mse_ref - mse;   z = max(0, mean gain);   loss = mean_B 1 - sigmoid(labels * beta * (gain - z))

    The official code's default utility; its two weights are 1. beta has no factor 1/2 there either: 1000 by default,
    5000 in the paper. z is the batch's, so a batch should have both labels, and not be small: with --grad-accum each
    part has its own. The survey's Eq. 13 is not this: the term of the losers has the wrong sign and lacks a logarithm,
    the expectation is over pairs, and what z averages over is not said.

    Before the first step the loss is 0.5.
    """
    gain = squared_error(eps_ref.detach(), noise) - squared_error(eps, noise)    # (B,)
    z = baseline(gain)
    loss = torch.sigmoid(-labels * beta * (gain - z)).mean()                     # 1 - sigmoid(x) is sigmoid(-x)
    logs = {"kto": loss.detach(), "baseline": z}
    for name, label in (("desirable", 1), ("undesirable", -1)):                  # 0 where the batch has none
        chosen = labels == label
        logs[f"gain_{name}"] = (gain.detach() * chosen).sum() / chosen.sum().clamp(min=1)
    return loss, logs
