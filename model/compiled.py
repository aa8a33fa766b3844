"""The U-Net through torch.compile."""

from torch import nn


def compile_unet(unet: nn.Module) -> None:
    """In place; each size is compiled when it comes, and a few do. On a CPU the number of threads is left to the run: a
    kernel that was compiled for two and comes from the cache to a process with one would write past its memory."""
    unet.compile(dynamic=False, options={"cpp.dynamic_threads": True})
