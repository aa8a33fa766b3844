"""Is it better, and did the colours shift? Draws two or more models from the same seeds, and judges pair by pair.

    python evaluate.py --lora run/lora.safetensors:0.5 --out eval                  # against the bare model
    python evaluate.py --compare dpo=a.safetensors,hg-dpo=b.safetensors,lan=a.safetensors+lan --run run --out table
    python evaluate.py --candidate tuned/ --baseline owner/name+old.safetensors:0.8 --prompts parti-people --out eval
    python evaluate.py --candidate drawn/ --baseline base/ --out eval              # folders that generate.py wrote
    python evaluate.py --lora a.safetensors --concept FILE --prompts people.jsonl --scorers pickscore,identity:arcface
    python evaluate.py --preference-accuracy test.json --compare dpo=a.safetensors,ipo=b.safetensors --out judges
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
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image

from dataset.concepts import check_subjects, subjects
from dataset.folder import clear_unfinished, in_turn, locked, open_manifest, write_manifest
from dataset.images import open_picture
from dataset.preferences import digest_of_source, read_pairs
from evaluation.fid import fid
from evaluation.judges import (
    ImplicitReward,
    chunked,
    join_scores,
    judge_colours,
    load_judge,
    load_spread,
    measure,
    read_by,
)
from evaluation.report import page, read_log
from evaluation.sides import (
    Side,
    check_sides,
    draw_side,
    drawn_digest,
    load_side,
    parse_compare,
    parse_side,
    rows_drawn,
    rows_to_draw,
    unlike_settings,
)
from evaluation.statistics import HSV, percent_and_interval, rgb_levels, summary, win_rate
from model.builtin import BUILT_IN, default_scorers
from model.checkpoint import Pipeline, load_pipeline
from model.compiled import compile_unet
from model.errors import UserError
from model.files import digest_of, read_json, read_text, write_text
from model.scorers import has_image_tower
from pictures import sheet, write_png
from sampling import SAMPLERS, Drawing

# Not noted in evaluation.json; or noted by their contents: the sides, the prompts. Scorers may be added.
NOT_NOTED = ("out", "device", "batch_size", "compile", "shard", "scorers", "run", "fid", "lora", "lan", "candidate",
             "baseline", "compare", "limit", "category", "concept", "concept_image", "concept_strength")
MAY_CHANGE = ("model", "vae", "prompts", "preference_accuracy")
SHEET_COLUMNS = 12
SHOWN = ("height", "width", "steps", "guidance", "sampler", "negative_prompt", "seed", "num_images", "dtype")


def parse_args():
    parser = cli.common_parser(__doc__)
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT]",
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
                        "or --compare implicit rewards, agree with these preferences (see dataset/preferences.py)")
    parser.add_argument("--human-only", action="store_true", help="of these only the ones about people")
    parser.add_argument(
        "--shard", type=cli.shard_name, metavar="I/N", help="this job's part, 0/4 ... 3/4 (torchrun sets it)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the same command goes on with it")
    cli.add_concept_options(parser)
    cli.add_drawing_options(parser, SAMPLERS)
    args = parser.parse_args()
    args.concept_strength = cli.concept_strength(
        args.concept, args.concept_image, args.concept_strength, args.prompt_weights)
    ways = [f"--{name}" for name in ("lora", "candidate", "compare") if getattr(args, name)]
    if args.preference_accuracy and ways not in ([], ["--lora"], ["--compare"]):
        raise UserError(f"{' and '.join(ways)}: with --preference-accuracy give --lora, --compare or none")
    if not args.preference_accuracy and len(ways) != 1:
        raise UserError(f"{' and '.join(ways) or 'nothing to judge'}: give one of --lora, --candidate and --compare")
    if args.preference_accuracy:
        for name in ("baseline", "lan", "run", "fid", "concept", "compile"):
            if getattr(args, name):
                raise UserError(f"--{name} goes without --preference-accuracy, which draws nothing")
    if args.human_only and not args.preference_accuracy:
        raise UserError("--human-only goes with --preference-accuracy")
    names = (args.scorers or default_scorers(args.model)).split(",")
    args.scorers = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not args.scorers and not (args.preference_accuracy and ways):
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
    out: Path, options: dict, inputs: dict[str, str], sides: list[Side], digests: dict[str, str], rows: list[dict],
) -> None:
    """Notes what the folder is for; refuses other contents, and what has changed since. New candidates may come."""
    contents = {side.name: {"is": str(side), "digest": digests[side.name]} for side in sides}
    before = open_manifest(out / "evaluation.json", options, inputs, MAY_CHANGE)
    if before:
        read_json(out / "evaluation.json", sides=dict, judges=dict)
    for name, now in contents.items():
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
    write_manifest(
        out / "evaluation.json", options, inputs, sides=before.get("sides", {}) | contents,
        judges=before.get("judges", {}))
    for path in listings:
        write_text(path, listing)


def print_candidates(candidates: dict[str, dict], scorers: list[str]) -> None:
    lines = []
    for name, found in candidates.items():
        shift = found["colour_shift"]
        changes = ["-" if shift[channel] is None else f"{shift[channel]:+.1f} %" for channel in HSV]
        rates = [percent_and_interval(found["win_rate"][scorer]) for scorer in scorers]
        lines.append([name, *rates, *changes, f"{shift['hue_degrees']:.1f}", rgb_levels(shift)])
    cli.print_table(["", *scorers, *HSV, "hue degrees", "RGB of 255"], lines)


def make_sides(args) -> list[Side]:
    """The baseline first, then the candidates."""
    sides = [parse_side("baseline", args.baseline or args.model)]
    if args.candidate:
        sides.append(parse_side("candidate", args.candidate, args.lan))
    if args.lora:
        sides.append(Side("candidate", args.model, tuple(args.lora), args.lan))
    if args.compare:
        sides += parse_compare(args.compare, args.model, args.lan)
    check_sides(sides, args.sampler)
    if args.concept:
        sides = [side if side.drawn else replace(side, concept=(args.concept, args.concept_strength)) for side in sides]
    return sides


def make_rows(args, sides: list[Side], drawing: Drawing) -> tuple[list[dict], Drawing]:
    """The pictures that are judged; where some are drawn already it is they that say, and the size is theirs."""
    drawn = [side for side in sides if side.drawn]
    if not drawn:
        own = str(BUILT_IN[args.model].prompts_test) if args.model in BUILT_IN else "parti-people"
        prompts = cli.read_prompts(args.prompts or own, args.category)[:args.limit]
        shown = [{"prompt": prompt} for prompt in prompts]
        if args.concept:
            shown = subjects(prompts, args.prompts, args.concept_image)[:args.limit]
        return rows_to_draw(shown, args.num_images, args.seed), drawing
    if args.concept_image:
        raise UserError(f"--concept-image: {drawn[0].model} has its own; leave this away")
    if args.prompts:
        raise UserError(f"--prompts: {drawn[0].model} has its own; leave this away")
    rows, (width, height) = rows_drawn(drawn, args.limit)
    for option, pixels in (("width", width), ("height", height)):
        if getattr(args, option) not in (None, pixels):
            raise UserError(f"--{option} {getattr(args, option)}: the pictures of {drawn[0].model} have {pixels}")
    return rows, replace(drawing, height=height, width=width)


def noted_options(args, drawing: Drawing, dtype: torch.dtype) -> dict:
    options = vars(args) | asdict(drawing) | {"dtype": cli.name_of(dtype)}
    return {name: value for name, value in options.items() if name not in NOT_NOTED}


def compare(args, out: Path, device: torch.device, dtype: torch.dtype, part: int, parts: int) -> list[str]:
    """Draws and judges all sides, and writes the report, once all jobs are done. -> what went wrong."""
    def load(model: str) -> Pipeline:
        pipeline = load_pipeline(model, device, dtype, args.vae, args.prediction_type)
        if args.compile:
            compile_unet(pipeline.unet)
        return pipeline

    sides = make_sides(args)
    rows, drawing = make_rows(args, sides, Drawing.of(vars(args)))
    to_draw, digests, seen = [side for side in sides if not side.drawn], {}, {}
    for side in sides:                           # before the first picture: what is wrong with the last side shows now
        if side.drawn:
            digests[side.name] = drawn_digest(side, rows)
        else:
            pipeline, digests[side.name] = load_side(side, load)
            drawing = drawing.for_model(pipeline)
            if side.concept:
                seen = {"concept_image": check_subjects(rows, pipeline.concept, pipeline.tokenizer)}
            del pipeline
    options = noted_options(args, drawing, dtype)
    unlike = unlike_settings(sides, drawing, rows)
    for difference in unlike:
        print(cli.plain(f"not drawn alike: {difference}; this is judged, too"), file=sys.stderr)
    names = [side.name for side in sides]
    folders = {side.name: side.folder(out) for side in sides}
    judges = {"colours": lambda: judge_colours}
    people = [(folders[name] / row["file"], row.get("concept_images")) for name in names for row in rows]
    judges |= {name: partial(load_judge, name, device, people) for name in args.scorers}
    towers = [name for name in args.scorers if has_image_tower(name)]
    if towers and any(len(list(pictures)) > 1 for _, pictures in groupby(rows, key=lambda row: row["prompt"])):
        judges["diversity"] = partial(load_spread, towers, device)

    def picture(side: str, row: dict) -> Image.Image:
        return open_picture(folders[side] / row["file"])

    with locked(out, part, parts, f"{parts} jobs"):
        with in_turn(out):
            begin_evaluation(out, options, {"prompts": digest_of(rows)} | seen, sides, digests, rows)
        if parts == 1:
            clear_unfinished(out)
        print(
            f"{len(rows)} pictures of {drawing.width}x{drawing.height} a side to {out}, on {device} in "
            f"{options['dtype']}, job {part + 1} of {parts}: " + "; ".join(f"{side.name} is {side}" for side in sides))
        chunks = chunked(rows, args.batch_size)[part::parts]
        for side in to_draw:
            draw_side(side, load, drawing, out, chunks, args.batch_size, cli.progress)
        left_out, unreadable = measure(
            out, names, chunks, picture, judges, f"{part}-of-{parts}", cli.progress,
            lambda name, side, row: read_by(name, folders[side], row))
        all_drawn = all((folders[name] / row["file"]).is_file() for name in names for row in rows)
        with in_turn(out):
            working = [name for name in judges if name not in left_out]
            joined = join_scores(out, names, rows, working, picture) if all_drawn else None
        if joined is None:
            print(f"{out}: this job's part is done; the others' are not")
            return [*left_out.values(), *unreadable]
        kept, scores, more = joined
        problems = [*left_out.values(), *sorted(unreadable | more)]
        if not kept:
            raise UserError(f"{out}: no picture that can be read on every side; {next(iter(problems), '')}")
        scorers = [name for name in args.scorers if name not in left_out]
        report = {
            "sides": {side.name: str(side) for side in sides}, "pictures": len(kept),
            "settings": {name: options[name] for name in SHOWN if to_draw or name in ("height", "width")},
            **({"not_drawn_alike": unlike} if unlike else {}), **summary(names, scores, scorers)}
        try:
            if args.fid:
                report["fid"] = {
                    name: fid([folders[name] / row["file"] for row in kept], args.fid, device) for name in names}
        except UserError as error:
            problems.append(f"FID is left out: {error}")
        report["left_out"] = sorted(problems)
        write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
        write_text(out / "report.html", page(report, kept, scores, picture, {run: read_log(run) for run in args.run}))
        columns = min(SHEET_COLUMNS, len(kept))
        shown = [(name, i * len(kept) // columns) for name in names for i in range(columns)]
        captions = [" ".join([name, *(f"{scores[name][i][scorer]:.2f}" for scorer in scorers[:1]), kept[i]["prompt"]])
                    for name, i in shown]
        write_png(out / "sheet.png", sheet([picture(name, kept[i]) for name, i in shown], captions, columns))
    with cli.print_from_any_rank():
        print(f"win rates against {sides[0]} (95 % interval), and colour shift:")
        print_candidates(report["candidates"], scorers)
        print(f"{out / 'report.html'} shows every pair")
    return problems


def preference_accuracy(
    args, out: Path, device: torch.device, dtype: torch.dtype, part: int, parts: int
) -> list[str]:
    """How often each scorer puts the preferred picture first: a win rate of the preferred over the others."""
    pairs = read_pairs(Path(args.preference_accuracy), args.human_only)[:args.limit]
    rows = [{"file": f"{i:06d}", "prompt": pair.prompt} for i, pair in enumerate(pairs)]
    judges = {name: partial(load_judge, name, device) for name in args.scorers}
    policies = {"implicit-reward": Side("policy", args.model, tuple(args.lora))} if args.lora else {
        f"implicit-reward-{side.name}": side for side in parse_compare(args.compare, args.model, lan=False)
    } if args.compare else {}
    drawing, digests = Drawing.of(vars(args)), {}

    def load(model: str) -> Pipeline:
        return load_pipeline(model, device, dtype, args.vae, args.prediction_type)

    def implicit_reward(policy: Side) -> ImplicitReward:
        return ImplicitReward(load_side(policy, load)[0], drawing, args.seed)

    for name, policy in policies.items():
        if policy.lan or not policy.loras:
            raise UserError(f"--compare {policy}: an implicit reward is of a LoRA, without LAN")
        pipeline, digests[policy.name] = load_side(policy, load)
        drawing = drawing.for_model(pipeline)
        del pipeline
        judges[name] = partial(implicit_reward, policy)
    load_pictures = lru_cache(maxsize=16)(lambda i: pairs[i].load()[1])

    def picture(side: str, row: dict) -> Image.Image:
        return load_pictures(int(row["file"]))[{"preferred": "w", "other": "l"}[side]]

    names = ["preferred", "other"]
    with locked(out, part, parts, f"{parts} jobs"):
        with in_turn(out):
            inputs = {"preference_accuracy": digest_of_source(pairs)}
            begin_evaluation(
                out, noted_options(args, drawing, dtype), inputs, list(policies.values()), digests, [])
        if parts == 1:
            clear_unfinished(out)
        print(f"{len(pairs)} preferences to {out}, judged by {', '.join(judges)}, job {part + 1} of {parts}")
        chunks = chunked(rows, args.batch_size)[part::parts]
        left_out, unreadable = measure(out, names, chunks, picture, judges, f"{part}-of-{parts}", cli.progress)
        with in_turn(out):
            joined = join_scores(out, names, rows, [name for name in judges if name not in left_out], picture)
        if joined is None:
            print(f"{out}: this job's part is done; the others' are not")
            return [*left_out.values(), *unreadable]
        _, scores, more = joined
        problems = [*left_out.values(), *sorted(unreadable | more)]
        rates = {name: win_rate(*([answers[name] for answers in scores[side]] for side in names))
                 for name in judges if name not in left_out}
        report = {"preference_accuracy": rates, "pairs": len(scores["other"]), "left_out": sorted(problems)}
        write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    lines = [[name, percent_and_interval(rate), f"{rate['percent_ties_half'] or 0:.1f} %"]
             for name, rate in rates.items()]
    with cli.print_from_any_rank():
        cli.print_table(["", "right (95 % interval)", "ties as half"], lines)
    return problems


def main() -> None:
    args = parse_args()
    part, parts = cli.parse_shard(args.shard)
    device, dtype = cli.device_and_dtype(args.device, args.dtype)
    run = preference_accuracy if args.preference_accuracy else compare
    if problems := run(args, Path(args.out), device, dtype, part, parts):
        for problem in problems:
            cli.say(problem)
        sys.exit(2)


if __name__ == "__main__":
    cli.run(main)
