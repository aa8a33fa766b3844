"""Prompts to text features: stock truncation, or the weights and long prompts of the A1111 web UI.

    "off"    the prompt is plain text, cut to the 75 tokens that one pass of CLIP has room for (as diffusers does)
    "a1111"  (x) [x] (x:1.2) weigh words, BREAK starts a new chunk, long prompts fill as many chunks as they need

A chunk is one pass of the text encoder: BOS, up to 75 tokens, EOS, padding to 77. Chunks are encoded apart (positions
restart) and joined along the tokens, so the U-Net attends to 77 * chunks of them. Left out: AND, [a:b:0.5], [a|b] and
<lora:...>, which act on the sampler or the weights; they are read as text, with a warning.

B prompts, K chunks, N tokens of a chunk (77), D features.
"""

import re
import warnings

import torch

from model.errors import UserError

LONGEST = 10_000  # characters of a prompt with weights, some 2,000 words: its brackets take time by their square
BREAK = ("", 0.0)  # the segment that ends a chunk; never a text, for no text is empty
COMMA_BACKTRACK = 20  # a full chunk is cut after a comma that is this near to its end (A1111's default)

TOKEN = re.compile(r"""
    \\ (?P<escaped> [()\[\]\\])  # any other backslash matches nothing here and so vanishes
  | (?P<open> [(\[])
  | : \s* (?P<number> [+-]? (?: \d+ \.? \d* | \. \d+)) \s* \)  # also "(hair: 1.2 )"; but "(a:1.2.3)" is text
  | (?P<close> [)\]])
  | \s* \b (?P<BREAK> BREAK) \b \s*
  | (?P<text> : | [^\\()\[\]:]+? (?= \s* \b BREAK \b | [\\()\[\]:] | \Z))
    """, re.VERBOSE)

UNSUPPORTED = re.compile(r"\bAND\b | (?<!\\)\[[^\]]*\| | :\s*[\d.]+\s*\] | <\w+:[^<>]*>", re.VERBOSE)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""Splits a prompt into (text, weight) by A1111's grammar; the segment BREAK stands where a new chunk starts.

    (x) multiplies the weight of x by 1.1, [x] divides it by 1.1, (x:n) multiplies it by n, and nesting multiplies.
    \( \) \[ \] \\ are the characters themselves. A bracket never closed holds to the end, one never opened is text.
    Unlike A1111, which then encodes the word, BREAK also works inside brackets.

    >>> parse_weights("a (cat:1.5) in (((snow)")
    [('a ', 1.0), ('cat', 1.5), (' in ', 1.0), ('snow', 1.3310000000000004)]
    """
    if len(prompt) > LONGEST:
        raise UserError(f"prompt {prompt[:80]!r}: {len(prompt):,} characters; with weights {LONGEST:,} are the most")
    if found := UNSUPPORTED.search(prompt):
        warnings.warn(
            f"AND, [a:b:0.5], [a|b] and <lora:...> are not supported and taken literally: {found[0]!r}", stacklevel=2)

    segments = []
    opened = {"(": [], "[": []}  # for each bracket still open, how many segments came before it

    def close(bracket, factor):
        start = opened[bracket].pop()
        segments[start:] = [(text, weight * factor) for text, weight in segments[start:]]  # 0 * factor: BREAK stays

    for match in TOKEN.finditer(prompt):
        kind, token = match.lastgroup, match[0]
        if kind == "open":
            opened[token].append(len(segments))
        elif kind == "number" and opened["("]:
            close("(", float(match["number"]))
        elif token == ")" and opened["("]:
            close("(", 1.1)
        elif token == "]" and opened["["]:
            close("[", 1 / 1.1)
        elif kind == "BREAK":
            segments.append(BREAK)
        else:
            segments.append((match["escaped"] or token, 1.0))

    while opened["("]:
        close("(", 1.1)
    while opened["["]:
        close("[", 1 / 1.1)

    # Neighbours of equal weight become one text again: a word cut by an escape must meet the tokenizer whole.
    merged = []
    for text, weight in segments:
        if merged and merged[-1][1] == weight and BREAK not in (merged[-1], (text, weight)):
            text = merged.pop()[0] + text
        merged.append((text, weight))
    return merged


def split_chunks(prompt: str, tokenizer) -> list[list[tuple[int, float]]]:
    """Tokenises a weighted prompt into chunks of (id, weight), without BOS and EOS; an empty prompt is one chunk."""
    room = tokenizer.max_length - 2
    comma = tokenizer.token_ids(",")[0]
    chunks = [[]]
    for text, weight in parse_weights(prompt):
        if (text, weight) == BREAK:
            chunks.append([])
            continue
        for token in tokenizer.token_ids(text):
            if len(chunks[-1]) == room:
                # Tear no phrase apart: what follows a near comma moves on, unless this token, a comma, ends it here.
                full = chunks.pop()
                near = [i + 1 for i, (t, _) in enumerate(full) if t == comma and i >= room - COMMA_BACKTRACK]
                cut = near[-1] if near and token != comma else room
                chunks += [full[:cut], full[cut:]]
            chunks[-1].append((token, weight))
    if not chunks[-1] and len(chunks) > 1:  # a BREAK at the very end starts nothing
        chunks.pop()
    return chunks


def truncate(prompt: str, tokenizer) -> list[tuple[int, float]]:
    """Tokenises a plain prompt into a single chunk of (id, 1.0), without BOS and EOS, and drops what exceeds it."""
    room = tokenizer.max_length - 2
    tokens = tokenizer.token_ids(prompt)
    if (dropped := len(tokens) - room) > 0:
        warnings.warn(
            f"the last {dropped} of {len(tokens)} tokens of the prompt are dropped; "
            f"--prompt-weights a1111 uses them: {prompt[:40]!r}...", stacklevel=2)
    return [(token, 1.0) for token in tokens[:room]]


def emphasise(z: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiplies features (B, N, D) by their tokens' weights (B, N), then restores each sample's mean.

    A1111's "Original" emphasis; A1111 takes the mean over the whole batch, which would make an image depend on its
    neighbours. A sample without weights is returned bit for bit.
    """
    scaled = z * weights[..., None]  # float32 for a half-precision z
    before = z.mean((1, 2), keepdim=True, dtype=scaled.dtype)
    after = scaled.mean((1, 2), keepdim=True)
    # Near a mean of 0 (features fresh from a LayerNorm) the ratio is noise of any size and sign: do without it there.
    scaled = scaled * torch.where(before * after > 1e-6, before / after, 1)
    weighted = (weights != 1).any(dim=1)[:, None, None]
    return torch.where(weighted, scaled.to(z.dtype), z)


def encode_prompts(
    prompts: list[str], tokenizer, text_encoder, weights: str = "off", clip_skip: int = 0
) -> torch.Tensor:
    """Encodes B prompts into the U-Net's context (B, K * N, D).

    K is 1 for "off", and the largest number of chunks of any of the prompts for "a1111", where the others are filled
    up with empty chunks. The two sides of guidance must be equally long to share a U-Net batch, so encode them in one
    call: `uncond, *conds = encode_prompts([negative] + prompts, ...)`.

    clip_skip counts the layers left out at the end of the text encoder (A1111's "Clip skip: 2" is 1).
    """
    assert weights in ("off", "a1111"), f"weights must be 'off' or 'a1111', got {weights!r}"
    if weights == "off":
        chunks = [[truncate(prompt, tokenizer)] for prompt in prompts]
    else:
        chunks = [split_chunks(prompt, tokenizer) for prompt in prompts]
    most = max(len(c) for c in chunks)

    ids, factors = [], []  # one row a chunk
    for chunk in [chunk for c in chunks for chunk in c + [[]] * (most - len(c))]:
        padding = tokenizer.max_length - 2 - len(chunk)
        ids.append([tokenizer.bos, *(token for token, _ in chunk), tokenizer.eos] + [tokenizer.pad] * padding)
        factors.append([1.0, *(weight for _, weight in chunk), 1.0] + [1.0] * padding)

    device = next(text_encoder.parameters()).device
    z = text_encoder(torch.tensor(ids, device=device), clip_skip=clip_skip)  # (B * K, N, D)
    z = emphasise(z, torch.tensor(factors, device=device, dtype=torch.float32))
    return z.unflatten(0, (len(prompts), most)).flatten(1, 2)  # (B, K * N, D)
