"""Sampling as functions: a schedule is a tensor, a sampler is a function of an `eps_fn`, guidance is a closure."""

from .ddim import ddim_step, sample_ddim
from .ddpm import ddpm_step, sample_ddpm
from .dpm_solver import dpm_solver_schedule, dpm_solver_step, sample_dpm_solver
from .guidance import guided_eps
from .lan import sample_lan
from .prompt import encode_prompts, same_length
from .schedule import add_noise, eps_from_v, make_alphas_cumprod, timesteps, x0_from_eps
from .seeds import seeded

__all__ = [
    "add_noise", "ddim_step", "ddpm_step", "dpm_solver_schedule", "dpm_solver_step", "encode_prompts", "eps_from_v",
    "guided_eps", "make_alphas_cumprod", "same_length", "sample_ddim", "sample_ddpm", "sample_dpm_solver", "sample_lan",
    "seeded", "timesteps", "x0_from_eps",
]
