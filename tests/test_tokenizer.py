"""Token ids against transformers' CLIPTokenizer, and the folders a tokenizer is read from."""

import hashlib
import json
import random
import shutil
import sys
import unicodedata

import pytest
import tokenizers
import torch
from transformers import CLIPTokenizerFast

from model.checkpoint import check_tokenizer
from model.errors import UserError
from model.tokenizer import WORDS, Tokenizer

# What trips tokenizers: contractions, digits, accents composed and not, letters that grow or shrink in lower case,
# joined emoji, scripts without spaces, the special tokens as a person may type them (in capitals they are not special).
PIECES = """
    I'm you're don't she'll he'd we've it's 'S 'T O'Neil's 's's rock'n'roll 'twas y'all'd've ’s ‘quoted’ “curly”
    8k 4K 1024x768 3.14 2,000 １２３ ½ Ⅷ ² ٣ (bust (bust:1.2) [tag] ((a)) <lora:x:1> {a|b} BREAK _ __ - -- ... … !?
    @ # $ % * ~ ^ = + ; "
    résumé re\u0301sume\u0301 CAFÉ naïve Ångström İstanbul ß ẞ ŒUVRE ΣΊΣΥΦΟΣ ﬁ ǅ ﬃ ｆｕｌｌ Ａ ª º
    😀 👩‍🔬 ❤️ 🏳️‍🌈 🇰🇷 👍🏽 ☃ ♥︎ 1️⃣ 日本語 한국어 \u1112\u1161\u11ab
    中文,混合 русский العربية हिन्दी ไทย עברית 𝔉𝔯𝔞𝔨 𐍈 \u200f \u200b \ufeff \u00ad \ufffd
    <|endoftext|> <|startoftext|> <|ENDOFTEXT|> <|endoftext|><|endoftext|> a<|startoftext|>b <|endoftext <|endoftext|>'s
    </w> a</w> Ġword Ċ ![]() \\(escaped\\) C:\\path https://a.b/c?d=e&f=%20 &amp; <b>bold</b> \x00 \x07 \x1b[0m \x7f
    a photo of cat, young asian man (masterpiece) Pneumonoultramicroscopicsilicovolcanoconiosis aaaaaaaaaaaaaaaaaaaa
""".split()
SPACES = [" ", " ", " ", "", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2003", "\u2028", "\x0b", "\x85", ", "]
GOLDENS = {
    "a photo of a cat": "320 1125 539 320 2368",
    "(bust shot:1.2), young asian man": "263 9959 2000 281 272 269 273 2361 1888 7128 786",
    "": "",
    "I'm you're don't she'll he'd we've it's": "328 880 592 982 847 713 1043 1342 797 1896 649 1200 585 568",
    "8k 4K 1024x768 3.14 2,000":
        "279 330 275 330 272 271 273 275 343 278 277 279 274 269 272 275 273 267 271 271 271",
    "résumé café naïve": "29106 7054 4166 15304 1097 35689 563",
    "😀 emoji 👩‍🔬 ❤️": "7334 16327 26304 44227 1752",
    "should've 'twas rock'n'roll": "1535 1200 713 739 2172 262 333 262 3341",
}


def odd_strings() -> list[str]:
    """4,000 strings, the same every time: the pieces above, alone and in a row, bits of words that the vocabulary
    knows, and characters of every Unicode category."""
    rng = random.Random(0)
    words = [entry.removesuffix("</w>") for entry in Tokenizer.clip().core.get_vocab() if entry.isascii()]
    words = sorted(word for word in words if word.isalpha())
    categories: dict[str, list[str]] = {}
    for code in range(0, sys.maxunicode, 7):
        categories.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    del categories["Cs"]                                                         # surrogates are not text
    strings = PIECES + [piece.upper() for piece in PIECES] + [a + b for a in PIECES[::5] for b in PIECES[::7]] + SPACES
    while len(strings) < 2000:
        strings.append("".join(rng.choice(PIECES) + rng.choice(SPACES) for _ in range(rng.choice((2, 3, 8, 40)))))
    while len(strings) < 3000:
        strings.append("".join(rng.choice(words) + rng.choice(("", " ", "-")) for _ in range(rng.choice((1, 3, 9)))))
    while len(strings) < 4000:
        kinds = rng.sample(sorted(categories), rng.choice((1, 2, 5)))
        strings.append("".join(
            rng.choice(categories[rng.choice(kinds)]) + rng.choice(("", "", "a", " ", "'s"))
            for _ in range(rng.choice((1, 4, 30)))))
    return strings


@pytest.fixture(scope="module")
def clip():
    return Tokenizer.clip()


@pytest.fixture(scope="module")
def oracle(tokenizer_folder):
    return CLIPTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture
def folder(tokenizer_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")


# Ids

def test_ids_are_those_of_transformers(clip, oracle):
    """Bare, and as the model takes them: start, end, cut at 77, padded."""
    strings = odd_strings()
    wanted = oracle(strings, add_special_tokens=False, truncation=False).input_ids
    wrong = [text for text, ids in zip(strings, wanted) if clip.token_ids(text) != ids]
    assert wrong == []
    padded = oracle(strings, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(clip.encode(strings), padded)
    lengths = [len(ids) for ids in wanted]                   # that the strings are what they are meant to be
    assert len(set(strings)) > 3500 and sum(n > 75 for n in lengths) > 200 and sum(n < 75 for n in lengths) > 2000
    assert sum(49407 in ids for ids in wanted) > 100 and len(set().union(*wanted)) > 3000


@pytest.mark.parametrize("text", GOLDENS)
def test_known_ids(clip, text):
    """Fixed numbers, so that a change in transformers does not carry us along."""
    ids = [int(i) for i in GOLDENS[text].split()]
    assert clip.token_ids(text) == ids
    assert clip.encode([text])[0].tolist() == [49406, *ids] + [49407] * (76 - len(ids))


def test_a_long_text_is_cut_before_the_end_token(clip):
    """75 tokens are kept and the last of 77 is always the end; 75 fit exactly."""
    rows = clip.encode(["cat " * 74, "cat " * 75, "cat " * 76, "cat " * 500])
    assert rows.shape == (4, 77) and rows.dtype == torch.long
    assert (rows == 2368).sum(dim=1).tolist() == [74, 75, 75, 75]
    assert rows[:, 0].tolist() == [49406] * 4 and rows[:, 76].tolist() == [49407] * 4


# Vocabulary and files

def test_the_shipped_vocabulary_is_clips(clip):
    """49,408 entries, and the Hub's own files to the byte: these are git's hashes of merges.txt and vocab.json as they
    stand in the SD1.5 repository."""
    def git_hash(content: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    vocab = json.loads(clip.files["vocab.json"])
    assert sorted(vocab.values()) == list(range(49408)) and clip.core.get_vocab() == vocab
    assert (clip.bos, clip.eos, clip.pad) == (49406, 49407, 49407)
    assert (vocab["!"], vocab["!</w>"], vocab["cat</w>"]) == (0, 256, 2368)
    assert git_hash(clip.files["merges.txt"]) == "76e821f1b6f0a9709293c3b6b51ed90980b3166b"
    as_on_the_hub = json.dumps(vocab, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert git_hash(as_on_the_hub.encode()) == "469be27c5c010538f845f518c4f5e8574c78f7c8"


def test_files_are_saved_as_they_were_read(clip, folder, tmp_path):
    """Both forms come back byte for byte, formatting included."""
    vocab = json.loads((folder / "vocab.json").read_bytes())
    (folder / "vocab.json").write_text(json.dumps(vocab, indent=2, sort_keys=True), encoding="utf-8")
    CLIPTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "new form")
    for source in (folder, tmp_path / "new form"):
        tokenizer = Tokenizer.from_folder(source)
        tokenizer.save(tmp_path / "copy" / source.name)
        copy = {path.name: path.read_bytes() for path in (tmp_path / "copy" / source.name).iterdir()}
        assert copy == {path.name: path.read_bytes() for path in source.iterdir()}
        again = Tokenizer.from_folder(tmp_path / "copy" / source.name)
        assert torch.equal(again.encode(PIECES), clip.encode(PIECES))


def test_a_folder_with_tokenizer_json_only(clip, oracle, tmp_path):
    """What transformers 5 saves; the truncation and the padding that such a file can carry do not reach the ids."""
    oracle(["use leaves traces"], padding="max_length", max_length=9, truncation=True)
    oracle.save_pretrained(tmp_path / "new")
    core = tokenizers.Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json"))
    core.enable_truncation(5)
    core.enable_padding(length=20, pad_id=0, pad_token="!")
    core.save(str(tmp_path / "new" / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "new" / name).unlink(missing_ok=True)
    strings = odd_strings()[::10]
    tokenizer = Tokenizer.from_folder(tmp_path / "new")
    assert torch.equal(tokenizer.encode(strings), clip.encode(strings))
    assert [tokenizer.token_ids(text) for text in strings] == [clip.token_ids(text) for text in strings]


@pytest.mark.parametrize("change, taken", [
    # As older files have it: the special tokens not in the pattern, and no word of `use_regex`.
    (lambda steps: steps[3].update(pattern={"Regex": WORDS}), True), (lambda steps: steps[4].pop("use_regex"), True),
    (lambda steps: steps[3].update(pattern={"Regex": "(a+)+b"}), False),
    (lambda steps: steps[1].update(pattern={"String": "a"}, content="a" * 10**6), False),
    (lambda steps: steps[2].update(type="NFKC"), False)], ids=("words", "no use_regex", "slow", "long", "other"))
def test_a_tokenizer_json_cuts_texts_as_clip_or_is_refused(clip, tmp_path, change, taken):
    """A stranger's regular expression may never end, and replacements may make a gigabyte of a word."""
    told = json.loads(clip.core.to_str())
    change([*told["normalizer"]["normalizers"], *told["pre_tokenizer"]["pretokenizers"]])
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    if taken:
        assert torch.equal(Tokenizer.from_folder(tmp_path).encode(PIECES), clip.encode(PIECES))
    else:
        with pytest.raises(UserError, match="cannot be read .it cuts texts up in another way"):
            Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("where", ["both", "special_tokens_map.json", "tokenizer_config.json", "neither"])
@pytest.mark.parametrize("form", [str, dict])
def test_another_padding_token_is_honoured(folder, where, form):
    """SD2's tokenizers pad with `!`, which then is a special token in a prompt too; where the two files disagree, the
    one that transformers believes is right."""
    added = {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    if form is dict:
        added["__type"] = "AddedToken"
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_bytes())
        if where in ("both", name):
            config["pad_token"] = "!" if form is str else added
        (folder / name).write_text(json.dumps(config))
    texts = ["hello! !! a!b<|endoftext|>c", "", "cat " * 90]
    wanted = CLIPTokenizerFast.from_pretrained(folder)(
        texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(Tokenizer.from_folder(folder).encode(texts), wanted)
    assert wanted[1, -1] == (0 if where in ("both", "special_tokens_map.json") else 49407)


def without(content: bytes, *entries: str) -> bytes:
    return json.dumps({k: v for k, v in json.loads(content).items() if k not in entries}).encode()


@pytest.mark.parametrize("name, damage, says", [
    ("vocab.json", None, "no tokenizer here"),
    ("merges.txt", None, "no tokenizer here"),
    ("vocab.json", lambda content: content[:5000], "cannot be read"),
    ("vocab.json", lambda content: b"<html>404</html>", "cannot be read"),
    ("vocab.json", lambda content: b"[1, 2]", "cannot be read"),
    ("vocab.json", lambda content: b"{}", "cannot be read"),
    ("vocab.json", lambda content: without(content, "cat</w>"), "cat</w>"),
    ("vocab.json", lambda content: without(content, "<|startoftext|>"), "no '<|startoftext|>'"),
    ("vocab.json", lambda content: without(content, "<|endoftext|>"), "no '<|endoftext|>'"),
    ("merges.txt", lambda content: b"\xff\xfe\x00", "cannot be read"),
    ("merges.txt", lambda content: content.replace(b"\ni n\n", b"\nthree in one\n"), "cannot be read"),
    ("merges.txt", lambda content: content.replace(b"\ni n\n", b"\nnone such\n"), "`such`"),
    ("merges.txt", lambda content: b"\n".join(content.split(b"\n")[:20000]), "19999 merges of 48894"),
    ("merges.txt", lambda content: b"", "0 merges of 48894"),
    ("tokenizer_config.json", lambda content: b"", "cannot be read"),
    ("tokenizer_config.json", lambda content: b"[]", "cannot be read"),
    ("tokenizer_config.json", lambda content: b'{"model_max_length": "many"}', "model_max_length is 'many'"),
    ("tokenizer_config.json", lambda content: b'{"model_max_length": -1}', "model_max_length is -1"),
    ("special_tokens_map.json", lambda content: b'{"pad_token": 7}', "cannot be read"),
    ("special_tokens_map.json", lambda content: b'{"pad_token": "nope"}', "no 'nope'"),
    ("special_tokens_map.json", lambda content: b'{"pad_token": {"content": 7}}', "cannot be read"),
    ("special_tokens_map.json", lambda content: b'{"pad_token": "\\ud83d"}', "cannot be read"),
])
def test_damaged_files_are_refused_in_one_line(folder, name, damage, says):
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(UserError) as error:
        Tokenizer.from_folder(folder)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_id_for_which_there_is_no_embedding_is_refused(folder, clip):
    """Ids may leave gaps, so that their number does not tell."""
    sizes = {"vocab_size": 49408, "max_position_embeddings": 77}
    check_tokenizer(clip, sizes, "here")
    vocab = json.loads((folder / "vocab.json").read_bytes())
    (folder / "vocab.json").write_text(json.dumps(vocab | {"!": 60_000}))
    with pytest.raises(UserError, match="^here: the tokenizer makes up to 77 of 60001 tokens"):
        check_tokenizer(Tokenizer.from_folder(folder), sizes, "here")


@pytest.mark.parametrize("content", [b"{", b"{}", b"<html>", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_json_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
