"""How a row of the results is made: its settings, its data and its training -> the parts, each a run of a program."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from losses import LOSSES
from model.builtin import BUILT_IN
from model.files import digest, digest_of

ROOT = Path(__file__).parents[2]

VERSION = 1                                    # of a row's file

# The settings of every row are the demonstration's (Makefile), for latents of 16x16. The learning rate is chosen by the
# experiment `search`, by one rule for every loss: of RATES the one with the most wins by the scorer on other prompts.
BETA, LAMBDA_STAT = 1000, 400_000
CHOSEN = {
    "dpo": "5e-4", "sft": "1.6e-5", "kto": "5e-4", "mapo": "5e-5", "orpo": "1.6e-5", "pro": "5e-4", "rwr": "1.6e-5",
    "sdpo": "1.6e-5"}
# Losses whose gradient is another's up to a factor before the first step, which Adam does not see, take its rate.
LIKE = dict.fromkeys(("hg-dpo", "ipo", "hinge", "cdpo", "rdpo"), "dpo") | {"dspo": "sft"}
# Of methods that draw their own pictures: pictures a step, U-Net rows of a picture of 10 denoising steps
# (docs/methods.md), and options. Each is given the rows that DPO takes with a pool of 20 for 160 prompts.
ONLINE_ROWS = 160 * 20 * 10 * 2 + 60 * 32 * 2 * 4
ONLINE = {
    "ddpo": (32, 80, "--batch-size 8 --grad-accum 4 --updates 1"),
    "grpo": (32, 80, "--batch-size 4 --pictures 8 --grad-accum 1"),
    "dpok": (32, 100, "--batch-size 8 --grad-accum 4 --epochs 1 --guidance 5"),
    "d3po": (32, 100, "--batch-size 8 --grad-accum 2"),
    "dense": (32, 100, "--batch-size 8 --grad-accum 2 --guidance 5"),
    "spo": (8, 140, "--batch-size 8 --grad-accum 1"),
    "refl": (32, 11, "--batch-size 16 --grad-accum 2 --reward-limit 40"),
    "draft": (16, 24, "--batch-size 16 --grad-accum 1 --guidance 5"),
    "alignprop": (16, 28, "--batch-size 16 --grad-accum 1")}
RATES = (dict.fromkeys(CHOSEN, ("1.6e-5", "5e-5", "1.6e-4", "5e-4", "1.6e-3"))
         | dict.fromkeys(ONLINE, ("1.6e-4", "5e-4", "1.6e-3")))
CHOSEN |= dict.fromkeys(ONLINE, "5e-4") | {"grpo": "1.6e-4"}
TRAINING = "--dtype bfloat16"
STEPS, NUM_IMAGES = 10, 2                      # of the sampler, and pictures a prompt
DRAWING = f"--steps {STEPS} --dtype bfloat16"
SCORERS = {"scorer": "paper-people", "judge": "judge", "right": "judge-right"}
MORE_SCORERS = {"clean": "judge-clean", "matches": "judge-matches"}      # of validation rows, and of people's
# People who are given by pictures: what they are drawn by, and who says whether they are the same.
CONCEPT = "--concept paper_people/concept.safetensors"
IDENTITY = "identity:paper-people"


@dataclass(frozen=True)
class Scale:
    pools: tuple[int, ...] = (2, 5, 10, 20)    # pictures a prompt; the last is what is drawn. Ranks of the loser, too
    sizes: tuple[int, ...] = (80, 160, 320, 640)     # prompts; the last is how many are drawn
    train_steps: int = 60
    test_prompts: int = 200
    validation_prompts: int = 100
    batch_size: int = 32                       # pairs
    choices: tuple[int, ...] = (100, 300, 1000)      # pairs that a scorer of one's own is trained on
    scorer_steps: int = 300

    @property
    def fewer(self) -> int:
        """Prompts of the experiments that do with fewer."""
        return self.sizes[len(self.sizes) // 2 - 1]


FULL, QUICK = Scale(), Scale((2, 4), (8, 16), 4, 8, 4, 8, (8,), 4)


@dataclass(frozen=True)
class Part:
    """A run of a program into DIR/name, where DIR is the folder of all parts."""

    name: str
    command: str


def part(name: str, command: str) -> Part:
    return Part(name, f"{command} --out DIR/{name}")


@dataclass(frozen=True)
class Data:
    """A dataset, and the parts that it is made by, the last of which is itself."""

    parts: tuple[Part, ...]
    unet_rows: int                             # to draw the pool that it needs, where others share it, too

    @property
    def name(self) -> str:
        return self.parts[-1].name


@dataclass(frozen=True)
class Training:
    name: str
    data: tuple[Data, ...]
    loss: str = "dpo"
    lr: str = CHOSEN["dpo"]
    batch_size: int = 32
    beta: int | None = BETA
    lambda_stat: int | None = None
    times: int = 1                             # so many times the steps of the others
    more: str = ""                             # other options of train.py, each with a space before it


@dataclass(frozen=True)
class Online:
    """A training that draws its own pictures."""

    name: str
    method: str
    lr: str
    share: float = 1.0                         # of the rows
    data: tuple[Data, ...] = ()


@dataclass(frozen=True)
class Row:
    name: str
    training: Training | Online | None         # none: the model as it is
    weight: float = 1.0                        # of the LoRA
    lan: bool = False
    guidance: float | None = None              # to draw with, where it is not the others'
    validation: bool = False                   # judged on the prompts that settings are chosen on, and not the test's
    people: bool = False                       # of people who are given by pictures, both sides


# The data

def pool_part(scale: Scale) -> Part:
    return part("pool", f"build_dataset.py --limit {scale.sizes[-1]} --pool-size {scale.pools[-1]} {DRAWING} "
                "--keep pool --images none")


def kept(scale: Scale, pool: int, loser: int, prompts: int, winner: int = 1) -> Data:
    """Pairs of the shared pool's first pictures, by their ranks in falling score."""
    ranks = f"--pool-size {pool} --loser-rank {loser}" + (f" --winner-rank {winner}" if winner > 1 else "")
    name = f"data/{prompts}-{pool}-{loser}" + (f"-from-{winner}" if winner > 1 else "")
    command = f"build_dataset.py --reselect DIR/pool {ranks} --limit {prompts}"
    return Data((pool_part(scale), part(name, command)), prompts * pool * STEPS * 2)


def drawn(name: str, prompts: int, pool: int, more: str, passes: int) -> Data:
    """A pool of its own. `passes` of the U-Net a prompt, each two rows: guidance."""
    command = f"build_dataset.py --limit {prompts} --pool-size {pool} {more} --dtype bfloat16 --images none"
    return Data((part(f"data/{name}", command),), prompts * passes * 2)


def rendered(prompts: int) -> Data:
    """Pairs that were not drawn by the model."""
    return Data((part("rendered", f"-m paper_people.rendered --limit {prompts}"),
                 part("data/rendered", "build_dataset.py --from-pairs DIR/rendered/pairs.jsonl --images none")), 0)


def own_scorer(scale: Scale, choices: int) -> tuple[Part, ...]:
    """The parts of a scorer that learns from so many of the judge's choices; the last is itself."""
    drawing = f"--limit {scale.choices[-1]} --num-images 2 {DRAWING}"
    pairs = part(f"choices/{choices}", f"-m paper_people.choices DIR/drawn/choices --limit {choices}")
    often = max(1, scale.scorer_steps // 30)
    return (part("drawn/choices", f"generate.py --prompts paper_people/prompts_train.txt {drawing}"), pairs,
            part(f"scorers/{choices}", f"train_scorer.py --from-pairs DIR/{pairs.name}/pairs.jsonl --holdout 0.2 "
                 f"--lr 3e-4 --warmup {often} --steps {scale.scorer_steps} --save-every {often} --patience 8"))


def by_own_scorer(scale: Scale, choices: int, prompts: int) -> Data:
    pool, parts = scale.pools[-1], own_scorer(scale, choices)
    again = f"build_dataset.py --reselect DIR/pool --scorer DIR/{parts[-1].name} --limit {prompts}"
    return Data((pool_part(scale), *parts, part(f"data/own-{choices}", f"{again} --pool-size {pool}")),
                prompts * pool * STEPS * 2)


# How a row is made

def base_part(scale: Scale, validation: bool = False) -> Part:
    """The pictures of the model as it is."""
    which, limit = ("validation", scale.validation_prompts) if validation else ("test", scale.test_prompts)
    return part("base-validation" if validation else "base", f"generate.py --prompts paper_people/prompts_{which}.txt "
                f"--limit {limit} --num-images {NUM_IMAGES} {DRAWING}")


def people_parts(scale: Scale) -> tuple[Part, Part]:
    """The prompts with pictures of their people, and what the model draws of these as it is."""
    people = part("people", f"-m paper_people.concept_pictures --count 0 --people {scale.test_prompts}")
    return people, part("base-people", f"generate.py --prompts DIR/people/test/subjects.jsonl {CONCEPT} "
                        f"--num-images {NUM_IMAGES} {DRAWING}")


def shared_parts(scale: Scale) -> list[Part]:
    """What many rows begin with."""
    return [pool_part(scale), base_part(scale), base_part(scale, validation=True)]


def training_part(training: Training | Online, seed: int, scale: Scale) -> Part:
    if isinstance(training, Online):
        pictures, rows, options = ONLINE[training.method]
        steps = max(1, int(training.share * ONLINE_ROWS) // (pictures * rows)) if scale == FULL else 1
        return part(f"runs/{training.name}-{seed}", f"train_online.py --method {training.method} --limit "
                    f"{scale.sizes[-1]} {options} --sampler-steps {STEPS} --lr {training.lr} {TRAINING} "
                    f"--judge {SCORERS['right']} --steps {steps} --seed {seed}")
    options = "".join(f" --{name.replace('_', '-')} {value}" for name in ("beta", "lambda_stat")
                      if (value := getattr(training, name)) is not None)
    loss = "hg-dpo" if training.lambda_stat else training.loss
    data = " ".join(f"DIR/{one.name}" for one in training.data)
    return part(f"runs/{training.name}-{seed}", f"train.py --data {data} --loss {loss}{options} --lr {training.lr} "
                f"--batch-size {training.batch_size} {TRAINING}{training.more} "
                f"--steps {training.times * scale.train_steps} --seed {seed}")


def parts_of(row: Row, seed: int, scale: Scale) -> list[Part]:
    """In the order in which they are made. Rows that have a part in common give it the same name and command."""
    base, parts, lora = base_part(scale, row.validation), [], ""
    if row.training:
        parts = list(dict.fromkeys(one for data in row.training.data for one in data.parts))
        parts.append(training_part(row.training, seed, scale))
        lora = f"DIR/{parts[-1].name}/lora.safetensors" + (f":{row.weight:g}" if row.weight != 1 else "")
    scorers = [*SCORERS.values(), *(MORE_SCORERS.values() if row.validation or row.people else ())]
    if row.people:
        people, base = people_parts(scale)
        parts, scorers = [people, *parts], [*scorers, IDENTITY]
    parts.insert(1 if len(parts) > 2 else 0, base)
    if row.guidance is None:
        candidate = f"--compare {row.name}={lora}{'+lan' if row.lan else ''} --num-images {NUM_IMAGES} {DRAWING}"
        candidate += f" {CONCEPT}" if row.people else ""
    else:                                      # drawn otherwise than the base: before the two meet
        drawing = base.command.removesuffix(f" --out DIR/{base.name}") + f" --guidance {row.guidance:g}"
        drawing, name = (f"{drawing} --lora {lora}", f"{row.name}-{seed}") if lora else (drawing, row.name)
        parts.append(part(f"drawn/{name}", drawing))
        candidate = f"--candidate DIR/{parts[-1].name}"
    return [*parts, part(f"evaluations/{row.name}-{seed}",
                         f"evaluate.py --baseline DIR/{base.name} {candidate} --scorers {','.join(scorers)}")]


@cache
def assets_digest() -> str:
    """Of what every row is made with and no command names: the checkpoint with its scorer and judge, the prompts."""
    folder = BUILT_IN["paper-people"].checkpoint
    files = [*(path for path in sorted(folder.rglob("*")) if path.is_file()),
             *sorted(folder.parent.glob("prompts_*.txt"))]
    return digest_of([[str(path.relative_to(folder.parent)), digest(path)] for path in files])


def settings_digest(parts: list[Part]) -> str:
    """Of a row, by the parts that it is made of, and the files that these read."""
    commands = [part.command for part in parts]
    concept = [digest(ROOT / CONCEPT.split()[1])] if any(CONCEPT in command for command in commands) else []
    return digest_of([VERSION, commands, assets_digest(), *concept])


def made_from(part: Part, parts: Iterable[Part]) -> str:
    """The digest of a part's command, and of those of all parts, among `parts`, that it reads, and so on."""
    def reads(name: str) -> bool:              # base is no part of base-validation
        return name != part.name and re.search(rf"DIR/{re.escape(name)}\b(?!-)", part.command) is not None
    return digest_of([part.command, sorted(made_from(one, parts) for one in parts if reads(one.name))])


def unet_rows(row: Row, scale: Scale) -> int:
    """What goes through the U-Net for its pools (two a step: guidance) and its training, where a backward pass counts
    twice and the reference once. A run that draws its own pictures counts for itself, in its log."""
    if not row.training:
        return 0
    loss = LOSSES["hg-dpo" if row.training.lambda_stat else row.training.loss]
    pictures = {"winners": 1, "labels": 1, "pairs": 2, "pool": scale.pools[-1]}[loss.data] * row.training.batch_size
    pictures *= row.training.times * scale.train_steps
    shared = {one.parts[0]: one.unet_rows for one in row.training.data}          # of the same pool: drawn once
    return sum(shared.values()) + pictures * (3 + loss.takes("eps_ref"))
