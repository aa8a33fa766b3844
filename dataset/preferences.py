"""People's preferences and captioned pictures, as others publish them; and our pairs in the form that others read.

`read_pairs` tells these apart by what is in the file, not by its name:

    Pick-a-Pic v1, v2   parquet files, or their folder   caption, jpg_0, jpg_1 (bytes), label_0 (1: the first is better)
    HPD-v2              train.json                       prompt, file_path [2], human_preference [2] (1: the better)
                        test.json                        prompt, image_path [n], rank [n] (lower is better)
    ImageRewardDB       metadata-*.parquet, *.json       image_path, prompt_id, prompt, rank (lower is better)
    one's own           *.jsonl, *.csv                   prompt, winner, loser

and `read_images` reads a folder with metadata.jsonl (file_name, text). Where a prompt has more than two pictures, the
best and the worst are the pair; `read_rankings` has all of them, and ties. Paths are relative to the folder that the
list is in, and may not lead out of it. Only the lists are held in memory; a picture is opened when its row's turn
comes. A new format of pairs is a function and a line of PREFERENCE_FORMATS.
"""

import contextlib
import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from model.errors import UserError
from model.files import atomic_write, digest_of, parse_object, read_lines, read_text

from .images import lies_in, open_picture
from .reader import read_manifest, read_shard_lines
from .rows import picture_path

# What a prompt about people says, in any case, with or without a plural s. Words that mean other things as often (face,
# model, portrait, figure) and names are not among them. Of PartiPrompts' 177 prompts on people this keeps 154, of its
# 1,455 others 59; some of these do show a person ("A man sips a latte"), some do not ("a baby penguin").
PEOPLE = """
    person people human humans man men woman women guy gentleman gentlemen lady ladies male female adult
    boy girl child children kid baby babies toddler infant teen teenager schoolboy schoolgirl
    father mother dad mom mum son daughter brother sister sibling twin parent grandfather grandmother grandpa grandma
    husband wife wives family families couple bride groom friend boyfriend girlfriend crowd selfie
    actor actress athlete astronaut artist ballerina businessman businesswoman chef coach cowboy cowgirl dancer doctor
    farmer firefighter fisherman fishermen geisha judge king knight maid monk musician nun nurse painter pharaoh pilot
    pirate player police policeman politician president priest prince princess queen runner samurai scientist singer
    sailor skier soldier student surfer teacher tourist viking warrior witch witches wizard worker
""".split()
ABOUT_PEOPLE = re.compile(rf"(?<![^\W\d_])(?:{'|'.join(PEOPLE)})s?(?![^\W\d_])", re.IGNORECASE)     # whole words; 1girl

EXPORT_ROWS = 64                               # a row group; of pairs of 704 x 1024 pixels about 150 MB


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt, and where to find its two pictures, or the one that it describes."""

    prompt: str
    file: Path                                 # the list or table that it stands in
    row: int                                   # there, from 1; the line, where it is lines of text
    winner: str                                # the picture's path, as the list has it; in a table the column
    loser: str | None = None
    cell: tuple[int, int] | None = None        # in a table of pictures: the row group, and the row in it

    def load(self) -> tuple[str, dict[str, Image.Image]]:
        """-> the prompt and its pictures, 'w' and 'l', or 'w' alone where there is no loser."""
        return self.prompt, {
            side: open_picture(self.source(name), f"{self.where()}: {name}") for side, name in self.names().items()}

    def source(self, name: str) -> Path | bytes:
        if self.cell is None:
            return find_picture(self.file.parent, name, self.where())
        group, i = self.cell
        with damage_named(self.file):
            content = picture_columns(self.file, group, *sorted(self.names().values()))[name][i].as_py()
        return content if isinstance(content, bytes) else b""

    def names(self) -> dict[str, str]:
        return {"w": self.winner} | ({} if self.loser is None else {"l": self.loser})

    def files(self) -> list[Path]:
        """Of its pictures, or the table that holds them. UserError on a missing picture."""
        if self.cell is not None:
            return [self.file]
        return [find_picture(self.file.parent, name, self.where()) for name in self.names().values()]

    def where(self) -> str:
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True, slots=True)
class Ranking:
    """The pictures of a prompt, each alone, from the best to the worst: the lowest grade is the best, equal ones are
    tied."""

    grades: tuple[float, ...]
    pictures: tuple[Preference, ...]

    @property
    def prompt(self) -> str:
        return self.pictures[0].prompt

    def files(self) -> list[Path]:
        return [file for picture in self.pictures for file in picture.files()]


def read_pairs(path: Path, human_only: bool = False) -> list[Preference]:
    """The pairs of a file, or of a folder of Pick-a-Pic files, in their order. Prints how many rows are left out."""
    return read_preferences(path, "pair", best_and_worst, human_only)


def read_rankings(path: Path) -> list[Ranking]:
    """The same, with all pictures of each prompt, two or more, and with ties."""
    return read_preferences(path, "ranking", whole_ranking)


def read_preferences(path: Path, kind: str, select: Callable, human_only: bool = False) -> list:
    """What `select` makes of the rows of `graded_rows`; where it makes None they are left out."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f"{path}: no such file, and no folder with .parquet files in it")
    found, without, others = [], 0, 0
    for file in files:
        if path.is_dir() and not holds_pictures(file):
            raise UserError(f"{file}: not Pick-a-Pic's columns; give the one file that is to be read")
        for row in graded_rows(file):
            one = select(file, *row)
            if one is None:
                without += 1
            elif human_only and not ABOUT_PEOPLE.search(one.prompt):
                others += 1
            else:
                one.files()                    # a missing one is reported now, not in the middle of the work
                found.append(one)
    left_out = f"{without} without a preference" + (f" and {others} not about people" if human_only else "")
    if not found:
        raise UserError(f"{path}: no {kind} in it (left out: {left_out})")
    print(f"{path}: {len(found)} {kind}s; left out: {left_out}")
    return found


def read_images(folder: Path) -> list[Preference]:
    """The pictures of a folder with their texts, from its metadata.jsonl."""
    file, images = folder / "metadata.jsonl", []
    if not file.is_file():
        raise UserError(f"{file}: not there; expected a line for each picture, with file_name and text")
    for number, row in enumerate(read_lines(file, file_name=str, text=str), 1):
        images.append(Preference(cleaned(row["text"]), file, number, row["file_name"]))
        images[-1].files()
    if not images:
        raise UserError(f"{file}: no picture in it")
    return images


def digest_of_source(pairs: Iterable[Preference]) -> str:
    """Changes with what is read from a source, pairs or pictures. Of the pictures, which may be hundreds of gigabytes,
    it takes the sizes alone: of each file, or of the table that they are in."""
    sizes = lru_cache(maxsize=None)(os.path.getsize)                 # a table has many rows
    return digest_of([
        [pair.prompt, pair.winner, pair.loser, pair.cell, [sizes(file) for file in pair.files()]] for pair in pairs])


# Pictures

def find_picture(folder: Path, name: str, where: str) -> Path:
    """The file that a list in `folder` means. HPD-v2's pictures lie in train/ and test/ below the list, ImageRewardDB's
    also right beside it."""
    for inside in (name, f"train/{name}", f"test/{name}", os.path.basename(name)):
        if not lies_in(folder, inside):
            raise UserError(f"{where}: {name!r:.200} leads out of {folder}")
        if os.path.isfile(path := os.path.join(folder, inside)):
            return Path(os.path.realpath(path))
    raise UserError(f"{where}: {name!r:.200} is not in {folder}")


# Formats

Graded = tuple[object, str, list[tuple[float, str]]]


def pickapic_row(number: int, row: dict) -> Graded:
    """A tie is labelled 0.5. Where there is no label, nobody has said anything."""
    label = None if row.get("has_label") is False else row["label_0"]
    first, second = {1: (0, 1), 0: (1, 0)}.get(label, (0, 0))
    return number, row["caption"], [] if label is None else [(first, "jpg_0"), (second, "jpg_1")]


def own_row(number: int, row: dict) -> Graded:
    tied = row.get("tie") in (True, 1, "1", "true", "True")    # neither has won; the names only say which is which
    return number, row["prompt"], [(0, row["winner"]), (0 if tied else 1, row["loser"])]


def hpd_train_row(number: int, row: dict) -> Graded:
    graded = [(-grade(p), path) for p, path in zip(row["human_preference"], row["file_path"], strict=True)]
    return number, row["prompt"], graded


def hpd_test_row(number: int, row: dict) -> Graded:
    graded = [(grade(rank), path) for rank, path in zip(row["rank"], row["image_path"], strict=True)]
    return number, row["prompt"], graded


def imagereward_row(number: int, row: dict) -> Graded:
    """A row a picture."""
    return row["prompt_id"], row["prompt"], [(grade(row["rank"]), row["image_path"])]


@dataclass(frozen=True)
class PreferenceFormat:
    """`grades(number, row)` -> key, prompt, [(grade, path), ...]: the lowest grade is the best, and rows with the same
    key are about one prompt. KeyError, TypeError, ValueError or OverflowError where the row is not as it should be."""

    told_by: tuple[str, ...]                   # columns; of two formats that have theirs the first is it
    columns: tuple[str, ...]                   # that `grades` asks for; a table's others are not read
    grades: Callable[[int, dict], Graded]
    holds_pictures: bool = False               # a table whose paths are columns, with the pictures' bytes in them


PREFERENCE_FORMATS = {
    "Pick-a-Pic": PreferenceFormat(
        ("caption", "jpg_0", "jpg_1", "label_0"), ("caption", "label_0", "has_label"), pickapic_row, True),
    "one's own (prompt, winner, loser)": PreferenceFormat(
        ("winner",), ("prompt", "winner", "loser", "tie"), own_row),
    "HPD-v2 train": PreferenceFormat(("human_preference",), ("prompt", "file_path", "human_preference"), hpd_train_row),
    "ImageRewardDB": PreferenceFormat(("prompt_id",), ("prompt", "prompt_id", "image_path", "rank"), imagereward_row),
    "HPD-v2 test": PreferenceFormat(("rank",), ("prompt", "image_path", "rank"), hpd_test_row)}


def format_of(columns: Iterable[str], where: str, table: bool) -> PreferenceFormat:
    """Of a table, or of a row of text, which holds no pictures."""
    for form in PREFERENCE_FORMATS.values():
        if set(form.told_by) <= set(columns) and (table or not form.holds_pictures):
            return form
    raise unknown(where, columns)


# Lists

def graded_rows(file: Path) -> Iterator[tuple]:
    """Of each prompt: the prompt, its row, its cell, and [(grade, path)] of its pictures."""
    prompts = {}                               # key -> prompt, row, cell, [(grade, path)]
    for number, row, form, cell in table_rows(file) if is_parquet(file) else text_rows(file):
        try:
            key, prompt, graded = form.grades(number, row)
            if not all(isinstance(path, str) for _, path in graded):
                raise TypeError
            prompts.setdefault(key, (cleaned(prompt), number, cell, []))[-1].extend(graded)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise unknown(f"{file}, row {number}", row) from None
    yield from prompts.values()


def best_and_worst(file: Path, prompt: str, number: int, cell, graded: list[tuple[float, str]]) -> Preference | None:
    """The pair of a prompt; None where there is no better and no worse."""
    best, worst = (end(graded, key=lambda one: one[0], default=(0, "")) for end in (min, max))
    return Preference(prompt, file, number, best[1], worst[1], cell) if best[0] < worst[0] else None


def whole_ranking(file: Path, prompt: str, number: int, cell, graded: list[tuple[float, str]]) -> Ranking | None:
    """None where there are not two pictures to compare."""
    graded = sorted(graded, key=lambda one: one[0])
    pictures = tuple(Preference(prompt, file, number, path, cell=cell) for _, path in graded)
    return Ranking(tuple(float(grade) for grade, _ in graded), pictures) if len(graded) > 1 else None


def text_rows(file: Path) -> Iterator[tuple[int, dict, PreferenceFormat, None]]:
    """The numbered rows of a JSON list, of JSON lines, or of CSV, each with its format."""
    text = read_text(file)
    start = text.lstrip()[:1]
    if start == "[":
        try:
            rows = enumerate(json.loads(text), 1)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: not JSON ({error}); download it or make it again") from None
    elif start == "{":
        lines = enumerate(text.split("\n"), 1)
        rows = ((number, parse_object(line, f"{file}, row {number}", {})) for number, line in lines if line.strip())
    else:
        table = csv.DictReader(io.StringIO(text, newline=""))
        rows = ((table.line_num, row) for row in table)
    try:
        for number, row in rows:
            if not isinstance(row, dict):
                raise UserError(f"{file}, row {number}: not an object in braces")
            yield number, row, format_of(row, f"{file}, row {number}", table=False), None
    except csv.Error as error:
        raise UserError(f"{file}, row {table.line_num}: {error}") from None


def grade(value: object) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError
    return number


def cleaned(prompt: str) -> str:
    """JSON can hold half an emoji, which no tokenizer and no file takes."""
    return (prompt + "").strip().encode(errors="replace").decode()


def unknown(where: str, names: Iterable[str]) -> UserError:
    found = " ".join(", ".join(map(str, names)).split())
    return UserError(
        f"{where}: found {found:.200}; expected what {', '.join(PREFERENCE_FORMATS)} has, with values of their kinds")


# Parquet

def load_pyarrow(file: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{file}: parquet needs pyarrow: pip install "hg-dpo[data]"') from None
    return pyarrow


@contextlib.contextmanager
def damage_named(file: Path) -> Iterator:
    """Yields pyarrow; UserError on what it cannot read."""
    pyarrow = load_pyarrow(file)
    try:
        yield pyarrow
    # The last three: a text that is not UTF-8, a date or duration that Python has not, a column that is there twice.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: damaged parquet ({reason:.200}); download it again") from None


@contextlib.contextmanager
def parquet(file: Path) -> Iterator:
    with damage_named(file) as pyarrow, pyarrow.parquet.ParquetFile(file) as table:
        yield table


def is_parquet(file: Path) -> bool:
    with open(file, "rb") as start:
        return start.read(4) == b"PAR1"


def holds_pictures(file: Path) -> bool:
    if not is_parquet(file):
        return False
    with parquet(file) as table:
        names = table.schema_arrow.names
    return any(form.holds_pictures and set(form.told_by) <= set(names) for form in PREFERENCE_FORMATS.values())


def table_rows(file: Path) -> Iterator[tuple[int, dict, PreferenceFormat, tuple[int, int] | None]]:
    """The numbered rows, each with its format, and with its cell where pictures are in the table. This reads none."""
    with parquet(file) as table:
        names = table.schema_arrow.names
        form, number = format_of(names, str(file), table=True), 0
        if table.metadata.num_rows > (size := file.stat().st_size):              # the same ones, packed a millionfold
            raise UserError(f"{file}: {table.metadata.num_rows:,} rows in {size:,} bytes; no list of preferences")
        columns = [name for name in names if name in form.columns]
        for group in range(table.num_row_groups):
            for i, row in enumerate(table.read_row_group(group, columns).to_pylist()):
                number += 1
                yield number, row, form, (group, i) if form.holds_pictures else None


@lru_cache(maxsize=1)
def picture_columns(file: Path, group: int, *columns: str):
    """The pictures of one row group. Rows are loaded in order, so that each group is read once, and one is held."""
    with parquet(file) as table:
        return table.read_row_group(group, list(columns))


def export_pickapic(dataset: Path, file: Path) -> None:
    """Writes a finished dataset as Pick-a-Pic's parquet, which diffusers' and Salesforce's Diffusion-DPO scripts read.

    In the first row and every second after it the winner is jpg_0 and label_0 is 1; in the others it is jpg_1, and
    label_0 is 0. So who overlooks the labels learns nothing, and notices.
    """
    pyarrow = load_pyarrow(file)
    lines = [line for name in read_manifest(dataset)["shards"] for line in read_shard_lines(dataset, name)]

    def row(i: int) -> dict:
        files = [picture_path(dataset, lines[i]["id"], side) for side in "wl"]
        for one in files:
            if not one.is_file():
                raise UserError(f"{one}: not there; the export needs both pictures of every pair")
        jpg_0, jpg_1 = (one.read_bytes() for one in (files if i % 2 == 0 else files[::-1]))
        label_0 = 1.0 if i % 2 == 0 else 0.0
        return {
            "caption": lines[i]["prompt"], "jpg_0": jpg_0, "jpg_1": jpg_1, "label_0": label_0, "label_1": 1 - label_0,
            "has_label": True, "are_different": True}

    schema = pyarrow.schema({
        "caption": pyarrow.string(), "jpg_0": pyarrow.binary(), "jpg_1": pyarrow.binary(),
        "label_0": pyarrow.float64(), "label_1": pyarrow.float64(),
        "has_label": pyarrow.bool_(), "are_different": pyarrow.bool_()})
    with (atomic_write(file) as part,
          pyarrow.parquet.ParquetWriter(part, schema, compression="none", use_dictionary=False) as writer):
        for start in range(0, len(lines), EXPORT_ROWS):
            rows = [row(i) for i in range(start, min(start + EXPORT_ROWS, len(lines)))]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    print(f"{file}: {len(lines)} pairs in Pick-a-Pic's columns")
