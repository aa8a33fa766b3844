"""docs/hg_dpo.md: the code that it quotes is the code, its pictures are there, and its commands draw them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from model.errors import UserError
from paper_people import ten_pictures

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "hg_dpo.md"
QUOTE = re.compile(r"\[`([^`]+)`\]\(\.\./([^)]+)\)|```python\n(.*?)```", re.DOTALL)


def misquoted(page: str) -> tuple[int, list[str]]:
    """How many blocks of code there are, and those that are not in the file that is linked last before them."""
    file, blocks, wrong = None, 0, []
    for name, target, block in QUOTE.findall(page):
        if target:
            assert name == target
            file = ROOT / target
        else:
            blocks += 1
            if not file or block not in file.read_text():
                wrong.append(block)
    return blocks, wrong


def test_the_code_it_quotes_is_the_code():
    blocks, wrong = misquoted(PAGE.read_text())
    assert not wrong
    assert blocks >= len(ten_pictures.PICTURES)


def test_another_code_is_found():
    assert misquoted(PAGE.read_text().replace("F.logsigmoid(logit)", "F.logsigmoid(-logit)"))[1]


def test_its_pictures_are_there_and_its_commands_draw_them(monkeypatch, tmp_path):
    text, drawn = PAGE.read_text(), []
    shown = re.findall(r"!\[[^]]+\]\((\S+)\)", text)
    assert shown == [f"hg_dpo/{name}.png" for name in ten_pictures.PICTURES]
    for path in shown:
        file = PAGE.parent / path
        assert file.stat().st_size < 150_000
        assert Image.open(file).width <= 830
    for name in ten_pictures.PICTURES:
        monkeypatch.setitem(
            ten_pictures.PICTURES, name, lambda work, name=name: drawn.append(name) or Image.new("RGB", (4, 4)))
    for command in re.findall(r"^python -m paper_people\.ten_pictures .*--only.*$", text, re.MULTILINE):
        words = shlex.split(command)[3:]
        assert words[:2] == ["--out", "docs/hg_dpo"]
        monkeypatch.setattr(sys, "argv", ["ten_pictures.py", "--out", str(tmp_path), *words[2:]])
        ten_pictures.main()
    assert drawn == list(ten_pictures.PICTURES)


def test_an_unknown_picture_is_one_line(tmp_path):
    command = [sys.executable, "-m", "paper_people.ten_pictures", "--out", str(tmp_path), "--only", "forward,cat"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and not list(tmp_path.iterdir())
    assert run.stderr == (
        "ten_pictures.py: --only cat: no such picture; they are forward, pool, pairs, loss, training, change, colours, "
        "lambda, lan, weight\n")


def test_a_training_that_fails_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(ten_pictures, "training_pairs", lambda work: None)
    with pytest.raises(UserError, match="train.py --data .*: failed; its own line says why"):
        ten_pictures.trained(tmp_path, "dpo")


def test_the_forward_process_is_drawn_the_same_twice(monkeypatch, tmp_path):
    for folder in ("a", "b"):
        monkeypatch.setattr(
            sys, "argv", ["ten_pictures.py", "--out", str(tmp_path / folder), "--only", "forward", "--work", "none"])
        ten_pictures.main()
    assert (tmp_path / "a" / "forward.png").read_bytes() == (tmp_path / "b" / "forward.png").read_bytes()
    assert Image.open(tmp_path / "a" / "forward.png").width == 5 * 136 + 8
    assert not Path("none").exists()
