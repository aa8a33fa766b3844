"""Lists of other people's pairs and pictures: each layout from files made here, what may be wrong in them, and the way
into a dataset and out again. A picture's colour says which one it is."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import build_dataset
from dataset import preferences
from dataset.images import fit
from dataset.preferences import (
    ABOUT_PEOPLE,
    PREFERENCE_FORMATS,
    PreferenceFormat,
    export_pickapic,
    read_images,
    read_pairs,
    read_rankings,
)
from model.checkpoint import load_pipeline
from model.errors import UserError

COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "white": (255, 255, 255), "black": (0, 0, 0)}


def encoded(colour, form="PNG", size=(12, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form, **({"lossless": True} if form == "WEBP" else {"quality": 100}))
    return file.getvalue()


def put(folder, *names):
    """Picture files: red.png is red, a/blue.webp is blue."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(path.stem, path.suffix[1:].upper()))


def colour(image):
    pixel = image.convert("RGB").getpixel((0, 0))
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], pixel)))


def loaded(pairs):
    """[(prompt, the winner's colour, the loser's)]"""
    rows = [pair.load() for pair in pairs]
    return [(prompt, *(colour(images[side]) for side in images)) for prompt, images in rows]


def write_rows(file, rows, form):
    if form == "json":
        file.write_text(json.dumps(rows, indent=1))
    elif form == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif form == "csv":
        with open(file, "w", newline="", encoding="utf-8-sig") as out:
            table = csv.DictWriter(out, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def write_pickapic(file, rows, row_group_size=2):
    names = ("caption", "jpg_0", "jpg_1", "label_0", "has_label")
    rows = [dict(zip(names, row)) for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=row_group_size)


# Layouts

def test_pickapic_winner_first_and_ties_out(tmp_path, capsys):
    write_pickapic(tmp_path / "a-00000.parquet", [
        ("first", encoded("red", "WEBP", (30, 20)), encoded("blue", "PNG"), 1.0, True),
        ("tie", encoded("red"), encoded("blue"), 0.5, True),
        ("second", encoded("red", "JPEG"), encoded("green", "JPEG", (7, 40)), 0.0, True),
        ("nobody chose", encoded("red"), encoded("blue"), 0.0, False),
        ("label missing", encoded("red"), encoded("blue"), None, True)])
    write_pickapic(tmp_path / "a-00001.parquet", [("v1", encoded("white"), encoded("black"), 0)])    # without has_label
    pairs = read_pairs(tmp_path)
    assert loaded(pairs) == [("first", "red", "blue"), ("second", "green", "red"), ("v1", "black", "white")]
    assert "3 pairs; left out: 3 without a preference" in capsys.readouterr().out
    assert pairs[0].load()[1]["w"].size == (30, 20)
    assert [pair.row for pair in pairs] == [1, 3, 1]
    assert loaded(read_pairs(tmp_path / "a-00001.parquet")) == [("v1", "black", "white")]


def test_pickapic_holds_one_row_group(tmp_path, monkeypatch):
    file, asked = tmp_path / "pairs", []                             # the name says nothing, and need not
    write_pickapic(file, [(f"{i}", encoded("red"), encoded("blue"), 1.0, True) for i in range(7)])
    original = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "read_row_group",
        lambda self, group, columns: asked.append((group, columns)) or original(self, group, columns))
    pairs = read_pairs(file)
    assert len(asked) == 4 and not any("jpg" in column for _, columns in asked for column in columns)
    asked.clear()
    assert [prompt for prompt, *_ in loaded(pairs)] == [str(i) for i in range(7)]
    assert [group for group, _ in asked] == [0, 1, 2, 3]
    assert preferences.picture_columns.cache_info().currsize == 1


def test_hpd_train(tmp_path, capsys):
    put(tmp_path / "train", "red.png", "blue.webp")
    put(tmp_path, "green.jpeg")
    write_rows(tmp_path / "x.csv", [                                 # JSON by its content
        {"prompt": "a", "file_path": ["red.png", "blue.webp"], "human_preference": [0, 1]},
        {"prompt": "b", "file_path": ["train/red.png", "green.jpeg"], "human_preference": [1, 0]},
        {"prompt": "tie", "file_path": ["red.png", "green.jpeg"], "human_preference": [0.5, 0.5]}], "json")
    assert loaded(read_pairs(tmp_path / "x.csv")) == [("a", "blue", "red"), ("b", "red", "green")]
    assert "2 pairs; left out: 1 without" in capsys.readouterr().out


def test_hpd_test_lower_rank_is_better(tmp_path):
    put(tmp_path / "test", "red.png", "green.png", "blue.png", "white.png")
    names = ["red.png", "green.png", "blue.png", "white.png"]
    write_rows(tmp_path / "test.json", [
        {"prompt": "a", "image_path": names, "rank": [3, 1, 4, 2], "raw_annotations": [{"user_hash": "u"}]},
        {"prompt": "ends shared", "image_path": names, "rank": [2, 1, 2, 1], "raw_annotations": []},
        {"prompt": "all tied", "image_path": names, "rank": [1, 1, 1, 1], "raw_annotations": []}], "json")
    assert loaded(read_pairs(tmp_path / "test.json")) == [("a", "green", "blue"), ("ends shared", "green", "red")]


@pytest.mark.parametrize("form", ("json", "jsonl", "csv", "parquet"))
def test_imagereward_groups_by_prompt_id(tmp_path, form):
    put(tmp_path / "images/train", "red.webp", "green.webp", "blue.webp")
    put(tmp_path, "white.webp", "black.webp")                        # beside the list, whatever it says

    def row(key, name, rank):
        return {"image_path": f"images/train/{name}.webp", "prompt_id": key, "prompt": f"p{key}", "rank": rank,
                "classification": "People", "overall_rating": 5}

    write_rows(tmp_path / "list", [
        row("1", "red", 2), row("2", "white", 2), row("1", "green", 3), row("3", "red", 1), row("1", "blue", 1),
        row("2", "black", 1), row("3", "blue", 1), row("4", "red", 1)], form)        # 3 is a tie, 4 has one picture
    assert loaded(read_pairs(tmp_path / "list")) == [("p1", "blue", "green"), ("p2", "black", "white")]


@pytest.mark.parametrize("form", ("jsonl", "csv"))
def test_own_pairs(tmp_path, form):
    put(tmp_path, "a/red.png", "blue.jpeg")
    write_rows(tmp_path / "own.txt", [
        {"prompt": 'a man, "tall"\nin a hat ', "winner": "a/red.png", "loser": "blue.jpeg", "prompt_id": "same",
         "tie": False},
        {"prompt": "half \udc00 gone" if form == "jsonl" else "half ? gone",
         "winner": "blue.jpeg", "loser": "./a/red.png", "prompt_id": "same"},
        {"prompt": "none is better", "winner": "blue.jpeg", "loser": "a/red.png", "prompt_id": "", "tie": True}], form)
    pairs = read_pairs(tmp_path / "own.txt")
    assert loaded(pairs) == [('a man, "tall"\nin a hat', "red", "blue"), ("half ? gone", "blue", "red")]
    assert [pair.row for pair in pairs] == ([1, 2] if form == "jsonl" else [3, 4])        # lines of the file
    assert [len(set(ranking.grades)) for ranking in read_rankings(tmp_path / "own.txt")] == [2, 2, 1]


@pytest.mark.parametrize("form", ("json", "jsonl", "csv", "parquet"))
def test_a_new_format_is_a_function_and_a_line(tmp_path, monkeypatch, form):
    """Stars, a row a picture; of a table only the columns that the line names are read."""
    put(tmp_path, "red.png", "green.png", "blue.png")
    rows = [{"scene": scene, "text": f"scene {scene}", "picture": f"{name}.png", "stars": stars, "by": "me"}
            for scene, name, stars in (
                ("a", "red", 3), ("b", "red", 1), ("a", "blue", 5), ("c", "red", 2), ("b", "green", 4),
                ("a", "green", 1), ("c", "blue", 2))]                # c is a tie
    write_rows(tmp_path / "list", rows, form)
    with pytest.raises(UserError, match="found scene, text, picture, stars, by; expected what Pick-a-Pic, .*HPD-v2 te"):
        read_pairs(tmp_path / "list")

    def stars_row(number, row):
        assert form != "parquet" or "by" not in row
        return row["scene"], row["text"], [(-float(row["stars"]), row["picture"])]

    line = PreferenceFormat(("stars",), ("scene", "text", "picture", "stars"), stars_row)
    monkeypatch.setitem(PREFERENCE_FORMATS, "Stars", line)
    pairs = read_pairs(tmp_path / "list")
    assert loaded(pairs) == [("scene a", "blue", "green"), ("scene b", "green", "red")]
    write_rows(tmp_path / "list", [rows[0] | {"stars": "many"}], form)
    with pytest.raises(UserError, match="row [12]: found scene, text, picture, stars.*, HPD-v2 test, Stars has"):
        read_pairs(tmp_path / "list")
    write_rows(tmp_path / "list", [{"prompt": "a", "winner": "red.png", "loser": "blue.png", "stars": 1}], form)
    assert loaded(read_pairs(tmp_path / "list")) == [("a", "red", "blue")]       # told before it


def test_a_new_table_that_holds_its_pictures_is_a_line_too(tmp_path, monkeypatch):
    def better_row(number, row):
        return number, row["question"], [(side != row["better"], side) for side in ("right", "left")]

    def row(question, better):
        return {"question": question, "right": encoded("red"), "left": encoded("blue"), "better": better}

    write_rows(tmp_path / "0.parquet", [row("a", "left"), row("neither", "")], "parquet")
    write_rows(tmp_path / "1.parquet", [row("b", "right")], "parquet")
    with pytest.raises(UserError, match="0.parquet: not Pick-a-Pic's columns"):
        read_pairs(tmp_path)
    line = PreferenceFormat(("left", "right", "better"), ("question", "better"), better_row, holds_pictures=True)
    monkeypatch.setitem(PREFERENCE_FORMATS, "Left or right", line)
    pairs = read_pairs(tmp_path)
    assert loaded(pairs) == [("a", "blue", "red"), ("b", "red", "blue")]
    assert [pair.files() for pair in pairs] == [[tmp_path / "0.parquet"], [tmp_path / "1.parquet"]]


def test_images_with_texts(tmp_path):
    put(tmp_path, "red.png", "sub/blue.webp")
    rows = [{"file_name": "red.png", "text": "red one"}, {"file_name": "sub/blue.webp", "text": ""}]
    write_rows(tmp_path / "metadata.jsonl", rows, "jsonl")
    assert loaded(read_images(tmp_path)) == [("red one", "red"), ("", "blue")]


@pytest.mark.parametrize("prompt, kept", [
    ("a woman in a red dress", True), ("Two MEN talking", True), ("portrait of an old man's hands", True),
    ("1girl, solo", True), ("babies", True), ("a ballet dancer, award-winning", True), ("old_lady", True),
    ("a mandarin orange", False), ("a snowman in Manhattan", False), ("the humane society", False),
    ("a 3d model of a face", False), ("a castle", False), ("", False)])
def test_about_people(prompt, kept):
    assert bool(ABOUT_PEOPLE.search(prompt)) == kept


def test_human_only(tmp_path, capsys):
    put(tmp_path, "red.png", "blue.png")
    rows = [{"prompt": p, "winner": "red.png", "loser": "blue.png"} for p in ("a girl", "a chair", "two boys")]
    rows.append({"prompt": "a chair whose pictures are not there", "winner": "x.png", "loser": "y.png"})
    write_rows(tmp_path / "own.jsonl", rows, "jsonl")
    assert [pair.prompt for pair in read_pairs(tmp_path / "own.jsonl", human_only=True)] == ["a girl", "two boys"]
    assert "2 pairs; left out: 0 without a preference and 2 not about people" in capsys.readouterr().out


# What may be wrong

@pytest.mark.parametrize("text, message", [
    ("", "own.csv: no pair in it"),
    ("prompt,image\na,b\n", "own.csv, row 2: found prompt, image; expected what Pick-a-Pic"),
    ("prompt,winner,loser\na,red.png,red.png\nb,red.png\n", "own.csv, row 3: found"),
    ("prompt,winner,loser\na,red.png,gone.png\n", "own.csv, row 2: 'gone.png' is not in"),
    ("prompt,winner,loser\na,red.png,\n", "own.csv, row 2: '' is not in"),
    ("prompt,winner,loser\na," + "x" * 200_000, "own.csv, row 1: field larger than"),
    ('{"prompt": "a", "winner": "red.png", "loser": "red.png"}\n{"prompt": ', "own.csv, row 2: not JSON"),
    ('{"prompt": "a", "winner": "red.png", "loser": "red.png"}\n[1]', "own.csv, row 2: [1] where an object"),
    ('{"prompt": 7, "winner": "red.png", "loser": "red.png"}', "own.csv, row 1: found"),
    ('{"prompt": "a", "winner": "red.png", "loser": 3}', "own.csv, row 1: found"),
    ('[{"prompt": "a", "file_path": ["red.png"], "human_preference": [1, 0]}]', "own.csv, row 1: found"),
    ('[{"prompt": "a", "image_path": ["red.png"], "rank": ["best"]}]', "own.csv, row 1: found"),
    ('[{"prompt": "a", "winner": "red.png", "loser": "red.png"}, 3]', "own.csv, row 2: not an object"),
    ('{"prompt": "a", "winner": "half \\ud83d", "loser": "red.png"}', "own.csv, row 1: 'half \\ud83d' is not in"),
    ('{"prompt": "a", "winner": "nul\\u0000.png", "loser": "red.png"}', "own.csv, row 1: 'nul\\x00.png' is not in"),
    ('[{"prompt": "a", "image_path": ["red.png", "b"], "rank": [NaN, 1]}]', "own.csv, row 1: found prompt"),
    ('[{"prompt": "a", "image_path": ["red.png", "b"], "rank": [1%s, 1]}]' % ("0" * 400), "own.csv, row 1: found"),
    ('{"prompt": "a", "prompt_id": [], "image_path": "red.png", "rank": 1}', "own.csv, row 1: found"),
    ('{"prompt": null, "prompt_id": 1, "image_path": "red.png", "rank": 1}', "own.csv, row 1: found"),
    ("[" * 100_000, "own.csv: not JSON"),
    ('{"a": ' + "[" * 100_000, "own.csv, row 1: not JSON"),
    ('"a\nb",winner\nx,y\n', "own.csv, row 3: found a b, winner; expected"),
    ("prompt,winner,loser\na,\udce9.png,red.png\n", "own.csv: not JSON or text in UTF-8"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "found version https://git-lfs"),
])
def test_bad_lists(tmp_path, text, message):
    put(tmp_path, "red.png")
    (tmp_path / "own.csv").write_text(text, errors="surrogateescape")            # \udce9 is é in latin-1
    with pytest.raises(UserError) as error:
        read_pairs(tmp_path / "own.csv")
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_bad_files(tmp_path):
    def refused(path, message):
        with pytest.raises(UserError, match=message):
            read_pairs(path)

    refused(tmp_path / "gone.parquet", "no such file")
    refused(tmp_path, "no folder with .parquet files in it")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path / "binary", "binary: not JSON or text in UTF-8")
    write_rows(tmp_path / "a.parquet", [{"caption": "no pictures", "label_0": 1.0}], "parquet")
    refused(tmp_path / "a.parquet", "found caption, label_0; expected what Pick-a-Pic")
    refused(tmp_path, "a.parquet: not Pick-a-Pic's columns")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    refused(tmp_path / "a.parquet", "damaged parquet")
    for text, message in (("", "no picture"), ('{"file_name": "x"}', "line 1: no text in it; str"),
                          ('{"file_name": 3, "text": "t"}', "line 1: file_name is 3; str"), ("3", "line 1: 3 where")):
        (tmp_path / "metadata.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            read_images(tmp_path)
    with pytest.raises(UserError, match="metadata.jsonl: not there"):
        read_images(tmp_path / "nowhere")


@pytest.mark.parametrize("name", (
    "../secret.png", "sub/../../secret.png", "link.png", "link/secret.png", "/"))
def test_no_path_leaves_the_folder(tmp_path, name):
    folder = tmp_path / "data"
    put(tmp_path, "red.png")
    put(folder, "red.png", "sub/red.png")
    (tmp_path / "red.png").rename(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "link").symlink_to(tmp_path)
    name = str(folder / "red.png") if name == "/" else name          # absolute is refused even where it stays inside
    rows = [{"prompt": "fine", "winner": "red.png", "loser": "sub/red.png"}]
    write_rows(folder / "own.jsonl", [*rows, {"prompt": "not", "winner": "red.png", "loser": name}], "jsonl")
    with pytest.raises(UserError, match="own.jsonl, row 2: .* leads out of"):
        read_pairs(folder / "own.jsonl")
    write_rows(folder / "metadata.jsonl", [{"file_name": name, "text": "t"}], "jsonl")
    with pytest.raises(UserError, match="metadata.jsonl, row 1: .* leads out of"):
        read_images(folder)


@pytest.mark.parametrize("form", ("PNG", "JPEG", "WEBP"))
def test_truncated_pictures(tmp_path, form):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(file, form)
    half = file.getvalue()[:len(file.getvalue()) // 2]
    write_pickapic(tmp_path / "p.parquet", [("fine", encoded("red"), encoded("blue"), 1.0), ("cut", half, half, 0.0)])
    fine, cut = read_pairs(tmp_path / "p.parquet")
    fine.load()
    with pytest.raises(UserError, match="p.parquet, row 2: jpg_1: not a readable picture"):
        cut.load()


def test_tables_of_other_kinds_of_values(tmp_path):
    """What Python has no value for, a column that is there twice, and a list that is packed a thousandfold."""
    days = pyarrow.array([2**62], pyarrow.duration("s"))
    picture = pyarrow.array([encoded("red")])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, picture.buffers())                      # is not UTF-8
    columns = {"caption": pyarrow.array(["a"]), "jpg_0": picture, "jpg_1": picture, "label_0": pyarrow.array([1.0])}

    def refused(words: str, names: list[str], values: list) -> None:
        preferences.picture_columns.cache_clear()
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(values, names), tmp_path / "p.parquet")
        with pytest.raises(UserError, match=words) as error:
            [pair.load() for pair in read_pairs(tmp_path / "p.parquet")]
        assert "\n" not in str(error.value)

    for name, value in (("caption", days), ("label_0", days), ("jpg_0", days), ("jpg_0", text)):
        refused("p.parquet: damaged parquet", list(columns), [*(columns | {name: value}).values()])
    refused("p.parquet: damaged parquet", [*columns, "jpg_0"], [*columns.values(), text])
    same = [pyarrow.array([name] * 50_000) for name in ("a", "red.png", "red.png")]
    refused("50,000 rows in .* bytes; no list of preferences", ["prompt", "winner", "loser"], same)


def test_other_pictures(tmp_path):
    write_pickapic(tmp_path / "p.parquet", [("a", content, None, 1.0) for content in (b"<html>", b"", None)])
    for pair in read_pairs(tmp_path / "p.parquet"):
        with pytest.raises(UserError, match="jpg_0: not a readable picture"):
            pair.load()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")          # images.py's own is undone here
@pytest.mark.parametrize("size", ((10, 12), (40, 40)))               # Pillow only warns up to twice the limit
def test_huge_pictures(tmp_path, monkeypatch, size):
    assert Image.MAX_IMAGE_PIXELS == 64_000_000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "big.png").write_bytes(encoded("red", size=size))
    write_rows(tmp_path / "metadata.jsonl", [{"file_name": "big.png", "text": "t"}], "jsonl")
    with pytest.raises(UserError, match="row 1: big.png: .* pixels; at most .* 100 in all"):
        read_images(tmp_path)[0].load()


def test_without_pyarrow(tmp_path, monkeypatch):
    put(tmp_path, "red.png")
    write_rows(tmp_path / "own.jsonl", [{"prompt": "a", "winner": "red.png", "loser": "red.png"}], "jsonl")
    write_pickapic(tmp_path / "p.parquet", [("a", encoded("red"), encoded("blue"), 1.0)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert len(read_pairs(tmp_path / "own.jsonl")) == 1
    with pytest.raises(UserError, match=r'pip install "hg-dpo\[data\]"'):
        read_pairs(tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r'pip install "hg-dpo\[data\]"'):         # before anything is drawn
        run(monkeypatch, tmp_path / "out", export_pickapic=tmp_path / "x.parquet")


def test_digest_of_a_source(tmp_path):
    """It tells another order, prompt, winner and size of a picture, wherever the source lies, and opens no picture."""
    def digest(folder, rows):
        write_rows(folder / "own.jsonl", rows, "jsonl")
        return preferences.digest_of_source(read_pairs(folder / "own.jsonl"))

    def row(prompt, winner, loser):
        return {"prompt": prompt, "winner": winner, "loser": loser}

    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        put(folder, "red.png", "blue.png", "white.png")
    rows = [row("a", "red.png", "blue.png"), row("b", "blue.png", "white.png")]
    first = digest(one, rows)
    assert digest(other, rows) == first
    found = {first, digest(one, rows[::-1]), digest(one, rows[:1]), digest(one, [rows[0], *rows]),
             digest(one, [rows[0], row("B", "blue.png", "white.png")]),
             digest(one, [rows[0], row("b", "white.png", "blue.png")])}
    (other / "white.png").write_bytes(b"not opened")
    found.add(digest(other, rows))
    table = tmp_path / "p.parquet"
    for winner in (1.0, 0.0):
        write_pickapic(table, [("a", encoded("red"), encoded("blue"), winner)])
        found.add(preferences.digest_of_source(read_pairs(table)))
    write_pickapic(table, [("a", encoded("red"), encoded("blue", size=(99, 99)), 0.0)])
    found.add(preferences.digest_of_source(read_pairs(table)))
    write_rows(one / "metadata.jsonl", [{"file_name": "red.png", "text": "a"}], "jsonl")
    found.add(preferences.digest_of_source(read_images(one)))
    assert len(found) == 11


# Into a dataset and out again

def run(monkeypatch, out, **options):
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["build_dataset.py", "--out", str(out), "--device", "cpu", *words])
    build_dataset.main()
    return load_file(out / "shard-00000.safetensors") if (out / "shard-00000.safetensors").is_file() else None


def expected_latent(pipeline, image):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 * 2 - 1
    with torch.no_grad():
        return pipeline.vae.to_latent(pipeline.vae.encode(pixels)[0])[0]


@pytest.fixture
def photo(tmp_path):
    """A writer of wide pictures whose middle square is something to see, and the square."""
    def write(name, seed):
        generator = torch.Generator().manual_seed(seed)
        square = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        wide = torch.full((32, 96, 3), 255, dtype=torch.uint8)
        wide[:, 32:64] = square
        Image.fromarray(wide.numpy()).save(tmp_path / name)
        return Image.fromarray(square.numpy())
    return write


def test_pairs_to_dataset_to_pickapic_and_back(tiny, tmp_path, photo, monkeypatch, capsys):
    squares = [(photo(f"w{i}.png", i), photo(f"l{i}.png", 10 + i)) for i in range(3)]
    rows = [{"prompt": f"a man {i}", "winner": f"w{i}.png", "loser": f"l{i}.png"} for i in range(3)]
    write_rows(tmp_path / "own.csv", rows, "csv")
    out, file = tmp_path / "out", tmp_path / "pickapic.parquet"
    shard = run(monkeypatch, out, model=tiny, from_pairs=tmp_path / "own.csv", export_pickapic=file)
    pipeline = load_pipeline(str(tiny), torch.device("cpu"), torch.float32)
    assert {name: tuple(tensor.shape) for name, tensor in shard.items()} == {
        "latents_w": (3, 4, 8, 8), "latents_l": (3, 4, 8, 8), "context": (3, 77, 32)}
    for i, pair in enumerate(squares):
        for side, square in zip("wl", pair):
            assert Image.open(out / "images" / f"{i:06d}_{side}.png").tobytes() == square.tobytes()
            expected = expected_latent(pipeline, square)
            torch.testing.assert_close(shard[f"latents_{side}"][i].float(), expected, rtol=1e-3, atol=1e-4)

    # As diffusers' and Salesforce's scripts read it: the winner is jpg_0 unless label_0 is 0.
    table = pyarrow.parquet.read_table(file).to_pylist()
    assert [(row["caption"], row["label_0"], row["label_1"]) for row in table] == [
        ("a man 0", 1.0, 0.0), ("a man 1", 0.0, 1.0), ("a man 2", 1.0, 0.0)]
    for i, row in enumerate(table):
        first, second = (row["jpg_0"], row["jpg_1"])[::-1 if row["label_0"] == 0 else 1]
        assert first == (out / f"images/{i:06d}_w.png").read_bytes()
        assert second == (out / f"images/{i:06d}_l.png").read_bytes()

    # Alone, on a dataset that is finished; the same bytes.
    run(monkeypatch, out, export_pickapic=tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == file.read_bytes()
    assert "3 pairs in Pick-a-Pic's columns" in capsys.readouterr().out
    again = run(monkeypatch, tmp_path / "back", model=tiny, from_pairs=file)
    assert all(torch.equal(again[name], shard[name]) for name in shard)
    (out / "images/000001_l.png").unlink()
    with pytest.raises(UserError, match="000001_l.png: not there"):
        export_pickapic(out, file)
    assert pyarrow.parquet.read_table(file).num_rows == 3 and not list(Path(tmp_path).glob(".*"))


def test_images_to_dataset(tiny, tmp_path, photo, monkeypatch):
    square = photo("a.png", 0)
    write_rows(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "a man"}], "jsonl")
    shard = run(monkeypatch, tmp_path / "out", model=tiny, from_images=tmp_path)
    assert set(shard) == {"latents_w", "context"}
    pipeline = load_pipeline(str(tiny), torch.device("cpu"), torch.float32)
    torch.testing.assert_close(
        shard["latents_w"][0].float(), expected_latent(pipeline, square), rtol=1e-3, atol=1e-4)
    manifest = json.loads((tmp_path / "out/dataset.json").read_text())
    assert manifest["finished"] and manifest["counts"]["rows"] == 1
    with pytest.raises(UserError, match="the export needs both pictures"):
        export_pickapic(tmp_path / "out", tmp_path / "x.parquet")


@pytest.mark.parametrize("size", ((3000, 1), (1, 3000), (33, 47)))
def test_fit_covers_the_size(size):
    image = fit(Image.new("L", size, 200), 32, 48)
    assert image.size == (32, 48) and image.getcolors() == [(32 * 48, (200, 200, 200))]
