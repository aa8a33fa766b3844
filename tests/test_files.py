"""Files: what a reader refuses, what a writer leaves behind, and digests that no change escapes."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import files
from model.errors import UserError
from model.files import (
    atomic_write,
    digest,
    digest_all,
    files_read,
    read_json,
    read_lines,
    read_tensors,
    write_tensors,
    write_text,
)

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("content, words", [
    (b"{", "not JSON"), (b"", "not JSON"), (b"[1]", "[1] where an object"), (b"7", "7 where an object"),
    ("{\"a\": \"caf\u00e9\"}".encode("latin-1"), "text in UTF-8"), (b'{"a": ' + b"[" * 100_000, "not JSON"),
    (b'{"b": 1}', "no a in it; int was expected"), (b'{"a": "1"}', "a is '1'; int was expected"),
    (b'{"a": true}', "a is True; int"), (b'{"a": 1.5}', "a is 1.5; int")])
def test_json_that_is_not_what_was_expected(content, words, tmp_path):
    for name, read in (("a.json", read_json), ("a.jsonl", read_lines)):
        (tmp_path / name).write_bytes(content or b"x")
        with pytest.raises(UserError) as error:
            read(tmp_path / name, a=int)
        assert words in str(error.value) and str(error.value).startswith(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_json_that_is(tmp_path):
    """With a byte order mark; a whole number where a float is expected; a last line that a full disk cut."""
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json", a=float) == {"a": 1}
    (tmp_path / "a.json").write_text(f'{{"a": 1{400 * "0"}}}')                   # too large for one
    with pytest.raises(UserError, match="float was expected"):
        read_json(tmp_path / "a.json", a=float)
    (tmp_path / "a.jsonl").write_text('{"a": "x\u2028y"}\n\n{"a": "z"}\n{"a": "cut')
    assert [line["a"] for line in read_lines(tmp_path / "a.jsonl", cut=True, a=str)] == ["x\u2028y", "z"]
    with pytest.raises(UserError, match="line 4: not JSON"):
        read_lines(tmp_path / "a.jsonl", a=str)


def test_a_name_that_utf8_cannot_hold_survives_in_json(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write_text(tmp_path / "a.json", json.dumps({"file": name}, ensure_ascii=False))
    assert read_json(tmp_path / "a.json") == {"file": name}


def test_a_digest_notices_every_change(tmp_path, monkeypatch):
    """Also of a large file whose digest is cached: one with the old size and time, a moment later or much later."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "LARGE", 10)
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 100)
    first = digest(path)
    assert not (tmp_path / "cache").exists()                 # so young that it may still change within its time
    monkeypatch.setattr(files, "RACY", -1.0)
    assert digest(path) == first and len(read_json(tmp_path / "cache" / "hg-dpo" / "digests.json")) == 1
    monkeypatch.setattr(files.hashlib, "sha256", None)       # from now on it must come from the cache
    assert digest(path) == first and digest(tmp_path / "cache" / ".." / "weights") == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "LARGE", 10)
    monkeypatch.setattr(files, "RACY", -1.0)
    times = path.stat()
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest(path) != first
    (tmp_path / "cache" / "hg-dpo" / "digests.json").write_text("{")
    assert len(digest(path)) == 64


def test_a_digest_needs_no_home(tmp_path, monkeypatch):
    """A container's user may have none."""
    def no_home():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(files, "LARGE", 1)
    monkeypatch.setattr(files, "RACY", -1.0)
    (tmp_path / "weights").write_bytes(b"abc")
    assert digest(tmp_path / "weights") == hashlib.sha256(b"abc").hexdigest()


def test_a_digest_of_several_is_of_names_and_contents(tmp_path):
    for folder, contents in (("a", "xy"), ("b", "xy"), ("c", "yx")):
        (tmp_path / folder).mkdir()
        for name, content in zip(("one", "two"), contents):
            (tmp_path / folder / name).write_text(content)
    of = {folder: digest_all((tmp_path / folder).iterdir()) for folder in "abc"}
    assert of["a"] == of["b"] != of["c"]


def test_readers_tell_what_they_read(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    write_text(tmp_path / "b.json", "{}")
    with files_read() as outer:
        read_tensors(tmp_path / "a.safetensors")
        with files_read() as inner:
            read_json(tmp_path / "b.json")
    read_tensors(tmp_path / "a.safetensors")
    assert outer == {tmp_path / "a.safetensors", tmp_path / "b.json"} and inner == {tmp_path / "b.json"}


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands for it: tensors, a training state and a picture, in a program."""
    code = (
        "import sys, cli, torch; from pathlib import Path; from PIL import Image\n"
        "from model.files import write_pickle, write_tensors, write_text; from pictures import write_png\n"
        "def main():\n"
        "    x, path = torch.rand(100_000), Path(sys.argv[2])\n"
        "    if sys.argv[1] == 'tensors': write_tensors(path, {'x': x})\n"
        "    if sys.argv[1] == 'text': write_text(path, 'x' * 100_000)\n"
        "    if sys.argv[1] == 'png': write_png(path, Image.effect_noise((300, 300), 100))\n"
        "    if sys.argv[1] == 'state': write_pickle(path, x)\n"
        "cli.run(main)")
    for kind in ("tensors", "text", "png", "state"):
        path = tmp_path / kind
        path.write_text("old")
        ended = subprocess.run(
            [sys.executable, "-c", code, kind, path], cwd=ROOT, capture_output=True, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1, (kind, ended.stderr)
        assert "File too large" in ended.stderr and path.read_text() == "old" and len(list(tmp_path.glob(".*"))) == 0


def test_a_pickle_is_not_opened_by_a_torch_that_may_run_it(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.bin")
    assert read_tensors(tmp_path / "a.bin").keys() == {"a"}
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cpu"))
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(UserError, match="a.bin: a pickle, in which torch before 2.10 can be made to run code"):
        read_tensors(tmp_path / "a.bin")


def test_what_is_written_is_whole_or_not_there(tmp_path):
    with pytest.raises(KeyError), atomic_write(tmp_path / "a") as part:
        part.write_text("half")
        raise KeyError
    assert not list(tmp_path.iterdir())
