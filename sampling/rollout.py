"""Rollouts: sampling as a sequence of random decisions, whose probabilities policy gradients raise or lower.

The sampler is DDIM at eta 1, as in DDPO, DPOK, D3PO and SPO: every step is a draw from a normal distribution,

    x_{t_prev} ~ N(mean(eps, x_t), sigma_t^2),

whose mean follows the policy's eps and whose sigma is the schedule's alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import UserError

from .ddim import ddim_step
from .onto import onto
from .schedule import T, at, timesteps


@dataclass(frozen=True)
class Rollout:
    """T steps of B pictures. Step i goes from latents[i] at timesteps[i] to latents[i + 1] at timesteps_prev[i]."""

    latents: Tensor                    # (T + 1, B, C, H, W) float32; the first is noise, the last the picture's
    timesteps: Tensor                  # (T,), falling
    timesteps_prev: Tensor             # (T,), at least 0
    log_probs: Tensor                  # (T, B) float32, of the policy that drew them


def rollout_timesteps(steps: int, scheduler: dict) -> list[tuple[int, int]]:
    """The pairs (t, t_prev) of `sample_ddim`, t_prev at least 0. UserError where a step would have no noise: sigma is
    0 there, and a log-probability infinite."""
    ts = timesteps(steps, scheduler)
    pairs = [(t, t - T // len(ts)) for t in ts]
    if pairs[-1][1] < 0 and scheduler.get("set_alpha_to_one", True):
        raise UserError(
            "scheduler_config.json: with set_alpha_to_one (on where it is missing) the last step adds no noise, so it "
            "has no log-probability; set it to false, as in SD1.5")
    if ts[-1] == 0:
        raise UserError(
            f"scheduler_config.json: the last of {steps} steps, at t = 0, adds no noise, so it has no log-probability; "
            "take steps_offset 1 and timestep_spacing leading, as in SD1.5, and at most 999 steps")
    return [(t, max(t_prev, 0)) for t, t_prev in pairs]


def step_distribution(
    eps: Tensor, x_t: Tensor, t: int | Tensor, t_prev: int | Tensor, alphas_cumprod: Tensor
) -> tuple[Tensor, Tensor]:
    """Of a step x_t -> x_{t_prev}: its mean (B, C, H, W) and sigma, a scalar or (B, 1, 1, 1), float32 at least.

    eps, x_t (B, C, H, W); t and t_prev ints or (B,), of `rollout_timesteps`. Mean and variance are also those of DDPM
    (`ddpm_step`) for the same two steps. Gradients flow through eps only.
    """
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    a_t, a_prev = at(alphas_cumprod, t), at(alphas_cumprod, t_prev)
    sigma = ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5               # DDIM, Eq. 16, at eta 1
    mean = ddim_step(eps.to(dtype), x_t.detach().to(dtype), t, t_prev, alphas_cumprod, eta=1.0)
    return mean, sigma


def step_log_prob(
    eps: Tensor, x_t: Tensor, x_prev: Tensor, t: int | Tensor, t_prev: int | Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """How likely eps makes the step x_t -> x_prev that was drawn: (B,), the mean over C, H, W of

        log N(x_prev; mean, sigma^2) = -(x_prev - mean)^2 / (2 sigma^2) - log sigma - log(2 pi) / 2

    Arguments as in `step_distribution`; x_prev (B, C, H, W) is a constant. The mean and not the sum, as in every
    official code: ratios of sums over 16,384 elements overflow.
    """
    mean, sigma = step_distribution(eps, x_t, t, t_prev, alphas_cumprod)
    z = (x_prev.detach() - mean) / sigma
    return (-z**2 / 2 - sigma.log() - math.log(2 * math.pi) / 2).flatten(1).mean(1)


def eps_gain(t: Tensor, t_prev: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """How many sigmas the mean of a step moves for a change of 1 in eps: (B,), for t and t_prev (B,).

    The Gaussian KL divergence of two policies' steps is gain^2 / 2 * (eps - eps_ref)^2 for each element.
    """
    one = torch.ones((len(t), 1, 1, 1), device=t.device)
    mean, sigma = step_distribution(one, torch.zeros_like(one), t, t_prev, alphas_cumprod)       # linear in eps
    return (mean.abs() / sigma).flatten()


@torch.no_grad()
def rollout(
    eps_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, alphas_cumprod: Tensor, steps: int, scheduler: dict,
    generators: list[torch.Generator],
) -> Rollout:
    """x (B, C, H, W), pure noise -> its rollout; eps_fn(x, t (B,)) -> eps, and a CPU generator a picture.

    Training predicts eps anew for each step and takes its `step_log_prob`; a graph of the whole rollout would not fit.
    Before the first update that is log_probs[i] bit for bit, if precision and batch are the same. They should be: clips
    of 1e-4 leave no room for rounding in half precision, so latents stay in float32. UserError as `rollout_timesteps`.
    """
    pairs = rollout_timesteps(steps, scheduler)
    alphas_cumprod = alphas_cumprod.to(x.device)
    x = x.float()
    latents, log_probs = [x], []
    for pair in pairs:
        t, t_prev = (torch.full((len(x),), step, device=x.device) for step in pair)
        eps = eps_fn(x, t)
        mean, sigma = step_distribution(eps, x, t, t_prev, alphas_cumprod)
        noise = torch.cat([torch.randn((1, *x.shape[1:]), generator=g) for g in generators])
        x_prev = mean + sigma * onto(x.device, noise, x.dtype)
        log_probs.append(step_log_prob(eps, x, x_prev, t, t_prev, alphas_cumprod))
        latents.append(x_prev)
        x = x_prev
    ts, ts_prev = torch.tensor(pairs, device=x.device).T
    return Rollout(torch.stack(latents), ts, ts_prev, torch.stack(log_probs))
