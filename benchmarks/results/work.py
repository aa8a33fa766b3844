"""Makes what is missing, part by part, and keeps of every row, with one training seed, a file of a few kB.

    DIR/pool, base, data/*, runs/*, evaluations/*     the parts, as the programs leave them; .part.json notes the time
    DIR/logs/, DIR/locks/                             what they printed, and who is at what
    ROWS/NAME-SEED.json, ROWS/measures/NAME.json      the row: what the page is written from

Any number of processes may share DIR and ROWS: each takes a row that nobody is at, and waits for a part that another
one makes. A part's program holds the part's lock, too, and outlives whoever began it.
"""

import contextlib
import fcntl
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from evaluation.statistics import HSV, RGB
from model.errors import UserError
from model.files import digest_of, is_a, read_json, read_lines, read_text, write_text

from .experiments import Measure, measure_parts
from .parts import (
    IDENTITY,
    MORE_SCORERS,
    NUM_IMAGES,
    SCORERS,
    VERSION,
    Online,
    Part,
    Row,
    Scale,
    made_from,
    parts_of,
    settings_digest,
    unet_rows,
)

LOGGED, LAST_STEPS = ("mse_w_gain", "mse_l_gain", "implicit_accuracy", "stat"), 20
COMMON = {"digest": str, "commands": list, "commit": str, "machine": dict, "seconds": dict}
FIELDS = {
    "row": str, "seed": int, "unet_rows": int, "scorer": str, "judge": str, "right": str, "base_right": str,
    "rgb": list, "diversity": list, "base_diversity": float, "colours": dict, "base_colours": dict,
    "colour_shift": dict, "log": dict}


@contextlib.contextmanager
def alone(lock: Path, wait: bool) -> Iterator[IO | None]:
    """Yields the lock, open, or None where another process holds it and we do not wait."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file = None
        yield file


# Parts

def call(part: Part, out: Path, lock: IO) -> float:
    """Runs a part's program, which holds `lock` as long as it lives. -> the megabytes of memory that it took at most.
    """
    words = [word.replace("DIR/", f"{out}/") for word in part.command.split()]
    log = out / "logs" / f"{part.name.replace('/', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        process = subprocess.Popen([sys.executable, *words], stdout=file, stderr=file, pass_fds=[lock.fileno()])
        try:
            _, status, usage = os.wait4(process.pid, 0)
            code = process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:                  # Ctrl-C, which the program may not have got
            process.terminate()
            process.wait()
            raise
    if code:
        said = read_text(log).split("\n")[-2:][0]
        program = words[words[0] == "-m"]
        raise UserError(f"{part.name}: {program} ended with {code} ({said}); {log} has all that it said")
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)          # macOS counts bytes, Linux kilobytes


def make_part(part: Part, out: Path, source: str) -> float:
    """Runs a part's program, unless it has ended before. `source` is the digest of what the part is made from, see
    `made_from`. -> its seconds, without those of attempts killed -9."""
    note = out / part.name / ".part.json"
    with alone(out / "locks" / part.name.replace("/", "-"), wait=True) as lock:
        before = read_json(note, command=str, seconds=float, finished=bool) if note.is_file() else {}
        same = before and before["command"] == part.command and before.get("made_from", source) == source
        if same and before["finished"]:
            if "made_from" not in before:                      # of before it was noted
                write_text(note, json.dumps(before | {"made_from": source}))
            return before["seconds"]
        if before and not same:                                # of settings that are no longer in use
            aside = out / "aside" / digest_of(before)[:12] / part.name
            aside.parent.mkdir(parents=True, exist_ok=True)
            note.parent.replace(aside)
            before = {}
        print(f"{part.name}: {part.command}", flush=True)
        start, megabytes = time.monotonic(), None
        try:
            megabytes = call(part, out, lock)
        finally:
            seconds = round(before.get("seconds", 0.0) + time.monotonic() - start, 1)
            write_text(note, json.dumps({"command": part.command, "made_from": source, "seconds": seconds,
                                         "megabytes": megabytes, "finished": megabytes is not None}))
    return seconds


# Rows' files

def row_file(rows: Path, name: str, seed: int) -> Path:
    return rows / f"{name}-{seed}.json"


def measure_file(rows: Path, name: str) -> Path:
    return rows / "measures" / f"{name}.json"


def read_version(path: Path) -> None:
    row = read_json(path, version=int)
    if row["version"] != VERSION:
        raise UserError(f"{path}: of version {row['version']}, and this is {VERSION}; remove it, and make it again")


def read_measure(path: Path) -> dict:
    """UserError where it is damaged or of another version."""
    read_version(path)
    one = read_json(path, **COMMON, measure=str, head=list, lines=list, claims=list)
    whole = are_sound(one) and one["measure"] == path.stem and strings(one["head"])
    whole = whole and all(is_a(line, list) and strings(line) and len(line) == len(one["head"]) for line in one["lines"])
    for claim in one["claims"]:                # of two prompts an effect may be NaN: it is within noise, then
        whole = whole and is_a(claim, dict) and strings([claim.get("text"), claim.get("paper")]) and numbers(
            [claim.get("above")]) and is_a(claim.get("effect"), list) and len(claim["effect"]) == 3 and all(
            is_a(value, float) for value in claim["effect"])
    if not whole:
        raise UserError(f"{path}: damaged; remove it, and make it again")
    return one


def numbers(values: Iterable) -> bool:
    return all(is_a(value, float) and math.isfinite(value) for value in values)


def strings(values: Iterable) -> bool:
    return all(is_a(value, str) for value in values)


def are_sound(one: dict) -> bool:
    """Of what rows and measures have in common."""
    machine = one["machine"]
    return strings(one["commands"]) and numbers(one["seconds"].values()) and strings(
        [machine.get("cpu"), machine.get("torch")]) and is_a(machine.get("cores"), int)


def read_row(path: Path) -> dict:
    """UserError where it is damaged or of another version."""
    read_version(path)
    row = read_json(path, **COMMON, **FIELDS)
    prompts = len(row["diversity"])
    whole = are_sound(row) and path.name == f"{row['row']}-{row['seed']}.json" and prompts > 0
    whole = whole and len(row["rgb"]) == prompts and all(
        is_a(levels, list) and len(levels) == 3 and numbers(levels) for levels in row["rgb"])
    shift, megabytes = row["colour_shift"], row.get("megabytes")
    whole = whole and numbers([*row["diversity"], row["unet_rows"], 0.0 if megabytes is None else megabytes])
    for name in ("identity", "base_identity"):
        whole = whole and len(row.get(name, row["diversity"])) == prompts and numbers(row.get(name, []))
    whole = whole and all(key in shift and (shift[key] is None or numbers([shift[key]]))
                          for key in (*HSV, "hue_degrees"))
    for point in row.get("course", []):
        whole = whole and is_a(point, list) and len(point) == 3 and numbers(point)
    told = [side + name for name in ("right", *MORE_SCORERS) for side in ("", "base_") if side + name in row]
    for name, letters in (("scorer", "wtl"), ("judge", "wtl"), *((name, "01") for name in told)):
        whole = whole and isinstance(row[name], str) and len(row[name]) == prompts * NUM_IMAGES
        whole = whole and not set(row[name]) - set(letters)
    if not whole:
        raise UserError(f"{path}: its outcomes do not fit together; remove it, and make it again")
    return row


def machine() -> dict:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return {"cpu": model[1] if model else platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "torch": torch.__version__}


def commit() -> str:
    """Of the code, with +changes where it has some; unknown where git does not say."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("diff", "--name-only", "HEAD", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_outcomes(folder: Path, row: Row) -> dict:
    """What evaluate.py left of a row -> the picture by picture part of its file."""
    name = row.name if row.guidance is None else "candidate"
    yes_or_no = {"right": SCORERS["right"], **(MORE_SCORERS if row.validation or row.people else {})}
    scorers = {SCORERS["scorer"], SCORERS["judge"], *yes_or_no.values(), *[IDENTITY] * row.people}
    keys = dict.fromkeys(scorers, float) | {"file": str, "diversity": float, "colours": dict}
    sides = [read_lines(folder / f"scores-{side}.jsonl", **keys) for side in ("baseline", name)]
    if [line["file"] for line in sides[0]] != [line["file"] for line in sides[1]] or len(sides[0]) % NUM_IMAGES:
        raise UserError(f"{folder}: the sides have other pictures than each other; remove it, and make it again")
    base, candidate = ([line | line["colours"] for line in side] for side in sides)
    starts = range(0, len(base), NUM_IMAGES)

    def results(scorer: str) -> str:
        return "".join("w" if c[scorer] > b[scorer] else "l" if c[scorer] < b[scorer] else "t"
                       for c, b in zip(candidate, base))

    def mean(lines: list[dict], key: str) -> float:
        return math.fsum(line[key] for line in lines) / len(lines)

    def shift(i: int, key: str) -> float:      # of a prompt, in levels of 255
        return round(255 * (mean(candidate[i:i + NUM_IMAGES], key) - mean(base[i:i + NUM_IMAGES], key)), 1)

    def colours(side: list[dict]) -> dict:
        return {key: round(mean(side, key), 6) for key in (*HSV, *RGB)}

    said = {before + key: "".join(str(int(line[scorer])) for line in side) for key, scorer in yes_or_no.items()
            for before, side in (("", candidate), ("base_", base))}
    if row.people:
        said |= {before + "identity": [round(-mean(side[i:i + NUM_IMAGES], IDENTITY), 5) for i in starts]
                 for before, side in (("", candidate), ("base_", base))}
    report = read_json(folder / "report.json", colour_shift=dict)
    return {
        "scorer": results(SCORERS["scorer"]), "judge": results(SCORERS["judge"]), **said,
        "rgb": [[shift(i, key) for key in RGB] for i in starts],
        "diversity": [round(mean(candidate[i:i + NUM_IMAGES], "diversity"), 4) for i in starts],
        "base_diversity": round(mean(base, "diversity"), 5), "colours": colours(candidate),
        "base_colours": colours(base), "colour_shift": report["colour_shift"]}


@dataclass(frozen=True)
class Job:
    """A row or a measure that is to be made."""

    file: Path
    parts: list[Part]
    read: Callable[[Path], dict]               # the file
    content: Callable[[Path], dict]            # from the folder of the parts: what the file holds besides

    def is_made(self) -> bool:
        return self.file.is_file() and self.read(self.file)["digest"] == settings_digest(self.parts)

    def make(self, out: Path) -> None:
        seconds = {part.name: make_part(part, out, made_from(part, self.parts)) for part in self.parts}
        content = {
            "version": VERSION, "digest": settings_digest(self.parts), "seconds": seconds, "commit": commit(),
            "machine": machine(), "commands": [part.command for part in self.parts], **self.content(out)}
        lines = [f"{json.dumps(key)}: {json.dumps(content[key], sort_keys=True)}" for key in sorted(content)]
        write_text(self.file, "{\n" + ",\n".join(lines) + "\n}\n")


def course(lines: list[dict]) -> list[list[float]]:
    """Of a run that draws its own pictures: rows so far, reward, judge, each the mean of a twentieth of the steps."""
    size, found, rows = max(1, len(lines) // 20), [], 0.0
    for i in range(0, len(lines), size):
        some = lines[i:i + size]
        rows += math.fsum(line["unet_rows"] for line in some)
        found.append([round(rows), *[round(math.fsum(line[key] for line in some) / len(some), 4)
                                     for key in ("reward", "judge")]])
    return found


def row_job(row: Row, seed: int, scale: Scale, rows: Path) -> Job:
    parts = parts_of(row, seed, scale)
    runs = [part.name for part in parts if part.name.startswith("runs/")]

    def content(out: Path) -> dict:
        lines = read_lines(out / runs[0] / "log.jsonl", step=int) if runs else [{}]
        last = lines[-LAST_STEPS:]
        note = read_json(out / runs[0] / ".part.json") if runs else {}
        log = {key: float(f"{math.fsum(line[key] for line in last) / len(last):.6g}")
               for key in LOGGED if key in last[-1]}
        online = isinstance(row.training, Online)
        rows = round(math.fsum(line["unet_rows"] for line in lines)) if online else unet_rows(row, scale)
        return {"row": row.name, "seed": seed, "unet_rows": rows, "log": log, "megabytes": note.get("megabytes"),
                **({"course": course(lines)} if online else {}), **read_outcomes(out / parts[-1].name, row)}

    return Job(row_file(rows, row.name, seed), parts, read_row, content)


def measure_job(measure: Measure, rows: Path) -> Job:
    parts = measure_parts(measure)

    def content(out: Path) -> dict:
        return {"measure": measure.name} | read_json(
            out / parts[-1].name / "measure.json", head=list, lines=list, claims=list)

    return Job(measure_file(rows, measure.name), parts, read_measure, content)


def work_off(todo: list[Job], out: Path) -> None:
    """Makes what is not there; together with whoever else is at it."""
    while todo := [job for job in todo if not job.is_made()]:
        taken = 0
        for job in todo:
            with alone(out / "locks" / f"row-{job.file.stem}", wait=False) as lock:
                if lock and not job.is_made():
                    job.make(out)
                taken += lock is not None
        if not taken:
            print(f"other processes are at the {len(todo)} rows left; waiting", flush=True)
            time.sleep(10)
