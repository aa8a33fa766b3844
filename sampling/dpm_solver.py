"""DPM-Solver++ 2M (arXiv 2211.01095): the paper's sampler, 50 steps; 20 look nearly the same.

It solves the diffusion ODE in the variable lam = log(alpha / sigma) for the predicted x0, to second order with the
help of the previous step's prediction. Here x = alpha * x0 + sigma * eps, alpha^2 + sigma^2 = 1.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .schedule import T


def dpm_solver_schedule(n: int, alphas_cumprod: Tensor, scheduler: dict) -> tuple[list[int], Tensor]:
    """The n steps t and the n + 1 noise levels sigma/alpha, float32, that diffusers' DPMSolverMultistepScheduler
    visits (a few less than n where n nears 1000). Its `timestep_spacing` is 'linspace' where the file has none, as in
    the official SD1.5."""
    spacing = scheduler.get("timestep_spacing", "linspace")
    if spacing == "linspace":
        steps = np.linspace(0, T - 1, n + 1).round()[::-1][:-1]
    elif spacing == "leading":
        steps = (np.arange(n + 1) * max(T // (n + 1), 1))[::-1][:-1] + scheduler.get("steps_offset", 0)
    elif spacing == "trailing":
        steps = np.arange(T, 0, -T / n).round()[:n] - 1        # [:n]: rounding makes 62 of 61, the last t = -1
    else:
        raise ValueError(f"timestep_spacing {spacing!r}: expected 'linspace', 'leading' or 'trailing'")
    # Close to 1000 steps some fall together or outside; diffusers then divides by a step of length 0.
    steps = np.unique(np.clip(steps, 0, T - 1))[::-1]
    table = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().numpy()               # (1000,) rising
    if scheduler.get("use_karras_sigmas"):                                       # arXiv 2206.00364, Eq. 5, rho 7
        ramp = np.linspace(0, 1, n)
        low, high = table[0].item() ** (1 / 7), table[-1].item() ** (1 / 7)
        sigmas = (high + ramp * (low - high)) ** 7
        steps = np.interp(np.log(sigmas), np.log(table), np.arange(T)).round()
    else:
        sigmas = np.interp(steps, np.arange(T), table)
    last = table[0] if scheduler.get("final_sigmas_type") == "sigma_min" else 0.0
    return [int(t) for t in steps], torch.from_numpy(np.append(sigmas, last).astype(np.float32))


def dpm_solver_step(x0: Tensor, x: Tensor, sigmas: Tensor, i: int, x0_prev: Tensor | None = None) -> Tensor:
    """Step i of the schedule, from noise level sigmas[i] to sigmas[i + 1].

    x0 is the prediction at x, x0_prev the one of step i - 1; without it the step is of first order (DDIM's). All
    (B, C, H, W). The coefficients are float32 scalars on the CPU: no device waits for them.
    """
    alpha = 1 / (sigmas**2 + 1) ** 0.5
    sigma = sigmas * alpha
    lam = torch.log(alpha) - torch.log(sigma)                                    # inf at a last sigma of 0
    h = lam[i + 1] - lam[i]
    growth = alpha[i + 1] * (torch.exp(-h) - 1.0)
    x_next = (sigma[i + 1] / sigma[i]).item() * x - growth.item() * x0
    if x0_prev is None:
        return x_next
    r = (lam[i] - lam[i - 1]) / h
    return x_next - (0.5 * growth).item() * ((1.0 / r).item() * (x0 - x0_prev))


def sample_dpm_solver(
    eps_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, alphas_cumprod: Tensor, steps: int, scheduler: dict,
    after_step: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """x (B, C, H, W), pure noise -> x0 in `steps` steps. eps_fn(x, t (B,)) -> eps; `scheduler` is the checkpoint's
    scheduler_config.json; after_step may change x after every step (LAN)."""
    ts, sigmas = dpm_solver_schedule(steps, alphas_cumprod, scheduler)
    euler_at_end = (
        scheduler.get("final_sigmas_type", "zero") == "zero" or scheduler.get("euler_at_final", False)
        or (scheduler.get("lower_order_final", True) and len(ts) < 15))
    x0_prev = None
    for i, t in enumerate(ts):
        eps = eps_fn(x, torch.full((len(x),), t, device=x.device)).to(x.dtype)
        alpha = 1 / (sigmas[i] ** 2 + 1) ** 0.5
        x0 = (x - (sigmas[i] * alpha).item() * eps) / alpha.item()
        x = dpm_solver_step(x0, x, sigmas, i, None if i == len(ts) - 1 and euler_at_end else x0_prev)
        x0_prev = x0
        x = after_step(x) if after_step else x
    return x
