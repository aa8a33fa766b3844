"""What the benchmarks of the U-Net share: options, the machine, its matrix rate, a table."""

import argparse
import platform
import re
import statistics
import time
from collections.abc import Callable

import torch


def size_of(text: str) -> tuple[int, int]:
    """512 or, width x height, 704x1024 -> height and width in pixels."""
    if not (found := re.fullmatch(r"(\d+)(?:x(\d+))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be pixels, such as 512 or 704x1024")
    return int(found[2] or found[1]), int(found[1])


def options(description: str, sides: tuple[str, ...]) -> argparse.ArgumentParser:
    def side_names(text: str) -> list[str]:
        if wrong := set(names := text.split(",")) - set(sides):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(wrong))}: must be of {', '.join(sides)}")
        return names

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=size_of, default="256", help="pixels a side, or width x height")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up")
    parser.add_argument("--sides", type=side_names, default="ours,peer", help=f"of {', '.join(sides)}")
    return parser


def timed(device: torch.device, run: Callable, *arguments) -> float:
    """Seconds, until the device has done it."""
    start = time.perf_counter()
    run(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large product of matrices: what a network cannot pass."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / statistics.median([timed(device, torch.matmul, a, b) for _ in range(8)][1:]) / 1e12


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name} ({platform.machine()}), torch {torch.__version__}"


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Of each side to the peer, or where there is none to the first: the median of the rounds' ratios, so that a
    machine that changes its speed changes it little."""
    to = seconds["peer" if "peer" in seconds else next(iter(seconds))]
    return {side: statistics.median(a / b for a, b in zip(those, to)) for side, those in seconds.items()}
