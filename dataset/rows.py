"""The rows of a dataset as they come into being: each a file of its own, joined to shards of 64.

    partial/000123.safetensors   a finished row: its tensors in half precision, its line and the digest in the header
    partial/000123.json          a row that is left out, and why
    pairs-00001.jsonl, shard-00001.safetensors, left-out-00001.jsonl       the same for rows 64 to 127, joined
    partial/shard-00001.json     these files' digests, until they stand in dataset.json

A shard is joined once all of its rows are there, whichever jobs made them, and `pairs-` is written last. Where rows
are added, or those that failed are tried again, it is taken apart first: rows that are there stay as they are.
"""

import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from PIL import Image

from model.errors import UserError
from model.files import (
    digest,
    digest_of,
    digest_of_tensors,
    is_a,
    parse_object,
    read_header,
    read_json,
    read_lines,
    read_tensors,
    write_tensors,
    write_text,
)
from pictures import sheet, write_png

from .folder import clear_unfinished, in_turn
from .images import open_picture

SHARD = 64                                     # rows a file
SHEET_PAIRS = 12
NEAR_TIE = 0.01                                # of the scorer's unit: a gap that is hardly a preference
LONGEST_CONTEXT = 100_000                      # tokens, 150 MB a prompt in half precision
IN_A_ROW = 10                                  # so many failures one after another are no longer single bad rows
NOTE = {"id": str, "prompt": str, "reason": str, "failed": bool}                 # of a row that is left out

Row = tuple[dict, dict[str, torch.Tensor] | None, dict[str, Image.Image]]       # line, tensors, pictures


def shard_numbers(shard: int, rows: int) -> range:
    return range(shard * SHARD, min((shard + 1) * SHARD, rows))


def shard_files(out: Path, shard: int) -> tuple[Path, Path, Path]:
    """Of pairs, of tensors, and of what is left out."""
    return (out / f"pairs-{shard:05d}.jsonl", out / f"shard-{shard:05d}.safetensors",
            out / f"left-out-{shard:05d}.jsonl")


def row_files(out: Path, number: int) -> tuple[Path, Path]:
    """Of the row, and of the note that stands in its place."""
    path = out / "partial" / f"{number:06d}"
    return path.with_suffix(".safetensors"), path.with_suffix(".json")


def picture_path(out: Path, row_id: str, name: str) -> Path:
    """images/000123_w.png; from row 1,000 on a folder for each thousand, as images/004/004123_w.png: file systems and
    people get slow with 200,000 pictures in one."""
    thousand = row_id[:-3].zfill(3)
    return out / "images" / ("" if thousand == "000" else thousand) / f"{row_id}_{name}.png"


def digests_file(out: Path, shard: int) -> Path:
    return out / "partial" / f"shard-{shard:05d}.json"


def write_row(path: Path, line: dict, tensors: dict[str, torch.Tensor]) -> None:
    text = json.dumps(line)
    write_tensors(path, tensors, {"line": text, "digest": digest_of([text, digest_of_tensors(tensors)])})


def read_row(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """What `write_row` wrote; UserError where it is not as it was."""
    header = read_header(path)[1]
    text, tensors = header.get("line", ""), read_tensors(path)
    line = parse_object(text, f"{path}: its header", {"id": str})
    if "digest" in header and header["digest"] != digest_of([text, digest_of_tensors(tensors)]):
        raise UserError(f"{path}: not as it was when it was written; remove it, and it is made again")
    return line, tensors


def pending_rows(out: Path, rows: int) -> tuple[list[int], list[int]]:
    """-> the numbers of the rows that are not there, and of those that failed. Takes shards apart that miss a row or
    have one that failed; the folder's jobs do this in turn."""
    missing, failed = [], []
    for shard in range(-(-rows // SHARD)):
        numbers = shard_numbers(shard, rows)
        pairs, _, left_out = shard_files(out, shard)
        if pairs.is_file():
            lines = read_lines(pairs, id=str)
            notes = read_lines(left_out, **NOTE) if left_out.is_file() else []
            if unexpected := {row_number(line, pairs) for line in (*lines, *notes)} - set(numbers):
                raise UserError(f"{pairs}: row {min(unexpected)} does not belong there; get or make the dataset again")
            if len(lines) + len(notes) == len(numbers) and not any(note["failed"] for note in notes):
                continue
            take_apart(out, shard, numbers)
        for number in numbers:
            row, note = row_files(out, number)
            try:
                if row.is_file() and read_row(row):
                    continue
                if not note.is_file() or row.is_file():
                    missing.append(number)
                elif read_json(note, **NOTE)["failed"]:
                    failed.append(number)
            except UserError:                  # damaged: it is made again
                missing.append(number)
    return missing, failed


def take_apart(out: Path, shard: int, keep: Collection[int]) -> None:
    """A joined shard -> the own files of those of its rows that have these numbers; the others are lost."""
    pairs, tensors, left_out = shard_files(out, shard)
    lines = read_lines(pairs, id=str) if keep else []
    kept = [(i, number) for i, line in enumerate(lines) if (number := row_number(line, pairs)) in keep]
    rows_of = read_tensors(tensors) if kept else {}
    if any(tensor.shape[:1] != (len(lines),) for tensor in rows_of.values()):
        raise UserError(f"{tensors}: has other rows than the {len(lines)} of {pairs.name}; make it again")
    for i, number in kept:
        row = {name: tensor[i].clone() for name, tensor in rows_of.items()}
        write_row(row_files(out, number)[0], lines[i], row)
    for note in read_lines(left_out, id=str) if keep and left_out.is_file() else []:
        if (number := row_number(note, left_out)) in keep:
            write_text(row_files(out, number)[1], json.dumps(note))
    # `pairs` first: without it the shard is not joined.
    for path in (pairs, tensors, left_out, digests_file(out, shard)):
        path.unlink(missing_ok=True)


def row_number(line: dict, where: Path) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", line["id"]):
        raise UserError(f"{where}: {line['id']!r:.60} is no id; digits were expected")
    return int(line["id"])


def make_row(
    out: Path, number: int, prompt: str, make: Callable[[int], Row], texts: Callable[[dict, str], dict | None],
    images: str = "pair",
) -> str | None:
    """Makes row `number`; its file comes last, after its pictures. `make` returns no tensors for a row that is no pair,
    and then its line says why under `left_out`. -> what went wrong, where something did: that is noted as well."""
    path, note = row_files(out, number)
    start = {"id": f"{number:06d}", "prompt": prompt}
    reason = None
    try:
        line, tensors, pictures = make(number)
        for name, tensor in (tensors or {}).items():
            if not torch.isfinite(tensor.half()).all():
                raise UserError(f"NaN or infinite values in {name}; try --dtype float32")
    except UserError as error:
        reason = str(error)
        write_text(note, json.dumps({**start, "reason": reason, "failed": True}))
        return f"prompt {start['id']}, {prompt[:60]!r}: {reason}"
    line = {**start, **line}
    if tensors is None:
        write_text(note, json.dumps({**start, "reason": line["left_out"], "failed": False}))
        return None
    shown = {"none": "wl" if number < SHEET_PAIRS else "", "pair": "wl", "pool": pictures}[images]
    line["pictures"] = {}
    for name, picture in pictures.items():
        if name in shown:
            file = picture_path(out, line["id"], name)
            write_png(file, picture, texts(line, name))
            line["pictures"][name] = digest(file)
    write_row(path, line, {name: tensor.half() for name, tensor in tensors.items()})
    note.unlink(missing_ok=True)
    return None


def same_length(contexts: list[torch.Tensor]) -> torch.Tensor:
    """Contexts (M_i, D) of one or more chunks -> (B, M, D), each repeated to their least common length. Attention over
    a context repeated whole is attention over the context, so nothing changes but rounding. UserError where that
    is too long to be held in memory."""
    lengths = {len(context) for context in contexts}
    length = math.lcm(*lengths)
    if length > LONGEST_CONTEXT:
        raise UserError(f"text features of {', '.join(map(str, sorted(lengths)))} tokens cannot go together: repeated "
                        f"to one length they are {length:,} long; give prompts of fewer lengths")
    return torch.stack([context.repeat(length // len(context), 1) for context in contexts])


def join_rows(out: Path, shard: int, numbers: range) -> bool:
    """Rows of one shard -> its files, if all of them are there; then the rows' own files go."""
    pairs, joined, left_out = shard_files(out, shard)
    if pairs.is_file():
        return True
    rows, lines, notes = [], [], []
    for number in numbers:
        row, note = row_files(out, number)
        if row.is_file():
            line, tensors = read_row(row)
            lines.append(line)
            rows.append({name: tensor.clone() for name, tensor in tensors.items()})              # the file goes
            if kinds_of(rows[-1]) != kinds_of(rows[0]) or not all(tensor.numel() for tensor in rows[-1].values()):
                raise UserError(f"{row}: empty, or unlike the first row of its shard; remove the one that is damaged, "
                                "and it is made again")
        elif note.is_file():
            notes.append(read_json(note, **NOTE))
        else:
            return False
    if notes:
        write_text(left_out, "".join(json.dumps(note) + "\n" for note in notes))
    else:
        left_out.unlink(missing_ok=True)
    if rows:
        together = {name: [row[name] for row in rows] for name in rows[0]}
        together = {name: (same_length if name == "context" else torch.stack)(tensors)
                    for name, tensors in together.items()}
        write_tensors(joined, together)
        lines = [line | {"tensors": digest_of_tensors({name: tensor[i] for name, tensor in together.items()})}
                 for i, line in enumerate(lines)]
    else:
        joined.unlink(missing_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    digests = {path.name: digest(path) for path in (joined, left_out) if path.is_file()}
    digests[pairs.name] = hashlib.sha256(text.encode()).hexdigest()
    write_text(digests_file(out, shard), json.dumps(digests))  # before `pairs`: what is joined has them
    write_text(pairs, text)
    for number in numbers:
        for path in row_files(out, number):
            path.unlink(missing_ok=True)
    return True


def kinds_of(row: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """What the rows of a shard have in common: all but how long their text features are."""
    return {name: (tensor.dtype, tensor.shape[1:] if name == "context" else tensor.shape)
            for name, tensor in row.items()}


def make_rows(
    out: Path, rows: int, missing: list[int], failed: list[int], prompts: Callable[[int], str],
    make: Callable[[int], Row], texts: Callable[[dict, str], dict | None], images: str, progress: Callable,
) -> list[str]:
    """Makes the `missing` rows, then those that `failed` before, and joins what shards they complete. -> what went
    wrong; a run of failures ends it, but for those that are no news."""
    problems, in_a_row, pending = [], 0, [*missing, *failed]
    for i, (number, after) in enumerate(progress(zip(pending, [*pending[1:], None]), len(pending), "prompts")):
        problem = make_row(out, number, prompts(number), make, texts, images)
        in_a_row = in_a_row + 1 if problem and i < len(missing) else 0
        problems += [problem] if problem else []
        if in_a_row == IN_A_ROW:
            raise UserError(f"{IN_A_ROW} rows failed one after another, the last: {problem}")
        if after is None or after // SHARD != number // SHARD:
            with in_turn(out):
                join_rows(out, number // SHARD, shard_numbers(number // SHARD, rows))
    return problems


def summarise(out: Path, rows: int) -> dict | None:
    """What the manifest of a finished dataset says of its rows; None while other jobs are at work. Writes the sheet.
    Jobs do this in turn. Once the manifest is written, `clear_parts`."""
    shards = range(-(-rows // SHARD))
    if not all([join_rows(out, shard, shard_numbers(shard, rows)) for shard in shards]):
        return None
    files = {path.name: digest(path) for shard in shards for path in shard_files(out, shard) if path.is_file()}
    for shard in shards:
        written = read_json(path) if (path := digests_file(out, shard)).is_file() else {}
        if spoiled := [name for name in written if files.get(name) != written[name]]:
            raise UserError(f"{out / spoiled[0]}: not as it was when it was written; remove "
                            f"{shard_files(out, shard)[0].name}, and its rows are made again")
    lines = [line for shard in shards for line in read_lines(shard_files(out, shard)[0], id=str, prompt=str)]
    notes = [note for shard in shards if (path := shard_files(out, shard)[2]).is_file()
             for note in read_lines(path, **NOTE)]
    if not lines:
        reasons = Counter(note["reason"] for note in notes).most_common(1)
        raise UserError(f"{out}: no pair came of {rows} rows; {reasons[0][1]} times: {reasons[0][0]}")
    failed = sum(note["failed"] for note in notes)
    counts = {"rows": len(lines), "left_out": len(notes) - failed, "failed": failed}
    scored = [scores_of(line, out) for line in lines if "scores" in line]
    if scored:
        gaps = [scores[line["winner"]] - scores[line["loser"]] for scores, line in zip(scored, lines)]
        counts |= {"pictures": sum(map(len, scored)), "mean_gap": sum(gaps) / len(gaps),
                   "near_ties": sum(gap < NEAR_TIE for gap in gaps)}
    images, captions = [], []
    for kind in ("winner", "loser"):
        for line in lines[:SHEET_PAIRS]:
            path = picture_path(out, line["id"], kind[0])
            if path.is_file():
                images.append(open_picture(path))
                score = f" {line['scores'][line[kind]]:.2f}" if "scores" in line else ""
                captions.append(f"{kind}{score}: {line['prompt']}")
    if images:
        write_png(out / "sheet.png", sheet(images, captions, min(len(lines), SHEET_PAIRS)))
    return {"shards": [name for name in files if name.endswith(".safetensors")], "files": files, "counts": counts,
            "left_out": [{key: note[key] for key in NOTE} for note in notes]}


def clear_parts(out: Path) -> None:
    """What dataset.json has made needless, and what kills left behind."""
    shutil.rmtree(out / "partial", ignore_errors=True)
    clear_unfinished(out)


def pairs_of(shard: str) -> str:
    """The name of a shard -> that of its lines."""
    return shard.replace("shard-", "pairs-").replace(".safetensors", ".jsonl")


def scores_of(line: dict, where: Path) -> list[float | None]:
    """The scores of a pool's pictures, one a seed; None for those that were not drawn in full."""
    seeds, scores = line.get("seeds"), line.get("scores")
    ends = [line.get("winner"), line.get("loser")]
    if not is_a(seeds, list) or not is_a(scores, list) or len(seeds) != len(scores) or not all(
            score is None or is_a(score, float) and abs(score) < 1e30 for score in scores) or not all(
            is_a(end, int) and 0 <= end < len(scores) and scores[end] is not None for end in ends):
        raise UserError(f"{where}, row {line.get('id')}: seeds, as many finite scores, a winner and a loser were "
                        "expected")
    return scores
