"""RESULTS.md, its charts and results.json, from the rows' files alone. What is not there is named as missing."""

import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evaluation.statistics import HSV
from losses import LOSSES
from model.errors import UserError
from model.files import write_text

from .chart import chart
from .experiments import FULL, NUM_IMAGES, Claim, Experiment, Scale, experiments, settings_digest, shared_parts
from .statistics import FIGURES, RESAMPLES, effect, interval, table, verdict
from .work import read_row

SEEDS = 3                                      # that a row should have
BUDGET = 300_000                               # of the leaderboard, U-Net rows with one seed

HEAD = """# The paper's claims, measured

`python -m benchmarks.results{quick}` makes the rows that are missing and writes this page; with `--report` it only
writes the page. The training settings are the same for every row, those of README.md, chosen there on prompts that are
neither the pairs' nor the test's.

{scale}

Win rates are against the model as it is, from the same seeds, with ties left out. The scorer chose the pairs; the judge
is another network, which took no part in the training. The RGB shift is the length of the change of the mean red, green
and blue. **The intervals (95 %) cover training seeds and test prompts**: both are drawn again {resamples:,} times, a
prompt with its {images} pictures, the same draws for all rows of a claim. They do not cover what is made once: the
pool, the checkpoint, scorer and judge. Three seeds tell little of their own spread; with one seed an interval covers
prompts alone. A length cannot be negative: the interval of a small shift lies mostly above it.{few}

A claim says that an effect lies above a threshold, 0 unless another is given: a slope, by how much a figure rises (or
falls, where that is the claim) from one row to the next, or a difference of two rows, such as what a shift is cut by.
It is **held** where the whole interval lies above, **not held** where it lies below, and else **within noise**; in
brackets where it has fewer than 3 seeds, and so says nothing of another training. Of twenty such intervals one misses
by chance.

{made}
"""


def own_seconds(run: dict) -> dict[str, float]:
    """Of each part but those that all rows share: they may have been made in several goes, or elsewhere."""
    shared = [part.name for part in shared_parts(FULL)]
    return {name: seconds for name, seconds in run["seconds"].items() if name not in shared}


@dataclass(frozen=True)
class Found:
    """What there is of a row."""

    runs: dict[int, dict]                                 # its files' contents, by seed
    figures: dict[str, tuple[float, float, float]]        # each with its interval

    def mean(self, of: Callable[[dict], float]) -> float:
        return math.fsum(map(of, self.runs.values())) / len(self.runs)

    @property
    def seconds(self) -> float:
        """With one seed, without what all rows share."""
        return self.mean(lambda run: math.fsum(own_seconds(run).values()))


def read_rows(folder: Path, scale: Scale) -> dict[str, Found]:
    """The rows that were made with today's settings, by name."""
    rows = {line.row.name: line.row for experiment in experiments(scale).values() for line in experiment.lines}
    runs: dict[str, dict[int, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        run = read_row(path)
        if (row := rows.get(run["row"])) and run["digest"] == settings_digest(row, run["seed"], scale):
            if len(run["diversity"]) != scale.test_prompts:
                raise UserError(f"{path}: {len(run['diversity'])} test prompts, and not {scale.test_prompts}")
            runs.setdefault(row.name, {})[run["seed"]] = run
    return {name: Found(some, {
        figure: interval(effect({name: table(some.values())}, {name: 1.0}, figure)) for figure in FIGURES})
        for name, some in runs.items()}


def judged(claim: Claim, found: dict[str, Found]) -> tuple[list[int], tuple[float, float, float] | None, str | None]:
    """-> the seeds that all rows of the claim have, the effect with its interval, and the verdict."""
    seeds = sorted(set.intersection(*(set(found[name].runs if name in found else ()) for name in claim.weights)))
    if not seeds:
        return [], None, None
    tables = {name: table([found[name].runs[seed] for seed in seeds]) for name in claim.weights}
    values = interval(effect(tables, claim.weights, claim.figure))
    return seeds, values, verdict(*values[1:], claim.above)


def results(found: dict[str, Found], some: list[Experiment]) -> list[dict]:
    """What results.json holds: a claim an entry."""
    def row(name: str) -> dict:
        one = found[name]
        rates = {key: {"percent": one.figures[key][0], "ci95": one.figures[key][1:]} for key in ("scorer", "judge")}
        more = {key: one.figures[key][0] for key in ("right", "colour", "diversity")}
        return {"name": name, "seeds": sorted(one.runs), **rates, **more, "seconds": round(one.seconds, 1),
                "unet_rows": next(iter(one.runs.values()))["unet_rows"]}

    entries = []
    for experiment in some:
        names = [line.row.name for line in experiment.lines]
        for claim in experiment.claims:
            seeds, values, said = judged(claim, found)
            entries.append({
                "experiment": experiment.name, "claim": claim.text, "paper": claim.paper, "figure": claim.figure,
                "effect": values and {"value": values[0], "ci95": values[1:], "above": claim.above, "seeds": seeds},
                "verdict": said, "rows": [row(name) for name in names if name in found],
                "missing": [name for name in names if name not in found]})
    return entries


# The page

def shown(values: tuple[float, float, float], digits: int, sign: str = "") -> str:
    value, low, high = (f"{number:{sign}.{digits}f}" for number in values)
    return f"{value} ({low} to {high})"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *lines)) + "\n"


def verdicts(some: list[Experiment], found: dict[str, Found]) -> str:
    lines = []
    for experiment in some:
        for claim in experiment.claims:
            seeds, values, said = judged(claim, found)
            ours = shown(values, FIGURES[claim.figure].digits, "+") if values else "rows are missing"
            ours += f", above {claim.above:g}" if claim.above else ""
            ours += f", {len(seeds)} of {SEEDS} seeds" if 0 < len(seeds) < SEEDS else ""
            lines.append([f"[{experiment.name}](#{experiment.name})", claim.text, claim.paper, ours,
                          f"**{said}**" if len(seeds) >= SEEDS else f"({said})" if said else ""])
    return markdown(["", "claim", "the paper", "effect here", "verdict"], lines)


def rows_table(experiment: Experiment, found: dict[str, Found]) -> str:
    head = ["", "row", f"the paper: {experiment.paper}", *[figure.heading for figure in FIGURES.values()],
            "hue, saturation, value, %", "hue, degrees", "seeds"]
    lines, base = [], []
    for line in experiment.lines:
        cells = [line.label, f"[{line.row.name}](#{line.row.name})", line.paper]
        if one := found.get(line.row.name):
            seeds = ", ".join(map(str, sorted(one.runs)))
            shift = [one.mean(lambda run, key=key: run["colour_shift"][key]) for key in (*HSV, "hue_degrees")]
            cells += [shown(one.figures[key], figure.digits) for key, figure in FIGURES.items()]
            cells += [" ".join(f"{value:+.1f}" for value in shift[:3]), f"{shift[3]:.1f}",
                      seeds if len(one.runs) >= SEEDS else f"**only {seeds}**"]
            run = next(iter(one.runs.values()))
            right = 100 * run["base_right"].count("1") / len(run["base_right"])
            base = [["the model as it is", *[""] * 4, f"{right:.1f}", "", f"{run['base_diversity']:.4f}", *[""] * 3]]
        else:
            cells += ["missing", *[""] * (len(head) - len(cells) - 1)]
        lines.append(cells)
    return markdown(head, lines + base)


def leaderboard(found: dict[str, Found]) -> str:
    """Methods under one budget, the best first."""
    lines = []
    for name, one in sorted(found.items(), key=lambda item: -item[1].figures["right"][0]):
        run = one.runs[min(one.runs)]
        if run["unet_rows"] <= BUDGET:
            loss = re.search(r"--loss (\S+)", " ".join(run["commands"]))[1]
            file = Path(inspect.getsourcefile(LOSSES[loss].function))
            lines.append([
                f"[{name}](#{name})", shown(one.figures["right"], 1), f"{run['unet_rows']:,}", f"{one.seconds:.0f}",
                f"losses/{file.name}, {len(file.read_text().splitlines())}", run["commit"][:10],
                ", ".join(map(str, sorted(one.runs)))])
    if not lines:
        return ""
    return (
        "## Leaderboard\n\nOne budget, one figure: with at most "
        f"{BUDGET:,} U-Net rows, pool and training together, how many pictures of the test prompts are right by the "
        "judge. An entry is a loss in one file and a row in `benchmarks/results/experiments.py`.\n\n"
        + markdown(["", FIGURES["right"].heading, "U-Net rows", "seconds", "loss, lines", "commit", "seeds"], lines))


def commands(name: str, found: dict[str, Found]) -> str:
    """How a row was made, where, and at what cost."""
    if name not in found:
        return f"### {name}\n\nMissing.\n\n"
    one = found[name]
    first = one.runs[min(one.runs)]
    made = "; ".join(
        f"seed {seed}: {re.sub('(?<=[0-9a-f]{10})[0-9a-f]+', '', run['commit'])} on {run['machine']['cpu']}, "
        f"{run['machine']['cores']} cores" for seed, run in sorted(one.runs.items()))
    own = first["commands"][len(shared_parts(FULL)):]
    return (f"### {name}\n\n{first['unet_rows']:,} U-Net rows, {one.seconds:.0f} s. {made}\n\n```\n"
            + "".join(f"python {command}\n" for command in own) + "```\n\n")


def page(found: dict[str, Found], scale: Scale) -> str:
    some = list(experiments(scale).values())
    names = list(dict.fromkeys(line.row.name for experiment in some for line in experiment.lines))
    runs = [run for one in found.values() for run in one.runs.values()]
    machines = sorted({"{cpu}, {cores} cores, torch {torch}".format(**run["machine"]) for run in runs})
    total = math.fsum(seconds for _, seconds in {part for run in runs for part in own_seconds(run).items()})
    few = [name for name in names if name in found and len(found[name].runs) < SEEDS]
    missing = [name for name in names if name not in found]
    text = HEAD.format(
        quick="" if scale == FULL else " --quick", resamples=RESAMPLES, images=NUM_IMAGES,
        scale=f"Pools of {scale.pools[-1]} for {scale.sizes[-1]} prompts, {scale.train_steps} steps of training, "
        f"{scale.test_prompts} test prompts with {NUM_IMAGES} pictures each."
        + ("" if scale == FULL else " **So few try the machinery, and say nothing of the claims.**"),
        few=f" Fewer than {SEEDS} seeds have: {', '.join(few)}." if few else "",
        made=f"{len(runs)} runs, {total:,.0f} s in all, the pool not counted"
        + "".join(f"; {machine}" for machine in machines) + "."
        + (f" **Missing rows: {', '.join(missing)}.**" if missing else ""))
    text += "\n## Verdicts\n\n" + verdicts(some, found)
    for experiment in some:
        text += f"## {experiment.name}\n\n{experiment.title}. {experiment.note}".rstrip() + "\n\n"
        text += rows_table(experiment, found)
        if any(line.row.name in found for line in experiment.lines):
            text += f"![{experiment.title}](docs/results/{experiment.name}.svg)\n\n"
    text += leaderboard(found)
    text += "## Commands\n\nDIR is `--out`. U-Net rows are what one seed of a row takes alone, its pool included (a "
    text += "backward pass counts as two); seconds leave out what all rows share. Every row begins with\n\n```\n"
    text += "".join(f"python {part.command}\n" for part in shared_parts(scale)) + "```\n\nand goes on, with its "
    return text + "first seed, as follows.\n\n" + "".join(commands(name, found) for name in names)


def write_page(rows: Path, scale: Scale, top: Path, out: Path, only: list[str]) -> None:
    """TOP/RESULTS.md with TOP/docs/results/*.svg, all experiments; and OUT/results.json, those of `only`."""
    found, known = read_rows(rows, scale), experiments(scale)
    for experiment in known.values():
        lines = [(line.label, found[line.row.name].figures) for line in experiment.lines if line.row.name in found]
        if lines:
            write_text(top / "docs" / "results" / f"{experiment.name}.svg", chart(experiment, lines))
    write_text(top / "RESULTS.md", page(found, scale).rstrip() + "\n")
    write_text(out / "results.json", json.dumps(results(found, [known[name] for name in only]), indent=2) + "\n")
