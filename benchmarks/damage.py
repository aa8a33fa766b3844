"""A valid file -> one that a stranger might send: damaged in what it says, or in its bytes."""

import contextlib
import io
import json
import math
import random
import struct
from pathlib import Path

import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import load, save

from pictures import write_png

SECRET = "../secret.png"                       # a picture beside the input's folder, where no list may lead
LINK = "link.png"                              # leads to it
RAN = "it ran"                                 # the file that `Code` makes
TEXTS = ["", "x", "0", "1e400", "\0", "\n", "\ud83d", "é 雨", SECRET, LINK, "/etc/passwd", ".", "x" * 70_000,
         "(" * 3000, "[a|b:", ":1.2)", " BREAK ", '"', ",", "{", "}", "[", "]"]
VALUES = [*TEXTS, None, True, -1, 0, 1, 7, 2**31, 2**64, 10**400, 0.5, 1e30, -1e308, math.nan, math.inf, [], {}, [None],
          [[]], [1, 2], ["x"], {"": 1}, {"content": 5}]
DTYPES = [torch.float16, torch.float64, torch.float8_e5m2, torch.complex64, torch.int64, torch.int8, torch.bool]


class Code:
    """In a pickle: what runs when the pickle is opened as such."""

    def __reduce__(self):
        return exec, (f"open({RAN!r}, 'w')",)


def damaged_tensor(x: torch.Tensor, rng: random.Random, pickled: bool) -> object:
    changes = [lambda: x * math.nan, lambda: x * 1e38, lambda: x[:0], lambda: x[..., :1], lambda: x[None], lambda: x.T,
               lambda: x.flatten(), lambda: torch.cat([x, x]), lambda: x.sum(), lambda: x.to(rng.choice(DTYPES))]
    odd = [Code, lambda: x.to("meta"), lambda: x.to_sparse(), lambda: torch.ones(1).expand(10**5, 10**5, 10**3)]
    return rng.choice(odd + changes)() if pickled else rng.choice(changes)().contiguous()


def damaged_value(value: object, rng: random.Random, pickled: bool = False) -> object:
    """With one of its nodes replaced, moved, doubled or taken away."""
    how = rng.random()
    if isinstance(value, dict) and value and how < 0.9:
        key, other = rng.choice(list(value)), rng.choice([*value, *TEXTS])
        if how < 0.6:
            return {**value, key: damaged_value(value[key], rng, pickled)}
        return {name: one for name, one in value.items() if name != key} | ({other: value[key]} if how < 0.8 else {})
    if isinstance(value, list) and value and how < 0.9:
        i = rng.randrange(len(value))
        some = [damaged_value(value[i], rng, pickled)] if how < 0.6 else rng.choice([[], value[i:i + 1] * 2, value[:i]])
        return [*value[:i], *some, *value[i + 1:]]
    if isinstance(value, torch.Tensor):
        return damaged_tensor(value, rng, pickled)
    if isinstance(value, (int, float)) and how < 0.4:
        return rng.choice([-value, 2 * value, value + 1, str(value), [value]])
    return Code() if pickled and how < 0.6 else rng.choice(VALUES)


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Mostly near the beginning, where files say what they are."""
    for _ in range(rng.choice([1, 1, 1, 2, 10])):
        start = rng.randrange(min(len(content), rng.choice([200, 5000, len(content)])) + 1)
        end = start + rng.choice([0, 1, 2, 4, 100])
        piece = rng.choice([b"", b"\0" * 4, b"\xff" * 4, rng.randbytes(end - start), content[start:end] * 50,
                            rng.choice(TEXTS).encode(errors="surrogatepass")])
        content = content[:start] + piece + content[end:]
    return content[:rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content


def as_json(value: object, rng: random.Random) -> bytes:
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def damaged(file: Path, rng: random.Random) -> bytes:
    """A file's contents, changed in what they say, or by chance, or where that cannot be written, in their bytes."""
    content, made = file.read_bytes(), io.BytesIO()
    with contextlib.suppress(Exception):       # many things cannot be written in the file's format
        match file.suffix if rng.random() < 0.65 else "":
            case ".json":
                return as_json(damaged_value(json.loads(content), rng), rng)
            case ".jsonl":
                lines = damaged_value([json.loads(line) for line in content.splitlines()], rng)
                return b"".join(as_json(line, rng) + b"\n" for line in lines)
            case ".safetensors":
                length = struct.unpack("<Q", content[:8])[0]
                header = json.loads(content[8:8 + length])
                if rng.random() < 0.5:
                    return save(damaged_value(load(content), rng), header.get("__metadata__"))
                text = as_json(damaged_value(header, rng), rng)
                return struct.pack("<Q", len(text)) + text + content[8 + length:]
            case ".bin" | ".pt":
                value = damaged_value(torch.load(file, weights_only=True), rng, pickled=True)
                torch.save(value, made, _use_new_zipfile_serialization=rng.random() < 0.8)
                return made.getvalue()
            case ".parquet":
                rows = damaged_value(pyarrow.parquet.read_table(file).to_pylist(), rng)
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), made)
                return made.getvalue()
            case ".png":
                text = damaged_bytes(Image.open(file).info["parameters"].encode(), rng).decode(errors="replace")
                write_png(file, Image.open(file), {"parameters": text})
                return file.read_bytes()
    return damaged_bytes(content, rng)
