"""Losses: pure functions of predictions that return a scalar (and what is worth logging); none ever sees a model."""

from .diffusion_dpo import diffusion_dpo_loss
from .hg_dpo import hg_dpo_loss
from .statistic_matching import lambda_for, statistic_matching_loss
from .table import LOSSES

__all__ = ["LOSSES", "diffusion_dpo_loss", "hg_dpo_loss", "lambda_for", "statistic_matching_loss"]
