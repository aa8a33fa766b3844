"""Supervised fine-tuning: the denoising error that the model was trained with (DDPM, Eq. 14), on winners alone."""

from torch import Tensor

from .diffusion_dpo import squared_error


def sft_loss(eps: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Predicted and true noise of the winners (B, C, H, W) -> the scalar loss, and the same to log."""
    loss = squared_error(eps, noise).mean()
    return loss, {"mse_w": loss.detach()}
