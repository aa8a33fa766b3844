"""Files read with suspicion, each kind by one reader that says what it expected; files written so that a crash leaves
the old one or the new one, whole; and digests, by which a result knows the files that it was made from.
"""

import contextlib
import hashlib
import json
import os
import struct
import time
from collections.abc import Iterable, Iterator
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
        with open(part, "r+b") as file:                # Windows syncs no handle that only reads
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_write(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """In UTF-8. What UTF-8 cannot hold (a file name in latin-1) becomes an escape, which JSON reads back as it was."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, the same bytes for the same content; `format: pt` is what older readers ask for."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as part:
        try:
            save_file(tensors, part, {"format": "pt", **(metadata or {})})
        except SafetensorError as error:               # a full disk, for one
            raise UserError(f"{path}: cannot be written ({error})") from None
        with open(part, "r+b") as file:          # the library writes the metadata in another order every time
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            file.seek(8)
            file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def write_pickle(path: Path, content: object) -> None:
    """What safetensors cannot hold: a training state."""
    with atomic_write(path) as part, open(part, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:                  # torch's own words for a full disk; the cause is behind them
            raise UserError(f"{path}: cannot be written ({error.__context__ or error})") from None


# What was read

_listening: list[set[Path]] = []


@contextlib.contextmanager
def files_read() -> Iterator[set[Path]]:
    """Collects the files that the readers below (and whoever calls `was_read`) open within the block: what is made
    there depends on them."""
    files: set[Path] = set()
    _listening.append(files)
    try:
        yield files
    finally:
        _listening.remove(files)


def was_read(path: Path) -> Path:
    for files in _listening:
        files.add(Path(path))
    return path


LARGE = 16_000_000                             # bytes; the digest of a smaller file is not worth keeping
RACY = 2.0                                     # seconds in which a file may change without its time telling


def digest(path: Path, afresh: bool = False) -> str:
    """A file's SHA-256. A large file's is kept in the user's cache under its path, size and times, so that gigabytes
    are read once; `afresh` it is read, for a disk that rots changes no time."""
    path = Path(os.path.realpath(path))
    stat = path.stat()
    # ctime is there because cp -p and rsync carry mtime over; a fresh file may change again within its time's grain.
    key = f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    keep = not afresh and stat.st_size >= LARGE and time.time() - stat.st_ctime > RACY
    cache, cached = None, {}
    if keep:
        with contextlib.suppress(UserError, OSError, RuntimeError):              # the last: there is no home
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hg-dpo" / "digests.json"
            cached = read_json(cache)
        if isinstance(cached.get(key), str):
            return cached[key]
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    if cache is not None:
        with contextlib.suppress(OSError):
            write_text(cache, json.dumps({**cached, key: sha.hexdigest()}, indent=0))
    return sha.hexdigest()


def digest_all(files: Iterable[Path]) -> str:
    """One digest of several files' names and contents, wherever they lie and in whatever order they come."""
    return digest_of(sorted((Path(path).name, digest(path)) for path in files))


def digest_of_tensors(tensors: dict[str, Tensor]) -> str:
    """Of their names, types, shapes and contents."""
    contents = {name: hashlib.sha256(tensor.flatten().view(torch.uint8).numpy()) for name, tensor in tensors.items()}
    return digest_of({name: [str(tensors[name].dtype), list(tensors[name].shape), sha.hexdigest()]
                      for name, sha in contents.items()})


def digest_of(value: object) -> str:
    """The digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# JSON

def is_a(value: object, kind: type | tuple) -> bool:
    """As isinstance, but a truth value is no number, and a whole number is a float, too, if it is not too large."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    whole = float in kinds and isinstance(value, int) and abs(value) < 2**1023
    return (isinstance(value, kinds) or whole) and (bool in kinds or not isinstance(value, bool))


def parse_object(text: str, where: str, expected: dict[str, type | tuple]) -> dict:
    """One JSON object that has the keys of `expected`, each of its type."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); download it or make it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: {content!r:.40} where an object in {{}} was expected; download it or make it again")
    for key, kind in expected.items():
        if not is_a(content.get(key), kind):
            found = f"{key} is {content[key]!r:.40}" if key in content else f"no {key} in it"
            names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise UserError(f"{where}: {found}; {names} was expected. The file is damaged, or of another kind")
    return content


def read_text(path: Path) -> str:
    """A text in UTF-8, with or without a byte order mark."""
    try:
        return Path(was_read(path)).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: not there") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not JSON or text in UTF-8 ({error.reason} at byte {error.start})") from None


def read_json(path: Path, **expected: type | tuple) -> dict:
    """A file that holds one JSON object with the `expected` keys, each of its type."""
    return parse_object(read_text(path), str(path), expected)


def read_lines(path: Path, cut: bool = False, **expected: type | tuple) -> list[dict]:
    """A file that holds a JSON object a line, each with the `expected` keys. With `cut` a last line without its end,
    as a kill or a full disk leaves one, is left out."""
    text = read_text(path)
    lines = text.split("\n")                    # not splitlines: JSON may hold other line ends as they are
    lines = lines[:-1] if cut else lines
    return [parse_object(line, f"{path}, line {number}", expected)
            for number, line in enumerate(lines, 1) if line.strip()]


# Weights

FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes (name -> shape) and the metadata of a safetensors file, without reading any tensor.

    Raises UserError that says what the file is instead where it is no whole safetensors file.
    """
    with open(was_read(path), "rb") as file:
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
            if not all(isinstance(text, str) for text in metadata.values()) or not all(
                    is_a(size, int) for shape in shapes.values() for size in shape):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path}: its safetensors header is damaged; download it again") from None
    if size != whole:
        raise UserError(f"{path}: {size:,} bytes where its header says {whole:,}; download it again")
    return shapes, metadata


def is_plain(value: object) -> bool:
    """A dense tensor with contents of its own. A pickle also holds sparse and nested ones, ones without contents, and
    single numbers that are shown as billions: whoever copies such a one has no memory left."""
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided \
        and not value.is_nested and not value.is_quantized and value.nbytes <= value.untyped_storage().nbytes()


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, which is opened for tensors only, so that no code in it can run; of a training
    checkpoint its `state_dict`."""
    if torch.__version__ < (2, 10):
        raise UserError(f"{path}: a pickle, in which torch before 2.10 can be made to run code (CVE-2026-24747); "
                        "update torch, or get a .safetensors")
    try:
        tensors = torch.load(was_read(path), map_location="cpu", weights_only=True, mmap=True)
        tensors = tensors.get("state_dict", tensors)
    except Exception:                          # zip, pickle and runtime errors alike mean a bad file
        tensors = None
    if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and is_plain(tensor) for name, tensor in tensors.items()):
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
        tensors = load_file(path)
    except (SafetensorError, UnicodeError, TypeError) as error:      # the last two: a name that is not UTF-8
        raise UserError(f"{path}: {error}; download it again, under a plain name") from None
    for name, tensor in tensors.items():       # complex ones would lose half; with others torch does not compute
        if tensor.dtype not in FLOATS | INTEGERS:
            raise UserError(f"{path}: {name} is of {tensor.dtype}, which is not read; get it in float16 or float32")
    return tensors


def check_weight(tensor: Tensor, name: str, where: str | Path) -> None:
    """UserError where it is of whole numbers: what is quantised is no weight before it is scaled, and nobody says
    by what."""
    if tensor.dtype not in FLOATS:
        raise UserError(f"{where}: {name} is of {tensor.dtype}, not a weight as it is; get it in float16 or float32")
