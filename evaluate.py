"""Is it better, and did the colours shift? Draws two or more models from the same seeds, and judges pair by pair.

    python evaluate.py --lora run/lora.safetensors:0.5 --out eval                  # against the bare model
    python evaluate.py --compare dpo=a.safetensors,hg-dpo=b.safetensors,lan=a.safetensors+lan --run run --out table
    python evaluate.py --candidate tuned/ --baseline owner/name+old.safetensors:0.8 --prompts parti-people --out eval
    python evaluate.py --candidate drawn/ --baseline base/ --out eval              # folders that generate.py wrote
    python evaluate.py --preference-accuracy test.json --lora run/lora.safetensors --out judges    # judges the judges
    torchrun --nproc-per-node 8 evaluate.py ...   or   --shard i/n in n jobs       # they share the folder, nothing else

OUT/report.html         one page that opens from disk: tables, charts, and the pairs side by side, sorted by any scorer
OUT/report.json         win rates with ties and 95 % intervals, mean scores, colour shift (Table 2), diversity, FID
OUT/sheet.png           twelve prompts' pictures, spread over the list, side under side
OUT/images/SIDE/        the pictures, which a killed run does not draw again
OUT/scores-SIDE.jsonl   a line a picture: its scores, its colours

A picture or a scorer that cannot be read is named at the end, and left out; the program then ends with 2.
"""

import cli

# isort: split
import importlib.util
import json
import sys
import tempfile
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image

from dataset.folder import begin, in_turn, locked, noted
from judgement import HSV, colour_shift, colours, win_rate
from judges import ImplicitReward, chunked, join_scores, load_judge, load_spread, measure
from model.errors import UserError
from model.files import digest_of, read_json, read_text, write_text
from pictures import open_picture, sheet, write_png
from preferences import digest_of_source, read_pairs
from report import page, read_log, rgb_shift
from sides import Side, draw_side, drawn_digest, load_side, make_rows, parse_sides, unlike_settings

TOWERS = ("pickscore", "paper-people", "clip", "aesthetic")     # these have an image tower to measure diversity with
# Not noted in evaluation.json; or noted by their contents: the sides, the prompts. Scorers may be added.
NOT_NOTED = ("out", "device", "batch_size", "shard", "scorers", "run", "fid", "lora", "lan", "candidate", "baseline",
             "compare", "limit", "category")
MAY_CHANGE = ("model", "vae", "prompts", "preference_accuracy")
SHEET_COLUMNS = 12
SHOWN = ("height", "width", "steps", "guidance", "sampler", "negative_prompt", "seed", "num_images", "dtype")


def parse_args():
    parser = cli.common_parser(__doc__)
    parser.add_argument(
        "--lora", action="append", default=[], type=cli.lora_spec, metavar="FILE[:WEIGHT]",
        help="the candidate is --model with this; repeatable; weight 1 unless given")
    parser.add_argument("--candidate", metavar="MODEL[+LORA[:WEIGHT]]", help="or any model, or a folder of pictures")
    parser.add_argument("--compare", metavar="NAME=LORA[:WEIGHT][+lan],...", help="or several, each --model with that")
    parser.add_argument("--baseline", metavar="MODEL[+LORA[:WEIGHT]]", help="what to be better than; else --model")
    parser.add_argument("--lan", action="store_true", help="draw the candidate with its base's colours kept (Eq. 7)")
    cli.add_prompt_options(parser, "see generate.py (default: paper people's test prompts with paper-people, else "
                           "parti-people)")
    parser.add_argument("--num-images", type=cli.whole(1), default=1, help="pictures a prompt and side")
    parser.add_argument("--scorers", metavar="A,B,...", help="see model/scorers.py (default: the model's own; with "
                        "paper-people: paper-people,judge; else pickscore,hpsv2,imagereward,aesthetic,clip)")
    parser.add_argument(
        "--run", action="append", default=[], metavar="DIR", help="show this training run's curves; repeatable")
    parser.add_argument("--fid", metavar="DIR", help="each side's FID against these pictures; needs torch-fidelity")
    parser.add_argument("--preference-accuracy", metavar="FILE", help="instead: how often each scorer, and with --lora "
                        "its implicit reward, agrees with these preferences (see preferences.py)")
    parser.add_argument("--human-only", action="store_true", help="of these only the ones about people")
    parser.add_argument(
        "--shard", type=cli.shard_name, metavar="I/N", help="this job's part, 0/4 ... 3/4 (torchrun sets it)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the same command goes on with it")
    cli.add_sampling_options(parser)
    args = parser.parse_args()
    ways = [f"--{name}" for name in ("lora", "candidate", "compare") if getattr(args, name)]
    if args.preference_accuracy and ways not in ([], ["--lora"]):
        raise UserError(f"{' and '.join(ways)}: with --preference-accuracy give --lora, or none")
    if not args.preference_accuracy and len(ways) != 1:
        raise UserError(f"{' and '.join(ways) or 'nothing to judge'}: give one of --lora, --candidate and --compare")
    if args.human_only and not args.preference_accuracy:
        raise UserError("--human-only goes with --preference-accuracy")
    own = Path(args.model) / "scorer"
    default = "paper-people,judge" if args.model == "paper-people" else "pickscore,hpsv2,imagereward,aesthetic,clip"
    names = (args.scorers or (str(own) if own.is_dir() else default)).split(",")
    args.scorers = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not args.scorers and not (args.preference_accuracy and args.lora):
        raise UserError("--scorers: none given, such as pickscore,clip")
    for folder in args.run:
        if not (Path(folder) / "log.jsonl").is_file():
            raise UserError(f"--run {folder}: no log.jsonl in it; expected a folder that train.py wrote")
    if args.fid and not Path(args.fid).is_dir():
        raise UserError(f"--fid {args.fid}: no such folder")
    if args.fid and importlib.util.find_spec("torch_fidelity") is None:
        raise UserError('--fid needs torch-fidelity: pip install "hg-dpo[fid]"')
    return args


def begin_evaluation(
    args, out: Path, inputs: dict[str, str], sides: list[Side], digests: dict[str, str], rows: list[dict],
) -> None:
    """Notes what the folder is for; refuses other contents, and what has changed since. New candidates may come."""
    options = {name: value for name, value in vars(args).items() if name not in NOT_NOTED}
    what = {side.name: {"is": str(side), "digest": digests[side.name]} for side in sides}
    before = begin(out / "evaluation.json", options, inputs, MAY_CHANGE)
    if before:
        read_json(out / "evaluation.json", sides=dict, judges=dict)
    for name, now in what.items():
        then = before.get("sides", {}).get(name, now)
        if then != now:
            was = then.get("is") if isinstance(then, dict) else then
            changed = now["is"] if now["is"] != was else "one with other contents"
            raise UserError(f"{out}: its {name} is {was}, and now it is {changed}; choose another --out")
    listing = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    listings = [side.folder(out) / "images.jsonl" for side in sides if rows and not side.drawn]
    for path in listings:
        if path.is_file() and read_text(path) != listing:
            raise UserError(f"{out}: begun with other prompts than --prompts has now; choose another --out")
    noted(out / "evaluation.json", options, inputs, sides=before.get("sides", {}) | what,
          judges=before.get("judges", {}))
    for path in listings:
        write_text(path, listing)


# Judging

def fid(pictures: list[Path], real: str, device: torch.device) -> float:
    """By torch-fidelity, which pytorch-fid's figures compare with. It falls with the number of pictures: compare only
    sides with equally many, best thousands. Of `pictures` alone: a folder may hold a sheet, and older pictures."""
    from torch_fidelity import calculate_metrics
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number, path in enumerate(pictures):
                (Path(folder) / f"{number:06d}{path.suffix}").symlink_to(path.resolve())
            return calculate_metrics(
                input1=folder, input2=real, fid=True, cuda=device.type == "cuda", batch_size=1, verbose=False,
            )["frechet_inception_distance"]
    except Exception as error:                 # its own, the network's and the decoders' errors have no class in common
        raise UserError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None


def summary(sides: list[str], scores: dict[str, list[dict]], scorers: list[str]) -> dict:
    """What report.json says of the pictures; for a single candidate also at the top, without its name."""
    def column(side: str, name: str) -> list:
        return [said[name] for said in scores[side]]

    means = {name: {side: sum(column(side, name)) / len(scores[side]) for side in sides} for name in scorers}
    candidates = {side: {
        "win_rate": {name: win_rate(column(side, name), column(sides[0], name)) for name in scorers},
        "colour_shift": colour_shift(column(side, "colours"), column(sides[0], "colours"))} for side in sides[1:]}
    report = candidates[sides[1]] if len(sides) == 2 else {}
    report = {**report, "candidates": candidates, "mean_score": means}
    if all("diversity" in said for side in sides for said in scores[side]):
        report["diversity"] = {side: sum(column(side, "diversity")) / len(scores[side]) for side in sides}
    return report


def print_table(head: list[str], lines: list[list[str]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(head, *lines)]
    for line in (head, *lines):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip())


def won(rate: dict) -> str:
    percent = "all tied" if rate["percent"] is None else f"{rate['percent']:.1f} %"
    ties = f", {rate['ties']} tied" if rate["ties"] else ""
    return f"{percent} ({rate['ci95'][0]:.1f} to {rate['ci95'][1]:.1f}{ties})"


def print_candidates(candidates: dict[str, dict], scorers: list[str]) -> None:
    lines = []
    for name, found in candidates.items():
        shift = found["colour_shift"]
        changes = ["-" if shift[channel] is None else f"{shift[channel]:+.1f} %" for channel in HSV]
        rates = [won(found["win_rate"][scorer]) for scorer in scorers]
        lines.append([name, *rates, *changes, f"{shift['hue_degrees']:.1f}", rgb_shift(shift)])
    print_table(["", *scorers, *HSV, "hue degrees", "RGB of 255"], lines)


def compare(args, out: Path, device: torch.device, dtype: torch.dtype, part: int, parts: int) -> dict[str, str]:
    """Draws and judges all sides, and writes the report, once all jobs are done. -> what went wrong."""
    sides = parse_sides(args)
    rows = make_rows(args, sides)
    to_draw = [side for side in sides if not side.drawn]
    # Before the first picture: what is wrong with the last side shows now.
    digests = {side.name: drawn_digest(side, rows) if side.drawn else load_side(args, side, device, dtype)[1]
               for side in sides}
    unlike = unlike_settings(args, sides, rows)
    for difference in unlike:
        print(f"not drawn alike: {difference}; this is judged, too", file=sys.stderr)
    names = [side.name for side in sides]
    folders = {side.name: side.folder(out) for side in sides}
    judges = {"colours": lambda: lambda images, prompts: [colours(image) for image in images]}
    judges |= {name: partial(load_judge, name, device) for name in args.scorers}
    towers = [name for name in args.scorers if name.partition(":")[0] in TOWERS or Path(name).is_dir()]
    if towers and any(len(list(pictures)) > 1 for _, pictures in groupby(rows, key=lambda row: row["prompt"])):
        judges["diversity"] = partial(load_spread, towers, device)

    def picture(side: str, row: dict) -> Image.Image:
        return open_picture(folders[side] / row["file"])

    with locked(out, part, parts, f"{parts} jobs"):
        with in_turn(out):
            begin_evaluation(args, out, {"prompts": digest_of(rows)}, sides, digests, rows)
        print(
            f"{len(rows)} pictures of {args.width}x{args.height} a side to {out}, on {device} in {args.dtype}, job "
            f"{part + 1} of {parts}: " + "; ".join(f"{side.name} is {side}" for side in sides))
        chunks = chunked(rows, args.batch_size)[part::parts]
        for side in to_draw:
            draw_side(args, side, out, chunks, device, dtype)
        problems = measure(out, names, chunks, picture, judges, f"{part}-of-{parts}")
        all_drawn = all((folders[name] / row["file"]).is_file() for name in names for row in rows)
        with in_turn(out):
            joined = join_scores(out, names, rows, list(judges), picture, problems) if all_drawn else None
        if joined is None:
            print(f"{out}: this job's part is done; the others' are not")
            return problems
        kept, scores = joined
        if not kept:
            raise UserError(f"{out}: no picture that can be read on every side; {next(iter(problems.values()), '')}")
        scorers = [name for name in args.scorers if name not in problems]
        report = {
            "sides": {side.name: str(side) for side in sides}, "pictures": len(kept),
            "settings": {name: getattr(args, name) for name in SHOWN if to_draw or name in ("height", "width")},
            **({"not_drawn_alike": unlike} if unlike else {}), **summary(names, scores, scorers)}
        try:
            if args.fid:
                report["fid"] = {
                    name: fid([folders[name] / row["file"] for row in kept], args.fid, device) for name in names}
        except UserError as error:
            problems["fid"] = f"FID is left out: {error}"
        report["left_out"] = sorted(problems.values())
        write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
        write_text(out / "report.html", page(report, kept, scores, picture, {run: read_log(run) for run in args.run}))
        columns = min(SHEET_COLUMNS, len(kept))
        shown = [(name, i * len(kept) // columns) for name in names for i in range(columns)]
        captions = [" ".join([name, *(f"{scores[name][i][scorer]:.2f}" for scorer in scorers[:1]), kept[i]["prompt"]])
                    for name, i in shown]
        write_png(out / "sheet.png", sheet([picture(name, kept[i]) for name, i in shown], captions, columns))
    with cli.last_word():
        print(f"win rates against {sides[0]} (95 % interval), and colour shift:")
        print_candidates(report["candidates"], scorers)
        print(f"{out / 'report.html'} shows every pair")
    return problems


def preference_accuracy(
    args, out: Path, device: torch.device, dtype: torch.dtype, part: int, parts: int
) -> dict[str, str]:
    """How often each scorer puts the preferred picture first: a win rate of the preferred over the others."""
    pairs = read_pairs(Path(args.preference_accuracy), args.human_only)[:args.limit]
    rows = [{"file": f"{i:06d}", "prompt": pair.prompt} for i, pair in enumerate(pairs)]
    judges = {name: partial(load_judge, name, device) for name in args.scorers}
    policy = Side("policy", args.model, tuple(args.lora))
    digests = {}
    if args.lora:
        digests["policy"] = load_side(args, policy, device, dtype)[1]
        judges["implicit-reward"] = lambda: ImplicitReward(args, load_side(args, policy, device, dtype)[0])
    load = lru_cache(maxsize=16)(lambda i: pairs[i].load()[1])

    def picture(side: str, row: dict) -> Image.Image:
        return load(int(row["file"]))[{"preferred": "w", "other": "l"}[side]]

    names = ["preferred", "other"]
    with locked(out, part, parts, f"{parts} jobs"):
        with in_turn(out):
            inputs = {"preference_accuracy": digest_of_source(pairs)}
            begin_evaluation(args, out, inputs, [policy] if args.lora else [], digests, [])
        print(f"{len(pairs)} preferences to {out}, judged by {', '.join(judges)}, job {part + 1} of {parts}")
        chunks = chunked(rows, args.batch_size)[part::parts]
        problems = measure(out, names, chunks, picture, judges, f"{part}-of-{parts}")
        with in_turn(out):
            joined = join_scores(out, names, rows, list(judges), picture, problems)
        if joined is None:
            print(f"{out}: this job's part is done; the others' are not")
            return problems
        _, scores = joined
        rates = {name: win_rate(*([said[name] for said in scores[side]] for side in names))
                 for name in judges if name not in problems}
        report = {"preference_accuracy": rates, "pairs": len(scores["other"]), "left_out": sorted(problems.values())}
        write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    lines = [[name, won(rate), f"{rate['percent_ties_half'] or 0:.1f} %"] for name, rate in rates.items()]
    with cli.last_word():
        print_table(["", "right (95 % interval)", "ties as half"], lines)
    return problems


def main() -> None:
    args = parse_args()
    part, parts = cli.parse_shard(args.shard)
    device, dtype = cli.device_and_dtype(args)
    args.dtype = str(dtype).removeprefix("torch.")
    run = preference_accuracy if args.preference_accuracy else compare
    if problems := run(args, Path(args.out), device, dtype, part, parts):
        for problem in problems.values():
            print(f"{Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli.run(main)
