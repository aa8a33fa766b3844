"""Reads a finished dataset, for training, reselection and export; refuses one that is not what its manifest says."""

import re
from pathlib import Path
from types import NoneType

import torch
from torch import Tensor

from model.checkpoint import Pipeline
from model.errors import UserError
from model.files import digest, digest_of, read_json, read_lines, read_tensors
from sampling import onto

from .folder import FORMAT
from .rows import pairs_of, row_number, same_length, scores_of

KINDS = (torch.float16, torch.bfloat16, torch.float32)         # of a shard's tensors; ours are float16


def is_finished(folder: Path) -> bool:
    return (folder / "dataset.json").is_file() and read_json(folder / "dataset.json").get("finished") is True


def read_manifest(folder: Path) -> dict:
    """dataset.json of a finished dataset, of this version's format or the one before."""
    path = folder / "dataset.json"
    manifest = read_json(path, format=int, finished=bool)
    if manifest["format"] not in (1, FORMAT):
        raise UserError(f"{path}: format {manifest['format']}, and this program reads 1 and {FORMAT}")
    if not manifest["finished"]:
        raise UserError(f"{folder}: not finished; run build_dataset.py's command again first")
    manifest = read_json(
        path, model=str, context_width=int, scaling_factor=float, shards=list, latent=(list, NoneType),
        options=(dict, NoneType), inputs=(dict, NoneType), files=(dict, NoneType))
    for name in manifest["shards"]:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"{path}: {name!r:.60} among its shards; a file beside it was expected")
    check_files(folder, manifest)
    return manifest


def check_files(folder: Path, manifest: dict) -> None:
    """Refuses shards that are not as they were when the dataset was finished."""
    mend = "get the dataset again, or run the command that made it with --repair"
    for name, recorded in (manifest.get("files") or {}).items():
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / name}: not there; {mend}")
        if digest(folder / name) != recorded:
            raise UserError(f"{folder / name}: not as it was when the dataset was finished; {mend}")


def dataset_digest(folder: Path, manifest: dict) -> str:
    """Changes with any row."""
    files = manifest.get("files") or {
        name: digest(folder / name) for shard in manifest["shards"] for name in (shard, pairs_of(shard))
        if (folder / name).is_file()}
    return digest_of(files)


def read_shard_lines(folder: Path, name: str) -> list[dict]:
    """The lines of one shard; an id is a number, and names pictures that lie in the folder."""
    lines = read_lines(folder / pairs_of(name), id=str, prompt=str)
    for line in lines:
        row_number(line, folder / pairs_of(name))
    return lines


def read_shard(folder: Path, manifest: dict, name: str) -> tuple[dict[str, Tensor], list[dict]]:
    """One shard's tensors, mapped, not read, and as many lines."""
    tensors, lines, path = read_tensors(folder / name), read_shard_lines(folder, name), folder / name
    context, latents = tensors.get("context"), [tensors.get(f"latents_{side}") for side in "wl"]
    if context is None or latents[0] is None:
        raise UserError(f"{path}: it has {', '.join(tensors)}; latents_w and context were expected")
    shape = [len(lines), *(manifest.get("latent") or latents[0].shape[1:])]
    for which, tensor in (("latents_w", latents[0]), ("latents_l", latents[1])):
        if tensor is not None and (list(tensor.shape) != shape or tensor.dtype not in KINDS):
            raise UserError(f"{path}: {which} is {list(tensor.shape)} of {tensor.dtype}, and {shape} was expected")
    pool = tensors.get("pool")
    if pool is not None and (pool.ndim != 5 or [len(pool), *pool.shape[2:]] != shape or pool.dtype not in KINDS
                             or any(len(scores_of(line, path)) != pool.shape[1] for line in lines)):
        raise UserError(f"{path}: pool is {list(pool.shape)} of {pool.dtype}, and pools of pictures like {shape} were "
                        "expected, with a score for each")
    expected = [len(lines), 77, manifest["context_width"]]
    if context.ndim != 3 or list(context.shape[::2]) != expected[::2] or not context.shape[1] \
            or context.dtype not in KINDS:
        raise UserError(f"{path}: context is {list(context.shape)} of {context.dtype}, and {expected} was expected")
    return tensors, lines


class Pairs:
    """The rows of one or more datasets' shards. They are mapped, not read: a dataset may be larger than memory."""

    def __init__(self, folders: list[Path], pipeline: Pipeline, data: str = "pairs"):
        """`data` is what is learned from, as in `losses.table.Loss`: pairs, winners, labels or pool."""
        self.data, self.rows, self.lines, self.folders, digests = data, [], [], [], []
        # The tensors of a row of the dataset that are together a row of ours.
        together = {"pairs": [("latents_w", "latents_l")], "winners": [("latents_w",)], "pool": [("pool",)],
                    "labels": [("latents_w",), ("latents_l",)]}[data]
        for folder in folders:
            manifest = read_manifest(folder)
            expected = {"context_width": pipeline.context_width, "scaling_factor": pipeline.vae.scaling_factor}
            for key, value in expected.items():
                if manifest[key] != value:
                    raise UserError(f"{folder}: made with {manifest['model']}, whose {key} is {manifest[key]}; "
                                    f"{pipeline.name} has {value}")
            for name in manifest["shards"]:
                shard, lines = read_shard(folder, manifest, name)
                if data in ("pairs", "labels") and "latents_l" not in shard:
                    raise UserError(f"{folder}: pictures without losers; they are for --loss sft")
                if data == "pool" and "pool" not in shard:
                    raise UserError(f"{folder}: made without --keep pool, and this loss learns from whole pools")
                part, first = together[0][0], self.rows[0][0] if self.rows else shard
                ours, theirs = (list(tensors[part].shape[1:]) for tensors in (shard, first))
                if ours != theirs:
                    raise UserError(f"{folder}: its {part} are {ours}, and those of {folders[0]} {theirs}; datasets "
                                    "that are joined must be alike")
                self.rows += [(shard, i, parts) for i in range(len(lines)) for parts in together]
                self.lines += [line for line in lines for _ in together]
                self.folders += [folder] * len(lines) * len(together)
            digests.append(dataset_digest(folder, manifest))
        if not self.rows:
            raise UserError(f"{folders[0]}: no pair in it")
        if data == "pool":                     # one without a score is found now, and not when its turn comes
            self.scores(list(range(len(self.rows))))
        self.digest = digests[0] if len(digests) == 1 else digest_of(digests)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return tuple(self.rows[0][0]["latents_w"].shape[2:])

    def batch(self, indices: list[int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """-> latents (K * B, 4, h, w), and context (B, M, d). Pairs are all winners, then all losers; pools all first
        pictures, then all second ones, and so on; of labels each row is one picture."""
        rows = [self.rows[i] for i in indices]
        if self.data == "pool":
            latents = torch.stack([shard["pool"][i] for shard, i, _ in rows], dim=1).flatten(0, 1)
        else:
            latents = torch.cat([torch.stack([shard[parts[k]][i] for shard, i, parts in rows])
                                 for k in range(len(rows[0][2]))])
        context = same_length([shard["context"][i] for shard, i, _ in rows])
        return onto(device, latents, torch.float32), onto(device, context, dtype)

    def labels(self, indices: list[int]) -> Tensor:
        """(B,): 1 for a winner, -1 for a loser; of `data` labels."""
        return torch.tensor([1.0 if self.rows[i][2] == ("latents_w",) else -1.0 for i in indices])

    def scores(self, indices: list[int]) -> Tensor:
        """The scorer's (B, K), in the order of `batch`. UserError where a picture has none."""
        found = []
        for i in indices:
            line = self.lines[i]
            scores = scores_of(line, self.folders[i])
            ends = {"pairs": ("winner", "loser"), "winners": ("winner",)}
            found.append(scores if self.data == "pool" else [scores[line[end]] for end in ends[self.data]])
            if None in found[-1]:
                raise UserError(
                    f"{self.folders[i]}, row {line['id']}: drawn with previews, so that not every picture has a score, "
                    "and whole pools are learned from by all; draw it without --preview-steps")
        return torch.tensor(found)
