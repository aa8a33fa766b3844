"""What is measured on a pool or on trained LoRAs, without a training of its own. Run by `python -m benchmarks.results`.

    python -m benchmarks.results.measures fig5b --pool results/pool --out results/measures/fig5b

OUT/measure.json: `head` and `lines` of a table, and `claims`, each with `text`, `paper`, `effect` (the value and the
ends of its 95 % interval, over prompts) and the threshold that it is to lie `above`.
"""

import cli

# isort: split
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from dataset.pool import Pool, select
from dataset.reader import Pairs
from losses.diffusion_dpo import squared_error
from model.checkpoint import Pipeline, load_pipeline
from model.errors import UserError
from model.files import read_json, write_text
from model.scorers import load_scorer
from sampling import Drawing, add_noise, draw_pictures, seeded

from .parts import STEPS
from .statistics import draws, interval

MODEL, DTYPE = "paper-people", torch.bfloat16


def over_prompts(values: ndarray, figure: Callable[[ndarray], ndarray]) -> ndarray:
    """Of the mean over prompts of values (prompts, ...) the `figure`, itself and in every draw of the bootstrap:
    (1 + resamples, ...) -> (1 + resamples,)."""
    counts = draws(1, len(values))[1]
    return figure(np.tensordot(counts, values, 1) / len(values))


def cell(values: ndarray, digits: int = 2) -> str:
    value, low, high = interval(values)
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def claim(text: str, values: ndarray, paper: str = "", above: float = 0.0) -> dict:
    return {"text": text, "paper": paper, "effect": [float(f"{value:.4g}") for value in interval(values)],
            "above": above}


# Fig. 5b

def fig5b(pool: Path) -> dict:
    """How far winners and losers are apart in the means and in the deviations of their latents' channels."""
    data = Pairs([pool], load_pipeline(MODEL), "pool")
    latents = torch.stack([shard["pool"][i] for shard, i, _ in data.rows]).float()                  # (n, 20, 4, h, w)
    scores = [line["scores"] for line in data.lines]
    statistics = {"mean": latents.mean((3, 4)).numpy(), "deviation": latents.std((3, 4)).numpy()}        # (n, 20, 4)

    def distance(statistic: ndarray, size: int) -> tuple[ndarray, ndarray]:
        """Of winners from the losers of pools of `size`, in deviations of that difference (Cohen's d of pairs): all
        channels together, as the length of a vector (1 + resamples,); and each (4,)."""
        pairs = np.array([select(row[:size], 1, size) for row in scores])                        # (n, 2)
        ends = np.take_along_axis(statistic, pairs[:, :, None], axis=1)                          # (n, 2, 4)
        difference = ends[:, 0] - ends[:, 1]

        def d(moments: ndarray) -> ndarray:                                                      # (..., 2, 4)
            return moments[..., 0, :] / np.sqrt(moments[..., 1, :] - moments[..., 0, :] ** 2)

        every = over_prompts(np.stack([difference, difference ** 2], axis=1), d)                 # (1 + resamples, 4)
        return np.sqrt((every ** 2).sum(-1)), every[0]

    sizes, lines, lengths = [size for size in (2, 5, 10, 20) if size <= latents.shape[1]], [], {}
    for size in sizes:
        row = [f"N = {size}"]
        for name, statistic in statistics.items():
            lengths[name, size], each = distance(statistic, size)
            row += [cell(lengths[name, size]), " ".join(f"{value:+.2f}" for value in each)]
        lines.append(row)
    small, large = sizes[0], sizes[-1]
    return {
        "head": ["", "means", "each channel", "deviations", "each channel"], "lines": lines,
        "claims": [
            claim("winners and losers differ in channel means more than in deviations",
                  lengths["mean", large] - lengths["deviation", large], "Fig. 5b, no figures"),
            claim("the means differ more, the larger the pool", lengths["mean", large] - lengths["mean", small])]}


# Previews

def preview_gap(pool: Path, prompts: int, steps: list[int]) -> dict:
    """What is left of the gap between winner and loser where a pool is drawn for less."""
    pipeline = load_pipeline(MODEL, torch.device("cpu"), DTYPE)
    rows, scorer = Pairs([pool], pipeline, "pool").lines[:prompts], load_scorer(MODEL)
    drawing = Drawing(steps=STEPS).for_model(pipeline)
    size = len(rows[0]["scores"])
    full = np.array([max(row["scores"]) - min(row["scores"]) for row in rows])
    ways: dict[str, tuple[float, ndarray, list]] = {}          # -> share of the U-Net rows, gaps, found

    def gaps(pairs: list[tuple[int, int]], scores: list[list[float]]) -> ndarray:
        return np.array([row[winner] - row[loser] for (winner, loser), row in zip(pairs, scores)])

    final = [row["scores"] for row in rows]
    truth = [select(scores, 1, size) for scores in final]
    for n in sorted({size // 2, 3 * size // 5, 7 * size // 10}):
        pairs = [select(scores[:n], 1, n) for scores in final]
        ways[f"{n} pictures"] = n / size, gaps(pairs, final), pairs
    for k in steps:
        preview, seen = replace(drawing, steps=k), []
        for row in cli.progress(rows, len(rows), f"{k} steps"):
            texts = [row["prompt"]] * size
            images = [image for _, image in draw_pictures(pipeline, preview, texts, row["seeds"])]
            seen.append(scorer(images, texts).tolist())
        pairs = [select(scores, 1, size) for scores in seen]
        ways[f"{size} pictures of {k} steps"] = k / STEPS, gaps(pairs, seen), pairs
        previewed = Pool(size, loser_rank=size, preview_steps=k, preview_keep=2)
        ends = [previewed.ends(scores) for scores in seen]
        pairs = [select([score if i in kept else None for i, score in enumerate(scores)], 1, size)
                 for kept, scores in zip(ends, final)]
        share = (size * k + 4 * STEPS) / (size * STEPS)
        ways[f"previews of {k} steps, 2 and 2 drawn in full"] = share, gaps(pairs, final), pairs

    def kept(gap: ndarray) -> ndarray:
        return over_prompts(np.stack([gap, full], axis=1), lambda means: means[:, 0] / means[:, 1])

    lines = []
    for name, (share, gap, pairs) in sorted(ways.items(), key=lambda item: item[1][0]):
        found = [100 * np.mean([pair[side] == true[side] for pair, true in zip(pairs, truth)]) for side in (0, 1)]
        lines.append([name, f"{share:.2f}", cell(kept(gap)), f"{found[0]:.0f} / {found[1]:.0f}"])
    best, same = f"previews of {steps[0]} steps, 2 and 2 drawn in full", f"{3 * size // 5} pictures"
    return {
        "head": ["", "share of the U-Net rows", "share of the gap", "true winner / loser found, %"], "lines": lines,
        "claims": [claim(f"{best}, keep more of the gap than {same}", kept(ways[best][1]) - kept(ways[same][1]))]}


# Lambda and the size of the latent

def gradient_noise(pipeline: Pipeline, pixels: int, prompts: list[str], each: int = 8) -> ndarray:
    """(prompts,): the variance that pairs of pictures of `pixels` put on the gradient of the DPO loss for a channel
    mean of eps, up to beta and a factor. At the start that gradient is mean_hw(error_w - error_l), error = eps_ref -
    noise, for one t and noise a pair; which of two pictures won is left to chance, so that its mean is 0."""
    drawing = Drawing(steps=STEPS, height=pixels, width=pixels).for_model(pipeline)
    alphas_cumprod, found = pipeline.alphas_cumprod, []
    for k, prompt in enumerate(cli.progress(prompts, len(prompts), f"{pixels}x{pixels}")):
        pair = torch.stack([latent for latent, _ in draw_pictures(pipeline, drawing, [prompt] * 2, [2 * k, 2 * k + 1])])
        g = seeded("gradient noise", k)
        t = torch.randint(0, 1000, (each,), generator=g)
        noise = torch.randn((each, *pair.shape[1:]), generator=g)
        context, means = drawing.encode([prompt], pipeline).expand(each, -1, -1), []
        for x0 in pair:
            with torch.no_grad():
                eps = pipeline.unet(add_noise(x0.expand_as(noise), noise, t, alphas_cumprod).to(DTYPE), t, context)
            means.append((eps.float() - noise).mean((2, 3)))                                     # (each, 4)
        found.append(((means[0] - means[1]) ** 2).mean().item())
    return np.array(found)


def lambda_rule(pool: Path, prompts: int, pixels: list[int]) -> dict:
    """Whether the gradient noise on a channel mean falls as 1/(h w): what `--lambda-stat auto` is founded on."""
    pipeline = load_pipeline(MODEL, torch.device("cpu"), DTYPE)
    texts = [line["prompt"] for line in Pairs([pool], pipeline, "pool").lines[:prompts]]
    sides = [side // pipeline.vae.downscale for side in pixels]
    noise = np.stack([gradient_noise(pipeline, side, texts) for side in pixels], axis=1)         # (n, sizes)
    places = 2 * np.log(sides)
    weights = (places - places.mean()) / ((places - places.mean()) ** 2).sum()
    slope = over_prompts(noise, lambda means: np.log(means) @ weights)
    own = sides.index(16) if 16 in sides else 0
    lines = [[f"{side}x{side}", cell(over_prompts(noise[:, i], lambda mean: 1e6 * mean), 1),
              cell(over_prompts(noise[:, [i, own]], lambda means: means[:, 0] / means[:, 1])),
              f"{(sides[own] / side) ** 2:.2f}"] for i, side in enumerate(sides)]
    lines.append(["slope of the logarithms", "", cell(slope), "-1"])
    return {
        "head": ["latent", "variance, 1e-6", f"to that at {sides[own]}x{sides[own]}", "by the rule 1/(h w)"],
        "lines": lines,
        "claims": [claim("the variance falls as 1/(h w): a slope of -1, within 0.25", -np.abs(slope + 1), "", -0.25)]}


# What training does to the errors

BANDS = ((0, 200), (200, 400), (400, 600), (600, 800), (800, 1000))


def bands(data: Path, loras: list[str], prompts: int) -> dict:
    """By how much trained LoRAs have lowered the errors of winners and of losers, by t."""
    base = load_pipeline(MODEL, torch.device("cpu"), torch.float32)
    pairs, alphas_cumprod = Pairs([data], base), base.alphas_cumprod
    rows = list(range(min(prompts, len(pairs.rows))))

    @torch.no_grad()
    def errors(pipeline: Pipeline) -> ndarray:
        """(prompts, bands, 2), winners and losers."""
        found: list[Tensor] = []
        for i in cli.progress(rows, len(rows), "errors"):
            x0, context = pairs.batch([i], torch.device("cpu"), torch.float32)                    # (2, 4, h, w)
            g, each = seeded("errors by t", i), 2
            t = torch.cat([torch.randint(*band, (each,), generator=g) for band in BANDS])        # (bands * each,)
            noise = torch.randn((len(t), *x0.shape[1:]), generator=g)
            x_t = torch.cat([add_noise(x.expand_as(noise), noise, t, alphas_cumprod) for x in x0])
            eps = pipeline.unet(x_t, t.repeat(2), context.expand(len(x_t), -1, -1))
            found.append(squared_error(eps, noise.repeat(2, 1, 1, 1)).reshape(2, len(BANDS), each).mean(-1).T)
        return torch.stack(found).double().numpy()

    before, lines, claims = errors(base), [], []
    for item in loras:
        name, _, path = item.partition("=")
        tuned = load_pipeline(MODEL, torch.device("cpu"), torch.float32)
        tuned.add_loras([path])
        tuned.merge_loras()
        gain = 1e3 * (before - errors(tuned))
        cells = [" / ".join(f"{value:+.1f}" for value in gain[:, i].mean(0)) for i in range(len(BANDS))]
        winners = over_prompts(gain.mean(1), lambda means: means[:, 0])
        lines.append([name, *cells, cell(winners, 1), cell(over_prompts(gain.mean(1), lambda means: means[:, 1]), 1)])
        claims.append(claim(f"{name}: the winner's error rises", -winners))
    head = ["gain, 1e-3", *(f"t {low} to {high - 1}" for low, high in BANDS), "winners, all t", "losers, all t"]
    return {"head": head, "lines": lines, "claims": claims}


# Judging the judges

def accuracy(report: Path) -> dict:
    """The table of evaluate.py --preference-accuracy."""
    rates = read_json(report, preference_accuracy=dict, pairs=int)["preference_accuracy"]
    names = {name: name.rpartition("results/")[2] for name in rates}             # of folders the end
    lines = [[names[name], "{:.1f} ({:.1f} to {:.1f})".format(rate["percent"], *rate["ci95"])]
             for name, rate in rates.items()]
    return {"head": ["", "agrees with the judge, %, ties left out"], "lines": lines, "claims": [
        {"text": f"{names[name]} agrees with the judge more often than chance", "paper": "", "above": 50.0,
         "effect": [rate["percent"], *rate["ci95"]]} for name, rate in rates.items() if name != "judge"]}


MEASURES = {"accuracy": accuracy, "fig5b": fig5b, "preview-gap": preview_gap, "lambda": lambda_rule, "bands": bands}


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("measure", choices=tuple(MEASURES))
    parser.add_argument("--pool", type=Path, metavar="DIR", help="kept with --keep pool")
    parser.add_argument("--report", type=Path, metavar="FILE", help="of evaluate.py --preference-accuracy (accuracy)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="pairs (bands)")
    parser.add_argument("--loras", nargs="+", default=[], metavar="NAME=FILE", help="(bands)")
    parser.add_argument("--prompts", type=cli.whole(2), default=48, help="of the pool or the pairs")
    parser.add_argument("--steps", nargs="+", type=cli.whole(1), default=[4, 3, 5, 6], help="of previews")
    parser.add_argument("--pixels", nargs="+", type=cli.pixels, default=[48, 64, 96, 128], help="of pictures (lambda)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    args = parser.parse_args()
    function = MEASURES[args.measure]
    options = {name: getattr(args, name) for name in inspect.signature(function).parameters}
    if missing := [name for name, value in options.items() if value is None]:
        raise UserError(f"{args.measure}: give --{missing[0]}")
    found = function(**options)
    write_text(args.out / "measure.json", json.dumps(found, indent=2) + "\n")
    cli.print_table(found["head"], found["lines"])


if __name__ == "__main__":
    cli.run(main)
