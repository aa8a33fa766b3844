"""Trains a LoRA on pictures that it draws itself, by a scorer's reward. One file, read from top to bottom; copy it.

    python train_online.py --method grpo --steps 50 --out run              # paper people, rewarded by their scorer
    python train_online.py --method draft --model owner/name --prompts FILE --scorer hpsv2.1 --judge pickscore --out run
    torchrun --nproc-per-node 4 train_online.py --method ddpo ...

One step: prompts -> pictures by the policy (the U-Net with its LoRA, guided) -> rewards -> one update or several.

  ddpo, ddpo-sf, grpo, dpok   every denoising step of a picture that is better than others of its prompt more likely
  d3po, dense                 of two pictures from one first noise the better one's steps more likely than the other's
  spo                         of several candidates for the next latent the best more likely than the worst
  refl, draft, alignprop      the gradient of the reward itself, through the VAE and the last denoising steps

The first three draw by DDIM with eta 1, where a step has a probability; no scorer needs a gradient for them. All reach
a high reward in the end by pictures that nobody wants: --judge has a second scorer look on, --patience heeds it, and
--kl-weight holds the policy to the model as it was.

What picture s of the run sees (prompt, noise) depends on --seed and s alone. So a run that was killed goes on bit for
bit where its checkpoint is, and N processes do what one with N times the batch does.
"""

import cli

# isort: split
import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evaluation.judges import load_judge
from losses.advantages import group_advantages, running_advantages
from losses.policy import ddpo_is_loss, ddpo_sf_loss, dpok_loss, kl_to_reference
from losses.step_preferences import d3po_loss, dense_loss, spo_loss
from losses.table import Loss, Option
from model.builtin import BUILT_IN, default_scorer
from model.checkpoint import Pipeline, load_pipeline
from model.errors import UserError
from model.files import digest_all, digest_of, files_read
from model.lora import inject_lora, load_lora_to_train, lora_disabled, save_lora
from model.scorers import load_reward
from sampling import Drawing, add_noise, ddim_step, decode, guided_eps, seeded, to_images, to_picture, x0_from_eps
from sampling.onto import onto
from sampling.rollout import eps_gain, rollout, rollout_timesteps, step_distribution, step_log_prob
from sampling.schedule import T, timesteps
from training.average import averaged, update_average
from training.memory import make_optimizer, save_memory
from training.order import row_at
from training.parallel import any_process, average_gradients, gathered, join_processes
from training.rate import SCHEDULES, learning_rate
from training.rewards import Told, judge_falls, read_rewards, refuse_standstill
from training.run import (
    append_lines,
    append_log,
    begun,
    check_start,
    log_lines,
    model_card,
    noted_signals,
    resume,
    save_checkpoint,
)
from training.watch import draw_samples

LN2 = math.log(2)
CLIP = {"clip": Option("of the ratio of a step's probabilities, which are means over its elements", above=0, below=1)}
BETA = {"beta": Option("strength of a preference", above=0)}
GROUP = {"guidance": 5.0, "sampler_steps": 50, "pictures": 1, "updates": 1, "epochs": 1, "kl_weight": 0.0,
         "kl": "eps_mse"}
GRADIENT = {"sampler_steps": 50, "pictures": 1, "kl_weight": 0.0, "reward_limit": None}


@dataclass(frozen=True)
class Method:
    """Defaults are the official codes' for SD1.5; batches a step where those have several processes."""

    defaults: dict[str, float | str | None]
    loss: Loss | None = None           # of steps' log-probabilities; none: the gradient goes through the reward
    advantages: Callable[[Tensor, list[int], dict], Tensor] | None = None        # rewards, prompts, buffers -> (R,)
    pairs: bool = False                # two pictures a prompt from one first noise; the loss has the better ones first
    whole: bool = False                # the loss takes all steps of a picture at once
    candidates: bool = False           # the steps are preferences among candidates, scored by what they look like

    def all_defaults(self) -> dict[str, float | str | None]:
        return self.defaults | (self.loss.defaults() if self.loss else {})


METHODS = {
    "ddpo": Method(GROUP | {"lr": 3e-4, "batch_size": 8, "grad_accum": 32, "updates": 2},
                   Loss(ddpo_is_loss, CLIP, at_start={"ratio_off": 0.0}), running_advantages),
    "ddpo-sf": Method(GROUP | {"lr": 3e-4, "batch_size": 8, "grad_accum": 32}, Loss(ddpo_sf_loss), running_advantages),
    "grpo": Method(GROUP | {"lr": 3e-4, "batch_size": 2, "grad_accum": 16, "pictures": 8},
                   Loss(ddpo_is_loss, CLIP, at_start={"ratio_off": 0.0}),
                   lambda rewards, prompts, _: group_advantages(rewards, prompts)),
    "dpok": Method(GROUP | {"lr": 1e-5, "guidance": 7.5, "batch_size": 5, "grad_accum": 2, "epochs": 5,
                            "kl_weight": 0.01},
                   Loss(dpok_loss, CLIP | {"reward_weight": Option("of the reward beside the KL", above=0)},
                        at_start={"ratio_off": 0.0}),
                   partial(running_advantages, scaled=False, limit=math.inf)),
    "d3po": Method(GROUP | {"lr": 3e-5, "sampler_steps": 20, "batch_size": 4, "grad_accum": 5, "pictures": 2},
                   Loss(d3po_loss, CLIP | BETA, at_start={"d3po": LN2}), pairs=True),
    "dense": Method(GROUP | {"lr": 3e-5, "guidance": 7.5, "batch_size": 4, "grad_accum": 1, "pictures": 2},
                    Loss(dense_loss, CLIP | BETA | {"discount": Option(
                        "each denoising step counts this times the noisier one before it", above=0)},
                         at_start={"dense": LN2}), pairs=True, whole=True),
    "spo": Method(GROUP | {"lr": 6e-5, "sampler_steps": 20, "batch_size": 4, "grad_accum": 10, "candidates": 4},
                  Loss(spo_loss, CLIP | BETA | {"margin": Option(
                      "of the probability that the best candidate is preferred over that of the worst; less is no pair",
                      least=0, below=1)}, at_start={"implicit_accuracy": 0.5}), candidates=True),
    "refl": Method(GRADIENT | {"lr": 1e-5, "guidance": 1.0, "sampler_steps": 40, "batch_size": 2, "grad_accum": 32,
                               "reward_limit": 2.0}),
    "draft": Method(GRADIENT | {"lr": 4e-4, "guidance": 7.5, "batch_size": 4, "grad_accum": 1, "gradient_steps": 1,
                                "extra_noises": 0}),
    "alignprop": Method(GRADIENT | {"lr": 1e-3, "guidance": 5.0, "batch_size": 4, "grad_accum": 32,
                                    "gradient_steps": "random"})}
OPTIONS = {name: option for method in METHODS.values() if method.loss for name, option in method.loss.options.items()}
OF_METHODS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.all_defaults()))
# What a run is, whatever it runs on. Of the first three the contents count; of scorers the name does as well, for one
# file has several, and sums have weights.
MAY_CHANGE = ("model", "prompts", "init_lora", "category", "limit")
NOTED = (*MAY_CHANGE, "scorer", "judge", "method", "rank", "alpha", "warmup", "seed", "height", "width", "optimizer",
         "max_grad_norm", "dtype", "prediction_type", "lr_schedule", "ema")


def parse_args():
    parser = cli.common_parser(__doc__)
    parser.add_argument("--method", required=True, choices=tuple(METHODS))
    parser.add_argument("--scorer", help="the reward (default: the model's own scorer/ if it has one, else pickscore)")
    parser.add_argument("--judge", metavar="SCORER", help="another scorer, which looks on: `judge` in the log")
    parser.add_argument("--patience", type=cli.whole(0), default=0, metavar="STEPS", help="with --judge: stop when its "
                        "mean over so many steps is below that of as many before; 0 is never")
    cli.add_prompt_options(parser, "see generate.py (default with paper-people: its own)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the run; the same command goes on with it")
    parser.add_argument("--sampler-steps", type=cli.whole(1, 999), help="denoising steps of a picture")
    parser.add_argument("--guidance", type=cli.real(0), help="scale, to draw and to train; 1 is off")
    parser.add_argument("--height", type=cli.pixels, help="pixels (default: the model's own size)")
    parser.add_argument("--width", type=cli.pixels, help="pixels (default: the model's own size)")
    parser.add_argument("--pictures", type=cli.whole(1), help="of a prompt, in a step")
    parser.add_argument("--updates", type=cli.whole(1), help="of the weights in a step, each by its share of batches")
    parser.add_argument("--epochs", type=cli.whole(1), help="how often a step learns from its pictures")
    parser.add_argument("--kl-weight", type=cli.real(0), help="of the distance to the reference, added to the loss")
    parser.add_argument("--kl", choices=("eps_mse", "gaussian"), help="of --kl-weight, see losses/policy.py")
    for name, option in OPTIONS.items():
        kind = cli.real(option.least, option.above, below=option.below)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=option.help)
    parser.add_argument("--candidates", type=cli.whole(2), help="of a denoising step (spo)")
    parser.add_argument("--gradient-steps", type=lambda text: text if text == "random" else cli.whole(1)(text),
                        metavar="K", help="the gradient goes through the last K denoising steps; or random")
    parser.add_argument("--extra-noises", type=cli.whole(0), help="DRaFT-LV: so often the last step is done again, "
                        "from other noise")
    parser.add_argument("--reward-limit", type=cli.real(), help="a picture of a higher reward has no gradient; refl's "
                        "default is on ImageReward's scale")
    cli.add_lora_options(parser)
    cli.add_training_options(
        parser, SCHEDULES, "prompts", lr=None, batch_size=None, grad_accum=None, steps=100, save_every=10)
    parser.epilog = "defaults of the methods:\n" + "\n".join(
        f"  {name}: " + ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in method.all_defaults().items()
                                  if value is not None) for name, method in METHODS.items())
    args = parser.parse_args()
    method = METHODS[args.method]
    for name in OF_METHODS:
        if name in method.all_defaults():
            default = method.all_defaults()[name]
            setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
        elif getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: --method {args.method} has no such setting; leave it away")
    cli.refuse_float16(args.dtype)
    if args.init_lora and (args.rank or args.alpha):
        raise UserError("--rank, --alpha: they are those of --init-lora's file; leave them away")
    if method.pairs and args.pictures != 2:
        raise UserError(f"--pictures {args.pictures}: {args.method} compares two pictures of a prompt")
    if args.method == "grpo" and args.pictures < 2:
        raise UserError("--pictures 1: grpo compares the pictures of a prompt; give 2 or more")
    if method.loss and args.grad_accum % args.updates:
        raise UserError(f"--updates {args.updates}: must divide --grad-accum {args.grad_accum}, the batches of a step")
    if isinstance(args.gradient_steps, int) and args.gradient_steps > args.sampler_steps:
        raise UserError(f"--gradient-steps {args.gradient_steps}: a picture has --sampler-steps {args.sampler_steps}")
    if args.patience and not args.judge:
        raise UserError("--patience: give --judge, too; it is the judge's opinion that is waited for")
    args.rank, args.alpha = args.rank or 8, args.alpha or 8.0
    args.scorer = args.scorer or default_scorer(args.model)
    if args.prompts is None and args.model not in BUILT_IN:
        raise UserError("--prompts FILE is needed with this model")
    args.prompts = args.prompts or str(BUILT_IN[args.model].prompts_train)
    return args


# The policy

@dataclass
class Step:
    """A denoising step of R pictures: from x_t (R, 4, h, w) to x_prev (K, R, 4, h, w), of which K is 1 but for
    candidates; t and t_prev (R,)."""

    x_t: Tensor
    x_prev: Tensor
    t: Tensor
    t_prev: Tensor
    log_probs: Tensor | None = None    # (K, R), of the policy that drew
    scores: Tensor | None = None       # (K, R), of the pictures that candidates imply

    def of(self, rows: Tensor) -> "Step":
        """Of these pictures, (N,), alone."""
        return Step(self.x_t[rows], self.x_prev[:, rows], self.t[rows], self.t_prev[rows], self.log_probs[:, rows])


class Policy:
    """The U-Net with its LoRA, guided; without the LoRA it is the reference. It counts the rows that go through it, a
    backward pass twice, and does not count what is computed again to save memory."""

    def __init__(self, pipeline: Pipeline, drawing: Drawing, compiled: bool):
        self.pipeline, self.drawing, self.compiled, self.unet_rows = pipeline, drawing, compiled, 0
        self.alphas_cumprod = pipeline.alphas_cumprod.to(pipeline.device)
        self.scheduler = pipeline.configs["scheduler"]

    def encode(self, prompts: list[str]) -> Tensor:
        """R prompts -> contexts (2, R, M, D), the empty prompt's first."""
        each = {prompt: self.drawing.encode(["", prompt], self.pipeline) for prompt in dict.fromkeys(prompts)}
        return torch.stack([each[prompt] for prompt in prompts], dim=1)

    def noise(self, generators: list[torch.Generator]) -> Tensor:
        shape = (1, 4, *(side // self.pipeline.vae.downscale for side in (self.drawing.height, self.drawing.width)))
        return onto(self.pipeline.device, torch.cat([torch.randn(shape, generator=g) for g in generators]))

    def predict(
        self, x_t: Tensor, t: Tensor, contexts: Tensor, learn: bool = False, keep: bool = True, reference: bool = False,
    ) -> Tensor:
        """x_t (R, 4, h, w), t (R,), contexts (2, R, M, D) -> guided eps (R, 4, h, w). With `learn` it has a gradient;
        without `keep` it is then computed again in the backward pass. Compiled, a graph is always one with gradients,
        or it would be rounded otherwise (see train.py)."""
        uncond, cond = contexts
        eps_fn = guided_eps(self.pipeline.unet, cond, uncond, self.drawing.guidance)
        self.unet_rows += len(x_t) * (2 if self.drawing.guidance > 1 else 1) * (3 if learn else 1)

        def predicted(x_t: Tensor, t: Tensor) -> Tensor:       # without the LoRA in the backward pass, too
            with lora_disabled(self.pipeline.unet) if reference else contextlib.nullcontext():
                return eps_fn(x_t, t)
        with torch.set_grad_enabled(learn or self.compiled):
            eps = predicted(x_t, t) if keep else checkpoint(
                predicted, x_t, t, use_reentrant=False, preserve_rng_state=False)
        return eps if learn else eps.detach()

    def log_probs(self, eps: Tensor, step: Step) -> Tensor:
        """(K, R): of the step's K ways to go on from x_t."""
        return torch.stack([
            step_log_prob(eps, step.x_t, x, step.t, step.t_prev, self.alphas_cumprod) for x in step.x_prev])


def add(logs: dict[str, Tensor], more: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    return {key: logs.get(key, 0) + share * value for key, value in more.items()}


# Drawing to learn from log-probabilities

@torch.no_grad()
def draw_rollout(policy: Policy, contexts: Tensor, x: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, list]:
    """-> latents (R, 4, h, w) and the steps to them."""
    drawn = rollout(lambda x_t, t: policy.predict(x_t, t, contexts), x, policy.alphas_cumprod,
                    policy.drawing.steps, policy.scheduler, generators)
    times = zip(drawn.timesteps[:, None].expand(-1, len(x)), drawn.timesteps_prev[:, None].expand(-1, len(x)))
    return drawn.latents[-1], [
        Step(drawn.latents[i], drawn.latents[i + 1][None], t, t_prev, drawn.log_probs[i][None])
        for i, (t, t_prev) in enumerate(times)]


@torch.no_grad()
def draw_candidates(
    policy: Policy, contexts: Tensor, x: Tensor, generators: list[torch.Generator], candidates: int, score: Callable,
) -> tuple[Tensor, list]:
    """As `draw_rollout`, by SPO: of every step but the first fifth, which are too noisy to tell, K candidates, scored
    by the pictures that they imply; one of them, drawn at random, is gone on from. score(latents) -> (R,)."""
    steps, alphas_cumprod, pairs = [], policy.alphas_cumprod, rollout_timesteps(policy.drawing.steps, policy.scheduler)
    for i, pair in enumerate(pairs):
        t, t_prev = (torch.full((len(x),), one, device=x.device) for one in pair)
        mean, sigma = step_distribution(policy.predict(x, t, contexts), x, t, t_prev, alphas_cumprod)
        k = candidates if i >= max(1, len(pairs) // 5) else 1
        x_prev = torch.stack([mean + sigma * policy.noise(generators) for _ in range(k)])        # (K, R, 4, h, w)
        chosen = onto(x.device, torch.cat([torch.randint(k, (1,), generator=g) for g in generators]))
        if k > 1:
            implied = x_prev if pair[1] == 0 else [
                x0_from_eps(policy.predict(one, t_prev, contexts), one, t_prev, alphas_cumprod) for one in x_prev]
            steps.append(Step(x, x_prev, t, t_prev, scores=torch.stack([score(one) for one in implied])))
        x = x_prev[chosen, torch.arange(len(x), device=x.device)]
    return x, steps


@dataclass
class Batch:
    contexts: Tensor                   # (2, R, M, D)
    steps: list[Step]
    rewards: Tensor                    # (R,)
    decided: float = 1.0               # of pairs the share that were no ties

    def better_first(self) -> "Batch":
        """Of pairs: all better ones, then all others, without ties; where all are ties, these."""
        first, second = self.rewards.chunk(2)
        decided = first != second
        rows = torch.arange(len(self.rewards)).view(2, -1)
        rows = rows.where(first >= second, rows.flip(0))[:, decided if decided.any() else ~decided].flatten()
        on_device = onto(self.contexts.device, rows)
        return Batch(self.contexts[:, on_device], [step.of(on_device) for step in self.steps], self.rewards[rows],
                     decided.float().mean().item())


def learn(
    policy: Policy, batch: Batch, advantages: Tensor | None, method: Method, options: dict, kl: str, kl_weight: float,
    share: float,
) -> dict[str, Tensor]:
    """The LoRA's gradient grows by `share` of the batch's, one denoising step at a time: a graph of all would not fit.
    A loss that needs all steps at once has each computed again in the backward pass."""
    logs: dict[str, Tensor] = {}
    parts = [batch.steps] if method.whole else [[step] for step in batch.steps]
    for steps in parts:
        reference = method.loss.takes("log_probs_ref") or kl_weight > 0
        eps_ref = [policy.predict(step.x_t, step.t, batch.contexts, reference=True) for step in steps if reference]
        eps = [policy.predict(step.x_t, step.t, batch.contexts, learn=True, keep=not method.whole) for step in steps]
        given = {"log_probs": torch.cat([policy.log_probs(*one) for one in zip(eps, steps)]), "advantages": advantages}
        if method.loss.takes("log_probs_old"):
            given["log_probs_old"] = torch.cat([step.log_probs for step in steps])
        if method.loss.takes("log_probs_ref"):
            given["log_probs_ref"] = torch.cat([policy.log_probs(*one) for one in zip(eps_ref, steps)])
        if method.candidates:
            given["scores"] = steps[0].scores
        loss, more = method.loss(options, **given)
        if kl_weight:
            gains = [eps_gain(step.t, step.t_prev, policy.alphas_cumprod) for step in steps]
            far = torch.stack([kl_to_reference(*ends, kl, gain) for *ends, gain in zip(eps, eps_ref, gains)]).mean()
            loss, more = loss + kl_weight * far, more | {"kl": far.detach()}
        loss = more.get("kept", batch.decided) * loss          # what its mean leaves out counts, without a gradient
        (share / len(parts) * loss).backward()
        logs = add(logs, {"loss": loss.detach(), **more}, 1 / len(parts))
    return logs


# Drawing with a gradient

def draw_with_gradient(
    policy: Policy, contexts: Tensor, x: Tensor, steps: range, first: int, eta: float,
    generators: list[torch.Generator], kl_weight: float, implied: bool,
) -> tuple[Tensor, Tensor]:
    """x (R, 4, h, w), as noisy as the first of `steps` has it -> latents, and the mean distance of eps to the
    reference's. DDIM's steps from number `first` on have a gradient, each computed again in the backward pass; through
    x it goes into the distance as well. With `implied` the latents are the x0 that the last step implies."""
    scheduler, alphas_cumprod, far = policy.scheduler, policy.alphas_cumprod, []
    ts = timesteps(policy.drawing.steps, scheduler)
    for i in steps:
        t = torch.full((len(x),), ts[i], device=x.device)
        eps = policy.predict(x, t, contexts, learn=i >= first, keep=i < first).float()
        if i >= first and kl_weight:
            eps_ref = policy.predict(x, t, contexts, x.requires_grad, not x.requires_grad, reference=True)
            far.append(kl_to_reference(eps, eps_ref.float()).mean())
        if implied and i == steps[-1]:
            x = x0_from_eps(eps, x, ts[i], alphas_cumprod)
        else:
            noise = policy.noise(generators) if eta else None
            to_one = scheduler.get("set_alpha_to_one", True)
            x = ddim_step(eps, x, ts[i], ts[i] - T // len(ts), alphas_cumprod, eta, noise, to_one)
    return x, torch.stack(far).mean() if far else torch.zeros((), device=x.device)


def where_it_begins(method: str, gradient_steps: int | str | None, steps: int, generator: torch.Generator) -> int:
    """The first denoising step with a gradient. ReFL: one of the last quarter. DRaFT: K before the end. AlignProp:
    drawn from a normal distribution about 0.84 of the steps."""
    if method == "refl":
        return torch.randint(3 * steps // 4, steps, (1,), generator=generator).item()
    if gradient_steps != "random":
        return steps - gradient_steps
    first = -1
    while not min(1, steps - 1) <= first < steps:
        first = int(torch.normal(0.84 * steps, 0.1 * steps, (1,), generator=generator).item())
    return first


def reward_gradient(
    policy: Policy, prompts: list[str], x: Tensor, generators: list[torch.Generator], reward: Callable, args,
    first: int, share: float,
) -> tuple[Tensor, list, dict[str, Tensor]]:
    """The LoRA's gradient grows by `share` of that of R pictures' rewards. -> rewards (R,), pictures, logs."""
    contexts, n = policy.encode(prompts), policy.drawing.steps
    told, logs, times = [], {}, 1 + (args.extra_noises or 0)
    for i in range(times):
        steps, eta = range(first + 1 if args.method == "refl" else n), 0.0 if args.method == "draft" else 1.0
        if i:                                                  # DRaFT-LV: the last step again, from other noise
            steps = range(n - 1, n)
            t = torch.full((len(x),), timesteps(n, policy.scheduler)[-1], device=x.device)
            x = add_noise(told[0][0], policy.noise(generators), t, policy.alphas_cumprod)
        latents, far = draw_with_gradient(
            policy, contexts, x, steps, steps[-1] if i else first, eta, generators, args.kl_weight,
            implied=args.method == "refl")
        pixels = checkpoint(partial(decode, policy.pipeline), latents, use_reentrant=False, preserve_rng_state=False)
        pixels = (pixels / 2 + 0.5).clamp(0, 1)                # (R, 3, H, W)
        rewards = reward(pixels, prompts)
        if rewards.shape != (len(x),) or not rewards.requires_grad:
            raise UserError(f"--scorer {args.scorer}: a reward is a number a picture, with a gradient to its pixels")
        short = -rewards if args.reward_limit is None else (args.reward_limit - rewards).relu()
        loss = short.mean() + args.kl_weight * far
        (share / times * loss).backward()
        told.append((latents.detach(), pixels.detach(), rewards.detach()))
        logs = add(logs, {"loss": loss.detach(), **({"kl": far.detach()} if args.kl_weight else {})}, 1 / times)
    _, pixels, rewards = told[0]
    return rewards.cpu(), to_images(2 * pixels - 1), logs


# The run

def ask(scorer: Callable, images: list, prompts: list[str], who: str) -> Tensor:
    """(R,) on the CPU. UserError where a score is not finite: what it does to the weights cannot be undone."""
    scores = torch.as_tensor(scorer(images, prompts)).float().cpu()
    if not scores.isfinite().all():
        raise UserError(f"{who} says {scores.tolist()!r:.80}; finite scores were expected")
    return scores


def main() -> None:
    args = parse_args()
    method = METHODS[args.method]
    rank, world = cli.rank_and_world()
    again = method.loss is not None and method.loss.takes("log_probs_old") and args.updates * args.epochs > 1
    device, dtype = cli.device_and_dtype(args.device, "float32" if again and args.dtype == "auto" else args.dtype)
    if again and dtype != torch.float32 and rank == 0:
        print("warning: a step learns from its pictures more than once, and bfloat16 rounds their ratios by more than "
              "the clip, which then chooses at random; take --dtype float32", file=sys.stderr)
    gloo = join_processes(device, world)
    with files_read() as files:
        pipeline = load_pipeline(args.model, device, dtype, args.vae, args.prediction_type)
    if pipeline.predicts_v:
        raise UserError(f"{args.model}: predicts v; training is written for models that predict the noise")
    prompts = cli.read_prompts(args.prompts, args.category)[:args.limit]
    inputs = {"model": digest_all(files), "prompts": digest_of(prompts)}
    with files_read() as files:
        scorer = (load_judge if method.loss else load_reward)(args.scorer, device)
    inputs["scorer"], judge = digest_all(files), None
    if args.judge:
        with files_read() as files:
            judge = load_judge(args.judge, device)
        inputs["judge"] = digest_all(files)
    drawing = Drawing(args.sampler_steps, args.guidance, args.height, args.width).for_model(pipeline)
    policy, unet = Policy(pipeline, drawing, args.compile), pipeline.unet
    if method.loss:
        rollout_timesteps(drawing.steps, policy.scheduler)     # a model without log-probabilities is refused here
    if args.init_lora:
        with files_read() as files:
            parameters, args.rank, args.alpha = load_lora_to_train(args.init_lora, unet, pipeline.text_encoder)
        inputs["init_lora"] = digest_all(files)
    else:
        parameters = inject_lora(unet, args.rank, args.alpha, generator=seeded("the LoRA's first weights", args.seed))
    optimizer = make_optimizer(args.optimizer, parameters, args.lr)
    average = [parameter.detach().clone() for parameter in parameters] if args.ema else []
    save_memory(unet, args.gradient_checkpointing, args.compile)

    out = Path(args.out)
    per_batch = args.batch_size * args.pictures                # pictures of a batch and process, R
    per_step = per_batch * args.grad_accum * world
    values = vars(args) | {"height": drawing.height, "width": drawing.width, "dtype": cli.name_of(dtype)}
    own = {name: values[name] for name in method.all_defaults() if name not in ("batch_size", "grad_accum")}
    options = {name: own[name] for name in method.loss.options} if method.loss else {}
    settings = {name: values[name] for name in NOTED} | own | {"pictures_per_step": per_step}
    settings |= {} if args.lr_schedule == "constant" else {"steps": args.steps}

    def save(step: int) -> None:
        with averaged(parameters, average):
            save_lora(out / "lora.safetensors", unet, format=args.lora_format)
        learned = f"{step} steps of {per_step} pictures each, rewarded by {args.scorer}"
        card = model_card(args.model, args.method, learned, lora=True, settings=settings)
        save_checkpoint(out, run, step, parameters, average, optimizer, card)

    def prompts_of(step: int, micro: int, process: int) -> tuple[list[int], list[int]]:
        """A batch's R prompts, and the numbers of its R pictures in the run: all first pictures of the prompts, then
        all second ones, ..."""
        first = ((step - 1) * args.grad_accum * world + micro * world + process) * args.batch_size
        numbers, rows = range(first, first + args.batch_size), list(range(len(prompts)))
        chosen = [row_at(s, rows, args.seed, "order of the prompts") for s in numbers]
        return chosen * args.pictures, [s * args.pictures + j for j in range(args.pictures) for s in numbers]

    def first_noise(numbers: list[int]) -> tuple[Tensor, list[torch.Generator]]:
        """Noise (R, 4, h, w), of a pair the same; and R generators for what is drawn later."""
        at = [n - n % 2 for n in numbers] if method.pairs else numbers
        x = policy.noise([seeded("first noise of a picture", args.seed, n) for n in at])
        return x, [seeded("later noise of a picture", args.seed, n) for n in numbers]

    def draw(step: int, texts: list[str], numbers: list[int]) -> tuple[Batch, list]:
        """To learn from log-probabilities."""
        def pictures_of(latents: Tensor) -> list:
            return [to_picture(pipeline, *one) for one in zip(latents, texts, numbers)]

        def score(latents: Tensor) -> Tensor:
            return ask(scorer, pictures_of(latents), texts, f"step {step}: --scorer {args.scorer}").to(device)

        contexts, (x, generators) = policy.encode(texts), first_noise(numbers)
        if method.candidates:
            latents, steps = draw_candidates(policy, contexts, x, generators, args.candidates, score)
        else:
            latents, steps = draw_rollout(policy, contexts, x, generators)
        images = pictures_of(latents)
        return Batch(contexts, steps, ask(scorer, images, texts, f"step {step}: --scorer {args.scorer}")), images

    def update(logs: dict[str, Tensor]) -> dict[str, Tensor]:
        for parameter in parameters:                           # none where nothing was worth learning
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        average_gradients(parameters, world)
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return logs | {"grad_norm": grad_norm}

    with begun(out / "config.json", settings, inputs, MAY_CHANGE, rank, world) as run:
        start = resume(out, run, parameters, average, optimizer, rank)
        past, buffers = read_rewards(out / "rewards.jsonl", start, per_step)
        print(
            f"{args.method} by {args.scorer} on {len(prompts)} prompts, {sum(p.numel() for p in parameters):,} "
            f"parameters of {args.model}, {per_step} pictures a step, steps {start + 1} to {args.steps}, on {world} x "
            f"{device} in {dtype}")
        stopping = noted_signals()
        buffer, then = [], time.perf_counter()
        steps = takewhile(lambda _: not judge_falls(past, args.patience), range(start + 1, args.steps + 1))
        for step in cli.progress(steps, args.steps - start, "training"):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args.lr, args.lr_schedule, args.warmup, step, args.steps)
            policy.unet_rows, batches, told, logs = 0, [], [], {}
            for micro in range(args.grad_accum):
                chosen, numbers = prompts_of(step, micro, rank)
                texts = [prompts[k] for k in chosen]
                if method.loss:
                    batch, images = draw(step, texts, numbers)
                    batches.append(batch)
                    rewards = batch.rewards
                else:
                    begin = seeded("where the gradient begins", args.seed, numbers[0])
                    first = where_it_begins(args.method, args.gradient_steps, drawing.steps, begin)
                    rewards, images, more = reward_gradient(
                        policy, texts, *first_noise(numbers), scorer, args, first, 1 / args.grad_accum)
                    logs = add(logs, more, 1 / args.grad_accum)
                opinions = ask(judge, images, texts, f"step {step}: --judge {args.judge}") if judge else rewards
                told.append(torch.stack([rewards, opinions]))
            # Of all processes, in the run's order: batch by batch, and in each process by process.
            rewards, opinions = gathered(torch.stack(told), gloo).unbind(dim=2)                  # (A, world, R) each
            of = [k for micro in range(args.grad_accum) for p in range(world) for k in prompts_of(step, micro, p)[0]]
            past.append(Told.of(rewards.flatten().tolist(), opinions.flatten().tolist()))
            refuse_standstill(past, args.reward_limit, f"step {step}: --scorer {args.scorer}")

            updates = []
            if method.loss:
                advantages = [None] * args.grad_accum
                if method.advantages:
                    everyones = method.advantages(rewards.flatten(), of, buffers).view_as(rewards)
                    advantages = onto(device, everyones[:, rank])                                # (A, R)
                size = args.grad_accum // args.updates
                for i in [*range(0, args.grad_accum, size)] * args.epochs:
                    logs = {}
                    for batch, advantage in zip(batches[i:i + size], advantages[i:i + size]):
                        batch = batch.better_first() if method.pairs else batch
                        more = learn(policy, batch, advantage, method, options, args.kl, args.kl_weight, 1 / size)
                        logs = add(logs, more, 1 / size)
                    if step == 1 and not updates and not args.init_lora:
                        check_start({"step": 1} | {k: v.item() for k, v in logs.items()}, method.loss.at_start)
                    updates.append(update(logs))
            else:
                updates.append(update(logs))
            update_average(average, parameters, args.ema, step)

            logs = {key: sum(one[key] for one in updates) / len(updates) for key in updates[0]}
            logs |= {"reward": rewards.mean(), **({"judge": opinions.mean()} if judge else {})}
            logs["unet_rows"] = torch.tensor(float(policy.unet_rows))          # of one process
            if rank == 0:
                append_lines(out / "rewards.jsonl", [
                    {"step": step, "prompt": k, "reward": reward, **({"judge": opinion} if judge else {})}
                    for k, reward, opinion in zip(of, rewards.flatten().tolist(), opinions.flatten().tolist())])
            buffer.append((step, optimizer.param_groups[0]["lr"], {k: value.to(device) for k, value in logs.items()}))
            stop = any_process(bool(stopping), gloo)
            ends = step == args.steps or judge_falls(past, args.patience)
            due = step % args.save_every == 0 or ends
            sample = args.sample_every and (step % args.sample_every == 0 or ends)
            if due or stop or sample or step == 1 or len(buffer) == 10:
                lines = log_lines(buffer, (time.perf_counter() - then) / len(buffer))
                append_log(out, lines, lambda step: [prompts[k] for k in prompts_of(step, 0, 0)[0]], write=rank == 0)
                if sample and rank == 0:                   # before the checkpoint: after it, a kill would lose it
                    with averaged(parameters, average), torch.compiler.set_stance("force_eager"):
                        context = drawing.encode(prompts[:8], pipeline)
                        size = (drawing.height, drawing.width)
                        means = draw_samples(
                            out / "samples" / f"{step:06d}.png", pipeline, context, prompts[:8], size)
                    append_lines(out / "watch.jsonl", [{"step": step} | means])
                if (due or stop) and rank == 0:
                    save(step)
                if stop and not ends:
                    raise KeyboardInterrupt
                buffer, then = [], time.perf_counter()
        if judge_falls(past, args.patience):
            print(f"stopped at step {len(past)}: --judge {args.judge} likes the pictures of the last {args.patience} "
                  "steps less than those of as many before")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)
