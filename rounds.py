"""HG-DPO in rounds: each draws its pool with the LoRA as it is by then, and trains it on, from better pictures.

    python rounds.py --rounds 4 --out online --data="--limit 160 --steps 10" \\
        --train="--lr 5e-4 --batch-size 32 --steps 15 --beta 1000 --lambda-stat 4e5"

Round n is OUT/n/data, by build_dataset.py with the options of --data and other seeds, and OUT/n/run, by train.py with
those of --train. The reference stays the bare model. The same command goes on where it was stopped, for both programs
do; more rounds may be added. The last round's LoRA is OUT/lora.safetensors.
"""

import cli

# isort: split
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from model.errors import UserError
from model.files import atomic_write

OURS = ("--out", "--model", "--seed", "--lora", "--init-lora")


def parse_args():
    parser = cli.Parser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--model", default="paper-people", help="see generate.py")
    parser.add_argument("--rounds", type=cli.whole(1), default=3)
    parser.add_argument("--data", default="", metavar="OPTIONS", help="of build_dataset.py, as --data=\"...\"")
    parser.add_argument("--train", default="", metavar="OPTIONS", help="of train.py, likewise")
    parser.add_argument("--seed", type=cli.whole(0, 2**32), default=0)
    parser.add_argument("--out", required=True, metavar="DIR")
    args = parser.parse_args()
    for name in ("data", "train"):
        try:
            words = shlex.split(getattr(args, name))
        except ValueError as error:
            raise UserError(f"--{name} {getattr(args, name)!r}: {error}") from None
        for word in words:
            if word.split("=")[0] in OURS:
                raise UserError(f"--{name} {word}: is set for every round; leave it away")
            if word == "--full":
                raise UserError(f"--{name} {word}: rounds go on with a LoRA; leave it away")
        setattr(args, name, words)
    return args


def without(words: list[str], *options: str) -> list[str]:
    """The words but for these options and their values, as --name VALUE or --name=VALUE."""
    values = {i + 1 for i, word in enumerate(words) if word in options}
    return [word for i, word in enumerate(words) if i not in values and word.split("=")[0] not in options]


def call(program: str, *words: object) -> None:
    """Runs a program of this folder. It has said what is wrong where it ends with another code than 0; so do we."""
    process = subprocess.Popen([sys.executable, Path(__file__).parent / program, *map(str, words)])
    # Ctrl-C has reached it, too, and SIGTERM is passed on: it saves what it is at, and then we end as it does.
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: process.terminate()}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def main() -> None:
    args = parse_args()
    out, drawn_with, begins_as = Path(args.out), [], []
    for n in range(args.rounds):
        print(f"round {n + 1} of {args.rounds}", flush=True)
        data, run, seed = out / f"{n}/data", out / f"{n}/run", args.seed + n * 10**9
        call("build_dataset.py", "--model", args.model, *args.data, *drawn_with, "--seed", seed, "--out", data)
        words = without(args.train, "--rank", "--alpha") if n else args.train         # they are the LoRA's by now
        call("train.py", "--model", args.model, "--data", data, *words, *begins_as, "--seed", seed, "--out", run)
        lora = run / "lora.safetensors"
        drawn_with, begins_as = ["--lora", lora], ["--init-lora", lora]
    with atomic_write(out / "lora.safetensors") as unfinished:
        shutil.copyfile(lora, unfinished)
    print(f"{out / 'lora.safetensors'} is that of round {args.rounds}")


if __name__ == "__main__":
    cli.run(main)
