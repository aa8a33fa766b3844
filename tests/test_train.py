"""train.py: a run that was killed, or split over processes, is the run that was not; bad data stops it with a line."""

import copy
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import train
from dataset.folder import locked
from dataset.reader import Pairs
from dataset.rows import same_length
from losses import lambda_for
from losses.table import Loss, Option
from model.checkpoint import load_pipeline
from model.errors import UserError
from model.files import write_pickle
from model.lora import ATTENTION_LINEARS, inject_lora, load_lora, save_lora
from model.unet import MidBlock, UNet
from training.memory import save_memory
from training.order import epoch_order, row_at
from training.run import resume

ROOT = Path(__file__).parent.parent
ROWS = 12


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    """A dataset of random latents, in two shards."""
    folder, g = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    for i in range(2):
        n = ROWS // 2
        shapes = {"latents_w": (n, 4, 8, 8), "latents_l": (n, 4, 8, 8), "context": (n, 77, 32)}
        shard = {name: torch.randn(shape, generator=g).half() for name, shape in shapes.items()}
        save_file(shard, folder / f"shard-{i:05d}.safetensors")
        (folder / f"pairs-{i:05d}.jsonl").write_text("".join(
            json.dumps({"id": f"{i * n + j:06d}", "prompt": f"prompt {i * n + j}"}) + "\n" for j in range(n)))
    (folder / "dataset.json").write_text(json.dumps({
        "format": 1, "finished": True, "model": str(tiny), "context_width": 32, "scaling_factor": 0.18215,
        "shards": ["shard-00000.safetensors", "shard-00001.safetensors"]}))
    return folder


@pytest.fixture(scope="module")
def pooled(data, tmp_path_factory):
    """The same with pools of three: the winner, the loser, and a picture of zeros."""
    folder = shutil.copytree(data, tmp_path_factory.mktemp("pooled") / "data")
    for i in range(2):
        shard = load_file(folder / f"shard-{i:05d}.safetensors")
        pool = torch.stack([shard["latents_w"], shard["latents_l"], shard["latents_w"] * 0], dim=1)      # (n, 3, ...)
        save_file({**shard, "pool": pool}, folder / f"shard-{i:05d}.safetensors")
        lines = [json.loads(line) for line in (folder / f"pairs-{i:05d}.jsonl").read_text().splitlines()]
        (folder / f"pairs-{i:05d}.jsonl").write_text("".join(json.dumps({
            **line, "seeds": [0, 1, 2], "scores": [float(line["id"]), 0.5, 0.1], "winner": 0, "loser": 2}) + "\n"
            for line in lines))
    return folder


@pytest.fixture
def options(tiny, data):
    return ["--model", tiny, "--data", data, "--lr", 1e-3, "--batch-size", 2, "--save-every", 2]


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def lora(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "lora.safetensors")


def test_a_run_writes_what_it_promises(options, program, tiny, tmp_path):
    """The log's first line is exact, the LoRA loads in diffusers and here alike, the early signs are there."""
    out = tmp_path / "run"
    assert program(train, *options, "--out", out, "--steps", 4, "--sample-every", 4, "--holdout", 3) == 0
    log = log_of(out)
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert {"step", "loss", "dpo", "stat", "implicit_accuracy", "grad_norm", "lr", "seconds"} <= log[0].keys()
    assert log[0]["dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[0]["stat"] == 0 and log[0]["implicit_accuracy"] == 0.5
    for name in ("config.json", "curves.png", "README.md", "checkpoint/state.pt", "samples/000004.png"):
        assert (out / name).is_file(), name
    signs = json.loads((out / "watch.jsonl").read_text().splitlines()[-1])
    assert {"held_out_implicit_accuracy", "held_out_mse_w_gain", "held_out_mse_l_gain", "mean_R"} <= signs.keys()

    ours = load_pipeline(tiny).unet
    load_lora(out / "lora.safetensors", ours)
    theirs = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    theirs.load_lora_weights(out, weight_name="lora.safetensors")
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([1, 999]), torch.randn(2, 77, 32)
    with torch.no_grad():
        a, b = ours(x, t, context), theirs.unet(x, t, context).sample
        assert (a - load_pipeline(tiny).unet(x, t, context)).abs().max() > 1e-4
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_training_learns_the_pairs(options, program, tmp_path):
    """On twelve pairs, again and again, the winners' error comes to fall by more than the losers'."""
    out = tmp_path / "run"
    assert program(train, *options, "--lr", 3e-3, "--out", out, "--steps", 80, "--loss", "dpo") == 0
    margin = [line["mse_w_gain"] - line["mse_l_gain"] for line in log_of(out)]
    assert abs(sum(margin[:5]) / 5) < 5e-4 < sum(margin[-30:]) / 30


def test_a_loss_gets_what_its_line_in_the_table_asks_for(options, pooled, program, tmp_path, monkeypatch):
    """Whole pools and the scorer's scores for one that asks for them, in one order; no pass of a reference that nobody
    wants; and a dataset that has none is refused."""
    seen = []

    def listwise(eps, noise, scores, tau=0.5):
        seen.append((len(eps), scores.tolist(), tau))
        return (eps - noise).square().mean(), {"scores": scores.mean()}

    monkeypatch.setitem(train.LOSSES, "listwise", Loss(listwise, {"tau": Option("")}, data="pool"))
    monkeypatch.setitem(train.OPTIONS, "tau", Option(""))
    passes = []
    predictions = train.predictions
    monkeypatch.setattr(train, "predictions", lambda unet, x_t, t, context, reference, compiled: passes.append(
        reference) or predictions(unet, x_t, t, context, reference, compiled))
    run = [*options, "--loss", "listwise", "--tau", 2, "--steps", 1]
    assert program(train, *run, "--data", pooled, "--out", tmp_path / "run") == 0
    (rows, scores, tau), = seen
    assert (rows, tau, passes) == (6, 2.0, [False])
    ids = [row_at(s, list(range(ROWS)), 0) for s in range(2)]
    assert torch.tensor(scores).allclose(torch.tensor([[float(i), 0.5, 0.1] for i in ids]))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["options"]["tau"] == 2.0
    batch, _ = Pairs([pooled], load_pipeline(options[1]), "pool").batch([3, 8], torch.device("cpu"), torch.float32)
    for row, part in enumerate(("latents_w", "latents_l")):
        of_pairs, _ = Pairs([pooled], load_pipeline(options[1])).batch([3, 8], torch.device("cpu"), torch.float32)
        assert torch.equal(batch.chunk(3)[row], of_pairs.chunk(2)[row]), part
    assert program(train, *run, "--out", tmp_path / "other") == 2


@pytest.mark.parametrize("name", train.LOSSES)
def test_every_loss_trains_and_takes_the_winners_error_besides(name, options, pooled, program, tmp_path):
    out = tmp_path / "run"
    run = [train, *options, "--data", pooled, "--loss", name, "--sft-weight", 0.5, "--batch-size", 4, "--out", out]
    assert program(*run, "--steps", 2) == 0
    first, second = log_of(out)
    own = first["dpo"] if name == "hg-dpo" else first["mse_w"] if name == "sft" else first[name]
    winners = 2 * (first["loss"] - own)                        # of noise by an untrained network: about 1
    assert 0.5 < winners < 2 and second["loss"] != first["loss"]
    assert winners == pytest.approx(first.get("mse_w", winners), rel=1e-4)
    assert any(tensor.any() for key, tensor in lora(out).items() if "lora_up" in key)


def test_labels_are_winners_and_losers_one_by_one(options, data, program, tiny, tmp_path, capsys):
    pipeline, cpu = load_pipeline(tiny), torch.device("cpu")
    single, pairs = Pairs([data], pipeline, "labels"), Pairs([data], pipeline)
    assert len(single.rows) == len(single.lines) == 2 * ROWS and single.lines[7]["id"] == "000003"
    assert single.labels([6, 7, 0]).tolist() == [1, -1, 1]
    assert torch.equal(single.batch([6, 7], cpu, torch.float32)[0], pairs.batch([3], cpu, torch.float32)[0])
    pictures = changed_shard(data, tmp_path / "pictures", lambda shard: shard.pop("latents_l"))
    assert program(train, *options, "--data", pictures, "--loss", "kto", "--out", tmp_path / "run") == 2
    assert "pictures without losers" in capsys.readouterr().err


def test_statistic_matching_holds_the_channel_means(options, program, tmp_path):
    drift = {}
    for weight in (0, 1e8):
        out = tmp_path / str(weight)
        assert program(train, *options, "--out", out, "--steps", 20, "--lambda-stat", weight) == 0
        drift[weight] = sum(line["stat"] for line in log_of(out)[-10:])
    assert drift[1e8] < 0.5 * drift[0]


@pytest.mark.parametrize("extra", [[], ["--loss", "sft", "--full", "--lr", 1e-4]], ids=["hg-dpo", "full sft"])
def test_killed_and_resumed_is_the_run_that_was_not(extra, options, program, tmp_path):
    """2 + 2 steps are 4, bit for bit, with a kill -9 somewhere behind the second."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert program(train, *options, *extra, "--out", straight, "--steps", 4) == 0
    command = [sys.executable, "train.py", *map(str, [*options, *extra, "--out", killed, "--steps", 400])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoint" / "state.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    reached = torch.load(killed / "checkpoint" / "state.pt", weights_only=True)["step"]
    steps = reached + 2
    (killed / "checkpoint" / ".state.pt.1.part").touch()         # as a kill leaves it
    assert program(train, *options, *extra, "--out", killed, "--steps", steps) == 0
    assert not list(killed.rglob("*.part"))
    if steps != 4:
        assert program(train, *options, *extra, "--out", straight, "--steps", steps) == 0
    written = "unet/diffusion_pytorch_model.safetensors" if extra else "lora.safetensors"
    assert (straight / written).read_bytes() == (killed / written).read_bytes()
    assert [line | {"seconds": 0} for line in log_of(straight)] == [line | {"seconds": 0} for line in log_of(killed)]
    if extra:
        UNet2DConditionModel.from_pretrained(killed / "unet")


def test_two_processes_are_one_with_twice_the_batch(options, program, tmp_path):
    """Under torchrun with gloo, begun where a run was killed at its first file; and so is one with two batches a
    step."""
    one, two, accumulated = (tmp_path / name for name in ("one", "two", "accumulated"))
    two.mkdir()
    (two / ".config.json.1.part").touch()
    steps = ["--steps", 3, "--batch-size"]
    assert program(train, *options, "--out", one, *steps, 4) == 0
    assert program(train, *options, "--out", accumulated, *steps, 2, "--grad-accum", 2) == 0
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py",
         *map(str, [*options, "--out", two, *steps, 2])],
        cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for other in (two, accumulated):
        assert lora(other).keys() == lora(one).keys()
        # As a whole: a single element whose gradient is near 0 may go either way under Adam.
        difference = sum((lora(other)[name] - tensor).square().sum() for name, tensor in lora(one).items())
        assert difference.sqrt() < 1e-3 * sum(tensor.square().sum() for tensor in lora(one).values()).sqrt()
        losses = [[line["loss"] for line in log_of(run)] for run in (one, other)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("extra", [
    ["--loss", "dpo"], ["--loss", "sft"], ["--gradient-checkpointing"], ["--dtype", "bfloat16"],
    ["--lora-format", "peft"]], ids=lambda extra: extra[-1])
def test_variants_run(extra, options, program, tmp_path):
    """Gradient checkpointing changes no number; bfloat16 keeps the LoRA in float32; the others run to their end."""
    assert program(train, *options, "--out", tmp_path / "run", "--steps", 2, *extra) == 0
    assert all(tensor.dtype == torch.float32 for tensor in lora(tmp_path / "run").values())
    if extra == ["--gradient-checkpointing"]:
        assert program(train, *options, "--out", tmp_path / "plain", "--steps", 2) == 0
        plain, run = (tmp_path / name / "lora.safetensors" for name in ("plain", "run"))
        assert plain.read_bytes() == run.read_bytes()


def bytes_kept(unet: UNet, inputs: tuple) -> int:
    """What autograd keeps (what a checkpoint keeps is an input of it) in one pass, forth and back."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or len(kept) - 1, lambda i: kept[i]):
        unet(*inputs).square().sum().backward()
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}.values())


def test_what_is_cheap_is_not_kept_for_the_backward_pass():
    """Computing it again changes no bit of a gradient, within gradient checkpointing neither."""
    plain = UNet((32, 64), (True, True), 1, 4, 32, 8)
    for parameter in inject_lora(plain, rank=4):
        nn.init.normal_(parameter)
    lean, leaner = copy.deepcopy(plain), copy.deepcopy(plain)
    save_memory(lean, gradient_checkpointing=False, compile=False)
    save_memory(leaner, gradient_checkpointing=True, compile=False)
    inputs = torch.randn(2, 4, 9, 7), torch.tensor([3, 500]), torch.randn(2, 77, 32)
    most, less, least = (bytes_kept(unet, inputs) for unet in (plain, lean, leaner))
    assert most > 1.2 * less and less > least
    for others in zip(*(unet.parameters() for unet in (plain, lean, leaner)), strict=True):
        assert all(other.grad is None or torch.equal(other.grad, others[0].grad) for other in others)
    assert sum(parameter.grad is not None for parameter in lean.parameters()) == 112


def test_starting_from_a_lora_keeps_the_bare_reference(options, program, tmp_path):
    assert program(train, *options, "--out", tmp_path / "first", "--steps", 2) == 0
    first = tmp_path / "first" / "lora.safetensors"
    assert program(train, *options, "--out", tmp_path / "second", "--steps", 2, "--init-lora", first) == 0
    assert log_of(tmp_path / "second")[0]["dpo"] != pytest.approx(math.log(2), abs=1e-7)


def changed(data: Path, folder: Path, **about) -> Path:
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    dataset = json.loads((data / "dataset.json").read_text()) | about
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


def test_a_nan_stops_the_run_with_the_pairs(options, program, data, tmp_path, capsys):
    """It names the step and the pairs, and what was saved before it stays."""
    bad = changed(data, tmp_path / "bad")
    shard = load_file(bad / "shard-00000.safetensors")
    shard["latents_l"][3] = float("nan")
    save_file(shard, bad / "shard-00000.safetensors")
    assert program(train, *options, "--data", bad, "--out", tmp_path / "run", "--steps", 30, "--save-every", 1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the loss is nan" in error and "000003" in error
    log = log_of(tmp_path / "run")
    assert all(math.isfinite(line["loss"]) for line in log)
    if log:
        assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["step"] == log[-1]["step"]


def test_sigterm_saves_first(options, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "train.py", *map(str, [*options, "--out", out, "--steps", 10_000, "--save-every", 5000])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out / "log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error
    assert torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"] == log_of(out)[-1]["step"]


class OneBlock(nn.Module):
    """Of a U-Net the middle alone: a whole one takes a compiler minutes."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, 32, 1), nn.Conv2d(32, 4, 1)
        self.mid_block = MidBlock(32, 8, 16, 4, 8)

    def forward(self, x_t, t, context):
        temb = torch.cos(t[:, None] * torch.arange(1, 9)).to(x_t.dtype)
        return self.conv_out(self.mid_block(self.conv_in(x_t), temb, context))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles with g++")
def test_a_compiled_step_begins_at_ln_2():
    """Policy and reference are one compiled graph, with one rounding: beta makes a logit of any other. In bfloat16,
    where two graphs differ by 0.016 here."""
    torch.manual_seed(0)
    unet = OneBlock().to(torch.bfloat16)
    parameters = [p.requires_grad_(True) for p in inject_lora(unet, rank=4)]
    save_memory(unet, gradient_checkpointing=False, compile=True)
    inputs = (torch.randn(4, 4, 16, 16), torch.tensor([3, 500] * 2), torch.randn(4, 77, 16, dtype=torch.bfloat16))
    eps, eps_ref = train.predictions(unet, *inputs, reference=True, compiled=True).values()
    assert torch.equal(eps, eps_ref) and eps.requires_grad and not eps_ref.requires_grad
    eps.float().square().sum().backward()
    with torch.no_grad():
        for parameter in parameters:
            assert parameter.grad.isfinite().all()
            parameter -= 0.1 * parameter.grad.sign()
    moved, same = train.predictions(unet, *inputs, reference=True, compiled=True).values()
    assert torch.equal(same, eps_ref) and not torch.equal(moved, eps)


def test_no_two_uses_share_random_numbers(tmp_path):
    """Not two purposes, not two seeds, not a step of one and a step of the other; and seeds may have 19 digits."""
    drawn = [train.step_and_noise(range(3), (4, 8, 8), seed, *purpose)[1][i]
             for seed in (0, 1, 10**14, 2**63 - 1) for purpose in ((), ("another",)) for i in range(3)]
    drawn += [train.step_and_noise(range(n, n + 1), (4, 8, 8), 0)[1][0] for n in (1_000_003, 1_000_004)]
    drawn += [torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]    # pictures'
    values = torch.stack([noise.flatten() for noise in drawn])
    assert len(values.flatten().unique()) > 0.999 * values.numel()
    assert epoch_order(50, 1, 0, "order") != epoch_order(50, 0, 1, "order")


def test_auto_is_the_rule_for_lambda(options, program, tmp_path):
    """10,000 at 88x128, and as much more as the latent is smaller: 8x8 here."""
    assert program(train, *options, "--out", tmp_path / "run", "--steps", 1, "--lambda-stat", "auto") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["lambda_stat"] == 10_000 * 88 * 128 / 64
    assert lambda_for(64, 64) == 27_500


def test_contexts_of_other_lengths_share_a_batch(tiny):
    """A longer prompt's context beside a short one's, which is repeated: the U-Net cannot tell."""
    unet, g = load_pipeline(tiny).unet, torch.Generator().manual_seed(0)
    contexts = [torch.randn(m, 32, generator=g) for m in (77, 154, 231)]
    batch, x = same_length(contexts), torch.randn(3, 4, 8, 8, generator=g)
    assert batch.shape == (3, 462, 32)
    with pytest.raises(UserError, match="of 1009, 1013 tokens cannot go together: .* they are 1,022,117 long"):
        same_length([torch.zeros(m, 1) for m in (1013, 1009, 1013)])
    with torch.no_grad():
        together = unet(x, torch.tensor([5, 500, 900]), batch)
        for i, (context, t) in enumerate(zip(contexts, (5, 500, 900))):
            torch.testing.assert_close(
                unet(x[i:i + 1], torch.tensor([t]), context[None])[0], together[i], atol=1e-5, rtol=1e-5)


def test_datasets_are_joined(options, program, data, tiny, tmp_path, capsys):
    def larger(shard):
        for part in ("latents_w", "latents_l"):
            shard[part] = shard[part].repeat(1, 1, 2, 2)

    def other(shard):
        shard["latents_w"] += 1

    second, pipeline = changed_shard(data, tmp_path / "second", other), load_pipeline(tiny)
    both, first = Pairs([data, second], pipeline), Pairs([data], pipeline)
    cpu, dtype = torch.device("cpu"), torch.float32
    for i in (7, ROWS + 7):
        batch, alone = both.batch([i], cpu, dtype)[0], first.batch([7], cpu, dtype)[0]
        assert torch.equal(batch, alone) == (i == 7)
    run = [train, *options, "--out", tmp_path / "run", "--steps", 1]
    assert program(*run, "--data", data, second) == 0
    assert f"{2 * ROWS} pairs of {data} and {second}" in capsys.readouterr().out
    assert program(*run, "--data", second, data) == 2
    assert "--data has other contents" in capsys.readouterr().err
    assert program(*run, "--data", data, changed_shard(data, tmp_path / "larger", larger)) == 2
    error = capsys.readouterr().err
    assert "its latents_w are [4, 16, 16], and those of" in error and error.count("\n") == 1


# Inputs that change, second processes, files that are damaged

def changed_shard(data: Path, folder: Path, change) -> Path:
    changed(data, folder)
    shard = load_file(folder / "shard-00001.safetensors")
    change(shard)
    save_file(shard, folder / "shard-00001.safetensors")
    return folder


def test_an_input_that_changed_under_its_name_is_refused(options, program, data, tiny, tmp_path, capsys):
    model, mine, lora = tmp_path / "model", changed(data, tmp_path / "data"), tmp_path / "lora.safetensors"
    shutil.copytree(tiny, model)
    assert program(train, *options, "--out", tmp_path / "first", "--steps", 1) == 0
    shutil.copy(tmp_path / "first" / "lora.safetensors", lora)
    run = [train, *options, "--model", model, "--data", mine, "--init-lora", lora, "--out", tmp_path / "run", "--steps"]
    assert program(*run, 1) == 0
    shutil.move(mine, tmp_path / "moved")
    run[run.index(mine)] = tmp_path / "moved"
    assert program(*run, 2) == 0                             # the same under another name

    def refused(option: str) -> None:
        capsys.readouterr()
        assert program(*run, 3) == 2
        assert f"--{option} has other contents" in capsys.readouterr().err

    old = {path: path.read_bytes() for path in (
        tmp_path / "moved" / "shard-00000.safetensors", model / "unet" / "diffusion_pytorch_model.safetensors", lora)}
    for (path, content), option in zip(old.items(), ("data", "model", "init-lora")):
        tensors = load_file(path)
        name = next(name for name in tensors if "lora_up" in name or "lora" not in name)
        save_file({**tensors, name: tensors[name] + 1}, path)
        refused(option)
        path.write_bytes(content)
    assert program(*run, 3) == 0


def test_a_run_is_one_process_or_torchrun(options, program, tmp_path, capsys):
    """A second process is refused; a run of two goes on in one that takes as many pairs a step."""
    out, two = tmp_path / "run", [*options, "--steps", 2, "--batch-size", 1]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py",
         *map(str, [*two, "--out", out])], cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    with locked(out):
        assert program(train, *options, "--out", out, "--steps", 4) == 2
        assert "another process is at work in it" in capsys.readouterr().err
    assert program(train, *options, "--out", out, "--steps", 4) == 0         # --batch-size 2
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 4]
    assert program(train, *options, "--out", out, "--steps", 6, "--batch-size", 1) == 2
    assert "--pairs-per-step 2, and now it is 1" in capsys.readouterr().err


def test_sigterm_to_torchrun_saves_the_step_that_it_is_at(options, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py",
         *map(str, [*options, "--out", out, "--steps", 10_000, "--save-every", 5000])], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out / "log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    error = process.communicate(timeout=60)[1]
    assert "train.py: stopped; what was finished is saved" in error
    log = log_of(out)
    assert torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"] == log[-1]["step"] == len(log)


def test_a_run_goes_on_behind_a_cut_line_and_loses_no_sample(options, program, interrupted, tmp_path):
    """A disk that was full cut the log; Ctrl-C came at a step with a sample."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    command = [*options, "--sample-every", 3, "--holdout", 2, "--save-every", 50]
    assert program(train, *command, "--out", straight, "--steps", 5) == 0
    with interrupted(train, 3, signal.SIGINT):
        assert program(train, *command, "--out", stopped, "--steps", 5) == 130
    assert len(log_of(stopped)) == 3
    with open(stopped / "log.jsonl", "a") as log:
        log.write('{"step": 4, "loss": 0.6')
    assert program(train, *command, "--out", stopped, "--steps", 5) == 0
    for name in ("watch.jsonl", "samples/000003.png", "lora.safetensors"):
        assert (straight / name).read_bytes() == (stopped / name).read_bytes()
    assert [line["loss"] for line in log_of(stopped)] == [line["loss"] for line in log_of(straight)]


def test_damaged_files_are_one_line(options, program, data, tmp_path, capsys):
    """Of a dataset and of a run: keys, types, shapes, order, cuts; never a traceback, never silence."""
    out = tmp_path / "run"
    assert program(train, *options, "--out", out, "--steps", 1) == 0

    def damaged(folder: Path, name: str, content) -> str:
        path = folder / name
        before = path.read_bytes()
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content(before) if callable(content) else content)
        capsys.readouterr()
        where = ["--out", tmp_path / "new"] if folder != out else ["--out", out]
        code = program(train, *options, "--data", data if folder == out else folder, *where, "--steps", 2)
        error = capsys.readouterr().err.splitlines()
        path.write_bytes(before)
        assert code == 2 and not (tmp_path / "new").exists(), (name, content, code, error)
        return error[-1]

    mine, pairs = changed(data, tmp_path / "data"), b'{"id": "000006", "prompt": "a"}\n'
    for content in (None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": 9, "finished": true}',
                    lambda old: old.replace(b'"shards"', b'"parts"'), lambda old: old.replace(b"shard-0", b"../s-0"),
                    lambda old: old.replace(b"shard-0", b"\\u0000-0"), lambda old: old.replace(b"shard-0", b"\\ud83d"),
                    lambda old: old.replace(b'"context_width": 32', b'"context_width": "32"'),
                    lambda old: old.replace(b'"finished"', b'"files": {"shard-00000.safetensors": "0"}, "finished"'),
                    lambda old: old.replace(b'"finished"', b'"files": [], "finished"')):
        assert re.search("dataset.json: |shard-00000.safetensors: not as", damaged(mine, "dataset.json", content))
    for content in (None, pairs, pairs * 7, pairs * 5 + b"{", pairs * 5 + b'{"id": 7, "prompt": "a"}', b"\xff" * 9):
        damaged(mine, "pairs-00001.jsonl", content)
    damaged(mine, "shard-00000.safetensors", None)
    damaged(mine, "shard-00000.safetensors", b"<html>")
    for i, change in enumerate((
            lambda shard: shard.pop("context"), lambda shard: shard.pop("latents_w"),
            lambda shard: shard.update(latents_l=shard["latents_l"][:, :, :4].contiguous()),
            lambda shard: shard.update(latents_w=shard["latents_w"][:5].contiguous()),
            lambda shard: shard.update(latents_w=shard["latents_w"].int()),
            lambda shard: shard.update(latents_w=shard["latents_w"].to(torch.float8_e5m2)),
            lambda shard: shard.update(pool=shard["latents_w"].clone()),
            lambda shard: shard.update(context=shard["context"].int()),
            lambda shard: shard.update(context=shard["context"][:, :0].contiguous()),
            lambda shard: shard.update(context=shard["context"][..., :8].contiguous()))):
        folder = changed_shard(data, tmp_path / f"shard{i}", change)
        assert program(train, *options, "--data", folder, "--out", tmp_path / "new") == 2
        assert "shard-00001.safetensors" in capsys.readouterr().err and not (tmp_path / "new").exists()

    for content in (b"", b"cut", lambda old: old[:-100]):
        assert "not this run's checkpoint" in damaged(out, "checkpoint/state.pt", content)

    def flipped(old: bytes) -> bytes:                          # a bit of a number
        weight = next(tensor for name, tensor in lora(out).items() if "lora_down" in name)
        at = old.index(weight.numpy().tobytes())
        return old[:at] + bytes([old[at] ^ 1]) + old[at + 1:]
    assert "has changed since it was written" in damaged(out, "checkpoint/state.pt", flipped)

    def other_state(key: str, value) -> bytes:
        state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
        torch.save(state | {key: value(state[key])}, file := io.BytesIO())
        return file.getvalue()
    for key, value in (("step", lambda _: -1), ("parameters", lambda old: old[:-1]),
                       ("parameters", lambda old: [old[0].to("meta"), *old[1:]]),
                       ("parameters", lambda old: [old[0].to_sparse(), *old[1:]]), ("logs", lambda _: "x")):
        assert "not this run's checkpoint" in damaged(out, "checkpoint/state.pt", other_state(key, value))
    for content in (b"{}", b"[]", b'{"format": 1}', lambda old: old[:-20]):
        assert "config.json" in damaged(out, "config.json", content)
    assert "log.jsonl, line 1" in damaged(out, "log.jsonl", b"<html>\n")
    for content in (b"", lambda old: old.replace(b'"loss": 0.', b'"loss": 1.'),
                    lambda old: old.replace(b'"loss"', b'"lass"')):
        assert "log.jsonl: its lines are not those of the checkpoint" in damaged(out, "log.jsonl", content)
    assert "log.jsonl: the line of step 1 is damaged" in damaged(
        out, "log.jsonl", lambda old: old.replace(b'"loss": ', b'"loss": null, "a": '))
    assert "log.jsonl: not there" in damaged(out, "log.jsonl", None)
    other = tmp_path / "other"
    assert program(train, *options, "--out", other, "--steps", 1, "--seed", 5) == 0
    assert "not this run's checkpoint (of another run)" in damaged(
        out, "checkpoint/state.pt", (other / "checkpoint" / "state.pt").read_bytes())
    assert program(train, *options, "--out", out, "--steps", 2) == 0


def test_what_a_checkpoint_says_of_the_optimizer(tmp_path, monkeypatch):
    """Moments of other parameters are refused; its settings are not the file's to say. So with every torch: the pickle
    is the program's own."""
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.6.0+cpu"))

    def trained(steps: int, start: Tensor) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([parameter], lr=0.1)
        for _ in range(steps):
            parameter.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return parameter, optimizer

    def resumed(state: dict) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        write_pickle(tmp_path / "checkpoint" / "state.pt", state)
        parameter, optimizer = trained(0, torch.zeros(2, 3))
        assert resume(tmp_path, "a", [parameter], [], optimizer, rank=0) == 1
        return parameter, optimizer

    one, optimizer = trained(1, torch.ones(2, 3))
    kept, groups = (optimizer.state_dict()[key] for key in ("state", "param_groups"))
    state = {"run": "a", "step": 1, "parameters": [one.detach()], "optimizer": {
        "state": kept, "param_groups": [groups[0] | {"betas": ["x"], "weight_decay": 1e30}]}}
    again, optimizer = resumed(state)
    again.square().sum().backward()
    optimizer.step()
    assert torch.equal(again, trained(2, torch.ones(2, 3))[0])
    for moments in ({0: kept[0] | {"exp_avg": torch.zeros(3, 2)}}, {0: kept[0] | {"exp_avg_sq": None}},
                    {0: kept[0] | {"exp_avg": kept[0]["exp_avg"].to_sparse()}}, {0: kept[0] | {"step": torch.ones(2)}},
                    {0: kept[0] | {"step": "7"}},
                    {0: kept[0] | {"step": torch.ones(1).to_sparse()}},
                    {0: {"step": torch.ones(()), "x": kept[0]["exp_avg"]}},
                    {"0": kept[0]}, {1: kept[0]}, {0: 7}, [kept[0]], None):
        with pytest.raises(UserError, match="not this run's checkpoint .*; put the right one back, or remove"):
            resumed(state | {"optimizer": {"state": moments, "param_groups": groups}})


@pytest.mark.parametrize("change, words", [
    (["--holdout", -1], "--holdout -1: must be a whole number of 0 or more"), (["--holdout", 1], "give --sample-every"),
    (["--warmup", -1], "--warmup -1"), (["--lambda-stat", -1], "--lambda-stat -1: must be a number of at least 0"),
    (["--lambda-stat", "nan"], "--lambda-stat nan"), (["--lr", "inf"], "--lr inf"), (["--beta", 0], "--beta 0"),
    (["--dtype", "float16"], "small gradients vanish"), (["--device", "meta"], "must be auto, cpu, cuda"),
    (["--seed", -1], "--seed -1"), (["--seed", 2**63], "from 0 to"), (["--steps", "1e3"], "--steps 1e3"),
    (["--rank", 0], "--rank 0"), (["--loss", "sft", "--full", "--init-lora", "a"], "--init-lora a: --full"),
    (["--init-lora", "a", "--rank", 64], "--rank 64: it is that of --init-lora's file"),
    (["--loss", "sft", "--full", "--rank", 4], "--full trains no LoRA"),
    (["--loss", "mapo", "--full", "--sample-every", 1, "--holdout", 1], "--full has no reference to compare with"),
    (["--loss", "kto", "--sample-every", 1, "--holdout", 1], "--loss kto learns from no pairs"),
    (["--loss", "rwr", "--top", 0.5, "--reward-scale", 2], "--top goes without --reward-scale")], ids=str)
def test_every_option_is_checked(change, words, options, program, tmp_path, capsys):
    assert program(train, *options, "--out", tmp_path / "run", *change) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_lora_to_start_from_is_what_is_trained(options, program, tiny, tmp_path, capsys):
    """Its rank and alpha are the run's; one that covers more than is trained here is refused."""
    def written(name: str, targets: tuple[str, ...], **text) -> Path:
        pipeline = load_pipeline(tiny)
        inject_lora(pipeline.unet, rank=3, alpha=6.0, targets=targets)
        save_lora(tmp_path / name, pipeline.unet)
        save_file({**load_file(tmp_path / name), **text}, tmp_path / name)
        return tmp_path / name

    mine, out = written("mine", ATTENTION_LINEARS), tmp_path / "run"
    assert program(train, *options, "--out", out, "--steps", 1, "--init-lora", mine) == 0
    assert "| rank | 3 |\n| alpha | 6.0 |" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["options"]["dtype"] == "float32"          # what auto was
    assert {t.item() for name, t in lora(out).items() if name.endswith(".alpha")} == {6.0}
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_"
    more = {f"{text}down.weight": torch.ones(3, 32), f"{text}up.weight": torch.ones(32, 3)}
    for name, targets, extra, word in (
            ("wide", ("to_q", "ff.net.2"), {}, "ff.net.2"), ("text", ("to_q",), more, "text")):
        start = written(name, targets, **extra)
        assert program(train, *options, "--out", tmp_path / name[0], "--steps", 1, "--init-lora", start) == 2
        assert word in capsys.readouterr().err


def test_bad_input_is_one_line(options, program, data, pooled, tmp_path, capsys):
    def refused(*arguments) -> str:
        assert program(train, *options, *arguments) == 2
        return capsys.readouterr().err.splitlines()[-1]

    out = tmp_path / "run"
    assert "dataset.json: not there" in refused("--data", tmp_path / "none", "--out", out)
    assert "not finished" in refused("--data", changed(data, tmp_path / "a", finished=False), "--out", out)
    assert "context_width is 768; " in refused("--data", changed(data, tmp_path / "b", context_width=768), "--out", out)
    assert "scaling_factor" in refused("--data", changed(data, tmp_path / "c", scaling_factor=0.5), "--out", out)
    cut = changed(data, tmp_path / "d")
    (cut / "shard-00001.safetensors").write_bytes((data / "shard-00001.safetensors").read_bytes()[:-100])
    assert "shard-00001.safetensors: " in refused("--data", cut, "--out", out)
    assert "--lr 0: must be a number of more than 0" in refused("--lr", 0, "--out", out)
    assert "--full is for --loss sft" in refused("--full", "--out", out)
    assert "--holdout 12" in refused("--holdout", 12, "--sample-every", 1, "--out", out)
    (data_of_previews := changed(pooled, tmp_path / "e")).joinpath("pairs-00001.jsonl").write_text(
        (pooled / "pairs-00001.jsonl").read_text().replace("0.5, 0.1", "null, 0.1"))
    assert "drawn with previews" in refused("--data", pooled, data_of_previews, "--loss", "pro", "--out", out)
    few = changed_shard(pooled, tmp_path / "f", lambda shard: shard.update(pool=shard["pool"][:, :2].contiguous()))
    assert "expected, with a score for each" in refused("--data", few, "--loss", "pro", "--out", out)
    for i, score in enumerate(("NaN", "-Infinity", "1" + "0" * 400)):
        (unscored := changed(pooled, tmp_path / f"score{i}")).joinpath("pairs-00001.jsonl").write_text(
            (pooled / "pairs-00001.jsonl").read_text().replace("0.5, 0.1", f"{score}, 0.1"))
        assert "as many finite scores" in refused("--data", unscored, "--loss", "pro", "--out", out)
    assert not out.exists()

    # What depends on which pictures are compared is another run with others.
    together = ["--loss", "kto", "--out", tmp_path / "kto", "--steps"]
    assert program(train, *options, *together, 1) == 0
    assert "--pairs-together 2, and now it is 1" in refused(*together, 2, "--batch-size", 1, "--grad-accum", 2)
    assert program(train, *options, "--out", out, "--steps", 1) == 0
    assert "--beta 2500.0, and now it is 100.0" in refused("--out", out, "--beta", 100)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    assert "holds other files, and no config.json" in refused("--out", tmp_path / "other")


def test_the_rate_falls_and_the_average_lags(options, program, tmp_path):
    """--lr-schedule falls to nothing over --steps, which then are a part of what the run is; --ema saves the moving
    average; both go on bit for bit; --sft-weight adds the winners' error."""
    extra = ["--lr-schedule", "cosine", "--ema", 0.9, "--sft-weight", 2.0, "--loss", "dpo"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert program(train, *options, *extra, "--steps", 4, "--out", whole) == 0
    log = log_of(whole)
    assert [line["lr"] for line in log] == pytest.approx([1e-3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])
    assert log[0]["loss"] == pytest.approx(log[0]["dpo"] + 2 * log[0]["mse_w"], rel=1e-6)
    state = torch.load(whole / "checkpoint" / "state.pt")
    ups = [tensor for name, tensor in lora(whole).items() if "lora_up" in name]
    assert ups[0].abs().max() > 0 and not torch.equal(ups[0], state["parameters"][1])
    assert len(state["average"]) == len(state["parameters"])

    def killed(*args):
        raise KeyboardInterrupt
    monkey = pytest.MonkeyPatch()
    calls = []
    clip = nn.utils.clip_grad_norm_
    monkey.setattr(train.nn.utils, "clip_grad_norm_", lambda *args: clip(*args) if calls.append(1) or len(calls) < 4
                   else killed())
    assert program(train, *options, *extra, "--steps", 4, "--out", halves) == 130
    monkey.undo()
    assert program(train, *options, *extra, "--steps", 4, "--out", halves) == 0
    assert (halves / "lora.safetensors").read_bytes() == (whole / "lora.safetensors").read_bytes()
    assert program(train, *options, *extra, "--steps", 5, "--out", whole) == 2            # another schedule
    assert program(train, *options, "--steps", 4, "--loss", "dpo", "--out", whole) == 2   # what was noted is left away
