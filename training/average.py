"""The moving average of the weights (EMA): smoother than the last step's, and further from over-training."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_average(average: list[Tensor], parameters: list[nn.Parameter], decay: float, step: int) -> None:
    """average <- decay * average + (1 - decay) * parameters, in place. While few steps are done the decay is less, or
    the average would long be the start."""
    decay = min(decay, (1 + step) / (10 + step))
    for mean, parameter in zip(average, parameters):
        mean.lerp_(parameter, 1 - decay)


@contextlib.contextmanager
def averaged(parameters: list[nn.Parameter], average: list[Tensor]) -> Iterator[None]:
    """Within the block the parameters are their average, where there is one."""
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, mean in zip(parameters, average):
            parameter.data = mean
        yield
    finally:
        for parameter, data in zip(parameters, own):
            parameter.data = data
