"""What the programs have in common on the command line: options, prompt files, the progress bar, and how they end."""

import argparse
import csv
import io
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from model.errors import UserError

PARTI = ("nateraw/parti-prompts", "PartiPrompts.tsv")            # the Hub's copy of PartiPrompts; 177 are "People"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:       # one line, without the usage before it
        raise UserError(f"{message} (see --help)")


def common_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every program has."""
    parser = Parser(description=description, formatter_class=Help)
    parser.add_argument(
        "--model", default="paper-people", metavar="MODEL",
        help="paper-people, a Hub id (owner/name[@revision]), a folder in diffusers layout, or an LDM .safetensors")
    parser.add_argument("--vae", metavar="PATH", help="another VAE than the model's own: a Hub id, folder or file")
    parser.add_argument(
        "--prediction-type", choices=("epsilon", "v_prediction"), help="overrides the model's scheduler_config.json")
    parser.add_argument("--device", default="auto", help="auto is cuda, else mps, else cpu")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", *DTYPES), help="auto is bfloat16 on cuda, float32 elsewhere")
    parser.add_argument("--seed", type=int, default=0, help="image i of prompt k has the seed SEED + k * images + i")
    return parser


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How a picture is drawn: the same in every program that draws, the paper's settings by default."""
    parser.add_argument("--steps", type=int, default=50, help="of the sampler, 1 to 1000")
    parser.add_argument("--guidance", type=float, default=5.0, help="scale of classifier-free guidance; 1 is off")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 8 (default: the model's own size)")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 8 (default: the model's own size)")
    parser.add_argument("--sampler", default="dpm++", choices=("dpm++", "ddim", "ddpm"), help="DPM-Solver++ 2M, ...")
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument(
        "--prompt-weights", default="off", choices=("off", "a1111"),
        help="a1111 reads (word:1.2), [word] and BREAK, and has no limit of 75 tokens")
    parser.add_argument("--clip-skip", type=int, default=0, help="last text layers left out (A1111's number less one)")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures drawn at once; does not change them")


def device_and_dtype(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    name = args.device
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():                 # torchrun: a GPU for every process
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
    if args.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, DTYPES[args.dtype]


def parse_shard(text: str | None) -> tuple[int, int]:
    """--shard I/N, or what torchrun says, as (I, N); alone it is (0, 1)."""
    if text is None and "WORLD_SIZE" not in os.environ:
        return 0, 1
    text = text or f"{os.environ['RANK']}/{os.environ['WORLD_SIZE']}"
    numbers = re.fullmatch(r"(\d+)/(\d+)", text)
    if not numbers or int(numbers[1]) >= int(numbers[2]):
        raise UserError(f"--shard {text}: expected I/N with I from 0 to N - 1, such as 0/4")
    return int(numbers[1]), int(numbers[2])


def read_prompts(source: str, category: str | None = None) -> list[str]:
    """Prompts from a .txt (one a line), .jsonl (`prompt`), .tsv or .csv (column `Prompt` or `prompt`), or the word
    parti-people. Blank lines are left out; `category` keeps the rows of a table whose `Category` it is."""
    if source == "parti-people":
        from huggingface_hub import hf_hub_download
        try:
            source, category = hf_hub_download(*PARTI, repo_type="dataset"), "People"
        except Exception as error:               # the library's transport errors have no class in common
            raise UserError(
                f"parti-people: {PARTI[1]} is not in the cache and cannot be had from the Hub's {PARTI[0]} "
                f"({type(error).__name__}); go online, or give a file and --category People") from None
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{path}: no such prompt file")
    if category and path.suffix not in (".tsv", ".csv"):
        raise UserError(f"{path}: --category needs a table (.tsv or .csv) with a column Category")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    if path.suffix == ".jsonl":
        prompts = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                prompts += [json.loads(line)["prompt"] + ""] if line.strip() else []
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}:{number}: expected an object with a `prompt`") from None
    elif path.suffix in (".tsv", ".csv"):
        tab = path.suffix == ".tsv"
        rows = csv.DictReader(
            io.StringIO(text), delimiter="\t" if tab else ",", quoting=csv.QUOTE_NONE if tab else csv.QUOTE_MINIMAL)
        columns = rows.fieldnames or ()
        column = next((name for name in ("Prompt", "prompt") if name in columns), None)
        if columns and (column is None or (category and "Category" not in columns)):
            raise UserError(f"{path}: its columns are {', '.join(columns)}; expected Prompt (and Category)")
        try:
            prompts = [row[column] or "" for row in rows if not category or row["Category"] == category]
        except csv.Error as error:
            raise UserError(f"{path}:{rows.line_num}: {error}") from None
    else:
        prompts = text.split("\n")
    # JSON can hold half an emoji, which no tokenizer and no file takes.
    prompts = [prompt.strip().encode(errors="replace").decode() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise UserError(f"{path}: no prompt in it" + (f" of the category {category}" if category else ""))
    return prompts


def refuse_changes(out: Path, before: dict, now: dict) -> None:
    """What a folder was begun with has to stay; the first option that has not is named."""
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"{out}: begun with --{name.replace('_', '-')} {before.get(name)}, and now it is {value}; "
                "go on with the old value, or choose another --out")


def progress(items: Iterable, total: int, label: str) -> Iterator:
    """Passes items on and draws a bar on stderr: a line that renews itself, or one line a tenth where it is a file."""
    start, shown, tty = time.monotonic(), -1, sys.stderr.isatty()
    for i, item in enumerate(items):
        yield item
        done, seconds = i + 1, time.monotonic() - start
        left = seconds / done * (total - done)
        line = f"{label} {done}/{total}  {seconds:.0f} s, {left:.0f} s left"
        if tty:
            bar = "#" * (30 * done // total)
            print(f"\r{label} [{bar:<30}] {line[len(label) + 1:]} ", end="", file=sys.stderr, flush=True)
        elif 10 * done // total > shown:
            shown = 10 * done // total
            print(line, file=sys.stderr, flush=True)
    if tty:
        print(file=sys.stderr)


def run(main: Callable[[], None]) -> None:
    """Calls main and ends as every program does: 0; 2 and one line on bad input; 130 on Ctrl-C."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    program = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        sys.exit(_say(program, str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_say(program, "stopped; what was finished is saved", 130))
    except OSError as error:                     # a disk that is full, a folder that may not be written
        sys.exit(_say(program, f"{error.filename or 'file'}: {error.strerror or error}", 2))


def _say(program: str, message: str, code: int) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return code
