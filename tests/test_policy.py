"""Rollouts against diffusers' DDIMScheduler, torch.distributions and DDPM; policy gradients against gradients known in
closed form; the losses against values worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from losses.advantages import group_advantages, running_advantages
from losses.policy import ddpo_is_loss, ddpo_sf_loss, dpok_loss, kl_to_reference
from losses.step_preferences import d3po_loss, dense_loss, spo_loss
from model.errors import UserError
from sampling import (
    ddpm_step,
    eps_gain,
    guided_eps,
    make_alphas_cumprod,
    rollout,
    rollout_timesteps,
    seeded,
    step_distribution,
    step_log_prob,
)

SD15 = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1,
    set_alpha_to_one=False)
ALPHAS = make_alphas_cumprod(SD15)
ALPHAS64 = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
LN2 = math.log(2)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")       # diffusers, with a newer numpy


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradient(loss, *at: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in at]
    return torch.autograd.grad(loss(*leaves), leaves)


def generators(n: int) -> list[torch.Generator]:
    return [seeded("a test's rollout", 0, i) for i in range(n)]


class ToyUNet(nn.Module):
    """Two convolutions, the step and the text added between them."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.conv_out = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.to(dtype)

    def forward(self, x, t, context):
        added = (t / 1000).to(x.dtype) + context.mean(dim=(1, 2))                # (B,)
        return x + self.conv_out(F.silu(self.conv_in(x) + added[:, None, None, None]))


def toy_eps_fn(unet: nn.Module, batch: int, guidance: float = 5.0):
    dtype = next(unet.parameters()).dtype
    context, uncond = randn(2, batch, 3, 5, dtype=torch.float32).to(dtype)
    return guided_eps(unet, context, uncond, guidance)


# Rollouts

@pytest.mark.parametrize("steps", [1, 7, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_a_rollout_is_diffusers_ddim_with_eta_1(steps, spacing):
    """States and log-probabilities, by diffusers' mean and variance and the same noise."""
    scheduler = DDIMScheduler(**SD15, timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    eps_fn, x = toy_eps_fn(ToyUNet(), 2), randn(2, 4, 6, 5, dtype=torch.float32)
    with torch.no_grad():
        ours = rollout(eps_fn, x, ALPHAS, steps, {**SD15, "timestep_spacing": spacing}, generators(2))
    draws = generators(2)
    assert ours.timesteps.tolist() == scheduler.timesteps.tolist()
    assert ours.latents.shape == (steps + 1, 2, 4, 6, 5) and ours.log_probs.shape == (steps, 2)
    assert ours.latents.dtype == ours.log_probs.dtype == torch.float32
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            eps = eps_fn(x, t.expand(2))
        noise = torch.cat([torch.randn((1, 4, 6, 5), generator=g) for g in draws])
        mean = scheduler.step(eps, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
        x_prev = scheduler.step(eps, t, x, eta=1.0, variance_noise=noise).prev_sample
        sigma = scheduler._get_variance(t, t - 1000 // steps) ** 0.5
        log_prob = Normal(mean.double(), sigma.double()).log_prob(x_prev.double()).mean(dim=(1, 2, 3))
        torch.testing.assert_close(ours.latents[i + 1], x_prev, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.log_probs[i].double(), log_prob, rtol=0, atol=3e-4)
        x = x_prev


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_weights_recompute_a_rollouts_log_probs_exactly(dtype):
    """Under autograd, and without: the ratio of the first update is 1, bit for bit."""
    unet = ToyUNet(dtype)
    eps_fn = toy_eps_fn(unet, 3)
    drawn = rollout(eps_fn, randn(3, 4, 8, 8), ALPHAS, 10, SD15, generators(3))
    assert not drawn.log_probs.requires_grad and not drawn.latents.requires_grad
    for i in range(10):
        x_t, x_prev, old = drawn.latents[i], drawn.latents[i + 1], drawn.log_probs[i]
        t, t_prev = drawn.timesteps[i].expand(3), drawn.timesteps_prev[i].expand(3)
        new = step_log_prob(eps_fn(x_t, t), x_t, x_prev, t, t_prev, ALPHAS)
        by_ints = step_log_prob(eps_fn(x_t, t), x_t, x_prev, t[0].item(), t_prev[0].item(), ALPHAS)
        assert torch.equal(new, old) and torch.equal(by_ints, old) and new.dtype == torch.float32
        loss, logs = ddpo_is_loss(new, old, torch.tensor([1.0, -2.0, 0.5]))
        assert logs["ratio_off"] == logs["clipped"] == 0
        loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in unet.parameters())


def test_a_rollout_does_not_depend_on_its_batch():
    x = randn(3, 4, 4, 4, dtype=torch.float32)
    eps_fn = lambda x, t: 0.8 * x + 0.1 * torch.sin(t / 100)[:, None, None, None]
    both = rollout(eps_fn, x, ALPHAS, 5, SD15, generators(3))
    one = rollout(eps_fn, x[1:2], ALPHAS, 5, SD15, generators(3)[1:2])
    assert torch.equal(both.latents[:, 1:2], one.latents) and torch.equal(both.log_probs[:, 1:2], one.log_probs)


def test_a_log_prob_is_the_normal_distributions():
    eps, x_t, x_prev = randn(3, 3, 4, 5, 5)
    t, t_prev = torch.tensor([1, 500, 981]), torch.tensor([0, 480, 961])
    mean, sigma = step_distribution(eps, x_t, t, t_prev, ALPHAS64)
    wanted = Normal(mean, sigma.expand_as(mean)).log_prob(x_prev).mean(dim=(1, 2, 3))
    torch.testing.assert_close(step_log_prob(eps, x_t, x_prev, t, t_prev, ALPHAS64), wanted, rtol=1e-13, atol=0)
    one_by_one = [step_log_prob(*(x[i:i + 1] for x in (eps, x_t, x_prev)), t[i].item(), t_prev[i].item(), ALPHAS64)
                  for i in range(3)]
    torch.testing.assert_close(torch.cat(one_by_one), wanted, rtol=1e-13, atol=0)


def test_only_eps_carries_gradient():
    """By hand: d log_prob / d eps = (x_prev - mean) / sigma^2 * c / N, c the gain times sigma, falling in eps."""
    eps, x_t, x_prev = randn(3, 2, 4, 3, 3)
    t, t_prev = torch.tensor([41, 501]), torch.tensor([21, 481])
    leaves = [x.clone().requires_grad_() for x in (eps, x_t, x_prev)]
    grads = torch.autograd.grad(
        step_log_prob(*leaves, t, t_prev, ALPHAS64).sum(), leaves, allow_unused=True)
    assert grads[1] is None and grads[2] is None
    mean, sigma = step_distribution(eps, x_t, t, t_prev, ALPHAS64)
    gain = eps_gain(t, t_prev, ALPHAS64)[:, None, None, None]
    torch.testing.assert_close(grads[0], -(x_prev - mean) / sigma * gain / 36)


@pytest.mark.parametrize("t, t_prev", [(1, 0), (21, 1), (500, 499), (981, 961), (999, 998)])
def test_the_step_is_ddpms(t, t_prev):
    """Eta 1 makes mean and variance those of DDPM's posterior, for any stride."""
    eps, x_t = randn(2, 2, 4, 3, 3)
    mean, sigma = step_distribution(eps, x_t, t, t_prev, ALPHAS64)
    wanted = ddpm_step(eps, x_t, t, t_prev, ALPHAS64)
    sigma_wanted = (ddpm_step(eps, x_t, t, t_prev, ALPHAS64, torch.ones_like(eps)) - wanted).mean()
    torch.testing.assert_close(mean, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sigma, sigma_wanted, rtol=1e-10, atol=0)


# sigma, |c| / sigma and c^2 / (2 sigma^2), c what multiplies eps in the mean; computed apart, with NumPy.
STEPS_50 = {981: (0.4545, 0.5126, 0.1314), 481: (0.2877, 0.3757, 0.0706), 41: (0.0999, 1.017, 0.5174),
            21: (0.0395, 3.275, 5.362), 1: (0.02065, 1.003, 0.5032)}
STEPS_20 = {951: (0.6444, 0.853, 0.3638), 451: (0.4016, 0.6227, 0.1939), 101: (0.1673, 1.141, 0.6512),
            51: (0.0406, 5.431, 14.75), 1: (0.02065, 1.003, 0.5032)}


@pytest.mark.parametrize("steps, table", [(50, STEPS_50), (20, STEPS_20)], ids=["50", "20"])
@pytest.mark.parametrize("alphas", [ALPHAS, ALPHAS64], ids=["float32", "float64"])
def test_sigmas_and_gains_of_sd15(steps, table, alphas):
    """The step before the last weighs most in log-ratios and KL divergences."""
    pairs = dict(rollout_timesteps(steps, SD15))
    for t, (sigma, gain, weight) in table.items():
        got_sigma = step_distribution(*torch.zeros(2, 1, 4, 1, 1), t, pairs[t], alphas)[1].item()
        got_gain = eps_gain(torch.tensor([t]), torch.tensor([pairs[t]]), alphas).item()
        assert [got_sigma, got_gain, got_gain**2 / 2] == pytest.approx([sigma, gain, weight], rel=1e-3)


@pytest.mark.parametrize("changes, steps, says", [
    ({"set_alpha_to_one": True}, 50, "set_alpha_to_one"), ({"steps_offset": 0}, 50, "t = 0"), ({}, 1000, "1000 steps"),
    ({"timestep_spacing": "linspace"}, 50, "t = 0"), ({"timestep_spacing": "trailing"}, 999, "t = 0")], ids=str)
def test_a_step_without_noise_is_refused(changes, steps, says):
    with pytest.raises(UserError, match=says) as refusal:
        rollout(None, randn(1, 4, 2, 2), ALPHAS, steps, {**SD15, **changes}, generators(1))
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="on where it is missing"):
        rollout_timesteps(50, {key: value for key, value in SD15.items() if key != "set_alpha_to_one"})


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_other_steps_have_noise(spacing):
    for steps in [*range(1, 60), 100, 250, 333, 500]:
        for t, t_prev in rollout_timesteps(steps, {**SD15, "timestep_spacing": spacing}):
            sigma = step_distribution(*torch.zeros(2, 1, 4, 1, 1), t, t_prev, ALPHAS)[1]
            assert 0.01 < sigma < 1.0001, (steps, t, t_prev)


# Policy gradients

def test_ddpo_sf_finds_the_gradient_of_the_expected_reward():
    """Two steps, x1 ~ N(theta, 1), x2 ~ N(x1 + theta, 1), reward -(x2 - m)^2: the expected reward is
    -(2 theta - m)^2 - 2, its gradient -4 (2 theta - m). The loss is a mean over both steps, so its gradient is half of
    that. To sum the whole trajectory's log-probability over t (the survey's Eq. 22) would give twice as much."""
    theta, m, n = torch.tensor(0.3, dtype=torch.float64), 1.5, 200_000
    z1, z2 = randn(2, n)
    x1 = theta + z1
    x2 = x1 + theta + z2
    rewards = -((x2 - m) ** 2)

    def loss(theta):
        log_probs = torch.stack([Normal(theta, 1).log_prob(x1), Normal(x1 + theta, 1).log_prob(x2)])     # (2, n)
        return ddpo_sf_loss(log_probs, rewards)[0]

    error = (rewards * (z1 + z2)).std() / n**0.5
    assert error < 0.05
    assert abs(-2 * gradient(loss, theta)[0] + 4 * (2 * theta - m)) < 3 * error


def test_ddpo_is_finds_it_from_another_policys_samples():
    """One step, x ~ N(theta_old, 1), unclipped: the gradient at theta, -2 (theta - m)."""
    theta, old, m, n = torch.tensor(0.5, dtype=torch.float64), 0.3, 1.5, 200_000
    x = old + randn(n, seed=1)
    rewards, log_probs_old = -((x - m) ** 2), Normal(old, 1).log_prob(x)
    loss = lambda theta: ddpo_is_loss(Normal(theta, 1).log_prob(x), log_probs_old, rewards, clip=math.inf)[0]
    each = rewards * (Normal(theta, 1).log_prob(x) - log_probs_old).exp() * (x - theta)
    error = each.std() / n**0.5
    assert error < 0.05
    assert abs(-gradient(loss, theta)[0] + 2 * (theta - m)) < 3 * error
    # Taken for its own samples, as DDPO-SF takes them, they mislead.
    wrong = gradient(lambda theta: ddpo_sf_loss(Normal(theta, 1).log_prob(x), rewards)[0], theta)[0]
    assert abs(-wrong + 2 * (theta - m)) > 10 * error


def test_ddpo_is_has_ddpo_sfs_gradient_at_ratio_1():
    log_probs, advantages = randn(5, 4), randn(4, seed=1)
    sf = gradient(lambda lp: ddpo_sf_loss(lp, advantages)[0], log_probs)[0]
    clipped = gradient(lambda lp: ddpo_is_loss(lp, log_probs, advantages)[0], log_probs)[0]
    dpok = gradient(lambda lp: dpok_loss(lp, log_probs, advantages, reward_weight=1.0)[0], log_probs)[0]
    assert torch.equal(clipped, sf)
    torch.testing.assert_close(dpok, sf)
    torch.testing.assert_close(sf, -(advantages / 20).expand(5, 4))


@pytest.mark.parametrize("advantage, ratio, loss, learns, dpok_learns", [
    (2.0, 1.05, -2.1, True, True), (2.0, 0.95, -1.9, True, True),                # inside
    (-2.0, 1.05, 2.1, True, True), (-2.0, 0.95, 1.9, True, True),
    (2.0, 1.3, -2.2, False, False), (-2.0, 0.7, 1.8, False, False),              # too far the right way
    (2.0, 0.7, -1.4, True, False), (-2.0, 1.3, 2.6, True, False)])               # too far the wrong way
def test_the_clips_branches(advantage, ratio, loss, learns, dpok_learns):
    """PPO's maximum keeps the gradient of steps that went the wrong way; DPOK's plain clamp does not."""
    log_prob, old = torch.tensor([math.log(ratio)], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    a = torch.tensor([advantage], dtype=torch.float64)
    value, logs = ddpo_is_loss(log_prob, old, a, clip=0.1)
    assert value.item() == pytest.approx(loss) and logs["clipped"] == (abs(ratio - 1) > 0.1)
    assert logs["ratio_off"].item() == pytest.approx(abs(ratio - 1))
    slope = gradient(lambda lp: ddpo_is_loss(lp, old, a, clip=0.1)[0], log_prob)[0].item()
    assert slope == pytest.approx(-advantage * ratio if learns else 0)
    dpok = lambda lp: dpok_loss(lp, old, a, clip=0.1)[0]
    assert dpok(log_prob).item() == pytest.approx(-10 * advantage * min(max(ratio, 0.9), 1.1))
    assert gradient(dpok, log_prob)[0].item() == pytest.approx(-10 * advantage * ratio if dpok_learns else 0)


def test_the_kl_is_the_gaussians():
    """That of the two steps' distributions, as torch.distributions has it, by element; and the plain squared error."""
    eps, eps_ref, x_t = randn(3, 3, 4, 3, 3)
    t, t_prev = torch.tensor([1, 41, 981]), torch.tensor([0, 21, 961])
    gain = eps_gain(t, t_prev, ALPHAS64)

    def literal(eps):
        (mean, sigma), (mean_ref, _) = (step_distribution(e, x_t, t, t_prev, ALPHAS64) for e in (eps, eps_ref))
        kl = kl_divergence(Normal(mean, sigma.expand_as(mean)), Normal(mean_ref, sigma.expand_as(mean)))
        return kl.mean(dim=(1, 2, 3))

    ours = lambda eps: kl_to_reference(eps, eps_ref, "gaussian", gain)
    torch.testing.assert_close(ours(eps), literal(eps), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient(lambda e: ours(e).sum(), eps), gradient(lambda e: literal(e).sum(), eps))
    torch.testing.assert_close(kl_to_reference(eps, eps_ref).mean(), F.mse_loss(eps, eps_ref))
    assert not ours(eps_ref).any() and not kl_to_reference(eps, eps).any()


# Advantages

PROMPTS = ["a", "b", "a", "a", "b", "b", "a", "c"]
REWARDS = torch.tensor([1.0, 20.0, 2.0, 3.0, 21.0, 25.0, 6.0, 7.0])


def of(function, rewards: Tensor) -> Tensor:
    """group_advantages, or running_advantages with empty buffers that each prompt of PROMPTS but c fills at once."""
    return function(rewards, PROMPTS) if function is group_advantages else function(rewards, PROMPTS, {}, least=3)


BOTH = pytest.mark.parametrize("function", [group_advantages, running_advantages])


def test_group_advantages_by_hand():
    deviation = {"a": 3.5**0.5, "b": (14 / 3) ** 0.5}          # of 1 2 3 6 and of 20 21 25, by n and not n - 1
    wanted = [-2 / deviation["a"], -2 / deviation["b"], -1 / deviation["a"], 0, -1 / deviation["b"],
              3 / deviation["b"], 3 / deviation["a"], 0]
    got = group_advantages(REWARDS, PROMPTS)
    assert got.tolist() == pytest.approx(wanted, abs=2e-4) and got.dtype == torch.float32
    assert group_advantages(REWARDS, PROMPTS, limit=1.0).tolist() == pytest.approx(
        [min(max(a, -1), 1) for a in wanted], abs=2e-4)


@BOTH
def test_advantages_do_not_depend_on_shift_and_scale(function):
    wanted = of(function, REWARDS)
    torch.testing.assert_close(of(function, 7 * REWARDS - 100), wanted, rtol=2e-4, atol=1e-6)
    if function is group_advantages:
        of_b = torch.tensor([float(prompt == "b") for prompt in PROMPTS])
        torch.testing.assert_close(of(function, REWARDS + 50 * of_b), wanted, rtol=1e-4, atol=1e-6)


@BOTH
@pytest.mark.parametrize("value", [0.0, 21.7, 0.1, -1e4])
def test_equal_rewards_have_no_advantage(function, value):
    """10 times 21.7 have another mean than 21.7 in float32, by more than eps."""
    rewards, prompts = torch.full((10,), value), ["a"] * 10
    got = function(rewards, prompts) if function is group_advantages else function(rewards, prompts, {}, least=4)
    assert got.isfinite().all() and got.abs().max() < 1e-4
    assert of(function, torch.full((8,), value)).abs().max() < 1e-4


def test_running_advantages_remember():
    buffers = {}
    first = running_advantages(torch.tensor([1.0, 3.0, 10.0]), ["a", "a", "b"], buffers, size=4, least=4)
    whole = torch.tensor([1.0, 3.0, 10.0])                     # neither prompt has four: the batch's
    torch.testing.assert_close(first, (whole - whole.mean()) / whole.std(correction=0), rtol=1e-5, atol=0)
    second = running_advantages(torch.tensor([5.0, 7.0, 9.0]), ["a", "a", "a"], buffers, size=4, least=4)
    assert buffers == {"a": [3.0, 5.0, 7.0, 9.0], "b": [10.0]}
    torch.testing.assert_close(second, torch.tensor([-1.0, 1.0, 3.0]) / 5**0.5, rtol=1e-5, atol=0)
    assert running_advantages(torch.tensor([100.0, *[0.0] * 99]), ["a"] * 100, {}, size=100)[0] == 5     # clamped


# Preferences on steps

@pytest.mark.parametrize("loss, rows", [
    (d3po_loss, (5, 6)), (dense_loss, (5, 6)), (lambda *x: spo_loss(*x, 9 * randn(5, 6, seed=3)), (5, 6))],
    ids=["d3po", "dense", "spo"])
def test_they_start_at_ln_2(loss, rows):
    log_probs = randn(*rows)
    value, logs = loss(log_probs, log_probs.clone())
    assert value.item() == pytest.approx(LN2, abs=1e-12) and logs["implicit_accuracy"] == 0.5
    assert gradient(lambda lp: loss(lp, log_probs)[0], log_probs)[0].abs().max() > 0


def test_d3po_by_hand():
    """Log-ratios of 0.05 and -0.03 count; 0.2 and -0.2 stop at log 1.1 and log 0.9, without a gradient."""
    ref = randn(2, 4)
    moved = torch.tensor([[0.05, 0.2, -0.03, -0.03], [0.0, -0.2, 0.0, 0.2]], dtype=torch.float64)
    logits = [0.1 * x for x in (0.08, math.log(1.1) + 0.03, 0.0, math.log(0.9) - math.log(1.1))]
    loss, logs = d3po_loss(ref + moved, ref)
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-x)) for x in logits) / 4, abs=1e-12)
    assert logs["implicit_accuracy"] == (1 + 1 + 0.5 + 0) / 4
    slopes = gradient(lambda lp: d3po_loss(lp, ref)[0], ref + moved)[0]
    push = lambda x: 0.1 / (1 + math.exp(x)) / 4               # beta * sigmoid(-logit), over four preferences
    wanted = [-push(logits[0]), 0, push(logits[0]), push(logits[1]), -push(logits[2]), 0, push(logits[2]), 0]
    assert slopes.flatten().tolist() == pytest.approx(wanted, abs=1e-12)


def test_dense_weighs_the_first_steps_most():
    ref, moved = randn(4, 2), 1e-5 * randn(4, 2, seed=1)
    r = lambda weights: 10 * (torch.tensor(weights, dtype=torch.float64) @ moved)
    for discount, weights in ((1.0, [0.25] * 4), (0.5, [8 / 15, 4 / 15, 2 / 15, 1 / 15])):
        loss, _ = dense_loss(ref + moved, ref, discount)
        torch.testing.assert_close(loss, -F.logsigmoid(r(weights)[0] - r(weights)[1]), rtol=1e-10, atol=0)
    plain = -F.logsigmoid(10 * (moved[:, 0].mean() - moved[:, 1].mean()))
    torch.testing.assert_close(dense_loss(ref + moved, ref, 1.0)[0], plain, rtol=1e-10, atol=0)
    far, _ = dense_loss(ref + torch.tensor([1.0, -1.0]), ref)
    assert far.item() == pytest.approx(math.log1p(math.exp(-10 * 2e-4)), abs=1e-12)


def test_dense_is_what_the_official_draws_expect():
    """Three steps drawn by the weights, with replacement: the mean logit over many draws is ours."""
    ref, moved = randn(6, 2), 1e-5 * randn(6, 2, seed=1)
    weights = 0.9 ** torch.arange(6, dtype=torch.float64)
    drawn = torch.multinomial(weights.expand(20_000, 6), 3, replacement=True, generator=generators(1)[0])
    logits = 10 * (moved[:, 0] - moved[:, 1])[drawn].mean(dim=1)
    ours = -(dense_loss(ref + moved, ref)[0].expm1()).log()    # of the loss log(1 + exp(-x)): x
    assert abs(logits.mean() - ours) < 3 * logits.std() / 20_000**0.5


def test_spo_compares_the_best_with_the_worst():
    """Three candidates for three pictures; of the second the scores are too near, sigmoid(0.6) - sigmoid(-0.6) < 0.3,
    and so of none if all are."""
    ref = randn(3, 3)
    moved = torch.tensor([[0.02, 0.01, 0.5], [-0.01, 0.02, 0.01], [0.03, -0.01, 0.02]], dtype=torch.float64)
    scores = torch.tensor([[2.0, 0.6, 0.0], [0.0, 0.3, 3.0], [1.0, 0.0, 1.0]])
    logits = [10 * 0.03, 10 * (0.01 - math.log(1.1))]
    loss, logs = spo_loss(ref + moved, ref, scores)
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-x)) for x in logits) / 2, abs=1e-12)
    assert logs["kept"].item() == pytest.approx(2 / 3)
    slopes = gradient(lambda lp: spo_loss(lp, ref, scores)[0], ref + moved)[0]
    assert (slopes != 0).tolist() == [[True, False, False], [True, False, True], [False, False, False]]
    assert slopes[0, 0] < 0 < slopes[1, 0] and slopes[1, 2] < 0
    none, logs = spo_loss((ref + moved).requires_grad_(), ref, 0.1 * scores)
    none.backward()
    assert none == 0 and logs["kept"] == 0


@pytest.mark.parametrize("margin, kept", [(math.tanh(0.5) - 1e-6, 1), (math.tanh(0.5) + 1e-6, 0)])
def test_spos_margin_is_of_probabilities(margin, kept):
    """Of the softmax over best and worst alone: with scores 1 and 0 they are 0.731 and 0.269."""
    scores = torch.tensor([[1.0], [0.0], [0.5]], dtype=torch.float64)
    best, worst = torch.softmax(scores[:2, 0], dim=0)
    assert (best - worst).item() == pytest.approx(math.tanh(0.5))
    assert spo_loss(*randn(2, 3, 1), scores, margin=margin)[1]["kept"] == kept
