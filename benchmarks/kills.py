"""Is a run that was killed the run that was not? Ten kills -9 at random moments, of a dataset and of a training.

    python benchmarks/kills.py [--kills 10] [--longest 2.0] [--seed 0]

Each program runs once undisturbed, and once killed ten times, each time started again with the same command. Compared
are all files, byte by byte; of log.jsonl all but the seconds, and of the training's state what is in it.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
DATASET = ["build_dataset.py", "--limit", "40", "--pool-size", "4", "--steps", "4", "--keep", "pool"]
TRAINING = ["train.py", "--steps", "60", "--save-every", "3", "--lr", "1e-3"]


def plain(x):
    """Tensors as bytes, so that == compares them."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return (x.dtype, x.shape, x.numpy().tobytes()) if isinstance(x, torch.Tensor) else x


def contents(folder: Path) -> dict[str, object]:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(".lock"):
            files[str(path.relative_to(folder))] = path.read_bytes()
    if "checkpoint/state.pt" in files:             # what is in it: pickle writes equal things in more than one way
        state = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)
        files["checkpoint/state.pt"] = plain(state)
    if "log.jsonl" in files:
        files["log.jsonl"] = [json.loads(line) | {"seconds": 0} for line in files["log.jsonl"].splitlines()]
    return files


def written(folder: Path) -> int:
    """When something was last added."""
    paths = (folder, folder / "partial", folder / "log.jsonl")
    return max((path.stat().st_mtime_ns for path in paths if path.exists()), default=0)


def run(command: list[str], folder: Path, waits: list[float]) -> dict[str, object]:
    """Kills it once for each of `waits`, so many seconds after it has begun to write; then lets it end."""
    command = [sys.executable, *command, "--out", str(folder)]
    for wait in waits:
        before = written(folder)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and written(folder) == before:
            time.sleep(0.02)
        time.sleep(wait)
        if process.poll() is not None:
            sys.exit("it ended before it was killed; shorten --longest")
        process.kill()
        process.wait()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return contents(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--longest", type=float, default=2.0, help="seconds of work between two kills, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"
        for name, command in (("dataset", DATASET), ("training", [*TRAINING, "--data", str(straight / "dataset")])):
            expected = run(command, straight / name, [])
            found = run(command, killed / name, [rng.uniform(0, args.longest) for _ in range(args.kills)])
            different = [path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)]
            print(f"{name}: {len(expected)} files, {args.kills} kills, {len(different)} different {different}")
            if different:
                sys.exit(1)


if __name__ == "__main__":
    main()
