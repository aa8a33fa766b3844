"""What HG-DPO costs at SD1.5's size: the networks' operations, counted, and from them a GPU's hours. Nothing is run.

    python benchmarks/cost.py [--peak 989] [--float32-peak 67] [--share 0.35] [--cards 8]

Operations are counted on tensors without contents; a multiplication and an addition are two. Hours are what they take
at `--share` of the peaks, in TFLOP/s: bfloat16 for the U-Net, float32 for decoding and scoring. The defaults are an
H200's peaks, and the share that is published for it and its like (34 to 36 % in training SD2, MLPerf Training 5.0; 39 %
in drawing, diffusers' page on torch 2.0, batch 16 on an A100). So the hours are computed, not measured. In gigabytes
are what a dataset keeps of its pairs: latents and text features.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import cli  # noqa: E402
from benchmarks.results.page import markdown  # noqa: E402
from losses import hg_dpo_loss  # noqa: E402
from model.clip import CLIP  # noqa: E402
from model.lora import inject_lora  # noqa: E402
from model.scorers import VIT_H  # noqa: E402
from model.unet import UNet  # noqa: E402
from model.vae import VAE  # noqa: E402
from train import predictions  # noqa: E402

TOKENS, WIDTH = 77, 768                        # of the text features
STEPS = 50
PROMPTS, PAIRS = 100_000, 1000 * 4             # the paper's; train.py's default steps and batch
# Height and width, pictures a prompt, and rows of the U-Net a prompt, guidance doubling them.
POOLS = {
    "512x512, 20 pictures": (512, 512, 20, 20 * STEPS * 2),
    "704x1024, 20 pictures": (1024, 704, 20, 20 * STEPS * 2),
    "704x1024, 20 previews of 10 steps, 4 ends": (1024, 704, 24, (20 * 10 + 4 * STEPS) * 2),
    "704x1024, 5 pictures": (1024, 704, 5, 5 * STEPS * 2)}


def tflop(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def count(height: int, width: int) -> dict[str, float]:
    """TFLOP, at this size in pixels, of a row of the U-Net, of decoding and scoring a picture, and of training on a
    pair: policy, reference, loss and backward pass of HG-DPO with LoRA."""
    with torch.device("meta"):
        unet, vae, scorer = UNet().requires_grad_(False), VAE(), CLIP(**VIT_H)
        x = torch.empty(2, 4, height // 8, width // 8)
        context, pixels = torch.empty(2, TOKENS, WIDTH), torch.empty(1, 3, 224, 224)
        t, alphas_cumprod = torch.empty(2, dtype=torch.long), torch.empty(1000)
    with torch.no_grad():
        found = {
            "row": tflop(lambda: unet(x[:1], t[:1], context[:1])),
            "picture": tflop(lambda: vae.decode(x[:1])) + tflop(lambda: scorer.embed_images(pixels))}
    inject_lora(unet)

    def train() -> None:
        loss, _ = hg_dpo_loss(**predictions(unet, x, t, context, reference=True), noise=x[:1], timesteps=t[:1],
                              alphas_cumprod=alphas_cumprod)
        loss.backward()
    return found | {"pair": tflop(train)}


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--peak", type=cli.real(above=0), default=989.0, help="TFLOP/s of a card in bfloat16")
    parser.add_argument("--float32-peak", type=cli.real(above=0), default=67.0, help="TFLOP/s in float32")
    parser.add_argument("--share", type=cli.real(above=0), default=0.35, help="of the peaks that is reached")
    parser.add_argument("--cards", type=cli.whole(1), default=8)
    args = parser.parse_args()
    at_size = {size: count(*size) for size in {(height, width) for height, width, *_ in POOLS.values()}}
    lines = []
    for name, (height, width, pictures, rows) in POOLS.items():
        of = at_size[height, width]
        seconds = (rows * of["row"] / args.peak + pictures * of["picture"] / args.float32_peak) / args.share
        pair = of["pair"] / args.peak / args.share
        kept = 2 * (2 * 4 * height * width // 64 + TOKENS * WIDTH)                # bytes, in half precision
        lines.append([
            name, f"{rows:,} x {of['row']:.2f}", f"{rows * of['row'] + pictures * of['picture']:,.0f}",
            f"{seconds * 1000 / 3600:.1f} h", f"{seconds * PROMPTS / 3600 / args.cards:.0f} h",
            f"{1000 * kept / 1e9:.2f} GB", f"{of['pair']:.1f}", f"{pair * PAIRS / 60:.1f} min"])
    print(markdown(
        ["a pool of", "U-Net rows a prompt x TFLOP", "TFLOP a prompt, all", "1,000 prompts",
         f"{PROMPTS:,} on {args.cards} cards", "1,000 pairs", "TFLOP a pair trained", f"{PAIRS:,} pairs trained"],
        lines), end="")


if __name__ == "__main__":
    cli.run(main)
