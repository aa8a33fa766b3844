"""Trains a LoRA by HG-DPO on a dataset that build_dataset.py made. One file, read from top to bottom; copy it.

    python train.py --data data --out run                                  # HG-DPO with the paper's settings
    python train.py --data data --out run --loss sft --full                # the whole U-Net, on winners or own pictures
    torchrun --nproc-per-node 4 train.py --model owner/name --data data --out run

One step: latents of winners and losers -> x_t, with one t and one noise a pair -> eps of the policy (LoRA on) and of
the reference (the same U-Net, LoRA off) -> loss -> AdamW on the LoRA. VAE and text encoder did theirs in the dataset.

What pair s of the run sees (which pair, t, noise) depends on --seed and s alone. So a run that was killed goes on bit
for bit where its checkpoint is, and N processes do what one with N times the batch does.
"""

import json
import math
import os
import signal
import time
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import ImageStat
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cli
from generate import decode, draw
from losses import diffusion_dpo_loss, hg_dpo_loss
from losses.diffusion_dpo import squared_error
from model.checkpoint import Pipeline, load_pipeline
from model.errors import UserError
from model.files import atomic_write, read_header, read_json, write_tensors, write_text
from model.lora import inject_lora, load_lora, lora_disabled, save_lora
from model.unet import GEGLU, ResBlock, Upsample
from pictures import curves, sheet, to_images, write_png
from sampling import add_noise, encode_prompts

FIXED = ("model", "data", "loss", "beta", "lambda_stat", "rank", "alpha", "lr", "warmup", "batch_size", "grad_accum",
         "seed", "full", "init_lora", "optimizer", "max_grad_norm", "dtype", "holdout")      # may not change on resume


def parse_args():
    parser = cli.common_parser(__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="made by build_dataset.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="the run; the same command goes on with it")
    parser.add_argument("--loss", default="hg-dpo", choices=("hg-dpo", "dpo", "sft"))
    parser.add_argument("--beta", type=float, default=2500.0, help="strength of the pull to the reference (Eq. 3)")
    parser.add_argument("--lambda-stat", type=float, default=10000.0, help="weight of statistic matching (Eq. 8)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=8.0, help="the LoRA acts with alpha / rank")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--warmup", type=int, default=0, help="steps over which the learning rate rises to --lr")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step and process")
    parser.add_argument("--grad-accum", type=int, default=1, help="batches a step")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--sample-every", type=int, default=0, help="steps between sample pictures; 0 is never")
    parser.add_argument("--holdout", type=int, default=0, help="pairs kept out of training, for the held-out accuracy")
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--full", action="store_true", help="train the whole U-Net (with --loss sft)")
    parser.add_argument("--init-lora", metavar="FILE", help="start from this LoRA; the reference stays the bare model")
    parser.add_argument("--lora-format", default="kohya", choices=("kohya", "peft"))
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw8bit"))
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net")
    args = parser.parse_args()
    for name in ("beta", "rank", "alpha", "lr", "batch_size", "grad_accum", "steps", "save_every", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be more than 0")
    if args.full and args.loss != "sft":
        raise UserError(f"--full is for --loss sft; {args.loss} needs the frozen U-Net as its reference")
    return args


# The data

class Pairs:
    """The rows of a dataset's shards. They are mapped, not read: a dataset may be larger than memory."""

    def __init__(self, folder: Path, pipeline: Pipeline, need_losers: bool):
        about = read_json(folder / "dataset.json")
        if not about.get("finished"):
            raise UserError(f"{folder}: not finished; run build_dataset.py's command again first")
        for key, ours in (("context_width", pipeline.context_width), ("scaling_factor", pipeline.vae.scaling_factor)):
            if about[key] != ours:
                raise UserError(
                    f"{folder}: made with {about['model']}, whose {key} is {about[key]}; {pipeline.name} has {ours}")
        self.rows, self.ids, self.prompts = [], [], []
        for name in about["shards"]:
            shapes, _ = read_header(folder / name)
            if need_losers and "latents_l" not in shapes:
                raise UserError(f"{folder}: pictures without losers; they are for --loss sft")
            shard = load_file(folder / name)
            self.rows += [(shard, i) for i in range(len(shard["context"]))]
        for path in sorted(folder.glob("pairs-*.jsonl")):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            self.ids += [line["id"] for line in lines]
            self.prompts += [line["prompt"] for line in lines]
        if not self.rows:
            raise UserError(f"{folder}: no pair in it")
        self.parts = ("latents_w", "latents_l") if need_losers else ("latents_w",)

    def batch(self, indices: list[int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """-> latents (2B, 4, h, w), winners first, losers second (B without losers), and context (B, 77, d)."""
        rows = [self.rows[i] for i in indices]
        latents = torch.cat([torch.stack([shard[part][i] for shard, i in rows]) for part in self.parts])
        context = torch.stack([shard["context"][i] for shard, i in rows])
        return latents.to(device, torch.float32), context.to(device, dtype)


@lru_cache(maxsize=2)
def epoch_order(n: int, epoch: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 10_007 + epoch)).tolist()


def pair_number(s: int, pairs: list[int], seed: int) -> int:
    """Which pair is number s of the run: epoch after epoch, each in a new order."""
    epoch, i = divmod(s, len(pairs))
    return pairs[epoch_order(len(pairs), epoch, seed)[i]]


def step_and_noise(numbers: range, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """t (B,) in 0..999 and noise (B, 4, h, w) of the run's pairs `numbers`, each from a generator of its own."""
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + s) for s in numbers]
    t = torch.cat([torch.randint(0, 1000, (1,), generator=g) for g in generators])
    return t, torch.cat([torch.randn((1, *shape), generator=g) for g in generators])


# The step

def predictions(unet: nn.Module, x_t: Tensor, t: Tensor, context: Tensor, reference: bool) -> tuple[Tensor, Tensor]:
    """eps of the policy and of the reference, which is the same U-Net with its LoRA off; eps twice without one."""
    x_t = x_t.to(context.dtype)
    eps_ref = None
    if reference:
        with torch.no_grad(), lora_disabled(unet):
            eps_ref = unet(x_t, t, context)
    eps = unet(x_t, t, context)
    return eps, eps if eps_ref is None else eps_ref


def loss_of(args, eps: Tensor, eps_ref: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor):
    """The one place where the losses differ. t (B,) and the others (2B, 4, h, w), winners first."""
    if args.loss == "hg-dpo":
        return hg_dpo_loss(eps, eps_ref, noise, t, alphas_cumprod, args.beta, args.lambda_stat)
    if args.loss == "dpo":
        loss, logs = diffusion_dpo_loss(eps, eps_ref, noise, args.beta)
        return loss, {"dpo": loss.detach(), **logs}
    loss = squared_error(eps, noise).mean()
    return loss, {"mse_w": loss.detach()}


CHEAP = {ResBlock: ("in_layers", "out_layers"), GEGLU: ("gated",), Upsample: ("forward",)}


def make_lean(unet: nn.Module, gradient_checkpointing: bool, compile: bool) -> None:
    """The backward pass keeps only the inputs of norms, activations and enlargements, and computes the rest anew. The
    convolutions behind them are not run again: checkpoint stops at the last tensor that it misses. A compiler finds
    such places for itself. With gradient checkpointing only the blocks' inputs are kept."""
    anew = partial(partial, checkpoint, use_reentrant=False, preserve_rng_state=False)
    if gradient_checkpointing:
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            block.forward = anew(block.forward)
    if compile:
        unet.compile()
        return
    for module in unet.modules():
        for name in CHEAP.get(type(module), ()):
            setattr(module, name, anew(getattr(module, name)))


# The optimiser, and what is written

def make_optimizer(args, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=args.lr, fused=parameters[0].is_cuda)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("--optimizer adamw8bit needs bitsandbytes; `pip install bitsandbytes`, or use adamw") from None
    return AdamW8bit(parameters, lr=args.lr)


def average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """All processes' gradients become their mean, in one message."""
    if world > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, grad in zip(parameters, (flat / world).split([p.numel() for p in parameters])):
            p.grad.copy_(grad.view_as(p))


def claim(args, out: Path, per_step: int) -> None:
    """Makes `out` the folder of this run, or goes on in it; refuses one that is not this run's."""
    config = {name: getattr(args, name) for name in FIXED} | {"pairs_per_step": per_step}
    if (out / "config.json").is_file():
        cli.refuse_changes(out, read_json(out / "config.json"), config)
    elif out.is_dir() and any(path.name[0] != "." for path in out.iterdir()):
        raise UserError(f"{out}: holds other files and no run; choose another --out")
    for left in out.rglob(".*.part"):      # of a file that was being written when the run was killed
        left.unlink()
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def resume(out: Path, parameters: list[nn.Parameter], optimizer, rank: int) -> int:
    """The step that the run in `out` has reached, with its parameters and optimizer; 0 for a new one."""
    state_file, step = out / "checkpoint" / "state.pt", 0
    if state_file.is_file():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        step = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        for parameter, saved in zip(parameters, state["parameters"]):
            parameter.data.copy_(saved)
    for log_file in (out / "log.jsonl", out / "watch.jsonl"):
        if rank == 0 and log_file.is_file():   # a killed run has logged steps past its checkpoint; they come again
            lines = [line for line in log_file.read_text().splitlines() if json.loads(line)["step"] <= step]
            write_text(log_file, "".join(line + "\n" for line in lines))
    return step


def write_log(args, out: Path, buffer: list, seconds: float, stop: bool, world: int, pair_ids) -> bool:
    """Writes the buffered steps' lines, all processes' mean; the one place where the device is waited for. Stops the
    run on a loss that is not finite, and, at step 1, on one that is not what it must be. -> whether any process has
    been asked to stop."""
    keys = list(buffer[0][2])
    values = torch.stack([torch.stack([logs[key].float() for key in keys]) for _, _, logs in buffer])
    values = torch.cat([values, torch.full_like(values[:, :1], float(stop))], dim=1)
    if world > 1:
        dist.all_reduce(values)
        values = values / world
    rows = values.tolist()
    with open(out / "log.jsonl", "a") as file:
        for (step, lr, _), row in zip(buffer, rows):
            line = {"step": step, **dict(zip(keys, row)), "lr": lr, "seconds": round(seconds, 4)}
            if not math.isfinite(line["loss"]) or not math.isfinite(line["grad_norm"]):
                raise UserError(
                    f"step {step}: the loss is {line['loss']}, its gradient {line['grad_norm']}; pairs "
                    f"{', '.join(pair_ids(step))}; {out / 'checkpoint'} keeps the last good state")
            if step == 1 and args.loss != "sft" and not args.init_lora:
                # LoRA's B is zero: policy and reference are the same network, or precision or the reference is wrong.
                if abs(line["dpo"] - math.log(2)) > 1e-5 or line.get("stat", 0.0) > 1e-12:
                    raise UserError(f"step 1: dpo is {line['dpo']} and stat {line.get('stat')}, not ln 2 and 0; a bug")
                print(f"step 1: dpo = {line['dpo']:.6f} = ln 2, stat = {line.get('stat', 0.0):g}, as it must be")
            if int(os.environ.get("RANK", 0)) == 0:
                file.write(json.dumps(line) + "\n")
    return any(row[-1] > 0 for row in rows)


def save(args, out: Path, step: int, pipeline: Pipeline, parameters, optimizer, pairs: int) -> None:
    """The checkpoint last: what stands before it is written again after a kill."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    if args.full:
        write_tensors(out / "unet" / "diffusion_pytorch_model.safetensors", pipeline.unet.state_dict())
        write_text(out / "unet" / "config.json", json.dumps(pipeline.configs["unet"], indent=2) + "\n")
    else:
        save_lora(out / "lora.safetensors", pipeline.unet, format=args.lora_format)
    shown = [key for key in ("loss", "dpo", "stat", "implicit_accuracy", "grad_norm") if key in log[-1]]
    write_png(out / "curves.png", curves({key: [line[key] for line in log] for key in shown}))
    write_text(out / "README.md", model_card(args, step, pairs, log))
    (out / "checkpoint").mkdir(exist_ok=True)
    with atomic_write(out / "checkpoint" / "state.pt") as part:
        torch.save({"step": step, "parameters": [p.detach().cpu() for p in parameters],
                    "optimizer": optimizer.state_dict()}, part)


def model_card(args, step: int, pairs: int, log: list[dict]) -> str:
    """A README.md fit for the Hub."""
    last = log[-50:]
    keys = [key for key in last[0] if key not in ("step", "lr", "seconds")]
    figures = {key: sum(line[key] for line in last) / len(last) for key in keys}
    use = "" if args.full else (
        '```python\npipe.load_lora_weights(FOLDER, weight_name="lora.safetensors")\n'
        "pipe.fuse_lora(lora_scale=0.5)\n```\n\n")
    return (
        f"---\nbase_model: {args.model}\nlibrary_name: diffusers\ntags: [stable-diffusion, dpo, lora]\n---\n\n"
        f"# {args.loss} on {args.model}\n\n{step} steps on {pairs} pairs of `{Path(args.data).name}`.\n\n{use}"
        "| setting | value |\n|---|---|\n" + "".join(f"| {name} | {getattr(args, name)} |\n" for name in FIXED)
        + f"\n| mean of the last {len(last)} steps | |\n|---|---|\n"
        + "".join(f"| {key} | {value:.6g} |\n" for key, value in figures.items()))


@torch.no_grad()
def watch(
    args, out: Path, step: int, pipeline: Pipeline, data: Pairs, held_out: list[int], alphas_cumprod: Tensor
) -> None:
    """Early signs of what the loss does not tell (it is mostly the noise of t): pictures from fixed seeds with their
    mean colour, and on held-out pairs, at fixed t and noise, the implicit accuracy and both errors' gains."""
    signs = {"step": step}
    device, dtype = pipeline.device, pipeline.dtype
    if held_out and args.loss != "sft":
        total: dict[str, float] = {}
        for i in range(0, len(held_out), args.batch_size):
            rows = held_out[i:i + args.batch_size]
            x0, context = data.batch(rows, device, dtype)
            t, noise = step_and_noise(range(i, i + len(rows)), x0.shape[1:], args.seed + 1)
            t, noise, context = t.to(device).repeat(2), noise.to(device).repeat(2, 1, 1, 1), context.repeat(2, 1, 1)
            eps, eps_ref = predictions(pipeline.unet, add_noise(x0, noise, t, alphas_cumprod), t, context, True)
            for key, value in diffusion_dpo_loss(eps, eps_ref, noise, args.beta)[1].items():
                total[key] = total.get(key, 0.0) + value.item() * len(rows)
        signs |= {f"held_out_{key}": value / len(held_out) for key, value in total.items()}
    rows = (held_out or list(range(len(data.rows))))[:8]
    _, context = data.batch(rows, device, dtype)
    uncond = encode_prompts([""], pipeline.tokenizer, pipeline.text_encoder).expand(len(context), -1, -1)
    height, width = (side * pipeline.vae.downscale for side in data.rows[0][0]["latents_w"].shape[2:])
    latents = draw(pipeline, context, uncond.to(dtype), list(range(len(rows))), height, width, steps=20)
    images = [image for latent in latents for image in to_images(decode(pipeline, latent[None]))]
    for name, value in zip("RGB", torch.tensor([ImageStat.Stat(image).mean for image in images]).mean(dim=0).tolist()):
        signs[f"mean_{name}"] = value
    write_png(out / "samples" / f"{step:06d}.png", sheet(images, [data.prompts[i] for i in rows], columns=4))
    with open(out / "watch.jsonl", "a") as file:
        file.write(json.dumps(signs) + "\n")


# The run

def main() -> None:
    args = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device, dtype = cli.device_and_dtype(args)
    pipeline = load_pipeline(args.model, device, torch.float32 if args.full else dtype, args.vae, args.prediction_type)
    if pipeline.configs["scheduler"].get("prediction_type") == "v_prediction":
        raise UserError(f"{args.model}: predicts v; training is written for models that predict the noise")
    unet, alphas_cumprod = pipeline.unet, pipeline.alphas_cumprod.to(device)
    data = Pairs(Path(args.data), pipeline, need_losers=args.loss != "sft")
    if args.holdout >= len(data.rows):
        raise UserError(f"--holdout {args.holdout}: the dataset has only {len(data.rows)} pairs")
    if not args.sample_every:                              # nothing else needs them; their memory goes back
        pipeline.vae.to("meta")
        pipeline.text_encoder.to("meta")
    held_out, pairs = list(range(args.holdout)), list(range(args.holdout, len(data.rows)))

    if args.full:
        parameters = list(unet.requires_grad_(True).parameters())
    else:
        if args.init_lora:
            load_lora(args.init_lora, unet)
        else:
            inject_lora(unet, args.rank, args.alpha, generator=torch.Generator().manual_seed(args.seed))
        parameters = [p for name, p in unet.named_parameters() if ".lora_" in name]
        for parameter in parameters:
            parameter.requires_grad_(True)
    optimizer = make_optimizer(args, parameters)
    make_lean(unet, args.gradient_checkpointing, args.compile)

    out = Path(args.out)
    per_step = args.batch_size * args.grad_accum * world
    if rank == 0:                                          # it alone writes in the folder; the others wait for it
        claim(args, out, per_step)
    if world > 1:
        dist.barrier()
    start = resume(out, parameters, optimizer, rank)
    print(
        f"{args.loss} on {len(pairs)} pairs of {args.data}, {sum(p.numel() for p in parameters):,} parameters of "
        f"{args.model}, {per_step} pairs a step, steps {start + 1} to {args.steps}, on {world} x {device} in {dtype}")
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append("SIGTERM"))
    signal.signal(signal.SIGINT, lambda *_: stopping.append("SIGINT"))

    def ids_of(step: int) -> list[str]:
        numbers = range((step - 1) * per_step, step * per_step)
        return [str(data.ids[pair_number(s, pairs, args.seed)]) for s in numbers]

    buffer, then = [], time.perf_counter()
    for step in cli.progress(range(start + 1, args.steps + 1), args.steps - start, "training"):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / args.warmup if args.warmup else 1.0)
        logs = {}
        for micro in range(args.grad_accum):
            # This process's share of the pairs (step - 1) * per_step ... step * per_step of the run.
            first = (step - 1) * per_step + (micro * world + rank) * args.batch_size
            numbers = range(first, first + args.batch_size)
            x0, context = data.batch([pair_number(s, pairs, args.seed) for s in numbers], device, dtype)
            t, noise = step_and_noise(numbers, x0.shape[1:], args.seed)
            t, noise, copies = t.to(device), noise.to(device), len(x0) // len(t)
            t_rows, noise, context = t.repeat(copies), noise.repeat(copies, 1, 1, 1), context.repeat(copies, 1, 1)
            x_t = add_noise(x0, noise, t_rows, alphas_cumprod)                   # (2B, 4, h, w)
            with torch.autocast(device.type, dtype, enabled=args.full and dtype != torch.float32):
                eps, eps_ref = predictions(unet, x_t, t_rows, context, reference=args.loss != "sft")
            loss, more = loss_of(args, eps, eps_ref, noise, t, alphas_cumprod)
            (loss / args.grad_accum).backward()
            for key, value in {"loss": loss.detach(), **more}.items():
                logs[key] = logs.get(key, 0) + value / args.grad_accum
        average_gradients(parameters, world)
        logs["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        buffer.append((step, optimizer.param_groups[0]["lr"], logs))
        due = step % args.save_every == 0 or step == args.steps
        if due or step == 1 or len(buffer) == 10 or (world == 1 and stopping):
            seconds = (time.perf_counter() - then) / len(buffer)
            stop = write_log(args, out, buffer, seconds, bool(stopping), world, ids_of)
            if (due or stop) and rank == 0:
                save(args, out, step, pipeline, parameters, optimizer, len(pairs))
            if stop:
                raise KeyboardInterrupt
            if args.sample_every and (step % args.sample_every == 0 or step == args.steps) and rank == 0:
                watch(args, out, step, pipeline, data, held_out, alphas_cumprod)
            buffer, then = [], time.perf_counter()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)
