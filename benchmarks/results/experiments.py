"""What is measured: the experiments, each with its rows and its claims. parts.py has how a row is made.

A claim is a weighted sum of its rows' figures, the effect, and a threshold that the effect is to lie above. `rises`,
`falls`, `beats`, `costs_little` and `cuts` make one. Rows that are equal are one row, in whichever experiment.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from losses import LOSSES

from .parts import (
    BETA,
    CHOSEN,
    FULL,
    LAMBDA_STAT,
    LIKE,
    ONLINE,
    ONLINE_ROWS,
    RATES,
    STEPS,
    Data,
    Online,
    Part,
    Row,
    Scale,
    Training,
    base_part,
    by_own_scorer,
    drawn,
    kept,
    own_scorer,
    part,
    pool_part,
    rendered,
    training_part,
)

PICKSCORE = "win rate by PickScore, %"
BOTH = (("scorer", "by the scorer"), ("judge", "by the judge"))


@dataclass(frozen=True)
class Line:
    """A row as a table shows it, with the paper's figure."""

    label: str
    row: Row
    paper: str = ""


@dataclass(frozen=True)
class Claim:
    text: str
    paper: str                                 # its figures
    figure: str                                # one of statistics.FIGURES
    weights: dict[str, float]                  # of the rows in the effect, by their names
    above: float = 0.0


@dataclass(frozen=True)
class Experiment:
    name: str
    title: str
    paper: str                                 # what the paper's column is
    lines: tuple[Line, ...]
    claims: tuple[Claim, ...] = ()
    charts: tuple[str, ...] = ("scorer", "judge")
    note: str = ""
    figures: tuple[str, ...] = ("scorer", "judge", "right", "colour", "diversity")
    seeds: int = 3                             # that a row should have


@dataclass(frozen=True)
class Measure:
    """What needs no training of its own; see measures.py."""

    name: str
    title: str
    needs: tuple[Part, ...]
    options: str
    note: str = ""


# Claims

def rises(text: str, paper: str, figure: str, rows: list[Row], sign: int = 1) -> Claim:
    """The slope of the figure over the rows in their order: by how much it rises from one row to the next."""
    places = [i - (len(rows) - 1) / 2 for i in range(len(rows))]
    squares = sum(place * place for place in places)
    return Claim(text, paper, figure, {row.name: sign * place / squares for row, place in zip(rows, places)})


def falls(text: str, paper: str, figure: str, rows: list[Row]) -> Claim:
    return rises(text, paper, figure, rows, sign=-1)


def beats(text: str, paper: str, row: Row, against: Row, figure: str = "judge") -> Claim:
    return Claim(text, paper, figure, {row.name: 1.0, against.name: -1.0})


def costs_little(text: str, paper: str, row: Row, against: Row, figure: str = "judge", margin: float = 5.0) -> Claim:
    """The figure falls by less than `margin`."""
    return replace(beats(text, paper, row, against, figure), above=-margin)


def cuts(text: str, paper: str, row: Row, against: Row, figure: str = "colour") -> Claim:
    return beats(text, paper, against, row, figure)


# The rows that several experiments have

def trained(scale: Scale, name: str, *data: Data, validation: bool = False, **options) -> Row:
    """DPO with the settings of all, but for what is given."""
    data = data or (kept(scale, scale.pools[-1], scale.pools[-1], scale.sizes[-1]),)
    return Row(name, Training(name, data, **{"batch_size": scale.batch_size} | options), validation=validation)


def dpo(scale: Scale) -> Row:
    return trained(scale, "dpo")


def lan(scale: Scale) -> Row:
    return replace(dpo(scale), name="lan", lan=True)


def hg_dpo(scale: Scale, name: str = "hg-dpo", *data: Data, **options) -> Row:
    return trained(scale, name, *data, lambda_stat=LAMBDA_STAT, **options)


def hg_dpo_for_fewer(scale: Scale) -> Row:
    """HG-DPO on the pairs of a fourth of the prompts."""
    return hg_dpo(scale, "hg-dpo-160", kept(scale, scale.pools[-1], scale.pools[-1], scale.fewer))


def beta(scale: Scale, times: int) -> Row:
    return trained(scale, f"beta-x{times}", beta=times * BETA)


def pools(scale: Scale) -> list[Row]:
    return [*(trained(scale, f"n{n}", kept(scale, n, n, scale.sizes[-1])) for n in scale.pools[:-1]), dpo(scale)]


def size(scale: Scale, prompts: int) -> Row:
    """DPO on the pairs of fewer prompts."""
    if prompts == scale.sizes[-1]:
        return dpo(scale)
    return trained(scale, f"size{prompts}", kept(scale, scale.pools[-1], scale.pools[-1], prompts))


def by_loss(scale: Scale, loss: str, name: str, **options) -> Row:
    """Any loss of the table, with what it learns from, about as many pictures a step as the others."""
    form, data = LOSSES[loss], ()
    if form.data == "pool":
        rows = kept(scale, scale.pools[-1], scale.pools[-1], scale.sizes[-1]).unet_rows
        data = (Data((pool_part(scale),), rows),)
    batch = {"pool": max(1, 2 * scale.batch_size // scale.pools[-1]), "labels": 2 * scale.batch_size}
    return trained(scale, name, *data, loss=loss, batch_size=batch.get(form.data, scale.batch_size),
                   beta=BETA if form.takes("beta") else None, **options)


def sft(scale: Scale) -> Row:
    return by_loss(scale, "sft", "sft", lr=CHOSEN["sft"])


def on_rendered(scale: Scale) -> Row:
    return trained(scale, "rendered", rendered(scale.sizes[-1]))


def longer_row(scale: Scale, cosine: bool) -> Row:
    """HG-DPO for four times the steps."""
    more = {"more": " --lr-schedule cosine"} if cosine else {}
    return hg_dpo(scale, "x4-cosine" if cosine else "x4", times=4, **more)


# The paper's claims

def table3(scale: Scale) -> Experiment:
    paper = {2: "66.1", 5: "81.9", 10: "84.2", 20: "88.7"}
    return Experiment(
        "table3", "Table 3: pools of N pictures, LAN, statistic matching", PICKSCORE,
        (*[Line(f"N = {n}", row, paper.get(n, "")) for n, row in zip(scale.pools, pools(scale))],
         Line("+ LAN", lan(scale), "89.3"), Line("+ statistic matching: HG-DPO", hg_dpo(scale), "85.3")),
        (*[rises(f"the win rate rises with N, {by}", "66.1, 81.9, 84.2, 88.7 %", figure, pools(scale))
           for figure, by in BOTH],
         costs_little("LAN costs less than 5 points", "88.7 to 89.3 %", lan(scale), dpo(scale)),
         costs_little("statistic matching costs less than 5 points", "88.7 to 85.3 %", hg_dpo(scale), dpo(scale))))


def table5(scale: Scale) -> Experiment:
    rows = [*(trained(scale, f"loser{rank}", kept(scale, scale.pools[-1], rank, scale.sizes[-1]))
              for rank in scale.pools[:-1]), dpo(scale)]
    paper = {2: "66.1", 5: "81.9", 10: "84.2", 20: "88.7"}
    return Experiment(
        "table5", "Table 5: the loser's rank in the pool", PICKSCORE,
        tuple(Line(f"rank {n}", row, paper.get(n, "")) for n, row in zip(scale.pools, rows)),
        tuple(rises(f"the win rate rises with the loser's rank, {by}", "66.1, 81.9, 84.2, 88.7 %", figure, rows)
              for figure, by in BOTH),
        note="The paper prints the figures of Table 3 here, digit for digit; one of the tables was copied by mistake, "
        "and the claim alone can be tested.")


def table6(scale: Scale) -> Experiment:
    rows = [size(scale, prompts) for prompts in scale.sizes]
    return Experiment(
        "table6", "Table 6: the number of prompts", PICKSCORE,
        tuple(Line(f"{n} prompts", row) for n, row in zip(scale.sizes, rows)),
        tuple(rises(f"the win rate rises with the prompts, {by}", "74.6 % at 2,000; 85.9 % at 50,000", figure, rows)
              for figure, by in BOTH),
        note="All rows train for the same number of steps: fewer prompts come again more often. The slope is that "
        "of the row with the fewest prompts; the others are alike.")


def table2(scale: Scale) -> Experiment:
    paper, base = {2: "6.6 4.5 1.3", 10: "20.9 5.5 3.9", 20: "24.9 12.5 3.4"}, dpo(scale)
    return Experiment(
        "table2", "Table 2: the colour shift", "change of hue, saturation, value, %",
        (*[Line(f"N = {n}", row, paper.get(n, "")) for n, row in zip(scale.pools, pools(scale))],
         Line("beta x4", beta(scale, 4), "17.6 8.0 3.0"), Line("beta x20", beta(scale, 20), "1.4 2.9 0.7"),
         Line("LAN", lan(scale), "0.2 2.0 0.6"), Line("statistic matching", hg_dpo(scale), "1.7 0.7 1.1")),
        (rises("the shift grows with N", "hue 6.6, 20.9, 24.9 %", "colour", pools(scale)),
         cuts("LAN cuts it", "hue 24.9 to 0.2 %", lan(scale), base),
         cuts("statistic matching cuts it", "hue 24.9 to 1.7 %", hg_dpo(scale), base),
         cuts("beta x4 cuts it", "hue 24.9 to 17.6 %", beta(scale, 4), base),
         cuts("beta x20 cuts it", "hue 24.9 to 1.4 %", beta(scale, 20), base),
         beats("beta x4 costs wins", "88.7 to 76.3 %", base, beta(scale, 4)),
         beats("beta x20 costs wins", "88.7 to 81.4 %", base, beta(scale, 20))),
        ("colour", "judge"))


def table1(scale: Scale) -> Experiment:
    others = {"SFT on winners": (sft(scale), "74.6"), "DPO on pairs of another source": (on_rendered(scale), "83.1"),
              "DPO, beta x4": (beta(scale, 4), "76.3"), "DPO, beta x20": (beta(scale, 20), "81.4")}
    return Experiment(
        "table1", "Table 1: against other ways", PICKSCORE,
        (*[Line(label, row, paper) for label, (row, paper) in others.items()], Line("HG-DPO", hg_dpo(scale), "85.3")),
        tuple(beats(f"HG-DPO wins more than {label}", f"85.3 against {paper} %", hg_dpo(scale), row)
              for label, (row, paper) in others.items()),
        note="The paper's other source is Pick-a-Pic, people's choices between other models' pictures; here it is the "
        "world's renderer, whose winners are without fault and whose losers are wrong (`paper_people/rendered.py`); "
        "its rate is that of DPO on the model's own pictures, and was not searched for it. AlignProp (39.6 %) is in "
        "`online`.")


def weight(scale: Scale) -> Experiment:
    rows = [*(replace(hg_dpo(scale), name=f"weight{percent}", weight=percent / 100) for percent in (25, 50, 75)),
            hg_dpo(scale)]
    return Experiment(
        "weight", "Fig. 8: HG-DPO's LoRA at a lower weight", "no figures",
        tuple(Line(f"weight {row.weight:g}", row) for row in rows),
        (rises("the win rate rises with the weight", "", "judge", rows),
         falls("diversity falls with the weight", "", "diversity", rows),
         costs_little("weight 0.5 costs less than 5 points", "", rows[1], rows[-1])),
        ("judge", "diversity"), note="The paper draws with weight 0.5, and says that 0.8 loses diversity.")


# Ours

def guidance(scale: Scale) -> Experiment:
    base = Row("base-guidance3", None, guidance=3.0)
    dpo3, hg_dpo3 = (
        replace(row, name=f"{row.name}-guidance3", guidance=3.0) for row in (dpo(scale), hg_dpo(scale)))
    return Experiment(
        "guidance", "Ours: less guidance", "",
        (Line("the model as it is, guidance 3", base), Line("DPO, guidance 3", dpo3),
         Line("HG-DPO, guidance 3", hg_dpo3), Line("HG-DPO, guidance 5", hg_dpo(scale))),
        (beats("HG-DPO makes more pictures right than the model as it is with guidance 3", "", hg_dpo(scale), base,
               "right"),
         beats("and it does so with guidance 3, too", "", hg_dpo3, base, "right")),
        ("judge", "right"), note="The paper draws with guidance 5, and so does everything here. This model is better "
        "with 3, without any training. Is HG-DPO more than a remedy for too much guidance? All rows are against the "
        "model as it is with guidance 5. The first has no training, so that its interval covers prompts alone.")


def pool_drawn(scale: Scale, name: str, steps: int, previews: int = 0, keep: int = 0) -> Row:
    """DPO on a pool of its own, of `scale.fewer` prompts; with previews only `keep` at both ends have all the steps."""
    pool = scale.pools[-1]
    options, passes = f"--steps {steps}", pool * steps
    if previews:
        options += f" --preview-steps {previews} --preview-keep {keep}"
        passes = pool * previews + 2 * keep * steps
    return trained(scale, name, drawn(name, scale.fewer, pool, options, passes))


def cheaper_pools(scale: Scale) -> dict[str, Row]:
    """The same share of the U-Net rows, spent in three ways: 20 * 4 + 2 * 2 * 10 = 12 * 10 = 20 * 6 passes."""
    pool, some = scale.pools[-1], 3 * scale.pools[-1] // 5
    keep, short, fewer = (2, 4, 6) if pool == 20 else (1, 2, 4)
    return {f"{pool} pictures, {STEPS} steps: all of it": size(scale, scale.fewer),
            f"previews of {short} steps, {keep} and {keep} drawn in full": pool_drawn(
                scale, "previews", STEPS, short, keep),
            f"{some} pictures": trained(scale, "smaller-pool", kept(scale, some, some, scale.fewer)),
            f"{pool} pictures, {fewer} steps": pool_drawn(scale, "fewer-steps", fewer)}


def previews(scale: Scale) -> Experiment:
    prompts, pools = scale.fewer, cheaper_pools(scale)
    full, previewed, smaller, shorter = pools.values()
    return Experiment(
        "previews", "Ours: a pool for three fifths of its price", "", tuple(map(Line, pools, pools.values())),
        (costs_little("previews cost less than 5 points", "", previewed, full),
         beats("previews are better than a smaller pool", "", previewed, smaller),
         beats("previews are better than fewer steps", "", previewed, shorter)),
        note=f"{prompts} prompts each. What was found: the three cheaper pools cost a few points, and 1,200 pictures a "
        "row cannot tell which of them costs least. See `preview-gap`, too.")


def pool_price(scale: Scale) -> Experiment:
    """From the paper's pool, 20 pictures of 50 steps, down."""
    pool, (whole, steps, short, keep) = scale.pools[-1], (50, 20, 5, 2) if scale == FULL else (4, 3, 2, 1)
    paper = pool_drawn(scale, "pool-whole", whole)
    fast = pool_drawn(scale, "pool-fast", steps, short, keep)
    rows = {f"{pool} pictures, {whole} steps": paper,
            f"{steps} steps, by previews of {short}, {keep} and {keep} drawn in full": fast, **cheaper_pools(scale)}
    most = paper.training.data[0].unet_rows
    return Experiment(
        "pool-price", "Ours: what a pool costs, and what comes of it", "",
        tuple(Line(f"{label.removesuffix(': all of it')}: {100 * row.training.data[0].unet_rows / most:.0f} %", row)
              for label, row in rows.items()),
        tuple(costs_little(f"{name} costs less than 2 points", "", row, paper, margin=2.0)
              for name, row in (("a pool by previews of few steps", fast), ("a pool of 10 steps", rows[
                  f"{pool} pictures, {STEPS} steps: all of it"]))),
        ("scorer", "judge", "right"),
        note=f"DPO on {scale.fewer} prompts; the share of the U-Net rows that the paper's pool takes, and the wins.")


def judges(scale: Scale) -> Experiment:
    rows = (*pools(scale), beta(scale, 4), beta(scale, 20), lan(scale), hg_dpo(scale), sft(scale), on_rendered(scale))
    return Experiment(
        "judges", "Ours: whether the judges agree", "",
        (*[Line(row.name, row) for row in rows], Line("240 steps", longer_row(scale, cosine=False)),
         Line("240 steps, cosine decay", longer_row(scale, cosine=True))),
        (Claim("the scorer, which chose the pairs, sees more wins than the judge", "", "gap", {"hg-dpo": 1.0}),
         beats("the longer the training, the further they are apart", "", longer_row(scale, cosine=False),
               hg_dpo(scale), "gap")),
        ("gap", "agree"), figures=("scorer", "judge", "gap", "agree"))


# The survey's methods

FAMILY = tuple(loss for loss in LOSSES if loss not in ("dpo", "hg-dpo", "sft"))          # also what was added just now


def family(scale: Scale) -> Experiment:
    rows = {loss: by_loss(scale, loss, loss, lr=CHOSEN.get(LIKE.get(loss, loss), CHOSEN["dpo"])) for loss in FAMILY}
    rows |= {"rwr-top": by_loss(scale, "rwr", "rwr-top", lr=CHOSEN["rwr"], more=" --top 0.1"),
             "discount": trained(scale, "discount", more=" --discount 0.9")}
    return Experiment(
        "family", "The survey's offline methods, from one pool", "",
        (Line("DPO", dpo(scale)), Line("HG-DPO", hg_dpo(scale)), Line("SFT", sft(scale)),
         *[Line(loss, row) for loss, row in rows.items()]),
        tuple(Claim(f"{loss} is better than the model as it is", "", "judge", {loss: 1.0}, 50.0) for loss in rows),
        ("judge", "right"),
        note="Each with about 60 pictures a step, 60 steps and beta 1000, as DPO has here; the rate is that of "
        "`search`, of dspo that of sft, of the others without rows there DPO's; other constants are train.py's "
        "defaults ([docs/methods.md](docs/methods.md) has the authors'). `rwr-top` is the sparse form of rwr, "
        "`discount` DPO with the noisier steps counting more.")


def online(scale: Scale) -> Experiment:
    rows = {method: Row(method, Online(method, method, CHOSEN[method])) for method in ONLINE}
    offline = {"DPO, pools of 20 for 160 prompts": size(scale, scale.fewer),
               "HG-DPO, the same": hg_dpo_for_fewer(scale)}
    return Experiment(
        "online", "The survey's online methods, under one budget", "",
        (*[Line(label, row) for label, row in offline.items()], *[Line(method, row) for method, row in rows.items()]),
        (*[Claim(f"{method} is better than the model as it is", "", "judge", {method: 1.0}, 50.0) for method in ONLINE],
         *[beats(f"HG-DPO wins more than {method}", "85.3 against 39.6 %" if method == "alignprop" else "",
                 offline["HG-DPO, the same"], row) for method, row in rows.items()]),
        ("scorer", "judge", "right"), seeds=2,
        note=f"About {ONLINE_ROWS:,} U-Net rows each, the pool's among them, and two seeds; a backward pass counts "
        "twice. Online methods draw by DDIM in 10 steps, are rewarded by the scorer that chose DPO's pairs, and have "
        "the rate of `search-online`. The reward gradients pay for the decoder and the scorer besides, which is not "
        "counted. Of AlignProp the paper's Table 1 says no more than its figure.")


def own_scorers(scale: Scale) -> Experiment:
    prompts = scale.fewer
    full = hg_dpo_for_fewer(scale)
    rows = [hg_dpo(scale, f"own-scorer-{n}", by_own_scorer(scale, n, prompts)) for n in scale.choices]
    more = [rises("the more choices, the more wins", "", "judge", rows)] if len(rows) > 1 else []
    return Experiment(
        "own-scorer", "A scorer from one's own choices, and what it is worth", "",
        (Line("the scorer that ships", full),
         *[Line(f"from {n} choices", row) for n, row in zip(scale.choices, rows)]),
        (beats("a scorer from the judge's choices wins more, by the judge, than the one that ships", "", rows[-1],
               full), *more),
        note=f"The judge plays a person who chooses between two pictures of a prompt; `train_scorer.py` makes a scorer "
        f"of the choices, beginning with the one that ships; the pool of {prompts} prompts is scored anew and "
        "HG-DPO learns from it. `accuracy` has how often each scorer agrees with the judge. Where no step was better "
        "on the choices held out, `train_scorer.py` leaves the scorer as it was, and the row is the first one again.")


# Settings, and what training does wrong: on other prompts than the test's, one training seed

def search(scale: Scale) -> Experiment:
    return Experiment(
        "search", "Settings: the learning rate of each loss", "",
        tuple(Line(f"{loss}, {rate}", by_loss(scale, loss, f"search-{loss}-{rate}", lr=rate, validation=True))
              for loss in CHOSEN if loss not in ONLINE for rate in RATES[loss]),
        figures=("scorer", "judge", "right", "clean", "matches"), seeds=1,
        note=f"Of each loss the rate with the most wins by the scorer, on {scale.validation_prompts} prompts that are "
        "neither the pairs' nor the test's; one training seed. The judge has no say.")


def search_online(scale: Scale) -> Experiment:
    return Experiment(
        "search-online", "Settings: the learning rate of each online method", "",
        tuple(Line(f"{method}, {rate}", Row(f"search-{method}-{rate}", Online(
            f"search-{method}-{rate}", method, rate, 0.25), validation=True))
            for method in ONLINE for rate in RATES[method]),
        figures=("scorer", "judge", "right", "clean", "matches"), seeds=1,
        note="As `search`, with a fourth of the rows of `online`.")


def chosen(wins: dict[str, float]) -> dict[str, str]:
    """Win rates by the scorer, by the search's rows -> the best rate of each loss and method whose rows are all there.
    """
    rates = {name: {rate: wins.get(f"search-{name}-{rate}") for rate in RATES[name]} for name in CHOSEN}
    return {loss: max(found, key=found.get) for loss, found in rates.items() if None not in found.values()}


def why(scale: Scale) -> Experiment:
    prompts = scale.sizes[-1]
    data = {f"drawn with guidance {n}": drawn(
        f"own-guidance{n}", prompts, 2, f"--steps {STEPS} --guidance {n}", 2 * STEPS) for n in (1, 2)}
    data |= {"drawn with guidance 5": kept(scale, 2, 2, prompts), "the renderer's": rendered(prompts)}
    return Experiment(
        "why", "Why SFT on the model's own pictures ruins it", "",
        tuple(Line(label, trained(scale, f"why-{one.name.removeprefix('data/')}", one, loss="sft", beta=None,
                                  validation=True)) for label, one in data.items()),
        figures=("scorer", "judge", "right", "clean", "matches"), seeds=1,
        note="SFT with DPO's learning rate, on the better of two pictures a prompt; drawn with guidance 5 in the end. "
        "The renderer's are right and were not drawn by the model.")


def mend(scale: Scale) -> Experiment:
    pool, prompts = scale.pools[-1], scale.sizes[-1]
    two = kept(scale, pool, pool, prompts), kept(scale, pool, pool - 1, prompts, winner=2)
    cosine = " --lr-schedule cosine"
    rows = {
        "60 steps": ("60", {"times": 1}), "240 steps": ("240", {}), "cosine decay": ("cosine", {"more": cosine}),
        "moving average": ("ema", {"more": " --ema 0.98"}),
        "penalty 0.1": ("penalty", {"more": " --winner-penalty 0.1"}),
        "penalty 0.1, cosine": ("penalty-cosine", {"more": " --winner-penalty 0.1" + cosine}),
        "SFT on winners besides": ("sft", {"more": " --sft-weight 10" + cosine}),
        "discount 0.95": ("discount", {"more": " --discount 0.95"}),
        "second best and second worst, too": ("second", {"data": two}),
        "960 steps, cosine decay": ("x16-cosine", {"times": 16, "more": cosine})}

    def row(name: str, data: Iterable[Data] = (), times: int = 4, **options) -> Row:
        return hg_dpo(scale, f"mend-{name}", *data, times=times, validation=True, **options)

    return Experiment(
        "mend", "What training does wrong, and what helps", "",
        tuple(Line(label, row(name, **options)) for label, (name, options) in rows.items()),
        figures=("scorer", "judge", "right", "clean", "matches", "colour"), seeds=1,
        note="HG-DPO for 240 steps where nothing else is said, on the prompts of `search`; one training seed, so that "
        "a difference of seven points is chance. What was found: of all that was tried at 240 steps a decay of the "
        "rate, alone or with fine-tuning besides, keeps the judge's wins; a moving average, more pairs, the penalty "
        "and the discount do not. Nothing beats 60 steps, and of 960 even a decay keeps none of the judge's wins. What "
        "longer training loses is the caption, not the body: pictures without a fault grow more, and those that are "
        "as the caption says fewer.")


def remedies(scale: Scale) -> Experiment:
    """Where a larger beta is to cost wins, as in the paper, and costs none in Table 2."""
    def pair(name: str, beta: int, **options) -> list[Row]:
        return [trained(scale, f"remedy-{name}-{times * beta}", beta=times * beta, validation=True, **options)
                for times in (1, 4)]

    rows = {
        "beta, 60 steps": [replace(row, name=f"remedy-{row.name}", validation=True) for row in (
            dpo(scale), beta(scale, 4))],
        "a twentieth of beta": pair("small", BETA // 20),
        "240 steps": pair("long", BETA, times=4),
        "240 steps at a third of the rate": pair("slow", BETA, times=4, lr="1.6e-4")}
    return Experiment(
        "remedies", "Whether a larger beta costs wins after all", "",
        tuple(Line(f"{label}{' x4' if i else ''}", row) for label, two in rows.items() for i, row in enumerate(two)),
        tuple(beats(f"beta x4 costs wins: {label}", "88.7 to 76.3 %", *two) for label, two in rows.items()),
        figures=("scorer", "judge", "right", "clean", "matches", "colour"), seeds=1,
        note="Three attempts at the paper's price of a larger beta, on the prompts of `search`; one training seed, and "
        "200 pictures a row, so that a difference of seven points in the wins is chance. The first two rows are Table "
        "2's trainings. What was found: the price is not in the wins, but a larger beta leaves 5 to 7 points more "
        "pictures with a fault. Beta times the margin of the errors is the logit, about 1 with the beta in use "
        "(`bands`), where the sigmoid begins to bend. With a twentieth it never bends: DPO drifts, the colours twice "
        "as far, and wins less. With four times as much it bends early, which holds the colours, and the training is "
        "as if it were shorter.")


def table4(scale: Scale) -> Experiment:
    """The LoRAs are Tables 1 to 3's, which no person's picture was seen by."""
    def people(row: Row) -> Row:
        return replace(row, name=f"people-{row.name}", people=True)

    full, plain = people(hg_dpo(scale)), people(dpo(scale))
    half = people(replace(hg_dpo(scale), name="weight50", weight=0.5))
    far = "ArcFace, distance: 0.266 to 0.259"
    return Experiment(
        "table4", "Table 4: the LoRA in a personalised model", "win rate by HPS, %",
        (Line("HG-DPO", full, "88.07"), Line("the same at weight 0.5", half), Line("DPO", plain)),
        (Claim("with HG-DPO's LoRA people who are given by pictures are better", "88.07 %", "judge", {full.name: 1.0},
               50.0),
         Claim("the person stays the same: the distance rises by less than 0.02", far, "identity_change",
               {full.name: -1.0}, -0.02)),
        figures=("scorer", "judge", "right", "matches", "identity", "identity_change", "colour", "diversity"),
        note="Both sides are drawn by the concept encoder that ships with the repository, each of 200 prompts with a "
        "person of its own, who is given by two pictures in other clothes, poses and places. The scorers read the "
        "whole caption, hair and build included, which the prompt leaves out. The distance is of skin, hair and build, "
        "from 0 to 1, by `paper_people/identity.py`.")


def longer(scale: Scale) -> Experiment:
    """What `mend` found, on the test's prompts."""
    plain, x4, x4_cosine = hg_dpo(scale), longer_row(scale, cosine=False), longer_row(scale, cosine=True)
    return Experiment(
        "longer", "Ours: four times the steps", "",
        (Line("60 steps", plain), Line("60 steps, cosine decay", hg_dpo(scale, "cosine", more=" --lr-schedule cosine")),
         Line("240 steps", x4), Line("240 steps, cosine decay", x4_cosine)),
        (beats("four times the steps undo a part of the gain", "", plain, x4),
         costs_little("with a cosine decay they cost less than 5 points", "", x4_cosine, plain),
         beats("a cosine decay is better than none at 240 steps", "", x4_cosine, x4)),
        note="The paper does not say how long it trains. `mend` has what was tried.")


def over_optimisation(scale: Scale) -> Experiment:
    rows = {1: hg_dpo(scale), 2: hg_dpo(scale, "x2", times=2), 4: longer_row(scale, cosine=False),
            8: hg_dpo(scale, "x8", times=8)}
    return Experiment(
        "over-optimisation", "The survey's over-optimisation: scorer and judge as HG-DPO goes on", "",
        tuple(Line(f"{scale.train_steps * times} steps", row) for times, row in rows.items()),
        charts=("scorer", "judge", "gap", "agree"),
        figures=("scorer", "judge", "right", "gap", "agree", "colour"), seeds=1,
        note="One seed at least; without a decay, which `longer` shows to keep the gain.")


EXPERIMENTS = (
    table3, table5, table6, table2, table1, table4, weight, guidance, previews, pool_price, judges, longer,
    over_optimisation, family, online, own_scorers, search, search_online, why, mend, remedies)


def experiments(scale: Scale) -> dict[str, Experiment]:
    return {one.name: one for one in (experiment(scale) for experiment in EXPERIMENTS)}


# Measures

def measures(scale: Scale) -> dict[str, Measure]:
    known = {line.row.name: line.row for one in experiments(scale).values() for line in one.lines}
    trained = [known[name] for name in ("hg-dpo", "x4", "x4-cosine", "sft")]
    loras = [training_part(row.training, 0, scale) for row in trained]
    data, few = trained[0].training.data[0], "" if scale == FULL else " --prompts 2"
    return {measure.name: measure for measure in (
        Measure("fig5b", "Fig. 5b: how winners and losers differ", (pool_part(scale),), "--pool DIR/pool",
                "In the latents' channels, means and deviations of the winners less the losers', in deviations of that "
                "difference (Cohen's d of pairs): its length, and each of the four channels. A length cannot be "
                "negative."),
        Measure("preview-gap", "Ours: what is left of the gap between winner and loser", (pool_part(scale),),
                "--pool DIR/pool" + few, "The gap by the scorer, of the shared pool's first prompts. Pictures drawn "
                "with fewer steps are scored as they are."),
        Measure("lambda", "Ours: lambda and the size of the latent", (pool_part(scale),),
                "--pool DIR/pool" + (f"{few} --pixels 48 64" if few else ""), "`--lambda-stat auto` goes as 1/(h w), "
                "for so does the variance that preference gradients put on a channel mean: measured on pictures that "
                "the same U-Net draws at other sizes, before any training."),
        Measure("bands", "What training does to the errors, by t", (*data.parts, *loras),
                f"--data DIR/{data.name} --loras " + " ".join(
                    f"{row.name}=DIR/{run.name}/lora.safetensors" for row, run in zip(trained, loras)) + few,
                "By how much the error of winners / losers is lower than the reference's. DPO wins by making the "
                "loser worse; SFT on the model's own winners makes both better, and the pictures worse."),
        accuracy(scale, known))}


def accuracy(scale: Scale, known: dict[str, Row]) -> Measure:
    scorers = [own_scorer(scale, n) for n in scale.choices]
    runs = [training_part(known[name].training, 0, scale) for name in ("dpo", "hg-dpo", "ipo", "kto", "pro", "sft")]
    test = part("choices/test", "-m paper_people.choices DIR/base")
    judged = part(
        "accuracy", f"evaluate.py --preference-accuracy DIR/{test.name}/pairs.jsonl --dtype bfloat16 --scorers "
        + ",".join(["paper-people", "judge", *(f"DIR/{parts[-1].name}" for parts in scorers)]) + " --compare "
        + ",".join(f"{run.name[5:-2]}=DIR/{run.name}/lora.safetensors" for run in runs))
    needs = dict.fromkeys([
        base_part(scale), test, *(one for parts in scorers for one in parts),
        *known["dpo"].training.data[0].parts, *runs, judged])
    return Measure("accuracy", "Judging the judges", tuple(needs), f"--report DIR/{judged.name}/report.json",
                   "How often each scorer, and each trained LoRA's implicit reward, puts that picture first which the "
                   "judge prefers, of two of the model's own for each test prompt.")


def everything(scale: Scale) -> dict[str, Experiment | Measure]:
    return experiments(scale) | measures(scale)


def measure_parts(measure: Measure) -> list[Part]:
    command = f"-m benchmarks.results.measures {measure.name} {measure.options}"
    return [*measure.needs, part(f"measures/{measure.name}", command)]


# What the page shows of them

README = {
    "DPO, pools of 2": "n2", "DPO, pools of 20": "dpo", "the same, drawn with LAN": "lan", "**HG-DPO**": "hg-dpo",
    "the same at weight 0.5": "weight50", "DPO, beta x4": "beta-x4", "SFT on the winners": "sft"}

QUICKLY = ("table3", "table2", "table1", "fig5b")      # what --quick does where nothing is chosen
