"""train_online.py: each method's gradient against one worked out apart, without a checkpoint or a shortcut; a run that
was killed, or split over processes, is the run that was not; what is refused."""

import copy
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Normal

import train_online
from losses.policy import ddpo_is_loss
from model.checkpoint import Pipeline, load_pipeline
from model.files import files_read, was_read
from model.lora import inject_lora, lora_disabled
from model.preprocess import to_pixels
from sampling import Drawing, seeded
from train_online import METHODS, Batch, Policy, draw_candidates, draw_rollout, learn, reward_gradient, where_it_begins
from training.rewards import Told, judge_falls

ROOT = Path(__file__).parent.parent
LN2 = math.log(2)
ROWS = {                                       # of the U-Net for a picture of two steps; a backward pass counts twice
    "ddpo": 2 * (2 + 2 * 3), "ddpo-sf": 2 * (2 + 2 * 3), "grpo": 2 * (2 + 2 * 3),
    "dpok": 2 * (2 + 2 * 3 + 2), "d3po": 2 * (2 + 2 * 3 + 2), "dense": 2 * (2 + 2 * 3 + 2),
    # Of four steps: two candidates of three, and nothing to predict for those of the last.
    "spo": 2 * (4 + 2 * 2 + 3 * 3 + 3),
    "refl": 1 + 3, "draft": 2 * (1 + 3 + 3), "alignprop": 2 * (2 * 3 + 1 + 3)}    # the reference's second step, too
MORE = {
    "ddpo": ["--updates", 1], "grpo": ["--pictures", 2], "dpok": ["--epochs", 1],
    "spo": ["--candidates", 2, "--margin", 0, "--sampler-steps", 4], "refl": ["--lr", 1e-3],
    "draft": ["--extra-noises", 1], "alignprop": ["--gradient-steps", 2, "--kl-weight", 0.5]}

OWN = '''
from PIL import ImageStat

def red(images, prompts):
    return [ImageStat.Stat(image).mean[0] for image in images]

def green(images, prompts):
    return [ImageStat.Stat(image).mean[1] for image in images]

def same(images, prompts):
    return [0.1] * len(images)

calls = []

def rises_and_falls(images, prompts):
    calls.append(len(images))
    return [-abs(len(calls) - 4.0)] * len(images)

class Red:
    """With a gradient."""

    def __init__(self, device):
        self.calls = 0

    def __call__(self, images, prompts):
        return red(images, prompts)

    def reward(self, pixels, prompts):
        return pixels[:, 0].mean(dim=(1, 2))

class Breaks(Red):
    def __call__(self, images, prompts):
        self.calls += 1
        return [float("nan") if self.calls == 3 else 1.0 * i for i in range(len(images))]

    def reward(self, pixels, prompts):
        self.calls += 1
        return super().reward(pixels, prompts) * (float("nan") if self.calls == 3 else 1)

class Flat(Red):
    def reward(self, pixels, prompts):
        return pixels.detach().mean(dim=(1, 2, 3))

class Summed(Red):
    def reward(self, pixels, prompts):
        return pixels.mean()
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "own.py"
    file.write_text(OWN)
    return file


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a cat\na dog\na red house by the sea\nan old man\na fish\n")
    return file


@lru_cache
def read_once(*arguments) -> tuple[Pipeline, set[Path]]:
    with files_read() as files:
        return load_pipeline(*arguments), files


@pytest.fixture(autouse=True)
def short_loads(monkeypatch):
    """Half of a short run would be reading the model."""
    def load(*arguments) -> Pipeline:
        pipeline, files = read_once(*arguments)
        for file in files:
            was_read(file)
        return replace(pipeline, unet=copy.deepcopy(pipeline.unet))
    monkeypatch.setattr(train_online, "load_pipeline", load)


@pytest.fixture
def options(tiny, prompts, own):
    return ["--model", tiny, "--prompts", prompts, "--scorer", f"{own}:Red", "--height", 16, "--width", 16,
            "--sampler-steps", 2, "--batch-size", 2, "--grad-accum", 1]


def lines_of(out: Path, name: str = "log.jsonl") -> list[dict]:
    return [json.loads(line) | {"seconds": 0} for line in (out / name).read_text().splitlines()]


def lora(out: Path) -> dict[str, Tensor]:
    return load_file(out / "lora.safetensors")


# Runs

@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, options, program, tiny_scorer, own, tmp_path):
    """It writes what train.py writes, and begins where theory says; its cost is what is worked out above."""
    out = tmp_path / "run"
    run = [*options, "--method", method, "--scorer", tiny_scorer, "--judge", f"{own}:red", *MORE.get(method, [])]
    assert program(train_online, *run, "--out", out, "--steps", 2) == 0
    for name in ("lora.safetensors", "curves.png", "config.json", "README.md", "checkpoint/state.pt"):
        assert (out / name).is_file(), name
    first, second = lines_of(out)
    rewards = lines_of(out, "rewards.jsonl")
    per_step = len(rewards) // 2
    assert [line["step"] for line in rewards] == [1] * per_step + [2] * per_step
    for step, line in ((1, first), (2, second)):
        own_step = [reward for reward in rewards if reward["step"] == step]
        for key in ("reward", "judge"):
            assert line[key] == pytest.approx(sum(one[key] for one in own_step) / per_step, rel=1e-5)
        assert line["unet_rows"] == ROWS[method] * per_step and line["grad_norm"] > 0
    assert any(tensor.any() for name, tensor in lora(out).items() if "lora_up" in name)
    if method in ("ddpo", "grpo", "dpok"):
        assert first["ratio_off"] == first["clipped"] == 0 and first.get("kl", 0) == 0
    elif method in ("d3po", "dense", "spo"):
        assert first["loss"] == pytest.approx(LN2, rel=1e-6) and first["implicit_accuracy"] == 0.5
        assert first.get("kept", 1) == 1 and second[method] != first[method]
    elif method == "refl":
        assert first["loss"] == pytest.approx(2 - first["reward"], rel=1e-6)
    elif method == "alignprop":
        assert first["loss"] == pytest.approx(-first["reward"], rel=1e-6) and first["kl"] == 0 < second["kl"]
    elif method == "draft":
        assert first["loss"] == pytest.approx(-first["reward"], rel=0.01) and first["loss"] != -first["reward"]


@pytest.mark.parametrize("method, more, levels", [
    ("grpo", ["--pictures", 8], 1.5), ("alignprop", ["--batch-size", 8], 0.05)])
def test_the_reward_rises(method, more, levels, options, program, tmp_path):
    """By a scorer that wants red, in twelve steps. (d3po and spo are held to small steps; see below for their way.)"""
    run = [*options, "--method", method, *more, "--lr", 3e-2, "--steps", 12, "--save-every", 12]
    assert program(train_online, *run, "--out", tmp_path / "run") == 0
    rewards = [line["reward"] for line in lines_of(tmp_path / "run")]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + levels


@pytest.mark.parametrize("extra", [
    # Each prompt has eight rewards a step, so that its own sixteen count from step 2 on.
    ["ddpo", "--limit", 2, "--batch-size", 16, "--updates", 1, "--sampler-steps", 1],
    ["d3po", "--batch-size", 1, "--sampler-steps", 1],
    # Its gradient begins at step 2, 2, 2 and 1.
    ["alignprop", "--ema", 0.9, "--sampler-steps", 3, "--seed", 1]], ids=lambda extra: extra[0])
def test_killed_and_resumed_is_the_run_that_was_not(extra, options, program, interrupted, tmp_path):
    """A step behind its checkpoint, as it wrote a line."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run = [*options, "--lr", 1e-2, "--method", *extra, "--save-every", 2, "--steps", 4]
    assert program(train_online, *run, "--out", straight) == 0
    with interrupted(train_online, 4):
        assert program(train_online, *run, "--out", killed) == 130
    assert torch.load(killed / "checkpoint" / "state.pt", weights_only=True)["step"] == 2
    assert lines_of(killed, "rewards.jsonl")[-1]["step"] == 3
    with open(killed / "rewards.jsonl", "a") as file:
        file.write('{"step": 4, "prompt": 0, "rew')
    assert program(train_online, *run, "--out", killed) == 0
    for name in ("lora.safetensors", "rewards.jsonl"):
        assert (straight / name).read_bytes() == (killed / name).read_bytes(), name
    assert lines_of(straight) == lines_of(killed) and len(lines_of(killed)) == 4
    if "--ema" in extra:
        state, saved = torch.load(killed / "checkpoint" / "state.pt", weights_only=True), [*lora(killed).values()]
        assert any(torch.equal(tensor, state["average"][1]) for tensor in saved)
        assert not any(torch.equal(tensor, state["parameters"][1]) for tensor in saved)


def test_sigterm_saves_first(options, program, interrupted, tmp_path, capsys):
    out = tmp_path / "run"
    run = [*options, "--method", "draft", "--limit", 1, "--sampler-steps", 1, "--sample-every", 3, "--save-every", 50,
           "--steps", 3, "--out", out]
    with interrupted(train_online, 2, signal.SIGTERM):
        assert program(train_online, *run) == 130
    assert "stopped; what was finished is saved" in capsys.readouterr().err
    assert torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"] == len(lines_of(out)) == 2
    assert program(train_online, *run) == 0 and len(lines_of(out)) == 3
    watched, = lines_of(out, "watch.jsonl")
    assert watched["step"] == 3 and "mean_R" in watched and (out / "samples" / "000003.png").is_file()


TWO_RUNS = """
import os, sys
import train_online
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"           # it knows the processes of the first run
for os.environ["MASTER_PORT"], *sys.argv in {commands}:
    train_online.main()
"""


def test_two_processes_are_one_with_twice_the_batch(options, program, tmp_path):
    """Under torchrun with gloo; once for both methods, as most of the time goes into starting it. GRPO has one prompt
    here, whose pictures are a group, wherever they are drawn."""
    run = [*options, "--steps", 2, "--grad-accum", 2]
    grpo = ["--method", "grpo", "--pictures", 2, "--limit", 1, "--updates", 2, "--sampler-steps", 1]
    runs = {"grpo": [*grpo, "--batch-size"], "draft": ["--method", "draft", "--lr", 1e-3, "--batch-size"]}
    with socket.socket() as one, socket.socket() as other:
        one.bind(("", 0))
        other.bind(("", 0))
        ports = [some.getsockname()[1] for some in (one, other)]
    commands = [[str(part) for part in (port, "train_online.py", *run, *more, 1, "--out", tmp_path / f"2 {method}")]
                for port, (method, more) in zip(ports, runs.items())]
    (tmp_path / "two_runs.py").write_text(TWO_RUNS.format(commands=commands))
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         tmp_path / "two_runs.py"],
        cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    for method in runs:
        one, two = tmp_path / method, tmp_path / f"2 {method}"
        batches = [2] if method == "grpo" else [4, "--grad-accum", 1]
        assert program(train_online, *run, *runs[method], *batches, "--out", one) == 0
        # As a whole: a single element whose gradient is near 0 may go either way under Adam.
        difference = sum((lora(two)[name] - tensor).square().sum() for name, tensor in lora(one).items())
        assert difference.sqrt() < 1e-3 * sum(tensor.square().sum() for tensor in lora(one).values()).sqrt()
        for key in ("loss", "reward", "grad_norm"):
            values = [[line[key] for line in lines_of(out)] for out in (one, two)]
            assert values[1] == pytest.approx(values[0], rel=1e-3, abs=1e-5), key
        assert [line["unet_rows"] for line in lines_of(one)] == [2 * line["unet_rows"] for line in lines_of(two)]
        told = [sorted((line["step"], line["prompt"], round(line["reward"], 4))
                       for line in lines_of(out, "rewards.jsonl")) for out in (one, two)]
        assert told[0] == told[1]
    # What two began, one goes on with that draws as many pictures a step.
    assert program(train_online, *run, *runs[method], *batches, "--out", two, "--steps", 3) == 0
    assert [line["step"] for line in lines_of(two)] == [1, 2, 3]


# What the gradients are

@pytest.fixture(scope="module")
def world(tiny):
    """A policy that is not its reference any more, with two prompts' contexts and noise, and its parameters."""
    pipeline = load_pipeline(tiny)
    generator = torch.Generator().manual_seed(0)
    parameters = inject_lora(pipeline.unet, rank=2, generator=generator)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.05, generator=generator)
    policy = Policy(pipeline, Drawing(4, 5.0, 16, 16), compiled=False)
    contexts = policy.encode(["a cat", "a dog"])
    x = torch.randn((2, 4, 4, 4), generator=generator)
    return SimpleNamespace(policy=policy, parameters=parameters, contexts=contexts, x=x)


def generators(n: int = 2) -> list[torch.Generator]:
    return [seeded("a test's noise", 0, i) for i in range(n)]


def gradient_of(world, act) -> list[Tensor]:
    """What `act` adds to the parameters' gradients."""
    for parameter in world.parameters:
        parameter.grad = None
    act()
    return [parameter.grad for parameter in world.parameters]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    scale = max(one.abs().max() for one in wanted)
    assert scale > 0
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * scale.item())


TIMES = [(751, 501), (501, 251), (251, 1), (1, 0)]


def eps_of(world, x: Tensor, t: int, contexts: Tensor | None = None) -> Tensor:
    """Guidance by two passes."""
    unet, ts = world.policy.pipeline.unet, torch.full((len(x),), t)
    uncond, cond = world.contexts if contexts is None else contexts
    without = unet(x, ts, uncond)
    return without + 5 * (unet(x, ts, cond) - without)


def step_of(world, eps: Tensor, x: Tensor, t: int, t_prev: int, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """DDIM's Eq. 12: x0, the mean of x_prev, and sigma."""
    a, a_prev = (world.policy.pipeline.alphas_cumprod[i] for i in (t, t_prev))
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    return x0, a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).sqrt() * eps, sigma


def decoded(world, latents: Tensor) -> Tensor:
    vae = world.policy.pipeline.vae
    return (vae.decode(vae.from_latent(latents)) / 2 + 0.5).clamp(0, 1)


def reward(pixels: Tensor, prompts: list[str]) -> Tensor:
    return 10 * (pixels[:, 0] * pixels[:, 1]).mean(dim=(1, 2)) + pixels[:, 2, 3].square().mean(dim=1)


def drawn(
    world, first: int, last: int, eta: float, kl_weight: float = 0.0, implied: bool = False,
) -> tuple[Tensor, Tensor]:
    """Steps 0 to `last`, one graph from `first` on -> latents, or the x0 that they imply; the distance to the
    reference."""
    x, noise, far = world.x, generators(), []
    for i, (t, t_prev) in enumerate(TIMES[:last + 1]):
        with torch.set_grad_enabled(i >= first):
            eps = eps_of(world, x, t)
            if i >= first:
                with lora_disabled(world.policy.pipeline.unet):
                    far.append((eps - eps_of(world, x, t)).square().mean())
            x0, mean, sigma = step_of(world, eps, x, t, t_prev, eta)
            if implied and i == last:
                x = x0
            else:
                z = torch.cat([torch.randn((1, 4, 4, 4), generator=g) for g in noise]) if eta else 0
                x = mean + sigma * z
    return x, kl_weight * sum(far) / len(far)


@pytest.mark.parametrize("method, first, eta, last, kl_weight", [
    ("draft", 0, 0.0, 3, 0.0), ("draft", 3, 0.0, 3, 0.0), ("draft", 2, 0.0, 3, 0.7),
    ("alignprop", 0, 1.0, 3, 0.0), ("alignprop", 0, 1.0, 3, 50.0), ("refl", 2, 1.0, 2, 0.0),
    ("refl", 3, 1.0, 3, 0.0)])
def test_the_gradient_of_the_reward_is_autograds(method, first, eta, last, kl_weight, world):
    """Through as many of the sampler's last steps as are asked for, kept as one graph: all of them, or one; ReFL's
    picture is the x0 of the step where it stops."""
    args = SimpleNamespace(method=method, kl_weight=kl_weight, extra_noises=0, reward_limit=None, scorer="")
    told = []
    found = gradient_of(world, lambda: told.append(reward_gradient(
        world.policy, ["a cat", "a dog"], world.x, generators(), reward, args, first, 0.5)))
    latents, far = drawn(world, first, last, eta, kl_weight, method == "refl")
    rewards = reward(decoded(world, latents), [])
    wanted = gradient_of(world, lambda: (0.5 * (far - rewards.mean())).backward())
    assert_same(found, wanted)
    torch.testing.assert_close(told[0][0], rewards.detach(), rtol=1e-4, atol=1e-5)
    assert told[0][2]["loss"].item() == pytest.approx((far - rewards.mean()).item(), rel=1e-4)
    image, = decoded(world, latents[:1])
    assert (255 * (to_pixels(told[0][1][0]) - image)).abs().max() < 1.01


def test_draft_lv_does_the_last_step_again(world):
    """From other noise; the gradients are averaged, and what is told is the picture's own."""
    args, told = SimpleNamespace(method="draft", kl_weight=0.0, extra_noises=2, reward_limit=None, scorer=""), []
    found = gradient_of(world, lambda: told.append(reward_gradient(
        world.policy, ["a cat", "a dog"], world.x, generators(), reward, args, 3, 1.0)))

    def act():
        x, noise, a = drawn(world, 3, 3, 0.0)[0], generators(), world.policy.pipeline.alphas_cumprod[1]
        rewards, x0 = reward(decoded(world, x), []), x.detach()
        torch.testing.assert_close(told[0][0], rewards.detach(), rtol=1e-4, atol=1e-5)
        loss = -rewards.mean()
        for _ in range(2):
            z = torch.cat([torch.randn((1, 4, 4, 4), generator=g) for g in noise])
            x_t = a.sqrt() * x0 + (1 - a).sqrt() * z
            x = step_of(world, eps_of(world, x_t, 1), x_t, 1, 0, 0.0)[1]
            loss = loss - reward(decoded(world, x), []).mean()
        (loss / 3).backward()
    assert_same(found, gradient_of(world, act))


def test_a_picture_above_the_limit_has_no_gradient(world):
    latents, _ = drawn(world, 3, 3, 0.0)
    rewards = reward(decoded(world, latents), [])
    low = rewards.argmin().item()
    args = SimpleNamespace(method="draft", kl_weight=0.0, extra_noises=0, scorer="")
    run = lambda limit: gradient_of(world, lambda: reward_gradient(
        world.policy, ["a cat", "a dog"], world.x, generators(), reward,
        SimpleNamespace(**vars(args), reward_limit=limit), 3, 1.0))
    assert_same(run(rewards.mean().item()), gradient_of(world, lambda: (-rewards[low] / 2).backward()))
    assert not any(one.any() for one in run(rewards.min().item() - 1e-3))


@pytest.mark.parametrize("steps", [1, 2, 20, 50])
def test_where_the_gradient_begins(steps):
    g = torch.Generator().manual_seed(0)
    drawn = {name: [where_it_begins(name, "random", steps, g) for _ in range(400)] for name in ("refl", "alignprop")}
    assert set(drawn["refl"]) == set(range(3 * steps // 4, steps))
    assert min(1, steps - 1) <= min(drawn["alignprop"]) and max(drawn["alignprop"]) == steps - 1
    if steps == 50:
        mean = sum(drawn["alignprop"]) / 400                   # of N(42, 5), rounded down, below 50
        assert abs(mean - 41) < 1 and min(drawn["alignprop"]) < 32
    assert where_it_begins("draft", steps, steps, g) == 0 and where_it_begins("draft", 1, steps, g) == steps - 1


def log_probs_of(world, contexts: Tensor, steps: list, reference: bool = False) -> Tensor:
    """(steps, R), as torch.distributions has them."""
    def one(step) -> Tensor:
        t, t_prev = step.t[0].item(), step.t_prev[0].item()
        _, mean, sigma = step_of(world, eps_of(world, step.x_t, t, contexts), step.x_t, t, t_prev, 1.0)
        return Normal(mean, sigma.expand_as(mean)).log_prob(step.x_prev).mean(dim=(2, 3, 4))     # (K, R)
    if not reference:
        return torch.stack([one(step) for step in steps])
    with torch.no_grad(), lora_disabled(world.policy.pipeline.unet):
        return torch.stack([one(step) for step in steps])


def test_a_step_of_ddpo_is_the_score_functions_estimator(options, program, own, tmp_path, monkeypatch):
    """Of a whole step of the program: two batches, whose advantages are of both; and their pictures are those that the
    rewards are of."""
    seen, compared = [], []

    def draw(policy, contexts, x, generators):
        latents, steps = draw_rollout(policy, contexts, x, generators)
        seen.append((policy, contexts, latents, steps))
        return latents, steps

    def compare(parameters, world_size):
        own_scorer = train_online.load_judge(f"{own}:red", torch.device("cpu"))
        world = SimpleNamespace(policy=seen[0][0], parameters=parameters)
        found = [parameter.grad for parameter in parameters]
        images = [train_online.to_images(train_online.decode(world.policy.pipeline, latents))
                  for _, _, latents, _ in seen]
        rewards = torch.tensor(own_scorer(sum(images, []), [""] * 4).tolist(), dtype=torch.float64)
        advantages = ((rewards - rewards.mean()) / rewards.std(correction=0)).float()
        score = sum((advantages[2 * i:2 * i + 2] * log_probs_of(world, contexts, steps)[:, 0]).mean()
                    for i, (_, contexts, _, steps) in enumerate(seen)) / 2
        assert_same(found, [grad if grad is not None else torch.zeros_like(p) for grad, p in zip(torch.autograd.grad(
            -score, parameters, allow_unused=True), parameters)])
        compared.append(rewards.float())

    monkeypatch.setattr(train_online, "draw_rollout", draw)
    monkeypatch.setattr(train_online, "average_gradients", compare)
    run = [*options, "--method", "ddpo", "--grad-accum", 2, "--updates", 1, "--steps", 1]
    assert program(train_online, *run, "--out", tmp_path / "run") == 0 and len(compared) == 1
    told = lines_of(tmp_path / "run", "rewards.jsonl")
    assert [line["reward"] for line in told] == compared[0].tolist()
    for i, line in enumerate(told):                # the contexts that were drawn with are those prompts'
        prompt = Path(options[3]).read_text().splitlines()[line["prompt"]]
        assert torch.equal(seen[i // 2][1][:, i % 2], seen[0][0].encode([prompt])[:, 0])
    assert len({line["prompt"] for line in told}) == 4


def rollouts(world, pictures: int = 4) -> tuple[Tensor, Tensor, list]:
    contexts = world.policy.encode(["a cat", "a dog"] * (pictures // 2))
    x = torch.randn((pictures, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    return contexts, *draw_rollout(world.policy, contexts, x, generators(pictures))


@pytest.mark.parametrize("clip, kl", [(0.2, "eps_mse"), (1e-3, "gaussian")])
def test_later_updates_are_ppos(clip, kl, world):
    """Of a rollout that another policy drew, with the KL divergence to the reference."""
    contexts, _, steps = rollouts(world)
    steps = [replace(step, log_probs=step.log_probs + 0.003 * (-1) ** i) for i, step in enumerate(steps)]
    advantages, weight = torch.tensor([1.0, -2.0, 0.5, 0.0]), 0.3
    found = gradient_of(world, lambda: learn(
        world.policy, Batch(contexts, steps, advantages), advantages, METHODS["ddpo"], {"clip": clip}, kl, weight, 0.5))

    def act():
        old = torch.cat([step.log_probs for step in steps])
        loss, _ = ddpo_is_loss(log_probs_of(world, contexts, steps)[:, 0], old, advantages, clip)
        for step, (t, t_prev) in zip(steps, TIMES):
            ends = [eps_of(world, step.x_t, t, contexts)]
            with lora_disabled(world.policy.pipeline.unet), torch.no_grad():
                ends.append(eps_of(world, step.x_t, t, contexts))
            means = [step_of(world, eps, step.x_t, t, t_prev, 1.0)[1:] for eps in ends]
            if kl == "gaussian":
                far = torch.distributions.kl_divergence(*(Normal(mean, sigma) for mean, sigma in means)).mean()
            else:
                far = (ends[0] - ends[1]).square().mean()
            loss = loss + weight * far / 4
        (0.5 * loss).backward()
    assert_same(found, gradient_of(world, act))


@pytest.mark.parametrize("method", ["d3po", "dense"])
def test_of_two_pictures_the_better_ones_steps_become_likelier(method, world):
    """The official codes' loss, with +1 for the better, -1 for the other, and 0 for both of a tie. So a batch's
    gradient is the mean of its parts', ties and all."""
    contexts, _, steps = rollouts(world, 6)
    rewards = torch.tensor([1.0, 3.0, 2.0, 2.0, 3.0, 0.0])     # the second is better; a tie; the first is
    signs = torch.tensor([-1.0, 0.0, 1.0])
    options = METHODS[method].loss.defaults() | {"clip": 0.5}
    batch = Batch(contexts, steps, rewards)
    run = lambda batch, share: learn(world.policy, batch.better_first(), None, METHODS[method], options, "", 0.0, share)
    logs = []
    found = gradient_of(world, lambda: logs.append(run(batch, 1.0)))

    def act():
        ratio = (log_probs_of(world, contexts, steps) - log_probs_of(world, contexts, steps, True))[:, 0]  # (T, 6)
        margin = ratio[:, :3] - ratio[:, 3:]                   # of the first pictures of the prompts over the second
        if method == "d3po":
            losses = -F.logsigmoid(0.1 * signs * margin).mean(dim=0)
        else:
            weights = torch.tensor([0.9**i for i in range(4)])
            losses = -F.logsigmoid(10 * signs * ((weights / weights.sum()) @ margin))
        (losses * signs.abs()).mean().backward()
        assert logs[0]["loss"].item() == pytest.approx((losses * signs.abs()).mean().item(), rel=1e-4)
    wanted = gradient_of(world, act)
    assert_same(found, wanted)

    def part(rows: list[int]) -> Batch:
        rows = torch.tensor(rows)
        return Batch(contexts[:, rows], [step.of(rows) for step in steps], rewards[rows])
    assert_same(gradient_of(world, lambda: [run(part([0, 3]), 1 / 3), run(part([1, 2, 4, 5]), 2 / 3)]), wanted)
    tie = part([1, 4])
    tie.rewards = torch.zeros(2)
    assert not any(one.any() for one in gradient_of(world, lambda: run(tie, 1.0)))


def test_a_pair_shares_its_first_noise_alone(options, program, tmp_path, monkeypatch):
    seen = []

    def draw(policy, contexts, x, generators):
        latents, steps = draw_rollout(policy, contexts, x, generators)
        seen.append((contexts, x, steps))
        return latents, steps
    monkeypatch.setattr(train_online, "draw_rollout", draw)
    run = [*options, "--method", "d3po", "--grad-accum", 2, "--steps", 1, "--out", tmp_path / "run"]
    assert program(train_online, *run) == 0 and len(seen) == 2
    for contexts, x, steps in seen:
        assert torch.equal(x[:2], x[2:]) and torch.equal(contexts[:, :2], contexts[:, 2:])
        for step in steps:
            assert (step.x_prev[0, :2] != step.x_prev[0, 2:]).all()
    first = torch.stack([x[i] for _, x, _ in seen for i in range(2)])
    assert len(first.flatten().unique()) == first.numel()      # pairs share nothing


def test_spo_compares_candidates_of_one_latent(world):
    """Of all but the first fifth; each is scored by the x0 that it implies, and one of them is gone on from."""
    asked = []

    def score(latents: Tensor) -> Tensor:
        asked.append(latents)
        return latents.mean(dim=(1, 2, 3))
    latents, steps = draw_candidates(world.policy, world.contexts, world.x, generators(), 3, score)
    assert [step.t.tolist() for step in steps] == [[t, t] for t, _ in TIMES[1:]] and len(asked) == 9
    ends = [*(step.x_t for step in steps[1:]), latents]
    picked = set()
    with torch.no_grad():
        _, mean, sigma = step_of(world, eps_of(world, world.x, 751), world.x, 751, 501, 1.0)
        noise = (steps[0].x_t - mean) / sigma
        assert 0.7 < noise.std() < 1.3
        for i, (step, (t, t_prev), end) in enumerate(zip(steps, TIMES[1:], ends)):
            _, mean, sigma = step_of(world, eps_of(world, step.x_t, t), step.x_t, t, t_prev, 1.0)
            noise = (step.x_prev - mean) / sigma
            assert noise.shape == (3, 2, 4, 4, 4) and 0.8 < noise.std() < 1.2
            assert min((one - other).abs().max() for one, other in combinations(noise.flatten(0, 1), 2)) > 0.5
            for k, x in enumerate(step.x_prev):
                x0 = x if t_prev == 0 else step_of(world, eps_of(world, x, t_prev), x, t_prev, 0, 0.0)[0]
                torch.testing.assert_close(asked[3 * i + k], x0, rtol=1e-3, atol=1e-3)
                assert torch.equal(step.scores[k], asked[3 * i + k].mean(dim=(1, 2, 3)))
            for picture in range(2):
                picked |= {k for k in range(3) if torch.equal(step.x_prev[k, picture], end[picture])}
                assert any(torch.equal(x, end[picture]) for x in step.x_prev[:, picture])
    assert len(picked) > 1

    for step, spread in zip(steps, ([1.0, 1.0], [1.0, 1e-9], [1e-9, 1e-9])):     # both pictures are compared, one, none
        step.scores = torch.tensor([[0.0, 2.0], [3.0, 0.0], [1.0, 4.0]]) * torch.tensor(spread)
    logs = []
    found = gradient_of(world, lambda: logs.append(learn(
        world.policy, Batch(world.contexts, steps, torch.zeros(2)), None, METHODS["spo"],
        {"beta": 10.0, "clip": 0.5, "margin": 0.3}, "", 0.0, 1.0)))

    def act():
        contexts = world.contexts
        ratio = log_probs_of(world, contexts, steps) - log_probs_of(world, contexts, steps, True)          # (3, K, R)
        logits = 10 * torch.stack([ratio[0, 1, 0] - ratio[0, 0, 0], ratio[0, 2, 1] - ratio[0, 1, 1],
                                   ratio[1, 1, 0] - ratio[1, 0, 0]])
        (-F.logsigmoid(logits).sum() / 6).backward()           # of two pictures' three steps
        assert logs[0]["loss"].item() == pytest.approx(-F.logsigmoid(logits).sum().item() / 6, rel=1e-4)
    assert_same(found, gradient_of(world, act))
    assert logs[0]["kept"] == 0.5


# Who looks on, and what cannot go on

def test_a_judge_that_falls_ends_the_run(options, program, own, tmp_path, capsys):
    """Its means are -3 -2 -1 0 -1 -2: the last two fell below the two before at step 6. The same again does nothing."""
    out = tmp_path / "run"
    run = [*options, "--method", "draft", "--sampler-steps", 1, "--judge", f"{own}:rises_and_falls", "--save-every", 4,
           "--steps", 20, "--out", out]
    assert program(train_online, *run, "--patience", 2) == 0
    assert "stopped at step 6" in capsys.readouterr().out
    assert [line["judge"] for line in lines_of(out)] == [-3, -2, -1, 0, -1, -2]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert program(train_online, *run, "--patience", 2) == 0
    assert "stopped at step 6" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert program(train_online, *run, "--patience", 4, "--steps", 7) == 0 and len(lines_of(out)) == 7


def test_a_judge_that_always_says_the_same_does_not_fall(options, program, own, tmp_path):
    """Nor where the steps before were read from a file: the mean of eight times 0.1 depends on how it is taken."""
    run = [*options, "--method", "refl", "--sampler-steps", 1, "--batch-size", 4, "--grad-accum", 2, "--judge",
           f"{own}:same", "--patience", 1, "--out", tmp_path / "run", "--steps"]
    assert program(train_online, *run, 1) == program(train_online, *run, 3) == 0
    assert len(lines_of(tmp_path / "run")) == 3
    for opinions, patience, falls in (([2, 1], 1, True), ([1], 1, False), ([1, 1], 1, False), ([3, 1, 2, 1], 2, True),
                                      ([3, 1, 2], 2, False), ([9, 1, 2, 2, 1], 2, False), ([2, 1], 0, False)):
        assert judge_falls([Told(0, 1, opinion) for opinion in opinions], patience) == falls


def test_what_has_nothing_to_learn_from_ends(options, program, own, tmp_path, capsys):
    """After five steps, and of one reward for all of them: a step of a single picture is no sign."""
    def refused(*arguments) -> str:
        capsys.readouterr()
        assert program(train_online, *options, "--steps", 9, "--sampler-steps", 1, *arguments) == 2
        return capsys.readouterr().err.splitlines()[-1]

    out, scorer = tmp_path / "same", ["--method", "ddpo", "--updates", 1, "--scorer", f"{own}:same"]
    for _ in range(2):
        assert "step 5: " in (error := refused(*scorer, "--save-every", 2, "--out", out)), error
        assert f"{own}:same has said 0.1 of every picture for 5 steps" in error
        assert len({line["step"] for line in lines_of(out, "rewards.jsonl")}) == 4
    limit = refused("--method", "draft", "--reward-limit", -5, "--out", tmp_path / "limit")
    assert "step 5: " in limit and "from --reward-limit -5 on" in limit
    single = ["--method", "draft", "--batch-size", 1, "--sampler-steps", 1, "--steps", 6, "--out", tmp_path / "single"]
    assert program(train_online, *options, *single) == 0


@pytest.mark.parametrize("method, words", [("ddpo", "2 finite scores expected"), ("draft", "the loss is nan")])
def test_a_reward_that_is_no_number_is_one_line(method, words, options, program, own, tmp_path, capsys):
    out = tmp_path / "run"
    run = [*options, "--method", method, "--scorer", f"{own}:Breaks", "--save-every", 1, "--out", out]
    assert program(train_online, *run, *(["--updates", 1] if method == "ddpo" else []), "--steps", 4) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("training ")]
    assert len(error) == 1 and words in error[0]
    state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == len(lines_of(out)) == 2 and all(p.isfinite().all() for p in state["parameters"])


# What is refused

@pytest.mark.parametrize("change, words", [
    (["ddpo", "--gradient-steps", 1], "--gradient-steps: --method ddpo has no such setting"),
    (["ddpo", "--reward-limit", 1], "--reward-limit: --method ddpo"), (["draft", "--kl", "gaussian"], "--kl: --method"),
    (["draft", "--updates", 1], "--updates: --method draft"), (["refl", "--clip", 0.1], "--clip: --method refl"),
    (["grpo", "--candidates", 3], "--candidates: --method grpo"), (["spo", "--candidates", 1], "--candidates 1: must"),
    (["ddpo", "--grad-accum", 3, "--updates", 2], "--updates 2: must divide --grad-accum 3"),
    (["draft", "--gradient-steps", 3], "--gradient-steps 3: a picture has --sampler-steps 2"),
    (["draft", "--gradient-steps", 0], "--gradient-steps 0: must be a whole number of 1 or more"),
    (["draft", "--gradient-steps", "some"], "--gradient-steps some: must"), (["ddpo", "--clip", 1], "--clip 1: must"),
    (["spo", "--patience", 3], "--patience: give --judge"), (["spo", "--dtype", "float16"], "small gradients vanish"),
    (["d3po", "--pictures", 3], "--pictures 3: d3po compares two"), (["grpo", "--pictures", 1], "--pictures 1: grpo"),
    (["ddpo", "--init-lora", "a", "--rank", 4], "--rank, --alpha: they are those"), (["ppo"], "invalid choice: 'ppo'"),
    (["draft", "--prompts", "none.txt"], "none.txt: no such prompt file"), (["draft", "--scorer", "no"], "no: no such"),
    (["draft", "--prediction-type", "v_prediction"], "predicts v; training is written for"),
    (["spo", "--sampler-steps", 1000], "--sampler-steps 1000: must be")], ids=lambda x: " ".join(map(str, x)))
def test_every_option_is_checked(change, words, options, program, tmp_path, capsys):
    assert program(train_online, *options, "--out", tmp_path / "run", "--method", *change) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_bad_input_is_one_line(options, program, tiny, own, tmp_path, capsys):
    def refused(*arguments) -> str:
        assert program(train_online, *options, "--out", tmp_path / "run", *arguments) == 2
        error, = capsys.readouterr().err.splitlines()
        return error

    assert f"{own}:red: no gradient" in refused("--method", "draft", "--scorer", f"{own}:red")
    model = shutil.copytree(tiny, tmp_path / "model")
    scheduler = model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"set_alpha_to_one": True}))
    for method in ("ddpo", "spo"):
        assert "set_alpha_to_one" in refused("--method", method, "--model", model, "--updates", 1)
    assert not (tmp_path / "run").exists()
    for name in ("Flat", "Summed"):
        assert "a reward is a number a picture, with a gradient" in refused(
            "--method", "draft", "--scorer", f"{own}:{name}")
        shutil.rmtree(tmp_path / "run")
    assert program(train_online, *options, "--method", "draft", "--model", model, "--steps", 1,
                   "--out", tmp_path / "run") == 0


def test_what_a_run_was_begun_with_stays(options, program, own, prompts, tmp_path, capsys, monkeypatch):
    """All its options that a result depends on, and the contents of its prompts, its scorer and its judge; and what it
    was told."""
    out, mine, words = tmp_path / "run", tmp_path / "mine.py", tmp_path / "words.txt"
    shutil.copy(own, mine)
    shutil.copy(prompts, words)
    run = [*options, "--prompts", words, "--scorer", f"{own}:Red", "--judge", f"{mine}:green", "--method", "draft",
           "--sampler-steps", 1, "--out", out, "--steps"]
    assert program(train_online, *run, 1) == 0
    noted = json.loads((out / "config.json").read_text())["options"].keys()
    free = {"out", "device", "vae", "patience", "updates", "epochs", "kl", "candidates", "batch_size", "grad_accum",
            "steps", "save_every", "sample_every", "lora_format", "gradient_checkpointing", "compile"}
    monkeypatch.setattr(sys, "argv", ["train_online.py", *map(str, [*run, 1])])
    assert vars(train_online.parse_args()).keys() - noted - train_online.OPTIONS.keys() == free
    renamed = shutil.copy(words, tmp_path / "renamed.txt")
    assert program(train_online, *run, 2, "--prompts", renamed, "--save-every", 3, "--patience", 9) == 0

    def refused(*change) -> str:
        capsys.readouterr()
        assert program(train_online, *run, 3, *change) == 2
        error, = capsys.readouterr().err.splitlines()
        return error

    assert "begun with --pictures-per-step 2, and now it is 4" in refused("--grad-accum", 2)
    assert f"begun with --scorer {own}:Red, and now it is 2*{own}:Red" in refused("--scorer", f"2*{own}:Red")
    words.write_text("a cat\n")
    assert "--prompts has other contents" in refused()
    shutil.copy(prompts, words)
    mine.write_text(OWN + "\n")
    assert "--judge has other contents" in refused()
    shutil.copy(own, mine)

    told = (out / "rewards.jsonl").read_text()
    first = told.splitlines(keepends=True)
    (out / "rewards.jsonl").unlink()
    assert "rewards.jsonl: not there" in refused()
    state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
    for words, kept in (("its lines are not those of the checkpoint", state),
                        ("not the rewards of the 2 steps, of 2 pictures each", state | {"logs": {}})):       # as once
        torch.save(kept, out / "checkpoint" / "state.pt")
        for damaged in ("".join(first[:2]), "".join([first[0], *first[2:], first[0]])):
            (out / "rewards.jsonl").write_text(damaged)
            assert f"rewards.jsonl: {words}" in refused(), damaged
    (out / "rewards.jsonl").write_text(told.replace('"reward"', '"rewards"', 1))
    assert "rewards.jsonl" in refused()
    (out / "rewards.jsonl").write_text(told)
    assert program(train_online, *run, 3) == 0 and len(lines_of(out)) == 3
