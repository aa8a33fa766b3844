"""Scores a folder of pictures, each with its prompt, under any scorers.

    python score.py --images out --scorers pickscore,hpsv2,imagereward,aesthetic,clip         # what generate.py wrote
    python score.py --images photos --prompts prompts.txt --scorers "my_scorer.py:Sharpness,0.5*pickscore+2*imagereward"

Scorers are listed in model/scorers.py. Prompts come from IMAGES/images.jsonl, or from a file: a .jsonl with `file` and
`prompt`, or any prompt file with as many prompts as there are pictures, in the order of the pictures' names.
Writes OUT, a line a picture: {"file": ..., "prompt": ..., "scores": {"pickscore": 21.3, ...}}; prints the means.
A picture or a scorer that cannot be read is named, and the others are scored; the program then ends with 2.
"""

import cli

# isort: split
import json
import sys
from pathlib import Path

import torch

from dataset.images import open_picture, read_captions
from model.errors import UserError
from model.files import read_text, write_text
from model.scorers import load_scorer, reads_prompts

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def list_pictures(folder: Path, prompts: str | None, promptless: bool = False) -> list[dict]:
    """{file, prompt} of every picture to score; `promptless` when no scorer reads them."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    # sheet.png is the contact sheet that our own programs write.
    files = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name != "sheet.png")
    listing = Path(prompts) if prompts else folder / "images.jsonl"
    if listing.is_file() and (prompts is None or listing.suffix == ".jsonl" and '"file"' in read_text(listing)):
        listed = read_captions(listing, [folder])
        unlisted = sorted(set(files) - {row["file"] for row in listed})
        if unlisted:
            print(f"not in {listing}, and not scored: {len(unlisted)} pictures ({unlisted[0]!r}, ...)")
        return listed
    if not files:
        raise UserError(f"{folder}: no pictures here ({', '.join(SUFFIXES)})")
    if prompts is None:
        if not promptless:
            raise UserError(f"{folder}: no images.jsonl here, which would hold the prompts; give them with --prompts")
        return [{"file": file, "prompt": ""} for file in files]
    texts = cli.read_prompts(prompts)
    if len(texts) != len(files):
        raise UserError(f"{len(files)} pictures in {folder} and {len(texts)} prompts in {prompts}; expected one each")
    return [{"file": file, "prompt": text} for file, text in zip(files, texts)]


def score_all(
    name: str, folder: Path, rows: list[dict], bad: dict[str, str], batch_size: int, device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Adds one scorer's scores to the rows; pictures that cannot be read are noted in `bad`, and left out."""
    scorer = load_scorer(name, device, dtype)
    formula = getattr(scorer, "formula", None)
    print(f"{name}: {formula}" if formula else name)
    scored = []
    batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    for batch in cli.progress(batches, len(batches), name):
        images = {}
        for row in batch:
            if row["file"] not in bad:
                try:
                    images[row["file"]] = open_picture(folder / row["file"])
                except UserError as error:
                    bad[row["file"]] = str(error)
        readable = [row for row in batch if row["file"] in images]
        if readable:
            given = [images[row["file"]] for row in readable], [row["prompt"] for row in readable]
            scored += zip(readable, scorer(*given).tolist(), strict=True)
    for row, score in scored:                    # at the end: a scorer that fails on the way leaves nothing behind
        row["scores"][name] = score


def parse_args():
    parser = cli.Parser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--images", required=True, metavar="DIR")
    parser.add_argument("--prompts", metavar="FILE", help=".jsonl, .txt, .tsv, .csv (default: DIR/images.jsonl)")
    parser.add_argument("--scorers", default="pickscore", metavar="A,B,...", help="see model/scorers.py")
    parser.add_argument("--out", default="scores.jsonl", metavar="FILE")
    parser.add_argument("--batch-size", type=cli.whole(1), default=8, help="pictures scored at once")
    parser.add_argument("--device", type=cli.device_name, default="auto", help="auto is cuda, else mps, else cpu")
    parser.add_argument(
        "--dtype", default="float32", choices=tuple(cli.DTYPES), help="the half precisions make ties between scores")
    args = parser.parse_args()
    args.scorers = list(dict.fromkeys(name.strip() for name in args.scorers.split(",") if name.strip()))
    if not args.scorers:
        raise UserError("--scorers: none given, such as pickscore,clip")
    if Path(args.out).is_dir():
        raise UserError(f"--out {args.out}: a folder; give a file, such as {Path(args.out) / 'scores.jsonl'}")
    return args


def main() -> None:
    args = parse_args()
    device, dtype = cli.device_and_dtype(args.device, args.dtype)
    folder, out = Path(args.images), Path(args.out)
    promptless = not any(reads_prompts(name) for name in args.scorers)
    rows = [{**row, "scores": {}} for row in list_pictures(folder, args.prompts, promptless)]
    print(f"scoring {len(rows)} pictures of {folder} with {', '.join(args.scorers)} on {device} in {args.dtype}")

    problems, bad = [], {}
    for name in args.scorers:                    # one scorer in memory at a time
        try:
            score_all(name, folder, rows, bad, args.batch_size, device, dtype)
        except UserError as error:
            problems.append(f"{name}: {error}")
        scored = [row for row in rows if row["scores"]]
        if scored:                               # after each: what is scored is kept
            write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored))

    for name in args.scorers:
        values = [row["scores"][name] for row in rows if name in row["scores"]]
        if values:
            print(f"{name}: mean {sum(values) / len(values):.4f} of {len(values)} pictures")
    for problem in [*bad.values(), *problems]:
        cli.say(problem)
    if bad or problems:
        sys.exit(2)


if __name__ == "__main__":
    cli.run(main)
