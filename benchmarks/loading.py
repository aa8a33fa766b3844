"""Seconds and peak memory of loading an SD1.5-size checkpoint (4.1 GB in float32), ours beside diffusers'.

    python benchmarks/loading.py [--dtype bfloat16]

A folder of random weights is written once to the temporary directory; each loader runs in a process of its own. The
peak counts what the process allocates; pages of the file that are merely mapped stand apart, since the system can drop
them at any time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = """
import sys, time, torch
from model.checkpoint import load_pipeline
start = time.perf_counter()
pipeline = load_pipeline(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
"""
PEER = """
import sys, time, torch
from diffusers import StableDiffusionPipeline
start = time.perf_counter()
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=getattr(torch, sys.argv[2]))
"""
ACCOUNT = """
seconds = time.perf_counter() - start
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
kib = {key: int(status[key].split()[0]) for key in ("RssAnon", "RssFile", "VmHWM")}
import json
print(json.dumps({"seconds": seconds, **kib}))
"""


def write_checkpoint(folder: Path) -> None:
    import torch

    from model.checkpoint import Pipeline, save_pipeline
    from model.clip import CLIPTextEncoder
    from model.ldm import SD15
    from model.tokenizer import Tokenizer
    from model.unet import UNet
    from model.vae import VAE
    from sampling import make_alphas_cumprod

    torch.manual_seed(0)
    alphas_cumprod = make_alphas_cumprod(SD15["scheduler"])
    save_pipeline(
        Pipeline(UNet(), VAE(), CLIPTextEncoder(), Tokenizer.clip(), alphas_cumprod, SD15, "random"), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--write", metavar="DIR", help="instead: only write the checkpoint, to try other programs on")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.write:
        return write_checkpoint(Path(args.write))
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        for name, code in (("ours", OURS), ("diffusers", PEER)) * 2:             # the second round with a warm cache
            done = subprocess.run(
                [sys.executable, "-c", code + ACCOUNT, folder, args.dtype], cwd=ROOT, capture_output=True, text=True,
                check=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name:10} {args.dtype}: {figures['seconds']:6.2f} s, allocated {figures['RssAnon'] / 2**20:.2f} GiB, "
                f"mapped {figures['RssFile'] / 2**20:.2f} GiB, peak of both {figures['VmHWM'] / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
