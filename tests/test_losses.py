"""The losses against what they are defined by: diffusers' and Salesforce's DPO loss, two literal steps of diffusers'
DDPMScheduler, values worked out by hand, and each other (fused and apart; plain torch and Triton)."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from losses import diffusion_dpo_loss, hg_dpo_loss, statistic_matching_loss
from losses.hg_dpo import PairSums
from losses.statistic_matching import ddpm_mean_gain

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2         # SD1.5's schedule
ALPHAS_CUMPROD = (1 - BETAS).cumprod(0)
TIMESTEPS = torch.tensor([0, 500, 999])
HALF = [torch.bfloat16, torch.float16]


def predictions(
    dtype: torch.dtype = torch.float64, pairs: int = 3, channels: int = 4, size: tuple[int, int] = (5, 7),
    away: float = 0.01, device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """(eps, eps_ref, noise): a reference wrong by about 0.3, a policy `away` from it; a pair shares its noise."""
    g = torch.Generator().manual_seed(0)
    noise, wrong, moved = torch.randn((3, 2 * pairs, channels, *size), generator=g, dtype=torch.float64)
    noise = noise[:pairs].repeat(2, 1, 1, 1)
    eps_ref = noise + 0.3 * wrong
    eps = eps_ref + away * moved + 0.5 * away          # the constant shifts the channel means
    return eps.to(device, dtype), eps_ref.to(device, dtype), noise.to(device, dtype)


def fused(eps: Tensor, eps_ref: Tensor, noise: Tensor, beta: float = 2500.0, lambda_stat: float = 1e6):
    t, alphas_cumprod = TIMESTEPS[:len(eps) // 2].to(eps.device), ALPHAS_CUMPROD.to(eps.device)
    return hg_dpo_loss(eps, eps_ref, noise, t, alphas_cumprod, beta, lambda_stat)


def apart(eps: Tensor, eps_ref: Tensor, noise: Tensor, beta: float = 2500.0, lambda_stat: float = 1e6):
    dpo, logs = diffusion_dpo_loss(eps, eps_ref, noise, beta)
    t = TIMESTEPS[:len(eps) // 2].to(eps.device)
    stat = statistic_matching_loss(eps.chunk(2)[0], eps_ref.chunk(2)[0], t, ALPHAS_CUMPROD.to(eps.device))
    return dpo + lambda_stat * stat, {"dpo": dpo, "stat": stat, **logs}


LOSSES = {
    "dpo": lambda eps, eps_ref, noise: diffusion_dpo_loss(eps, eps_ref, noise)[0],
    "stat": lambda eps, eps_ref, noise: 1e6 * apart(eps, eps_ref, noise)[1]["stat"],     # as large as the others
    "hg-dpo": lambda eps, eps_ref, noise: fused(eps, eps_ref, noise)[0]}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def gradient(loss, eps: Tensor, *others: Tensor) -> Tensor:
    eps = eps.clone().requires_grad_()
    return torch.autograd.grad(loss(eps, *others), eps)[0]


# Diffusion-DPO

def diffusers_dpo(eps, eps_ref, noise, beta=2500.0):
    """The lines of diffusers' train_diffusion_dpo.py between its predictions and its loss."""
    model_w, model_l = F.mse_loss(eps, noise, reduction="none").mean(dim=[1, 2, 3]).chunk(2)
    ref_w, ref_l = F.mse_loss(eps_ref, noise, reduction="none").mean(dim=[1, 2, 3]).chunk(2)
    logits = (ref_w - ref_l) - (model_w - model_l)
    accuracy = (logits > 0).sum() / len(logits) + 0.5 * (logits == 0).sum() / len(logits)
    return -1 * F.logsigmoid(beta * logits).mean(), accuracy


def salesforce_dpo(eps, eps_ref, noise, beta=5000.0):
    """The same of Diffusion-DPO's authors, whose beta is twice as large before a factor of one half."""
    model_w, model_l = (eps - noise).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    ref_w, ref_l = (eps_ref - noise).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    return -1 * F.logsigmoid(-0.5 * beta * ((model_w - model_l) - (ref_w - ref_l))).mean()


def test_dpo_equals_diffusers_and_salesforces():
    inputs = predictions(pairs=16, size=(9, 6))
    loss, logs = diffusion_dpo_loss(*inputs)
    wanted, accuracy = diffusers_dpo(*inputs)
    assert 0.2 < accuracy < 0.9 and abs(loss.item() - math.log(2)) > 0.1, "the comparison says nothing"
    for other in (wanted, salesforce_dpo(*inputs)):
        torch.testing.assert_close(loss, other, rtol=1e-13, atol=0)
    assert logs["implicit_accuracy"] == accuracy
    ours = gradient(LOSSES["dpo"], *inputs)
    torch.testing.assert_close(ours, gradient(lambda *x: diffusers_dpo(*x)[0], *inputs), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [(4, 4), (8, 16)], ids=str)
def test_dpo_by_hand(size):
    """Errors that are the same everywhere: 0.100 and 0.101 (policy, reference) on the winner, 0.100 and 0.0995 on the
    loser, and a second pair that ties. A mean over the elements, so the size does not matter: with a sum the logit
    would be 64 or 512 times as large."""
    noise = predictions(pairs=2, size=size)[2]
    off = lambda *errors: noise + torch.tensor(errors, dtype=torch.float64)[:, None, None, None]
    loss, logs = diffusion_dpo_loss(off(0.1, 0.2, 0.1, 0.3), off(0.101, 0.2, 0.0995, 0.3), noise)
    logit = 2500 * ((0.101**2 - 0.1**2) + (0.1**2 - 0.0995**2))                  # 0.751875
    assert abs(loss.item() - (math.log1p(math.exp(-logit)) + math.log(2)) / 2) < 1e-9
    assert logs["implicit_accuracy"] == 0.75                                     # one won, one tied
    for key, value in {"mse_w": (0.01 + 0.04) / 2, "mse_l": (0.01 + 0.09) / 2, "mse_w_gain": 0.000201 / 2,
                       "mse_l_gain": -0.00009975 / 2}.items():
        assert abs(logs[key].item() - value) < 1e-12, key


def test_dpo_swapping_winner_and_loser_flips_the_logit():
    """-log s(-x) + log s(x) = x: the two losses differ by the logit of the unswapped pair."""
    inputs = predictions(pairs=1)
    swapped = [x.flip(0) for x in inputs]
    errors, errors_ref = ((x - inputs[2]).pow(2).mean(dim=(1, 2, 3)) for x in inputs[:2])
    gain_w, gain_l = errors_ref - errors
    (loss, logs), (loss_swapped, logs_swapped) = diffusion_dpo_loss(*inputs), diffusion_dpo_loss(*swapped)
    torch.testing.assert_close(loss_swapped - loss, 2500 * (gain_w - gain_l))
    assert logs["implicit_accuracy"] + logs_swapped["implicit_accuracy"] == 1
    assert logs["mse_w_gain"] == logs_swapped["mse_l_gain"] == gain_w


def test_dpo_gradient_pulls_the_winner_to_the_noise_and_pushes_the_loser_off():
    """beta * s(-logit) / B times the gradient of the mean squared error, with the loser's sign turned."""
    eps, eps_ref, noise = predictions(pairs=2)
    grad = gradient(LOSSES["dpo"], eps, eps_ref, noise)
    gain = (eps_ref - noise).pow(2).mean(dim=(1, 2, 3)) - (eps - noise).pow(2).mean(dim=(1, 2, 3))
    logit = 2500 * (gain[:2] - gain[2:])
    push = torch.sigmoid(-logit).repeat(2) * torch.tensor([1, 1, -1, -1]) * 2500 / 2
    torch.testing.assert_close(grad, push[:, None, None, None] * 2 * (eps - noise) / eps[0].numel())


# Statistic matching

def literal_statistic_loss(eps_w, eps_ref_w, x_t, timesteps):
    """Eq. 8 as it is written: a DDPM step with either prediction, from the same x_t and with the same z."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)        # steps t -> t-1
    scheduler.alphas_cumprod, scheduler.one = ALPHAS_CUMPROD, torch.tensor(1.0, dtype=torch.float64)
    total = 0.0
    for i, t in enumerate(timesteps.tolist()):
        means = [
            scheduler.step(
                eps[i:i + 1], t, x_t[i:i + 1], generator=torch.Generator().manual_seed(i)).prev_sample.mean(dim=(2, 3))
            for eps in (eps_w, eps_ref_w)]
        total = total + (means[0] - means[1]).pow(2).sum()
    return total / len(timesteps)


def test_statistic_matching_equals_two_literal_ddpm_steps():
    timesteps = torch.tensor([0, 1, 2, 41, 500, 998, 999])
    eps_w, eps_ref_w, x_t = torch.randn((3, 7, 4, 9, 6), generator=torch.Generator().manual_seed(0)).double()
    for rows in [slice(None), *(slice(i, i + 1) for i in range(7))]:             # together, and step by step
        inputs = eps_w[rows], eps_ref_w[rows]
        got = statistic_matching_loss(*inputs, timesteps[rows], ALPHAS_CUMPROD)
        wanted = literal_statistic_loss(*inputs, x_t[rows], timesteps[rows])
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=0)


def test_the_gain_of_a_ddpm_step_has_known_values():
    k = ddpm_mean_gain(torch.arange(1000), ALPHAS_CUMPROD)
    for t, value in {1: 2.07e-2, 100: 4.26e-3, 250: 4.26e-3, 500: 5.67e-3, 750: 8.28e-3, 999: 1.21e-2}.items():
        assert abs(k[t].item() / value - 1) < 2e-3, t
    # The paper's lambda of 10,000 undoes this scale; the very last step counts most.
    assert abs(1e4 * k.pow(2).mean().item() - 0.515) < 5e-4 and 8.4 < 1e4 * k.pow(2).max().item() < 8.6
    assert k.argmax() == 0 and abs(k[0].item() - (BETAS[0] / (1 - BETAS[0])).sqrt().item()) < 1e-12
    single = ddpm_mean_gain(torch.arange(1000), ALPHAS_CUMPROD.float())          # as the programs hold it
    torch.testing.assert_close(single.double(), k, rtol=1e-3, atol=0)


def test_statistic_matching_sees_the_winners_channel_means_and_nothing_else():
    eps, eps_ref, noise = predictions()
    stat = LOSSES["stat"](eps, eps_ref, noise)
    ripple = torch.randn_like(eps)
    ripple = ripple - ripple.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(LOSSES["stat"](eps + ripple, eps_ref, noise), stat)
    eps[3:] += 1                                                                 # the losers
    torch.testing.assert_close(1e6 * fused(eps, eps_ref, noise)[1]["stat"], stat)
    assert LOSSES["stat"](eps + 0.01, eps_ref, noise) > stat > 0


# All of them

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_losses_are_exact_before_the_first_step(dtype):
    """A policy that is the reference: ln 2 and 0, to the last bit of float32, and half of all pairs 'right'."""
    _, eps_ref, noise = predictions(dtype)
    eps = eps_ref.clone().requires_grad_()
    loss, logs = fused(eps, eps_ref, noise)
    assert loss.item() == logs["dpo"].item() == torch.tensor(2.0, dtype=loss.dtype).log().item()
    assert logs["stat"] == logs["mse_w_gain"] == logs["mse_l_gain"] == 0 and logs["implicit_accuracy"] == 0.5
    assert diffusion_dpo_loss(eps, eps_ref, noise)[0] == loss
    assert LOSSES["stat"](eps, eps_ref, noise) == 0
    assert torch.autograd.grad(loss, eps)[0].abs().max() > 0                     # and yet there is something to learn


@pytest.mark.parametrize("shape", [dict(pairs=3, size=(5, 7)), dict(pairs=1, size=(1, 9)),
                                   dict(pairs=2, channels=3, size=(24, 16))], ids=str)
def test_the_fused_loss_is_the_sum_of_the_two(shape):
    inputs = predictions(**shape)
    for weights in ((2500.0, 1e4), (700.0, 3e7)):
        (got, logs), (wanted, wanted_logs) = fused(*inputs, *weights), apart(*inputs, *weights)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
        assert logs.keys() == wanted_logs.keys()
        for key in logs:
            torch.testing.assert_close(logs[key], wanted_logs[key], rtol=1e-10, atol=1e-14, msg=key)
        ours, wanted = (gradient(lambda *x, f=f, w=weights: f(*x, *w)[0], *inputs) for f in (fused, apart))
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-13)


def test_the_fused_loss_in_float32():
    """Not far from float64, although beta blows rounding up: 2500 times differences of errors near 0.1."""
    exact = predictions(pairs=3, size=(24, 16))
    single = [x.float() for x in exact]
    exact = [x.double() for x in single]
    for f in (fused, apart):
        torch.testing.assert_close(f(*single)[0].double(), f(*exact)[0], rtol=0, atol=2e-4)
        grads = [gradient(lambda *x, f=f: f(*x)[0], *x).double() for x in (single, exact)]
        assert (grads[0] - grads[1]).abs().max() < 1e-4 * grads[1].abs().max()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@every_loss
def test_half_precision_is_raised_to_float32(loss, dtype):
    """The same, bit for bit, as float32 of the same inputs; the gradient is that one's, rounded once."""
    inputs = predictions(dtype, away=0.05)
    raised = [x.float() for x in inputs]
    assert loss(*inputs).dtype == torch.float32 and torch.equal(loss(*inputs), loss(*raised))
    grad = gradient(loss, *inputs)
    assert grad.dtype == dtype and torch.equal(grad, gradient(loss, *raised).to(dtype))
    mixed = inputs[0], inputs[1], inputs[2].float()                              # noise is drawn in float32
    assert torch.equal(loss(*mixed), loss(*inputs))


@every_loss
def test_float64_stays_float64_and_gradients_are_right(loss):
    inputs = [x.double() for x in predictions(size=(3, 2), away=0.05)]
    eps = inputs[0].requires_grad_()
    assert loss(*inputs).dtype == torch.float64 and loss(*inputs).ndim == 0
    assert torch.autograd.gradcheck(lambda eps: loss(eps, *inputs[1:]), eps, eps=1e-7, rtol=1e-5, atol=1e-7)


@every_loss
def test_only_eps_gets_a_gradient_and_inputs_are_left_alone(loss):
    inputs = predictions()
    before = [x.clone() for x in inputs]
    eps, eps_ref, _ = inputs
    eps.requires_grad_(), eps_ref.requires_grad_()             # as when a caller forgot no_grad around the reference
    loss(*inputs).backward()
    assert eps.grad is not None and eps_ref.grad is None
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


@every_loss
def test_memory_layout_does_not_matter(loss):
    """channels_last, as a convolution returns it on a GPU, and noise that is expanded rather than copied."""
    eps, eps_ref, noise = predictions()
    strange = [x.to(memory_format=torch.channels_last) for x in (eps, eps_ref)]
    strange.append(noise[:3].expand(2, *noise[:3].shape).flatten(0, 1))
    torch.testing.assert_close(loss(*strange), loss(eps, eps_ref, noise))
    torch.testing.assert_close(gradient(loss, *strange), gradient(loss, eps, eps_ref, noise))


@every_loss
def test_nothing_waits_for_the_device(loss):
    """Fake tensors have no values: an `.item()` or an `if` on one fails here, forward or backward. And the whole is one
    graph for torch.compile."""
    with FakeTensorMode():
        inputs = [torch.empty(6, 4, 88, 128, dtype=torch.bfloat16) for _ in range(3)]
        eps = inputs[0].requires_grad_()
        timesteps, alphas_cumprod = torch.empty(3, dtype=torch.long), torch.empty(1000)
        statistic_matching_loss(eps[:3], inputs[1][:3], timesteps, alphas_cumprod).backward()
        total, logs = hg_dpo_loss(*inputs, timesteps, alphas_cumprod)
        (total + diffusion_dpo_loss(*inputs)[0]).backward()
        assert eps.grad.shape == eps.shape and eps.grad.dtype == torch.bfloat16
        assert all(value.ndim == 0 and not value.requires_grad for value in logs.values())
    inputs = predictions()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    torch.testing.assert_close(gradient(compiled, *inputs), gradient(loss, *inputs))


# The Triton kernels

def check_kernels() -> None:
    """`PairSums`' passes by Triton against plain torch, which defines them. Run in a process of its own, where Triton
    was imported as an interpreter."""
    from losses import hg_dpo_triton as kernels

    assert kernels.BLOCK == 2048                 # the sizes below are chosen around it
    for dtype in (torch.float32, torch.float64, *HALF):
        for size in ((1, 1), (5, 7), (32, 64), (43, 51)):        # less than a block, one exactly, one and a bit
            inputs = predictions(dtype, pairs=1, size=size)
            noise = inputs[2].to(torch.promote_types(dtype, torch.float32))      # float32 beside a half-precision eps
            layouts = [inputs, [x.to(memory_format=torch.channels_last) for x in (*inputs[:2], noise)]]
            for eps, eps_ref, noise in layouts:
                eps = eps.detach().requires_grad_()
                wanted = PairSums.apply(eps, eps_ref, noise)
                got = kernels.sums(eps.detach(), eps_ref, noise)
                assert got.dtype == wanted.dtype and got.shape == wanted.shape == (3, 2, 4)
                exact = dtype == torch.float64
                torch.testing.assert_close(got, wanted, rtol=1e-13 if exact else 1e-5, atol=1e-12 if exact else 1e-4)

                weights = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator().manual_seed(1))
                wanted, = torch.autograd.grad(wanted, eps, weights)
                got = kernels.gradient(eps.detach(), noise, weights)
                assert got.dtype == wanted.dtype == dtype and got.shape == eps.shape
                ulp = torch.finfo(dtype).eps             # the interpreter cuts bfloat16 off where a GPU rounds it
                torch.testing.assert_close(got, wanted, rtol=2 * ulp, atol=2 * ulp)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernels_equal_the_definition():
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_losses import check_kernels; check_kernels()"],
        cwd=Path(__file__).parent.parent, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])               # of an A100, of an H100 and H200
def test_the_triton_kernels_compile_for_gpus(capability, tmp_path, monkeypatch):
    """By Triton's own compiler, which needs no GPU. They fit into registers: nothing is spilled to memory, a quarter
    of the threads that a multiprocessor can have is at work at once."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")        # its default, which it warns of otherwise
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from losses import hg_dpo_triton as kernels
    binary = tmp_path / "kernel.cubin"
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kernel in (kernels.sums_kernel, kernels.gradient_kernel):
        for eps in ("fp64", "fp32", "bf16", "fp16"):
            acc = "fp64" if eps == "fp64" else "fp32"
            types = {"eps": eps, "eps_ref": eps, "noise": acc, "grad": acc}
            types["out"] = acc if kernel is kernels.sums_kernel else eps
            kinds = {name: f"*{types[name]}" if name in types else "i32" for name in kernel.arg_names}
            constants = {"BLOCK": kernels.BLOCK, "ACC": {"fp64": tl.float64, "fp32": tl.float32}[acc]}
            source = triton.compiler.ASTSource(kernel, kinds | dict.fromkeys(constants, "constexpr"), constants)
            binary.write_bytes(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"])
            told = subprocess.run([disassembler, "--dump-resource-usage", binary], capture_output=True, text=True)
            used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout)}
            assert used["STACK"] == used["LOCAL"] == 0 and used["REG"] <= 128, (kernel.__name__, eps, used)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_the_fused_loss_on_cuda(dtype):
    """The kernels as a GPU runs them, at the paper's latent size."""
    losses, grads = [], []
    for device in ("cpu", "cuda"):
        inputs = predictions(dtype, pairs=3, size=(128, 88), away=0.02, device=device)
        losses.append(fused(*inputs)[0].cpu())
        grads.append(gradient(LOSSES["hg-dpo"], *inputs).cpu().double())
    torch.testing.assert_close(*losses, rtol=1e-12 if dtype == torch.float64 else 1e-3, atol=0)
    assert (grads[0] - grads[1]).abs().max() < max(1e-4, 2 * torch.finfo(dtype).eps) * grads[0].abs().max()
