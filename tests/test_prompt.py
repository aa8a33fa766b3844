"""Prompt weights: A1111's grammar, chunks and emphasis, on a fake tokenizer and text encoder."""

import re
import warnings

import pytest
import torch
from torch import nn

from model.errors import UserError
from sampling.prompt import BREAK, emphasise, encode_prompts, parse_weights, split_chunks

BOS, EOS, COMMA = 98, 99, 1


class FakeTokenizer:
    """A word is one token, a comma is token 1; w2, w3, ... are 2, 3, ... so that expected ids can be written down."""

    bos, eos, pad = BOS, EOS, EOS

    def __init__(self, max_length=77):
        self.max_length = max_length

    def token_ids(self, text):
        pieces = re.findall(r"\w+|[^\w\s]", text)
        return [COMMA if p == "," else int(p[1:]) if re.fullmatch(r"w\d+", p) else 60 + len(p) for p in pieces]


class FakeTextEncoder(nn.Module):
    """Features depend on the token, its position and all tokens before it, as CLIP's do, and have a mean of about 1."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(100, 8), nn.Embedding(77, 8)
        self.batches = []

    def forward(self, input_ids, clip_skip=0):
        assert input_ids.dtype == torch.int64
        self.batches.append(input_ids)
        x = self.tokens(input_ids) + self.positions.weight[:input_ids.shape[1]]
        counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return x + x.cumsum(1) / counts + 1 + clip_skip


@pytest.fixture(autouse=True)
def no_unexpected_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def encoder():
    return FakeTextEncoder().requires_grad_(False)


def words(n, start=2):
    return " ".join(f"w{start + i % 50}" for i in range(n))


GRAMMAR = [
    ("", []),
    ("plain, text", [("plain, text", 1)]),
    ("a (b) c", [("a ", 1), ("b", 1.1), (" c", 1)]),
    ("a [b]", [("a ", 1), ("b", 1 / 1.1)]),
    ("(b:1.3)", [("b", 1.3)]),
    ("(b:.5)(c:+2.)(d:-1)(e:0)", [("b", 0.5), ("c", 2), ("d", -1), ("e", 0)]),
    # nesting multiplies
    ("((b))", [("b", 1.21)]),
    ("(a (b:1.5):0.5)", [("a ", 0.5), ("b", 0.75)]),
    ("([b])", [("b", 1)]),
    ("(a [b (c:2)]:3)", [("a ", 3), ("b ", 3 / 1.1), ("c", 6 / 1.1)]),
    # spaces around the number, as people type them
    ("(long wavy hair: 1.2)", [("long wavy hair", 1.2)]),
    ("(hair : 1.2 )", [("hair ", 1.2)]),
    # escapes; a backslash before any other character vanishes
    (r"\(a\) \[b\] \\", [(r"(a) [b] " + "\\", 1)]),
    (r"(a \(b\):1.2)", [("a (b)", 1.2)]),
    (r"(a\)", [("a)", 1.1)]),
    (r"a\b", [("ab", 1)]),
    # unbalanced brackets
    ("a (b", [("a ", 1), ("b", 1.1)]),
    ("((a [b", [("a ", 1.21), ("b", 1.1)]),
    ("a) b] c:1.2)", [("a) b] c:1.2)", 1)]),
    ("(a:1.2))", [("a", 1.2), (")", 1)]),
    # not a number, not at the end of brackets, not a round bracket
    ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
    ("(a:b)", [("a:b", 1.1)]),
    ("(a:1.2 b)", [("a:1.2 b", 1.1)]),
    ("ratio 3:4", [("ratio 3:4", 1)]),
    # neighbours of one weight are one text
    ("(a)(b)", [("ab", 1.1)]),
    ("() a", [(" a", 1)]),
    # BREAK eats the spaces around it, is a word, is case-sensitive, and works inside brackets
    ("a BREAK  b", [("a", 1), BREAK, ("b", 1)]),
    ("BREAK a,BREAK", [BREAK, ("a,", 1), BREAK]),
    ("a BREAK BREAK b", [("a", 1), BREAK, BREAK, ("b", 1)]),
    ("(a BREAK b:1.5) c", [("a", 1.5), BREAK, ("b", 1.5), (" c", 1)]),
    ("(a:0)BREAK(b:0)", [("a", 0), BREAK, ("b", 0)]),
    ("BREAKFAST break a_BREAK", [("BREAKFAST break a_BREAK", 1)]),
]


@pytest.mark.parametrize("prompt, expected", GRAMMAR, ids=[prompt or "empty" for prompt, _ in GRAMMAR])
def test_grammar(prompt, expected):
    segments = parse_weights(prompt)
    assert [text for text, _ in segments] == [text for text, _ in expected]
    assert [weight for _, weight in segments] == pytest.approx([weight for _, weight in expected], rel=1e-12)


def test_a_prompt_that_would_take_minutes_to_read_is_refused():
    with pytest.raises(UserError, match=r"^prompt '\(a\(a.*': 10,002 characters; with weights 10,000 are the most"):
        parse_weights("(a" * 5001)
    assert parse_weights("a " * 5000) == [("a " * 5000, 1.0)]


@pytest.mark.parametrize("prompt", ["a cat AND a dog", "[a:b:0.5]", "[a [b]:3]", "x [a|b]", "<lora:name:0.8> a"])
def test_what_is_not_supported_is_said(prompt):
    with pytest.warns(UserWarning, match="taken literally"):
        segments = parse_weights(prompt)
    assert "".join(text for text, _ in segments) == prompt.replace("[", "").replace("]", "")     # which only weaken


def test_brackets_bars_and_shouting_alone_are_no_reason_to_warn():
    segments = parse_weights(r"[a] | [b], \[a|b\], BAND, a <3 b, (x:1.2)")    # a warning is an error, by the fixture
    assert "".join(text for text, _ in segments) == "a | b, [a|b], BAND, a <3 b, x"


def test_chunk_boundary():
    tok = FakeTokenizer()

    def lengths(prompt):
        return [len(chunk) for chunk in split_chunks(prompt, tok)]

    assert lengths("") == [0]
    assert lengths(words(75)) == [75]
    assert lengths(words(76)) == [75, 1]
    assert lengths(words(200)) == [75, 75, 50]
    # The 56th token is the first from which a comma cuts: 20 tokens are left from it to the end of the chunk.
    assert lengths(words(55) + "," + words(30)) == [56, 30]
    assert lengths(words(54) + "," + words(30)) == [75, 10]
    assert lengths(words(60) + "," + words(3) + "," + words(30)) == [65, 30]  # the last comma counts
    assert lengths(words(55) + "," + words(19)) == [75]  # nothing is moved where all fits
    assert lengths(words(55) + "," + words(19) + "," + words(5)) == [75, 6]  # a phrase that just ends is not moved
    # Several chunks, 2 phrases of 30 in each; weights move with their tokens.
    assert lengths(", ".join([words(30)] * 6)) == [62, 62, 61]
    moved = split_chunks(words(70) + ", (w9 w8 w7 w6 w5:1.5)", tok)
    assert [len(chunk) for chunk in moved] == [71, 5] and moved[1] == [(9, 1.5), (8, 1.5), (7, 1.5), (6, 1.5), (5, 1.5)]
    # BREAK: a chunk each, an empty one between two, none for the one at the end.
    assert lengths("w2 w3 BREAK w4") == [2, 1]
    assert lengths("BREAK w2 BREAK BREAK w4 BREAK") == [0, 1, 0, 1]
    assert lengths("BREAK") == [0]
    assert lengths(words(60) + ", w2 BREAK " + words(76)) == [62, 75, 1]  # the comma is of the chunk before


def test_ids_of_chunks(encoder):
    tok = FakeTokenizer(max_length=8)  # room for 6
    context = encode_prompts(["w2 w3 w4, (w5 w6 w7 w8:1.3)", "w9"], tok, encoder, weights="a1111")
    assert context.shape == (2, 16, 8)
    assert encoder.batches[0].tolist() == [
        [BOS, 2, 3, 4, COMMA, EOS, EOS, EOS],
        [BOS, 5, 6, 7, 8, EOS, EOS, EOS],
        [BOS, 9, EOS, EOS, EOS, EOS, EOS, EOS],
        [BOS, EOS, EOS, EOS, EOS, EOS, EOS, EOS]]  # an empty chunk, so that both prompts have two


def test_emphasis_multiplies_and_restores_the_mean(encoder):
    tok = FakeTokenizer()
    plain, = encode_prompts(["w2 w3 w4"], tok, encoder)
    weighted, = encode_prompts(["w2 (w3:1.5) [w4]"], tok, encoder, weights="a1111")
    factor = torch.ones(77)
    factor[2], factor[3] = 1.5, 1 / 1.1
    expected = plain * factor[:, None]
    expected = expected * plain.mean() / expected.mean()
    torch.testing.assert_close(weighted, expected, rtol=1e-6, atol=1e-6)
    assert weighted.mean().item() == pytest.approx(plain.mean().item(), rel=1e-6)


def test_emphasis_is_per_chunk_and_per_sample(encoder):
    tok = FakeTokenizer()
    long = f"(w2:1.4) {words(74)} w7 [w8]"
    both = encode_prompts(["w5", long], tok, encoder, weights="a1111")
    assert both.shape == (2, 154, 8)
    parts = encode_prompts([f"(w2:1.4) {words(74)}", "w7 [w8]"], tok, encoder, weights="a1111")
    assert torch.equal(both[1], parts.flatten(0, 1))
    assert torch.equal(both[0], encode_prompts(["w5", ""], tok, encoder).flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weight_one_is_bitwise_no_weight(encoder, dtype):
    encoder.to(dtype)
    tok = FakeTokenizer()
    plain = encode_prompts([words(75), "w2 w3", "w4"], tok, encoder)
    weighted = encode_prompts([f"(({words(75)}:0.5):2)", "(w2:1) w3", "(w4:1.2)"], tok, encoder, weights="a1111")
    assert weighted.dtype == plain.dtype == dtype
    assert torch.equal(weighted[:2], plain[:2]) and not torch.equal(weighted[2], plain[2])


def test_emphasis_survives_a_mean_of_zero():
    z = nn.functional.layer_norm(torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(0)), (64,))
    weights = torch.ones(1, 77)
    weights[0, 1:20] = 1.3
    torch.testing.assert_close(emphasise(z, weights), z * weights[..., None])


def test_off_is_plain_text_cut_to_one_chunk(encoder):
    tok = FakeTokenizer()
    text = "(w2:1) [w3|w4] BREAK AND"
    assert encode_prompts(["", text], tok, encoder, clip_skip=1).shape == (2, 77, 8)
    ids = tok.token_ids(text)
    assert encoder.batches[-1].tolist() == [[BOS] + [EOS] * 76, [BOS, *ids] + [EOS] * (76 - len(ids))]

    encode_prompts([words(75)], tok, encoder)  # fits: no warning
    with pytest.warns(UserWarning, match=r"last 5 of 80 tokens .* --prompt-weights a1111"):
        encode_prompts([words(80)], tok, encoder)
    assert encoder.batches[-1].tolist() == [[BOS, *tok.token_ids(words(75)), EOS]]


def test_clip_skip_reaches_the_encoder(encoder):
    tok = FakeTokenizer()
    for mode in ("off", "a1111"):
        skipped = encode_prompts(["w2"], tok, encoder, mode, clip_skip=2)
        torch.testing.assert_close(skipped, encode_prompts(["w2"], tok, encoder, mode) + 2)
