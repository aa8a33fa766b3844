"""Where a dataset's rows come from (`Source`): a pool that is kept, other people's pairs, one's own pictures; a pool
that is drawn stands in build_dataset.py. And whether a folder that was begun goes with its source (`begin_dataset`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from types import NoneType

import torch
from PIL import Image
from torch import Tensor

from model.checkpoint import Pipeline, load_pipeline
from model.errors import UserError
from model.files import digest_all, digest_of, files_read, is_a, read_json
from model.scorers import digest_of_scorer, load_scorer
from sampling import Drawing, to_picture

from .folder import open_manifest, write_manifest
from .images import fit, open_picture, to_latent
from .pool import Pool
from .preferences import Preference, digest_of_source
from .reader import check_files, dataset_digest, read_shard
from .rows import Row, pending_rows, picture_path, row_files, scores_of
from .verify import take_out


@dataclass(frozen=True)
class Source:
    names: list                        # what each row is made from, as JSON can hold it; one a row
    prompts: Callable[[int], str]      # of row k
    make: Callable[[int], Row]
    model: dict                        # what dataset.json says of the model: its name, sizes, scaling factor
    inputs: dict[str, str]             # digests, by the option that names them
    texts: Callable[[dict, str], dict | None] = lambda line, name: None          # of a picture, for its PNG
    unet_rows: int = 0                 # that go through the U-Net for a row: guided, a picture takes two a step


def score_pool(scorer: Callable, images: list[Image.Image], prompt: str) -> list[float]:
    scores = scorer(images, [prompt] * len(images))
    if not scores.isfinite().all():
        raise UserError(f"the scorer says {scores.tolist()!r:.80}; finite scores were expected")
    return scores.tolist()


def rescored(
    manifest: dict, vae: str | None, scorer_name: str, device: torch.device,
) -> tuple[Callable[[str, list[int], Tensor], list[float]], str]:
    """-> (prompt, seeds, a pool's latents (N, 4, h, w) -> the scores of its pictures), and the scorer's digest. The VAE
    is that which the pool was drawn with, wherever it lies by now. UserError where it, or the model, is another."""
    vae = vae or (manifest.get("options") or {}).get("vae")
    if not is_a(vae, (str, NoneType)):
        raise UserError(f"dataset.json: the VAE that the pool was drawn with is {vae!r:.60}; a name was expected")
    with files_read() as files:
        pipeline = load_pipeline(manifest["model"], device, vae=vae)
    was, now = (manifest.get("inputs") or {}).get("model"), digest_all(files)
    if was not in (None, now):
        raise UserError(f"{manifest['model']}: it, or its --vae, is another one than the pool was drawn with")
    with files_read() as files:
        scorer = load_scorer(scorer_name, device)

    def scores(prompt: str, seeds: list[int], latents: Tensor) -> list[float]:
        latents = latents.to(pipeline.device, torch.float32)
        return score_pool(scorer, [to_picture(pipeline, *one) for one in zip(latents, repeat(prompt), seeds)], prompt)
    return scores, digest_of_scorer(scorer_name, files)


def from_kept(
    folder: Path, manifest: dict, pool: Pool, scores: Callable | None = None, scored_by: str | None = None,
) -> Source:
    """Selects again from the first `pool_size` pictures of a pool that is kept; no model is needed. With `scores`, see
    `rescored`, they are scored anew, by what has the digest `scored_by`."""
    shards = [read_shard(folder, manifest, name) for name in manifest["shards"]]
    rows = [(line, tensors, i) for tensors, lines in shards for i, line in enumerate(lines)]
    if not rows:
        raise UserError(f"{folder}: no row in it")
    for line, tensors, _ in rows:
        if "pool" not in tensors:
            raise UserError(f"{folder}: made without --keep pool; it has no pool to select from")
        old = scores_of(line, folder)
        if len(old) < pool.pool_size:
            raise UserError(f"--pool-size {pool.pool_size}: {folder} keeps {len(old)} pictures a prompt")
        if None in old:
            raise UserError(f"{folder}: drawn with previews, so that only {len(old) - old.count(None)} of {len(old)} "
                            "pictures a prompt have a score to select by; draw a pool without")

    def make(k: int) -> Row:
        old, tensors, i = rows[k]
        line = {"prompt": old["prompt"], **{key: old[key][:pool.pool_size] for key in ("seeds", "scores")}}
        if scores:
            line["scores"] = scores(line["prompt"], line["seeds"], tensors["pool"][i][:pool.pool_size])
        line = pool.pair(line)
        if "left_out" in line:
            return line, None, {}
        ends, latents = {"w": line["winner"], "l": line["loser"]}, tensors["pool"][i][:pool.pool_size]
        found = {f"latents_{name}": latents[end] for name, end in ends.items()} | {"context": tensors["context"][i]}
        if pool.keep == "pool":
            found["pool"] = latents.clone()    # a file holds no tensor twice
            ends |= {f"{k:02d}": k for k in range(pool.pool_size)}
        paths = {name: picture_path(folder, old["id"], f"{end:02d}") for name, end in ends.items()}
        return line, found, {name: open_picture(path) for name, path in paths.items() if path.is_file()}

    model = {key: manifest[key] for key in ("model", "context_width", "scaling_factor", "latent") if key in manifest}
    inputs = {"reselect": dataset_digest(folder, manifest)} | ({"scorer": scored_by} if scored_by else {})
    return Source(
        [line["id"] for line, *_ in rows], lambda k: rows[k][0]["prompt"], make,
        {**model, "drawn_with": manifest.get("options") or {}}, inputs)


def from_pictures(
    pictures: list[Preference], pipeline: Pipeline, drawing: Drawing, model: dict, inputs: dict[str, str],
) -> Source:
    """Rows from pictures that exist, fitted to the size and encoded by the VAE: pairs, or single ones for SFT."""
    def make(k: int) -> Row:
        prompt, images = pictures[k].load()                    # 'w', and 'l' unless it is for SFT
        fitted = {name: fit(image, drawing.width, drawing.height) for name, image in images.items()}
        tensors = {f"latents_{name}": to_latent(image, pipeline) for name, image in fitted.items()}
        return {"prompt": prompt}, {**tensors, "context": drawing.encode([prompt], pipeline)[0]}, fitted

    return Source(
        [digest_of_source([one]) for one in pictures], lambda k: pictures[k].prompt, make, model, inputs)


def begin_dataset(
    out: Path, options: dict, may_change: tuple[str, ...], source: Source, option: str, rows: int, part: int,
    parts: int, damaged: dict[int, str],
) -> tuple[list[int], list[int]]:
    """Begins the folder or goes on with it; -> the rows that this job is to make, and those that failed before and are
    to be tried again. Rows may be added; those that are there stay, but those that are `damaged`. `option` is the one
    that names the source. `options` keep the dtype that the folder was begun with."""
    manifest = out / "dataset.json"
    before = open_manifest(manifest, options, source.inputs, (*may_change, "dtype"))
    if before:
        read_json(manifest, finished=bool, rows=int, rows_from=(str, NoneType), files=(dict, NoneType),
                  counts=(dict, NoneType))
        if not damaged:
            check_files(out, before)
    had = before.get("rows", 0)
    if rows < had:
        raise UserError(f"{out}: {had} rows are begun, and now there are {rows}; go on with all of them (--limit)")
    if before and digest_of(source.names[:had]) != before.get("rows_from"):
        raise UserError(f"{out}: the first {had} rows of {option} are not those that it was begun with; rows may be "
                        "added at the end, else choose another --out")
    dtype = options["dtype"]
    options["dtype"] = before.get("options", {}).get("dtype", dtype)
    other_dtype = UserError(f"{out}: begun with --dtype {options['dtype']}, and now it is {dtype}; only rows that "
                            "failed may be drawn with another")
    if damaged or before.get("finished") and (rows > had or (before.get("counts") or {}).get("failed")):
        if dtype != options["dtype"] and (rows > had or damaged):
            raise other_dtype
        # Before a shard is taken apart: from here on it is no finished dataset, whenever this is killed. While what is
        # damaged is taken out it keeps its digests, so that a kill then leaves a folder that is refused.
        files = {"files": before["files"]} if damaged else {}
        write_manifest(manifest, before["options"], before["inputs"], finished=False, rows=had,
                       rows_from=before["rows_from"], **files)
        take_out(out, had, damaged)
    missing, failed = pending_rows(out, rows)
    if dtype != options["dtype"] and missing:
        raise other_dtype
    if not before or missing or failed:
        write_manifest(
            manifest, options, source.inputs, finished=False, rows=rows, rows_from=digest_of(source.names[:rows]))
    mine = [number for number in failed if number % parts == part]
    for number in mine:                        # no longer failed, but missing: no other job may finish without them
        row_files(out, number)[1].unlink()
    return [number for number in missing if number % parts == part], mine
