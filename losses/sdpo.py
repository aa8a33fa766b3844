"""Diffusion-SDPO (arXiv 2511.03317): Diffusion-DPO whose push off the loser is held back where it would hurt the
winner."""

import torch
from torch import Tensor

from .diffusion_dpo import dpo_from_errors, pair_logs, squared_error
from .processes import mean_of_processes


@torch.no_grad()
def loser_scale(eps: Tensor, noise: Tensor, sdpo_mu: float) -> Tensor:
    """lam, a scalar in [0, 1], from eps, noise (2B, C, H, W), of the pairs of all processes.

    g_w and g_l, the gradients of the errors by the outputs, are 2 (eps - noise) / n. A step that moves all outputs by
    -(g_w - lam g_l), the winner's like the loser's, changes the winner's error by -|g_w|^2 + lam g_w.g_l. That is at
    most -mu |g_w|^2 if lam <= (1 - mu) |g_w|^2 / g_w.g_l, and for any lam >= 0 if g_w.g_l <= 0."""
    dtype = torch.promote_types(eps.dtype, torch.float32)
    g_w, g_l = (eps.to(dtype) - noise.to(dtype)).chunk(2)      # 2 / n is in both sides of the fraction
    norm_w, common = mean_of_processes(torch.stack([g_w.pow(2).sum(), (g_w * g_l).sum()]))
    lam = ((1 - sdpo_mu) * norm_w / common).clamp(max=1)
    return torch.where(common > 0, lam, torch.ones_like(lam))


def sdpo_loss(
    eps: Tensor, eps_ref: Tensor, noise: Tensor, beta: float = 2500.0, sdpo_mu: float = 0.9
) -> tuple[Tensor, dict[str, Tensor]]:
    """eps, eps_ref, noise (2B, C, H, W), winners first -> the scalar loss and logged scalars.

    The value is `diffusion_dpo_loss`'s; in its gradient that of mse_l is multiplied by `loser_scale`, lam, one number
    for the batch of all processes (the official code has one a process); with --grad-accum each part has its own. Its
    mu is 0.9, its beta 5000, 2500 here.

    The promise, that to first order the winners' error does not rise, is about outputs that move together, as
    `loser_scale` says, and about pairs that weigh the same (all do before the first step). The network may differ.
    """
    mse, mse_ref = squared_error(eps, noise), squared_error(eps_ref.detach(), noise)
    mse_w, mse_l = mse.chunk(2)
    lam = loser_scale(eps, noise, sdpo_mu)
    scaled = mse_l.detach() + lam * (mse_l - mse_l.detach())   # mse_l to the last bit, with lam times its gradient
    loss = dpo_from_errors(torch.cat([mse_w, scaled]), mse_ref, beta)
    return loss, {"sdpo": loss.detach(), "lam": lam, **pair_logs(mse, mse_ref)}
