"""What all programs share: how they end, whatever happens, and which values an option takes."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cli
from model.errors import UserError

ROOT = Path(__file__).parent.parent
PROGRAMS = (
    "build_dataset.py", "train.py", "train_online.py", "train_scorer.py", "train_concept.py", "generate.py",
    "evaluate.py", "score.py", "study.py", "rounds.py")


@pytest.mark.parametrize("kind, taken, refused", [
    (cli.whole(1, 10), {"1": 1, "10": 10, " 7 ": 7}, ["0", "11", "1.0", "", "x", "1e1", "nan", "9" * 40, "\u0661"]),
    (cli.real(0), {"0": 0.0, "1e3": 1000.0}, ["-1", "nan", "inf", "-inf", "", "1,5"]),
    (cli.real(above=0, most=2), {"2": 2.0}, ["0", "2.1", "auto"]), (cli.real(0, auto=True), {"auto": "auto"}, ["-1"]),
    (cli.pixels, {"8": 8, "704": 704}, ["0", "-8", "12", "8.0"]),
    (cli.device_name, {"cuda:1": "cuda:1", "auto": "auto"}, ["meta", "abacus", "cuda:", "cuda:x", ""]),
    (cli.shard_name, {"0/1": "0/1", "3/4": "3/4"}, ["", "1/1", "a", "1/0", "-1/2", "0/2/3"])],
    ids=("whole", "real", "real-most", "real-auto", "pixels", "device", "shard"))
def test_kinds_of_values(kind, taken, refused):
    for text, value in taken.items():
        assert kind(text) == value
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match="must "):
            kind(text)


@pytest.mark.parametrize("environment, words", [
    ({"WORLD_SIZE": "2"}, "RANK=''"), ({"RANK": "0"}, "WORLD_SIZE=''"), ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2")], ids=str)
def test_half_of_torchruns_environment_is_one_line(environment, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        cli.parse_shard(None)
    assert cli.parse_shard("1/3") == (1, 3)


def ended(main: str, *, shell: str = "", **options) -> subprocess.CompletedProcess:
    """`main` as the body of a program, in a process of its own; `shell` are redirections."""
    body = "".join(f"    {line}\n" for line in main.split("\n"))
    code = f"import cli, sys, os\ndef main():\n{body}cli.run(main)"
    return subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "$0" {shell}', code], cwd=ROOT, capture_output=True, text=True, **options)


@pytest.mark.parametrize("main, shell, code, words", [
    ("raise cli.UserError('one\\nline')", "", 2, "-c: one line\n"),
    ("raise KeyboardInterrupt", "", 130, "-c: stopped; what was finished is saved\n"),
    ("try: os.kill(os.getpid(), 2); sum(range(10**9))\nexcept BaseException: raise ValueError('of a library')", "", 130,
     "-c: stopped; what was finished is saved\n"),
    ("raise MemoryError", "", 2, "-c: out of memory (host); a smaller --batch-size"),
    ("import torch; torch.empty(10**16)", "", 2, "-c: out of memory ("),
    ("open('/nowhere/at/all', 'w')", "", 2, "-c: /nowhere/at/all: No such file or directory\n"),
    ("raise RuntimeError('[pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typically')", "", 2,
     "-c: another process of this run has ended; what was finished is saved\n"),
    ("print(os.fsdecode(b'caf\\xe9')); raise cli.UserError(os.fsdecode(b'caf\\xe9'))", "", 2, "-c: caf\\udce9\n"),
    ("print('x' * 10**6)\nprint('y')", "| head -c 1; true", 0, "nobody reads the output any more"),
    ("for i in cli.progress(range(3), 3, 'x'): print(i)", "2>&-", 0, ""),
    ("for i in cli.progress(range(3), 3, 'x'): pass\nraise cli.UserError('a')", "2>&-", 2, ""),
    ("import warnings; warnings.warn('a\\x1b[2J\\nb')", "", 0, "warning: a [2J b\n"),
    ("print(1)", ">&-", 0, "")])
def test_a_program_ends_in_one_line_whatever_happens(main, shell, code, words):
    done = ended(main, shell=shell)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith(words) or words in done.stderr
    assert done.stderr.count("\n") <= 1


def test_a_bar_that_nobody_reads_stops_no_work(tmp_path):
    done = ended("import time\nfor i in cli.progress(range(50), 50, 'x'): time.sleep(0.01)\nopen(sys.argv[-1], 'w')",
                 shell=f"{tmp_path / 'done'} 2>&1 >/dev/null | head -n 1")
    assert done.stdout.startswith("x ") and (tmp_path / "done").exists()


def test_bugs_keep_their_traceback():
    done = ended("raise RuntimeError('a bug')")
    assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_while_it_starts_is_one_line(program):
    """Most of a second goes by before main: importing torch."""
    process = subprocess.Popen(
        [sys.executable, program, "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode in (130, 0) and "Traceback" not in stderr


def test_every_program_imports_cli_first():
    """So that the above holds at any moment, not at the one that was tried."""
    for name in PROGRAMS:
        lines = (ROOT / name).read_text().split('"""')[2].split("\n")
        assert [line for line in lines if line][:2] == ["import cli", "# isort: split"], name


def test_rank_0_alone_prints():
    for rank, said in (("0", "hello\n"), ("1", "")):
        done = ended("print('hello')\nfor _ in cli.progress([1], 1, 'x'): pass\n"
                     "with cli.print_from_any_rank(): print('table')",
                     env={**os.environ, "RANK": rank, "WORLD_SIZE": "2"})
        assert done.stdout == f"{said}table\n" and ("x 1/1" in done.stderr) == bool(said)
