"""Long runs and large sets: does memory stay flat, are files closed, and how long does a large dataset take to open?

    python benchmarks/large.py [--prompts 100000] [--steps 2000] [--drawn 500]

A dataset of so many prompts, of random latents of the paper people's size, in shards of 64, is written to the temporary
directory (1.4 GB). train.py opens it, trains, and goes on with the run; build_dataset.py draws `--drawn` pools of two.
Twice a second the process says what it has: its own memory (mapped pages of files can be dropped, and do not count) and
its open files. Flat is what the last quarter of the time has no more of than the second. The first run of train.py
reads every shard for its digest, the next ones take it from a cache, unless files have changed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.results.page import markdown  # noqa: E402
from dataset.folder import FORMAT  # noqa: E402
from dataset.rows import SHARD, shard_files  # noqa: E402
from model.checkpoint import load_pipeline  # noqa: E402
from model.files import digest  # noqa: E402


def write_dataset(folder: Path, prompts: int) -> None:
    pipeline, g, files = load_pipeline(), torch.Generator().manual_seed(0), {}
    height, width = (side // pipeline.vae.downscale for side in pipeline.native_size)
    shapes = {"latents_w": (4, height, width), "latents_l": (4, height, width), "context": (77, pipeline.context_width)}
    for shard in range(-(-prompts // SHARD)):
        numbers = range(shard * SHARD, min(prompts, (shard + 1) * SHARD))
        pairs, tensors, _ = shard_files(folder, shard)
        save_file({name: torch.randn(len(numbers), *shape, generator=g).half() for name, shape in shapes.items()},
                  tensors)
        pairs.write_text("".join(json.dumps({"id": f"{n:06d}", "prompt": f"a man, {n}"}) + "\n" for n in numbers))
        files |= {path.name: digest(path) for path in (pairs, tensors)}
    (folder / "dataset.json").write_text(json.dumps({
        "format": FORMAT, "finished": True, "model": "paper-people", "context_width": pipeline.context_width,
        "scaling_factor": pipeline.vae.scaling_factor, "latent": [4, height, width], "files": files,
        "shards": [name for name in files if name.endswith(".safetensors")]}))


def watched(name: str, command: list[str], begins: str) -> list[str]:
    """A line of the table. `begins` is in the first line that the program prints once all is open."""
    start, opened, seen = time.perf_counter(), None, []
    process = subprocess.Popen([sys.executable, "-u", *command], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if begins in line:
            opened = time.perf_counter() - start
            break
    while process.poll() is None:
        time.sleep(0.5)
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            seen.append((int(status["RssAnon"].split()[0]) / 1024,
                         len(list(Path(f"/proc/{process.pid}/fd").iterdir()))))
        except (OSError, KeyError):            # it has just ended
            break
    if process.wait() or opened is None:
        sys.exit(f"{name}: ended with {process.returncode}")
    quarter = max(1, len(seen) // 4)
    second, last = seen[quarter:2 * quarter] or seen, seen[-quarter:]
    memory, files = ([statistics.median(one[i] for one in part) for part in (second, last)] for i in (0, 1))
    return [name, f"{opened:.1f} s", f"{time.perf_counter() - start:.0f} s", "{:.0f} to {:.0f} MiB".format(*memory),
            "{:.0f} to {:.0f}".format(*files)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--drawn", type=int, default=500)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, run, pool = (Path(folder, name) for name in ("data", "run", "pool"))
        data.mkdir()
        write_dataset(data, args.prompts)
        train = ["train.py", "--data", str(data), "--out", str(run), "--batch-size", "2", "--lr", "1e-4"]
        lines = [watched(f"train.py, {args.prompts:,} prompts, {args.steps} steps",
                         [*train, "--steps", str(args.steps)], "parameters of"),
                 watched("going on, 10 more steps", [*train, "--steps", str(args.steps + 10)], "parameters of"),
                 watched(f"build_dataset.py, {args.drawn} prompts", [
                     "build_dataset.py", "--limit", str(args.drawn), "--pool-size", "2", "--steps", "2", "--out",
                     str(pool)], "rows to")]
    print(markdown(["", "opened after", "ended after", "memory, second to last quarter", "open files"], lines), end="")


if __name__ == "__main__":
    main()
