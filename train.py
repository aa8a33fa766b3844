"""Trains a LoRA by HG-DPO on a dataset that build_dataset.py made. One file, read from top to bottom; copy it.

    python train.py --data data --out run                                  # HG-DPO with the paper's settings
    python train.py --data data --out run --loss sft --full                # the whole U-Net, on winners or own pictures
    torchrun --nproc-per-node 4 train.py --model owner/name --data data --out run

One step: latents of winners and losers -> x_t, with one t and one noise a pair -> eps of the policy (LoRA on) and of
the reference (the same U-Net, LoRA off) -> loss -> AdamW on the LoRA. VAE and text encoder did theirs in the dataset.

What pair s of the run sees (which pair, t, noise) depends on --seed and s alone. So a run that was killed goes on bit
for bit where its checkpoint is, and N processes do what one with N times the batch does.
"""

import cli

# isort: split
import contextlib
import json
import math
import signal
import time
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import ImageStat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dataset.folder import begin, clear_unfinished, locked, noted
from dataset.reader import Pairs
from generate import draw, to_picture
from losses import diffusion_dpo_loss, hg_dpo_loss, lambda_for
from losses.diffusion_dpo import squared_error
from model.checkpoint import Pipeline, load_pipeline
from model.errors import UserError
from model.files import digest_all, digest_of, files_read, is_a, read_lines, write_pickle, write_tensors, write_text
from model.lora import (
    ATTENTION_LINEARS,
    inject_lora,
    load_lora,
    lora_by_tensor,
    lora_disabled,
    lora_layers,
    save_lora,
)
from model.unet import GEGLU, ResBlock, Upsample
from pictures import curves, sheet, write_png
from sampling import add_noise, encode_prompts, seeded

FIXED = ("model", "data", "loss", "beta", "lambda_stat", "rank", "alpha", "lr", "warmup", "seed", "full", "init_lora",
         "optimizer", "max_grad_norm", "dtype", "holdout", "prediction_type")    # what a run is, whatever it runs on
NAMES = ("model", "data", "init_lora")         # of these the contents count


def lambda_or_auto(text: str) -> float | str:
    return text if text == "auto" else cli.real(0)(text)


def parse_args():
    parser = cli.common_parser(__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="made by build_dataset.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="the run; the same command goes on with it")
    parser.add_argument("--loss", default="hg-dpo", choices=("hg-dpo", "dpo", "sft"))
    parser.add_argument(
        "--beta", type=cli.real(above=0), default=2500.0, help="strength of the pull to the reference (Eq. 3)")
    parser.add_argument(
        "--lambda-stat", type=lambda_or_auto, default=10000.0, help="weight of statistic matching (Eq. 8); the paper's "
        "is for 704x1024; auto is 10000 * 88 * 128 / (h * w) for latents of h x w: 27,500 for 512x512")
    parser.add_argument("--rank", type=cli.whole(1), help="of the LoRA (default: 8)")
    parser.add_argument("--alpha", type=cli.real(above=0), help="the LoRA acts with alpha / rank (default: 8)")
    parser.add_argument("--lr", type=cli.real(above=0), default=1e-5)
    parser.add_argument("--warmup", type=cli.whole(0), default=0, help="steps over which the rate rises to --lr")
    parser.add_argument("--batch-size", type=cli.whole(1), default=4, help="pairs a step and process")
    parser.add_argument("--grad-accum", type=cli.whole(1), default=1, help="batches a step")
    parser.add_argument("--steps", type=cli.whole(1), default=1000)
    parser.add_argument("--save-every", type=cli.whole(1), default=100, help="steps between checkpoints")
    parser.add_argument(
        "--sample-every", type=cli.whole(0), default=0, help="steps between sample pictures; 0 is never")
    parser.add_argument("--holdout", type=cli.whole(0), default=0, help="with --sample-every: pairs kept out of "
                        "training, for the held-out accuracy")
    parser.add_argument("--max-grad-norm", type=cli.real(above=0), default=1.0)
    parser.add_argument("--full", action="store_true", help="train the whole U-Net (with --loss sft)")
    parser.add_argument("--init-lora", metavar="FILE", help="start from this LoRA; the reference stays the bare model")
    parser.add_argument("--lora-format", default="kohya", choices=("kohya", "peft"))
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw8bit"))
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net")
    args = parser.parse_args()
    if args.full and args.loss != "sft":
        raise UserError(f"--full is for --loss sft; {args.loss} needs the frozen U-Net as its reference")
    for name in ("rank", "alpha"):
        if getattr(args, name) is not None and (args.init_lora or args.full):
            reason = "--full trains no LoRA" if args.full else "it is that of --init-lora's file"
            raise UserError(f"--{name} {getattr(args, name)}: {reason}")
    if args.full and args.init_lora:
        raise UserError("--full --init-lora: train a LoRA, or the whole U-Net")
    if args.dtype == "float16":
        raise UserError("--dtype float16: small gradients vanish in it; use bfloat16 or float32")
    if args.holdout and not args.sample_every:
        raise UserError("--holdout: give --sample-every, too; it is then that the held-out accuracy is measured")
    args.rank, args.alpha = args.rank or 8, args.alpha or 8.0
    return args


# What a pair of the run sees

@lru_cache(maxsize=2)
def epoch_order(n: int, epoch: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=seeded("order of the pairs", seed, epoch)).tolist()


def pair_number(s: int, pairs: list[int], seed: int) -> int:
    """Which pair is number s of the run: epoch after epoch, each in a new order."""
    epoch, i = divmod(s, len(pairs))
    return pairs[epoch_order(len(pairs), epoch, seed)[i]]


def step_and_noise(
    numbers: range, shape: tuple[int, ...], seed: int, purpose: str = "t and noise of a training pair",
) -> tuple[Tensor, Tensor]:
    """t (B,) in 0..999 and noise (B, 4, h, w) of the run's pairs `numbers`, each from a generator of its own."""
    generators = [seeded(purpose, seed, s) for s in numbers]
    t = torch.cat([torch.randint(0, 1000, (1,), generator=g) for g in generators])
    return t, torch.cat([torch.randn((1, *shape), generator=g) for g in generators])


# The step

def predictions(
    unet: nn.Module, x_t: Tensor, t: Tensor, context: Tensor, reference: bool, compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """eps of the policy and of the reference, which is the same U-Net with its LoRA off; eps twice without one.

    At the first step both must be equal to the last bit: beta makes a logit of any rounding. Eager kernels are chosen
    by shapes and dtypes alone, on CUDA too, so without gradients they round as with them. A compiler makes one graph
    with and another without gradients, and fuses them differently: compiled, the reference runs in the policy's graph,
    of which nothing is kept."""
    x_t = x_t.to(context.dtype)
    eps_ref = None
    if reference:
        with torch.set_grad_enabled(compiled and torch.is_grad_enabled()), lora_disabled(unet):
            eps_ref = unet(x_t, t, context).detach()
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
        if lora_layers(unet):
            lora_by_tensor(unet)
        unet.compile(dynamic=False)            # every step has the same shapes
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


def any_process(said: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether any process says so. By gloo, between CPUs: to read it from a device would wait for that every step."""
    if group is None:
        return said
    votes = torch.tensor(float(said))
    dist.all_reduce(votes, group=group)
    return votes.item() > 0


def start_lora(args, pipeline: Pipeline) -> list[nn.Parameter]:
    """The LoRA that is trained: a new one, or --init-lora's, whose rank and alpha then are the run's."""
    unet = pipeline.unet
    if not args.init_lora:
        return inject_lora(unet, args.rank, args.alpha, generator=seeded("the LoRA's first weights", args.seed))
    load_lora(args.init_lora, unet, text_encoder=pipeline.text_encoder)
    layers = lora_layers(unet)
    strange = [path for path in layers if not f".{path}".endswith(tuple(f".{end}" for end in ATTENTION_LINEARS))]
    strange += [f"the text encoder's {path}" for path in lora_layers(pipeline.text_encoder)]
    if strange:
        raise UserError(
            f"--init-lora {args.init_lora}: covers {len(strange)} layers that are not trained here, such as "
            f"{strange[0]}; only the U-Net's attention linears are. Merge the file into the model instead")
    shapes = {(len(layer.lora_A["default"]), layer.lora_alpha["default"]) for layer in layers.values()}
    if len(shapes) > 1:
        raise UserError(f"--init-lora {args.init_lora}: its layers differ in rank or alpha: {sorted(shapes)}")
    args.rank, args.alpha = shapes.pop()
    return [p for layer in layers.values() for p in (layer.lora_A["default"], layer.lora_B["default"])]


def resume(out: Path, run: str, parameters: list[nn.Parameter], optimizer, rank: int) -> int:
    """The step that the run in `out` has reached, with its parameters and optimizer; 0 for a new one."""
    state_file, step = out / "checkpoint" / "state.pt", 0
    if state_file.is_file():
        try:
            state = torch.load(state_file, map_location="cpu", weights_only=True)
            if state["run"] != run or [p.shape for p in state["parameters"]] != [p.shape for p in parameters]:
                raise ValueError("of another run")
            optimizer.load_state_dict(state["optimizer"])
            step = int(state["step"])
        except Exception as error:             # zip, pickle, key and runtime errors alike mean a bad file
            reason = " ".join(f"{error}".split())[:80]
            raise UserError(f"{state_file}: not this run's checkpoint ({reason}); put the right one back, or remove "
                            f"{state_file.parent} to begin anew") from None
        for parameter, saved in zip(parameters, state["parameters"]):
            parameter.data.copy_(saved)
    for log_file in (out / "log.jsonl", out / "watch.jsonl"):
        if rank == 0 and log_file.is_file():   # a killed run has logged steps past its checkpoint; they come again
            lines = [line for line in read_lines(log_file, cut=True, step=int) if line["step"] <= step]
            for line in lines:
                if line.keys() != lines[0].keys() or not all(is_a(value, float) for value in line.values()):
                    raise UserError(f"{log_file}: the line of step {line['step']} is damaged; mend or remove it")
            write_text(log_file, "".join(json.dumps(line) + "\n" for line in lines))
    return step


def write_log(args, out: Path, buffer: list, seconds: float, rank: int, world: int, pair_ids) -> None:
    """Writes the buffered steps' lines, all processes' mean; the one place where the device is waited for. Stops the
    run on a loss that is not finite, and, at step 1, on one that is not what it must be."""
    keys = list(buffer[0][2])
    values = torch.stack([torch.stack([logs[key].float() for key in keys]) for _, _, logs in buffer])
    if world > 1:
        dist.all_reduce(values)
        values = values / world
    for (step, lr, _), row in zip(buffer, values.tolist()):
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
        if rank == 0:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


def save(
    args, out: Path, run: str, step: int, pipeline: Pipeline, parameters, optimizer, settings: dict, pairs: int,
) -> None:
    """The checkpoint last: what stands before it is written again after a kill."""
    log = read_lines(out / "log.jsonl", step=int)
    if args.full:
        write_tensors(out / "unet" / "diffusion_pytorch_model.safetensors", pipeline.unet.state_dict())
        write_text(out / "unet" / "config.json", json.dumps(pipeline.configs["unet"], indent=2) + "\n")
    else:
        save_lora(out / "lora.safetensors", pipeline.unet, format=args.lora_format)
    shown = [key for key in ("loss", "dpo", "stat", "implicit_accuracy", "grad_norm") if key in log[-1]]
    write_png(out / "curves.png", curves({key: [line[key] for line in log] for key in shown}))
    write_text(out / "README.md", model_card(args, step, pairs, settings, log))
    write_pickle(out / "checkpoint" / "state.pt", {
        "run": run, "step": step, "parameters": [p.detach().cpu() for p in parameters],
        "optimizer": optimizer.state_dict()})


def model_card(args, step: int, pairs: int, settings: dict, log: list[dict]) -> str:
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
        "| setting | value |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in settings.items())
        + f"\n| mean of the last {len(last)} steps | |\n|---|---|\n"
        + "".join(f"| {key} | {value:.6g} |\n" for key, value in figures.items()))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")      # its shapes are others than a step's: not worth a graph of their own
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
            numbers = range(i, i + len(rows))
            t, noise = step_and_noise(numbers, x0.shape[1:], args.seed, "t and noise of a held-out pair")
            t, noise, context = t.to(device).repeat(2), noise.to(device).repeat(2, 1, 1, 1), context.repeat(2, 1, 1)
            eps, eps_ref = predictions(pipeline.unet, add_noise(x0, noise, t, alphas_cumprod), t, context, True)
            for key, value in diffusion_dpo_loss(eps, eps_ref, noise, args.beta)[1].items():
                total[key] = total.get(key, 0.0) + value.item() * len(rows)
        signs |= {f"held_out_{key}": value / len(held_out) for key, value in total.items()}
    rows = (held_out or list(range(len(data.rows))))[:8]
    _, context = data.batch(rows, device, dtype)
    uncond = encode_prompts([""], pipeline.tokenizer, pipeline.text_encoder).to(dtype)            # (1, 77, D)
    uncond = uncond.repeat(len(context), context.shape[1] // uncond.shape[1], 1)
    height, width = (side * pipeline.vae.downscale for side in data.latent_size)
    latents = draw(pipeline, context, uncond, list(range(len(rows))), height, width, steps=20)
    images = [to_picture(pipeline, latent, data.prompts[i], n) for n, (latent, i) in enumerate(zip(latents, rows))]
    for name, value in zip("RGB", torch.tensor([ImageStat.Stat(image).mean for image in images]).mean(dim=0).tolist()):
        signs[f"mean_{name}"] = value
    write_png(out / "samples" / f"{step:06d}.png", sheet(images, [data.prompts[i] for i in rows], columns=4))
    with open(out / "watch.jsonl", "a") as file:
        file.write(json.dumps(signs) + "\n")


# The run

def main() -> None:
    args = parse_args()
    rank, world = cli.rank_and_world()
    device, dtype = cli.device_and_dtype(args)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    gloo = dist.new_group(backend="gloo") if world > 1 else None
    with files_read() as files:
        pipeline = load_pipeline(
            args.model, device, torch.float32 if args.full else dtype, args.vae, args.prediction_type)
    if pipeline.configs["scheduler"].get("prediction_type") == "v_prediction":
        raise UserError(f"{args.model}: predicts v; training is written for models that predict the noise")
    unet, alphas_cumprod = pipeline.unet, pipeline.alphas_cumprod.to(device)
    data = Pairs(Path(args.data), pipeline, need_losers=args.loss != "sft")
    if args.holdout >= len(data.rows):
        raise UserError(f"--holdout {args.holdout}: the dataset has only {len(data.rows)} pairs")
    held_out, pairs = list(range(args.holdout)), list(range(args.holdout, len(data.rows)))
    if args.lambda_stat == "auto":
        args.lambda_stat = lambda_for(*data.latent_size)

    inputs = {"model": digest_all(files), "data": data.digest}
    if args.full:
        parameters = list(unet.requires_grad_(True).parameters())
    else:
        with files_read() as files:
            parameters = [parameter.requires_grad_(True) for parameter in start_lora(args, pipeline)]
        inputs |= {"init_lora": digest_all(files)} if args.init_lora else {}
    if not args.sample_every:                              # nothing else needs them; their memory goes back
        pipeline.vae.to("meta")
        pipeline.text_encoder.to("meta")
    optimizer = make_optimizer(args, parameters)
    make_lean(unet, args.gradient_checkpointing, args.compile)

    out = Path(args.out)
    per_step = args.batch_size * args.grad_accum * world
    settings = {name: getattr(args, name) for name in FIXED} | {"pairs_per_step": per_step}
    run = digest_of([{name: value for name, value in settings.items() if name not in NAMES}, inputs])
    with locked(out) if rank == 0 else contextlib.nullcontext():
        if rank == 0:                                      # it alone writes in the folder; the others wait for it
            begin(out / "config.json", settings, inputs, NAMES)
            clear_unfinished(out)
            noted(out / "config.json", settings, inputs)
        if world > 1:
            dist.barrier()
        start = resume(out, run, parameters, optimizer, rank)
        print(
            f"{args.loss} on {len(pairs)} pairs of {args.data}, {sum(p.numel() for p in parameters):,} parameters of "
            f"{args.model}, {per_step} pairs a step, steps {start + 1} to {args.steps}, on {world} x {device} in "
            f"{dtype}")
        stopping = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.append(True))

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
                x_t = add_noise(x0, noise, t_rows, alphas_cumprod)               # (2B, 4, h, w)
                with torch.autocast(device.type, dtype, enabled=args.full and dtype != torch.float32):
                    eps, eps_ref = predictions(unet, x_t, t_rows, context, args.loss != "sft", args.compile)
                loss, more = loss_of(args, eps, eps_ref, noise, t, alphas_cumprod)
                (loss / args.grad_accum).backward()
                for key, value in {"loss": loss.detach(), **more}.items():
                    logs[key] = logs.get(key, 0) + value / args.grad_accum
            average_gradients(parameters, world)
            logs["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            buffer.append((step, optimizer.param_groups[0]["lr"], logs))
            stop = any_process(bool(stopping), gloo)
            due = step % args.save_every == 0 or step == args.steps
            sample = args.sample_every and (step % args.sample_every == 0 or step == args.steps)
            if due or stop or sample or step == 1 or len(buffer) == 10:
                seconds = (time.perf_counter() - then) / len(buffer)
                write_log(args, out, buffer, seconds, rank, world, ids_of)
                if sample and rank == 0:                   # before the checkpoint: after it, a kill would lose it
                    watch(args, out, step, pipeline, data, held_out, alphas_cumprod)
                if (due or stop) and rank == 0:
                    save(args, out, run, step, pipeline, parameters, optimizer, settings, len(pairs))
                if stop and step < args.steps:
                    raise KeyboardInterrupt
                buffer, then = [], time.perf_counter()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)
