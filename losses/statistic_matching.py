"""Statistic matching (HG-DPO, Eq. 8): the policy's denoised latents keep the channel means of the frozen reference's,
and so the colours that DPO alone shifts."""

import torch
from torch import Tensor


def ddpm_mean_gain(timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """k_t (B,): how far the mean of a DDPM step t -> t-1 moves for a change of eps, beta_t / (sqrt(alpha_t) *
    sqrt(1 - alphas_cumprod_t)). timesteps (B,), alphas_cumprod (1000,)."""
    a_t = alphas_cumprod[timesteps]
    a_prev = torch.where(timesteps > 0, alphas_cumprod[(timesteps - 1).clamp(min=0)], torch.ones_like(a_t))
    alpha = a_t / a_prev
    return (1 - alpha) / (alpha.sqrt() * (1 - a_t).sqrt())


def statistic_matching_loss(
    eps_w: Tensor, eps_ref_w: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """Eq. 8 for the winners: eps_w, eps_ref_w (B, C, H, W), timesteps (B,), alphas_cumprod (1000,) -> a scalar.

        mean_B sum_C (k_t * mean_HW(eps_w - eps_ref_w))^2

    The paper compares the channel means of two DDPM steps, one with the policy's eps and one with the reference's.
    Both steps start from the same x_t and draw the same z, so both cancel, and the step is linear in eps: what is left
    is this closed form, which needs no step. Its weight lambda is 10000 in the paper.
    """
    dtype = torch.promote_types(eps_w.dtype, torch.float32)
    mean_difference = (eps_w.to(dtype) - eps_ref_w.detach().to(dtype)).mean(dim=(2, 3))      # (B, C)
    k = ddpm_mean_gain(timesteps, alphas_cumprod).to(dtype)[:, None]             # (B, 1)
    return (k * mean_difference).pow(2).sum(dim=1).mean()


def lambda_for(h: int, w: int) -> float:
    """A lambda for latents of h x w, from the paper's 10,000 at 88x128 (pictures of 704x1024): the noise that
    preference gradients put on a channel mean has a variance of 1/(h w), and so has the weight that holds the mean
    against it. 27,500 for 512x512. A rule of thumb of ours, not of the paper."""
    return 10_000 * 88 * 128 / (h * w)
