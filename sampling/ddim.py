"""DDIM (arXiv 2010.02502): deterministic at eta 0, as random as DDPM at eta 1."""

from collections.abc import Callable

import torch
from torch import Tensor

from .schedule import T, at, timesteps, x0_from_eps


def ddim_step(
    eps: Tensor, x_t: Tensor, t: int | Tensor, t_prev: int | Tensor, alphas_cumprod: Tensor, eta: float = 0.0,
    noise: Tensor | None = None, set_alpha_to_one: bool = False,
) -> Tensor:
    """One step x_t -> x_{t_prev} (DDIM, Eq. 12). eps, x_t, noise (B, C, H, W); t and t_prev ints or (B,).

    SD1.5 ends on alphas_cumprod[0], not on 1 (`set_alpha_to_one` false), so its last x keeps a trace of noise.
    """
    if not set_alpha_to_one:
        t_prev = max(t_prev, 0) if isinstance(t_prev, int) else t_prev.clamp(min=0)
    a_t, a_prev = at(alphas_cumprod, t), at(alphas_cumprod, t_prev)
    x0 = x0_from_eps(eps, x_t, t, alphas_cumprod)
    sigma = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5
    x_prev = a_prev**0.5 * x0 + (1 - a_prev - sigma**2) ** 0.5 * eps
    return x_prev if noise is None else x_prev + sigma * noise


def sample_ddim(
    eps_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, alphas_cumprod: Tensor, steps: int, scheduler: dict,
    after_step: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """x (B, C, H, W), pure noise -> x0, at eta 0; arguments as in `sample_dpm_solver`."""
    ts = timesteps(steps, scheduler)
    to_one = scheduler.get("set_alpha_to_one", True)
    stride = T // len(ts)                # diffusers goes back by the stride, not to the list's next entry; so do we
    for t in ts:
        eps = eps_fn(x, torch.full((len(x),), t, device=x.device)).to(x.dtype)
        x = ddim_step(eps, x, t, t - stride, alphas_cumprod, set_alpha_to_one=to_one)
        x = after_step(x) if after_step else x
    return x
