"""Better pictures without training: what each way's equations promise, on things small enough to know the answer; and
generate.py with each of them."""

import contextlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import generate
from model.builtin import BUILT_IN
from model.checkpoint import load_pipeline
from model.scorers import load_scorer
from model.tokenizer import Tokenizer
from paper_people.judge import judge_pictures, load_judge
from pictures import write_png
from sampling import Drawing, draw_best, draw_pictures
from sampling.attention import attention_maps, quarter_level
from sampling.drawing import decode
from sampling.excite import BLUR, excite_loss, sample_excited
from sampling.noise import optimise_noise, recomputed, shell_penalty
from sampling.single import take_apart
from sampling.suffixes import search_suffixes

PROMPT = "a woman with black hair, blue shirt and green trousers, waving in a forest"


def normal(*shape: int, seed: int = 0, **options) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **options)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


@pytest.fixture
def run(program, tmp_path):
    """generate.py as the command line runs it -> its folder."""
    def run(*args, out: str = "out", code: int = 0) -> Path:
        assert program(generate, "--device", "cpu", "--out", tmp_path / out, *args) == code
        return tmp_path / out
    return run


# Noise

def test_the_penalty_is_least_on_the_shell():
    direction = normal(1, 4, 8, 8, dtype=torch.float64)
    direction /= direction.norm()
    z = (math.sqrt(255) * direction).requires_grad_()
    gradient, = torch.autograd.grad(shell_penalty(z), z)
    assert gradient.abs().max() < 1e-12
    for factor in (0.5, 0.99, 1.01, 2):
        assert shell_penalty(factor * z) > shell_penalty(z)


@pytest.mark.parametrize("sampler", ["dpm++", "ddim"])
def test_recomputing_changes_no_gradient(tiny, sampler):
    """Through the sampler and the VAE: the same to the last bit, for one more U-Net call a step."""
    pipeline, calls = load_pipeline(tiny), []
    sample, eps_fn, noise, _ = take_apart(pipeline, Drawing(4, 5.0, 32, 32, sampler), "a cat", 3)
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    weights, found = normal(1, 3, 32, 32), []
    for fn in (eps_fn, recomputed(eps_fn)):
        z = noise.clone().requires_grad_()
        gradient, = torch.autograd.grad((weights * decode(pipeline, sample(fn, z))).sum(), z)
        found.append((gradient, len(calls)))
        calls.clear()
    (plain, once), (again, twice) = found
    assert torch.equal(plain, again) and plain.abs().max() > 0 and (once, twice) == (4, 8)
    # And it is the derivative, along a direction.
    step = 1e-2 * normal(1, 4, 8, 8, seed=1)
    with torch.no_grad():
        up, down = ((weights * decode(pipeline, sample(eps_fn, noise + s * step))).sum() for s in (1, -1))
    assert ((up - down) / 2).item() == pytest.approx((plain * step).sum().item(), rel=1e-2)


def test_the_steps_are_renos_and_the_best_is_kept():
    z, slope = normal(1, 4, 4, 4, dtype=torch.float64), normal(1, 4, 4, 4, seed=1, dtype=torch.float64)

    def gradient_at(z: Tensor) -> Tensor:        # of 0.01 * penalty - slope . z, clipped to a length of 0.1
        gradient = 0.01 * (1 - 63 / (z**2).sum()) * z - slope
        return gradient * min(1, 0.1 / gradient.norm())
    visited, velocity = [z], 0
    for _ in range(3):
        velocity = 0.9 * velocity + gradient_at(visited[-1])
        visited.append(visited[-1] - 5 * (gradient_at(visited[-1]) + 0.9 * velocity))
    x0, rewards = optimise_noise(lambda z: 1 * z, lambda x0: (slope * x0).sum(), z, 3, 5.0)
    torch.testing.assert_close(torch.tensor(rewards), torch.stack([(slope * z).sum() for z in visited]).float())
    torch.testing.assert_close(x0, visited[-1], rtol=1e-4, atol=1e-6)            # torch clips to 0.1 / (norm + 1e-6)

    def near(x0: Tensor) -> Tensor:
        return -(x0 - z - 0.01).norm()
    x0, rewards = optimise_noise(lambda z: 1 * z, near, z, 8, 5.0)               # steps too long to end there
    assert near(x0).item() == max(rewards) > rewards[-1] and len(rewards) == 9

    values = iter([1.0, math.nan])
    x0, rewards = optimise_noise(lambda z: 1 * z, lambda x0: next(values) + 0 * x0.sum(), z, 8, 5.0)
    assert rewards == [1.0] and torch.equal(x0, z)                               # nothing is lost to an overflow


# Attention

def test_words_are_found_among_the_tokens():
    tokenizer = Tokenizer.clip()
    prompt = "Red HAIR, hairy,  red\nshirt"              # red hair , hairy , red shirt
    assert tokenizer.find("hair", prompt) == [1]
    assert tokenizer.find("red", prompt) == [0, 5]
    assert tokenizer.find("red shirt", prompt) == [5, 6]
    assert tokenizer.find("shi", prompt) == [] == tokenizer.find("cat", "a " * 75 + "cat")
    assert tokenizer.find("cat", "a " * 74 + "cat") == [74]


def test_the_loss_is_the_least_attended_words():
    """By hand: three heads of two layers, 2 x 3 places, six tokens of which the first and the last do not count."""
    maps = [normal(1, heads, 6, 6, seed=heads, dtype=torch.float64).softmax(dim=-1) for heads in (2, 1)]
    mean = (maps[0][0, 0] + maps[0][0, 1] + maps[1][0, 0]) / 3
    e = np.exp(100 * mean[:, 1:5].numpy())
    attention = (e / e.sum(1, keepdims=True)).reshape(2, 3, 4)
    kernel = {(i, j): math.exp(-(i * i + j * j)) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    best = {token: max(
        sum(weight * attention[abs(y + i) if y + i < 2 else 0, abs(x + j) if x + j < 3 else 1, token]
            for (i, j), weight in kernel.items()) / sum(kernel.values())
        for y in range(2) for x in range(3)) for token in (0, 3)}
    loss = excite_loss(maps, [0, 3], (2, 3))
    assert BLUR.sum().item() == pytest.approx(1) and loss.item() == pytest.approx(1 - min(best.values()), abs=1e-6)
    logits = normal(1, 2, 6, 6, seed=5).requires_grad_()
    before = excite_loss([logits.softmax(dim=-1)], [0, 3], (2, 3))
    gradient, = torch.autograd.grad(before, logits)
    assert excite_loss([(logits - 0.01 * gradient / gradient.norm()).softmax(dim=-1)], [0, 3], (2, 3)) < before


@torch.no_grad()
def test_maps_are_the_layers_own_and_leave_no_trace(tiny):
    """A layer's output is its map times its values; and inside the block and after it the U-Net is what it was."""
    unet = load_pipeline(tiny).unet
    assert quarter_level(unet) == 2
    x, t, context = normal(2, 4, 8, 8), torch.tensor([500, 20]), normal(2, 77, 32, seed=1)
    before, seen = unet(x, t, context), []
    for level, shapes in ((2, [(2, 4, 4, 77)]), (1, [(2, 4, 16, 77)] * 5), (0, [(2, 4, 64, 77)] * 5)):
        with attention_maps(unet, level) as maps:
            assert torch.equal(unet(x, t, context), before)
        assert [tuple(found.shape) for found in maps] == shapes
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    hook = layer.register_forward_hook(lambda _, inputs, out: seen.append((inputs[1], out)))
    with attention_maps(unet, 2) as maps, contextlib.suppress(KeyError):
        unet(x, t, context)
        raise KeyError
    hook.remove()
    (text, out), = seen
    values = layer.to_v(text).unflatten(-1, (4, -1)).transpose(1, 2)
    torch.testing.assert_close(layer.to_out[0]((maps[0] @ values).transpose(1, 2).flatten(2)), out)
    assert torch.equal(unet(x, t, context), before)
    assert not any(module._forward_hooks for module in unet.modules())


def test_moves_lower_the_loss_where_they_should(tiny, monkeypatch):
    """On a random U-Net, before the first five of ten steps: of the first, third and fifth until the loss is low
    enough, or so many times; and once more, as of the others. The picture that comes out is another one."""
    monkeypatch.setattr("sampling.excite.MOST_MOVES", 6)
    pipeline = load_pipeline(tiny)
    sample, eps_fn, noise, context = take_apart(pipeline, Drawing(10, 5.0, 32, 32), "a cat", 3)
    seen: list[tuple[int, float]] = []

    def loss_fn(x: Tensor, t: Tensor) -> Tensor:
        with attention_maps(pipeline.unet, 2) as maps:
            pipeline.unet(x, t, context)
        loss = excite_loss(maps, [1], (2, 2))
        seen.append((t.item(), loss.item()))
        return loss

    with torch.no_grad():
        x0, plain = sample_excited(sample, eps_fn, loss_fn, noise), sample(eps_fn, noise)
    steps = [t for t, _ in seen]
    visited = list(dict.fromkeys(steps))
    assert len(visited) == 5 and visited == sorted(visited, reverse=True)
    assert steps.count(visited[1]) == steps.count(visited[3]) == 1
    for t, target in zip(visited[::2], (0.95, 0.5, 0.2)):
        losses = [loss for step, loss in seen if step == t]
        assert losses[-1] < losses[0] < 1 and (len(losses) == 7 or losses[-1] <= target < losses[-2])
    assert not torch.allclose(x0, plain, rtol=1e-3) and x0.isfinite().all() and not x0.requires_grad


# Best of N, suffixes

def test_the_best_of_equal_ones_is_the_first():
    drawn = {seed: (torch.full((4, 1, 1), seed), Image.new("L", (1, 1), seed)) for seed in range(10, 14)}
    found, latent, image = draw_best(
        lambda prompt, seeds: [drawn[seed] for seed in seeds],
        lambda images, prompt: [{10: 1.0, 11: 3.0, 12: 3.0, 13: -1.0}[image.getpixel((0, 0))] for image in images],
        4, "a cat", 10)
    assert found == {"seed": 11, "score": 3.0, "mean_score": 1.5, "scores": [1.0, 3.0, 3.0, -1.0]}
    assert (latent, image) == drawn[11]


def test_the_search_is_greedy_and_stops_where_the_gain_was_luck():
    chosen = {"p, a": 2, "p, b": 3, "p, c": 3, "p, b, a": 1, "p, b, c": 9, "p, b, c, a": 99}
    checked = {"p": 5, "p, b": 6, "p, b, c": 7, "p, b, c, a": 7}
    tried: dict[str, list[str]] = {"chosen": [], "checked": []}

    def choose(text: str) -> float:
        tried["chosen"].append(text)
        return chosen[text]

    def check(text: str) -> float:
        tried["checked"].append(text)
        return checked[text]
    assert search_suffixes(choose, check, "p", ["a", "b", "c"]) == "p, b, c"
    assert tried == {"chosen": list(chosen), "checked": list(checked)}
    assert search_suffixes(chosen.get, {**checked, "p": 6}.get, "p", ["a", "b", "c"]) == "p"
    assert search_suffixes(len, len, "p", ["a", "b"]) == "p, a, b"               # all of them, and no more to try


class Killed(BaseException):
    pass


def test_best_of_is_the_scorers_choice_and_goes_on_after_a_kill(run, tiny, tiny_scorer, monkeypatch):
    """Killed before each of its writes and started again, it ends with the same bytes."""
    command = ["--model", tiny, "--scorer", tiny_scorer, "--prompt", "a cat", "--num-images", 2, "--best-of", 3,
               "--steps", 2, "--batch-size", 2, "--seed", 7, "--save-latents"]
    whole = run(*command, out="whole")
    scorer, pipeline = load_scorer(tiny_scorer), load_pipeline(tiny)
    assert len({row["seed"] for row in rows(whole)}) == 2
    for n, row in enumerate(rows(whole)):
        seeds = list(range(7 + 3 * n, 10 + 3 * n))
        images = [image for _, image in draw_pictures(pipeline, Drawing(2, 5.0, 32, 32), ["a cat"] * 3, seeds)]
        scores = scorer(images, ["a cat"] * 3)
        best = scores.argmax().item()
        assert row == {"file": f"{n:05d}.png", "prompt": "a cat", "seed": seeds[best], "score": max(row["scores"]),
                       "mean_score": sum(row["scores"]) / 3, "scores": row["scores"]}
        assert row["scores"] == pytest.approx(scores.tolist(), abs=1e-3)
        assert np.abs(pixels(whole / row["file"]) - np.array(images[best]).astype(int)).max() <= 1
        assert f"Seed: {row['seed']}" in Image.open(whole / row["file"]).info["parameters"]

    def contents(out: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name[0] != "."}
    left = [0]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if -100 < left[0] < 1:               # dead: nothing more is written, whatever still runs
                raise Killed
            return function(*args, **kwargs)
        return call
    for name in ("write_manifest", "write_png", "write_tensors", "write_text"):
        monkeypatch.setattr(generate, name, counted(getattr(generate, name)))
    for number in (3, 5, 7):
        left[0] = number
        with pytest.raises(Killed):
            run(*command, out=f"{number}")
        left[0] = -100
        assert contents(run(*command, out=f"{number}")) == contents(whole), number
    run(*command, "--best-of", 2, out="whole", code=2)
    for notes in ("{", "[]", '{"found": 7}'):    # by another program
        write_png(whole / "00000.png", Image.open(whole / "00000.png"), {"hg-dpo": notes})
        run(*command, out="whole", code=2)


# generate.py

def test_plain_folders_are_as_they_were(run, tiny):
    out = run("--model", tiny, "--prompt", "a cat", "--steps", 1)
    manifest = json.loads((out / "generate.json").read_text())
    assert not {*generate.WAYS, *generate.LATER, "way"} & manifest["options"].keys()
    assert manifest["inputs"].keys() == {"model", "prompt"} and rows(out)[0].keys() == {"file", "prompt", "seed"}
    picture = Image.open(out / "00000.png").info
    assert "Drawn with" not in picture["parameters"] and "found" not in json.loads(picture["hg-dpo"])


def test_noise_raises_the_score(run):
    plain = run("--prompt", PROMPT, "--steps", 4, "--seed", 2, out="plain")
    out = run("--prompt", PROMPT, "--steps", 4, "--seed", 2, "--optimise-noise", 4)
    row, = rows(out)
    assert row["score"] == max(row["scores"]) > row["score_before"] + 1 and row["score_before"] == row["scores"][0]
    scorer = load_scorer("paper-people")
    before, after = scorer([Image.open(folder / "00000.png") for folder in (plain, out)], [PROMPT] * 2).tolist()
    assert (before, after) == pytest.approx((row["score_before"], row["score"]), abs=0.1)
    options = json.loads((out / "generate.json").read_text())["options"]
    assert (options["optimise_noise"], options["noise_lr"], options["scorer"]) == (4, 5.0, "paper-people")


def test_suffixes_are_scored_for_the_prompt_as_asked(run, tmp_path, monkeypatch):
    """A prompt that the miniature was not trained on becomes one that it was."""
    monkeypatch.setattr("sampling.suffixes.SEEDS", 2)
    asked, phrase = "a man, waving in a room", "with red hair, blue shirt and white trousers"
    (tmp_path / "phrases.txt").write_text(f"a woman\n\n{phrase}\n")
    out = run("--prompt", asked, "--steps", 4, "--suffixes", tmp_path / "phrases.txt")
    row, scorer = rows(out)[0], load_scorer("paper-people")
    assert row["asked"] == asked and row["prompt"].startswith(f"{asked}, {phrase}") and row["seed"] == 0
    assert Image.open(out / "00000.png").info["parameters"].startswith(row["prompt"] + "\n")
    plain = [run("--prompt", prompt, "--steps", 4, out=prompt[-8:]) for prompt in (asked, row["prompt"])]
    assert np.abs(pixels(plain[1] / "00000.png") - pixels(out / "00000.png")).max() <= 1
    scores = scorer([Image.open(folder / "00000.png") for folder in plain], [asked] * 2).tolist()
    assert [row["score_before"], row["score"]] == pytest.approx(scores, abs=0.1) and scores[1] > scores[0] + 0.5


def test_an_excited_word_is_in_the_picture(run):
    """The miniature forgets the waving; of the second prompt no word is asked for, so that it is drawn as ever."""
    other = "a man with red hair, green shirt and yellow trousers, standing in a forest"
    prompts, eye = ["--prompt", PROMPT, "--prompt", other], load_judge(BUILT_IN["paper-people"].checkpoint / "judge")
    plain, out = run(*prompts, "--steps", 10, out="plain"), run(*prompts, "--steps", 10, "--excite", "waving")
    shown = [judge_pictures(eye, [Image.open(folder / "00000.png")], [PROMPT])[0].shown for folder in (plain, out)]
    assert [person.pose for person in shown] == ["standing", "waving"]
    assert [row["excited"] for row in rows(out)] == [["waving"], []]
    assert np.abs(pixels(plain / "00001.png") - pixels(out / "00001.png")).max() <= 1
    assert "Drawn with: --excite waving" in Image.open(out / "00000.png").info["parameters"]


REFUSED = {
    "two ways": (["--best-of", 2, "--excite", "cat"], "--best-of and --excite: give one of them"),
    "best of one": (["--best-of", 1], "--best-of 1: must be"),
    "a scorer for nothing": (["--scorer", "clip"], "--scorer goes with --best-of"),
    "a scorer for words": (["--excite", "cat", "--scorer", "clip"], "--scorer goes with --best-of"),
    "a rate for nothing": (["--best-of", 2, "--noise-lr", 1], "--noise-lr goes with --optimise-noise"),
    "noise of its own": (["--optimise-noise", 2, "--sampler", "ddpm"], "--optimise-noise needs a sampler that"),
    "the same, words": (["--excite", "cat", "--sampler", "ddpm"], "--excite needs a sampler that draws no noise"),
    "lan": (["--excite", "cat", "--lora", "x", "--lan"], "--excite needs a sampler that draws no noise of its own"),
    "other tokens": (["--excite", "cat", "--prompt-weights", "a1111"], "--excite goes without --prompt-weights"),
    "no such word": (["--excite", "cat,hat"], "--excite cat,hat: 'hat' is no word of any prompt"),
    "no word": (["--excite", ","], "--excite ,: no word in it"),
    "no gradient": (["--optimise-noise", 2, "--scorer", "own.py:score"], "own.py:score: no gradient"),
    "no phrases": (["--suffixes", "none.txt"], "none.txt: no such prompt file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused(run, tiny, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def score(images, prompts):\n    return [0.0] * len(images)\n")
    args, message = REFUSED[case]
    out = run("--model", tiny, "--prompt", "a cat", "--steps", 1, *args, code=2)
    stderr = capsys.readouterr().err
    assert re.fullmatch(r"generate\.py: [^\n]+\n", stderr) and message in stderr and not out.exists()
