"""Weight files read with suspicion, and files written so that a crash leaves the old one or the new one, whole."""

import contextlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import UserError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what is written there takes `path`'s name when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode                     # what the umask gives: safetensors' own files only you can read
        yield part
        os.chmod(part, mode)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_write(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, the same bytes for the same content; `format: pt` is what older readers ask for."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as part:
        save_file(tensors, part, {"format": "pt", **(metadata or {})})
        with open(part, "r+b") as file:          # the library writes the metadata in another order every time
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            file.seek(8)
            file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def read_json(path: Path) -> dict:
    """A file that holds one JSON object."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not there") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: {content!r:.40} where an object in {{}} was expected; download it again")
    return content


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes (name -> shape) and the metadata of a safetensors file, without reading any tensor.

    Raises UserError that says what the file is instead where it is no whole safetensors file.
    """
    with open(path, "rb") as file:
        start = file.read(512)
        size = os.fstat(file.fileno()).st_size
        length = struct.unpack("<Q", start[:8])[0] if size >= 8 else 0
        if not 2 <= length <= 100_000_000 or start[8:9] != b"{":          # first: a length's two bytes can read "PK"
            if start.startswith(b"version https://git-lfs"):
                raise UserError(f"{path}: a git-lfs pointer, not the weights; fetch them with `git lfs pull`")
            if start.lstrip()[:1] == b"<":
                raise UserError(f"{path}: a web page saved under the name of a weight file; download it again")
            if start[:2] in (b"PK", b"\x80\x02"):
                raise UserError(f"{path}: a pickle, which can run code when it is opened; convert it to safetensors")
            raise UserError(f"{path}: not a safetensors file ({size:,} bytes); download it again")
        if 8 + length > size:
            raise UserError(f"{path}: cut off after {size:,} bytes, inside its header; download it again")
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
            whole = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{path}: its safetensors header is damaged; download it again") from None
    if size != whole:
        raise UserError(f"{path}: {size:,} bytes where its header says {whole:,}; download it again")
    return shapes, metadata


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, which is opened for tensors only, so that no code in it can run; of a training
    checkpoint its `state_dict`."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = tensors.get("state_dict", tensors)
    except Exception:                          # zip, pickle and runtime errors alike mean a bad file
        tensors = None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path}: cannot be read as plain tensors; download it again, or get a .safetensors")
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` or a `.bin`. They are mapped, not read: what is not used costs nothing, and a
    tensor that is kept as it is has no second copy."""
    path = Path(path)
    if path.suffix == ".bin":
        return read_pickle(path)
    read_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: {error}; download it again") from None
