"""Is a run that was disturbed the run that was not? At random moments of every program, in all of its phases: kills and
Ctrl-C, full disks, folders that refuse writes, second processes, clocks that go back, files that a disk spoils.

    python -m benchmarks.faults --count 50                                 # disturbances of each job, and a table
    python -m benchmarks.faults --jobs train,generate --faults kill,full --count 5
    python -m benchmarks.faults --jobs train --seed 17 --count 1           # trial 17 again, which failed

A trial begins in an empty folder. The same command is started, disturbed, started again and disturbed again, by kinds
and at moments that the trial's seed says, until it ends by itself before the next disturbance comes; then the next
trial begins. In the end all files must be those of the undisturbed run, byte by byte; of log.jsonl all but the seconds
count, of state.pt what is in it. A spoiled file must be made again or named, or its folder, if only by build_dataset.py
--repair; a named one is put back. Nothing may end in a traceback: a full disk is one line and exit code 2.

Programs run as forks of this process, which has imported them all, so that a start takes milliseconds; how a program
ends while it still imports, tests/test_cli.py knows. What a moment hits also depends on how busy the machine is.
"""

import cli

# isort: split
import argparse
import ctypes
import fcntl
import importlib
import json
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from dataset import rows, verify

ROOT = Path(__file__).parent.parent
SMALL = "--steps 2 --height 64 --width 64"
RUN = "--data {data} --lr 1e-3 --batch-size 2 --steps 6 --save-every 2"
EXITS = {"kill": {-9, 0}, "term": {-15, 130, 143, 0}, "int": {130, 0}}         # of rounds.py 128 + 15
NUMBERS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
PROGRESS = re.compile(r".* \d+/\d+  -?\d+ s, -?\d+ s left")
FAULTS = (*NUMBERS, "limited", "full", "refused", "second", "clock", "spoiled")
LONGEST = 300                                  # seconds after which a run hangs


class Fault(Exception):
    """What must not be."""


@dataclass(frozen=True)
class Job:
    """Arguments by which a program passes through all of its phases in a second or two; {x} is one of INPUTS."""

    program: str
    options: str
    out: str = ""                      # the file that --out names, where it is none of a folder
    ranks: int = 1                     # processes, as torchrun starts them
    begin: Callable[[Path, Path], None] | None = None          # inputs, out: what is there before


def damaged_dataset(inputs: Path, out: Path) -> None:
    shutil.copytree(inputs / "data", out)
    spoil(out / "shard-00000.safetensors", random.Random(0))
    (out / "images" / "000003_w.png").unlink()


JOBS = {
    "dataset": Job("build_dataset", f"--limit 5 --pool-size 2 --keep pool {SMALL}"),
    "previews": Job("build_dataset", f"--limit 4 --pool-size 4 --preview-steps 1 --preview-keep 1 {SMALL}"),
    "reselect": Job("build_dataset", "--reselect {data} --pool-size 2"),
    "from-pairs": Job("build_dataset", "--from-pairs {choices}/pairs.jsonl --height 64 --width 64"),
    "from-images": Job("build_dataset", "--from-images {choices} --height 64 --width 64"),
    "repair": Job("build_dataset", f"--limit 5 --pool-size 2 --keep pool {SMALL} --repair", begin=damaged_dataset),
    "train": Job("train", f"{RUN} --ema 0.9 --sample-every 3 --holdout 2"),
    "ranks": Job("train", RUN, ranks=2),
    "grpo": Job("train_online", "--method grpo --limit 2 --steps 4 --save-every 2 --sampler-steps 2 --batch-size 1 "
                "--grad-accum 1 --pictures 2 --sample-every 4 --height 64 --width 64"),
    "draft": Job("train_online", "--method draft --limit 4 --steps 4 --save-every 2 --sampler-steps 2 --batch-size 1 "
                 "--judge judge --height 64 --width 64"),
    "scorer": Job("train_scorer", "--from-pairs {choices}/pairs.jsonl --steps 6 --save-every 2 --batch-size 2 "
                  "--holdout 0.3 --warmup 0 --lr 1e-4"),
    "concept": Job("train_concept", "--images {people}/train --placeholder x --steps 4 --save-every 2 --batch-size 2 "
                   "--ema 0.9 --sample-every 3 --height 64 --width 64"),
    "generate": Job("generate", f"--prompts {ROOT}/paper_people/prompts_test.txt --limit 8 --save-latents {SMALL}"),
    "best-of": Job("generate", f"--prompts {ROOT}/paper_people/prompts_test.txt --limit 4 --best-of 2 {SMALL}"),
    "evaluate": Job("evaluate", "--lora {run}/lora.safetensors --run {run} --limit 4 --num-images 2 " + SMALL),
    "score": Job("score", "--images {drawn} --scorers paper-people", out="scores.jsonl"),
    "rounds": Job("rounds", f'--rounds 2 --data="--limit 3 --pool-size 2 {SMALL}" '
                  '--train="--lr 1e-3 --batch-size 2 --steps 2 --save-every 1"')}
INPUTS = {                             # what jobs read, made once
    "data": JOBS["dataset"], "run": Job("train", RUN), "drawn": JOBS["generate"],
    "people": Job("paper_people.concept_pictures", "--count 6 --people 1")}
PROGRAMS = {name: importlib.import_module(name) for name in {job.program for job in (*JOBS.values(), *INPUTS.values())}}


# Runs

def play(program: str, words: list[str]) -> None:
    """As the command line does, and then this process ends."""
    code = 1
    try:
        sys.argv = [f"{program}.py", *words]
        cli.run(PROGRAMS[program].main)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


class Forked:
    """Stands for subprocess.Popen in rounds.py."""

    def __init__(self, words: list):
        self.pid = os.fork()
        if not self.pid:
            signal.signal(signal.SIGINT, cli._leave)
            play(Path(words[1]).stem, list(map(str, words[2:])))

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


class Run:
    """A program at work, as so many ranks, in forks that each lead a process group; `before` is done in each."""

    def __init__(self, program: str, words: list[str], ranks: int = 1, before: Callable[[], object] = lambda: None):
        self.stderr, writing = os.pipe()
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 20)      # nobody reads it before the end
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = []
        for rank in range(ranks):
            self.pids.append(os.fork())
            if not self.pids[-1]:
                os.setpgid(0, 0)
                os.dup2(writing, 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                signal.signal(signal.SIGINT, cli._leave)       # as when a program has begun to import
                os.chdir(ROOT)
                if ranks > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                rows.SHARD = verify.SHARD = 2
                PROGRAMS["rounds"].subprocess.Popen = Forked
                before()
                play(program, words)
            os.setpgid(self.pids[-1], self.pids[-1])
        os.close(writing)

    @staticmethod
    def works(pid: int) -> bool:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self, expected: set[int]) -> tuple[set[int], str]:
        """Waits for all processes, theirs among them. -> exit codes, and what they said beside the progress. When a
        rank has ended the others have SIGTERM, as from torchrun."""
        said, until, told = b"", time.monotonic() + LONGEST, False
        while True:
            if select.select([self.stderr], [], [], 0.2)[0]:
                if not (more := os.read(self.stderr, 1 << 16)):
                    break
                said += more
            elif time.monotonic() > until or not told and not all(map(self.works, self.pids)):
                for pid in filter(self.works, self.pids):
                    os.killpg(pid, signal.SIGTERM if not told else signal.SIGKILL)
                told = True
        os.close(self.stderr)
        codes = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids}
        lines = [line for line in said.decode(errors="replace").splitlines() if not PROGRESS.fullmatch(line)]
        expected = expected | ({-15, 2, 130} if len(self.pids) > 1 and codes != {0} else set())
        if time.monotonic() > until or "Traceback" in str(lines) or not codes <= expected \
                or 2 in codes and len(lines) > len(self.pids):
            raise Fault(f"ended with {codes}, and said: {' | '.join(lines)}")
        return codes, " ".join(lines)


def words_of(job: Job, inputs: Path, out: Path) -> list[str]:
    options = re.sub(r"\{(\w+)\}", lambda name: str(inputs / name[1]), job.options)
    return [*shlex.split(options), "--out", str(out / job.out)]


# What is compared

def plain(x):
    """Tensors as bytes, so that == compares them."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return (x.dtype, x.shape, x.numpy().tobytes()) if isinstance(x, torch.Tensor) else x


def files_of(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*") if path.is_file() and not path.name.startswith(".lock"))


def contents(out: Path) -> dict[str, object]:
    files = {}
    for path in files_of(out):
        files[str(path.relative_to(out))] = path.read_bytes()
        if path.name == "state.pt":            # what is in it: pickle writes equal things in more than one way
            files[str(path.relative_to(out))] = plain(torch.load(path, weights_only=True))
        if path.name == "log.jsonl":
            lines = path.read_text().splitlines()
            files[str(path.relative_to(out))] = [json.loads(line) | {"seconds": 0} for line in lines]
    return files


# Disturbances: each starts the job and waits for its end. -> whether it came in time, and there is more to do

def spoil(path: Path, rng: random.Random) -> None:
    """Cuts it off, or turns one of its bits."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content[:at] if rng.random() < 0.5 else content)


def clock_goes_back() -> None:
    """By a second whenever somebody looks."""
    for name in ("time", "monotonic", "perf_counter"):
        setattr(time, name, map(getattr(time, name)().__sub__, count()).__next__)


def let_write(folders: list[Path], allowed: bool) -> bool:
    """Whether files may come to these folders; of root the file system alone can ask that. -> whether it could."""
    if os.geteuid():
        for folder in folders:
            folder.chmod(0o755 if allowed else 0o555)
        return True
    return not subprocess.run(["chattr", "-i" if allowed else "+i", *folders], capture_output=True).returncode


@dataclass
class Trial:
    job: Job
    inputs: Path
    disk: Path
    seconds: float                     # that the undisturbed run took
    expected: dict[str, object]        # its files
    size: int                          # of them all
    rng: random.Random

    def start(self, before: Callable[[], object] = lambda: None, more: tuple[str, ...] = ()) -> Run:
        words = [*words_of(self.job, self.inputs, self.disk / "out"), *more]
        return Run(self.job.program, words, self.job.ranks, before)

    def start_and_wait(self) -> Run:
        run = self.start()
        time.sleep(self.rng.uniform(0, self.seconds))
        return run

    def signalled(self, kind: str) -> bool:
        """SIGTERM comes to a program alone, the others to all that it began. Of several ranks only one is killed."""
        run, number = self.start_and_wait(), NUMBERS[kind]
        came = run.works(run.pids[0])
        for pid in [self.rng.choice(run.pids)] if kind == "kill" else run.pids:
            (os.kill if kind == "term" else os.killpg)(pid, number)
        run.end(EXITS[kind])
        return came

    def limited(self) -> bool:
        """A file may have so many bytes and no more; the write after that fails as on a full disk."""
        most = self.rng.randrange(self.size // 2)
        run = self.start(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
        return 2 in run.end({0, 2})[0]

    def full(self) -> bool:
        used = sum(path.stat().st_blocks * 512 for path in files_of(self.disk))
        remount(self.disk, used + self.rng.randrange(2 * self.size))
        try:
            return 2 in self.start().end({0, 2})[0]
        finally:
            remount(self.disk)

    def refused(self) -> bool:
        run = self.start_and_wait()
        folders = [path for path in (self.disk / "out").rglob("*") if path.is_dir()] + [self.disk / "out"]
        let_write(folders, False)
        try:
            return 2 in run.end({0, 2})[0]
        finally:
            let_write(folders, True)

    def second(self) -> bool:
        """Of two at once one is refused, or both do the same."""
        first = self.start_and_wait()
        came, second = first.works(first.pids[0]), self.start()
        try:
            codes, _ = first.end({0, 2})
        finally:
            codes = codes | second.end({0, 2})[0]
        if 0 not in codes:
            raise Fault("both of two processes were refused")
        return came and 2 in codes

    def clock(self) -> bool:
        self.start(clock_goes_back).end({0})
        return True

    def spoiled(self) -> bool:
        """A kill, and a file that is not as it was: it is made again, or named; then the old one is put back. What a
        program has finished it does not read again, but for datasets; nor rounds.py what is to be looked at."""
        came, looked_at = self.signalled("kill"), (".md", ".png") if self.job.program == "rounds" else ()
        files = [path for path in files_of(self.disk / "out")
                 if path.name[0] != "." and path.suffix not in looked_at and path.stat().st_size]
        if not came or not files or self.job.program != "build_dataset" and not self.different():
            return came
        path = self.rng.choice(files)
        before = path.read_bytes()
        spoil(path, self.rng)
        code, said = self.start().end({0, 2})
        if 2 in code:
            if path.name not in said and str(self.disk / "out") not in said:
                raise Fault(f"{path.name} was spoiled, and it says: {said}")
            path.write_bytes(before)
        return True

    def different(self) -> list[str]:
        found = contents(self.disk / "out")
        return sorted(path for path in self.expected.keys() | found.keys()
                      if self.expected.get(path) != found.get(path))

    def disturb(self, kind: str) -> bool:
        return self.signalled(kind) if kind in NUMBERS else getattr(self, kind)()

    def run(self, kinds: list[str], done: Counter) -> None:
        """`done` counts what came. Raises Fault."""
        shutil.rmtree(self.disk / "out", ignore_errors=True)
        if self.job.begin:
            self.job.begin(self.inputs, self.disk / "out")
        story = []
        try:
            while len(story) < 6:
                story.append(self.rng.choice(kinds))
                if not self.disturb(story[-1]):
                    break
                done[story[-1]] += 1
            self.start().end({0})
            if self.different() and "spoiled" in story and self.job.program == "build_dataset":
                self.start(more=("--repair",)).end({0})
            if different := self.different():
                raise Fault(f"different: {', '.join(different)}")
        except Fault as fault:
            raise Fault(f"{', '.join(story)}: {fault}") from None


# The campaign

def remount(disk: Path, size: int | str = "1g") -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def own_disk(disk: Path) -> bool:
    """Mounts a file system in memory there, which only this process and its forks see, and which ends with them."""
    if ctypes.CDLL(None).unshare(0x20000):                     # CLONE_NEWNS
        return False
    mounts = ["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", "size=1g", "faults", disk]
    return not any(subprocess.run(words, capture_output=True).returncode for words in mounts)


def make_input(name: str, inputs: Path) -> None:
    """One of INPUTS and what it needs; or `choices`, pairs and captions of the dataset's pictures."""
    if (inputs / name).exists():
        return
    if name == "choices":
        make_input("data", inputs)
        shutil.copytree(inputs / "data" / "images", inputs / name)
        lines = [json.loads(line) for path in sorted((inputs / "data").glob("pairs-*.jsonl"))
                 for line in path.read_text().splitlines()]
        for listing, keys in (("pairs", ("prompt", "winner", "loser")), ("metadata", ("text", "file_name"))):
            told = [dict(zip(keys, (line["prompt"], f"{line['id']}_w.png", f"{line['id']}_l.png"))) for line in lines]
            (inputs / name / f"{listing}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))
        return
    make_inputs(INPUTS[name], inputs)
    Run(INPUTS[name].program, words_of(INPUTS[name], inputs, inputs / name)).end({0})


def make_inputs(job: Job, inputs: Path) -> None:
    for name in re.findall(r"\{(\w+)\}", job.options) + (["data"] if job.begin else []):
        make_input(name, inputs)


def campaign(job: Job, name: str, kinds: list[str], wanted: int, seed: int, folder: Path, disk: Path) -> list[str]:
    """-> a line of the table; prints the faults."""
    make_inputs(job, folder)
    shutil.rmtree(disk / "out", ignore_errors=True)
    if job.begin:
        job.begin(folder, disk / "out")
    then = time.monotonic()
    Run(job.program, words_of(job, folder, disk / "out"), job.ranks).end({0})
    seconds, expected = time.monotonic() - then, contents(disk / "out")
    size = sum(path.stat().st_size for path in files_of(disk / "out"))
    done, faults, trials = Counter(), 0, 0
    while sum(done.values()) < wanted and trials < 10 * wanted:
        try:
            Trial(job, folder, disk, seconds, expected, size, random.Random(f"{name} {seed}")).run(kinds, done)
        except Fault as fault:
            faults += 1
            print(f"{name}, seed {seed}: {fault}", flush=True)
        seed, trials = seed + 1, trials + 1
    return [name, f"{seconds:.1f} s", len(expected), trials, *(done[kind] for kind in FAULTS), faults]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=",".join(JOBS), metavar="A,B,...")
    parser.add_argument("--faults", default=",".join(FAULTS), metavar="A,B,...")
    parser.add_argument("--count", type=int, default=50, help="disturbances of each job, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the next has the next")
    args = parser.parse_args()
    torch.set_num_threads(1)                   # a fork has none of its parent's threads
    kinds, lines = args.faults.split(","), []
    with tempfile.TemporaryDirectory() as folder:
        inputs, disk = Path(folder) / "inputs", Path(folder) / "disk"
        inputs.mkdir()
        disk.mkdir()
        if "full" in kinds and not own_disk(disk):
            print("full: left out, for no file system can be mounted here")
            kinds.remove("full")
        if "refused" in kinds and not (let_write([disk], False) and let_write([disk], True)):
            print("refused: left out, for root may write everywhere here")
            kinds.remove("refused")
        try:
            for name in args.jobs.split(","):
                lines.append(campaign(JOBS[name], name, kinds, args.count, args.seed, inputs, disk))
        finally:
            subprocess.run(["umount", disk], capture_output=True)
    cli.print_table(["job", "alone", "files", "trials", *FAULTS, "faults"], [list(map(str, line)) for line in lines])
    sys.exit(any(line[-1] for line in lines))


if __name__ == "__main__":
    main()
