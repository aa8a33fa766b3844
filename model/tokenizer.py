"""CLIP's tokenizer on the `tokenizers` library: ids identical to transformers' `CLIPTokenizer`.

Read from `vocab.json` + `merges.txt` (the official SD1.5 repositories) or from `tokenizer.json` (what transformers 5
saves). `Tokenizer.clip()` needs no file: single-file checkpoints carry no vocabulary, so CLIP's list of merges
(`clip_merges.txt.gz`, from OpenAI's CLIP, MIT licence) is shipped; the vocabulary follows from it.
"""

import gzip
import json
from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers

from .errors import UserError
from .files import is_a, was_read, write_bytes
from .saved_tokenizer import read_saved

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
WITH_SPECIAL = rf"<\|startoftext\|>|<\|endoftext\|>|{WORDS}"                 # as newer files have it


def byte_characters() -> list[str]:
    """The 256 characters that stand for bytes: a printable byte for itself, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's numbering: bytes, bytes that end a word, one entry a merge, the two special tokens."""
    characters = byte_characters()
    entries = characters + [c + "</w>" for c in characters] + [a + b for a, b in merges] + [BOS, EOS]
    return {entry: i for i, entry in enumerate(entries)}


def parse_merges(text: str) -> list[tuple[str, str]]:
    return [tuple(line.split()) for line in text.splitlines() if line and not line.startswith("#version")]


def build(
    vocab: dict[str, int], merges: list[tuple[str, str]], pad: str = EOS, words: str = WITH_SPECIAL,
) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE(
        vocab=vocab, merges=merges, unk_token=EOS, continuing_subword_prefix="", end_of_word_suffix="</w>",
        fuse_unk=False))
    core.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.add_special_tokens([token for token in (BOS, EOS, pad) if token in vocab])      # kept whole in a prompt too
    return core


class Tokenizer:
    """`encode` for the model, `token_ids` for the bare ids of a piece of text.

    `files` are the files it came from (name -> bytes), kept so that a checkpoint is saved with the same ones.
    """

    def __init__(self, core: tokenizers.Tokenizer, files: dict[str, bytes], max_length: int = 77, pad: str = EOS):
        ids = [core.token_to_id(token) for token in (BOS, EOS, pad)]
        if None in ids:
            raise UserError(f"tokenizer: the vocabulary has no {(BOS, EOS, pad)[ids.index(None)]!r}; is it CLIP's?")
        self.core, self.files, self.max_length = core, files, max_length
        self.bos, self.eos, self.pad = ids

    @classmethod
    def clip(cls) -> "Tokenizer":
        """CLIP's own vocabulary of 49,408, as in every SD1.5 and PickScore."""
        merges_txt = gzip.decompress((Path(__file__).parent / "clip_merges.txt.gz").read_bytes())
        return cls.from_merges(parse_merges(merges_txt.decode()))

    @classmethod
    def from_merges(cls, merges: list[tuple[str, str]]) -> "Tokenizer":
        vocab = vocabulary(merges)
        config = {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True,
            "add_prefix_space": False, "errors": "replace",
            "bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
        special = {name: config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        files = {
            "vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
            "merges.txt": "".join(["#version: 0.2\n", *(f"{a} {b}\n" for a, b in merges)]).encode(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode(),
            "special_tokens_map.json": json.dumps(special, indent=2).encode()}
        return cls(build(vocab, merges), files)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Raises UserError where the folder holds neither form, or a damaged one."""
        folder = Path(folder)
        names = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        files = {name: was_read(folder / name).read_bytes() for name in names if (folder / name).is_file()}
        try:
            config = json.loads(files.get("tokenizer_config.json", b"{}"))
            config |= json.loads(files.get("special_tokens_map.json", b"{}"))    # the map wins, as in transformers
            max_length = config.get("model_max_length") or 77        # "no limit" is written as 1e30
            if not is_a(max_length, float) or max_length < 3:
                raise UserError(f"{folder}: model_max_length is {max_length!r:.40}; CLIP has 77")
            max_length = int(min(max_length, 77))
            pad = config.get("pad_token") or EOS
            pad = pad if isinstance(pad, str) else pad["content"]
            if "vocab.json" in files and "merges.txt" in files:
                vocab, merges = json.loads(files["vocab.json"]), parse_merges(files["merges.txt"].decode())
                if len(vocab) == 49408 and len(merges) != 48894:       # it would load, and split words elsewhere
                    raise UserError(f"{folder}: merges.txt has {len(merges)} merges of 48894; download it again")
                core = build(vocab, merges, pad)
            elif "tokenizer.json" in files:
                known = [build({}, [], words=words) for words in (WORDS, WITH_SPECIAL)]
                core = read_saved(files["tokenizer.json"], f"{folder / 'tokenizer.json'}", known)
            else:
                raise UserError(f"{folder}: no tokenizer here; expected vocab.json with merges.txt, or tokenizer.json")
            return cls(core, files, max_length, pad)
        except UserError:
            raise
        except Exception as error:         # the library raises bare Exception on bad content
            reason = str(error).partition("\n")[0]
            raise UserError(f"{folder}: the tokenizer files cannot be read ({reason}); download them again") from None

    def save(self, folder: Path) -> None:
        for name, content in self.files.items():
            write_bytes(Path(folder) / name, content)

    def token_ids(self, text: str) -> list[int]:
        """The ids of the text alone: no start, end, padding or truncation."""
        return self.core.encode(text, add_special_tokens=False).ids

    def find(self, words: str, text: str) -> list[int]:
        """Where a word, or several, stand among the tokens that `encode` keeps of a text."""
        ids, wanted = self.token_ids(text)[:self.max_length - 2], self.token_ids(words)
        return [i + j for i in range(len(ids)) if ids[i:i + len(wanted)] == wanted for j in range(len(wanted))]

    def encode(self, texts: list[str]) -> torch.Tensor:
        """texts -> ids (B, 77): start, at most 75 tokens, end, padding."""
        rows = []
        for text in texts:
            ids = [self.bos, *self.token_ids(text)[:self.max_length - 2], self.eos]
            rows.append(ids + [self.pad] * (self.max_length - len(ids)))
        return torch.tensor(rows)
