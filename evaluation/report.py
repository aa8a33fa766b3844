"""report.html: a comparison as one page that needs no network and no server, for a desk or a phone. Charts are inline
SVG, pictures are data URIs; the little script sorts the pairs, and the page reads well without it.

The address can say how: report.html#sort=candidate/pickscore&first=regressions
"""

import base64
import io
import json
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from model.files import is_a, read_lines

from .statistics import HSV, RGB, rgb_levels

AREA, TOTAL_AREA = 190_000, 48_000_000           # pixels of a thumbnail (360x528), and of all: 20 MB or so
KEPT_AREA = 128 * 128                            # up to here a picture is shown as it is, enlarged without blur
CURVES = ("loss", "dpo", "stat", "mse_w", "implicit_accuracy", "grad_norm")
POINTS, MEANS = 600, 60                          # of a training curve, as it is and smoothed

FRAME = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("report.js").read_text(encoding="utf-8")


def page(
    report: dict, rows: list[dict], scores: dict[str, list[dict]], picture: Callable[[str, dict], Image.Image],
    runs: dict[str, list[dict]],
) -> str:
    """`report` is report.json's content; scores[side][i] what is known of rows[i]'s picture there, picture(side, row)
    opens it; runs are training logs by name. The first side is the baseline."""
    sides, scorers = list(report["sides"]), list(report["mean_score"])
    histograms = {side: np.zeros((6, 256)) for side in sides}
    area = min(AREA, TOTAL_AREA // (len(rows) * len(sides)))
    pairs = []
    for i, row in enumerate(rows):
        images = {side: picture(side, row).convert("RGB") for side in sides}
        for side, image in images.items():
            histograms[side] += np.reshape(image.convert("HSV").histogram() + image.histogram(), (6, 256))
        pairs.append(pair(i, row, images, {side: scores[side][i] for side in sides}, scorers, area))
    differences = {
        f"{side}/{name}": [float(f"{scores[side][i][name] - scores[sides[0]][i][name]:.6g}") for i in range(len(rows))]
        for side in sides[1:] for name in scorers}
    choices = "".join(
        f'<option value="{escape(name)}">{escape(name if len(sides) > 2 else name.partition("/")[2])}</option>'
        for name in differences)
    title = escape(f"{', '.join(sides[1:])} against {sides[0]}")
    models = "".join(
        f"<p>{key(i)}<b>{escape(side)}</b> is {escape(report['sides'][side])}</p>" for i, side in enumerate(sides))
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in report["settings"].items() if value != "")
    body = [
        f"<h1>{title}</h1>{models}",
        f'<p class="soft">{report["pictures"]} pictures a side, from the same seeds; {escape(settings)}</p>',
        *[f'<p class="down">Not drawn alike: {escape(line)}</p>' for line in report.get("not_drawn_alike", [])],
        *[f'<p class="down">{escape(line)}</p>' for line in report["left_out"]],
        headline(report, sides, scorers),
        win_rates(report, sides, scorers) if scorers else "",
        "<h2>Colours</h2>", colour_charts(histograms),
        *[f"<h2>Training: {escape(Path(run).name)}</h2>" + training_curves(log) for run, log in runs.items()],
        "<h2>Pairs</h2>",
        '<div class="controls" id="controls" hidden><label>Sort by <select id="by"><option value="">prompt</option>'
        f'{choices}</select></label> <label><select id="first" aria-label="order">'
        '<option value="regressions">biggest regressions first</option>'
        '<option value="gains">biggest gains first</option></select></label></div>',
        f'<div class="grid" style="--least: {min(230 * len(sides), 1100)}px" id="pairs">{"".join(pairs)}</div>']
    return FRAME.substitute(
        title=title, style=STYLE, script=SCRIPT, body="\n".join(body),
        differences=json.dumps(differences).replace("<", "\\u003c"))           # no </script> in a scorer's name


def key(i: int) -> str:
    return f'<i class="key" style="background: var(--s{colour(i)})"></i>'


def colour(i: int) -> int:
    """The baseline is grey; candidates share five colours."""
    return (i - 1) % 5 + 1 if i else 0


def percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.1f} %"


def headline(report: dict, sides: list[str], scorers: list[str]) -> str:
    """A row a side: win rates over mean scores, and the colour shift."""
    extra = [name for name in ("diversity", "fid") if name in report]
    lines = []
    for i, side in enumerate(sides):
        cells = []
        for name in scorers:
            mean = f"<small>mean {report['mean_score'][name][side]:.4g}</small>"
            rate = report["candidates"][side]["win_rate"][name]["percent"] if i else None
            cells.append(f"<b>{percent(rate)}</b>{mean}" if i else mean)
        if i:
            shift = report["candidates"][side]["colour_shift"]
            cells += [percent(shift[name], "+") for name in HSV] + [f"{shift['hue_degrees']:.1f}°", rgb_levels(shift)]
        else:
            cells += [""] * 5
        cells += [f"{report[name][side]:.4g}" for name in extra]
        lines.append(f"<tr><th>{key(i)}{escape(side)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *scorers, *HSV, "hue angle", "RGB", *extra])
    return (
        f'<h2>At a glance</h2><div class="card wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
        '<p class="soft">Win rates leave ties out. Colours: change of the mean over all pixels; the hue angle is the '
        "distance of the mean hues on their circle, unsteady where all hues meet; RGB is in levels of 255.</p>")


def svg(drawing: str, height: int) -> str:
    """100 wide, stretched to whatever place there is; the style sheet keeps strokes as they are."""
    return f'<svg viewBox="0 0 100 {height}" preserveAspectRatio="none" aria-hidden="true">{drawing}</svg>'


def win_rates(report: dict, sides: list[str], scorers: list[str]) -> str:
    parts, one = [], len(sides) == 2
    for name in scorers:
        parts.append("" if one else f"<h3>{escape(name)}</h3>")
        for i, side in enumerate(sides[1:], 1):
            rate = report["candidates"][side]["win_rate"][name]
            low, high = rate["ci95"]
            drawing = '<path class="rail" d="M0 5h100"/><path class="half" d="M50 0v10"/>'
            if rate["percent"] is not None:
                drawing += (
                    f'<g style="stroke: var(--s{colour(i)})"><path class="interval" d="M{low:.2f} 5H{high:.2f}"/>'
                    f'<path class="dot" d="M{rate["percent"]:.2f} 5h.001"/></g>')
            parts.append(
                f'<div class="bar"><span>{key(i)}{escape(name if one else side)}</span>{svg(drawing, 10)}'
                f"<b>{percent(rate['percent'])}</b><small>{low:.1f} to {high:.1f}; {rate['wins']} won, "
                f"{rate['ties']} tied, {rate['losses']} lost</small></div>")
    return (
        f'<h2>Win rates against {escape(sides[0])}</h2><div class="card bars">{"".join(parts)}<div class="bar"><span>'
        '</span><div class="ends"><span>0 %</span><span>50 %</span><span>100 %</span></div></div></div>'
        '<p class="soft">With 95 % intervals (Wilson; each picture counts for itself, those of one prompt, too). One '
        'that reaches across 50 % leaves open who is better.</p>')


def line(values: Sequence[float], low: float, high: float, attributes: str) -> str:
    """A polyline over the whole of a 100 x 100 drawing; what leaves low to high is cut off."""
    step, span = 100 / max(len(values) - 1, 1), high - low or 1
    points = [f"{i * step:.4g} {100 * (1 - min(max((v - low) / span, 0), 1)):.4g}" for i, v in enumerate(values)]
    return f'<path {attributes} d="M{"L".join(points)}"/>'


def chart(title: str, note: str, lines: list[str], left: str, right: str, below: str = "") -> str:
    drawing = svg('<path class="rail" d="M0 100h100"/>' + "".join(lines), 100)
    return (
        f'<div class="card chart"><h3>{escape(title)} <small>{escape(note)}</small></h3>{drawing}{below}'
        f'<div class="ends"><span>{escape(left)}</span><span>{escape(right)}</span></div></div>')


def colour_charts(histograms: dict[str, np.ndarray]) -> str:
    """How often each level comes in every channel, in 64 bins. The ends, where black, white and grey lie, may be cut
    off, so that the rest can be seen."""
    charts = []
    for c, name in enumerate((*HSV, *RGB)):
        bins = [counts[c].reshape(64, 4).sum(axis=1) / counts[c].sum() for counts in histograms.values()]
        top = max(values[1:-1].max() for values in bins) or 1
        lines = [line(values, 0, top, f'style="stroke: var(--s{colour(i)})"') for i, values in enumerate(bins)]
        ends = ("0°", "360°") if name == "hue" else ("0", "255")
        charts.append(chart(name, "", lines, *ends, '<div class="hues"></div>' if name == "hue" else ""))
    return f'<div class="grid" style="--least: 165px">{"".join(charts)}</div>'


def training_curves(log: list[dict]) -> str:
    charts = []
    first, last = (str(log[i]["step"]) if log else "" for i in (0, -1))
    for name in CURVES:
        values = [entry.get(name) for entry in log]
        if not values or not all(is_a(value, float) and abs(value) < 1e30 for value in values):
            continue
        means = [float(np.mean(part)) for part in np.array_split(values, min(MEANS, len(values)))]
        few = values[::math.ceil(len(values) / POINTS)]
        low, high = min(few), max(few)
        blue = 'style="stroke: var(--s1)"'
        lines = [line(few, low, high, f'class="raw" {blue}'), line(means, low, high, blue)]
        note = f"{low:.3g} to {high:.3g}, last {means[-1]:.3g}"
        charts.append(chart(name.replace("_", " "), note, lines, f"step {first}", last))
    return f'<div class="grid" style="--least: 300px">{"".join(charts)}</div>' if charts else "<p>Nothing yet.</p>"


def read_log(run: str) -> list[dict]:
    """The lines of a training run; the last may be half written, for the run may go on."""
    return read_lines(Path(run) / "log.jsonl", cut=True, step=int, loss=float)


def pair(
    i: int, row: dict, images: dict[str, Image.Image], scores: dict[str, dict], scorers: list[str], area: int,
) -> str:
    base, figures = scores[next(iter(images))], []
    for n, (side, image) in enumerate(images.items()):
        lines = []
        for name in scorers:
            score, change = scores[side][name], scores[side][name] - base[name]
            kind = "up" if change > 0 else "down" if change < 0 else ""
            shown = f'<td class="{kind}">{change:+.2g}</td>' if n else ""
            lines.append(f"<tr><th>{escape(name)}</th><td>{score:.4g}</td>{shown}</tr>")
        figures.append(
            f'<figure><img loading="lazy" decoding="async" alt="" width="{image.width}" height="{image.height}" '
            f'src="{data_uri(image, area)}"><figcaption>{key(n)}{escape(side)}<table>{"".join(lines)}</table>'
            "</figcaption></figure>")
    plain = " plain" if image.width * image.height <= KEPT_AREA else ""
    return (
        f'<article class="card pair{plain}" id="pair-{i}"><h3>{escape(row["prompt"])}</h3><small>seed {row["seed"]}, '
        f'{escape(row["file"])}</small><div class="sides">{"".join(figures)}</div></article>')


def data_uri(image: Image.Image, area: int) -> str:
    if image.width * image.height <= KEPT_AREA:
        form, options = "PNG", {"optimize": True}
    else:
        scale = min(1.0, math.sqrt(area / (image.width * image.height)))
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image, form, options = image.resize(size, Image.Resampling.LANCZOS), "JPEG", {"quality": 80, "optimize": True}
    file = io.BytesIO()
    image.save(file, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
