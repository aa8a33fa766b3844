"""A sample of benchmarks/faults.py, with fixed seeds: runs that are killed, stopped, out of disk and spoiled end as
those that were not. It protects what no test of a single program holds: that this is so at any moment."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def campaign(*options: str, before: str = "pass") -> subprocess.CompletedProcess:
    """In a process of its own: it forks, and nothing else may have begun threads."""
    code = f"from benchmarks import faults; {before}; faults.main()"
    return subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_sample_of_disturbances():
    done = campaign("--jobs", "reselect,from-images", "--count", "4", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()[-2:]] == ["0"] * 2


def test_a_difference_is_told_with_its_seed():
    done = campaign("--jobs", "reselect", "--faults", "kill", "--count", "1", "--seed", "7",
                    before="faults.contents = lambda out, n=faults.count(): {'a': next(n)}")
    assert done.returncode == 1 and "reselect, seed 7: " in done.stdout and "different: a" in done.stdout
