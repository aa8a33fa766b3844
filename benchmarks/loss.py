"""HG-DPO's loss, forward and backward, beside the time that its bytes take at the memory's measured speed.

    python benchmarks/loss.py [--device cuda] [--rounds 50]

The least that can be moved: both passes read eps and noise, one eps_ref, and one writes the gradient. On CUDA the
passes are Triton's kernels (losses/hg_dpo_triton.py), elsewhere plain torch. Of a few pairs the launches are the time.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.results.page import markdown  # noqa: E402
from benchmarks.shared import machine, timed  # noqa: E402
from losses import hg_dpo_loss  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    device = torch.device(args.device)
    block = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    copied = statistics.median([timed(device, block.clone) for _ in range(8)][1:])
    speed = 2 * block.numel() / copied                                           # bytes a second, read and written
    alphas_cumprod, lines = torch.linspace(0.999, 0.005, 1000, device=device), []
    print(f"bfloat16, latents of 128x88, {machine(device)}; memory copies at {speed / 1e9:.0f} GB/s\n")
    for pairs in (1, 16, 1024) if device.type == "cuda" else (1, 16):
        eps, eps_ref, noise = (torch.randn(2 * pairs, 4, 128, 88, device=device).bfloat16() for _ in range(3))
        t = torch.randint(0, 1000, (pairs,), device=device)

        def run(eps, eps_ref, noise, t) -> None:
            loss, _ = hg_dpo_loss(eps, eps_ref, noise, timesteps=t, alphas_cumprod=alphas_cumprod)
            loss.backward()

        seconds = statistics.median(
            [timed(device, run, eps.detach().requires_grad_(), eps_ref, noise, t) for _ in range(args.rounds + 1)][1:])
        floor = 6 * eps.numel() * eps.element_size() / speed
        lines.append([str(pairs), f"{1e6 * seconds:.0f}", f"{1e6 * floor:.0f}", f"{seconds / floor:.1f}"])
    print(markdown(["pairs", "microseconds", "the bytes alone", "ratio"], lines), end="")


if __name__ == "__main__":
    main()
