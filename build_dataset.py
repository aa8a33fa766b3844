"""Makes the pairs that train.py learns from, without a human: a pool of pictures a prompt, scored; best against worst.

    python build_dataset.py --prompts prompts.txt --out data                       # 20 pictures a prompt, PickScore
    python build_dataset.py --out data --preview-steps 10 --preview-keep 2         # 40 % of the work, nearly the same
    python build_dataset.py --reselect data --out data5 --pool-size 5              # from a pool kept with --keep pool
    python build_dataset.py --reselect data --out mine --scorer my_scorer          # the same, scored anew
    python build_dataset.py --from-pairs pickapic.parquet --out human              # people's choices, to compare with
    python build_dataset.py --out data --export-pickapic data.parquet              # ours, for others' programs
    python build_dataset.py --verify data                      # is all as it was? --repair makes again what is not
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
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dataset.folder import in_turn, locked, write_manifest
from dataset.pool import Pool
from dataset.preferences import export_pickapic, load_pyarrow, read_images, read_pairs
from dataset.reader import is_finished, read_manifest
from dataset.rows import Row, clear_parts, make_rows, summarise
from dataset.sources import Source, begin_dataset, from_kept, from_pictures, rescored, score_pool
from dataset.verify import damage
from model.builtin import BUILT_IN, default_scorer
from model.checkpoint import Pipeline, load_pipeline
from model.compiled import compile_unet
from model.errors import UserError
from model.files import digest_all, digest_of, files_read
from model.scorers import digest_of_scorer, load_scorer
from pictures import parameters
from sampling import SAMPLERS, Drawing, picture_settings, sample_latents, to_picture

# Not noted in dataset.json, and noted, but free to change: names, whose contents are noted as digests.
NOT_NOTED = ("out", "verify", "repair", "device", "batch_size", "compile", "shard", "export_pickapic", "limit", "mode")
MAY_CHANGE = ("model", "vae", "prompts", "category", "scorer", "from_pairs", "from_images", "reselect")
SOURCES = ("reselect", "from_pairs", "from_images", "prompts")


def parse_args():
    parser = cli.common_parser(__doc__)
    cli.add_prompt_options(parser, "see generate.py (default with paper-people: its own)")
    parser.add_argument("--out", metavar="DIR")
    parser.add_argument("--pool-size", type=cli.whole(2), default=20, help="pictures a prompt")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="draw with it; repeatable")
    parser.add_argument("--scorer", help="see model/scorers.py (default: the model's own, else pickscore)")
    parser.add_argument("--winner-rank", type=cli.whole(1), default=1, help="in falling score")
    parser.add_argument("--loser-rank", type=cli.whole(2), help="in falling score (default: the last)")
    parser.add_argument("--min-gap", type=cli.real(0), default=0.0, help="of the scores; what is not above is no pair")
    parser.add_argument("--keep", default="pair", choices=("pair", "pool"), help="pool also keeps all latents")
    parser.add_argument("--images", choices=("none", "pair", "pool"), help="which pictures to keep (default: as "
                        "--keep; none keeps those of the sheet)")
    parser.add_argument("--preview-steps", type=cli.whole(1), help="draw with so few steps, and only the ends in full")
    parser.add_argument("--preview-keep", type=cli.whole(1), default=2, help="with --preview-steps: so many each end")
    parser.add_argument("--shard", type=cli.shard_name, metavar="I/N", help="this job's part (torchrun sets it)")
    parser.add_argument("--reselect", metavar="DIR", help="made with --keep pool; with --scorer it is scored anew")
    parser.add_argument("--from-pairs", metavar="FILE", help="Pick-a-Pic, HPD-v2, ImageRewardDB, or one's own")
    parser.add_argument("--from-images", metavar="DIR", help="pictures with metadata.jsonl (file_name, text), for SFT")
    parser.add_argument("--human-only", action="store_true", help="with --from-pairs: only prompts about people")
    parser.add_argument("--export-pickapic", metavar="FILE", help="also write Pick-a-Pic's parquet, for diffusers' "
                        "script; where --out is finished, only that")
    parser.add_argument("--verify", metavar="DIR", help="say what of a finished dataset is not as it was, and end")
    parser.add_argument("--repair", action="store_true", help="first take out what is not as it was; it is made again")
    cli.add_drawing_options(parser, SAMPLERS)
    args = parser.parse_args()
    if (args.out is None) == (args.verify is None):
        raise UserError("give --out DIR, or --verify DIR")
    if args.verify:
        return args
    args.images = args.images or args.keep
    args.loser_rank = args.loser_rank if args.loser_rank is not None else args.pool_size
    given = [f"--{name.replace('_', '-')}" for name in SOURCES if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them; rows come from one place")
    args.mode = given[0] if given else "--prompts"
    if args.human_only and not args.from_pairs:
        raise UserError("--human-only goes with --from-pairs")
    of_pools = ("scorer", "pool_size", "winner_rank", "min_gap", "keep", "category")
    for name in of_pools if args.mode in ("--from-pairs", "--from-images") else ():
        if getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')}: {args.mode} has no pools to choose from; leave it away")
    if args.export_pickapic and args.images == "none" and not is_finished(Path(args.out)):
        raise UserError("--images none: --export-pickapic needs both pictures of a pair")
    for name in ("lora", "preview_steps", "compile") if args.mode != "--prompts" else ():
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} goes with drawing; {args.mode} draws nothing")
    if args.preview_steps is not None:
        if not args.preview_steps < args.steps:
            raise UserError(f"--preview-steps {args.preview_steps}: must be fewer steps than --steps {args.steps}")
        if SAMPLERS[args.sampler].stochastic:
            raise UserError(f"--preview-steps needs a sampler such as dpm++: {args.sampler} draws noise at every step, "
                            "so that its previews tell next to nothing of the pictures")
    return args


# One prompt

def draw_pool(
    pipeline: Pipeline, drawing: Drawing, prompt: str, contexts: Tensor, seeds: list[int], batch_size: int,
) -> tuple[Tensor, list[Image.Image]]:
    """contexts (2, M, D), the negative prompt's first -> latents (N, 4, h, w) on the CPU, and N pictures."""
    latents, images = [], []
    for i in range(0, len(seeds), batch_size):
        some = seeds[i:i + batch_size]
        uncond, cond = contexts[:, None].expand(-1, len(some), -1, -1)
        x0 = sample_latents(pipeline, drawing, cond, uncond, some)
        latents.append(x0.cpu())
        images += [to_picture(pipeline, latent, prompt, seed) for latent, seed in zip(x0, some)]
    return torch.cat(latents), images


def pair_from_pool(
    pipeline: Pipeline, scorer: Callable, drawing: Drawing, pool: Pool, prompt: str, seeds: list[int], batch_size: int,
) -> Row:
    """Draws, scores and selects for one prompt -> its line, tensors and pictures."""
    contexts = drawing.encode([drawing.negative_prompt, prompt], pipeline)       # (2, M, D)
    line: dict = {"prompt": prompt, "seeds": seeds}
    if pool.preview_steps is None:
        latents, images = draw_pool(pipeline, drawing, prompt, contexts, seeds, batch_size)
        scores = score_pool(scorer, images, prompt)
    else:
        # The sampler is deterministic: with the same seed fewer steps give nearly the same picture, so that the
        # previews tell which few seeds are worth drawing in full.
        preview = replace(drawing, steps=pool.preview_steps)
        latents, images = draw_pool(pipeline, preview, prompt, contexts, seeds, batch_size)
        line["preview_scores"] = score_pool(scorer, images, prompt)
        ends = pool.ends(line["preview_scores"])
        full, pictures = draw_pool(pipeline, drawing, prompt, contexts, [seeds[i] for i in ends], batch_size)
        scores = [None] * len(seeds)
        for i, latent, picture, score in zip(ends, full, pictures, score_pool(scorer, pictures, prompt)):
            latents[i], images[i], scores[i] = latent, picture, score
    line = pool.pair(line | {"scores": scores})
    if "left_out" in line:
        return line, None, {}
    winner, loser = line["winner"], line["loser"]
    tensors = {"latents_w": latents[winner], "latents_l": latents[loser], "context": contexts[1]}
    pictures = {"w": images[winner], "l": images[loser]} | {f"{i:02d}": image for i, image in enumerate(images)}
    return line, tensors | ({"pool": latents} if pool.keep == "pool" else {}), pictures


def from_prompts(
    prompts: list[str], pipeline: Pipeline, scorer: Callable, drawing: Drawing, pool: Pool, seed: int, batch_size: int,
    model: dict, inputs: dict[str, str],
) -> Source:
    """Rows from pools that are drawn: picture i of prompt k has the seed `seed + k * pool_size + i`."""
    def make(k: int) -> Row:
        seeds = [seed + k * pool.pool_size + i for i in range(pool.pool_size)]
        return pair_from_pool(pipeline, scorer, drawing, pool, prompts[k], seeds, batch_size)

    def texts(line: dict, name: str) -> dict[str, str]:
        i = line[{"w": "winner", "l": "loser"}[name]] if name in ("w", "l") else int(name)
        drawn = drawing if line["scores"][i] is not None else replace(drawing, steps=pool.preview_steps)
        settings = picture_settings(pipeline, drawn, line["seeds"][i])
        return {"parameters": parameters(line["prompt"], drawing.negative_prompt, settings)}

    steps = pool.pool_size * (pool.preview_steps or drawing.steps)
    steps += 2 * pool.preview_keep * drawing.steps if pool.preview_steps else 0
    return Source(prompts, prompts.__getitem__, make, model, inputs, texts, steps * (2 if drawing.guidance > 1 else 1))


# The folder

def open_source(args) -> tuple[Source, dict, str]:
    """-> where rows come from, the options as they are noted, and where the work is done, in words."""
    pool, options = Pool.of(vars(args)), vars(args)
    if args.reselect:
        manifest = read_manifest(Path(args.reselect))
        if args.model not in ("paper-people", manifest["model"]):
            raise UserError(f"--model {args.model}: the pool of {args.reselect} was drawn with {manifest['model']}; "
                            "leave it away")
        options = options | {"model": manifest["model"], "steps": (manifest.get("options") or {}).get("steps")}
        if not args.scorer:
            return from_kept(Path(args.reselect), manifest, pool), options, ""
        device, _ = cli.device_and_dtype(args.device, args.dtype)
        scores, digest = rescored(manifest, args.vae, args.scorer, device)
        return from_kept(Path(args.reselect), manifest, pool, scores, digest), options, ""
    device, dtype = cli.device_and_dtype(args.device, args.dtype)
    with files_read() as files:
        pipeline = load_pipeline(args.model, device, dtype, args.vae, args.prediction_type)
    drawing = Drawing.of(options).for_model(pipeline)
    options = options | asdict(drawing) | {"dtype": cli.name_of(dtype)}
    model = {
        "model": args.model, "context_width": pipeline.context_width, "scaling_factor": pipeline.vae.scaling_factor,
        "latent": [4, drawing.height // pipeline.vae.downscale, drawing.width // pipeline.vae.downscale]}
    inputs = {"model": digest_all(files)}
    if args.lora:
        with files_read() as files:
            pipeline.add_loras(args.lora)
        pipeline.merge_loras()
        inputs["lora"] = digest_all(files)
    if args.compile:
        compile_unet(pipeline.unet)
    if args.from_pairs or args.from_images:
        listed = (read_pairs(Path(args.from_pairs), args.human_only) if args.from_pairs
                  else read_images(Path(args.from_images)))
        source = from_pictures(listed, pipeline, drawing, model, inputs)
    else:
        if args.prompts is None and args.model not in BUILT_IN:
            raise UserError("--prompts FILE is needed with this model")
        prompts = cli.read_prompts(args.prompts or str(BUILT_IN[args.model].prompts_train), args.category)
        if twice := len(prompts) - len(set(prompts)):
            print(f"{twice} prompts repeat an earlier one; each is drawn, with seeds of its own")
        options["scorer"] = args.scorer or default_scorer(args.model)
        with files_read() as files:
            scorer = load_scorer(options["scorer"], device)
        source = from_prompts(
            prompts, pipeline, scorer, drawing, pool, args.seed, args.batch_size, model,
            inputs | {"scorer": digest_of_scorer(options["scorer"], files)})
    return source, options, f"; {args.model} on {device} in {options['dtype']}"


def main() -> None:
    args = parse_args()
    if args.verify:
        problems = [f"row {number}: {problem}" for number, problem in damage(Path(args.verify), cli.progress).items()]
        cli.refuse(problems, f"{args.verify}: {len(problems)} rows are damaged; the command that made it mends it with "
                   "--repair")
        if not is_finished(Path(args.verify)):
            raise UserError(f"{args.verify}: not finished; the command that made it goes on with it")
        return print(f"{args.verify}: as it was when it was finished")
    out = Path(args.out)
    if args.export_pickapic:
        load_pyarrow(Path(args.export_pickapic))             # missing packages are found before weeks of drawing
        if is_finished(out):
            return export_pickapic(out, Path(args.export_pickapic))
    part, parts = cli.parse_shard(args.shard)
    source, options, where = open_source(args)
    options = {name: value for name, value in options.items() if name not in NOT_NOTED and value != []}
    rows, dtype = min(len(source.names), args.limit or len(source.names)), options["dtype"]
    with locked(out, part, parts, f"{parts} jobs for {rows} rows"):
        with in_turn(out):
            damaged = damage(out, cli.progress) if args.repair and (out / "dataset.json").is_file() else {}
            pending = begin_dataset(out, options, MAY_CHANGE, source, args.mode, rows, part, parts, damaged)
        scored = (f"{args.pool_size} pictures each, scored by {options['scorer']}" if source.unet_rows
                  else "nothing to draw")
        print(f"{rows} rows to {out}, {scored}{where}, job {part + 1} of {parts}")
        if dtype != options["dtype"]:                        # the line of a row that is unlike the others says so
            make = source.make
            source = replace(source, make=lambda k: ((made := make(k))[0] | {"dtype": dtype}, *made[1:]))
        problems = make_rows(out, rows, *pending, source.prompts, source.make, source.texts, args.images, cli.progress)
        with in_turn(out):
            summary = summarise(out, rows)
            if summary is None:
                print(f"{out}: this job's part is done; the others' are not")
            else:
                drawn = rows - summary["counts"]["failed"]
                write_manifest(
                    out / "dataset.json", options, source.inputs, finished=True, rows=rows,
                    rows_from=digest_of(source.names[:rows]), **source.model, unet_rows=drawn * source.unet_rows,
                    **summary)
                clear_parts(out)
                with cli.print_from_any_rank():
                    print(f"{out}: {summary['counts']}")
        if summary and args.export_pickapic:
            export_pickapic(out, Path(args.export_pickapic))
    cli.refuse(problems, f"{len(problems)} rows failed, and are left out ({out / 'dataset.json'} has them all); the "
               "same command tries them again, with another --dtype if you like")


if __name__ == "__main__":
    cli.run(main)
