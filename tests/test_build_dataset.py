"""build_dataset.py: the pool is scored and selected from as the paper says, and a dataset is the same, byte for byte,
however often it was killed and however many jobs made it."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import build_dataset
import generate
from dataset import rows, sources, verify
from dataset.folder import locked
from dataset.pool import select
from dataset.reader import Pairs
from model.checkpoint import load_pipeline
from model.errors import UserError
from model.files import digest_of, write_tensors
from model.scorers import load_scorer
from pictures import read_parameters

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
    assert select([0.1, 0.9, 0.5, 0.9], 1, 4) == (1, 0) and select([0.1, 0.9, 0.5, 0.9], 2, 3) == (3, 2)
    assert select([None, 0.2, 0.3, None], 1, 4) == (2, 1)


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
    before = "import dataset.rows; dataset.rows.SHARD = 1"
    for out, shards in (("one", [[]]), ("two", [["--shard", "1/2"], ["--shard", "0/2"]])):
        jobs = [start(*options, "--out", tmp_path / out, *shard, before=before) for shard in shards]
        assert [(job.communicate()[1].count("Traceback"), job.returncode) for job in jobs] == [(0, 0)] * len(jobs)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and len(lines_of(tmp_path / "two")) == 4
    assert rows.SHARD == 64


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
    assert program(build_dataset, *again) == 0
    about, kept = (json.loads((folder / "dataset.json").read_text()) for folder in (out, whole))
    assert all(about[key] == kept[key] for key in ("model", "context_width", "scaling_factor", "latent"))
    assert about["unet_rows"] == 0 and kept["unet_rows"] == 4 * 4 * 4 * 2 and about["drawn_with"]["steps"] == 4
    pool = load_file(whole / "shard-00000.safetensors")["pool"]
    shard = load_file(out / "shard-00000.safetensors")
    for k, (line, full) in enumerate(zip(lines_of(out), lines_of(whole))):
        order = sorted(range(3), key=lambda i: -full["scores"][i])
        assert (line["winner"], line["loser"]) == (order[1], order[2]) and line["seeds"] == full["seeds"][:3]
        assert torch.equal(shard["latents_w"][k], pool[k, order[1]])
        assert torch.equal(shard["latents_l"][k], pool[k, order[2]])


def test_reselect_by_another_scorer_scores_the_kept_pictures_anew(whole, program, tmp_path, capsys):
    own = tmp_path / "dark.py"
    own.write_text("import numpy as np, torch\ndef dark(images, prompts):\n"
                   "    return torch.tensor([-float(np.asarray(image).mean()) for image in images])\n")
    out = tmp_path / "dark"
    again = ["--reselect", whole, "--scorer", f"{own}:dark", "--pool-size", 4, "--keep", "pool", "--out", out]
    assert program(build_dataset, *again) == 0
    for line in lines_of(out):
        pictures = [Image.open(whole / "images" / f"{line['id']}_{i:02d}.png") for i in range(4)]
        means = [-np.asarray(picture).mean() for picture in pictures]
        assert line["scores"] == pytest.approx(means, abs=0.1)                   # latents are kept in half precision
        assert (line["winner"], line["loser"]) == (np.argmax(line["scores"]), np.argmin(line["scores"]))
    with_pool = load_file(out / "shard-00000.safetensors")["pool"]               # for losses that learn from pools
    assert torch.equal(with_pool, load_file(whole / "shard-00000.safetensors")["pool"])
    Pairs([out], load_pipeline(json.loads((out / "dataset.json").read_text())["model"]), "pool")
    assert len(list((out / "images").glob("*_03.png"))) == len(lines_of(out))
    assert program(build_dataset, *again[:2], *again[4:]) == 2                   # by the kept scores
    assert "--scorer has other contents" in capsys.readouterr().err
    vae = shutil.copytree(Path(json.loads((whole / "dataset.json").read_text())["model"]) / "vae", tmp_path / "vae")
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, vae / "diffusion_pytorch_model.safetensors")
    assert program(build_dataset, *again[:-1], tmp_path / "by another VAE", "--vae", vae) == 2
    assert "is another one than the pool was drawn with" in capsys.readouterr().err
    assert program(build_dataset, *again[:2], f"--scorer=-1*{own}:dark", *again[4:]) == 2    # the same file, turned
    assert "--scorer has other contents" in capsys.readouterr().err
    own.write_text(own.read_text().replace("-float", "float"))
    assert program(build_dataset, *again) == 2                                   # it is another now
    assert "--scorer has other contents" in capsys.readouterr().err


def test_a_second_process_is_refused(whole, options):
    with locked(whole):
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
    (["--pool-size", 1], "--pool-size 1: must be a whole number of 2"),
    (["--winner-rank", 4], "must rise within 1 to 4"),
    (["--shard", "2/2"], "I from 0 to N - 1"), (["--shard", ""], "must be I/N"),
    (["--limit", 0], "--limit 0: must be"), (["--min-gap", -1], "--min-gap -1: must be"),
    (["--seed", "x"], "--seed x"), (["--guidance", "inf"], "--guidance inf"), (["--device", "meta"], "must be auto"),
    (["--preview-steps", 2, "--sampler", "ddpm"], "previews tell next to nothing"),
    (["--preview-steps", 0], "--preview-steps 0"), (["--human-only"], "goes with --from-pairs"),
    (["--from-images", "a"], "--from-images and --prompts: give one"),
    (["--preview-steps", 4], "fewer steps"), (["--prompts", "nothing.txt"], "no such prompt file"),
    (["--scorer", "nobody/nothing.safetensors"], "no such file or folder"),
    (["--reselect", "nothing"], "--reselect and --prompts: give one")])
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


# Damage

def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def row_of_tensors(path: Path, name: str, row: int) -> int:
    """Where in a safetensors file a row of a tensor begins."""
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    about = json.loads(path.read_bytes()[8:8 + length])[name]
    start, end = about["data_offsets"]
    return 8 + length + start + row * (end - start) // about["shape"][0]


SHARD, PAIRS = "shard-00000.safetensors", "pairs-00000.jsonl"
DAMAGE = {
    "a bit of a row": (lambda out: flip(out / SHARD, row_of_tensors(out / SHARD, "latents_l", 1)), {1}),
    "a cut shard": (lambda out: os.truncate(out / SHARD, 5000), {0, 1, 2, 3}),
    "no JSON": (lambda out: (out / PAIRS).write_text("{"), {0, 1, 2, 3}),
    "two pictures": (lambda out: [flip(out / "images" / "000000_w.png", -20),
                                  (out / "images" / "000002_01.png").unlink()], {0, 2})}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_made_again(what, whole, options, program, tmp_path, monkeypatch, capsys):
    """Each row by its number, and no other is drawn; the dataset is then the same, byte for byte."""
    out, (do, rows_of) = tmp_path / "out", DAMAGE[what]
    shutil.copytree(whole, out)
    do(out)
    assert program(build_dataset, "--verify", out) == 2
    said = capsys.readouterr().err
    assert {int(row) for row in re.findall(r"row (\d+): \S+ is not (?:there|as it was)", said)} == rows_of
    assert f"{len(rows_of)} rows are damaged" in said
    pair, drawn = build_dataset.pair_from_pool, []
    monkeypatch.setattr(build_dataset, "pair_from_pool", lambda *arguments: drawn.append(1) or pair(*arguments))
    assert run_alone(options, program, out, "--keep", "pool", "--repair") == 0
    assert len(drawn) == len(rows_of) and contents(out) == contents(whole)


def test_killed_while_it_is_repaired(whole, options, program, tmp_path, monkeypatch, capsys):
    """The folder is refused, by the line that names --repair, until it is mended; and where a row was being drawn the
    same command goes on, as another job would."""
    out, take_apart = tmp_path / "out", verify.take_apart
    shutil.copytree(whole, out)
    assert program(build_dataset, "--verify", out) == 0
    DAMAGE["a bit of a row"][0](out)

    def killed(*arguments):
        take_apart(*arguments)
        raise KeyboardInterrupt
    monkeypatch.setattr(verify, "take_apart", killed)
    assert run_alone(options, program, out, "--keep", "pool", "--repair") == 130
    monkeypatch.setattr(verify, "take_apart", take_apart)
    capsys.readouterr()
    assert run_alone(options, program, out, "--keep", "pool") == 2
    assert "--repair" in capsys.readouterr().err
    pair = build_dataset.pair_from_pool
    monkeypatch.setattr(build_dataset, "pair_from_pool", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run_alone(options, program, out, "--keep", "pool", "--repair") == 130
    assert program(build_dataset, "--verify", out) == 2 and "not finished" in capsys.readouterr().err
    monkeypatch.setattr(build_dataset, "pair_from_pool", pair)
    assert run_alone(options, program, out, "--keep", "pool", "--repair") == 0
    assert contents(out) == contents(whole)


# What is no pair

def run_alone(options, program, out: Path, *more) -> int:
    return program(build_dataset, *options, "--out", out, *more)


def test_what_has_no_gap_is_no_pair(whole, options, program, tmp_path, capsys):
    """It is counted, named and left out; the pairs around it stay themselves, here and in training."""
    gaps = [line["scores"][line["winner"]] - line["scores"][line["loser"]] for line in lines_of(whole)]
    least = sorted(gaps)[1]
    out = tmp_path / "again"
    assert program(build_dataset, "--reselect", whole, "--pool-size", 4, "--min-gap", least, "--out", out) == 0
    about = json.loads((out / "dataset.json").read_text())
    assert about["counts"]["rows"] == 2 and about["counts"]["left_out"] == 2 and about["counts"]["failed"] == 0
    kept = [line for line, gap in zip(lines_of(whole), gaps) if gap > least]
    assert [line["id"] for line in lines_of(out)] == [line["id"] for line in kept]
    assert f"not above --min-gap {least:g}" in about["left_out"][0]["reason"]
    data = Pairs([out], load_pipeline(options[1]))
    of_whole = Pairs([whole], load_pipeline(options[1]))
    for i, line in enumerate(kept):
        for mine, theirs in zip(data.batch([i], "cpu", torch.float32),
                                of_whole.batch([int(line["id"])], "cpu", torch.float32)):
            assert torch.equal(mine, theirs)
    none = ["--reselect", whole, "--pool-size", 4, "--min-gap", 1e9, "--out", tmp_path / "none"]
    assert program(build_dataset, *none) == 2
    assert "no pair came of 4 rows; " in capsys.readouterr().err


def test_previews_have_no_order_to_select_from(options, program, tmp_path, capsys):
    """Between the ends of a pool of previews nothing is known; ranks among the few that are drawn in full would be
    others. Their pictures say how many steps they had."""
    out = tmp_path / "kept"
    assert run_alone(options, program, out, "--keep", "pool", "--preview-steps", 2, "--preview-keep", 1) == 0
    line = lines_of(out)[0]
    for i, score in enumerate(line["scores"]):
        about = read_parameters(Image.open(out / "images" / f"000000_{i:02d}.png").info["parameters"])
        assert about["Steps"] == ("2" if score is None else "4")
    assert json.loads((out / "dataset.json").read_text())["unet_rows"] == 4 * (4 * 2 + 2 * 4) * 2
    capsys.readouterr()
    assert program(build_dataset, "--reselect", out, "--pool-size", 4, "--out", tmp_path / "again") == 2
    assert "only 2 of 4 pictures a prompt have a score" in capsys.readouterr().err


def test_a_bad_row_is_noted_and_tried_again(whole, options, program, tmp_path, monkeypatch, capsys):
    """A NaN stops one row, not the run; the next run tries it again, with another dtype if need be."""
    out, pair = tmp_path / "out", build_dataset.pair_from_pool

    def nan_at_two(*arguments):
        line, tensors, pictures = pair(*arguments)
        return line, tensors | ({"latents_w": tensors["latents_w"] / 0} if line["prompt"] == "a boy" else {}), pictures
    monkeypatch.setattr(build_dataset, "pair_from_pool", nan_at_two)
    for _ in range(2):
        assert run_alone(options, program, out, "--keep", "pool") == 2
        assert "prompt 000002, 'a boy': NaN or infinite" in capsys.readouterr().err
    about = json.loads((out / "dataset.json").read_text())
    assert about["finished"] and about["counts"]["failed"] == 1 and len(lines_of(out)) == 3
    assert [(one["id"], one["prompt"], one["failed"]) for one in about["left_out"]] == [("000002", "a boy", True)]
    monkeypatch.setattr(build_dataset, "pair_from_pool", pair)
    mended = tmp_path / "mended"
    shutil.copytree(out, mended)
    assert run_alone(options, program, mended, "--keep", "pool", "--dtype", "bfloat16") == 0
    assert [line.get("dtype") for line in lines_of(mended)] == [None, None, "bfloat16", None]
    assert run_alone(options, program, out, "--keep", "pool") == 0
    assert contents(out) == contents(whole)
    assert run_alone(options, program, out, "--keep", "pool", "--dtype", "bfloat16") == 0     # nothing is left to draw
    assert contents(out) == contents(whole)

    monkeypatch.setattr(rows, "IN_A_ROW", 2)
    monkeypatch.setattr(build_dataset, "score_pool", lambda *_: (_ for _ in ()).throw(UserError("no scorer")))
    capsys.readouterr()
    assert run_alone(options, program, tmp_path / "none") == 2
    assert "2 rows failed one after another, the last: prompt 000001" in capsys.readouterr().err


def test_one_damaged_picture_among_others(options, program, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 32), (80 * i, 10, 10)).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "metadata.jsonl").write_text("".join(f'{{"file_name": "{i}.png", "text": "{i}"}}\n' for i in range(3)))
    assert program(build_dataset, "--model", options[1], "--from-images", folder, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "prompt 000001, '1': " in error and "1 rows failed" in error
    assert [line["prompt"] for line in lines_of(tmp_path / "out")] == ["0", "2"]


def test_a_damaged_row_is_named(tmp_path):
    """Of one that another program touched, before it is joined to others."""
    def joined(damage) -> None:
        for number in (0, 1):
            row, note = rows.row_files(tmp_path, number)
            write_tensors(row, {"latents_w": torch.zeros(4, 2, 2), "context": torch.zeros(77, 3)},
                          {"line": f'{{"id": "00000{number}"}}'})
        damage(row, note)
        rows.join_rows(tmp_path, 0, range(2))

    def without_reason(row, note):
        row.unlink()
        note.write_text('{"id": "000001", "prompt": "a", "failed": false}')

    for damage, words in {
            lambda row, _: row.write_bytes(row.read_bytes().replace(b"F32", b"F99")): "Error while deserializing",
            lambda row, _: save_file({"context": torch.zeros(77, 3)}, row, {"line": '{"id": "1"}'}): "unlike the first",
            lambda row, _: save_file({"latents_w": torch.zeros(4, 2, 2), "context": torch.zeros(0, 3)}, row,
                                     {"line": '{"id": "1"}'}): "empty, or unlike", without_reason: "no reason in it",
            }.items():
        with pytest.raises(UserError, match=f"partial/000001.*{words}"):
            joined(damage)
    joined(lambda *_: None)
    assert (tmp_path / "pairs-00000.jsonl").is_file()


@pytest.mark.parametrize("changed, words", [
    ({"shards": []}, "no row in it"), ({"inputs": 5}, "inputs is 5; dict or NoneType was expected"),
    ({"options": {"vae": ["x"]}}, r"the VAE that the pool was drawn with is ['x']; a name was expected")])
def test_a_pools_manifest_that_somebody_changed(changed, words, whole, program, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "pool")
    manifest = json.loads((folder / "dataset.json").read_text()) | changed
    (folder / "dataset.json").write_text(json.dumps(manifest))
    scorer = ["--scorer", "pickscore"] if "options" in changed else []
    assert program(build_dataset, "--reselect", folder, *scorer, "--pool-size", 4, "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err


# What a dataset depends on

def test_a_dataset_grows(whole, options, program, tmp_path, capsys):
    """From two prompts to four, by --limit or by lines at the end of the file; rows that are there stay."""
    grown, prompts = tmp_path / "grown", tmp_path / "prompts.txt"
    prompts.write_text("a man\na woman, (smiling:1.2)\n")
    now = [*options, "--keep", "pool"]
    now[5] = prompts
    assert run_alone(now, program, grown) == 0
    made = (grown / "images" / "000000_w.png").stat().st_mtime_ns
    prompts.write_text(options[5].read_text())
    assert run_alone(now, program, grown, "--limit", 3) == 0 and len(lines_of(grown)) == 3
    assert run_alone(now, program, grown) == 0
    assert (grown / "images" / "000000_w.png").stat().st_mtime_ns == made
    mine, fresh = contents(grown), contents(whole)
    assert mine.keys() == fresh.keys() and {name for name in fresh if mine[name] != fresh[name]} == {"dataset.json"}
    changed = {key for key in json.loads(fresh["dataset.json"]) if
               json.loads(fresh["dataset.json"])[key] != json.loads(mine["dataset.json"])[key]}
    assert changed == {"options"}                                                # the file's name
    capsys.readouterr()
    assert run_alone(now, program, grown, "--limit", 3) == 2
    assert "4 rows are begun, and now there are 3" in capsys.readouterr().err
    prompts.write_text("a man\na dog\na boy\na girl\n")
    assert run_alone(now, program, grown) == 2
    assert "the first 4 rows of --prompts are not those" in capsys.readouterr().err


@pytest.mark.parametrize("name, option", [
    ("model/unet/diffusion_pytorch_model.safetensors", "model"), ("vae/config.json", "model"),
    ("model/tokenizer/tokenizer_config.json", "model"), ("scorer/model.safetensors", "scorer")])
def test_an_input_that_changed_under_its_name_is_refused(
    name, option, options, tiny, tiny_scorer, program, tmp_path, capsys,
):
    """Another picture would be drawn, or another score given, by what has the same name."""
    shutil.copytree(tiny, tmp_path / "model")
    shutil.copytree(tiny / "vae", tmp_path / "vae")
    shutil.copytree(tiny_scorer, tmp_path / "scorer")
    now = ["--model", tmp_path / "model", "--scorer", tmp_path / "scorer", "--vae", tmp_path / "vae", *options[4:],
           "--limit", 1, "--steps", 1]
    assert run_alone(now, program, tmp_path / "out") == 0
    before, path = contents(tmp_path / "out"), tmp_path / name
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        save_file({key: tensor.neg() if i == 0 else tensor for i, (key, tensor) in enumerate(tensors.items())}, path)
    else:
        path.write_text(path.read_text().rstrip("\n") + "\n\n")
    capsys.readouterr()
    assert run_alone(now, program, tmp_path / "out") == 2
    assert f"--{option} has other contents" in capsys.readouterr().err and contents(tmp_path / "out") == before


def test_prompts_of_other_lengths(options, program, tmp_path):
    """A prompt of two chunks beside one of one: contexts in a shard are equally long, and the short one's says the same
    twice over."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a man\n" + "a woman in a garden, " * 20 + "\n")
    now = [*options[:4], "--prompts", prompts, *options[6:], "--prompt-weights", "a1111", "--steps", 1]
    assert run_alone(now, program, out) == 0
    context = load_file(out / "shard-00000.safetensors")["context"]
    assert context.shape == (2, 154, 32) and torch.equal(context[0, :77], context[0, 77:])
    assert not torch.equal(context[1, :77], context[1, 77:])


def test_what_a_disk_spoils_while_a_dataset_is_made(options, tmp_path, program, monkeypatch, capsys):
    """A row is made again; files of a shard that is joined are named, and made again when they are removed."""
    def killed(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "SHARD", 2)
    straight, out = tmp_path / "straight", tmp_path / "out"
    assert run_alone(options, program, straight) == 0
    assert run_alone(options, program, out, "--shard", "1/2") == 0
    row = out / "partial" / "000003.safetensors"
    flip(row, row.stat().st_size - 1)
    assert run_alone(options, program, out, "--shard", "1/2") == 0
    for at, name in ((-1, SHARD), (30, PAIRS)):
        monkeypatch.setattr(build_dataset, "write_manifest", killed)             # the last moment
        assert run_alone(options, program, out) == 130
        monkeypatch.undo()
        monkeypatch.setattr(rows, "SHARD", 2)
        flip(out / name, at)
        capsys.readouterr()
        assert run_alone(options, program, out) == 2
        assert f"{name}: not as it was when it was written; remove {PAIRS}" in capsys.readouterr().err
        (out / PAIRS).unlink()
    assert run_alone(options, program, out) == 0 and contents(out) == contents(straight)


def test_jobs_split_rows_and_agree_on_how(options, tmp_path, program, capsys):
    """Two jobs have half of the rows each, not half of the shards; a third that was told otherwise is refused."""
    out = tmp_path / "out"
    assert run_alone(options, program, out, "--shard", "1/2") == 0
    assert sorted(path.name for path in (out / "partial").glob("*")) == ["000001.safetensors", "000003.safetensors"]
    with locked(out, 1, 2, "2 jobs for 4 rows"):
        assert run_alone(options, program, out, "--shard", "0/3") == 2
        assert "2 jobs for 4 rows are at work in it, and this is one of 3 jobs" in capsys.readouterr().err
        assert run_alone(options, program, out, "--shard", "0/2", "--limit", 3) == 2
        assert run_alone(options, program, out, "--shard", "0/2") == 0
    assert json.loads((out / "dataset.json").read_text())["finished"]


def test_pictures_lie_in_folders_of_a_thousand(options, program, tmp_path):
    names = {n: rows.picture_path(Path("d"), f"{n:06d}", "w").as_posix() for n in (0, 999, 1000, 123_456, 1_234_567)}
    assert names == {0: "d/images/000000_w.png", 999: "d/images/000999_w.png", 1000: "d/images/001/001000_w.png",
                     123_456: "d/images/123/123456_w.png", 1_234_567: "d/images/1234/1234567_w.png"}
    assert run_alone(options, program, tmp_path / "some", "--images", "pool", "--steps", 1, "--limit", 1) == 0
    assert len(list((tmp_path / "some" / "images").iterdir())) == 2 + 4


class Killed(BaseException):
    pass


def make_dataset(out: Path, count: int, make) -> list[str]:
    """As the program does it, without a model."""
    options, names = {"dtype": "float32"}, list(map(str, range(count)))
    source = sources.Source(names, str, make, {}, {})
    with locked(out):
        missing, failed = sources.begin_dataset(out, options, (), source, "--prompts", count, 0, 1, {})
        problems = rows.make_rows(
            out, count, missing, failed, str, make, lambda *_: None, "pair", lambda items, *_: items)
        summary = rows.summarise(out, count)
        sources.write_manifest(out / "dataset.json", options, {}, finished=True, rows=count,
                               rows_from=digest_of(names), **summary)
        rows.clear_parts(out)
    return problems


@pytest.mark.parametrize("words, said", [
    (["--from-pairs", "x", "--scorer", "pickscore"], "--scorer: --from-pairs has no pools to choose from"),
    (["--from-images", "x", "--min-gap", 0.5], "--min-gap: --from-images has no pools"),
    (["--from-images", "x", "--keep", "pool"], "--keep: --from-images has no pools"),
    (["--from-pairs", "x", "--pool-size", 7], "--pool-size: --from-pairs has no pools"),
    (["--from-pairs", "x", "--images", "none", "--export-pickapic", "y"], "needs both pictures of a pair"),
    (["--prompts", "parti-people", "--category", "Animals"], "parti-people are those of the category People")])
def test_what_would_be_ignored_is_refused(words, said, program, tmp_path, capsys):
    assert program(build_dataset, *words, "--out", tmp_path / "data") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "data").exists()


def test_rows_that_fail_again_hold_up_nothing(tmp_path):
    """A block of bad rows ends the first run, for something may be amiss; the next goes on behind it, and ends."""
    def make(k: int):
        if 2 <= k < 14:
            raise UserError("broken")
        tensors = {"latents_w": torch.zeros(4, 2, 2), "context": torch.zeros(77, 3)}
        return {"seeds": [0, 1], "scores": [1.0, 0.0], "winner": 0, "loser": 1}, tensors, {}

    with pytest.raises(UserError, match="10 rows failed one after another"):
        make_dataset(tmp_path, 20, make)
    assert len(make_dataset(tmp_path, 20, make)) == 12
    counts = json.loads((tmp_path / "dataset.json").read_text())["counts"]
    assert (counts["rows"], counts["failed"]) == (8, 12)


def test_killed_at_every_write_it_ends_the_same(tmp_path, monkeypatch):
    """Rows are made and joined, one fails and is tried again, more are added: whatever write, move or removal a kill
    comes before, the next run ends with the files of one that was left alone."""
    monkeypatch.setattr(rows, "SHARD", 2)
    left = [0]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return function(*args, **kwargs)
        return call
    for name in ("write_tensors", "write_text", "write_png"):
        monkeypatch.setattr(rows, name, counted(getattr(rows, name)))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))

    monkeypatch.setattr(sources, "write_manifest", counted(sources.write_manifest))

    def work(out: Path, count: int, broken: bool) -> None:
        def make(k: int):
            if k == 1 and broken:
                raise UserError("broken")
            tensor = torch.full((4, 2, 2), float(k))
            line = {"seeds": [0, 1], "scores": [1.0, 0.0], "winner": 0, "loser": 1}
            picture = Image.new("RGB", (8, 8), (k, 0, 0))
            return line, {"latents_w": tensor, "context": torch.full((77, 3), float(k))}, {"w": picture, "l": picture}
        make_dataset(out, count, make)

    def whole_life(out: Path, kill_at: int) -> int:
        left[0] = kill_at
        for count, broken in ((3, True), (3, False), (5, False)):
            while True:
                try:
                    work(out, count, broken)
                    break
                except Killed:
                    left[0] = 0
        return left[0]

    whole_life(tmp_path / "whole", 0)
    expected = contents(tmp_path / "whole")
    kill_at = 1
    while whole_life(tmp_path / str(kill_at), kill_at) <= 0:
        assert contents(tmp_path / str(kill_at)) == expected, kill_at
        kill_at += 1
    assert kill_at > 60
