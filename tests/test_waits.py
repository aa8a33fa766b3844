"""On CUDA the host should run ahead of the device: it waits where a value is read back, and where a copy to the device
is not asynchronous. Neither needs a GPU to be seen: tensors on `meta` have no values, so that reading one fails, and a
tensor that was left on the CPU does not go together with them; and copies are counted as they are dispatched."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import train
from losses import LOSSES
from model.checkpoint import Pipeline, load_pipeline
from model.clip import CLIPTextEncoder
from model.lora import inject_lora
from model.unet import UNet
from model.vae import VAE
from sampling import SAMPLERS, Drawing, add_noise, decode, sample_latents

META = torch.device("meta")


def on_meta(name: Path, *_) -> Pipeline:
    """What is loaded is looked at, and so must have values at first."""
    pipeline = load_pipeline(name)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.to(META)
    return pipeline


class Waits(TorchDispatchMode):
    """Counts the copies to the device that the host waits for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.count += not (kwargs or {}).get("non_blocking")
        return out


@pytest.fixture
def data(tiny, tmp_path):
    """Ten pools of three pictures each, random."""
    g, folder, n = torch.Generator().manual_seed(0), tmp_path / "data", 10
    folder.mkdir()
    pool = torch.randn(n, 3, 4, 8, 8, generator=g).half()
    save_file({"latents_w": pool[:, 0].contiguous(), "latents_l": pool[:, 2].contiguous(), "pool": pool,
               "context": torch.randn(n, 77, 32, generator=g).half()}, folder / "shard-00000.safetensors")
    line = {"prompt": "x", "seeds": [0, 1, 2], "scores": [0.3, 0.2, 0.1], "winner": 0, "loser": 2}
    (folder / "pairs-00000.jsonl").write_text("".join(json.dumps(line | {"id": f"{i:06d}"}) + "\n" for i in range(n)))
    (folder / "dataset.json").write_text(json.dumps({
        "format": 1, "finished": True, "model": str(tiny), "context_width": 32, "scaling_factor": 0.18215,
        "shards": ["shard-00000.safetensors"]}))
    return folder


@pytest.mark.parametrize("loss", ["hg-dpo", "kto", "pro"])          # kinds of data; test_family has the losses
def test_training_waits_for_the_device_in_its_log_alone(loss, tiny, data, program, monkeypatch, tmp_path):
    """Which is written after the first step, which is checked at once, and then for ten steps together."""
    logged, waits = [], Waits()

    def log_lines(steps: list, seconds: float) -> list[dict]:
        logged.append(len(steps))
        zeros = dict.fromkeys(steps[0][2], 0.0) | LOSSES[loss].at_start
        return [{"step": step, **zeros, "lr": lr, "seconds": 0.0} for step, lr, _ in steps]

    def steps(numbers: range, *_) -> range:                    # what comes before the steps may wait
        waits.count = 0
        return numbers

    monkeypatch.setattr(train.cli, "device_and_dtype", lambda *_: (META, torch.float32))
    monkeypatch.setattr(train, "load_pipeline", on_meta)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())      # there is none on meta
    monkeypatch.setattr(train.cli, "progress", steps)
    monkeypatch.setattr(train, "log_lines", log_lines)
    for name in ("save_lora", "save_checkpoint"):              # they read everything back
        monkeypatch.setattr(train, name, lambda *_, **__: None)
    with waits:
        assert program(train, "--model", tiny, "--data", data, "--loss", loss, "--batch-size", 2, "--steps", 3,
                       "--ema", 0.9, "--out", tmp_path / "run") == 0
    assert logged == [1, 2] and waits.count == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_drawing_waits_for_nothing(name, tiny):
    """From the first noise, which comes from the CPU, to the latents."""
    pipeline = on_meta(tiny)
    drawing, waits = Drawing(steps=2, sampler=name).for_model(pipeline), Waits()
    inject_lora(pipeline.unet)
    context = torch.empty(2, 77, 32, device=META)
    with waits:
        for lan in (False, not SAMPLERS[name].stochastic):
            latents = sample_latents(pipeline, drawing, context, context, [0, 1], lan)
        assert latents.device == META and decode(pipeline, latents).shape == (2, 3, 32, 32)
    assert waits.count == 0


def test_sd15_at_the_papers_size_is_on_one_device():
    """A training step, text, a rollout, decoding."""
    with META:
        unet, vae, text_encoder = UNet().bfloat16().requires_grad_(False), VAE(), CLIPTextEncoder()
    parameters = inject_lora(unet)
    optimizer = train.make_optimizer("adamw", parameters, 1e-5)
    context = text_encoder(torch.zeros(1, 77, dtype=torch.long, device=META)).bfloat16()
    x0, t, alphas_cumprod = (torch.empty(shape, device=META) for shape in ((2, 4, 128, 88), 1, 1000))
    t, noise = t.long(), torch.empty_like(x0)
    x_t = add_noise(x0, noise, t.repeat(2), alphas_cumprod)
    predicted = train.predictions(unet, x_t, t.repeat(2), context.repeat(2, 1, 1), reference=True)
    loss, _ = LOSSES["hg-dpo"](
        {"beta": 2500.0, "lambda_stat": 1e4}, **predicted, noise=noise, timesteps=t, alphas_cumprod=alphas_cumprod)
    loss.backward()
    optimizer.step()
    assert all(p.grad.device == META and p.grad.shape == p.shape for p in parameters) and math.prod(loss.shape) == 1
    assert vae.decode(x0).shape == (2, 3, 1024, 704)
