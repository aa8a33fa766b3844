"""benchmarks.results: the statistics on made-up pictures, rows' files, the page, and one tiny run of everything."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

import build_dataset
import evaluate
import generate
import train
from benchmarks.results import __main__ as results
from benchmarks.results import experiments, measures, parts, work
from benchmarks.results.experiments import rises
from benchmarks.results.page import contestants, read_rows, readme_table, with_table
from benchmarks.results.parts import FULL, NUM_IMAGES, QUICK, Row, Scale
from benchmarks.results.statistics import FIGURES, effect, interval, table, verdict
from evaluation.statistics import wilson
from model.errors import UserError


def made_up(win: float, seed: int, prompts: int = 200, same: bool = False, **more) -> dict:
    """The outcomes of a run that wins so often; with `same` both pictures of a prompt do."""
    rng = np.random.default_rng([seed, round(1000 * win)])
    won = rng.random((prompts, NUM_IMAGES)) < win
    won = "".join("wl"[not w] for w in (np.repeat(won[:, :1], NUM_IMAGES, axis=1) if same else won).ravel())
    return {"scorer": won, "judge": won, "right": won.replace("w", "1").replace("l", "0"),
            "rgb": [[3.0, 0.0, 4.0]] * prompts, "diversity": [0.12, 0.14] * (prompts // 2), **more}


def rates(*wins: float, seeds: int = 3) -> np.ndarray:
    """A row whose seeds win so often, or all of them so often."""
    wins = wins if len(wins) > 1 else wins * seeds
    return table(made_up(win, seed) for seed, win in enumerate(wins))


def of(one: np.ndarray, figure: str = "judge") -> tuple[float, float, float]:
    return interval(effect({"row": one}, {"row": 1.0}, figure))


# Statistics

def test_figures_by_hand():
    run = {"scorer": "wwtl", "judge": "tttt", "right": "1101", "rgb": [[3.0, 0, 0], [3.0, 0, 8.0]],
           "diversity": [0.1, 0.3], "matches": "1100", "identity": [0.2, 0.4], "base_identity": [0.1, 0.3]}
    values = {name: of(table([run, run | {"judge": "lwwl"}]), name)[0] for name in FIGURES}
    assert values == pytest.approx({
        "scorer": 200 / 3, "judge": 50, "gap": 200 / 3 - 50, "agree": 200 / 3, "right": 75, "clean": 0, "matches": 50,
        "colour": 5, "diversity": 0.2, "identity": 0.3, "identity_change": 0.1})


def test_the_slope_is_what_a_figure_rises_by_from_row_to_row():
    rows = [Row(f"r{i}", None) for i in range(4)]
    weights = rises("", "", "judge", rows).weights
    assert sum(weight * (7 + 2.5 * i) for i, weight in enumerate(weights.values())) == pytest.approx(2.5)


def test_rows_that_are_the_same_differ_by_nothing():
    one = rates(0.6, 0.7, 0.8)
    assert interval(effect({"a": one, "b": one}, {"a": 1, "b": -1}, "judge")) == (0, 0, 0)
    tables = {"a": rates(0.7), "b": table(made_up(0.7, seed) for seed in (7, 8, 9))}     # the same chance of a win
    value, low, high = interval(effect(tables, {"a": 1, "b": -1}, "judge"))
    assert low < 0 < high and verdict(low, high) == "within noise"


@pytest.mark.parametrize("wins, said", [
    ((0.6, 0.66, 0.72, 0.78), "held"), ((0.78, 0.72, 0.66, 0.6), "not held"),
    ((0.7, 0.701, 0.702, 0.7), "within noise")])
def test_a_planted_slope_is_found(wins, said):
    rows = [Row(f"r{i}", None) for i in range(4)]
    claim = rises("", "", "judge", rows)
    _, low, high = interval(effect({row.name: rates(win) for row, win in zip(rows, wins)}, claim.weights, "judge"))
    assert verdict(low, high) == said


def test_verdicts():
    assert [verdict(0.1, 2), verdict(-2, -0.1), verdict(-1, 1), verdict(0, 0)] == [
        "held", "not held", "within noise", "within noise"]
    assert [verdict(-4, -2, above=-5), verdict(-8, -6, above=-5), verdict(-7, -2, above=-5)] == [
        "held", "not held", "within noise"]


def test_the_interval_covers_seeds_and_prompts():
    def width(one: np.ndarray) -> float:
        value, low, high = of(one)
        assert low < value < high
        return high - low

    low, high = wilson(140, 200)
    alone = table([made_up(0.7, 0)])
    assert width(alone) == pytest.approx(100 * (high - low) / 2 ** 0.5, rel=0.15)             # 400 pictures
    together = table([made_up(0.7, 0, same=True)])
    assert width(together) == pytest.approx(100 * (high - low), rel=0.15)                     # 200 prompts
    low, high = wilson(840, 1200)
    assert width(rates(0.55, 0.7, 0.85)) > 2 * 100 * (high - low)                             # seeds apart


# Rows' files

def write_run(folder: Path, row: Row, seed: int, scale: Scale, win: float = 0.7, **more) -> Path:
    run = made_up(win, seed, scale.test_prompts) | {
        "version": parts.VERSION, "row": row.name, "seed": seed, "commit": "c0ffee" * 5 + "+changes",
        "digest": parts.settings_digest(parts.parts_of(row, seed, scale)),
        "seconds": {"pool": 100.0, f"runs/{row.name}": 10.0},
        "commands": [part.command for part in parts.parts_of(row, seed, scale)], "unet_rows": 1, "log": {},
        "machine": {"cpu": "A CPU", "cores": 2, "torch": "2.9"}, "base_right": "1" * scale.test_prompts * NUM_IMAGES,
        "base_diversity": 0.15, "colours": {}, "base_colours": {},
        "colour_shift": {"hue": 1.0, "saturation": 2.0, "value": -3.0, "hue_degrees": 4.0}} | more
    path = work.row_file(folder, row.name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))
    return path


def rows_of(scale: Scale) -> dict[str, Row]:
    return {line.row.name: line.row for one in experiments.experiments(scale).values() for line in one.lines}


@pytest.mark.parametrize("damage, said", [
    ({"version": 0}, "of version 0"), ({"version": None}, "version is None"), ({"scorer": "w"}, "do not fit together"),
    ({"judge": "x" * 16}, "do not fit together"), ({"rgb": []}, "do not fit together"), ({"seed": 1}, "not fit"),
    ({"machine": 3}, "machine is 3"), ({"machine": {}}, "not fit"), ({"colour_shift": {}}, "not fit"),
    ({"seconds": {"pool": "x"}}, "not fit"), ({"megabytes": "x"}, "not fit"), ({"commands": [1]}, "not fit"),
    ({"diversity": [None] * 8}, "not fit"), ({"course": [[1, 2]]}, "not fit"), (None, "not JSON")])
def test_a_damaged_row_is_refused_in_one_line(tmp_path, program, capsys, damage, said):
    path = write_run(tmp_path / "rows", rows_of(QUICK)["n2"], 0, QUICK)
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | damage) if damage else text[:-20])
    assert program(results, "--quick", "--report", "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert "n2-0.json" in error and said in error and error.count("\n") == 1


@pytest.mark.parametrize("damage", [
    {"claims": [1]}, {"claims": [{}]}, {"lines": [3]}, {"lines": [["a"]]}, {"lines": [[1, 2]]}, {"measure": "lambda"},
    {"claims": [{"text": "", "paper": "", "above": 0, "effect": [1, None, 2]}]}, {"machine": {}}])
def test_a_damaged_measure_is_refused_in_one_line(tmp_path, damage):
    path, part = work.measure_file(tmp_path, "fig5b"), parts.Part("x", "x.py --out DIR/x")
    claim = {"text": "a claim", "paper": "", "above": 0.0, "effect": [1, 0.5, 2]}
    content = {"measure": "fig5b", "head": ["", "a"], "lines": [["b", "c"]], "claims": [claim]}
    job = work.Job(path, [part], work.read_measure, lambda out: content)
    (tmp_path / "x").mkdir()
    work.write_text(tmp_path / "x" / ".part.json", json.dumps(
        {"command": part.command, "seconds": 1.0, "finished": True}))
    job.make(tmp_path)
    assert job.is_made() and work.read_measure(path)["lines"] == [["b", "c"]]
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(UserError, match="fig5b.json: damaged; remove it"):
        work.read_measure(path)


@pytest.mark.parametrize("options, said", [
    (["--only", "table3,table9"], "table9: no such experiment; there are table3"), (["--seeds", "0,x"], "--seeds 0,x")])
def test_bad_options(program, capsys, options, said):
    assert program(results, *options) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# The page

def test_the_page_says_what_held_what_did_not_and_what_is_missing(tmp_path, program):
    wins = {"n2": 0.6, "n5": 0.66, "n10": 0.72, "dpo": 0.78, "lan": 0.77, "hg-dpo": 0.6}
    rows = rows_of(FULL)
    for name, win in wins.items():
        for seed in range(1 if name == "lan" else 3):
            write_run(tmp_path / "rows", rows[name], seed, FULL, win)
    write_run(tmp_path / "rows", rows["sft"], 0, FULL, digest="of other settings")
    results.write_page(tmp_path / "rows", FULL, tmp_path, tmp_path / "out", ["table3", "table1"])
    page, found = (tmp_path / "RESULTS.md").read_text(), read_rows(tmp_path / "rows", FULL)
    lines = {line.split(" | ")[1]: line for line in page.split("\n") if line.startswith("| [table3]")}
    assert lines["the win rate rises with N, by the judge"].endswith("**held** |")
    assert lines["statistic matching costs less than 5 points"].endswith("**not held** |")
    assert "1 of 3 seeds" in lines["LAN costs less than 5 points"] and "**only 0**" in page
    assert "**Missing rows: loser2," in page and ", sft, " in page and "they should have: lan." in page
    assert "16 runs, 60 s in all, the pool not counted; A CPU, 2 cores, torch 2.9." in page
    assert "seed 2: c0ffeec0ff+changes on A CPU, 2 cores" in page
    assert "python train.py --data DIR/data/640-2-2 --loss dpo --beta 1000 --lr 5e-4" in page
    entries = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {entry["experiment"] for entry in entries} == {"table3", "table1"}
    assert [entry["verdict"] for entry in entries] == ["held", "held", "within noise", "not held", *[None] * 4]
    assert entries[-1]["missing"] == ["sft", "rendered", "beta-x4", "beta-x20"]
    row = entries[0]["rows"][0]
    assert {"name", "seeds", "scorer", "judge", "right", "colour", "diversity", "unet_rows", "seconds"} == row.keys()
    assert row["name"] == "n2" and row["seeds"] == [0, 1, 2] and row["colour"] == 5 and row["seconds"] == 10
    assert row["judge"]["ci95"][0] < row["judge"]["percent"] < row["judge"]["ci95"][1]
    board = page[page.index("## Leaderboard"):page.index("## Commands")]
    names = [line.partition("[")[2].partition("]")[0] for line in board.split("\n") if line.startswith("| [")]
    entered = set(found) & contestants(FULL)
    assert len(entered) == 6 and names == sorted(entered, key=lambda name: -found[name].figures["right"][0])
    assert "hg_dpo.py, " in board and "; right -" in lines["statistic matching costs less than 5 points"]
    charts = {path.stem: ET.parse(path).getroot() for path in (tmp_path / "docs" / "results").iterdir()}
    circles = [element for element in charts["table3"].iter() if element.tag.endswith("circle")]
    assert len(circles) == 2 * len(wins)


def test_a_run_that_draws_its_own_pictures_has_a_course(tmp_path):
    lines = [{"unet_rows": 80.0, "reward": float(i), "judge": i / 100} for i in range(45)]
    points = work.course(lines)                                # 22 of two steps, and what is left
    assert points[0] == [160, 0.5, 0.005] and points[-1] == [45 * 80, 44.0, 0.44] and len(points) == 23
    rows = rows_of(FULL)
    for name, more in (("ddpo", {"course": points}), ("draft", {"course": points[:3]}), ("size160", {})):
        write_run(tmp_path / "rows", rows[name], 0, FULL, **more)
    results.write_page(tmp_path / "rows", FULL, tmp_path, tmp_path / "out", ["online"])
    chart = ET.parse(tmp_path / "docs" / "results" / "online-course.svg").getroot()
    paths = [element.get("d") for element in chart.iter() if element.tag.endswith("path") and element.get("fill")]
    assert [path.count("L") for path in paths] == [22, 2] * 2
    page = (tmp_path / "RESULTS.md").read_text()
    assert page.count("-course.svg") == 1 and "python train_online.py --method ddpo --limit 640" in page
    assert "train_online.py, " in page[page.index("## Leaderboard"):]


def test_online_methods_have_one_budget():
    """The rows that the table counts with are those that the program counts (tests/test_train_online.py)."""
    for row in rows_of(FULL).values():
        if isinstance(row.training, parts.Online) and row.training.share == 1:
            pictures, each, _ = parts.ONLINE[row.training.method]
            steps = int(parts.training_part(row.training, 0, FULL).command.split("--steps ")[1].split()[0])
            assert 0.95 * parts.ONLINE_ROWS < steps * pictures * each <= parts.ONLINE_ROWS
    assert parts.ONLINE_ROWS == parts.unet_rows(rows_of(FULL)["size160"], FULL)


def test_rows_of_the_full_scale():
    """Parts of one name are one command: what experiments share is run once."""
    rows = rows_of(FULL)
    made = {one for row in rows.values() for one in parts.parts_of(row, 1, FULL)}
    assert len({one.name for one in made}) == len(made)
    assert parts.unet_rows(rows["hg-dpo"], FULL) == 640 * 20 * 10 * 2 + 60 * 32 * 2 * 4
    assert parts.unet_rows(rows["sft"], FULL) == 640 * 20 * 10 * 2 + 60 * 32 * 3
    assert parts.unet_rows(rows["mend-second"], FULL) == 640 * 20 * 10 * 2 + 240 * 32 * 2 * 4     # one pool
    assert len({parts.unet_rows(rows[name], FULL) for name in ("previews", "smaller-pool", "fewer-steps")}) == 1
    assert parts.unet_rows(rows["base-guidance3"], FULL) == 0
    evaluations = {name: parts.parts_of(rows[name], 1, FULL)[-1].command for name in rows}
    assert evaluations["weight50"].startswith(
        "evaluate.py --baseline DIR/base --compare weight50=DIR/runs/hg-dpo-1/lora.safetensors:0.5 --num-images 2")
    for name, row in rows.items():
        base = "base-validation" if row.validation else "base-people" if row.people else "base"
        assert f"--baseline DIR/{base} " in evaluations[name]
        assert ("judge-clean" in evaluations[name]) == (row.validation or row.people)
        assert ("identity:" in evaluations[name]) == (" --concept " in evaluations[name]) == row.people


def test_the_rates_in_use_are_those_that_the_search_chose():
    """By the rows that are committed, where a loss has all of its rows."""
    found = read_rows(results.ROWS, FULL)
    best = experiments.chosen({name: one.figures["scorer"][0] for name, one in found.items()})
    offline = [loss for loss in parts.CHOSEN if loss not in parts.ONLINE]
    assert len(offline) == 8 and set(offline) <= best.keys()   # all of their rows are committed
    assert {loss: parts.CHOSEN[loss] for loss in best} == best


def test_the_readmes_table_is_that_of_the_committed_rows():
    readme = (results.ROOT / "README.md").read_text()
    table_now = readme_table(read_rows(results.ROWS, FULL))
    assert table_now.count("\n") > 5 and with_table(readme, table_now) == readme
    assert with_table(readme, "| other |\n") != readme
    with pytest.raises(UserError, match="once each"):
        with_table(readme.replace("<!-- to here -->", ""), table_now)


# The work

def test_a_program_that_fails_is_named_with_its_last_words(tmp_path):
    with pytest.raises(UserError, match="x: not_there.py ended with 2 .*No such file.*x.log has all"):
        work.make_part(work.Part("x", "not_there.py --out DIR/x"), tmp_path, "")
    assert not work.read_json(tmp_path / "x" / ".part.json")["finished"]


def test_a_part_of_other_settings_is_set_aside(tmp_path, monkeypatch):
    def call(part, out, lock):
        (out / part.name).mkdir(parents=True, exist_ok=True)
        assert not (out / part.name / "made").exists()         # no program finds what another command has left
        (out / part.name / "made").write_text(part.command)
        return 1.0

    monkeypatch.setattr(work, "call", call)
    judge = work.Part("evaluations/a-0", "y.py --compare a=DIR/runs/a-0/lora.safetensors")
    for lr in (1, 2, 2):
        some = [work.Part("runs/a-0", f"x.py --lr {lr}"), work.Part("runs/a-0-b", f"x.py --seed {lr}"), judge]
        for part in some:
            work.make_part(part, tmp_path, parts.made_from(part, some))
    assert (tmp_path / "runs" / "a-0" / "made").read_text() == "x.py --lr 2"
    assert [path.read_text() for path in tmp_path.glob("aside/*/runs/a-0/made")] == ["x.py --lr 1"]
    assert len([*tmp_path.glob("aside/*/evaluations/a-0/made")]) == 1            # what is made from it goes, too
    assert parts.made_from(judge, some) == parts.made_from(judge, [some[0], judge]) != parts.made_from(judge, [judge])


def test_a_lock_is_held_by_one(tmp_path):
    with work.alone(tmp_path / "lock", wait=False) as first, work.alone(tmp_path / "lock", wait=False) as second:
        assert first and second is None
    with work.alone(tmp_path / "lock", wait=True) as again:
        assert again


def test_everything_once_with_the_programs_themselves(tmp_path, program, monkeypatch, capsys):
    modules = (build_dataset, evaluate, generate, train)
    programs = {f"{module.__name__}.py": module for module in modules} | {measures.__name__: measures}
    calls = []

    def call(part, out, lock):                           # in this process: torch is loaded already
        name, *options = part.command.removeprefix("-m ").replace("DIR/", f"{out}/").split()
        calls.append(part.name)
        assert program(programs[name], *options) == 0
        return 500.0

    monkeypatch.chdir(results.ROOT)
    monkeypatch.setattr(work, "call", call)
    monkeypatch.setattr(results, "QUICK", Scale((2, 3), (2, 3), 2, 2, 2, 2))
    monkeypatch.setattr(parts, "DRAWING", "--steps 2 --dtype bfloat16")
    options = ["--quick", "--only", "table3,guidance,fig5b", "--out", tmp_path]
    assert program(results, *options) == 0
    assert calls == [
        "pool", "measures/fig5b", "base", "data/3-2-2", "runs/n2-0", "evaluations/n2-0", "data/3-3-3", "runs/dpo-0",
        "evaluations/dpo-0", "evaluations/lan-0", "runs/hg-dpo-0", "evaluations/hg-dpo-0", "drawn/base-guidance3",
        "evaluations/base-guidance3-0", "drawn/dpo-guidance3-0", "evaluations/dpo-guidance3-0",
        "drawn/hg-dpo-guidance3-0", "evaluations/hg-dpo-guidance3-0"]
    path = tmp_path / "rows" / "hg-dpo-0.json"
    run, page = work.read_row(path), (tmp_path / "RESULTS.md").read_text()
    assert run["log"].keys() == set(work.LOGGED)
    assert run["seconds"].keys() == {"pool", "base", "data/3-3-3", "runs/hg-dpo-0", "evaluations/hg-dpo-0"}
    report = json.loads((tmp_path / "evaluations" / "hg-dpo-0" / "report.json").read_text())
    assert [run["judge"].count(letter) for letter in "wtl"] == [
        report["win_rate"]["judge"][name] for name in ("wins", "ties", "losses")]
    assert np.mean(run["rgb"], axis=0) == pytest.approx(report["colour_shift"]["rgb"], abs=0.05)
    assert run["colour_shift"] == report["colour_shift"]
    assert path.stat().st_size < 8000 and run["machine"]["cores"] > 0 and run["megabytes"] == 500
    assert "winners and losers differ in channel means" in page and "| N = 2 | " in page
    before = path.read_bytes()
    path.unlink()                                        # made again from its parts, of which none runs again
    assert program(results, *options) == 0 and len(calls) == 18
    assert path.read_bytes() == before and (tmp_path / "RESULTS.md").read_text() == page
