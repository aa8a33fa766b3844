"""The first thing to run where a GPU is at hand: is what was written without one right on it, and how fast is it?

    make bench-gpu                 # or: python benchmarks/gpu.py [--minutes 10] [--device cuda] [--out gpu.md]

Commands, the important ones first, and what each says, in one Markdown file. One that fails stops no other; for what is
left when the minutes are over there was no time, and the file says so.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.shared import machine  # noqa: E402
from model.files import write_text  # noqa: E402

TRAIN = "train.py --data DIR/data --device DEVICE --dtype bfloat16 --batch-size 32 --lr 5e-4 --beta 1000 --save-every 2"
DRAW = ("build_dataset.py --model DIR/sd15 --device DEVICE --scorer paper-people --prompts DIR/prompts.txt --pool-size "
        "20 --batch-size 20 --steps 10 --images none")
STEP, SAMPLING = "benchmarks/train_step.py", "benchmarks/sampling_step.py"
HALF = "--device DEVICE --dtype bfloat16"
COMMANDS = (
    "-m benchmarks.parity small --device DEVICE",
    "-m pytest -q tests/test_losses.py -k cuda",                                 # Triton's kernels beside plain torch
    "-m paper_people.pairs --out DIR/data",
    f"{TRAIN} --steps 4 --out DIR/run",                                          # says that step 1 is ln 2
    f"{TRAIN} --steps 2 --out DIR/resumed",
    f"{TRAIN} --steps 4 --out DIR/resumed",
    "benchmarks/gpu.py --difference DIR/run/lora.safetensors DIR/resumed/lora.safetensors",
    f"{STEP} {HALF} --size 512 --pairs 4 --sides ours,peer,ours-compiled,peer-compiled",
    f"{SAMPLING} {HALF} --size 512 --batch-size 8 --sides {{}}".format(
        "ours,peer,ours-compiled,peer-compiled,ours-channels_last,ours-graphs"),
    "benchmarks/loss.py --device DEVICE",
    f"{TRAIN} --compile --steps 2 --out DIR/compiled",                           # one graph with and without the LoRA
    "benchmarks/loading.py --write DIR/sd15",
    f"{DRAW} --out DIR/pool",                                                    # 40 pictures of 512x512 in 10 steps
    f"{DRAW} --compile --out DIR/pool-compiled",
    f"{STEP} {HALF} --size 704x1024 --pairs 4 --sides ours,peer,ours-compiled",
    f"{SAMPLING} {HALF} --size 704x1024 --batch-size 4 --sides ours,peer,ours-compiled",
    f"{STEP} {HALF} --size 512 --pairs 16 --sides ours,peer,ours-compiled",
    f"{STEP} {HALF} --size 512 --pairs 1 --sides ours,peer,ours-compiled",
    "-m benchmarks.parity full --device DEVICE")


def difference(one: str, other: str) -> None:
    """Of a run and the same run with a pause; attention's backward pass on CUDA adds in no fixed order."""
    from safetensors.torch import load_file
    a, b = load_file(one), load_file(other)
    off, size = max((a[name] - b[name]).abs().max().item() for name in a), max(x.abs().max().item() for x in a.values())
    print(f"after 2 steps, a pause and 2 more the LoRA is {off:.1e} from that of 4 steps; its weights go to {size:.1e}")


def said(command: str, minutes: float) -> str:
    """What the command prints, or why it failed."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        text, errors = process.communicate(timeout=60 * minutes)
        if process.returncode:
            text = "**failed**\n\n```\n" + "\n".join((text + errors).splitlines()[-12:]) + "\n```"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)                 # with what it has started
        text = "**no time was left for it to end**"
    return f"{text.strip()}\n\n{time.perf_counter() - start:.0f} s\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="gpu.md")
    parser.add_argument("--difference", nargs=2, metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.difference:
        return difference(*args.difference)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: no CUDA device here; --device cpu tries the commands, slowly")
    end, text = time.perf_counter() + 60 * args.minutes, f"# On {machine(torch.device(args.device))}\n"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "prompts.txt").write_text("a woman in a red coat\na man on a beach\n")
        for command in (one.replace("DEVICE", args.device) for one in COMMANDS):
            print(f"python {command}", flush=True)
            left = (end - time.perf_counter()) / 60
            found = said(command.replace("DIR", folder), left) if left > 0 else "**no time was left**\n"
            text += f"\n`python {command}`\n\n{found.replace(folder, 'DIR')}"
            write_text(Path(args.out), text)
    print(f"{args.out} is written")


if __name__ == "__main__":
    main()
