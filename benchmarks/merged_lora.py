"""Is a LoRA merged into the weights for drawing as good as one apart, and how much faster? On the paper people.

    python benchmarks/merged_lora.py demo/run/lora.safetensors        # what `make demo` trains

What a LoRA does to eps (eps with it less eps without), in each dtype, merged and apart: how far it is from float32's,
and the seconds of a U-Net pass on 8 rows.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from model.checkpoint import load_pipeline  # noqa: E402
from model.lora import load_lora, merge_lora  # noqa: E402
from sampling import encode_prompts  # noqa: E402

PROMPT = "a woman with red hair, blue shirt and white trousers, waving on a beach"


@torch.no_grad()
def eps_of(lora: str, weight: float, dtype: torch.dtype, merged: bool, rounds: int) -> tuple[torch.Tensor, float]:
    """eps of 8 rows, and the median seconds of a pass."""
    pipeline = load_pipeline("paper-people", dtype=dtype)
    if weight:
        load_lora(lora, pipeline.unet, weight)
    if merged:
        merge_lora(pipeline.unet)
    x_t = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    t = torch.tensor([50, 150, 300, 450, 600, 750, 900, 990])
    context = encode_prompts([PROMPT], pipeline.tokenizer, pipeline.text_encoder).expand(8, -1, -1).to(dtype)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        eps = pipeline.unet(x_t, t, context)
        seconds.append(time.perf_counter() - start)
    return eps.float(), statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", help="a LoRA of the paper people")
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    print(f"{args.lora} at weight {args.weight:g}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    exact = None
    for dtype in (torch.float32, torch.bfloat16):
        base, _ = eps_of(args.lora, 0.0, dtype, False, 1)
        for merged in (False, True):
            eps, seconds = eps_of(args.lora, args.weight, dtype, merged, args.rounds)
            effect = eps - base
            exact = effect if exact is None else exact
            print(f"{str(dtype):15} {'merged' if merged else 'apart':7} effect off by "
                  f"{(effect - exact).norm() / exact.norm():8.2e}, {seconds:.4f} s")


if __name__ == "__main__":
    main()
