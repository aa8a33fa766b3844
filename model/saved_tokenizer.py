"""A tokenizer.json: of the `tokenizers` library, with every rule by which a text is cut up written down in it."""

from collections.abc import Iterable

import tokenizers

from .files import parse_object


def cuts(core: tokenizers.Tokenizer) -> tuple[bytes, bytes]:
    """How it cuts a text up before it looks up the pieces, as JSON."""
    return core.normalizer.__getstate__(), core.pre_tokenizer.__getstate__()


def read_saved(content: bytes, where: str, ours: Iterable[tokenizers.Tokenizer]) -> tokenizers.Tokenizer:
    """What it says, if it cuts texts up as one of `ours` does: a stranger's could have a regular expression that never
    ends, or replacements that make a gigabyte of a word. ValueError, UserError, and what the library raises."""
    model = parse_object(content.decode(), where, {"model": dict})["model"]
    if model.get("type") != "WordPiece" and model.get("continuing_subword_prefix"):
        raise ValueError("it has a continuing_subword_prefix")           # on some of these the library ends the process
    core = tokenizers.Tokenizer.from_str(content.decode())
    if cuts(core) not in map(cuts, ours):
        raise ValueError("it cuts texts up in another way")
    core.no_truncation()               # a saved file can carry both; we do them
    core.no_padding()
    return core
