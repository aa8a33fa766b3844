"""The family of losses: what all have in common, where one method becomes another, values and gradients worked out by
hand, and what the official codes say (written down again from their equations)."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_docs_paper import check
from test_losses import ALPHAS_CUMPROD, HALF, gradient, predictions
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from losses import (
    LOSSES,
    diffusion_dpo_loss,
    dspo_loss,
    ipo_loss,
    kto_loss,
    mapo_loss,
    orpo_loss,
    pro_loss,
    rdpo_loss,
    rwr_loss,
    sdpo_loss,
    sft_loss,
)
from losses.discount import weights
from losses.mapo import likelihood
from losses.orpo import log_odds
from losses.rwr import picture_weights
from losses.sdpo import loser_scale
from losses.sft import winners_error

ROOT = Path(__file__).parent.parent
every_loss = pytest.mark.parametrize("name", LOSSES)
# Six rows: three pairs, or two pools of three pictures, or six pictures with labels.
PICTURES = {"pairs": 2, "pool": 3, "labels": 1, "winners": 1}
SCORES = torch.tensor([[20.1, 21.5, 19.0], [18.2, 17.9, 18.9]], dtype=torch.float64)
LABELS = torch.tensor([1.0, -1, -1, 1, 1, -1])
# Settings other than the defaults.
OTHERS = {"hg-dpo": {"beta": 700.0, "discount": 0.9, "winner_penalty": 0.3},
          "dpo": {"beta": 700.0, "discount": 0.9, "winner_penalty": 0.3}, "sft": {},
          "ipo": {"ipo_tau": 0.1}, "hinge": {"beta": 700.0}, "cdpo": {"label_smoothing": 0.3},
          "rdpo": {"label_smoothing": 0.3}, "kto": {"beta": 700.0}, "mapo": {"mapo_beta": 2.0},
          "orpo": {"orpo_weight": 2.0}, "pro": {"beta": 700.0}, "rwr": {"top": 0.4}, "dspo": {"dspo_beta": 0.4},
          "sdpo": {"sdpo_mu": 0.99}}


def call(
    name: str, eps: Tensor, eps_ref: Tensor, noise: Tensor, options: dict | None = None, prompts: slice = slice(None),
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss by the table, as train.py calls it, on all prompts or some."""
    pictures = PICTURES[LOSSES[name].data]
    rows = [x.unflatten(0, (pictures, -1))[:, prompts].flatten(0, 1) for x in (eps, eps_ref, noise)]
    t = torch.tensor([0, 900, 300, 500, 100, 999], device=eps.device)[:len(eps) // pictures]
    given = dict(zip(("eps", "eps_ref", "noise"), rows), timesteps=t[prompts],
                 alphas_cumprod=ALPHAS_CUMPROD.to(eps.device), scores=SCORES[prompts], labels=LABELS[prompts])
    return LOSSES[name](options or {}, **given)


def off(noise: Tensor, *errors: float) -> Tensor:
    """A prediction whose mean squared error in row i is errors[i]."""
    return noise + torch.tensor(errors, dtype=noise.dtype).sqrt()[:, None, None, None]


def test_a_penalty_is_for_winners_that_become_worse():
    """One pair loses 0.1 on its winner, the other gains."""
    _, eps_ref, noise = predictions(pairs=2)
    eps, eps_ref = off(noise, 0.35, 0.15, 0.25, 0.25), off(noise, 0.25, 0.25, 0.25, 0.25)
    found = [diffusion_dpo_loss(eps, eps_ref, noise, beta=10.0, winner_penalty=k)[0].item() for k in (0.0, 0.5)]
    by_hand = [(math.log1p(math.exp(10 * 0.1 * (1 + k))) + math.log1p(math.exp(-10 * 0.1))) / 2 for k in (0.0, 0.5)]
    assert found == pytest.approx(by_hand, rel=1e-5)


def with_logits(*logits: float, beta: float = 2500.0) -> tuple[Tensor, Tensor, Tensor]:
    """(eps, eps_ref, noise) of as many pairs, which have these logits."""
    n = len(logits)
    noise = predictions(pairs=n)[2]
    return off(noise, *[0.25 - x / beta for x in logits], *[0.25] * n), off(noise, *[0.25] * 2 * n), noise


# What all have in common

@every_loss
def test_the_start_is_what_the_table_says(name):
    """A policy that is its reference, for the defaults and for other settings."""
    for options in ({}, OTHERS[name]):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            _, eps_ref, noise = predictions(dtype)
            loss, logs = call(name, eps_ref.clone(), eps_ref, noise, options)
            for key, value in LOSSES[name].at_start.items():
                assert abs(logs[key].item() - value) < 1e-7, (key, options)
    starts = {"ipo": 25.0, "pro": math.log(6) / 2, "dspo": logs.get("mse_w"), "kto": 0.5, "hinge": 1.0}
    assert LOSSES[name].at_start or not LOSSES[name].takes("eps_ref")
    assert name not in starts or abs(loss.item() - starts[name]) < 1e-5


@every_loss
def test_gradients_are_right(name):
    """And only eps gets one, and no input is changed. Where a part is held fixed by intent, it is tested below: KTO's
    baseline is 0 here, for a policy that strayed by chance; SDPO scales a gradient and not its loss."""
    inputs = [x.double() for x in predictions(size=(3, 2), away=0.05)]
    before = [x.clone() for x in inputs]
    for options in ({}, OTHERS[name]):
        eps, eps_ref, noise = (x.requires_grad_() for x in inputs)
        loss, logs = call(name, eps, eps_ref, noise, options)
        assert loss.ndim == 0 and loss.dtype == torch.float64 and torch.isfinite(loss)
        assert all(value.ndim == 0 and not value.requires_grad and value.isfinite() for value in logs.values())
        assert logs.get("baseline", 0) == 0
        grads = torch.autograd.grad(loss, (eps, eps_ref), allow_unused=True)
        assert grads[0].abs().max() > 0 and grads[1] is None
        assert name == "sdpo" or torch.autograd.gradcheck(
            lambda x, options=options: call(name, x, *before[1:], options)[0], eps, eps=1e-7, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@every_loss
def test_half_precision_is_raised_to_float32(name, dtype):
    inputs = predictions(dtype, away=0.05)
    raised = [x.float() for x in inputs]
    loss = lambda *x: call(name, *x)[0].float()                # float64 where the scores are
    assert torch.equal(loss(*inputs), loss(*raised)) and call(name, *inputs)[0].dtype != dtype
    grad = gradient(loss, *inputs)
    assert grad.dtype == dtype and torch.equal(grad, gradient(loss, *raised).to(dtype))


@every_loss
def test_nothing_waits_for_the_device(name):
    """Fake tensors have no values: an `.item()` or an `if` on one fails here, forward or backward."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        eps, eps_ref, noise = (torch.empty(6, 4, 16, 16, dtype=torch.bfloat16) for _ in range(3))
        loss, logs = call(name, eps.requires_grad_(), eps_ref, noise)
        loss.backward()
        assert eps.grad.shape == eps.shape and all(value.ndim == 0 for value in logs.values())


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "kto"])
def test_each_prompt_is_judged_alone(name):
    """A loss is the mean of its prompts' losses. (KTO's baseline is the batch's.)"""
    inputs = predictions()
    prompts = 6 // PICTURES[LOSSES[name].data]
    for options in ({}, OTHERS[name]):
        alone = [call(name, *inputs, options, slice(i, i + 1))[0] for i in range(prompts)]
        torch.testing.assert_close(call(name, *inputs, options)[0], sum(alone) / prompts, rtol=1e-12, atol=1e-14)
        assert len({round(loss.item(), 9) for loss in alone}) == prompts, "the comparison says nothing"


def test_options_are_numbers_of_the_loss_with_one_meaning_each():
    meanings = {}
    for loss in LOSSES.values():
        for name, option in loss.options.items():
            assert isinstance(loss.defaults()[name], float) and meanings.setdefault(name, option) is option
    smoothing = LOSSES["rdpo"].options["label_smoothing"]
    assert (smoothing.least, smoothing.below) == (0, 0.5)
    assert meanings.keys() == set().union(*OTHERS.values()) | {"lambda_stat", "reward_scale"}


def test_the_page_has_every_method_and_its_names_exist():
    page = (ROOT / "docs" / "methods.md").read_text()
    names, commands, wrong = check(page)
    assert not wrong and names > 2 * len(LOSSES) and commands >= 1
    assert set(re.findall(r"^## `([a-z-]+)`", page, re.MULTILINE)) == set(LOSSES)
    assert {row.split("`")[1] for row in page.splitlines() if row.startswith("| `")} == set(LOSSES)


# Where one method becomes another

SORTED = torch.tensor([[2.0, 1.0]]).repeat(3, 1)               # a pool of two: the first is the better


@pytest.mark.parametrize("name, options, other", [
    ("cdpo", {"label_smoothing": 0.0}, "dpo"), ("rdpo", {"label_smoothing": 0.0}, "dpo"),
    ("sdpo", {"sdpo_mu": -99.0}, "dpo"), ("dpo", {"discount": 1.0}, "dpo"),
    ("hg-dpo", {"lambda_stat": 0.0, "discount": 0.9}, "dpo-discounted"), ("pro", {"scores": SORTED}, "dpo"),
    ("pro", {"scores": -SORTED}, "dpo-swapped"), ("rwr", {"reward_scale": 0.0, "scores": SORTED}, "sft"),
    ("rwr", {"scores": SORTED * 0}, "sft"), ("rwr", {"top": 0.5, "scores": SORTED}, "sft-winners"),
    ("mapo", {"mapo_beta": 0.0}, "sft-winners"), ("orpo", {"orpo_weight": 0.0}, "sft-winners"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_one_becomes_another(name, options, other):
    """Value and gradient. SDPO with a mu so low that no loser is held back."""
    inputs = predictions()
    t = torch.tensor([0, 300, 999])
    others = {
        "dpo": lambda *x: diffusion_dpo_loss(*x)[0],
        "dpo-discounted": lambda *x: diffusion_dpo_loss(*x, timesteps=t, discount=0.9)[0],
        "dpo-swapped": lambda *x: diffusion_dpo_loss(*[y.roll(3, 0) for y in x])[0],
        "sft": lambda eps, _, noise: sft_loss(eps, noise)[0],
        "sft-winners": lambda eps, _, noise: sft_loss(eps[:3], noise[:3])[0]}
    given = {"timesteps": t, "alphas_cumprod": ALPHAS_CUMPROD}
    loss = lambda *x: LOSSES[name](options, **dict(zip(("eps", "eps_ref", "noise"), x)), **given)[0]
    torch.testing.assert_close(loss(*inputs), others[other](*inputs), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient(loss, *inputs), gradient(others[other], *inputs), rtol=1e-11, atol=1e-17)


def test_without_a_discount_no_bit_changes():
    """A beta of 0.1 would, had it met a float32 weight of 1."""
    t = torch.tensor([0, 300, 999])
    plain = lambda *x: diffusion_dpo_loss(*x, 0.1)[0]
    for loss in (lambda *x: diffusion_dpo_loss(*x, 0.1, t, 1.0)[0],
                 lambda *x: LOSSES["dpo"]({"beta": 0.1}, **dict(zip(("eps", "eps_ref", "noise"), x)), timesteps=t)[0]):
        inputs = predictions(away=3.0)
        assert torch.equal(loss(*inputs), plain(*inputs))
        assert torch.equal(gradient(loss, *inputs), gradient(plain, *inputs))


@pytest.mark.parametrize("name, options, times", [
    ("hinge", {}, 2), ("ipo", {}, 4), ("ipo", {"ipo_tau": 0.1}, 20), ("cdpo", {"label_smoothing": 0.2}, 0.6),
    ("rdpo", {"label_smoothing": 0.2}, 1 / 0.6), ("pro", {"scores": SORTED}, 1),
    ("kto", {"beta": 2500.0, "labels": torch.tensor([1, 1, 1, -1, -1, -1])}, 1 / 4),
], ids=lambda value: value if isinstance(value, str) else "")
def test_at_the_start_all_have_dpos_gradient_but_for_a_factor(name, options, times):
    _, eps_ref, noise = predictions()
    dpo = gradient(lambda *x: diffusion_dpo_loss(*x)[0], eps_ref, eps_ref, noise)
    loss = lambda *x: LOSSES[name](options, **dict(zip(("eps", "eps_ref", "noise"), x)))[0]
    torch.testing.assert_close(gradient(loss, eps_ref, eps_ref, noise), times * dpo, rtol=1e-12, atol=1e-15)


# Pairs with a reference

def slope(loss, logit: float) -> float:
    """The derivative of a loss of pairs by its logit, from that by the winner's error."""
    eps, eps_ref, noise = with_logits(logit)
    grad = gradient(loss, eps, eps_ref, noise)[0]
    return -(grad / (2 * (eps - noise)[0] / grad.numel())).mean().item() / 2500


@pytest.mark.parametrize("name, options, at", [
    ("ipo", {}, 1.0), ("ipo", {"ipo_tau": 0.1}, 5.0), ("hinge", {}, 1 + 1e-6),
    ("cdpo", {}, math.log(9)), ("cdpo", {"label_smoothing": 0.3}, math.log(7 / 3))],
    ids=lambda value: value if isinstance(value, str) else "")
def test_a_pair_that_is_far_enough_apart_is_left_alone(name, options, at):
    loss = lambda *x: LOSSES[name](options, **dict(zip(("eps", "eps_ref", "noise"), x)))[0]
    assert abs(slope(loss, at)) < 1e-9 and slope(loss, at - 0.5) < -1e-3
    assert slope(loss, at + 0.5) == 0 if name == "hinge" else slope(loss, at + 0.5) > 1e-3
    if name != "cdpo":
        assert abs(loss(*with_logits(at)).item()) < 1e-18
    if name == "ipo":
        torch.testing.assert_close(
            ipo_loss(*with_logits(at - 2, at + 3), **options)[0].item(), (4 + 9) / 2, rtol=1e-9, atol=0)


def test_robust_dpo_is_dpo_on_average_over_flipped_labels():
    """And conservative DPO is not: it is DPO's average over them."""
    inputs = with_logits(-1.7, 0.4, 3.0)
    swapped = [x.roll(3, 0) for x in inputs]
    s = {"label_smoothing": 0.2}
    dpo = [diffusion_dpo_loss(*x)[0] for x in (inputs, swapped)]
    expected = 0.8 * rdpo_loss(*inputs, **s)[0] + 0.2 * rdpo_loss(*swapped, **s)[0]
    torch.testing.assert_close(expected, dpo[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(call("cdpo", *inputs, s)[0], 0.8 * dpo[0] + 0.2 * dpo[1], rtol=1e-12, atol=0)


def test_dspo_is_the_official_formula():
    """With Salesforce's logit, and one beta in two places. With its 0.001 it is all but fine-tuning on winners."""
    def official(eps, eps_ref, noise, beta_dpo):
        error_w, error_l = (eps - noise).chunk(2)
        errors_w, errors_l = (x.pow(2).mean(dim=[1, 2, 3]) for x in (error_w, error_l))
        ref_w, ref_l = (eps_ref - noise).pow(2).mean(dim=[1, 2, 3]).chunk(2)
        inside = -0.5 * beta_dpo * ((errors_w - errors_l) - (ref_w - ref_l))
        push = beta_dpo * (1 - torch.sigmoid(inside)[:, None, None, None]) * (eps - eps_ref).chunk(2)[0]
        return (error_w - push).pow(2).mean(dim=[1, 2, 3]).mean()

    inputs = predictions(away=0.3)
    for beta_dpo in (0.001, 0.8, 5.0):
        ours = lambda *x, beta=beta_dpo / 2: dspo_loss(*x, dspo_beta=beta)[0]
        theirs = lambda *x, beta=beta_dpo: official(*x, beta)
        torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient(ours, *inputs), gradient(theirs, *inputs), rtol=1e-10, atol=1e-16)
    sft = gradient(lambda eps, _, noise: sft_loss(eps[:3], noise[:3])[0], *inputs)
    grad = gradient(lambda *x: dspo_loss(*x)[0], *inputs)
    assert 1e-5 < (grad - sft).norm() / sft.norm() < 1e-3 and grad[3:].norm() < 1e-5 * grad[:3].norm()
    # The optimum of a pair lies beyond the noise, away from the reference.
    eps, eps_ref, noise = (x[:2] for x in predictions(pairs=1))
    assert dspo_loss(noise + 0.1 * (noise - eps_ref), eps_ref, noise, 0.2)[0] < dspo_loss(noise, eps_ref, noise, 0.2)[0]


# SDPO

def test_sdpo_is_dpo_with_less_of_the_losers_gradient():
    eps, eps_ref, noise = inputs = predictions(away=0.03)
    eps[3:] = noise[3:] + 1.5 * (eps[:3] - noise[:3]) + 0.1 * (eps[3:] - noise[3:])          # alike, the loser worse
    loss, logs = sdpo_loss(*inputs, sdpo_mu=0.5)
    assert torch.equal(loss, diffusion_dpo_loss(*inputs)[0]) and 0.2 < logs["lam"] < 0.4
    x = eps.clone().requires_grad_()
    g_w, g_l = ((x[rows] - noise[rows]).pow(2).mean() for rows in (slice(3), slice(3, None)))
    g_w, g_l = torch.autograd.grad(g_w, x, retain_graph=True)[0][:3], torch.autograd.grad(g_l, x)[0][3:]
    torch.testing.assert_close(logs["lam"], 0.5 * g_w.pow(2).sum() / (g_w * g_l).sum())
    grad, dpo = (gradient(lambda *x, f=f: f(*x)[0], *inputs) for f in (
        lambda *x: sdpo_loss(*x, sdpo_mu=0.5), diffusion_dpo_loss))
    torch.testing.assert_close(grad, torch.cat([dpo[:3], logs["lam"] * dpo[3:]]), rtol=1e-12, atol=1e-18)
    # A loser whose error points away from the winner's, or is small beside it, is no danger.
    for times in (-2.0, 0.05, 0.0):
        assert loser_scale(torch.cat([eps[:3], noise[3:] + times * (eps - noise)[:3]]), noise, 0.9) == 1
    assert loser_scale(eps.bfloat16(), noise.bfloat16(), 0.9).dtype == torch.float32


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_sdpo_does_not_raise_the_winners_error_to_first_order(mu):
    """Its claim, where it holds: one parameter moves a pair's outputs alike, and pairs weigh the same, as at the start.
    Then a step against the gradient lowers the winners' error by at least mu times what it would without the losers.
    DPO raises it."""
    _, _, noise = predictions()
    wrong = 0.3 * torch.randn(noise[:3].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    eps_ref = noise + torch.cat([wrong, 2 * wrong + 0.1 * wrong.roll(1, 0)])
    theta = torch.zeros_like(wrong, requires_grad=True)        # (B, C, H, W), added to both predictions of a pair
    eps = eps_ref + theta.repeat(2, 1, 1, 1)
    error_w, = torch.autograd.grad((eps - noise)[:3].pow(2).mean(), theta, retain_graph=True)
    alone = diffusion_dpo_loss(torch.cat([eps[:3], eps_ref[3:]]), eps_ref, noise)[0]        # the winners' part
    change = {}
    for name, loss in (("dpo", diffusion_dpo_loss(eps, eps_ref, noise)[0]), ("alone", alone),
                       ("sdpo", sdpo_loss(eps, eps_ref, noise, sdpo_mu=mu)[0])):
        change[name] = -(torch.autograd.grad(loss, theta, retain_graph=True)[0] * error_w).sum()
    assert change["dpo"] > 0 > change["alone"]
    torch.testing.assert_close(change["sdpo"], mu * change["alone"], rtol=1e-10, atol=1e-15)


# KTO

def test_kto_by_hand():
    """Gains of +4e-4, -1e-4 and +3e-4: a baseline of 2e-4; and where the mean is below 0, one of 0."""
    noise = predictions(pairs=3)[2][:3]
    eps_ref, labels = off(noise, 0.25, 0.25, 0.25), torch.tensor([1, 1, -1])
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    for gains, z in (([4e-4, -1e-4, 3e-4], 2e-4), ([-4e-4, 1e-4, -3e-4], 0.0)):
        eps = off(noise, *[0.25 - gain for gain in gains])
        loss, logs = kto_loss(eps, eps_ref, noise, labels)
        u = [y * 5000 * (gain - z) for y, gain in zip((1, 1, -1), gains)]
        assert abs(loss.item() - sum(1 - sigmoid(x) for x in u) / 3) < 1e-9
        wanted = {"baseline": z, "gain_desirable": sum(gains[:2]) / 2, "gain_undesirable": gains[2]}
        assert all(abs(logs[key].item() - value) < 1e-15 for key, value in wanted.items())
        # The baseline is a constant: each picture's gradient is its own, down its error if liked, up if not.
        slopes = torch.tensor([y * sigmoid(x) * (1 - sigmoid(x)) for y, x in zip((1, 1, -1), u)], dtype=torch.float64)
        grad = gradient(lambda *x: kto_loss(*x, labels)[0], eps, eps_ref, noise)
        wanted = 5000 / 3 * slopes[:, None, None, None] * 2 * (eps - noise) / eps[0].numel()
        torch.testing.assert_close(grad, wanted, rtol=1e-8, atol=1e-15)


def test_kto_logs_the_same_keys_when_a_batch_has_one_label():
    inputs = predictions()
    logs = [kto_loss(*inputs, labels)[1] for labels in (LABELS, torch.ones(6), -torch.ones(6))]
    assert logs[0].keys() == logs[1].keys() == logs[2].keys()
    assert logs[1]["gain_undesirable"] == logs[2]["gain_desirable"] == 0
    assert logs[1]["gain_desirable"] == logs[2]["gain_undesirable"] != 0


ONE_OF_TWO = """
import sys, torch, torch.distributed as dist
from losses import kto_loss, sdpo_loss
from losses.sft import winners_error
dist.init_process_group("gloo")
inputs, labels, pairs = torch.load(sys.argv[1])
rank, found = dist.get_rank(), []
half = lambda x: x.chunk(2)[rank]
pair = lambda x: torch.cat([half(side) for side in x.chunk(2)])
for cut, of in ((half, inputs), (half, inputs), (pair, pairs)):
    eps, eps_ref, noise = (cut(x) for x in of)
    eps = eps.clone().requires_grad_()
    if cut is pair:
        loss, logs = sdpo_loss(eps, eps_ref, noise)
    elif found:
        loss, logs = winners_error("labels", eps, noise, torch.zeros(len(eps)), labels=half(labels)), {}
    else:
        loss, logs = kto_loss(eps, eps_ref, noise, half(labels))
    loss.backward()
    found.append((loss.detach(), logs.get("baseline", logs.get("lam")), eps.grad))
torch.save(found, f"{sys.argv[1]}.{rank}")
dist.destroy_process_group()
"""


def test_what_is_of_the_batch_is_of_all_processes(tmp_path):
    """KTO's baseline, how many are liked, SDPO's lam: two under torchrun with gloo, half of the rows each, are one with
    all."""
    noise = predictions()[2]
    gains = [9e-4, 5e-4, 7e-4, -4e-4, -1e-4, 2e-4]             # a mean of 3e-4; 7e-4 and -1e-4 (or 0) of the halves
    eps, eps_ref = off(noise, *[0.25 - gain for gain in gains]), off(noise, *[0.25] * 6)
    pairs = [x.clone() for x in predictions(pairs=4)]
    pairs[0][:2] = pairs[2][:2] + 0.5 * (pairs[0][4:6] - pairs[2][4:6])          # of the first two pairs lam is below 1
    torch.save(((eps, eps_ref, noise), LABELS, pairs), tmp_path / "inputs")
    (tmp_path / "one_of_two.py").write_text(ONE_OF_TWO)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         tmp_path / "one_of_two.py", tmp_path / "inputs"],
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    kto, liked, sdpo = zip(*(torch.load(tmp_path / f"inputs.{rank}") for rank in range(2)))
    assert kto[0][1] == kto[1][1] and abs(kto[0][1].item() - 3e-4) < 1e-12
    lam = loser_scale(pairs[0], pairs[2], 0.9)
    assert sdpo[0][1] == sdpo[1][1] and 0.01 < lam < 0.9 and abs(sdpo[0][1] - lam) < 1e-12
    for found, loss, inputs in (
            (kto, lambda *x: kto_loss(*x, LABELS)[0], (eps, eps_ref, noise)),
            (liked, lambda eps, eps_ref, noise: winners_error("labels", eps, noise, eps, labels=LABELS),
             (eps, eps_ref, noise)), (sdpo, lambda *x: sdpo_loss(*x)[0], pairs)):
        values, _, grads = zip(*found)
        torch.testing.assert_close(sum(values) / 2, loss(*inputs), rtol=1e-12, atol=0)
        whole = gradient(loss, *inputs)
        if found is sdpo:                      # winners of both, then losers of both
            grads = [torch.cat([grad.chunk(2)[side] for grad in grads]) for side in range(2)]
        torch.testing.assert_close(torch.cat(list(grads)) / 2, whole, rtol=1e-11, atol=0)


def test_the_winners_error_is_that_of_the_better_ones():
    """Of pairs the first halves, of pools the best by the scores, of labelled pictures the liked."""
    noise = predictions()[2]
    eps = off(noise, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    found = [winners_error(data, eps, noise, torch.zeros(n), labels=LABELS, scores=SCORES).item()
             for data, n in (("pairs", 3), ("winners", 6), ("pool", 2), ("labels", 6))]
    # SCORES' best are the second of the first prompt and the third of the second; LABELS like the first, 4th and 5th.
    assert found == pytest.approx([0.2, 0.35, (0.3 + 0.6) / 2, (0.1 + 0.4 + 0.5) / 3], rel=1e-6)
    assert winners_error("labels", eps, noise, torch.zeros(6), labels=-torch.ones(6)) == 0


# Without a reference

def test_mapo_is_the_official_formula():
    def official(eps, noise):
        mse_w, mse_l = (eps - noise).pow(2).mean(dim=[1, 2, 3]).chunk(2)
        s = lambda mse: 0.5 * mse / (torch.exp(0.5 * mse) - 1)
        return mse_w.mean() - (0.1 * F.logsigmoid((s(mse_w) - s(mse_l)) * 1000)).mean()

    eps, _, noise = predictions()
    torch.testing.assert_close(mapo_loss(eps, noise)[0], official(eps, noise), rtol=1e-10, atol=0)
    ours = gradient(lambda *x: mapo_loss(*x)[0], eps, noise)
    torch.testing.assert_close(ours, gradient(official, eps, noise), rtol=1e-7, atol=1e-14)
    # Small errors: DPO's margin at a beta of 250, with no reference.
    small = noise + 0.01 * (eps - noise)
    mse_w, mse_l = (small - noise).pow(2).mean(dim=(1, 2, 3)).chunk(2)
    wanted = mse_w.mean() - 0.1 * F.logsigmoid(-250 * (mse_w - mse_l)).mean()
    torch.testing.assert_close(mapo_loss(small, noise)[0], wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_mapo_and_orpo_are_stable_at_both_ends(dtype):
    """Values and slopes for errors of 0 to 1e5: MaPO's s is 1 - x/2 + x^2/12 and then x exp(-x), falling throughout;
    ORPO's log odds are -log x, and then -x."""
    mse = torch.tensor([0.0, 1e-30, 1e-12, 1e-6, 1.9e-3, 2.1e-3, 0.1, 1.0, 30.0, 300.0, 1e5], dtype=dtype)
    x = mse.double() / 2
    s = torch.where(x < 0.1, 1 - x / 2 + x**2 / 12 - x**4 / 720 + x**6 / 30240, x / torch.expm1(x.clamp(min=0.1)))
    s_slope = torch.where(
        x < 0.1, -1 / 2 + x / 6 - x**3 / 180 + x**5 / 5040,
        torch.exp(-x) * (1 - x - torch.exp(-x)) / torch.expm1(-x.clamp(min=0.1))**2)
    mse.requires_grad_()
    got = likelihood(mse)
    tight = dict(rtol=1e-12, atol=1e-30) if dtype == torch.float64 else dict(rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(got.detach().double(), s, **tight)
    grad, = torch.autograd.grad(got.sum(), mse)
    torch.testing.assert_close(grad.double(), s_slope / 2, rtol=1e-9 if dtype == torch.float64 else 1e-3, atol=1e-30)
    assert (got[1:] <= got[:-1]).all()

    odds = log_odds(mse)
    wanted = torch.where(x < 1e-9, -torch.log(x), -x - torch.log(-torch.expm1(-x)))
    torch.testing.assert_close(odds[1:].detach().double(), wanted[1:], **tight)
    assert odds[0].isfinite() and torch.autograd.grad(odds.sum(), mse)[0][0].isfinite()
    assert (odds[1:] < odds[:-1]).all()


def test_orpo_is_the_ratio_of_odds_and_prefers_the_winner():
    eps, _, noise = predictions(away=0.3)
    p_w, p_l = torch.exp(-(eps - noise).pow(2).mean(dim=(1, 2, 3)) / 2).chunk(2)
    ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    wanted = (eps - noise)[:3].pow(2).mean() + 0.1 * torch.log1p(1 / ratio).mean()
    torch.testing.assert_close(orpo_loss(eps, noise)[0], wanted, rtol=1e-12, atol=0)
    outward = 2 * (eps - noise)                                # the gradient of the errors
    for loss in (orpo_loss, mapo_loss):
        along = (gradient(lambda *x, f=loss: f(*x)[0], eps, noise) * outward).sum(dim=(1, 2, 3))
        assert (along[:3] > 0).all() and (along[3:] < 0).all()


# Pools

def test_pro_is_plackett_and_luces_likelihood():
    """A product of choices, each among those not yet chosen, whatever the order in which the pool lies."""
    inputs = predictions(pairs=4)                              # two pools of four
    noise = inputs[2][:2].repeat(4, 1, 1, 1)
    eps, eps_ref = (x - inputs[2] + noise for x in inputs[:2])
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.5], [-1.0, 7.0, -3.0, 4.0]])
    gains = ((eps_ref - noise).pow(2) - (eps - noise).pow(2)).mean(dim=(1, 2, 3)).view(4, 2)
    total = 0.0
    for prompt in range(2):
        left = sorted(range(4), key=lambda k: -scores[prompt, k])
        while len(left) > 1:
            strengths = torch.exp(2500 * gains[left, prompt])
            total -= torch.log(strengths[0] / strengths.sum())
            left = left[1:]
    loss, logs = pro_loss(eps, eps_ref, noise, scores)
    torch.testing.assert_close(loss, total / (2 * 3), rtol=1e-12, atol=0)
    best, worst = gains[scores.argmax(1), [0, 1]], gains[scores.argmin(1), [0, 1]]
    torch.testing.assert_close(logs["mse_w_gain"], best.mean())
    torch.testing.assert_close(logs["mse_l_gain"], worst.mean())

    order = torch.tensor([2, 0, 3, 1])
    moved = [x.unflatten(0, (4, 2))[order].flatten(0, 1) for x in (eps, eps_ref, noise)]
    torch.testing.assert_close(pro_loss(*moved, scores[:, order])[0], loss, rtol=1e-13, atol=0)
    assert torch.equal(pro_loss(eps, eps_ref, noise, torch.exp(scores))[0], loss)            # only the order counts
    # Equal scores say nothing of each other: one choice of the best from all, twice one from itself and the worst.
    strengths, among = torch.exp(2500 * gains), {2: [2, 0, 1, 3], 0: [0, 1], 3: [3, 1]}
    wanted = sum((strengths[rest].sum(dim=0) / strengths[k]).log() for k, rest in among.items())
    tied = pro_loss(eps, eps_ref, noise, torch.tensor([[2.0, 1.0, 3.0, 2.0]] * 2))[0]
    torch.testing.assert_close(tied, wanted.mean() / 3, rtol=1e-12, atol=0)
    large = pro_loss(eps, eps_ref, noise, scores, beta=1e9)[0]                               # no overflow
    assert large.isfinite() and large > 1e3


@pytest.mark.parametrize("pool", [2, 5, 20])
def test_pro_starts_at_ln_of_all_orders(pool):
    noise = torch.zeros(3 * pool, 1, 2, 2)
    eps = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    loss = pro_loss(eps, eps, noise, torch.rand(3, pool, generator=torch.Generator().manual_seed(1)))[0]
    assert abs(loss.item() - math.lgamma(pool + 1) / (pool - 1)) < 1e-6


def test_rwr_weights():
    """A mean of 1 for each prompt; the same where all scores rise alike; the best alone as the scale grows."""
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0], [-5.0, 0.0, 1.0, 2.0]], dtype=torch.float64)
    exponential = picture_weights(scores, 0.5, 0.0)
    torch.testing.assert_close(exponential.sum(1), torch.full((2,), 4.0, dtype=torch.float64))
    torch.testing.assert_close(
        exponential[:, 1:] / exponential[:, :1], torch.exp(0.5 * (scores[:, 1:] - scores[:, :1])))
    for reward_scale, top in ((0.5, 0.0), (0.5, 0.5)):
        shifted = picture_weights(scores + torch.tensor([[100.0], [-7.0]]), reward_scale, top)
        torch.testing.assert_close(shifted, picture_weights(scores, reward_scale, top), rtol=1e-12, atol=1e-12)
    assert picture_weights(scores, 1e4, 0.0)[1].tolist() == [0, 0, 0, 4]
    for top, wanted in ((0.01, [[0, 4, 0, 0], [0, 0, 0, 4]]), (0.5, [[0, 2, 0, 2], [0, 0, 2, 2]]),
                        (0.99, [[1, 1, 1, 1], [1, 1, 1, 1]])):
        assert picture_weights(scores, 0.5, top).tolist() == wanted


def test_rwr_weighs_the_picture_that_the_score_is_of():
    """Rows are all first pictures, then all second ones; scores (B, K)."""
    noise = torch.zeros(6, 1, 2, 2, dtype=torch.float64)
    errors = [1.0, 10.0, 2.0, 20.0, 3.0, 30.0]                 # 1, 2, 3 of the first prompt; 10, 20, 30 of the second
    loss, logs = rwr_loss(off(noise, *errors), noise, SCORES, reward_scale=0.7)
    wanted = (torch.softmax(0.7 * SCORES, dim=1) * torch.tensor([[1, 2, 3], [10, 20, 30]])).sum(1).mean()
    torch.testing.assert_close(loss, wanted)
    assert rwr_loss(off(noise, *errors), noise, SCORES, top=0.3)[0] == (2 + 30) / 2
    assert abs(logs["mse"].item() - 11) < 1e-12 and 1 < logs["largest_weight"] < 3


# Discount

def test_discounted_weights():
    every = weights(torch.arange(1000), 0.9)
    assert abs(every.mean().item() - 1) < 1e-6
    torch.testing.assert_close(every[20:] * 0.9, every[:-20])              # 20 of 1000 steps are one of 50: 0.9 times
    assert abs(every[999].item() - 1000 * (1 - 0.9**0.05) / (1 - 0.9**50)) < 1e-4            # the sum of the series
    assert torch.equal(weights(torch.tensor([999, 0, 999]), 0.9), every[[999, 0, 999]])
    assert torch.equal(weights(torch.arange(1000), 1.0), torch.ones(1000))


def test_a_discount_is_a_beta_of_each_pairs_own():
    inputs = predictions()
    t = torch.tensor([10, 500, 990])
    loss = diffusion_dpo_loss(*inputs, timesteps=t, discount=0.9)[0]
    betas = 2500 * weights(t, 0.9)
    alone = [diffusion_dpo_loss(*[x[[i, i + 3]] for x in inputs], betas[i].item())[0] for i in range(3)]
    torch.testing.assert_close(loss, sum(alone) / 3, rtol=1e-12, atol=0)
    assert betas[0] < 200 and betas[2] > 10000
