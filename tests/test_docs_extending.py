"""docs/extending.md, done as it stands there in a copy of the repository: a stranger's loss, sampler, scorer, judge and
format work."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUN = """
import json, runpy, sys
sys.path.insert(0, "")
for _, *sys.argv in json.loads(sys.argv[1]):
    print(*sys.argv, flush=True)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
COPIED = ("model", "losses", "sampling", "dataset", "training", "evaluation", "paper_people", "*.py")


def test_the_examples_work_as_they_stand(tmp_path):
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, tmp_path / path.name, ignore=shutil.ignore_patterns("__pycache__", "pairs"))
            else:
                shutil.copy(path, tmp_path)
    page = (ROOT / "docs" / "extending.md").read_text()
    commands = []
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    for kind, text in blocks:
        if kind == "sh":
            commands += map(shlex.split, text.splitlines())
            continue
        name, _, content = text.partition("\n")
        path = tmp_path / name.removeprefix("# ")
        if kind == "diff":
            before = path.read_text()
            shown = "".join(line[1:] + "\n" for line in content.splitlines() if line[0] == " ")
            assert before.count(shown) == 1, f"{path.name} has no such line, or more than one: {shown}"
            path.write_text(before.replace(shown, "".join(line[1:] + "\n" for line in content.splitlines())))
        else:
            assert not path.exists()
            path.write_text(content)
    # One process for all of them: to import torch takes longer than most.
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[0]["exponential"] == log[0]["loss"] == 1 and len(log) == 2
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert list(report["mean_score"]) == ["paper-people", "brightness"]
    assert json.loads((tmp_path / "sharp" / "dataset.json").read_text())["options"]["scorer"] == "sharpness"
    assert "Sampler: Euler" in (tmp_path / "euler" / "00000.png").read_bytes().decode("latin-1")
