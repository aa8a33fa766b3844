"""Supervised fine-tuning: the denoising error that the model was trained with (DDPM, Eq. 14), on winners alone."""

import torch
from torch import Tensor

from .diffusion_dpo import squared_error
from .processes import mean_of_processes


def sft_loss(eps: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Predicted and true noise of the winners (B, C, H, W) -> the scalar loss, and the same to log."""
    loss = squared_error(eps, noise).mean()
    return loss, {"mse_w": loss.detach()}


def winners_error(data: str, eps: Tensor, noise: Tensor, timesteps: Tensor, **given: Tensor) -> Tensor:
    """The same of the winners among rows of any `data` (see table.py), a scalar: of pairs the first halves, of pools
    (K * B rows) the best by `scores` (B, K), of labelled pictures the liked by `labels` (B,) in all processes."""
    error, n = squared_error(eps, noise), len(timesteps)
    if data == "labels":
        liked = (given["labels"] > 0).to(error.dtype)
        share = mean_of_processes(liked.mean())
        return (liked * error).mean() / torch.where(share > 0, share, 1)         # 0 where none is liked
    if data == "pool":
        return error.view(-1, n).gather(0, given["scores"].argmax(dim=1)[None]).mean()
    return error[:n].mean()
