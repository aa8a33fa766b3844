"""DDPM (arXiv 2006.11239): the ancestral sampler, and the step whose means statistic matching compares (Eq. 8)."""

from collections.abc import Callable

import torch
from torch import Tensor

from .onto import onto
from .schedule import at, timesteps, x0_from_eps


def ddpm_step(
    eps: Tensor, x_t: Tensor, t: int | Tensor, t_prev: int | Tensor, alphas_cumprod: Tensor, noise: Tensor | None = None
) -> Tensor:
    """One step x_t -> x_{t_prev}, a draw from q(x_{t_prev} | x_t, x0) with x0 as eps implies it (DDPM, Eq. 7).

    eps, x_t, noise (B, C, H, W); t and t_prev ints, or (B,) for a step of its own in every row; t_prev < 0 is the
    clean picture. Without noise: the mean. At t = 0 no noise is added.
    """
    a_t, a_prev = at(alphas_cumprod, t), at(alphas_cumprod, t_prev)
    alpha = a_t / a_prev                                       # of this step alone
    x0 = x0_from_eps(eps, x_t, t, alphas_cumprod)
    mean = (a_prev**0.5 * (1 - alpha)) / (1 - a_t) * x0 + alpha**0.5 * (1 - a_prev) / (1 - a_t) * x_t
    if noise is None:
        return mean
    variance = ((1 - a_prev) / (1 - a_t) * (1 - alpha)).clamp(min=1e-20)
    noisy = t > 0 if isinstance(t, int) else (t > 0)[:, None, None, None]
    return mean + variance**0.5 * noise * noisy


def sample_ddpm(
    eps_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, alphas_cumprod: Tensor, steps: int, scheduler: dict,
    generators: list[torch.Generator], after_step: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """x (B, C, H, W), pure noise -> x0; arguments as in `sample_dpm_solver`, and a CPU generator a picture, so that a
    picture does not depend on its batch."""
    ts = timesteps(steps, scheduler)
    for t, t_prev in zip(ts, [*ts[1:], -1], strict=True):
        eps = eps_fn(x, torch.full((len(x),), t, device=x.device)).to(x.dtype)
        noise = torch.cat([torch.randn((1, *x.shape[1:]), generator=g) for g in generators])
        x = ddpm_step(eps, x, t, t_prev, alphas_cumprod, onto(x.device, noise, x.dtype))
        x = after_step(x) if after_step else x
    return x
