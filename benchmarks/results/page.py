"""RESULTS.md, its charts and results.json, from the rows' files alone. What is not there is named as missing."""

import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.statistics import HSV
from losses import LOSSES
from model.errors import UserError
from model.files import write_text

from .chart import chart, course_chart
from .experiments import (
    README,
    Claim,
    Experiment,
    Measure,
    chosen,
    everything,
    experiments,
    measure_parts,
    measures,
)
from .parts import (
    CHOSEN,
    FULL,
    NUM_IMAGES,
    RATES,
    Scale,
    parts_of,
    settings_digest,
    shared_parts,
)
from .statistics import FIGURES, RESAMPLES, effect, interval, table, verdict
from .work import measure_file, read_measure, read_row

ROOT = Path(__file__).parents[2]
MARKS = ("<!-- by benchmarks.results -->", "<!-- to here -->")           # of README.md's table
BUDGET = 300_000                               # of the leaderboard, U-Net rows with one seed

HEAD = """# The paper's claims, measured

`python -m benchmarks.results{quick}` makes the rows that are missing and writes this page; with `--report` it only
writes the page. The settings are the same for every row but for what it compares; the learning rate is chosen by one
rule on prompts that are neither the pairs' nor the test's ([search](#search)), of DPO's variants together with DPO's.

{scale}

Win rates are against the model as it is, from the same seeds, with ties left out. The scorer chose the pairs; the judge
is another network, which took no part in the training. The RGB shift is the length of the change of the mean red, green
and blue. **The intervals (95 %) cover training seeds and test prompts**: both are drawn again {resamples:,} times, a
prompt with its {images} pictures, the same draws for all rows of a claim. They do not cover what is made once: the
pool, the checkpoint, scorer and judge. Three seeds tell little of their own spread: where it is larger than that of the
prompts, as with colours, an interval is about the range of the three, which misses the mean of all seeds one time in
four. With one seed an interval covers prompts alone. A length cannot be negative: the interval of a small shift lies
mostly above it.{few}

A claim says that an effect lies above a threshold, 0 unless another is given: a slope, by how much a figure rises (or
falls, where that is the claim) from one row to the next, or a difference of two rows, such as what a shift is cut by.
It is **held** where the whole interval lies above, **not held** where it lies below, and else **within noise** (of a
cost that is there for sure, and perhaps larger than its margin: of the margin); in brackets where it has fewer than 3
seeds or is measured on one training, and so says nothing of another. A claim is judged by one figure, beside which the
others stand: there are many claims, and no correction for their number.

{made}
"""


def own_seconds(run: dict) -> dict[str, float]:
    """Of each part but those that many rows share: they may have been made in several goes, or elsewhere."""
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

    @property
    def megabytes(self) -> str:
        """That training took at most; rows that were made before this was measured do not say."""
        found = [run["megabytes"] for run in self.runs.values() if run.get("megabytes")]
        return f"{max(found):,.0f}" if found else ""


def read_rows(folder: Path, scale: Scale) -> dict[str, Found]:
    """The rows that were made with today's settings, by name."""
    rows = {line.row.name: line.row for experiment in experiments(scale).values() for line in experiment.lines}
    runs: dict[str, dict[int, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        run = read_row(path)
        if (row := rows.get(run["row"])) and run["digest"] == settings_digest(parts_of(row, run["seed"], scale)):
            prompts = scale.validation_prompts if row.validation else scale.test_prompts
            if len(run["diversity"]) != prompts:
                raise UserError(f"{path}: {len(run['diversity'])} prompts, and not {prompts}")
            runs.setdefault(row.name, {})[run["seed"]] = run
    return {name: Found(some, {
        figure: interval(effect({name: table(some.values())}, {name: 1.0}, figure)) for figure in FIGURES})
        for name, some in runs.items()}


def read_measures(folder: Path, scale: Scale) -> dict[str, dict]:
    found = {}
    for measure in measures(scale).values():
        path = measure_file(folder, measure.name)
        if path.is_file() and (one := read_measure(path))["digest"] == settings_digest(measure_parts(measure)):
            found[measure.name] = one
    return found


def judged(claim: Claim, found: dict[str, Found]) -> tuple[list[int], tuple[float, float, float] | None, str | None]:
    """-> the seeds that all rows of the claim have, the effect with its interval, and the verdict."""
    seeds = sorted(set.intersection(*(set(found[name].runs if name in found else ()) for name in claim.weights)))
    if not seeds:
        return [], None, None
    tables = {name: table([found[name].runs[seed] for seed in seeds]) for name in claim.weights}
    values = interval(effect(tables, claim.weights, claim.figure))
    return seeds, values, verdict(*values[1:], claim.above)


def results(found: dict[str, Found], measured: dict[str, dict], some: list[Experiment | Measure]) -> list[dict]:
    """What results.json holds: a claim an entry."""
    def row(name: str) -> dict:
        one = found[name]
        rates = {key: {"percent": one.figures[key][0], "ci95": one.figures[key][1:]} for key in ("scorer", "judge")}
        more = {key: one.figures[key][0] for key in ("right", "colour", "diversity")}
        return {"name": name, "seeds": sorted(one.runs), **rates, **more, "seconds": round(one.seconds, 1),
                "unet_rows": next(iter(one.runs.values()))["unet_rows"]}

    entries = []
    for one in some:
        names = [] if isinstance(one, Measure) else [line.row.name for line in one.lines]
        rows = {"rows": [row(name) for name in names if name in found],
                "missing": [name for name in names if name not in found]}
        if isinstance(one, Measure):
            for claim in measured.get(one.name, {"claims": []})["claims"]:
                value, *ends = claim["effect"]
                entries.append({
                    "experiment": one.name, "claim": claim["text"], "paper": claim["paper"], "figure": one.name,
                    "effect": {"value": value, "ci95": ends, "above": claim["above"], "seeds": []},
                    "verdict": verdict(*ends, claim["above"]), **rows})
            continue
        for claim in one.claims:
            seeds, values, said = judged(claim, found)
            entries.append({
                "experiment": one.name, "claim": claim.text, "paper": claim.paper, "figure": claim.figure,
                "effect": values and {"value": values[0], "ci95": values[1:], "above": claim.above, "seeds": seeds},
                "verdict": said, **rows})
        if not one.claims:
            entries.append({"experiment": one.name, "claim": "", "verdict": None, **rows})
    return entries


# The page

def shown(values: tuple[float, float, float], digits: int, sign: str = "") -> str:
    value, low, high = (f"{number:{sign}.{digits}f}" for number in values)
    return f"{value} ({low} to {high})"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *lines)) + "\n"


def verdicts(found: dict[str, Found], measured: dict[str, dict], scale: Scale) -> str:
    lines = []
    for experiment in experiments(scale).values():
        for claim in experiment.claims:
            seeds, values, said = judged(claim, found)
            ours = shown(values, FIGURES[claim.figure].digits, "+") if values else "rows are missing"
            ours += f", above {claim.above:g}" if claim.above else ""
            ours += f", {len(seeds)} of {experiment.seeds} seeds" if 0 < len(seeds) < experiment.seeds else ""
            said = f"{said} of the margin" if said == "within noise" and claim.above < 0 and values[2] < 0 else said
            lines.append([f"[{experiment.name}](#{experiment.name})", claim.text, claim.paper, ours,
                          others(claim, found), f"**{said}**" if len(seeds) >= 3 else f"({said})" if said else ""])
    for name, one in measured.items():
        for claim in one["claims"]:
            value, low, high = claim["effect"]
            ours = f"{value:+.2g} ({low:+.2g} to {high:+.2g})"
            ours += f", above {claim['above']:g}" if claim["above"] else ""
            said = verdict(low, high, claim["above"])
            trained = any(part.startswith("runs/") for part in one["seconds"])
            lines.append([f"[{name}](#{name})", claim["text"], claim["paper"], ours, "",
                          f"({said})" if trained else f"**{said}**"])
    return markdown(["", "claim", "the paper", "effect here", "by the other figures", "verdict"], lines)


def others(claim: Claim, found: dict[str, Found]) -> str:
    """The same effect by those of the three figures of quality that the claim is not about."""
    quality, cells = ("scorer", "judge", "right"), []
    for figure in quality if claim.figure in quality and set(claim.weights.values()) != {1.0} else ():
        values = judged(replace(claim, figure=figure), found)[1]
        if figure != claim.figure and values:
            cells.append(f"{figure} {shown(values, FIGURES[figure].digits, '+')}")
    return "; ".join(cells)


def rows_table(experiment: Experiment, found: dict[str, Found]) -> str:
    head = ["", "row", *[f"the paper: {experiment.paper}"] * bool(experiment.paper),
            *[FIGURES[figure].heading for figure in experiment.figures]]
    colours = "colour" in experiment.figures
    head += ["hue, saturation, value, %", "hue, degrees"] * colours + ["seeds"]
    lines, base = [], []
    for line in experiment.lines:
        cells = [line.label, f"[{line.row.name}](#{line.row.name})", *[line.paper] * bool(experiment.paper)]
        if one := found.get(line.row.name):
            seeds = ", ".join(map(str, sorted(one.runs)))
            shift = [one.mean(lambda run, key=key: run["colour_shift"][key] or 0.0) for key in (*HSV, "hue_degrees")]
            cells += [shown(one.figures[key], FIGURES[key].digits) for key in experiment.figures]
            cells += [" ".join(f"{value:+.1f}" for value in shift[:3]), f"{shift[3]:.1f}"] * colours
            cells.append(seeds if len(one.runs) >= experiment.seeds else f"**only {seeds}**")
            run = next(iter(one.runs.values()))
            told = {key: f"{100 * run[f'base_{key}'].count('1') / len(run[f'base_{key}']):.1f}"
                    for key in ("right", "clean", "matches") if f"base_{key}" in run}
            told["diversity"] = f"{run['base_diversity']:.4f}"
            base = [["the model as it is", "", *[""] * bool(experiment.paper),
                     *[told.get(key, "") for key in experiment.figures], *["", ""] * colours, ""]]
        else:
            cells += ["missing", *[""] * (len(head) - len(cells) - 1)]
        lines.append(cells)
    return markdown(head, lines + base)


def courses(experiment: Experiment, found: dict[str, Found]) -> dict[str, list[list[float]]]:
    """Of the rows that draw their own pictures, with the first seed that is there."""
    runs = {line.label: found[line.row.name].runs for line in experiment.lines if line.row.name in found}
    return {label: some[min(some)]["course"] for label, some in runs.items() if "course" in some[min(some)]}


def search_says(experiment: Experiment, found: dict[str, Found]) -> str:
    wins = {line.row.name: found[line.row.name].figures["scorer"][0]
            for line in experiment.lines if line.row.name in found}
    text = ""
    for name, rate in chosen(wins).items():
        text += f"The best rate for {name} is {rate}"
        if rate == RATES[name][0]:
            text += ", the smallest that was tried: a smaller one may be better, and changes less"
        elif rate == RATES[name][-1]:
            text += ", the largest that was tried: a larger one may be better"
        text += ", which is the one in use.\n\n" if CHOSEN[name] == rate else f"; **{CHOSEN[name]} is in use.**\n\n"
    return text


def contestants(scale: Scale) -> set[str]:
    """The names of the rows that the leaderboard may have: those whose test is the same."""
    return {line.row.name for experiment in experiments(scale).values() for line in experiment.lines
            if not line.row.validation and not line.row.people}


def leaderboard(found: dict[str, Found], scale: Scale) -> str:
    """All rows on the test's prompts under one budget, the best first."""
    figure, lines = FIGURES["right"], []
    for name in sorted(contestants(scale) & set(found), key=lambda name: -found[name].figures["right"][0]):
        one = found[name]
        run = one.runs[min(one.runs)]
        if run["unet_rows"] <= BUDGET:
            loss, online = (re.search(rf"--{option} (\S+)", " ".join(run["commands"])) for option in ("loss", "method"))
            file = Path(inspect.getsourcefile(LOSSES[loss[1]].function)) if loss else ROOT / "train_online.py"
            lines_of = f"{file.relative_to(ROOT)}, {len(file.read_text().splitlines())}"
            code = lines_of if loss or online else "none"
            lines.append([
                f"[{name}](#{name})", shown(one.figures["right"], figure.digits), f"{run['unet_rows']:,}",
                f"{one.seconds:.0f}", one.megabytes, code, run["commit"][:10], ", ".join(map(str, sorted(one.runs)))])
            right = 100 * run["base_right"].count("1") / len(run["base_right"])
    if not lines:
        return ""
    lines.append(["the model as it is", f"{right:.{figure.digits}f}", "0", "", "", "none", "", ""])
    return (
        "## Leaderboard\n\nOne budget, one figure: with at most "
        f"{BUDGET:,} U-Net rows, pool and training together, how many pictures of the test prompts are right by the "
        "judge; every row of the test's prompts that is within it. The first of a sorted list was lucky, too: look at "
        "the intervals. An entry is a loss in one file and a row in `benchmarks/results/experiments.py`; "
        "[docs/extending.md](docs/extending.md) says how to add one.\n\n"
        + markdown(["", figure.heading, "U-Net rows", "seconds", "training, MB", "loss, lines", "commit",
                    "seeds"], lines))


def commands(name: str, found: dict[str, Found]) -> str:
    """How a row was made, where, and at what cost."""
    if name not in found:
        return f"### {name}\n\nMissing.\n\n"
    one = found[name]
    first = one.runs[min(one.runs)]
    made = "; ".join(
        f"seed {seed}: {re.sub('(?<=[0-9a-f]{10})[0-9a-f]+', '', run['commit'])} on {run['machine']['cpu']}, "
        f"{run['machine']['cores']} cores" for seed, run in sorted(one.runs.items()))
    shared = [part.command for part in shared_parts(FULL)]
    own = [command for command in first["commands"] if command not in shared]
    return (f"### {name}\n\n{first['unet_rows']:,} U-Net rows, {one.seconds:.0f} s. {made}\n\n```\n"
            + "".join(f"python {command}\n" for command in own) + "```\n\n")


def page(found: dict[str, Found], measured: dict[str, dict], scale: Scale) -> str:
    some = everything(scale)
    wanted: dict[str, int] = {}                                # by its name, the seeds that a row should have
    for one in experiments(scale).values():
        wanted |= {line.row.name: max(one.seeds, wanted.get(line.row.name, 0)) for line in one.lines}
    runs = [run for one in found.values() for run in one.runs.values()] + list(measured.values())
    machines = sorted({"{cpu}, {cores} cores, torch {torch}".format(**run["machine"]) for run in runs})
    total = math.fsum(seconds for _, seconds in {part for run in runs for part in own_seconds(run).items()})
    few = [name for name, seeds in wanted.items() if name in found and len(found[name].runs) < seeds]
    missing = [name for name in wanted if name not in found] + [
        name for name in measures(scale) if name not in measured]
    text = HEAD.format(
        quick="" if scale == FULL else " --quick", resamples=RESAMPLES, images=NUM_IMAGES,
        scale=f"Pools of {scale.pools[-1]} for {scale.sizes[-1]} prompts, {scale.train_steps} steps of training, "
        f"{scale.test_prompts} test prompts with {NUM_IMAGES} pictures each."
        + ("" if scale == FULL else " **So few try the machinery, and say nothing of the claims.**"),
        few=f" Fewer seeds than they should have: {', '.join(few)}." if few else "",
        made=f"{len(runs)} runs, {total:,.0f} s in all, the pool not counted"
        + "".join(f"; {machine}" for machine in machines) + "."
        + (f" **Missing rows: {', '.join(missing)}.**" if missing else ""))
    text += "\n## Verdicts\n\n" + verdicts(found, measured, scale)
    for one in some.values():
        text += f"## {one.name}\n\n{one.title}. {one.note}".rstrip() + "\n\n"
        if isinstance(one, Experiment):
            text += rows_table(one, found)
            if one.name in ("search", "search-online"):
                text += search_says(one, found)
            if any(line.row.name in found for line in one.lines):
                text += f"![{one.title}](docs/results/{one.name}.svg)\n\n"
            if courses(one, found):
                text += f"Over training, with the first seed:\n\n![courses](docs/results/{one.name}-course.svg)\n\n"
        else:
            table_of = measured.get(one.name)
            text += markdown(table_of["head"], table_of["lines"]) if table_of else "Missing.\n\n"
            text += "```\n" + "".join(f"python {part.command}\n" for part in measure_parts(one)[-1:]) + "```\n\n"
    text += leaderboard(found, scale)
    text += "## Commands\n\nDIR is `--out`. U-Net rows are what one seed of a row takes alone, its pool included (a "
    text += "backward pass counts as two); seconds leave out what all rows share. Most rows begin with\n\n```\n"
    text += "".join(f"python {part.command}\n" for part in shared_parts(scale)[:2]) + "```\n\n(the last for those of "
    text += "`search`, `why` and `mend`: `prompts_validation.txt --limit " + f"{scale.validation_prompts}`, `base-"
    text += "validation`), and go on, with the first seed, as follows.\n\n"
    return text + "".join(commands(name, found) for name in wanted)


def readme_table(found: dict[str, Found]) -> str:
    """README.md's ten lines."""
    figures, lines = ("scorer", "judge", "right", "colour", "diversity"), []
    for label, name in README.items():
        if one := found.get(name):
            seeds = "" if len(one.runs) > 2 else f" ({len(one.runs)} of 3 seeds)"
            lines.append([label + seeds, *(shown(one.figures[key], FIGURES[key].digits) for key in figures)])
            run = next(iter(one.runs.values()))
    right = 100 * run["base_right"].count("1") / len(run["base_right"])
    lines.insert(0, ["the model as it is", "", "", f"{right:.1f}", "", f"{run['base_diversity']:.4f}"])
    return markdown(["", *(FIGURES[key].heading for key in figures)], lines)


def with_table(text: str, table_now: str) -> str:
    """README.md with its table between the two marks renewed."""
    if not all(text.count(mark) == 1 for mark in MARKS):
        raise UserError(f"README.md: {MARKS[0]} and {MARKS[1]} are to stand in it once each, around its table")
    before, _, rest = text.partition(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{table_now}{MARKS[1]}{rest.partition(MARKS[1])[2]}"


def write_page(rows: Path, scale: Scale, top: Path, out: Path, only: list[str]) -> None:
    """TOP/RESULTS.md with TOP/docs/results/*.svg, all experiments; README.md's table, where there is a README.md; and
    OUT/results.json, those of `only`."""
    found, measured, known = read_rows(rows, scale), read_measures(rows, scale), everything(scale)
    for experiment in experiments(scale).values():
        lines = [(line.label, found[line.row.name].figures) for line in experiment.lines if line.row.name in found]
        if lines:
            write_text(top / "docs" / "results" / f"{experiment.name}.svg", chart(experiment, lines))
        if some := courses(experiment, found):
            write_text(top / "docs" / "results" / f"{experiment.name}-course.svg", course_chart(experiment.title, some))
    write_text(top / "RESULTS.md", page(found, measured, scale).rstrip() + "\n")
    readme = top / "README.md"
    if readme.is_file() and found:
        write_text(readme, with_table(readme.read_text(), readme_table(found)))
    entries = results(found, measured, [known[name] for name in only])
    write_text(out / "results.json", json.dumps(entries, indent=2) + "\n")
