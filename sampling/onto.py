"""From the CPU, where random numbers and data come from, to the device."""

import torch
from torch import Tensor


def onto(device: torch.device | str, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x there, in its own dtype or `dtype`. CUDA is not waited for: a plain `.to` ends when all that was launched
    before it has ended. On MPS the copy would read memory that may be free by then."""
    return x.to(device, dtype or x.dtype, non_blocking=torch.device(device).type != "mps")
