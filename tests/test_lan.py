"""LAN (Eq. 7) against the literal thing: two networks and two of diffusers' schedulers, step by step together."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import nn

from model.checkpoint import load_pipeline
from model.lora import inject_lora, load_lora, lora_layers, save_lora
from sampling import (
    Drawing,
    encode_prompts,
    make_alphas_cumprod,
    sample_ddim,
    sample_dpm_solver,
    sample_lan,
    sample_latents,
)
from sampling.drawing import initial_noise
from sampling.lan import match_statistics

ALPHAS = make_alphas_cumprod({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
SEEDS, STEPS, GUIDANCE = [3, 4], 12, 5.0


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module")
def lora(tiny, tmp_path_factory):
    """A LoRA that does change the picture."""
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    unet = load_pipeline(tiny).unet
    inject_lora(unet, generator=torch.Generator().manual_seed(0))
    for i, layer in enumerate(lora_layers(unet).values()):
        nn.init.normal_(layer.lora_B["default"], std=0.3, generator=torch.Generator().manual_seed(i))
    save_lora(path, unet)
    return path


@torch.no_grad()
def test_lan_is_two_models_in_lock_step(tiny, lora):
    """Each guided by itself; after every step of diffusers' scheduler, AdaIN of the tuned latent to the base's."""
    base, tuned = load_pipeline(tiny), load_pipeline(tiny)
    load_lora(lora, tuned.unet, 0.8)
    uncond, cond = encode_prompts(["", "a photo of a cat"], base.tokenizer, base.text_encoder)[:, None].expand(
        -1, 2, -1, -1)

    schedulers = [DPMSolverMultistepScheduler.from_config(base.configs["scheduler"]) for _ in range(2)]
    noise, _ = initial_noise(SEEDS, 8, 8)
    x_base, x = noise.clone(), noise.clone()
    for scheduler in schedulers:
        scheduler.set_timesteps(STEPS)
    for t in schedulers[0].timesteps:
        stepped = []
        for pipeline, scheduler, latent in ((base, schedulers[0], x_base), (tuned, schedulers[1], x)):
            eps_uncond = pipeline.unet(latent, t.repeat(2), uncond)
            eps_cond = pipeline.unet(latent, t.repeat(2), cond)
            eps = eps_uncond + GUIDANCE * (eps_cond - eps_uncond)
            stepped.append(scheduler.step(eps, t, latent).prev_sample)
        x_base, x = stepped
        for b in range(2):
            for c in range(4):
                one, ref = x[b, c], x_base[b, c]
                x[b, c] = (one - one.mean()) / one.std() * ref.std() + ref.mean()

    drawing = Drawing(STEPS, GUIDANCE, 32, 32)
    ours = sample_latents(tuned, drawing, cond, uncond, SEEDS, lan=True)
    bare = sample_latents(base, drawing, cond, uncond, SEEDS)
    plain = sample_latents(tuned, drawing, cond, uncond, SEEDS)
    assert relative(ours, x) < 2e-5
    assert relative(bare, x_base) < 2e-5                                         # the base goes its own way
    assert relative(ours, plain) > 0.01 and relative(ours, bare) > 0.01          # and LAN is neither
    torch.testing.assert_close(ours.mean(dim=(2, 3)), bare.mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.std(dim=(2, 3)), bare.std(dim=(2, 3)), rtol=1e-4, atol=1e-4)


def samplers():
    scheduler = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
    return {
        "dpm++": lambda eps_fn, x, after: sample_dpm_solver(eps_fn, x, ALPHAS, 10, scheduler, after),
        "ddim": lambda eps_fn, x, after: sample_ddim(eps_fn, x, ALPHAS, 10, scheduler, after)}


def made_up(weight, bias):
    """A denoiser of no meaning that differs between pictures, channels and steps."""
    return lambda x, t: torch.tanh(weight * x + bias * torch.arange(1, 5).view(1, 4, 1, 1)) + t.view(-1, 1, 1, 1) / 1e4


@pytest.mark.parametrize("name", samplers())
def test_statistics_are_the_bases_after_every_step(name):
    x = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = []

    def sample(eps_fn, x, after_step):
        def recorded(x):
            steps.append(after_step(x))
            return steps[-1]
        return samplers()[name](eps_fn, x, recorded)

    result = sample_lan(sample, made_up(0.9, 0.3), made_up(0.8, -0.2), x)
    assert len(steps) == 10
    for step in steps:
        base, tuned = step.chunk(2)
        assert not torch.allclose(base, tuned)
        for statistic in (torch.mean, torch.std):
            torch.testing.assert_close(
                statistic(tuned, dim=(2, 3)), statistic(base, dim=(2, 3)), rtol=1e-12, atol=1e-12)
    base_alone = samplers()[name](made_up(0.8, -0.2), x, None)
    torch.testing.assert_close(steps[-1].chunk(2)[0], base_alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(steps[-1].chunk(2)[1], result)
    # Each picture has its own statistics: alone, it is the same.
    alone = sample_lan(samplers()[name], made_up(0.9, 0.3), made_up(0.8, -0.2), x[1:])
    torch.testing.assert_close(alone, result[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", samplers())
def test_with_equal_models_nothing_changes(name):
    x = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = made_up(0.9, 0.3)
    torch.testing.assert_close(
        sample_lan(samplers()[name], model, model, x), samplers()[name](model, x, None), rtol=1e-12, atol=1e-12)


def test_match_statistics_by_hand():
    x, x_ref = torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[10.0, 50.0]]]])
    assert match_statistics(x, x_ref).tolist() == [[[[10.0, 50.0]]]]
    x = torch.tensor([[[[3.0, 1.0]]]])
    assert match_statistics(x, x_ref).tolist() == [[[[50.0, 10.0]]]]
