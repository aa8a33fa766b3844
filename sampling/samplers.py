"""The table of samplers. A new one is a function in a file of its own, and a line here; every program then has it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .ddim import sample_ddim
from .ddpm import sample_ddpm
from .dpm_solver import sample_dpm_solver


@dataclass(frozen=True)
class Sampler:
    sample: Callable[..., Tensor]      # (eps_fn, x, alphas_cumprod, steps, scheduler, after_step=None) -> x0
    label: str                         # as A1111 writes it into pictures
    stochastic: bool = False           # draws noise at every step: takes `generators` as well; no LAN, no previews


SAMPLERS = {
    "dpm++": Sampler(sample_dpm_solver, "DPM++ 2M"),
    "ddim": Sampler(sample_ddim, "DDIM"),
    "ddpm": Sampler(sample_ddpm, "DDPM", stochastic=True),
}
