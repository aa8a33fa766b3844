"""build_dataset.py: the pool is scored and selected from as the paper says, and a dataset is the same, byte for byte,
however often it was killed and however many jobs made it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import build_dataset
import generate
from build_dataset import SHARD, select
from model.scorers import load_scorer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def options(tiny, tiny_scorer, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a man\na woman, (smiling:1.2)\n\na boy\na girl\n")
    return ["--model", tiny, "--scorer", tiny_scorer, "--prompts", prompts, "--pool-size", 4, "--steps", 4]


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("pairs-*")) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """A dataset made without interruption, its pool kept."""
    out = tmp_path_factory.mktemp("data") / "whole"
    subprocess.run(
        [sys.executable, "build_dataset.py", *map(str, options), "--keep", "pool", "--out", out], cwd=ROOT, check=True)
    return out


def test_best_and_worst_of_the_pool_are_the_pair(whole, tiny, tiny_scorer, options, program, tmp_path):
    """Seeds, scores, ranks, latents and pictures are what generate.py and the scorer give for the same prompts."""
    about = json.loads((whole / "dataset.json").read_text())
    assert about["finished"] and about["counts"]["rows"] == 4 and about["counts"]["pictures"] == 16
    assert program(
        generate, "--model", tiny, "--prompts", options[5], "--num-images", 4, "--steps", 4, "--save-latents",
        "--out", tmp_path / "drawn") == 0
    latents = load_file(tmp_path / "drawn" / "latents.safetensors")["latents"]
    shard, scorer = load_file(whole / "shard-00000.safetensors"), load_scorer(tiny_scorer)
    assert shard["latents_w"].shape == shard["latents_l"].shape == (4, 4, 8, 8)
    assert shard["context"].shape == (4, 77, 32)
    for k, line in enumerate(lines_of(whole)):
        pool = [Image.open(tmp_path / "drawn" / f"{4 * k + i:05d}.png") for i in range(4)]
        scores = scorer(pool, [line["prompt"]] * 4)
        assert line["seeds"] == [4 * k + i for i in range(4)]
        assert torch.tensor(line["scores"]) == pytest.approx(scores, abs=2e-3)
        for kind, index in (("winner", scores.argmax().item()), ("loser", scores.argmin().item())):
            assert line[kind] == index
            stored = shard[f"latents_{kind[0]}"][k].float()
            torch.testing.assert_close(stored, latents[4 * k + index], atol=2e-3, rtol=1e-3)
            found = Image.open(whole / "images" / f"{line['id']}_{kind[0]}.png")
            assert found.tobytes() == pool[index].tobytes()
            assert f"Seed: {line['seeds'][index]}" in found.info["parameters"]


def test_ranks():
    """Rank 1 is the best; equal scores keep their order; a score that is missing takes no part."""
    assert select([0.1, 0.9, 0.5, 0.9], 1, 0) == (1, 0) and select([0.1, 0.9, 0.5, 0.9], 2, 1) == (3, 2)
    assert select([None, 0.2, 0.3, None], 1, 0) == (2, 1)


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_it_ends_the_same(seed, whole, options, tmp_path):
    out, moments = tmp_path / "killed", torch.Generator().manual_seed(seed)
    command = [sys.executable, "build_dataset.py", *map(str, options), "--keep", "pool", "--out", str(out)]
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (out / "dataset.json").exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.3 * torch.rand((), generator=moments).item())
        process.kill()
        process.wait()
    subprocess.run(command, cwd=ROOT, check=True)
    assert contents(out) == contents(whole)


def start(*options, before: str = "") -> subprocess.Popen:
    """The program as a process of its own, with `before` done to it."""
    code = (
        f"import sys, cli, build_dataset\n{before}\n"
        f"sys.argv = {['build_dataset.py', *map(str, options)]}\ncli.run(build_dataset.main)")
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_jobs_make_what_one_does(options, tmp_path):
    """At the same time, with a file a prompt; the last to end writes the summary, and only the options say who made
    it."""
    for out, shards in (("one", [[]]), ("two", [["--shard", "1/2"], ["--shard", "0/2"]])):
        jobs = [start(*options, "--out", tmp_path / out, *shard, before="build_dataset.SHARD = 1") for shard in shards]
        assert [(job.communicate()[1].count("Traceback"), job.returncode) for job in jobs] == [(0, 0)] * len(jobs)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and len(lines_of(tmp_path / "two")) == 4
    assert SHARD == 64


def test_previews_draw_only_the_ends_in_full(whole, options, program, tmp_path):
    """Two of four, kept by their previews, have the very pictures and scores of the full pool."""
    out = tmp_path / "previewed"
    assert program(build_dataset, *options, "--preview-steps", 2, "--preview-keep", 1, "--out", out) == 0
    for line, full in zip(lines_of(out), lines_of(whole)):
        previews = torch.tensor(line["preview_scores"])
        assert line["winner"] in (previews.argmax(), previews.argmin()) and line["scores"].count(None) == 2
        for kind in ("winner", "loser"):
            assert line["scores"][line[kind]] == pytest.approx(full["scores"][line[kind]], abs=2e-3)


def test_reselect_draws_nothing(whole, options, program, tmp_path):
    """From a kept pool: the first three pictures, the second best against the worst."""
    out = tmp_path / "again"
    again = ["--reselect", whole, "--pool-size", 3, "--winner-rank", 2, "--out", out]
    assert program(build_dataset, "--model", options[1], *again) == 0
    pool = load_file(whole / "shard-00000.safetensors")["pool"]
    shard = load_file(out / "shard-00000.safetensors")
    for k, (line, full) in enumerate(zip(lines_of(out), lines_of(whole))):
        order = sorted(range(3), key=lambda i: -full["scores"][i])
        assert (line["winner"], line["loser"]) == (order[1], order[2]) and line["seeds"] == full["seeds"][:3]
        assert torch.equal(shard["latents_w"][k], pool[k, order[1]])
        assert torch.equal(shard["latents_l"][k], pool[k, order[2]])


def test_a_second_process_is_refused(whole, options):
    with build_dataset.locked(whole, 0, 1):
        job = start(*options, "--keep", "pool", "--out", whole)
        stderr = job.communicate()[1]
    assert job.returncode == 2 and "another process is at work in it" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize("change, words", [
    (["--steps", 5], "--steps 4, and now it is 5"), (["--pool-size", 5, "--loser-rank", 4], "--pool-size 4"),
    (["--seed", 1], "--seed 0"), (["--keep", "pair"], "--keep pool")])
def test_changed_options_are_refused_by_name(change, words, whole, options, program, capsys):
    before = contents(whole)
    assert program(build_dataset, *options, "--keep", "pool", "--out", whole, *change) == 2
    assert words in capsys.readouterr().err and contents(whole) == before


@pytest.mark.parametrize("change, words", [
    (["--pool-size", 1], "needs at least 2"), (["--winner-rank", 4], "must rise within 1 to 4"),
    (["--shard", "2/2"], "I from 0 to N - 1"), (["--shard", "a"], "expected I/N"),
    (["--preview-steps", 4], "fewer steps"), (["--prompts", "nothing.txt"], "no such prompt file"),
    (["--scorer", "nobody/nothing.safetensors"], "no such file or folder"), (["--reselect", "nothing"], "not there")])
def test_bad_input_is_one_line(change, words, options, program, tmp_path, capsys):
    assert program(build_dataset, *options, "--out", tmp_path / "out", *change) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and not (tmp_path / "out").exists()


def test_ctrl_c_saves(options, whole, tmp_path):
    out = tmp_path / "stopped"
    command = [sys.executable, "build_dataset.py", *map(str, options), "--keep", "pool", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (out / "dataset.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    assert "Traceback" not in process.communicate()[1] and process.returncode in (0, 130)
    subprocess.run(command, cwd=ROOT, check=True)
    assert contents(out) == contents(whole)
