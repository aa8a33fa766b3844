"""What strangers' files may do: be read, or be refused in a line, and nothing else. A fixed sample of the inputs of
benchmarks/fuzz.py, through the same code, and proof that it would notice. The whole, which takes half an hour:

    python benchmarks/fuzz.py --count 10000
"""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks import fuzz
from benchmarks.damage import LINK, SECRET, Code
from model.errors import UserError

# Of each kind so many; those that draw or train most have their turn in the whole alone.
SAMPLE = {"configs": 8, "weights": 8, "scorer": 8, "LoRA": 8, "concept": 4, "prompts": 6, "preferences": 6,
          "picture": 30, "list of pictures": 5, "state of a run": 3}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Back where we were, whatever happens, and with its handlers."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore")          # of Pillow, about damaged pictures
@pytest.mark.parametrize("kind", SAMPLE)
def test_damaged_files_are_read_or_refused_in_a_line(kind):
    found = list(fuzz.outcomes(kind, range(SAMPLE[kind])))
    assert len(found) == SAMPLE[kind] and set(found) <= {"refused", "accepted"}, found


def test_an_input_depends_on_its_number_alone(monkeypatch):
    read = []
    monkeypatch.setitem(fuzz.KINDS, "prompts", (
        "a.*", fuzz.make_prompts, lambda at, file: read.append((file.name, file.read_bytes()))))
    list(fuzz.outcomes("prompts", range(3, 6)))
    list(fuzz.outcomes("prompts", range(5, 6)))
    assert read[3] == read[-1] != read[2]


def raises(error: Exception) -> None:
    raise error


def sleeps() -> None:
    try:
        time.sleep(5)
    except Exception:                          # as a reader does that takes every error for a bad file
        pass


GUARDED = {
    "a bug": (lambda file: raises(RuntimeError("a bug")), "a bug"),
    "takes for ever": (lambda file: sleeps(), "more than 0.2 seconds"),
    "writes elsewhere": (lambda file: Path("../elsewhere").write_text(""), "open"),
    "makes a folder elsewhere": (lambda file: Path("../elsewhere").mkdir(), "os.mkdir"),
    "removes elsewhere": (lambda file: os.remove(SECRET), "os.remove"),
    "moves elsewhere": (lambda file: os.rename(file, "../elsewhere"), "os.rename"),
    "reads what a link leads to": (lambda file: Path(LINK).read_bytes(), "open"),
    "starts a program": (lambda file: subprocess.run(["true"]), "subprocess.Popen"),
    "asks the network": (lambda file: socket.create_connection(("127.0.0.1", 9)), "socket."),
    "runs code": (lambda file: torch.load(file, weights_only=False), "code in a pickle was run"),
    "ends the program": (lambda file: raises(SystemExit(1)), "1"),
    "is refused": (lambda file: raises(UserError("no")), "refused"),
    "is not there": (lambda file: open("b"), "refused"),
    "is read": (lambda file: Path("b").write_bytes(file.read_bytes()), "accepted")}


@pytest.mark.parametrize("read, words", GUARDED.values(), ids=GUARDED)
def test_the_guard_notices(read, words, tmp_path, monkeypatch):
    (tmp_path / "input").mkdir()
    monkeypatch.chdir(tmp_path / "input")
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    signal.signal(signal.SIGALRM, fuzz.too_slow)
    Path(SECRET).write_bytes(b"secret")
    Path(LINK).symlink_to(SECRET)
    torch.save(Code(), "a.pt")
    assert words in str(fuzz.outcome(lambda at, file: read(file), Path("a.pt")))
    assert Path(SECRET).read_bytes() == b"secret" and not Path("../elsewhere").exists()
