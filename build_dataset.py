"""Makes the pairs that train.py learns from, without a human: a pool of pictures a prompt, scored; best against worst.

    python build_dataset.py --prompts prompts.txt --out data                       # 20 pictures a prompt, PickScore
    python build_dataset.py --out data --preview-steps 10 --preview-keep 2         # 40 % of the work, nearly the same
    python build_dataset.py --reselect data --out data5 --pool-size 5              # from a pool kept with --keep pool
    python build_dataset.py --from-pairs pickapic.parquet --out human              # people's choices, to compare with
    python build_dataset.py --out data --export-pickapic data.parquet              # ours, for others' programs
    torchrun --nproc-per-node 8 build_dataset.py ...   or   --shard i/n in n jobs  # they share the folder, nothing else

OUT/dataset.json      what it was made with, counts, which prompts gave no pair; `finished` is true when all is there
OUT/pairs-*.jsonl     a line a pair: id, prompt, seeds, scores, winner, loser (the two are indices into seeds)
OUT/shard-*.safetensors   latents_w, latents_l (n, 4, h, w) scaled, and context (n, 77, d), in half precision
OUT/images/, OUT/sheet.png   winners and losers (ID_w.png, ID_l.png); the whole pool with --keep pool

The unit of work is a prompt: a killed run goes on behind the last finished one, to the same bytes. A prompt that cannot
be drawn is noted, left out, and tried again by the next run. With more prompts, or a higher --limit, a dataset grows.
"""

import cli

# isort: split
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import NoneType

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dataset.folder import begin, in_turn, locked, noted
from dataset.reader import check_files, dataset_digest, read_manifest, read_shard
from dataset.rows import Made, make_rows, pending_rows, picture_path, row_files, scores_of, summarise
from generate import check_sampling_options, draw, settings, to_picture
from model.checkpoint import PAPER_PEOPLE, Pipeline, load_pipeline
from model.errors import UserError
from model.files import digest_all, digest_of, files_read, read_json
from model.scorers import load_scorer
from pictures import open_picture, parameters
from preferences import digest_of_source, export_pickapic, load_pyarrow, read_images, read_pairs
from sampling import encode_prompts

# Options that are not noted in dataset.json, and of those that are the ones that may change: names, whose contents are
# noted as digests, and what can only add rows.
NOT_NOTED = ("out", "device", "batch_size", "shard", "export_pickapic", "limit")
MAY_CHANGE = ("model", "vae", "prompts", "category", "scorer", "from_pairs", "from_images", "reselect")
SOURCES = ("reselect", "from_pairs", "from_images", "prompts")


def parse_args():
    parser = cli.common_parser(__doc__)
    cli.add_prompt_options(parser, "see generate.py (default with paper-people: its own)")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--pool-size", type=cli.whole(2), default=20, help="pictures a prompt")
    parser.add_argument("--scorer", help="see model/scorers.py (default: the model's own scorer/ if it has one, else "
                        "pickscore)")
    parser.add_argument("--winner-rank", type=cli.whole(1), default=1, help="in falling score")
    parser.add_argument("--loser-rank", type=cli.whole(2), help="in falling score (default: the last)")
    parser.add_argument(
        "--min-gap", type=cli.real(0), default=0.0, help="of the scores; what is not above it is no pair, but left out")
    parser.add_argument("--keep", default="pair", choices=("pair", "pool"), help="pool also keeps all latents")
    parser.add_argument("--images", choices=("none", "pair", "pool"), help="which pictures to keep (default: as "
                        "--keep; none keeps those of the sheet)")
    parser.add_argument(
        "--preview-steps", type=cli.whole(1), help="draw the pool with so few steps, and only its ends in full")
    parser.add_argument(
        "--preview-keep", type=cli.whole(1), default=2, help="with --preview-steps: how many at each end")
    parser.add_argument(
        "--shard", type=cli.shard_name, metavar="I/N", help="this job's part, 0/4 ... 3/4 (torchrun sets it)")
    parser.add_argument("--reselect", metavar="DIR", help="a dataset kept with --keep pool; nothing is drawn")
    parser.add_argument("--from-pairs", metavar="FILE", help="Pick-a-Pic, HPD-v2, ImageRewardDB, or one's own")
    parser.add_argument("--from-images", metavar="DIR", help="pictures with metadata.jsonl (file_name, text), for SFT")
    parser.add_argument("--human-only", action="store_true", help="with --from-pairs: only prompts about people")
    parser.add_argument(
        "--export-pickapic", metavar="FILE", help="also write the finished dataset as Pick-a-Pic's parquet (for "
        "diffusers' script); where --out is finished, only that")
    cli.add_sampling_options(parser)
    args = parser.parse_args()
    args.images = args.images or args.keep
    args.loser_rank = args.loser_rank if args.loser_rank is not None else args.pool_size
    given = [f"--{name.replace('_', '-')}" for name in SOURCES if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them; rows come from one place")
    if args.human_only and not args.from_pairs:
        raise UserError("--human-only goes with --from-pairs")
    if not args.winner_rank < args.loser_rank <= args.pool_size:
        raise UserError(
            f"--winner-rank {args.winner_rank} --loser-rank {args.loser_rank}: must rise within 1 to {args.pool_size}")
    if args.preview_steps is not None:
        ends = max(args.winner_rank, args.pool_size + 1 - args.loser_rank)
        if not args.preview_steps < args.steps or not ends <= args.preview_keep <= args.pool_size // 2:
            raise UserError(
                f"--preview-steps {args.preview_steps} --preview-keep {args.preview_keep}: fewer steps than --steps, "
                f"and {ends} to {args.pool_size // 2} kept at each end")
        if given and given != ["--prompts"]:
            raise UserError(f"--preview-steps goes with drawing; {given[0]} draws nothing")
        if args.sampler == "ddpm":
            raise UserError("--preview-steps needs dpm++ or ddim: ddpm draws noise at every step, so that its previews "
                            "tell next to nothing of the pictures")
    return args


@dataclass(frozen=True)
class Source:
    """Where rows come from."""

    names: list                                # what each row is made from, as JSON can hold it; one a row
    prompts: Callable[[int], str]
    make: Callable[[int], Made]
    about: Callable[[dict, str], dict | None]  # a row's line and a picture's name -> the PNG's text chunks
    facts: dict                                # what dataset.json tells of the model
    inputs: dict[str, str]                     # digests, by the option that names them
    unet_rows: int = 0                         # that go through the U-Net for a row: guided, a picture takes two a step


# One prompt

def select(scores: list[float | None], winner_rank: int, from_last: int) -> tuple[int, int]:
    """Indices of the winner and the loser: `winner_rank` from the best (1 is the best), `from_last` from the worst (0
    is the worst). Scores that are None take no part; of equal ones the earlier counts as better."""
    ranked = sorted((i for i, score in enumerate(scores) if score is not None), key=lambda i: (-scores[i], i))
    return ranked[winner_rank - 1], ranked[-1 - from_last]


def pair_of(args, line: dict) -> dict:
    """The line with its winner and loser, or with `left_out`, a reason, where they are too close to be a pair."""
    scores = line["scores"]
    winner, loser = select(scores, args.winner_rank, args.pool_size - args.loser_rank)
    gap = scores[winner] - scores[loser]
    if gap <= args.min_gap:
        ranks = f"ranks {args.winner_rank} and {args.loser_rank} of {args.pool_size}"
        return {**line, "left_out": f"the gap of {ranks} is {gap:.6g}, not above --min-gap {args.min_gap:g}"}
    return {**line, "winner": winner, "loser": loser}


def score_pool(scorer: Callable, images: list[Image.Image], prompt: str) -> list[float]:
    scores = scorer(images, [prompt] * len(images))
    if not scores.isfinite().all():
        raise UserError(f"the scorer says {scores.tolist()!r:.80}; finite scores were expected")
    return scores.tolist()


def draw_pool(
    args, pipeline: Pipeline, prompt: str, contexts: Tensor, seeds: list[int], steps: int
) -> tuple[Tensor, list[Image.Image]]:
    """contexts (2, M, D), the negative prompt's first -> latents (N, 4, h, w) on the CPU, and N pictures."""
    latents, images = [], []
    for i in range(0, len(seeds), args.batch_size):
        some = seeds[i:i + args.batch_size]
        uncond, cond = contexts[:, None].expand(-1, len(some), -1, -1)
        x0 = draw(pipeline, cond, uncond, some, args.height, args.width, steps, args.guidance, args.sampler)
        latents.append(x0.cpu())
        images += [to_picture(pipeline, latent, prompt, seed) for latent, seed in zip(x0, some)]
    return torch.cat(latents), images


def pair_from_pool(args, pipeline: Pipeline, scorer: Callable, prompts: list[str], k: int) -> Made:
    """Draws, scores and selects for prompt number k -> its line, tensors and pictures."""
    prompt = prompts[k]
    with torch.no_grad():
        contexts = encode_prompts(
            [args.negative_prompt, prompt], pipeline.tokenizer, pipeline.text_encoder, args.prompt_weights,
            args.clip_skip)
    seeds = [args.seed + k * args.pool_size + i for i in range(args.pool_size)]
    line: dict = {"prompt": prompt, "seeds": seeds}
    if args.preview_steps is None:
        latents, images = draw_pool(args, pipeline, prompt, contexts, seeds, args.steps)
        scores = score_pool(scorer, images, prompt)
    else:
        # The sampler is deterministic: with the same seed fewer steps give nearly the same picture, so that the
        # previews tell which few seeds are worth drawing in full.
        latents, images = draw_pool(args, pipeline, prompt, contexts, seeds, args.preview_steps)
        line["preview_scores"] = score_pool(scorer, images, prompt)
        ranked = sorted(range(len(seeds)), key=lambda i: (-line["preview_scores"][i], i))
        ends = sorted(ranked[:args.preview_keep] + ranked[-args.preview_keep:])
        full, pictures = draw_pool(args, pipeline, prompt, contexts, [seeds[i] for i in ends], args.steps)
        scores = [None] * len(seeds)
        for i, latent, picture, score in zip(ends, full, pictures, score_pool(scorer, pictures, prompt)):
            latents[i], images[i], scores[i] = latent, picture, score
    line = pair_of(args, line | {"scores": scores})
    if "left_out" in line:
        return line, None, {}
    winner, loser = line["winner"], line["loser"]
    tensors = {"latents_w": latents[winner], "latents_l": latents[loser], "context": contexts[1]}
    pictures = {"w": images[winner], "l": images[loser]} | {f"{i:02d}": image for i, image in enumerate(images)}
    return line, tensors | ({"pool": latents} if args.keep == "pool" else {}), pictures


def from_prompts(args, pipeline: Pipeline, device: torch.device, facts: dict, inputs: dict) -> Source:
    if args.prompts is None and args.model != "paper-people":
        raise UserError("--prompts FILE is needed with this model")
    prompts = cli.read_prompts(args.prompts or str(PAPER_PEOPLE.parent / "prompts_train.txt"), args.category)
    if twice := len(prompts) - len(set(prompts)):
        print(f"{twice} prompts repeat an earlier one; each is drawn, with seeds of its own")
    args.scorer = args.scorer or ("paper-people" if args.model == "paper-people" else own_scorer(args.model))
    with files_read() as files:
        scorer = load_scorer(args.scorer, device)

    def about(line: dict, name: str) -> dict[str, str]:
        i = line[{"w": "winner", "l": "loser"}[name]] if name in ("w", "l") else int(name)
        steps = args.steps if line["scores"][i] is not None else args.preview_steps
        text = settings(args, pipeline, line["seeds"][i], steps)
        return {"parameters": parameters(line["prompt"], args.negative_prompt, text)}

    steps = args.pool_size * (args.preview_steps or args.steps)
    steps += 2 * args.preview_keep * args.steps if args.preview_steps else 0
    return Source(
        prompts, prompts.__getitem__, partial(pair_from_pool, args, pipeline, scorer, prompts), about, facts,
        {**inputs, "scorer": digest_all(files)}, steps * (2 if args.guidance > 1 else 1))


def own_scorer(model: str) -> str:
    """The scorer/ that lies in a model's folder, or PickScore."""
    folder = Path(model) / "scorer"
    return str(folder) if folder.is_dir() else "pickscore"


# Rows that exist

def from_kept(args) -> Source:
    """Selects anew from the first --pool-size pictures of a pool that is kept; no model is needed."""
    kept = Path(args.reselect)
    manifest = read_manifest(kept)
    drawn_with = manifest.get("options") or {}
    if args.model not in ("paper-people", manifest["model"]):
        raise UserError(f"--model {args.model}: the pool of {kept} was drawn with {manifest['model']}; leave it away")
    shards = [read_shard(kept, manifest, name) for name in manifest["shards"]]
    rows = [(line, tensors, i) for tensors, lines in shards for i, line in enumerate(lines)]
    for line, tensors, _ in rows:
        if "pool" not in tensors:
            raise UserError(f"{kept}: made without --keep pool; it has no pool to select from")
        scores = scores_of(line, kept)
        if len(scores) < args.pool_size:
            raise UserError(f"--pool-size {args.pool_size}: {kept} keeps {len(scores)} pictures a prompt")
        if None in scores:
            raise UserError(f"{kept}: drawn with previews, so that only {len(scores) - scores.count(None)} of "
                            f"{len(scores)} pictures a prompt have a score to select by; draw a pool without")

    def make(k: int) -> Made:
        old, tensors, i = rows[k]
        line = {key: old[key][:args.pool_size] for key in ("seeds", "scores")}
        line = pair_of(args, {"prompt": old["prompt"], **line})
        if "left_out" in line:
            return line, None, {}
        pool, ends = tensors["pool"][i], {"w": line["winner"], "l": line["loser"]}
        paths = {name: picture_path(kept, old["id"], f"{end:02d}") for name, end in ends.items()}
        pictures = {name: open_picture(path) for name, path in paths.items() if path.is_file()}
        return line, {**{f"latents_{name}": pool[end] for name, end in ends.items()}, "context": tensors["context"][i]
                      }, pictures

    args.model, args.steps = manifest["model"], drawn_with.get("steps")
    facts = {key: manifest[key] for key in ("model", "context_width", "scaling_factor", "latent") if key in manifest}
    return Source(
        [line["id"] for line, *_ in rows], lambda k: rows[k][0]["prompt"], make, lambda line, name: None,
        {**facts, "drawn_with": drawn_with}, {"reselect": dataset_digest(kept, manifest)})


def encoded(args, pipeline: Pipeline, prompt: str, images: dict[str, Image.Image]) -> Made:
    """A row from pictures that exist ('w', and 'l' unless they are for SFT): fitted to the size, through the VAE."""
    fitted = {name: fit(image, args.width, args.height) for name, image in images.items()}
    tensors = {}
    with torch.no_grad():
        context = encode_prompts(
            [prompt], pipeline.tokenizer, pipeline.text_encoder, args.prompt_weights, args.clip_skip)[0]
        for name, image in fitted.items():
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(args.height, args.width, 3)
            pixels = pixels.to(pipeline.device).permute(2, 0, 1)[None].float() / 127.5 - 1
            tensors[f"latents_{name}"] = pipeline.vae.to_latent(pipeline.vae.encode(pixels)[0])[0]
    return {"prompt": prompt}, {**tensors, "context": context}, fitted


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled to cover the size, and cut around the centre."""
    return ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)


def from_pictures(args, pipeline: Pipeline, facts: dict, inputs: dict) -> Source:
    listed = (read_pairs(Path(args.from_pairs), args.human_only) if args.from_pairs
              else read_images(Path(args.from_images)))
    return Source(
        [digest_of_source([one]) for one in listed], lambda k: listed[k].prompt,
        lambda k: encoded(args, pipeline, *listed[k].load()), lambda line, name: None, facts, inputs)


# The folder

def begin_dataset(out: Path, options: dict, source: Source, rows: int, part: int, parts: int) -> list[int]:
    """Begins the folder or goes on with it; -> the rows that this job is to make. Rows may be added; those that are
    there stay. `options` keep the dtype that the folder was begun with."""
    manifest, option = out / "dataset.json", next((o for o in SOURCES if options.get(o) is not None), "prompts")
    before = begin(manifest, options, source.inputs, (*MAY_CHANGE, "dtype"))
    if before:
        read_json(manifest, finished=bool, rows=int, rows_from=(str, NoneType), files=(dict, NoneType))
        check_files(out, before)
    had = before.get("rows", 0)
    if rows < had:
        raise UserError(f"{out}: {had} rows are begun, and now there are {rows}; go on with all of them (--limit)")
    if before and digest_of(source.names[:had]) != before.get("rows_from"):
        raise UserError(f"{out}: the first {had} rows of --{option.replace('_', '-')} are not those that it was begun "
                        "with; rows may be added at the end, else choose another --out")
    missing, failed = pending_rows(out, rows)
    dtype = options["dtype"]
    options["dtype"] = before.get("options", {}).get("dtype", dtype)
    if dtype != options["dtype"] and missing:
        raise UserError(f"{out}: begun with --dtype {options['dtype']}, and now it is {dtype}; only rows that failed "
                        "may be drawn with another")
    if not before or missing or failed:
        noted(manifest, options, source.inputs, finished=False, rows=rows, rows_from=digest_of(source.names[:rows]))
    mine = [number for number in failed if number % parts == part]
    for number in mine:                        # no longer failed, but missing: no other job may finish without them
        row_files(out, number)[1].unlink()
    return sorted([number for number in missing if number % parts == part] + mine)


def is_finished(out: Path) -> bool:
    return (out / "dataset.json").is_file() and read_json(out / "dataset.json").get("finished") is True


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    if args.export_pickapic:
        load_pyarrow(Path(args.export_pickapic))             # missing packages are found before weeks of drawing
        if is_finished(out):
            return export_pickapic(out, Path(args.export_pickapic))
    part, parts = cli.parse_shard(args.shard)
    if args.reselect:
        source, where = from_kept(args), ""
    else:
        device, dtype = cli.device_and_dtype(args)
        with files_read() as files:
            pipeline = load_pipeline(args.model, device, dtype, args.vae, args.prediction_type)
        check_sampling_options(args, pipeline)
        args.dtype = str(dtype).removeprefix("torch.")
        facts = {
            "model": args.model, "context_width": pipeline.context_width, "scaling_factor": pipeline.vae.scaling_factor,
            "latent": [4, args.height // pipeline.vae.downscale, args.width // pipeline.vae.downscale]}
        inputs = {"model": digest_all(files)}
        exist = args.from_pairs or args.from_images
        source = (from_pictures(args, pipeline, facts, inputs) if exist
                  else from_prompts(args, pipeline, device, facts, inputs))
        where = f"; {args.model} on {device} in {args.dtype}"
    rows = min(len(source.names), args.limit or len(source.names))
    options = {name: value for name, value in vars(args).items() if name not in NOT_NOTED}
    with locked(out, part, parts, f"{parts} jobs for {rows} rows"):
        with in_turn(out):
            pending = begin_dataset(out, options, source, rows, part, parts)
        scored = f"{args.pool_size} pictures each, scored by {args.scorer}" if source.unet_rows else "nothing to draw"
        print(f"{rows} rows to {out}, {scored}{where}, job {part + 1} of {parts}")
        if args.dtype != options["dtype"]:                   # the line of a row that is unlike the others says so
            make = source.make
            source = replace(source, make=lambda k: ((made := make(k))[0] | {"dtype": args.dtype}, *made[1:]))
        problems = make_rows(
            out, rows, pending, source.prompts, source.make, source.about, args.images, cli.progress)
        with in_turn(out):
            said = summarise(out, rows)
            if said is None:
                print(f"{out}: this job's part is done; the others' are not")
            else:
                drawn = rows - said["counts"]["failed"]
                noted(out / "dataset.json", options, source.inputs, finished=True, rows=rows,
                      rows_from=digest_of(source.names[:rows]), **source.facts, unet_rows=drawn * source.unet_rows,
                      **said)
                with cli.last_word():
                    print(f"{out}: {said['counts']}")
        if said and args.export_pickapic:
            export_pickapic(out, Path(args.export_pickapic))
    if problems:
        for problem in problems[:20]:
            print(f"{Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
        raise UserError(f"{len(problems)} rows failed, and are left out ({out / 'dataset.json'} has them all); the "
                        "same command tries them again, with another --dtype if you like")


if __name__ == "__main__":
    cli.run(main)
