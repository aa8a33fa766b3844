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
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataset.reader import Pairs
from losses import LOSSES
from losses.sft import winners_error
from model.checkpoint import load_pipeline
from model.errors import UserError
from model.files import digest_all, files_read, write_tensors, write_text
from model.lora import inject_lora, load_lora_to_train, lora_disabled, save_lora
from sampling import add_noise, onto, seeded
from training.average import averaged, update_average
from training.memory import make_optimizer, save_memory
from training.order import row_at, step_and_noise
from training.parallel import any_process, average_gradients, join_processes
from training.rate import SCHEDULES, learning_rate
from training.run import append_log, begun, check_start, log_lines, model_card, noted_signals, resume, save_checkpoint
from training.watch import watch

OPTIONS = {name: option for loss in LOSSES.values() for name, option in loss.options.items()}
# What a run is, whatever it runs on. The first two losses' options are among it whatever the loss, as ever.
NOTED = ("model", "data", "loss", "beta", "lambda_stat", "rank", "alpha", "lr", "warmup", "seed", "full", "init_lora",
         "optimizer", "max_grad_norm", "dtype", "holdout", "prediction_type")
MAY_CHANGE = ("model", "data", "init_lora")         # of these the contents count
# Noted where they are not so: runs of before they came go on.
LATER = {"lr_schedule": "constant", "ema": 0.0, "sft_weight": 0.0, "discount": 1.0, "winner_penalty": 0.0}


def parse_args():
    parser = cli.common_parser(__doc__)
    parser.add_argument("--data", required=True, nargs="+", metavar="DIR", help="of build_dataset.py; several join")
    parser.add_argument("--out", required=True, metavar="DIR", help="the run; the same command goes on with it")
    parser.add_argument("--loss", default="hg-dpo", choices=tuple(LOSSES), help="see losses/table.py")
    for name, option in OPTIONS.items():
        defaults = {kind: loss.defaults()[name] for kind, loss in LOSSES.items() if name in loss.options}
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=cli.real(option.least, option.above, below=option.below, auto=option.auto is not None),
            help=f"{option.help} (default: " + ", ".join(f"{kind} {value:g}" for kind, value in defaults.items()) + ")")
    parser.add_argument("--sft-weight", type=cli.real(0), default=0.0, help="of the winners' error, added to the loss")
    parser.add_argument("--holdout", type=cli.whole(0), default=0, help="with --sample-every: pairs kept to measure on")
    parser.add_argument("--full", action="store_true", help="train the whole U-Net (with a loss without reference)")
    cli.add_lora_options(parser)
    cli.add_training_options(
        parser, SCHEDULES, "pairs", lr=1e-5, batch_size=4, grad_accum=1, steps=1000, save_every=100)
    args = parser.parse_args()
    if args.full and LOSSES[args.loss].takes("eps_ref"):
        without = ", ".join(name for name, loss in LOSSES.items() if not loss.takes("eps_ref"))
        raise UserError(f"--full is for --loss {without}; {args.loss} needs the frozen U-Net as its reference")
    for name in ("rank", "alpha", "init_lora"):
        if getattr(args, name) is not None and (args.full or args.init_lora and name != "init_lora"):
            reason = "--full trains no LoRA" if args.full else "it is that of --init-lora's file"
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: {reason}")
    cli.refuse_float16(args.dtype)
    for name, option in OPTIONS.items():
        if option.instead_of and getattr(args, name) and getattr(args, option.instead_of) is not None:
            raise UserError(f"--{name} goes without --{option.instead_of.replace('_', '-')}: it takes its place")
    if args.holdout and (args.full or LOSSES[args.loss].data != "pairs"):
        reason = "--full has no reference to compare with" if args.full else f"--loss {args.loss} learns from no pairs"
        raise UserError(f"--holdout {args.holdout}: the held-out accuracy is of pairs and a LoRA, and {reason}")
    if args.holdout and not args.sample_every:
        raise UserError("--holdout: give --sample-every, too; it is then that the held-out accuracy is measured")
    args.rank, args.alpha = args.rank or 8, args.alpha or 8.0
    return args


def loss_options(args, latent_size: tuple[int, int]) -> dict[str, float]:
    """Every option of every loss: as given, else as the loss's signature has it."""
    by_rank = (*reversed(LOSSES.values()), LOSSES[args.loss])          # where several take it, the first one's default
    values = {name: value for loss in by_rank for name, value in loss.defaults().items()}
    for name, option in OPTIONS.items():
        if (given := getattr(args, name)) is not None:
            values[name] = option.auto(*latent_size) if given == "auto" else given
            if name not in LOSSES[args.loss].options and cli.rank_and_world()[0] == 0:
                print(f"warning: --loss {args.loss} takes no --{name.replace('_', '-')}", file=sys.stderr)
    return values


# The step

def predictions(
    unet: nn.Module, x_t: Tensor, t: Tensor, context: Tensor, reference: bool, compiled: bool = False,
) -> dict[str, Tensor]:
    """`eps` of the policy, and `eps_ref` of the reference, the same U-Net with its LoRA off, where one is asked for.

    At the first step both must be equal to the last bit: beta makes a logit of any rounding. Eager kernels are chosen
    by shapes and dtypes alone, on CUDA too, so without gradients they round as with them. A compiler fuses a graph with
    gradients otherwise than one without: compiled, the reference runs in the policy's graph, and is detached."""
    x_t = x_t.to(context.dtype)
    found = {}
    if reference:
        with torch.set_grad_enabled(compiled and torch.is_grad_enabled()), lora_disabled(unet):
            found["eps_ref"] = unet(x_t, t, context).detach()
    return {"eps": unet(x_t, t, context), **found}


# The run

def main() -> None:
    args = parse_args()
    rank, world = cli.rank_and_world()
    device, dtype = cli.device_and_dtype(args.device, args.dtype)
    gloo = join_processes(device, world)
    with files_read() as files:
        pipeline = load_pipeline(
            args.model, device, torch.float32 if args.full else dtype, args.vae, args.prediction_type)
    if pipeline.predicts_v:
        raise UserError(f"{args.model}: predicts v; training is written for models that predict the noise")
    unet, alphas_cumprod = pipeline.unet, pipeline.alphas_cumprod.to(device)
    loss_of = LOSSES[args.loss]
    data = Pairs([Path(folder) for folder in args.data], pipeline, loss_of.data)
    if args.holdout >= len(data.rows):
        raise UserError(f"--holdout {args.holdout}: the dataset has only {len(data.rows)} pairs")
    held_out, pairs = list(range(args.holdout)), list(range(args.holdout, len(data.rows)))

    inputs = {"model": digest_all(files), "data": data.digest}
    if args.full:
        parameters = list(unet.requires_grad_(True).parameters())
    elif args.init_lora:
        with files_read() as files:
            parameters, args.rank, args.alpha = load_lora_to_train(args.init_lora, unet, pipeline.text_encoder)
        inputs |= {"init_lora": digest_all(files)}
    else:
        parameters = inject_lora(unet, args.rank, args.alpha, generator=seeded("the LoRA's first weights", args.seed))
    if not args.sample_every:                              # nothing else needs them; their memory goes back
        pipeline.vae.to("meta")
        pipeline.text_encoder.to("meta")
    optimizer = make_optimizer(args.optimizer, parameters, args.lr)
    average = [parameter.detach().clone() for parameter in parameters] if args.ema else []
    save_memory(unet, args.gradient_checkpointing, args.compile)

    out, args.dtype = Path(args.out), cli.name_of(dtype)                       # what auto is here
    per_step = args.batch_size * args.grad_accum * world
    values = vars(args) | loss_options(args, data.latent_size) | {"data": " ".join(args.data)}
    options = {name: values[name] for name in loss_of.options}
    later = {name: values[name] for name, default in LATER.items() if values[name] != default}
    later |= {"steps": args.steps} if "lr_schedule" in later else {}
    if loss_of.together or (args.sft_weight and loss_of.data == "labels"):
        later["pairs_together"] = args.batch_size * world
    noted = {name: values[name] for name in (*NOTED, *options) if name not in LATER}
    settings = noted | later | {"pairs_per_step": per_step}

    def save(step: int) -> None:
        with averaged(parameters, average):
            if args.full:
                write_tensors(out / "unet" / "diffusion_pytorch_model.safetensors", unet.state_dict())
                write_text(out / "unet" / "config.json", json.dumps(pipeline.configs["unet"], indent=2) + "\n")
            else:
                save_lora(out / "lora.safetensors", unet, format=args.lora_format)
        names = " and ".join(Path(folder).name for folder in args.data)
        learned = f"{step} steps on {len(pairs)} pairs of `{names}`"
        card = model_card(args.model, args.loss, learned, lora=not args.full, settings=settings)
        save_checkpoint(out, run, step, parameters, average, optimizer, card)

    with begun(out / "config.json", settings, inputs, MAY_CHANGE, rank, world) as run:
        start = resume(out, run, parameters, average, optimizer, rank)
        print(
            f"{args.loss} on {len(pairs)} pairs of {' and '.join(args.data)}, {sum(p.numel() for p in parameters):,} "
            f"parameters of {args.model}, {per_step} pairs a step, steps {start + 1} to {args.steps}, on {world} x "
            f"{device} in {dtype}")
        stopping = noted_signals()

        def ids_of(step: int) -> list[str]:
            first = (step - 1) * per_step
            return [data.lines[row_at(first + i, pairs, args.seed)]["id"] for i in range(per_step)]

        buffer, then = [], time.perf_counter()
        for step in cli.progress(range(start + 1, args.steps + 1), args.steps - start, "training"):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args.lr, args.lr_schedule, args.warmup, step, args.steps)
            logs = {}
            for micro in range(args.grad_accum):
                # This process's share of the pairs (step - 1) * per_step ... step * per_step of the run.
                first = (step - 1) * per_step + (micro * world + rank) * args.batch_size
                numbers = range(first, first + args.batch_size)
                rows = [row_at(s, pairs, args.seed) for s in numbers]
                x0, context = data.batch(rows, device, dtype)
                t, noise = step_and_noise(numbers, x0.shape[1:], args.seed)
                t, noise, copies = onto(device, t), onto(device, noise), len(x0) // len(t)
                t_rows, noise, context = t.repeat(copies), noise.repeat(copies, 1, 1, 1), context.repeat(copies, 1, 1)
                x_t = add_noise(x0, noise, t_rows, alphas_cumprod)               # (2B, 4, h, w), winners first
                with torch.autocast(device.type, dtype, enabled=args.full and dtype != torch.float32):
                    predicted = predictions(unet, x_t, t_rows, context, loss_of.takes("eps_ref"), args.compile)
                given = {"noise": noise, "timesteps": t, "alphas_cumprod": alphas_cumprod, **predicted}
                if loss_of.takes("scores") or (args.sft_weight and loss_of.data == "pool"):
                    given["scores"] = onto(device, data.scores(rows))
                if loss_of.takes("labels"):
                    given["labels"] = onto(device, data.labels(rows))
                loss, more = loss_of(options, **given)
                if args.sft_weight:
                    loss = loss + args.sft_weight * winners_error(loss_of.data, **given)
                (loss / args.grad_accum).backward()
                for key, value in {"loss": loss.detach(), **more}.items():
                    logs[key] = logs.get(key, 0) + value / args.grad_accum
            average_gradients(parameters, world)
            logs["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            update_average(average, parameters, args.ema, step)

            buffer.append((step, optimizer.param_groups[0]["lr"], logs))
            stop = any_process(bool(stopping), gloo)
            due = step % args.save_every == 0 or step == args.steps
            sample = args.sample_every and (step % args.sample_every == 0 or step == args.steps)
            if due or stop or sample or step == 1 or len(buffer) == 10:
                lines = log_lines(buffer, (time.perf_counter() - then) / len(buffer))
                if not args.init_lora:
                    check_start(lines[0], loss_of.at_start)
                append_log(out, lines, ids_of, write=rank == 0)
                if sample and rank == 0:                   # before the checkpoint: after it, a kill would lose it
                    with averaged(parameters, average):
                        watch(out, step, pipeline, data, held_out, args.batch_size, args.seed)
                if (due or stop) and rank == 0:
                    save(step)
                if stop and step < args.steps:
                    raise KeyboardInterrupt
                buffer, then = [], time.perf_counter()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)
