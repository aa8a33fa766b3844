"""Sampling as functions: a schedule is a tensor, a sampler is a function of an `eps_fn`, guidance is a closure. And
drawing: a `Drawing` says how, `draw_pictures` does it."""

from .best_of import draw_best
from .ddim import ddim_step, sample_ddim
from .ddpm import ddpm_step, sample_ddpm
from .dpm_solver import dpm_solver_schedule, dpm_solver_step, sample_dpm_solver
from .drawing import Drawing, decode, draw_pictures, picture_settings, sample_latents, to_images, to_picture
from .excite import draw_excited, split_words
from .guidance import guided_eps
from .lan import sample_lan
from .noise import draw_optimised
from .onto import onto
from .people import draw_people
from .prompt import encode_prompts
from .rollout import Rollout, eps_gain, rollout, rollout_timesteps, step_distribution, step_log_prob
from .samplers import SAMPLERS
from .schedule import add_noise, eps_from_v, make_alphas_cumprod, timesteps, x0_from_eps
from .seeds import seeded
from .suffixes import draw_with_suffixes

__all__ = [
    "SAMPLERS", "Drawing", "Rollout", "add_noise", "ddim_step", "ddpm_step", "decode", "dpm_solver_schedule",
    "dpm_solver_step", "draw_best", "draw_excited", "draw_optimised", "draw_people", "draw_pictures",
    "draw_with_suffixes", "encode_prompts", "eps_from_v", "eps_gain", "guided_eps", "make_alphas_cumprod", "onto",
    "picture_settings", "rollout", "rollout_timesteps", "sample_ddim", "sample_ddpm", "sample_dpm_solver", "sample_lan",
    "sample_latents", "seeded", "split_words", "step_distribution", "step_log_prob", "timesteps", "to_images",
    "to_picture", "x0_from_eps",
]
