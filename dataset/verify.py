"""Whether a finished dataset is what it was, down to the single row and picture; and taking out what is not, so that
build_dataset.py makes that again, and nothing else.

dataset.json has the digests of the shards' files; a line of pairs-*.jsonl has that of its row's tensors and of each of
its pictures. All are read anew, however long that takes.
"""

from collections.abc import Callable
from pathlib import Path
from types import NoneType

from model.errors import UserError
from model.files import digest, digest_of_tensors, read_json, read_lines, read_tensors

from .rows import SHARD, picture_path, row_number, shard_files, shard_numbers, take_apart


def changed(path: Path, then: str | None) -> str | None:
    """What is wrong with a file that had the digest `then`, in words."""
    if not path.is_file():
        return f"{path.name} is not there"
    return None if digest(path, afresh=True) == then else f"{path.name} is not as it was"


def damage_of(folder: Path, shard: int, rows: int, files: dict[str, str]) -> dict[int, str]:
    """What is wrong in one shard, by the numbers of its rows."""
    numbers = shard_numbers(shard, rows)
    pairs, tensors, left_out = shard_files(folder, shard)
    for path in [pairs] + [left_out] * (left_out.name in files):
        if problem := changed(path, files.get(path.name)):
            return dict.fromkeys(numbers, problem)
    found, lines = {}, read_lines(pairs, id=str, tensors=(str, NoneType), pictures=(dict, NoneType))
    problem = changed(tensors, files.get(tensors.name)) if lines else None
    if problem:
        try:
            of_rows = read_tensors(tensors) if tensors.is_file() else {}
        except UserError:
            of_rows = {}
        for i, line in enumerate(lines):
            row = {name: tensor[i] for name, tensor in of_rows.items() if tensor.shape[:1] > (i,)}
            if digest_of_tensors(row) != line.get("tensors"):
                found[row_number(line, pairs)] = problem
        found = found or dict.fromkeys(numbers, problem)       # between the rows
    for line in lines:
        for name, then in (line.get("pictures") or {}).items():
            if problem := changed(picture_path(folder, line["id"], name), then):
                found.setdefault(row_number(line, pairs), problem)
    return found


def damage(folder: Path, progress: Callable) -> dict[int, str]:
    """What is wrong with a dataset that was finished, by the numbers of its rows; {} where all is as it was, and where
    rows are being made, by another job or until a kill: what was damaged is then out already."""
    manifest = read_json(folder / "dataset.json", finished=bool, rows=(int, NoneType), files=(dict, NoneType))
    rows, files = manifest.get("rows"), manifest.get("files")
    if files is None and not manifest["finished"]:
        return {}
    if rows is None or files is None:
        raise UserError(f"{folder}: made by a version that noted no digests; nothing tells whether it is as it was")
    shards = range(-(-rows // SHARD))
    return {number: problem for shard in progress(shards, len(shards), "reading shards")
            for number, problem in damage_of(folder, shard, rows, files).items()}


def take_out(folder: Path, rows: int, damaged: dict[int, str]) -> None:
    """Takes apart the shards that have damaged rows; these are then missing."""
    for shard in sorted({number // SHARD for number in damaged}):
        take_apart(folder, shard, set(shard_numbers(shard, rows)) - set(damaged))
