"""Files from strangers: valid ones of every kind, damaged in their bytes or in what they say, and given to the
programs. Whatever comes, it is to be read, or refused in a line.

    python benchmarks/fuzz.py [--count 10000] [--seed 0] [--kind dataset]

A failure is any other exception, more than SECONDS or MEMORY, a program started, the network asked, code in a pickle
run, a picture read that a list may not lead to, or anything changed outside the input's folder. Each kind has its share
of --count. Input i of a kind depends on --seed + i alone: `--kind KIND --seed N --count 1` makes one again, with its
traceback.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import build_dataset  # noqa: E402
import cli  # noqa: E402
import evaluate  # noqa: E402
import generate  # noqa: E402
import score  # noqa: E402
import train  # noqa: E402
from benchmarks.damage import LINK, RAN, SECRET, damaged  # noqa: E402
from dataset.images import open_picture  # noqa: E402
from dataset.preferences import picture_columns  # noqa: E402
from dataset.rows import pending_rows  # noqa: E402
from model.builtin import BUILT_IN, PAPER_PEOPLE  # noqa: E402
from model.checkpoint import load_pipeline  # noqa: E402
from model.errors import UserError  # noqa: E402
from model.lora import inject_lora, save_lora  # noqa: E402
from model.tokenizer import Tokenizer  # noqa: E402
from pictures import parameters, write_png  # noqa: E402

SECONDS, MEMORY = 60, 12 << 30                 # of an input, at most; of the address space
HERE = Path(".")                               # the folder of the input
SMALL = ("--steps", 1, "--height", 16, "--width", 16)
TWO = ("--lora", "kohya.safetensors", "--limit", 2, *SMALL)


# Programs

def run(module, *arguments: object) -> None:
    """As the command line does, but here."""
    sys.argv = [module.__name__, *map(str, arguments)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        module.main()
    signal.signal(signal.SIGINT, signal.default_int_handler)           # train.py would note it, and go on


def draw(at: Path, *options: object) -> None:
    run(generate, "--prompt", "a x man", *SMALL, "--out", at / "out", *options)


def build(at: Path, limit: int = 3) -> None:
    run(build_dataset, "--limit", limit, "--pool-size", 3, "--keep", "pool", *SMALL, "--out", at / "data")


def learn(at: Path) -> None:
    for loss in ("hg-dpo", "kto", "pro"):
        run(train, "--data", at / "data", "--loss", loss, "--out", at / loss, "--steps", 1, "--rank", 1)
    run(build_dataset, "--reselect", at / "data", "--pool-size", 3, "--out", at / "again")


def go_on(at: Path, steps: int = 3) -> None:
    run(train, "--data", at / "data", "--out", at / "run", "--steps", steps, "--rank", 1, "--ema", 0.5)


def judge(at: Path, *sides: object) -> None:
    run(evaluate, *sides, "--scorers", "paper-people", "--out", at / "eval")


# Valid files

def make_checkpoint(at: Path) -> None:
    """A folder whose U-Net is in shards, whose VAE is a pickle, and whose tokenizers are in both forms."""
    shutil.copytree(BUILT_IN["paper-people"].checkpoint, at / "model", ignore=shutil.ignore_patterns("judge"))
    vae, unet = (at / "model" / part / "diffusion_pytorch_model.safetensors" for part in ("vae", "unet"))
    tensors, places = load_file(unet), {}
    torch.save(load_file(vae), vae.with_suffix(".bin"))
    for i in range(2):
        shard, names = unet.with_name(f"{unet.stem}-0000{i + 1}-of-00002.safetensors"), list(tensors)[i::2]
        save_file({name: tensors[name] for name in names}, shard)
        places |= dict.fromkeys(names, shard.name)
    unet.with_name(f"{unet.name}.index.json").write_text(json.dumps({"weight_map": places}))
    Tokenizer.from_folder(at / "model" / "tokenizer").core.save(str(at / "model" / "tokenizer" / "tokenizer.json"))
    for file in (vae, unet, *(at / "model" / "tokenizer" / name for name in ("vocab.json", "merges.txt"))):
        file.unlink()


def make_loras(at: Path) -> None:
    pipeline = load_pipeline()
    for parameter in inject_lora(pipeline.unet, 2, 2.0):
        parameter.data.normal_(std=0.01)
    told = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"attn1.to_[qk]": 7}, "unet.use_rslora": True}
    save_lora(at / "kohya.safetensors", pipeline.unet)
    save_lora(at / "peft.safetensors", pipeline.unet, "default", "peft", {"lora_adapter_metadata": json.dumps(told)})


def make_prompts(at: Path) -> None:
    (at / "a.txt").write_text("a (man:1.2) with [red] hair\n((b)) BREAK c \\( d\n")
    (at / "a.jsonl").write_text('{"prompt": "a (man:1.2)"}\n')
    (at / "a.csv").write_text('Prompt,Category\n"a, (man:1.2)",People\n')


def make_preferences(at: Path) -> None:
    names = ["red.png", "blue.png"]
    for name in names:
        Image.new("RGB", (12, 8), name[:-4]).save(at / name)
    own, ranks = {"prompt": "a", "winner": names[0], "loser": names[1], "tie": False}, enumerate(names)
    ranked = [{"prompt": "a", "prompt_id": "1", "image_path": name, "rank": rank} for rank, name in ranks]
    judged = {"prompt": "a", "file_path": names, "human_preference": [0, 1]}
    picked = {f"jpg_{i}": (at / name).read_bytes() for i, name in enumerate(names)} | {"caption": "a", "label_0": 1.0}
    for name, rows in {"own": [own], "ranked": ranked, "judged": [judged], "picked": [picked]}.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), at / f"{name}.parquet")
        if rows != [picked]:
            (at / f"{name}.json").write_text(json.dumps(rows))


def make_pictures(at: Path) -> None:
    rgb, exif = Image.effect_noise((32, 24), 90).convert("RGB"), Image.Exif()
    exif[0x0112] = 6                           # to be turned
    for end in ("png", "jpg", "webp", "tiff"):
        rgb.save(at / f"rgb.{end}", exif=exif)
    for packed, mode in {"group4": "1", "tiff_lzw": "RGB", "jpeg": "RGB", "raw": "F"}.items():
        rgb.convert(mode).save(at / f"{packed}.tiff", compression=packed)
    for name, mode in {"ink.jpg": "CMYK", "palette.bmp": "P", "alpha.png": "LA", "deep.png": "I;16"}.items():
        rgb.convert("L").convert(mode).save(at / name)
    rgb.convert("P").save(at / "moving.gif", save_all=True, append_images=[rgb.convert("P")])


def make_drawn(at: Path) -> None:
    """As generate.py leaves them, and as a list to learn from."""
    text = parameters("a cat\nand, a dog", "bad", {"Steps": 5, "Model": 'my, "model": v1', "Size": "1x2"})
    write_png(at / "a.png", Image.new("RGB", (16, 16), "red"), {"parameters": text})
    for name, row in {"images": {"file": "a.png", "prompt": "a", "seed": 1},
                      "metadata": {"file_name": "a.png", "text": "b"}}.items():
        (at / f"{name}.jsonl").write_text(json.dumps(row) + "\n")


def make_dataset(at: Path, finished: bool) -> None:
    build(at)
    if not finished:                           # as a kill leaves it that comes while a row is added
        pending_rows(at / "data", 4)
    manifest = json.loads((at / "data" / "dataset.json").read_text()) | {"finished": finished}
    del manifest["files"]                      # or damage would be told by its digest alone
    (at / "data" / "dataset.json").write_text(json.dumps(manifest))


# Which files are damaged; what makes them; what reads them: each is given the folder, and the reader the file, too.
KINDS: dict[str, tuple[str, Callable, Callable]] = {
    "configs": ("model/**/*.json", make_checkpoint, lambda at, file: draw(at, "--model", at / "model")),
    "weights": ("model/[!s]*/*model*", make_checkpoint, lambda at, file: draw(at, "--model", at / "model")),
    "scorer": ("model/scorer/*", lambda at: (make_checkpoint(at), make_drawn(at)), lambda at, file: run(
        score, "--images", at, "--scorers", at / "model" / "scorer", "--out", at / "scores")),
    "LoRA": ("*.safetensors", make_loras, lambda at, file: draw(at, "--lora", file)),
    "concept": ("concept*", lambda at: (shutil.copy(PAPER_PEOPLE / "concept.safetensors", at), make_drawn(at)),
                lambda at, file: draw(at, "--concept", file, "--concept-image", at / "a.png")),
    "prompts": ("a.*", make_prompts, lambda at, file: draw(
        at, "--prompts", file, "--limit", 2, "--prompt-weights", "a1111")),
    "preferences": ("*[!g]", make_preferences, lambda at, file: (picture_columns.cache_clear(), run(
        build_dataset, "--from-pairs", file, *SMALL, "--out", at / "data"))),
    "picture": ("[!l]*", make_pictures, lambda at, file: open_picture(file, keep_alpha=True).resize((8, 8))),
    "list of pictures": ("[!l]*", make_drawn, lambda at, file: (
        run(build_dataset, "--from-images", at, *SMALL, "--out", at / "data"),
        judge(at, "--baseline", at, "--candidate", at))),
    "dataset": ("data/*.*", lambda at: make_dataset(at, True), lambda at, file: learn(at)),
    "unfinished dataset": ("data/**/*.*", lambda at: make_dataset(at, False), lambda at, file: build(at, 4)),
    "run": ("run/*.*", lambda at: (build(at), go_on(at, 2)), lambda at, file: go_on(at)),
    "state of a run": ("run/*/*.pt", lambda at: (build(at), go_on(at, 2)), lambda at, file: go_on(at)),
    "evaluation": ("eval/*.js*", lambda at: (make_loras(at), judge(at, *TWO)), lambda at, file: judge(at, *TWO))}


# The work

class Escaped(BaseException):
    """What no reader catches."""


reading = [""]                                 # the folder of the input that is read
STARTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect",
          "socket.getaddrinfo")
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate")


def audit(event: str, about: tuple) -> None:
    if not reading[0] or event not in (*STARTS, *CHANGES, "open"):
        return
    names = [name for name in about[:1 if event == "open" else 2] if isinstance(name, (str, bytes, os.PathLike))]
    outside = [place for place in map(os.path.realpath, names) if not place.startswith((reading[0], os.devnull))]
    changes = event in CHANGES or event == "open" and (about[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if event in STARTS or outside and (changes or outside == [os.path.realpath(SECRET)]):
        raise Escaped(f"{event} {about!r:.80}")


sys.addaudithook(audit)


def too_slow(*_) -> None:
    raise Escaped(f"more than {SECONDS} seconds")


def outcome(read: Callable, file: Path) -> str | BaseException:
    """Of reading the folder where we are: refused, accepted, or what else was raised."""
    reading[0] = os.getcwd()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read(HERE, file)
        found = "accepted"
    except (UserError, OSError):               # which cli.run says in a line, too
        found = "refused"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        found = "refused" if isinstance(error, SystemExit) and error.code == 2 else error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        reading[0] = ""
    return Escaped("code in a pickle was run") if Path(RAN).exists() else found


@contextlib.contextmanager
def copy_of(valid: Path) -> Iterator[None]:
    """Within the block it is where we are: the same place for every input, since programs note paths."""
    place = shutil.copytree(valid, valid.parent / "input", symlinks=True)
    os.chdir(place)
    yield
    os.chdir(valid)
    shutil.rmtree(place)


def outcomes(kind: str, seeds: range) -> Iterator[str | BaseException]:
    """Of the inputs of a kind, one after another. What is not damaged is read first, and must be accepted."""
    files, make, read = KINDS[kind]
    signal.signal(signal.SIGALRM, too_slow)
    with tempfile.TemporaryDirectory() as folder:
        (valid := Path(os.path.realpath(folder), "valid")).mkdir()
        os.chdir(valid)
        Image.new("RGB", (8, 8)).save(SECRET)
        Path(LINK).symlink_to(SECRET)
        make(HERE)
        with copy_of(valid):
            if (found := outcome(read, min(HERE.glob(files)))) != "accepted":
                sys.exit(f"{kind}: what is not damaged must be accepted, and is {found!r}")
        for seed in seeds:
            with copy_of(valid):
                rng = random.Random(f"{kind} {seed}")
                file = rng.choice(sorted(path for path in HERE.glob(files) if path.is_file() and path.name[0] != "."))
                file.write_bytes(damaged(file, rng))
                yield outcome(read, file)
        os.chdir("/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=tuple(KINDS), help="repeatable (default: all)")
    args = parser.parse_args()
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    table, failures, kinds = [], [], args.kind or list(KINDS)
    for kind in cli.progress(kinds, len(kinds), "kinds"):
        counts, begun = Counter(), time.monotonic()
        seeds = range(args.seed, args.seed + max(1, args.count // len(kinds)))
        for seed, found in zip(seeds, outcomes(kind, seeds), strict=True):
            counts[found if isinstance(found, str) else "failures"] += 1
            if not isinstance(found, str):
                failures.append(f"--kind {kind!r} --seed {seed} --count 1: {type(found).__name__}: {found!s:.150}")
                if args.count == 1:
                    traceback.print_exception(found)
        numbers = [counts.total(), *(counts[key] for key in ("refused", "accepted", "failures"))]
        table.append([kind, *map(str, numbers), f"{time.monotonic() - begun:.0f}"])
    cli.print_table(["kind", "inputs", "refused", "accepted", "failures", "seconds"], table)
    print("\n".join(failures))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
