"""What the programs have in common on the command line: options, prompt files, the progress bar, and how they end.

Every program imports this first: importing torch takes a second, and Ctrl-C within it is to end in one line, too.
"""

import os
import signal
import sys


def _leave(*_) -> None:
    os.write(2, b"stopped\n")
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)                     # until `run` begins

import argparse  # noqa: E402
import contextlib  # noqa: E402
import csv  # noqa: E402
import io  # noqa: E402
import math  # noqa: E402
import re  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from model.errors import CONTROLS, UserError  # noqa: E402
from model.files import parse_object, read_text  # noqa: E402

PARTI = ("nateraw/parti-prompts", "PartiPrompts.tsv")            # the Hub's copy of PartiPrompts; 177 are "People"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:           # without "(default: None)"
        nothing = action.default is None or action.default is False or action.default in ([], "")
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:       # one line, without the usage before it
        message = re.sub(r"^argument (\S+): (?=.*: must )", r"\1 ", message)
        raise UserError(f"{message} (see --help)")


# Kinds of option values, for add_argument's `type`

def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number within its limits."""
    def parse(text: str) -> int:
        limits = f"of {least} or more" if most is None else f"from {least} to {most}"
        value = int(text) if re.fullmatch(r"\s*[+-]?[0-9]{1,30}\s*", text) else least - 1
        if value < least or most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number {limits}")
        return value
    return parse


def real(
    least: float | None = None, above: float | None = None, most: float | None = None, below: float | None = None,
    auto: bool = False,
) -> Callable[[str], float | str]:
    """A finite number within its limits; `above` and `below` are limits that it may not touch. With `auto` also that
    word."""
    def parse(text: str) -> float | str:
        if auto and text == "auto":
            return text
        limits = [f"{words} {limit:g}" for words, limit in (
            ("of at least", least), ("of more than", above), ("of at most", most), ("of less than", below))
            if limit is not None]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (least is not None and value < least) or (most is not None and value > most) \
                or (above is not None and value <= above) or (below is not None and value >= below):
            raise argparse.ArgumentTypeError(f"{text}: must be a number {' and '.join(limits)}".rstrip())
        return value
    return parse


def pixels(text: str) -> int:
    """A height or a width."""
    value = whole(1)(text)
    if value % 8:
        raise argparse.ArgumentTypeError(f"{text}: must be a multiple of 8, such as {max(8, round(value / 8) * 8)}")
    return value


def device_name(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text}: must be auto, cpu, cuda, cuda:N or mps")
    return text


def shard_name(text: str) -> str:
    numbers = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not numbers or int(numbers[1]) >= int(numbers[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: must be I/N with I from 0 to N - 1, such as 0/4")
    return text


# Options that several programs have


def common_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every program has."""
    parser = Parser(description=description, formatter_class=Help)
    parser.add_argument(
        "--model", default="paper-people", metavar="MODEL",
        help="paper-people, a Hub id (owner/name[@revision]), a folder in diffusers layout, or an LDM .safetensors")
    parser.add_argument("--vae", metavar="PATH", help="another VAE than the model's own: a Hub id, folder or file")
    parser.add_argument(
        "--prediction-type", choices=("epsilon", "v_prediction"), help="overrides the model's scheduler_config.json")
    parser.add_argument("--device", type=device_name, default="auto", help="auto is cuda, else mps, else cpu")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", *DTYPES), help="auto is bfloat16 on cuda, float32 elsewhere")
    parser.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=0, help="image i of prompt k has the seed SEED + k * images + i")
    return parser


def add_drawing_options(parser: argparse.ArgumentParser, samplers: Iterable[str]) -> None:
    """How a picture is drawn (`sampling.Drawing`): the same in every program that draws, as in the paper by default."""
    parser.add_argument("--steps", type=whole(1, 1000), default=50, help="of the sampler, 1 to 1000")
    parser.add_argument("--guidance", type=real(0), default=5.0, help="scale of classifier-free guidance; 1 is off")
    parser.add_argument("--height", type=pixels, help="pixels, a multiple of 8 (default: the model's own size)")
    parser.add_argument("--width", type=pixels, help="pixels, a multiple of 8 (default: the model's own size)")
    parser.add_argument("--sampler", default="dpm++", choices=tuple(samplers), help="DPM-Solver++ 2M, ...")
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument(
        "--prompt-weights", default="off", choices=("off", "a1111"),
        help="a1111 reads (word:1.2), [word] and BREAK, and has no limit of 75 tokens")
    parser.add_argument(
        "--clip-skip", type=whole(0), default=0, help="last text layers left out (A1111's number less one)")
    parser.add_argument("--batch-size", type=whole(1), default=4, help="pictures drawn at once; does not change them")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net, a minute for each batch size")


def add_lora_options(parser: argparse.ArgumentParser) -> None:
    """The LoRA that is trained."""
    parser.add_argument("--rank", type=whole(1), help="of the LoRA (default: 8)")
    parser.add_argument("--alpha", type=real(above=0), help="the LoRA acts with alpha / rank (default: 8)")
    parser.add_argument("--init-lora", metavar="FILE", help="start from this LoRA; the reference stays the bare model")
    parser.add_argument("--lora-format", default="kohya", choices=("kohya", "peft"))


def add_training_options(
    parser: argparse.ArgumentParser, schedules: Iterable[str], unit: str, *, lr: float | None, batch_size: int | None,
    grad_accum: int | None, steps: int, save_every: int,
) -> None:
    """How a step is made, of whatever `unit` is; a default of None is the program's to fill in."""
    parser.add_argument("--lr", type=real(above=0), default=lr, help="learning rate")
    parser.add_argument("--warmup", type=whole(0), default=0, help="steps over which the rate rises to --lr")
    parser.add_argument(
        "--lr-schedule", default="constant", choices=tuple(schedules), help="how it then falls, to 0 after --steps")
    parser.add_argument("--ema", type=real(0, below=1), default=0.0, metavar="DECAY",
                        help="save the moving average of the weights, such as 0.98; 0 is off")
    parser.add_argument("--batch-size", type=whole(1), default=batch_size, help=f"{unit} a batch and process")
    parser.add_argument("--grad-accum", type=whole(1), default=grad_accum, help="batches a step")
    parser.add_argument("--steps", type=whole(1), default=steps)
    parser.add_argument("--save-every", type=whole(1), default=save_every, help="steps between checkpoints")
    parser.add_argument("--sample-every", type=whole(0), default=0, help="steps between sample pictures; 0 is never")
    parser.add_argument("--max-grad-norm", type=real(above=0), default=1.0)
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw8bit"))
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net")


def add_prompt_options(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--prompts", metavar="FILE", help=help)
    parser.add_argument("--category", help="with a table of prompts: keep the rows whose Category this is")
    parser.add_argument("--limit", type=whole(1), help="only the first so many prompts")


def add_concept_options(parser: argparse.ArgumentParser) -> None:
    """A person who is given by pictures, to be drawn at a placeholder of the prompts; see `concept_rows`."""
    parser.add_argument("--concept", metavar="FILE", help="a concept that train_concept.py made: prompts have its "
                        "placeholder where the person is")
    parser.add_argument("--concept-image", nargs="+", default=[], metavar="PICTURE", help="with it, pictures of the "
                        "person, cut out by their alpha channel, if any (or each prompt's own, as concept_images in a "
                        ".jsonl of --prompts)")
    parser.add_argument("--concept-strength", type=real(0), metavar="S", help="of the concept's adapters; at 0 the "
                        "person is not seen at all (default: 0.3)")


def concept_strength(
    concept: str | None, pictures: list[str], strength: float | None, prompt_weights: str,
) -> float | None:
    """What --concept-strength stands for; UserError where the options are given that do not go with each other."""
    if not concept and (pictures or strength is not None):
        raise UserError("--concept-image and --concept-strength go with --concept FILE")
    if concept and prompt_weights != "off":
        raise UserError("--concept goes without --prompt-weights, which makes other tokens of a prompt")
    return 0.3 if concept and strength is None else strength


def device_and_dtype(name: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype stand for here; the device becomes the current one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:                            # torchrun: a GPU for every process
        name = f"cuda:{number_from_environment('LOCAL_RANK')}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)        # what launches kernels of its own does it on the current one
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
    if dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, DTYPES[dtype]


def name_of(dtype: torch.dtype) -> str:
    """As --dtype has it."""
    return str(dtype).removeprefix("torch.")


def number_from_environment(name: str) -> int:
    if not os.environ.get(name, "").isdecimal():
        raise UserError(
            f"the environment has {name}={os.environ.get(name, '')!r}, and not torchrun's numbers RANK, WORLD_SIZE and "
            "LOCAL_RANK; start with torchrun, or unset what is left of them")
    return int(os.environ[name])


def rank_and_world() -> tuple[int, int]:
    """This process's number among torchrun's, and how many they are; alone it is (0, 1)."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 1
    rank, world = number_from_environment("RANK"), number_from_environment("WORLD_SIZE")
    if rank >= world:
        raise UserError(f"the environment has RANK={rank} of WORLD_SIZE={world}; ranks are counted from 0")
    return rank, world


def parse_shard(text: str | None) -> tuple[int, int]:
    """--shard I/N, or what torchrun says, as (I, N); alone it is (0, 1)."""
    if text is None:
        return rank_and_world()
    i, n = text.split("/")
    return int(i), int(n)


def read_prompts(source: str, category: str | None = None) -> list[str]:
    """Prompts from a .txt (one a line), .jsonl (`prompt`), .tsv or .csv (column `Prompt` or `prompt`), or the word
    parti-people. Blank lines are left out; `category` keeps the rows of a table whose `Category` it is."""
    if source == "parti-people":
        if category not in (None, "People"):
            raise UserError(f"--category {category}: parti-people are those of the category People")
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
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise UserError(f"{path}: a .json; expected .txt, .jsonl, .tsv or .csv")
    if category and suffix not in (".tsv", ".csv"):
        raise UserError(f"{path}: --category needs a table (.tsv or .csv) with a column Category")
    text = read_text(path)
    if suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        prompts = [parse_object(line, f"{path}:{n}", {"prompt": str})["prompt"] for n, line in lines if line.strip()]
    elif suffix in (".tsv", ".csv"):
        tab = suffix == ".tsv"
        rows = csv.DictReader(
            io.StringIO(text), delimiter="\t" if tab else ",", quoting=csv.QUOTE_NONE if tab else csv.QUOTE_MINIMAL)
        try:
            columns = rows.fieldnames or ()
            column = next((name for name in ("Prompt", "prompt") if name in columns), None)
            if columns and (column is None or (category and "Category" not in columns)):
                raise UserError(f"{path}: its columns are {', '.join(columns)}; expected Prompt (and Category)")
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


def progress(items: Iterable, total: int, label: str) -> Iterator:
    """Passes items on and draws a bar on stderr: a line that renews itself, or one line a tenth where it is a file.
    Of torchrun's processes only the first draws; and a bar that nobody reads any more stops no work."""
    start, shown, tty = time.monotonic(), -1, sys.stderr.isatty()
    draws = rank_and_world()[0] == 0
    for i, item in enumerate(items):
        yield item
        done, seconds = i + 1, time.monotonic() - start
        left = seconds / done * (total - done)
        line = f"{label} {done}/{total}  {seconds:.0f} s, {left:.0f} s left"
        with contextlib.suppress(OSError):
            if tty and draws:
                bar = "#" * (30 * done // total)
                print(f"\r{label} [{bar:<30}] {line[len(label) + 1:]} ", end="", file=sys.stderr, flush=True)
            elif draws and 10 * done // total > shown:
                shown = 10 * done // total
                print(line, file=sys.stderr, flush=True)
    if tty and draws:
        print(file=sys.stderr)


def print_table(head: list[str], lines: list[list[str]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(head, *lines)]
    for line in (head, *lines):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip())


def run(main: Callable[[], None]) -> None:
    """Calls main and ends as every program does: 0; 2 and one line on what a person can mend; 130 on Ctrl-C."""
    stopped = []

    def stop(*_) -> None:
        stopped.append(True)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is _leave:            # else it is ignored, as by nohup and by & in a script
        signal.signal(signal.SIGINT, stop)
    for name in ("stdout", "stderr"):            # closed by the shell: >&-
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    with contextlib.suppress(AttributeError):    # a file's name may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {plain(message)}", file=sys.stderr)
    try:
        if rank_and_world()[0] > 0:              # rank 0 alone prints
            devnull = open(os.devnull, "w")
            devnull.stdout, sys.stdout = sys.stdout, devnull
        try:
            main()
        except Exception:
            if stopped:                          # some libraries make another error of it
                raise KeyboardInterrupt from None
            raise
        sys.stdout.flush()
    except UserError as error:
        sys.exit(say(str(error)))
    except KeyboardInterrupt:
        sys.exit(say("stopped; what was finished is saved", 130))
    except BrokenPipeError:                      # whoever read our output has gone
        sys.stdout = open(os.devnull, "w")
        sys.exit(say("nobody reads the output any more; what was finished is saved"))
    except OSError as error:                     # a disk that is full, a folder that may not be written
        sys.exit(say(f"{error.filename or 'file'}: {error.strerror or error}"))
    except (MemoryError, RuntimeError) as error:
        if re.search("Connection (closed|reset) by peer", str(error)):       # as gloo says it
            sys.exit(say("another process of this run has ended; what was finished is saved"))
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        less = "a smaller --batch-size, --dtype bfloat16, or (train.py) --gradient-checkpointing takes less"
        sys.exit(say(f"out of memory ({str(error).splitlines()[0][:120] if str(error) else 'host'}); {less}"))


def print_from_any_rank() -> contextlib.AbstractContextManager:
    """Within the block every rank prints: of jobs that share a folder any may be the one that ends it."""
    return contextlib.redirect_stdout(getattr(sys.stdout, "stdout", sys.stdout))


def refuse_float16(dtype: str) -> None:
    """For what trains, without a loss scaler."""
    if dtype == "float16":
        raise UserError("--dtype float16: small gradients vanish in it; use bfloat16 or float32")


def refuse(problems: list[str], summary: str) -> None:
    """Where there are problems, the first 20 are printed, and the UserError is their summary."""
    for problem in problems[:20]:
        say(problem)
    if problems:
        raise UserError(summary)


def say(message: str, code: int = 2) -> int:
    """A line on stderr, where what is said may hold names and texts of strangers' files. -> the code to end with."""
    with contextlib.suppress(OSError):
        print(f"{Path(sys.argv[0]).name}: {plain(message)}", file=sys.stderr)
    return code


def plain(message: object) -> str:
    """In one line, without what would command a terminal."""
    return CONTROLS.sub(" ", " ".join(str(message).splitlines()))
