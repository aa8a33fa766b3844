"""What the processes of torchrun know together."""

import torch.distributed as dist
from torch import Tensor


def mean_of_processes(values: Tensor) -> Tensor:
    """The mean over all processes, of any shape; no gradient goes through it. Where there is one it is `values`."""
    values = values.detach()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values := values.clone())
        values = values / dist.get_world_size()
    return values
