"""rounds.py: every round draws with the last one's LoRA and trains it on; a run that was stopped goes on."""

import json
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import build_dataset
import generate
import rounds
import train

PROGRAMS = {"build_dataset.py": build_dataset, "train.py": train}


@pytest.fixture
def called(program, monkeypatch):
    """The programs run in this process; -> what was called."""
    calls = []

    def run(words) -> SimpleNamespace:
        calls.append([Path(words[1]).name, *words[2:]])
        code = program(PROGRAMS[calls[-1][0]], *words[2:])
        return SimpleNamespace(wait=lambda: code)

    monkeypatch.setattr(subprocess, "Popen", run)
    return calls


@pytest.fixture
def options(tiny, tiny_scorer, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a man\na woman\n")
    data = f"--prompts {prompts} --scorer {tiny_scorer} --pool-size 3 --steps 2 --images none"
    # The rank is the first round's, and after it that of its LoRA.
    return ["--model", tiny, "--data", data, "--train", "--lr 1e-2 --batch-size 2 --rank 2 --alpha=3 --steps 2"]


def test_rounds_go_on_from_each_other(options, program, called, tmp_path):
    out = tmp_path / "online"
    assert program(rounds, *options, "--rounds", 1, "--out", out) == 0
    first = (out / "lora.safetensors").read_bytes()
    assert first == (out / "0/run/lora.safetensors").read_bytes()
    del called[:]
    assert program(rounds, *options, "--rounds", 2, "--out", out) == 0             # goes on: the first round is there
    assert [words[0] for words in called] == ["build_dataset.py", "train.py"] * 2
    assert (out / "0/run/lora.safetensors").read_bytes() == first != (out / "lora.safetensors").read_bytes()
    manifests = [json.loads((out / f"{n}/data/dataset.json").read_text()) for n in (0, 1)]
    assert "lora" not in manifests[0]["options"] and "lora" not in manifests[0]["inputs"]
    assert manifests[1]["options"]["lora"] == [str(out / "0/run/lora.safetensors")] and manifests[1]["inputs"]["lora"]
    seeds = [set(sum((json.loads(line)["seeds"] for line in (
        out / f"{n}/data/pairs-00000.jsonl").read_text().splitlines()), [])) for n in (0, 1)]
    assert not seeds[0] & seeds[1]
    settings = json.loads((out / "1/run/config.json").read_text())["options"]
    assert settings["init_lora"] == str(out / "0/run/lora.safetensors") and settings["rank"] == 2
    files = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    assert program(rounds, *options, "--rounds", 2, "--out", out) == 0             # all is there: nothing changes
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == files


def test_a_pool_is_drawn_with_the_lora(options, program, called, tiny, tmp_path, capsys):
    """As generate.py draws with it, at its weight; and not as without."""
    assert program(rounds, *options, "--rounds", 1, "--out", tmp_path / "online") == 0
    lora, data, drawn = tmp_path / "online/lora.safetensors", ["--model", tiny, *options[3].split()], {}
    for name, more in (("half", ["--lora", f"{lora}:0.5"]), ("without", [])):
        assert program(build_dataset, *data, *more, "--out", tmp_path / name) == 0
        line = json.loads((tmp_path / name / "pairs-00000.jsonl").read_text().splitlines()[0])
        seed = line["seeds"][line["winner"]]
        assert program(generate, "--model", tiny, "--prompt", line["prompt"], "--seed", seed, "--steps", 2, "--lora",
                       f"{lora}:0.5", "--save-latents", "--out", tmp_path / f"{name}-drawn") == 0
        latents = load_file(tmp_path / f"{name}-drawn/latents.safetensors")["latents"][0].half()
        drawn[name] = torch.allclose(
            latents, load_file(tmp_path / name / "shard-00000.safetensors")["latents_w"][0], rtol=2e-3, atol=2e-3)
    assert drawn == {"half": True, "without": False}
    capsys.readouterr()
    assert program(build_dataset, *data, "--out", tmp_path / "half") == 2
    assert "begun with --lora" in capsys.readouterr().err
    assert program(build_dataset, "--reselect", tmp_path / "half", "--lora", lora, "--out", tmp_path / "other") == 2
    assert capsys.readouterr().err == "build_dataset.py: --lora goes with drawing; --reselect draws nothing\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_program_that_is_stopped_may_save_first(name, tmp_path):
    """However long that takes it. Ctrl-C reaches both; SIGTERM rounds.py alone, which passes it on."""
    program, saved = tmp_path / "program.py", tmp_path / "saved"
    program.write_text(f"""import os, signal, sys, time
def save(*_):
    time.sleep(1)
    open({str(saved)!r}, "w")
    sys.exit(130)
signal.signal(signal.{name}, save)
os.kill(os.getppid(), signal.{name})
if "{name}" == "SIGINT": os.kill(os.getpid(), signal.SIGINT)
time.sleep(20)
""")
    before = signal.getsignal(signal.Signals[name])
    with pytest.raises(SystemExit) as end:
        rounds.call(program)
    assert end.value.code == 130 and saved.exists() and signal.getsignal(signal.Signals[name]) == before


def test_bad_input_is_one_line(options, program, called, tmp_path, capsys):
    for more, said in (
            (["--data", "--out elsewhere"], "--data --out: is set for every round; leave it away"),
            (["--train=--init-lora=a.safetensors"], "--train --init-lora=a.safetensors: is set for every round"),
            (["--train", "--loss sft --full"], "--train --full: rounds go on with a LoRA"),
            (["--train", "--lr '1e-3"], "No closing quotation"), (["--rounds", "0"], "--rounds 0: must be")):
        assert program(rounds, *options, *more, "--out", tmp_path / "online") == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert program(rounds, *options, "--train", "--lr 0", "--out", tmp_path / "online") == 2
    error = capsys.readouterr().err                            # the program's own line, and no other
    assert error.splitlines()[-1].startswith("train.py: --lr 0: must be")
