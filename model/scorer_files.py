"""Where a scorer's weights lie, and how they are read when they come as one file, pickled ones too."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from .errors import UserError
from .files import read_pickle, read_tensors
from .hub import fetch

PICKLES = (".pt", ".pth")


def fetch_for(file: str, source: str, needed: Callable[[Sequence[str]], list[str]]) -> Path:
    """`fetch`, whose refusal also names the file that is wanted."""
    try:
        return fetch(source, needed)
    except UserError as error:
        raise UserError(f"{error} (for {file})") from None


def find_file(source: str, *names: str) -> Path:
    """`source` itself, or what a folder or a Hub repository has first of `names`."""
    if Path(source).is_file():
        return Path(source)
    if source.endswith((*PICKLES, ".safetensors", ".bin")):
        raise UserError(f"{source}: no such file")
    folder = fetch_for(names[0], source, lambda files: [next((n for n in names if n in files), names[0])])
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{source}: no {' or '.join(names)} here")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, a pickle too (see `read_pickle`)."""
    return read_pickle(path) if path.suffix in PICKLES else read_tensors(path)
