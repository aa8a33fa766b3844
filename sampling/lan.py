"""Latent adaptive normalisation (HG-DPO, Eq. 7): the colours of the base kept at inference, with no training.

The tuned model and its base draw the same picture from the same noise, step by step together; after every step the
tuned latent's channels are given the mean and deviation of the base's. It costs the base's U-Net calls on top.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def match_statistics(x: Tensor, x_ref: Tensor) -> Tensor:
    """x (B, C, H, W) with the mean and standard deviation of x_ref over H, W, for each picture and channel."""
    mean, std = x.mean(dim=(2, 3), keepdim=True), x.std(dim=(2, 3), keepdim=True)
    mean_ref, std_ref = x_ref.mean(dim=(2, 3), keepdim=True), x_ref.std(dim=(2, 3), keepdim=True)
    return (x - mean) / std * std_ref + mean_ref


def sample_lan(
    sample: Callable[[Callable, Tensor, Callable], Tensor], eps_fn: Callable[[Tensor, Tensor], Tensor],
    eps_fn_ref: Callable[[Tensor, Tensor], Tensor], x: Tensor,
) -> Tensor:
    """x (B, C, H, W), pure noise -> the tuned model's x0. `sample(eps_fn, x, after_step)` is any deterministic sampler
    with the rest of its arguments filled in; eps_fn is the tuned model's, eps_fn_ref the base's, guided alike."""
    def both(x: Tensor, t: Tensor) -> Tensor:
        (x_ref, x_tuned), (t_ref, t_tuned) = x.chunk(2), t.chunk(2)
        return torch.cat([eps_fn_ref(x_ref, t_ref), eps_fn(x_tuned, t_tuned)])

    def normalise(x: Tensor) -> Tensor:
        x_ref, x_tuned = x.chunk(2)
        return torch.cat([x_ref, match_statistics(x_tuned, x_ref)])

    return sample(both, torch.cat([x, x]), normalise).chunk(2)[1]
