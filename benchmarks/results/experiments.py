"""What is measured: the experiments, their rows and claims, and the commands that make a row.

A claim is a weighted sum of its rows' figures, the effect, and a threshold that the effect is to lie above. `rises`,
`falls`, `beats`, `costs_little` and `cuts` make one.
"""

from dataclasses import dataclass, replace

from model.files import digest_of

VERSION = 1                                    # of a row's file

# The settings of every row are the Makefile's, for latents of 16x16; README.md says how they were chosen.
BETA, LAMBDA_STAT, BATCH_SIZE = 1000, 400_000, 32
TRAINING = f"--lr 5e-4 --batch-size {BATCH_SIZE} --dtype bfloat16"
STEPS, NUM_IMAGES = 10, 2                      # of the sampler, and pictures a test prompt
DRAWING = f"--steps {STEPS} --dtype bfloat16"
SCORERS = {"scorer": "paper-people", "judge": "judge", "right": "judge-right"}


@dataclass(frozen=True)
class Scale:
    pools: tuple[int, ...] = (2, 5, 10, 20)    # pictures a prompt; the last is what is drawn. Ranks of the loser, too
    sizes: tuple[int, ...] = (80, 160, 320, 640)     # prompts; the last is how many are drawn
    train_steps: int = 60
    test_prompts: int = 200


FULL, QUICK = Scale(), Scale((2, 4), (8, 16), 4, 8)


@dataclass(frozen=True)
class Training:
    name: str
    pool: int
    loser: int                                 # its rank, in falling score
    prompts: int
    loss: str = "dpo"
    beta: int | None = BETA
    lambda_stat: int | None = None
    times: int = 1                             # so many times the steps of the others
    more: str = ""                             # other options of train.py, each with a space before it


@dataclass(frozen=True)
class Row:
    name: str
    training: Training
    weight: float = 1.0                        # of the LoRA
    lan: bool = False


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
    claims: tuple[Claim, ...]
    charts: tuple[str, ...] = ("scorer", "judge")
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


# The experiments

def experiments(scale: Scale) -> dict[str, Experiment]:
    best = Training("dpo", scale.pools[-1], scale.pools[-1], scale.sizes[-1])

    def trained(name: str, **options) -> Row:
        return Row(name, replace(best, name=name, **options))

    dpo = trained("dpo")
    pools = [trained(f"n{n}", pool=n, loser=n) for n in scale.pools[:-1]] + [dpo]
    losers = [trained(f"loser{rank}", loser=rank) for rank in scale.pools[:-1]] + [dpo]
    sizes = [trained(f"size{prompts}", prompts=prompts) for prompts in scale.sizes[:-1]] + [dpo]
    lan, hg_dpo = replace(dpo, name="lan", lan=True), trained("hg-dpo", lambda_stat=LAMBDA_STAT)
    beta4, beta20 = trained("beta-x4", beta=4 * BETA), trained("beta-x20", beta=20 * BETA)
    sft = trained("sft", loss="sft", beta=None)
    weights = [replace(hg_dpo, name=f"weight{percent}", weight=percent / 100) for percent in (25, 50, 75)] + [hg_dpo]

    longer = {name: trained(f"x4{name}", lambda_stat=LAMBDA_STAT, times=4, more=more) for name, more in (
        ("", ""), ("-linear", " --lr-schedule linear"), ("-cosine", " --lr-schedule cosine"), ("-ema", " --ema 0.98"),
        ("-cosine-ema", " --lr-schedule cosine --ema 0.98"))}
    cosine = trained("cosine", lambda_stat=LAMBDA_STAT, more=" --lr-schedule cosine")

    wins = {2: "66.1", 5: "81.9", 10: "84.2", 20: "88.7"}
    hues = {2: "6.6 4.5 1.3", 10: "20.9 5.5 3.9", 20: "24.9 12.5 3.4"}
    pickscore, grows = "win rate by PickScore, %", "66.1, 81.9, 84.2, 88.7 %"
    both = (("scorer", "by the scorer"), ("judge", "by the judge"))
    return {experiment.name: experiment for experiment in (
        Experiment(
            "table3", "Table 3: pools of N pictures, LAN, statistic matching", pickscore,
            (*[Line(f"N = {n}", row, wins.get(n, "")) for n, row in zip(scale.pools, pools)],
             Line("+ LAN", lan, "89.3"), Line("+ statistic matching: HG-DPO", hg_dpo, "85.3")),
            (*[rises(f"the win rate rises with N, {by}", grows, figure, pools) for figure, by in both],
             costs_little("LAN costs less than 5 points", "88.7 to 89.3 %", lan, dpo),
             costs_little("statistic matching costs less than 5 points", "88.7 to 85.3 %", hg_dpo, dpo))),
        Experiment(
            "table5", "Table 5: the loser's rank in the pool", pickscore,
            tuple(Line(f"rank {n}", row, wins.get(n, "")) for n, row in zip(scale.pools, losers)),
            tuple(rises(f"the win rate rises with the loser's rank, {by}", grows, figure, losers)
                  for figure, by in both),
            note="The paper prints the figures of Table 3 here, digit for digit; one of the tables was copied by "
                 "mistake, and the claim alone can be tested."),
        Experiment(
            "table6", "Table 6: the number of prompts", pickscore,
            tuple(Line(f"{n} prompts", row) for n, row in zip(scale.sizes, sizes)),
            tuple(rises(f"the win rate rises with the prompts, {by}", "74.6 % at 2,000; 85.9 % at 50,000", figure,
                        sizes) for figure, by in both),
            note="All rows train for the same number of steps: fewer prompts come again more often."),
        Experiment(
            "table2", "Table 2: the colour shift", "change of hue, saturation, value, %",
            (*[Line(f"N = {n}", row, hues.get(n, "")) for n, row in zip(scale.pools, pools)],
             Line("beta x4", beta4, "17.6 8.0 3.0"), Line("beta x20", beta20, "1.4 2.9 0.7"),
             Line("LAN", lan, "0.2 2.0 0.6"), Line("statistic matching", hg_dpo, "1.7 0.7 1.1")),
            (rises("the shift grows with N", "hue 6.6, 20.9, 24.9 %", "colour", pools),
             cuts("LAN cuts it", "hue 24.9 to 0.2 %", lan, dpo),
             cuts("statistic matching cuts it", "hue 24.9 to 1.7 %", hg_dpo, dpo),
             cuts("beta x4 cuts it", "hue 24.9 to 17.6 %", beta4, dpo),
             cuts("beta x20 cuts it", "hue 24.9 to 1.4 %", beta20, dpo),
             beats("beta x4 costs wins", "88.7 to 76.3 %", dpo, beta4),
             beats("beta x20 costs wins", "88.7 to 81.4 %", dpo, beta20)),
            ("colour", "judge")),
        Experiment(
            "table1", "Table 1: against other ways", pickscore,
            (Line("SFT on winners", sft, "74.6"), Line("DPO, beta x4", beta4, "76.3"),
             Line("DPO, beta x20", beta20, "81.4"), Line("HG-DPO", hg_dpo, "85.3")),
            (beats("HG-DPO wins more than SFT on winners", "85.3 against 74.6 %", hg_dpo, sft),
             beats("HG-DPO wins more than DPO with beta x4", "85.3 against 76.3 %", hg_dpo, beta4),
             beats("HG-DPO wins more than DPO with beta x20", "85.3 against 81.4 %", hg_dpo, beta20)),
            note="SFT trains with the rate that was chosen for DPO, which ruins it; its own is not searched yet. "
            "Not here yet: people's pairs (83.1 %) and AlignProp (39.6 %)."),
        Experiment(
            "weight", "Fig. 8: HG-DPO's LoRA at a lower weight", "no figures",
            tuple(Line(f"weight {row.weight:g}", row) for row in weights),
            (rises("the win rate rises with the weight", "", "judge", weights),
             falls("diversity falls with the weight", "", "diversity", weights),
             costs_little("weight 0.5 costs less than 5 points", "", weights[1], hg_dpo)),
            ("judge", "diversity"), note="The paper draws with weight 0.5, and says that 0.8 loses diversity."),
        Experiment(
            "longer", "Ours: four times the steps", "",
            (Line("60 steps", hg_dpo), Line("60 steps, cosine", cosine), Line("240 steps", longer[""]),
             *[Line(f"240 steps, {name[1:].replace('-', ' and ')}", row) for name, row in longer.items() if name]),
            (beats("four times the steps undo a part of the gain", "", hg_dpo, longer[""]),
             costs_little("with a linear decay they cost less than 5 points", "", longer["-linear"], hg_dpo),
             costs_little("with a cosine decay they cost less than 5 points", "", longer["-cosine"], hg_dpo),
             beats("a cosine decay is better than none at 240 steps", "", longer["-cosine"], longer[""]),
             beats("a moving average is better than none at 240 steps", "", longer["-ema"], longer[""])),
            note="The paper does not say how long it trains."),
    )}


# How a row is made

@dataclass(frozen=True)
class Part:
    """A run of a program into DIR/name, where DIR is the folder of all parts."""

    name: str
    command: str


def part(name: str, command: str) -> Part:
    return Part(name, f"{command} --out DIR/{name}")


def shared_parts(scale: Scale) -> list[Part]:
    """What every row begins with: the pool, and the test pictures of the model as it is."""
    return [
        part("pool", f"build_dataset.py --limit {scale.sizes[-1]} --pool-size {scale.pools[-1]} {DRAWING} --keep pool "
             "--images none"),
        part("base", f"generate.py --prompts paper_people/prompts_test.txt --limit {scale.test_prompts} --num-images "
             f"{NUM_IMAGES} {DRAWING}")]


def parts_of(row: Row, seed: int, scale: Scale) -> list[Part]:
    """In the order in which they are made. Rows that have a part in common give it the same name and command."""
    training = row.training
    data = f"data/{training.prompts}-{training.pool}-{training.loser}"
    run, evaluation = f"runs/{training.name}-{seed}", f"evaluations/{row.name}-{seed}"
    options = "".join(f" --{name.replace('_', '-')} {value}" for name in ("beta", "lambda_stat")
                      if (value := getattr(training, name)) is not None)
    loss = "hg-dpo" if training.lambda_stat else training.loss
    lora = f"DIR/{run}/lora.safetensors" + (f":{row.weight:g}" if row.weight != 1 else "") + ("+lan" if row.lan else "")
    return [
        *shared_parts(scale),
        part(data, f"build_dataset.py --reselect DIR/pool --pool-size {training.pool} --loser-rank {training.loser} "
             f"--limit {training.prompts}"),
        part(run, f"train.py --data DIR/{data} --loss {loss}{options} {TRAINING}{training.more} --steps "
             f"{training.times * scale.train_steps} --seed {seed}"),
        part(evaluation, f"evaluate.py --baseline DIR/base --compare {row.name}={lora} --num-images {NUM_IMAGES} "
             f"{DRAWING} --scorers {','.join(SCORERS.values())}")]


def settings_digest(row: Row, seed: int, scale: Scale) -> str:
    return digest_of([VERSION, [part.command for part in parts_of(row, seed, scale)]])


def unet_rows(row: Row, scale: Scale) -> int:
    """What goes through the U-Net for its pool (two a step: guidance) and its training, where a backward pass counts
    twice and the reference once."""
    training = row.training
    drawn = training.prompts * training.pool * STEPS * 2
    trained = training.times * scale.train_steps * BATCH_SIZE * (3 if training.loss == "sft" else 2 * 4)
    return drawn + trained
