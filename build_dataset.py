"""Makes the pairs that train.py learns from, without a human: a pool of pictures a prompt, scored; best against worst.

    python build_dataset.py --prompts prompts.txt --out data                       # 20 pictures a prompt, PickScore
    python build_dataset.py --out data --preview-steps 10 --preview-keep 2         # 40 % of the work, nearly the same
    python build_dataset.py --reselect data --out data5 --pool-size 5              # from a pool kept with --keep pool
    python build_dataset.py --from-pairs pickapic.parquet --out human              # people's choices, to compare with
    python build_dataset.py --out data --export-pickapic data.parquet              # ours, for others' programs
    torchrun --nproc-per-node 8 build_dataset.py ...   or   --shard i/n in n jobs  # they share the folder, nothing else

OUT/dataset.json      what it was made with, and counts; `finished` is true when all is there
OUT/pairs-*.jsonl     a line a prompt: id, prompt, seeds, scores, winner, loser (the two are indices into seeds)
OUT/shard-*.safetensors   latents_w, latents_l (n, 4, h, w) scaled, and context (n, 77, d), in half precision
OUT/images/, OUT/sheet.png   winners and losers (ID_w.png, ID_l.png); the whole pool with --keep pool

The unit of work is a prompt: a killed run goes on behind the last finished one, to the same bytes.
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import Tensor

import cli
from generate import check_sampling_options, decode, draw, settings
from model.checkpoint import PAPER_PEOPLE, Pipeline, load_pipeline
from model.errors import UserError
from model.files import read_json, write_tensors, write_text
from model.scorers import load_scorer
from pictures import parameters, sheet, to_images, write_png
from preferences import export_pickapic, load_pyarrow, read_images, read_pairs
from sampling import encode_prompts

SHARD = 64                                     # prompts a file
SHEET_PAIRS = 12
NEAR_TIE = 0.01                                # of the scorer's unit: a gap that is counted as no preference
FREE = ("out", "device", "batch_size", "shard", "vae", "export_pickapic")       # options that may change on resume


def parse_args():
    parser = cli.common_parser(__doc__)
    parser.add_argument("--prompts", metavar="FILE", help="see generate.py (default with paper-people: its own)")
    parser.add_argument("--category", help="with a table of prompts: keep the rows whose Category this is")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--pool-size", type=int, default=20, help="pictures a prompt")
    parser.add_argument("--scorer", help="see model/scorers.py (default: the model's own scorer/ if it has one, else "
                        "pickscore)")
    parser.add_argument("--winner-rank", type=int, default=1, help="in falling score")
    parser.add_argument("--loser-rank", type=int, help="in falling score (default: the last)")
    parser.add_argument("--keep", default="pair", choices=("pair", "pool"), help="pool also keeps all pictures")
    parser.add_argument("--preview-steps", type=int, help="draw the pool with so few steps, and only its ends in full")
    parser.add_argument("--preview-keep", type=int, default=2, help="with --preview-steps: how many at each end")
    parser.add_argument("--shard", default=None, metavar="I/N", help="this job's part, 0/4 ... 3/4 (torchrun sets it)")
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("--reselect", metavar="DIR", help="a dataset kept with --keep pool; nothing is drawn")
    parser.add_argument("--from-pairs", metavar="FILE", help="Pick-a-Pic, HPD-v2, ImageRewardDB, or one's own")
    parser.add_argument("--from-images", metavar="DIR", help="pictures with metadata.jsonl (file_name, text), for SFT")
    parser.add_argument("--human-only", action="store_true", help="with --from-pairs: only prompts about people")
    parser.add_argument(
        "--export-pickapic", metavar="FILE", help="also write the finished dataset as Pick-a-Pic's parquet (for "
        "diffusers' script); where --out is finished, only that")
    cli.add_sampling_options(parser)
    args = parser.parse_args()
    args.loser_rank = args.loser_rank if args.loser_rank is not None else args.pool_size
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be at least 1")
    if args.pool_size < 2:
        raise UserError(f"--pool-size {args.pool_size}: a pair needs at least 2")
    if not 1 <= args.winner_rank < args.loser_rank <= args.pool_size:
        raise UserError(
            f"--winner-rank {args.winner_rank} --loser-rank {args.loser_rank}: must rise within 1 to {args.pool_size}")
    if args.preview_steps is not None:
        ends = max(args.winner_rank, args.pool_size + 1 - args.loser_rank)
        if not 1 <= args.preview_steps < args.steps or not ends <= args.preview_keep <= args.pool_size // 2:
            raise UserError(
                f"--preview-steps {args.preview_steps} --preview-keep {args.preview_keep}: fewer steps than --steps, "
                f"and {ends} to {args.pool_size // 2} kept at each end")
    return args


# One prompt

def select(scores: list[float | None], winner_rank: int, from_last: int) -> tuple[int, int]:
    """Indices of the winner and the loser: `winner_rank` from the best (1 is the best), `from_last` from the worst (0
    is the worst). Scores that are None take no part; of equal ones the earlier counts as better."""
    ranked = sorted((i for i, score in enumerate(scores) if score is not None), key=lambda i: (-scores[i], i))
    return ranked[winner_rank - 1], ranked[-1 - from_last]


def draw_pool(
    args, pipeline: Pipeline, contexts: Tensor, seeds: list[int], steps: int
) -> tuple[Tensor, list[Image.Image]]:
    """contexts (2, M, D), the negative prompt's first -> latents (N, 4, h, w) on the CPU, and N pictures."""
    latents, images = [], []
    for i in range(0, len(seeds), args.batch_size):
        some = seeds[i:i + args.batch_size]
        uncond, cond = contexts[:, None].expand(-1, len(some), -1, -1)
        x0 = draw(pipeline, cond, uncond, some, args.height, args.width, steps, args.guidance, args.sampler)
        latents.append(x0.cpu())
        images += to_images(torch.cat([decode(pipeline, latent[None]) for latent in x0]))
    return torch.cat(latents), images


def pair_from_pool(args, pipeline: Pipeline, scorer, prompt: str, k: int) -> tuple[dict, dict, dict]:
    """Draws, scores and selects for prompt number k -> its line, tensors and pictures."""
    with torch.no_grad():
        contexts = encode_prompts(
            [args.negative_prompt, prompt], pipeline.tokenizer, pipeline.text_encoder, args.prompt_weights,
            args.clip_skip)
    seeds = [args.seed + k * args.pool_size + i for i in range(args.pool_size)]
    line = {"prompt": prompt, "seeds": seeds}
    if args.preview_steps is None:
        latents, images = draw_pool(args, pipeline, contexts, seeds, args.steps)
        scores = scorer(images, [prompt] * len(images)).tolist()
    else:
        # The sampler is deterministic: with the same seed fewer steps give nearly the same picture, so that the
        # previews tell which few seeds are worth drawing in full.
        latents, images = draw_pool(args, pipeline, contexts, seeds, args.preview_steps)
        line["preview_scores"] = scorer(images, [prompt] * len(images)).tolist()
        ranked = sorted(range(len(seeds)), key=lambda i: (-line["preview_scores"][i], i))
        ends = sorted(ranked[:args.preview_keep] + ranked[-args.preview_keep:])
        full, pictures = draw_pool(args, pipeline, contexts, [seeds[i] for i in ends], args.steps)
        scores = [None] * len(seeds)
        for i, latent, picture, score in zip(ends, full, pictures, scorer(pictures, [prompt] * len(ends)).tolist()):
            latents[i], images[i], scores[i] = latent, picture, score
    winner, loser = select(scores, args.winner_rank, args.pool_size - args.loser_rank)
    line |= {"scores": scores, "winner": winner, "loser": loser}
    tensors = {"latents_w": latents[winner], "latents_l": latents[loser], "context": contexts[1]}
    pictures = {"w": images[winner], "l": images[loser]}
    if args.keep == "pool":
        tensors["pool"] = latents
        pictures |= {f"{i:02d}": image for i, image in enumerate(images)}
    return line, tensors, pictures


def pair_from_kept(args, kept: Path, lines: list[dict], k: int) -> tuple[dict, dict, dict]:
    """Selects anew from the first --pool-size pictures of a pool that is kept."""
    old, row = lines[k], k % SHARD
    if len(old["seeds"]) < args.pool_size:
        raise UserError(f"--pool-size {args.pool_size}: {kept} keeps {len(old['seeds'])} pictures a prompt")
    scores = old["scores"][:args.pool_size]
    winner, loser = select(scores, args.winner_rank, args.pool_size - args.loser_rank)
    with safe_open(kept / f"shard-{k // SHARD:05d}.safetensors", "pt") as shard:
        if "pool" not in shard.keys():
            raise UserError(f"{kept}: made without --keep pool; it has no pool to select from")
        pool, context = shard.get_slice("pool")[row], shard.get_slice("context")[row]
    line = {
        "prompt": old["prompt"], "seeds": old["seeds"][:args.pool_size], "scores": scores, "winner": winner,
        "loser": loser}
    pictures = {
        name: Image.open(kept / "images" / f"{old['id']}_{i:02d}.png") for name, i in (("w", winner), ("l", loser))}
    return line, {"latents_w": pool[winner], "latents_l": pool[loser], "context": context}, pictures


def encoded(args, pipeline: Pipeline, prompt: str, images: dict[str, Image.Image]) -> tuple[dict, dict, dict]:
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


# The folder

@contextlib.contextmanager
def locked(out: Path, part: int, parts: int) -> Iterator[None]:
    """Alone in the folder, or, as one of `parts` jobs, with the other parts. The system lets go when a process dies."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as all_jobs, open(out / f".lock-{part}-of-{parts}", "w") as this_job:
        try:
            fcntl.flock(all_jobs, (fcntl.LOCK_SH if parts > 1 else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            fcntl.flock(this_job, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is at work in it; wait for it, or choose another --out") from None
        yield


@contextlib.contextmanager
def in_turn(out: Path) -> Iterator[None]:
    """One job after another, at what each of a folder's jobs begins and ends with."""
    with open(out / ".lock-turn", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def begin(out: Path, options: dict) -> None:
    """Notes the options of a new dataset; refuses a folder with other contents, and options that have changed."""
    if (out / "dataset.json").is_file():
        cli.refuse_changes(out, read_json(out / "dataset.json")["options"], options)
    elif any(path.name[0] != "." for path in out.iterdir()):
        raise UserError(f"{out}: holds other files and no dataset; choose another --out")
    else:
        started = {"format": 1, "finished": False, "options": options}
        write_text(out / "dataset.json", json.dumps(started, indent=2) + "\n")


def make_row(out: Path, number: int, make: Callable[[int], tuple[dict, dict, dict]], about: Callable) -> None:
    """Makes row `number`, unless it is there, and writes it to a file of its own; its pictures first."""
    path = out / "partial" / f"{number:06d}.safetensors"
    if path.is_file():
        return
    line, tensors, pictures = make(number)
    line = {"id": f"{number:06d}", **line}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"prompt {line['id']}: NaN in {name}; try --dtype float32")
    for name, picture in pictures.items():
        write_png(out / "images" / f"{line['id']}_{name}.png", picture, about(line, name))
    write_tensors(path, {name: tensor.half() for name, tensor in tensors.items()}, {"line": json.dumps(line)})


def join_rows(out: Path, shard: int, numbers: range) -> None:
    """Rows of one shard -> its two files; then the rows' own files go."""
    rows, lines = [], []
    for number in numbers:
        with safe_open(out / "partial" / f"{number:06d}.safetensors", "pt") as file:
            lines.append(file.metadata()["line"])
            rows.append({name: file.get_tensor(name) for name in file.keys()})
    write_text(out / f"pairs-{shard:05d}.jsonl", "".join(f"{line}\n" for line in lines))
    write_tensors(
        out / f"shard-{shard:05d}.safetensors", {name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    for number in numbers:
        (out / "partial" / f"{number:06d}.safetensors").unlink()


def finish(out: Path, options: dict, facts: dict, shards: int) -> None:
    """Writes the counts and the sheet, once every job's shards are there, and clears away what a kill left behind."""
    names = [f"shard-{i:05d}.safetensors" for i in range(shards)]
    if not all((out / name).is_file() for name in names):
        print(f"{out}: this job's part is done; the others' are not")
        return
    shutil.rmtree(out / "partial", ignore_errors=True)
    for left in out.rglob(".*.part"):
        left.unlink()
    lines = read_lines(out)
    counts = {"rows": len(lines)}
    scored = [line for line in lines if "scores" in line]
    if scored:
        gaps = [line["scores"][line["winner"]] - line["scores"][line["loser"]] for line in scored]
        counts |= {
            "pictures": sum(len(line["seeds"]) for line in scored), "mean_gap": sum(gaps) / len(gaps),
            "ties": sum(gap == 0 for gap in gaps), "near_ties": sum(0 < gap < NEAR_TIE for gap in gaps)}
    images, captions = [], []
    for kind in ("winner", "loser"):
        for line in lines[:SHEET_PAIRS]:
            path = out / "images" / f"{line['id']}_{kind[0]}.png"
            if path.is_file():
                images.append(Image.open(path))
                score = f" {line['scores'][line[kind]]:.2f}" if "scores" in line else ""
                captions.append(f"{kind}{score}: {line['prompt']}")
    write_png(out / "sheet.png", sheet(images, captions, min(len(lines), SHEET_PAIRS)))
    about = {"format": 1, "finished": True, **facts, "shards": names, "counts": counts, "options": options}
    write_text(out / "dataset.json", json.dumps(about, indent=2) + "\n")
    print(f"{out}: {json.dumps(counts)}")


def is_finished(out: Path) -> bool:
    return (out / "dataset.json").is_file() and read_json(out / "dataset.json")["finished"]


def read_lines(folder: Path) -> list[dict]:
    """All lines of a dataset's pairs-*.jsonl, in order."""
    return [json.loads(line) for path in sorted(folder.glob("pairs-*.jsonl")) for line in path.read_text().splitlines()]


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    if args.export_pickapic:
        load_pyarrow(Path(args.export_pickapic))             # missing packages are found before weeks of drawing
        if is_finished(out):
            return export_pickapic(out, Path(args.export_pickapic))
    part, parts = cli.parse_shard(args.shard)
    device, dtype = cli.device_and_dtype(args)
    pipeline = load_pipeline(args.model, device, dtype, args.vae, args.prediction_type)
    check_sampling_options(args, pipeline)
    args.dtype = str(dtype).removeprefix("torch.")

    scorer, about = None, lambda line, name: None
    if args.reselect:
        kept = Path(args.reselect)
        if not read_json(kept / "dataset.json").get("finished"):
            raise UserError(f"{kept}: not finished; run its own command again first")
        lines = read_lines(kept)
        rows, make = len(lines), lambda k: pair_from_kept(args, kept, lines, k)
    elif args.from_pairs or args.from_images:
        pairs = args.from_pairs is not None
        source = read_pairs(Path(args.from_pairs), args.human_only) if pairs else read_images(Path(args.from_images))
        rows, make = len(source), lambda k: encoded(args, pipeline, *source[k].load())
    else:
        own = PAPER_PEOPLE.parent / "prompts_train.txt"
        if args.prompts is None and args.model != "paper-people":
            raise UserError("--prompts FILE is needed with this model")
        prompts = cli.read_prompts(args.prompts or str(own), args.category)
        if twice := len(prompts) - len(set(prompts)):
            print(f"{twice} prompts repeat an earlier one; each is drawn, with seeds of its own")
        args.scorer = args.scorer or ("paper-people" if args.model == "paper-people" else own_scorer(args.model))
        scorer = load_scorer(args.scorer, device)
        rows, make = len(prompts), lambda k: pair_from_pool(args, pipeline, scorer, prompts[k], k)

        def about(line: dict, name: str) -> dict[str, str]:
            i = line[{"w": "winner", "l": "loser"}[name]] if name in "wl" else int(name)
            text = settings(args, pipeline, line["seeds"][i])
            return {"parameters": parameters(line["prompt"], args.negative_prompt, text)}

    rows = min(rows, args.limit) if args.limit else rows
    shards = -(-rows // SHARD)
    options = {name: value for name, value in vars(args).items() if name not in FREE} | {"rows": rows}
    facts = {
        "model": args.model, "context_width": pipeline.context_width, "scaling_factor": pipeline.vae.scaling_factor,
        "latent": [4, args.height // pipeline.vae.downscale, args.width // pipeline.vae.downscale]}
    with locked(out, part, parts):
        with in_turn(out):
            begin(out, options)
        scored = f"{args.pool_size} pictures each, scored by {args.scorer}" if scorer else "nothing to draw"
        print(f"{rows} rows to {out}, {scored}; {args.model} on {device} in {args.dtype}, job {part + 1} of {parts}")
        mine = [s for s in range(part, shards, parts) if not (out / f"shard-{s:05d}.safetensors").is_file()]
        pending = [k for s in mine for k in range(s * SHARD, min((s + 1) * SHARD, rows))]
        for k in cli.progress(pending, len(pending), "prompts"):
            make_row(out, k, make, about)
            if (k + 1) % SHARD == 0 or k + 1 == rows:
                join_rows(out, k // SHARD, range(k // SHARD * SHARD, k + 1))
        with in_turn(out):
            finish(out, options, facts, shards)
        if args.export_pickapic and is_finished(out):
            export_pickapic(out, Path(args.export_pickapic))


def own_scorer(model: str) -> str:
    """The scorer/ that lies in a model's folder, or PickScore."""
    folder = Path(model) / "scorer"
    return str(folder) if folder.is_dir() else "pickscore"


if __name__ == "__main__":
    cli.run(main)
