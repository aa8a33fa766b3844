"""Schedules and samplers against diffusers' schedulers, against numbers written down once, and against mathematics."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

from sampling import (
    add_noise,
    ddim_step,
    ddpm_step,
    dpm_solver_schedule,
    dpm_solver_step,
    eps_from_v,
    guided_eps,
    make_alphas_cumprod,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    timesteps,
    x0_from_eps,
)

# The official scheduler_config.json, complete: it says nothing of timestep_spacing and prediction_type.
SD15 = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False}
ALPHAS = make_alphas_cumprod(SD15)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")       # diffusers, with a newer numpy
ORACLES = {"dpm": DPMSolverMultistepScheduler, "ddim": DDIMScheduler, "ddpm": DDPMScheduler}
COUNTS = (1, 2, 3, 10, 14, 15, 20, 50, 250, 500, 999, 1000)

# The official file leaves the spacing to each scheduler's own default; only "leading" reads steps_offset.
LINSPACE, TRAILING, LEADING = ({"timestep_spacing": kind} for kind in ("linspace", "trailing", "leading"))
SPACINGS = {
    "official": {}, "linspace": LINSPACE, "trailing": TRAILING, "leading": LEADING,
    "leading from 0": {**LEADING, "steps_offset": 0}}
SPACING = pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)


@pytest.fixture
def oracle(tmp_path):
    def make(name, changes=(), steps=None):
        """The scheduler that a person gets: the file, read as what it says it is, then `from_config`."""
        (tmp_path / "scheduler_config.json").write_text(json.dumps({**SD15, **dict(changes)}))
        scheduler = ORACLES[name].from_config(PNDMScheduler.from_pretrained(tmp_path).config)
        if steps:
            scheduler.set_timesteps(steps)
        return scheduler
    return make


def toy_unet(x, t, context):
    return 0.8 * x + 0.1 * torch.sin(t.float() / 100)[:, None, None, None]


def toy_eps(x, t):
    return toy_unet(x, t, None)


def start(batch=2, dtype=torch.float32):
    return torch.randn((batch, 4, 2, 2), generator=torch.Generator().manual_seed(0), dtype=dtype)


def generators(n=2):
    return [torch.Generator().manual_seed(7 + i) for i in range(n)]


def theirs(scheduler, x):
    """The loop of diffusers' pipeline; None where the scheduler itself crashes or divides by a step of length 0."""
    draws = {"generator": generators()} if isinstance(scheduler, DDPMScheduler) else {}
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(toy_eps(x, t.expand(len(x))), t, x, **draws).prev_sample
    except IndexError:
        return None
    return x if torch.isfinite(x).all() and scheduler.timesteps[-1] >= 0 else None


def ours(name, x, steps, config, eps_fn=toy_eps, after_step=None):
    if name == "dpm":
        return sample_dpm_solver(eps_fn, x, ALPHAS, steps, config, after_step)
    if name == "ddim":
        return sample_ddim(eps_fn, x, ALPHAS, steps, config, after_step)
    return sample_ddpm(eps_fn, x, ALPHAS, steps, config, generators(len(x)), after_step)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# The schedule

def test_alphas_cumprod_is_diffusers(oracle):
    for changes in ({}, {"beta_schedule": "linear"}, {"trained_betas": torch.linspace(1e-4, 2e-2, 1000).tolist()}):
        assert torch.equal(make_alphas_cumprod({**SD15, **changes}), oracle("ddpm", changes).alphas_cumprod)
    assert torch.equal(make_alphas_cumprod({}), DDPMScheduler().alphas_cumprod)
    golden = {0: 0.99914998, 1: 0.99829602, 20: 0.98131430, 500: 0.27633247, 981: 0.00577550, 999: 0.00466010}
    assert [ALPHAS[t].item() for t in golden] == pytest.approx(list(golden.values()), abs=5e-9)
    sigmas = ((1 - ALPHAS) / ALPHAS).sqrt()
    assert [sigmas.max().item(), sigmas.min().item()] == pytest.approx([14.614647, 0.02916753], rel=1e-6)


@SPACING
def test_dpm_schedule_is_diffusers_for_every_count(oracle, spacing):
    """Bit for bit. Near 1000 diffusers visits a step twice (and then divides by 0) or begins at 1000; ours are a few
    less. For 61 and some others its "trailing" rounds to one step too many, t = -1; ours has it not."""
    config, scheduler = {**SD15, **spacing}, oracle("dpm", spacing)
    for n in range(1, 1001):
        scheduler.set_timesteps(n)
        ts, sigmas = dpm_solver_schedule(n, ALPHAS, config)
        wanted, wanted_sigmas = scheduler.timesteps.tolist(), scheduler.sigmas
        if wanted[-1] < 0:
            wanted, wanted_sigmas = wanted[:-1], torch.cat([wanted_sigmas[:-2], wanted_sigmas[-1:]])
            assert len(ts) == n
        if wanted[0] <= 999 and len(set(wanted)) == len(wanted):
            assert ts == wanted and torch.equal(sigmas, wanted_sigmas), n
        else:
            assert n >= 999 and len(ts) >= n - 2
        assert sigmas.dtype == torch.float32 and len(sigmas) == len(ts) + 1
        assert 999 >= ts[0] and ts[-1] >= 0 and (sigmas.diff() < 0).all(), n


@SPACING
def test_ddpm_and_ddim_timesteps_are_diffusers_for_every_count(oracle, spacing):
    config = {**SD15, **spacing}
    for name in ("ddpm", "ddim"):
        scheduler = oracle(name, spacing)
        for n in range(1, 1001):
            scheduler.set_timesteps(n)
            ts, wanted = timesteps(n, config), scheduler.timesteps.tolist()
            wanted = [t - (wanted[0] - 999) for t in wanted] if wanted[0] > 999 else wanted  # theirs begins at 1000
            assert len(ts) == n and ts == wanted[:n] and wanted[n:] in ([], [-1]), n


def test_options_of_the_schedule(oracle):
    karras = {"use_karras_sigmas": True}
    for n in (1, 2, 10, 20, 50, 333, 1000):
        scheduler = oracle("dpm", karras, n)
        ts, sigmas = dpm_solver_schedule(n, ALPHAS, {**SD15, **karras})
        assert ts == scheduler.timesteps.tolist() and torch.equal(sigmas, scheduler.sigmas)
    for sample in (dpm_solver_schedule, lambda n, _, config: timesteps(n, config)):
        with pytest.raises(ValueError, match="timestep_spacing 'even'"):
            sample(10, ALPHAS, {"timestep_spacing": "even"})
    with pytest.raises(ValueError, match="beta_schedule"):
        make_alphas_cumprod({"beta_schedule": "squaredcos_cap_v2"})


# Numbers written down once

X = torch.tensor([1, -0.5, 0.25, 2]).reshape(1, 4, 1, 1)
GOLDEN = [
    ("dpm", 50, {}, [0.919789, -0.548218, 0.185786, 1.898461]),
    ("dpm", 20, {}, [0.90534, -0.55131, 0.177015, 1.87644]),
    ("dpm", 10, {}, [0.876967, -0.555791, 0.160588, 1.832139]),
    ("dpm", 50, LEADING, [0.85848, -0.530486, 0.163997, 1.784456]),
    ("dpm", 50, TRAILING, [0.920272, -0.548208, 0.186033, 1.89926]),
    ("dpm", 50, {"final_sigmas_type": "sigma_min"}, [0.960055, -0.56078, 0.199638, 1.973946]),
    ("dpm", 20, {"use_karras_sigmas": True}, [0.920599, -0.54664, 0.18698, 1.898759]),
    ("ddim", 50, {}, [0.925775, -0.558393, 0.183691, 1.915218]),
    ("ddim", 50, {"set_alpha_to_one": True}, [0.904334, -0.545508, 0.179413, 1.870895]),
]


@pytest.mark.parametrize("name, steps, changes, expected", GOLDEN)
def test_golden_trajectories(name, steps, changes, expected):
    # Printed to six places, from float32 kernels that round otherwise where there is no AVX-512. Over a whole
    # trajectory float32 is held to 1e-5 everywhere here.
    found = ours(name, X, steps, {**SD15, **changes}).flatten().tolist()
    assert found == pytest.approx(expected, rel=1e-5, abs=5e-7)


def test_golden_steps():
    means = {
        999: [0.9970219, -0.4975387, 0.2497416, 1.9933957], 500: [0.9984213, -0.4983945, 0.2500134, 1.9962988],
        1: [0.9838296, -0.4919458, 0.2459418, 1.9676797], 0: [0.9770913, -0.4885456, 0.2442728, 1.9541825]}
    for t, expected in means.items():
        mean = ddpm_step(toy_eps(X, torch.tensor([t])), X, t, t - 1, ALPHAS)
        assert mean.flatten().tolist() == pytest.approx(expected, rel=1e-6)      # a few roundings of float32

    def variance(t, t_prev):                    # from zeros and a noise of ones a step goes to its own deviation
        zero = torch.zeros_like(X, dtype=torch.float64)
        return ddpm_step(zero, zero, t, t_prev, ALPHAS, torch.ones_like(zero)).square().mean().item()

    thousand = {1: 4.263489e-4, 2: 5.716266e-4, 500: 4.806027e-3, 999: 1.1999401e-2}
    assert [variance(t, t - 1) for t in thousand] == pytest.approx(list(thousand.values()), rel=1e-6)
    fifty = {(981, 961): 0.20653692, (501, 481): 0.08689801, (21, 1): 1.5586396e-3, (1, -1): 1e-20}
    assert [variance(*step) for step in fifty] == pytest.approx(list(fifty.values()), rel=1e-6)

    noised = add_noise(X, torch.ones_like(X), torch.tensor([500]), ALPHAS)
    assert noised.flatten().tolist() == pytest.approx([1.3763598, 0.5878499, 0.9821048, 1.9020331], rel=1e-6)


def test_golden_schedules():
    ts, sigmas = dpm_solver_schedule(50, ALPHAS, SD15)
    assert ts[:2] == [999, 979] and ts[23:27] == [539, 519, 500, 480] and ts[-2:] == [40, 20]
    assert sigmas[[0, 1, 49, 50]].tolist() == pytest.approx([14.6146, 12.9663, 0.13799, 0], abs=1e-4)
    ts, sigmas = dpm_solver_schedule(50, ALPHAS, {**SD15, **LEADING})
    assert ts[:3] == [951, 932, 913] and ts[-2:] == [39, 20] and sigmas[0].item() == pytest.approx(11.0283, abs=1e-4)
    ts, _ = dpm_solver_schedule(20, ALPHAS, {**SD15, "use_karras_sigmas": True})
    assert ts == [999, 962, 921, 876, 827, 772, 710, 640, 561, 474, 380, 285, 197, 123, 69, 35, 15, 6, 2, 0]
    ts = timesteps(50, SD15)
    assert ts[:2] == [981, 961] and ts[-2:] == [21, 1]
    assert timesteps(1000, SD15) == list(range(999, -1, -1))


# Whole trajectories

# Less what each one's default is, which the official file stands for.
DEFAULTS = {("dpm", "linspace"), ("ddim", "leading"), ("ddpm", "leading")}
TRAJECTORIES = [(name, spacing) for name in ORACLES for spacing in SPACINGS if (name, spacing) not in DEFAULTS]


@pytest.mark.parametrize("name, spacing", TRAJECTORIES)
def test_trajectories_are_diffusers(oracle, name, spacing):
    spacing = SPACINGS[spacing]
    for steps in COUNTS:
        x = start()
        mine, expected = ours(name, x, steps, {**SD15, **spacing}), theirs(oracle(name, spacing, steps), x)
        assert torch.equal(x, start()) and torch.isfinite(mine).all(), steps
        if expected is None:
            assert steps >= 999
        else:
            assert relative(mine, expected) < 1e-5, steps


@pytest.mark.parametrize("changes", [
    {"final_sigmas_type": "sigma_min"}, {"final_sigmas_type": "sigma_min", "euler_at_final": True},
    {"final_sigmas_type": "sigma_min", "lower_order_final": False}, {"lower_order_final": False},
    {"use_karras_sigmas": True}, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", **LEADING},
], ids=str)
def test_options_of_dpm_solver_are_diffusers(oracle, changes):
    results = []
    for steps in (1, 2, 3, 14, 15, 20):
        results.append(ours("dpm", start(), steps, {**SD15, **changes}))
        assert relative(results[-1], theirs(oracle("dpm", changes, steps), start())) < 1e-5, steps
    assert relative(results[-1], ours("dpm", start(), 20, SD15)) > 1e-4 or changes == {"lower_order_final": False}


@pytest.mark.parametrize("name", ORACLES)
def test_v_prediction_is_diffusers(oracle, name):
    context = torch.zeros(2, 1, 1)
    eps_fn = guided_eps(toy_unet, context, context, 1.0, ALPHAS)
    for spacing in (LINSPACE, LEADING, TRAILING):
        changes = {**spacing, "prediction_type": "v_prediction"}
        for steps in (1, 2, 15, 50):
            mine = ours(name, start(), steps, {**SD15, **changes}, eps_fn)
            assert relative(mine, theirs(oracle(name, changes, steps), start())) < 1e-5, (spacing, steps)
    # Karras' noise levels lie between those of the table: v becomes eps at the rounded t, which is all a U-Net knows.
    if name == "dpm":
        changes = {"use_karras_sigmas": True, "prediction_type": "v_prediction"}
        mine = ours(name, start(), 20, {**SD15, **changes}, eps_fn)
        assert relative(mine, theirs(oracle(name, changes, 20), start())) < 1e-3


# Single steps, in float64

def test_single_steps_are_diffusers_in_float64(oracle):
    x, eps, x0_prev = (torch.randn(3, 2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    for steps in (1, 3, 20, 50, 997):
        for spacing in SPACINGS.values():
            scheduler, config = oracle("dpm", spacing, steps), {**SD15, **spacing}
            ts, sigmas = dpm_solver_schedule(steps, ALPHAS, config)
            for i in sorted({0, 1, steps // 2, steps - 2, steps - 1} & set(range(steps))):
                scheduler._step_index = i       # its step() would round to float32, so the two halves are called
                first = scheduler.dpm_solver_first_order_update(eps, sample=x)
                assert relative(dpm_solver_step(eps, x, sigmas, i), first) < 1e-12
                if 0 < i < steps - 1:           # at the end, where sigma is 0, the second order is not used
                    second = scheduler.multistep_dpm_solver_second_order_update([x0_prev, eps], sample=x)
                    assert relative(dpm_solver_step(eps, x, sigmas, i, x0_prev), second) < 1e-12

            scheduler, ts = oracle("ddpm", spacing, steps), timesteps(steps, config)
            noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
            for t, t_prev in list(zip(ts, [*ts[1:], -1]))[::max(steps // 4, 1)]:
                expected = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(2)).prev_sample
                assert relative(ddpm_step(eps, x, t, t_prev, ALPHAS, noise), expected) < 1e-12
            for to_one in (False, True):
                scheduler = oracle("ddim", {**spacing, "set_alpha_to_one": to_one}, steps)
                for t in ts[::max(steps // 4, 1)]:
                    for eta in (0.0, 1.0):
                        expected = scheduler.step(eps, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
                        mine = ddim_step(eps, x, t, t - 1000 // steps, ALPHAS, eta, noise if eta else None, to_one)
                        assert relative(mine, expected) < 1e-12


def test_a_step_for_every_row():
    """t of shape (B,), as in training, and the same t for all rows are one formula, to the last row and the last t."""
    t = torch.tensor([0, 1, 500, 999])
    t_prev = t - torch.tensor([1, 1, 20, 1])
    alphas, x, eps, noise = ALPHAS.double(), *torch.randn(
        3, 4, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    steps = {
        "ddpm mean": lambda eps, x, noise, *ts: ddpm_step(eps, x, *ts, alphas),
        "ddpm": lambda eps, x, noise, *ts: ddpm_step(eps, x, *ts, alphas, noise),
        "ddim": lambda eps, x, noise, *ts: ddim_step(eps, x, *ts, alphas),
        "ddim to one": lambda eps, x, noise, *ts: ddim_step(eps, x, *ts, alphas, set_alpha_to_one=True),
        "ddim eta 1": lambda eps, x, noise, *ts: ddim_step(eps, x, *ts, alphas, 1.0, noise),
        "x0": lambda eps, x, noise, t, _: x0_from_eps(eps, x, t, alphas),
        "v": lambda eps, x, noise, t, _: eps_from_v(eps, x, t, alphas)}
    for name, step in steps.items():
        together = step(eps, x, noise, t, t_prev)
        for i in range(4):
            row = step(eps[i:i + 1], x[i:i + 1], noise[i:i + 1], t[i].item(), t_prev[i].item())
            torch.testing.assert_close(together[i:i + 1], row, rtol=1e-12, atol=1e-12, msg=name)
    # At t = 0 the clean picture is reached, and no noise is added to it.
    clean = x0_from_eps(eps, x, t, alphas)[0]
    torch.testing.assert_close(ddpm_step(eps, x, t, t_prev, alphas, noise)[0], clean, rtol=1e-12, atol=1e-12)
    assert not torch.equal(steps["ddpm"](eps, x, noise, t, t_prev)[1], steps["ddpm mean"](eps, x, noise, t, t_prev)[1])


def test_eps_x0_and_v_are_one_prediction():
    x0, eps = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t, alphas = torch.tensor([0, 400, 999]), ALPHAS.double()
    a = alphas[t][:, None, None, None]
    x_t = add_noise(x0, eps, t, alphas)
    torch.testing.assert_close(x0_from_eps(eps, x_t, t, alphas), x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(eps_from_v(a.sqrt() * eps - (1 - a).sqrt() * x0, x_t, t, alphas), eps)
    # DPM-Solver++ of first order and DDIM are one step, written in other variables.
    sigmas = ((1 - alphas) / alphas).sqrt()[[999, 400]]
    torch.testing.assert_close(dpm_solver_step(x0, x_t, sigmas, 0)[2], ddim_step(eps, x_t, 999, 400, alphas)[2])


def test_add_noise_is_diffusers_and_keeps_the_schedule_in_half_precision():
    x0, eps = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 1, 500, 981, 999])
    for dtype in (torch.float32, torch.float64):
        expected = DDPMScheduler.from_config(SD15).add_noise(x0.to(dtype), eps.to(dtype), t)
        assert torch.equal(add_noise(x0.to(dtype), eps.to(dtype), t, ALPHAS), expected)
    for dtype in (torch.bfloat16, torch.float16):
        x0, eps = x0.to(dtype), eps.to(dtype)
        noised = add_noise(x0, eps, t, ALPHAS)
        assert noised.dtype == dtype and torch.equal(noised, add_noise(x0.float(), eps.float(), t, ALPHAS).to(dtype))


# What a sampler may count on, and what may be counted on of it

def test_guidance_is_one_call_of_both_halves():
    calls = []

    def unet(x, t, context):
        calls.append((x, t, context))
        return x * context.mean((1, 2))[:, None, None, None] + t[:, None, None, None]

    x, t = start(3), torch.tensor([5, 300, 999])
    context, uncond = torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(1))
    guided = guided_eps(unet, context, uncond, 5.0)(x, t)
    (x2, t2, rows), = calls
    assert len(x2) == len(t2) == 6 and torch.equal(rows, torch.cat([uncond, context]))
    e_uncond, e_cond = unet(x, t, uncond), unet(x, t, context)
    torch.testing.assert_close(guided, e_uncond + 5.0 * (e_cond - e_uncond))

    for scale in (1.0, 0.5, 0.0):               # off: the prompt's prediction as it is, at half the cost
        calls.clear()
        assert torch.equal(guided_eps(unet, context, uncond, scale)(x, t), e_cond)
        assert [len(call[0]) for call in calls] == [3]

    # v is guided first, then turned into eps; the U-Net's dtype is the contexts'.
    v_guided = guided_eps(unet, context, uncond, 5.0, ALPHAS)(x, t)
    torch.testing.assert_close(v_guided, eps_from_v(guided, x, t, ALPHAS))
    calls.clear()
    guided_eps(unet, context.bfloat16(), uncond.bfloat16(), 5.0)(x, t)
    assert calls[0][0].dtype == torch.bfloat16 and calls[0][1].dtype == torch.int64


@pytest.mark.parametrize("name", ORACLES)
def test_after_step_and_the_arguments_of_eps_fn(name):
    seen, returned = [], []

    def eps_fn(x, t):
        assert t.shape == (2,) and t.dtype == torch.int64 and len(set(t.tolist())) == 1
        seen.append((x.clone(), t[0].item()))
        return toy_eps(x, t).bfloat16()

    def after_step(x):
        returned.append(x * 0.9 + 0.1)
        return returned[-1]

    x = start()
    result = ours(name, x, 7, SD15, eps_fn, after_step)
    assert torch.equal(x, start()) and result is returned[-1] and result.dtype == torch.float32
    assert len(seen) == len(returned) == 7 and torch.equal(seen[0][0], x)
    assert all(torch.equal(given, back) for (given, _), back in zip(seen[1:], returned))
    expected = dpm_solver_schedule(7, ALPHAS, SD15)[0] if name == "dpm" else timesteps(7, SD15)
    assert [t for _, t in seen] == expected
    # A U-Net in half precision: its answer is rounded, and nothing after it.
    assert torch.equal(result, ours(name, x, 7, SD15, lambda x, t: toy_eps(x, t).bfloat16().float(), after_step))


@pytest.mark.parametrize("name", ORACLES)
def test_no_sampler_waits_for_the_device(name):
    """A meta tensor has no values: whatever reads one back (.item(), a branch, a copy to the CPU) raises here."""
    x = torch.empty(2, 4, 2, 2, device="meta")
    assert ours(name, x, 3, SD15, lambda x, t: x * t[:, None, None, None]).device.type == "meta"


def test_ddpm_draws_a_picture_of_its_own_in_any_batch():
    x = start(3)
    together = sample_ddpm(toy_eps, x, ALPHAS, 5, SD15, generators(3))
    for i in range(3):
        alone = sample_ddpm(toy_eps, x[i:i + 1], ALPHAS, 5, SD15, generators(3)[i:i + 1])
        torch.testing.assert_close(together[i:i + 1], alone)


def test_dpm_solver_converges_in_second_order():
    """Without an oracle: pictures from N(0, s^2) have eps = sigma x / (alpha^2 s^2 + sigma^2) exactly, and the ODE
    carries x in proportion to sqrt(alpha^2 s^2 + sigma^2). Half the step, a quarter of the error."""
    s, first, last = 0.5, 10.0, 0.05            # levels sigma/alpha

    def spread(level):
        return ((s**2 + level**2) / (1 + level**2)) ** 0.5

    def error(n, order):
        sigmas = torch.logspace(0, 1, n + 1, last / first, dtype=torch.float64) * first
        x, x0_prev = torch.ones(1, 1, 1, 1, dtype=torch.float64), None
        for i in range(n):
            alpha = 1 / (1 + sigmas[i] ** 2) ** 0.5
            x0 = x * alpha * s**2 / spread(sigmas[i]) ** 2
            x = dpm_solver_step(x0, x, sigmas, i, x0_prev)
            x0_prev = x0 if order == 2 else None
        return abs(x.item() - spread(last) / spread(first))

    for order, ratio in ((1, 2), (2, 4)):
        errors = [error(n, order) for n in (40, 80, 160)]
        assert [a / b for a, b in zip(errors, errors[1:])] == pytest.approx([ratio, ratio], rel=0.15), order
