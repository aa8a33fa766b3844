"""One guided sampling step of SD1.5's U-Net (two rows a picture), ours beside diffusers', same random weights.

    python benchmarks/sampling_step.py [--size 512] [--batch-size 1] [--dtype bfloat16] [--device cuda] [--rounds 5]
                                       [--sides ours,peer,ours-compiled,peer-compiled,ours-channels_last,ours-graphs]

All run in this process, in turn; a ratio is the median of the rounds' ratios. The rate counts the U-Net's operations;
its share is of a large matrix product's rate. Pictures a second are of 50 steps, without decoding.
"""

import statistics
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.cost import tflop  # noqa: E402
from benchmarks.results.page import markdown  # noqa: E402
from benchmarks.shared import machine, matrix_rate, options, ratios, timed  # noqa: E402
from model.compiled import compile_unet  # noqa: E402
from model.ldm import SD15  # noqa: E402
from model.unet import UNet  # noqa: E402
from sampling import guided_eps  # noqa: E402

SIDES = ("ours", "peer", "ours-compiled", "peer-compiled", "ours-channels_last", "ours-graphs")


def peer_unet() -> nn.Module:
    return UNet2DConditionModel(**{key: value for key, value in SD15["unet"].items() if key[0] != "_"})


def build(side: str, weights: dict[str, torch.Tensor]) -> nn.Module:
    """With these weights, which all sides share but for the one that lays them out otherwise."""
    with torch.device("meta"):
        unet = peer_unet() if side.startswith("peer") else UNet()
    unet.load_state_dict(weights, assign=True)
    unet.eval()
    if side.endswith("compiled"):
        compile_unet(unet)
    if side.endswith("channels_last"):
        unet.to(memory_format=torch.channels_last)
    return torch.compile(unet, mode="reduce-overhead") if side.endswith("graphs") else unet


@torch.no_grad()
def main() -> None:
    parser = options(__doc__, SIDES)
    parser.add_argument("--batch-size", type=int, default=1, help="pictures")
    args = parser.parse_args()
    device, dtype, guidance = torch.device(args.device), getattr(torch, args.dtype), 5.0
    torch.manual_seed(0)
    weights = peer_unet().to(device, dtype).state_dict()
    n, (height, width) = args.batch_size, args.size
    x, t = torch.randn(n, 4, height // 8, width // 8, device=device, dtype=dtype), torch.full((n,), 500, device=device)
    uncond, cond = torch.randn(2, n, 77, 768, device=device, dtype=dtype)

    def step(side: str, unet: nn.Module) -> torch.Tensor:
        if side.startswith("ours"):
            return guided_eps(unet, cond, uncond, guidance)(x, t)
        without, out = unet(torch.cat([x, x]), t[0], encoder_hidden_states=torch.cat([uncond, cond])).sample.chunk(2)
        return without + guidance * (out - without)

    unets = {side: build(side, weights) for side in args.sides}
    eps = {side: step(side, unet).float() for side, unet in unets.items()}                       # also the warm-up
    seconds = {side: [] for side in unets}
    for _ in range(args.rounds):
        for side, unet in unets.items():
            seconds[side].append(timed(device, step, side, unet))
    with torch.device("meta"):
        row = tflop(lambda: UNet()(torch.empty(1, *x.shape[1:]), torch.empty(1), torch.empty(1, 77, 768)))
    peak, first = matrix_rate(device, dtype), eps[args.sides[0]]
    print(f"{n} x {width}x{height}, {args.dtype}, {machine(device)}; a matrix product does {peak:.2f} TFLOP/s\n")
    lines = []
    for side, ratio in ratios(seconds).items():
        median = statistics.median(seconds[side])
        rate = 2 * n * row / median
        lines.append([side, f"{median:.4f} s", f"{ratio:.3f}", f"{n / median / 50:.3f}", f"{rate:.2f}",
                      f"{100 * rate / peak:.0f} %", f"{(eps[side] - first).abs().max():.1e}"])
    print(markdown(["", f"median of {args.rounds}", "ratio", "pictures/s", "TFLOP/s", "share",
                    f"largest difference from {args.sides[0]}"], lines), end="")


if __name__ == "__main__":
    main()
