"""Trains a scorer on people's preferences: a CLIP whose score tells which picture they choose (the survey's Eq. 3).

    python train_scorer.py --from-pairs eval-study/pairs.jsonl --init pickscore --out mine     # on study.py's answers
    python train_scorer.py --from-pairs train.json --init laion/CLIP-ViT-H-14-laion2B-s32B-b79K --train all --out hps
    torchrun --nproc-per-node 4 train_scorer.py ...
    python build_dataset.py --scorer mine --prompts prompts.txt --out data                     # what it is for

One step: the pictures of some prompts -> score = exp(logit_scale) * cosine(text, picture) -> Bradley-Terry's loss,
-log sigmoid(better - other); where several are ranked, Plackett-Luce's; a tie counts half -> AdamW, in float32. Every
--save-every steps the scorer looks at prompts that it does not learn from; the weights of the lowest held-out loss,
those of the start among them, are what is saved. The default settings are near those of PickScore and HPS v2.

OUT                     --scorer OUT, and transformers' CLIPModel, read it
OUT/report.json         held-out accuracy with its 95 % interval, held-out loss, calibration, counts, what was left out;
                        on the prompts that chose the weights, so that it flatters them a little (`evaluate.py
                        --preference-accuracy` asks others)
OUT/reliability.png, OUT/curves.png, OUT/log.jsonl; OUT/watch.jsonl, a line a look
OUT/training.json, OUT/checkpoint/   what the same command goes on from, bit for bit; and the pictures, prepared
"""

import cli

# isort: split
import json
import math
import time
from datetime import timedelta
from itertools import takewhile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataset.preferences import digest_of_source, read_rankings
from evaluation.statistics import percent_and_interval, wilson, win_rate
from losses.bradley_terry import bradley_terry_loss, rightness, score_margins
from model.errors import UserError
from model.files import digest_of, read_lines, write_text
from model.scorers import PickScore
from pictures import curves, write_png
from training.average import averaged
from training.order import row_at
from training.parallel import any_process, average_gradients, join_processes
from training.rate import SCHEDULES, learning_rate
from training.run import append_lines, append_log, begun, log_lines, noted_signals, resume, save_checkpoint
from training.scorer import (
    Rankings,
    calibration,
    hold_out,
    list_pictures,
    load_init,
    pair_counts,
    prepare_pictures,
    reliability_diagram,
    save_scorer,
    trained_parameters,
    with_pictures,
)

# What a run is, whatever it runs on; of the first two the contents count.
NOTED = ("init", "from_pairs", "train", "lr", "lr_schedule", "warmup", "save_every", "holdout", "patience", "seed")
MAY_CHANGE = ("init", "from_pairs")
ORDER = "order of the rankings"


def parse_args():
    parser = cli.Parser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--from-pairs", required=True, metavar="FILE",
                        help="Pick-a-Pic, HPD-v2, ImageRewardDB, or one's own (see dataset/preferences.py)")
    parser.add_argument("--init", default="paper-people", metavar="SCORER",
                        help="what it begins as: a CLIP among the scorers of model/scorers.py, a folder, a Hub id")
    parser.add_argument("--out", required=True, metavar="DIR", help="the scorer; the same command goes on with it")
    parser.add_argument("--train", default="last", choices=("last", "all"), help="last: the second half of both "
                        "towers' layers, what follows them, and logit_scale; all: the whole CLIP")
    parser.add_argument("--lr", type=cli.real(above=0), default=3e-6, help="learning rate")
    parser.add_argument("--warmup", type=cli.whole(0), default=500, help="steps over which the rate rises to --lr")
    parser.add_argument(
        "--lr-schedule", default="constant", choices=tuple(SCHEDULES), help="how it then falls, to 0 after --steps")
    parser.add_argument("--batch-size", type=cli.whole(1), default=16, help="prompts' rankings a step and process")
    parser.add_argument("--steps", type=cli.whole(1), default=4000)
    parser.add_argument("--save-every", type=cli.whole(1), default=100, help="steps between checkpoints, each with a "
                        "look at the held-out prompts")
    parser.add_argument("--holdout", type=cli.real(above=0, below=1), default=0.1, metavar="SHARE",
                        help="of the prompts, kept out of training; every look scores all their pictures")
    parser.add_argument("--patience", type=cli.whole(0), default=0,
                        help="looks without a lower held-out loss after which it stops; 0 is never")
    parser.add_argument("--device", type=cli.device_name, default="auto", help="auto is cuda, else mps, else cpu")
    parser.add_argument("--seed", type=cli.whole(0, 2**63 - 1), default=0, help="of the order, and of what is held out")
    return parser.parse_args()


def compare(scorer: PickScore, data: Rankings, rows: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """B rankings -> the loss of each (B,), and of all pairs of pictures in them the margins and the ties (M,)."""
    pixels, prompts, grades = data.batch(rows, device)                           # (P, 3, H, W)
    counts = torch.tensor([len(one) for one in grades])
    text = scorer.clip.embed_text(scorer.tokenizer.encode(prompts).to(device))   # (B, D)
    text = text.repeat_interleave(counts.to(device), dim=0, output_size=len(pixels))             # (P, D)
    cosine = (text * scorer.clip.embed_images(pixels)).sum(dim=1)                # (P,)
    scores = (scorer.clip.logit_scale.exp() * cosine).split(counts.tolist())     # B times (K,)
    margins, tied = zip(*map(score_margins, scores, grades))
    return torch.stack(list(map(bradley_terry_loss, scores, grades))), torch.cat(margins), torch.cat(tied)


@torch.no_grad()
def look(
    scorer: PickScore, data: Rankings, rows: list[int], batch_size: int, device: torch.device,
) -> tuple[float, dict, Tensor, Tensor]:
    """-> the mean loss of many rankings, the win rate of the better picture of a pair, all margins, all ties. Pairs of
    one prompt are not quite independent: where there are many of them the rate's interval is narrow."""
    batches = [compare(scorer, data, rows[i:i + batch_size], device) for i in range(0, len(rows), batch_size)]
    losses, margins, tied = (torch.cat(some).cpu() for some in zip(*batches))
    decided = margins[~tied].tolist()
    return losses.mean().item(), win_rate(decided, [0.0] * len(decided)), margins, tied


def write_report(out: Path, watch: list[dict], found: tuple[float, dict, Tensor, Tensor], counts: dict) -> None:
    """report.json and the charts of a run that has ended. `watch` are its looks, `found` the one with what is saved."""
    loss, rate, margins, tied = found
    bins, error = calibration(margins, tied)
    best = min(watch, key=lambda line: line["held_out_loss"])
    report = {
        "held_out_accuracy": rate, "held_out_loss": loss, "at_start": watch[0], "best_step": best["step"],
        "steps": watch[-1]["step"], "expected_calibration_error": error, "calibration": bins, **counts}
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    intervals = [wilson(one["observed"] * one["pairs"], one["pairs"]) for one in bins]
    title = f"{len(margins)} held-out pairs, expected calibration error {error:.3f}"
    write_png(out / "reliability.png", reliability_diagram(bins, intervals, title))
    log = read_lines(out / "log.jsonl", step=int)
    series = {key: [line[key] for line in log] for key in ("loss", "accuracy", "grad_norm")}
    for key in ("held_out_loss", "held_out_accuracy"):         # at each step the last look's
        series[key] = [[one[key] for one in watch if one["step"] <= line["step"]][-1] for line in log]
    write_png(out / "curves.png", curves(series))


def main() -> None:
    args = parse_args()
    rank, world = cli.rank_and_world()
    device, _ = cli.device_and_dtype(args.device, "float32")
    # The others wait while the first prepares the pictures.
    gloo = join_processes(device, world, timeout=timedelta(days=2))
    scorer, config, init = load_init(args.init, device)
    parameters = trained_parameters(scorer.clip, args.train)
    best = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, fused=parameters[0].is_cuda)
    rankings = read_rankings(Path(args.from_pairs))
    rows, held_out = hold_out(rankings, args.holdout, args.seed, args.from_pairs)
    pictures, places = list_pictures(rankings)

    out = Path(args.out)
    per_step = args.batch_size * world
    settings = {name: getattr(args, name) for name in NOTED} | {"rankings_per_step": per_step}
    settings |= {} if args.lr_schedule == "constant" else {"steps": args.steps}
    listed = digest_of([[[ranking.prompt, ranking.grades] for ranking in rankings], places, digest_of_source(pictures)])
    inputs = {"init": init, "from_pairs": listed}
    card = (f"---\nbase_model: {args.init}\nlibrary_name: transformers\ntags: [clip, reward-model]\n---\n\n"
            f"# A preference scorer from {args.init}\n\nscore = exp(logit_scale) * cosine(text, picture)\n")

    def save(step: int) -> None:
        with averaged(parameters, best):
            save_scorer(out, scorer, config)
        save_checkpoint(out, run, step, parameters, best, optimizer, card)

    with begun(out / "training.json", settings, inputs, MAY_CHANGE, rank, world) as run:
        prepared = out / "checkpoint" / "pictures.u8"
        if rank == 0:
            prepare_pictures(prepared, pictures, scorer.preprocessor, cli.progress)
        if world > 1:
            dist.barrier()
        data, left_out = with_pictures(rankings, places, prepared, scorer.preprocessor)
        rows, held_out = ([row for row in some if len(data.places[row]) > 1] for some in (rows, held_out))
        counts = {"rankings": len(rows), "held_out_rankings": len(held_out)}
        for side, some in (("", rows), ("held_out_", held_out)):
            counts[f"{side}pairs"], counts[f"{side}ties"] = pair_counts([data.rankings[row] for row in some])
        if not counts["pairs"] or not counts["held_out_pairs"]:
            raise UserError(f"{args.from_pairs}: too few pictures can be read to train and to hold out: {left_out[0]}")
        start = resume(out, run, parameters, best, optimizer, rank)
        print(
            f"{args.init}, {sum(p.numel() for p in parameters):,} parameters of it, on {counts['pairs']} pairs and "
            f"{counts['ties']} ties of {args.from_pairs}, {counts['held_out_pairs']} pairs held out, {per_step} "
            f"rankings a step, steps {start + 1} to {args.steps}, on {world} x {device}")
        watch = read_lines(out / "watch.jsonl") if rank == 0 and (out / "watch.jsonl").is_file() else []

        def watch_held_out(step: int) -> None:
            loss, rate, *_ = look(scorer, data, held_out, args.batch_size, device)
            if not math.isfinite(loss):
                raise UserError(f"step {step}: the held-out loss is {loss}; {out / 'checkpoint'} keeps the last state")
            if all(loss < line["held_out_loss"] for line in watch):
                for kept, parameter in zip(best, parameters):
                    kept.copy_(parameter.detach())
            low, high = rate["ci95"]
            watch.append({"step": step, "held_out_loss": loss, "held_out_accuracy": rate["percent_ties_half"],
                          "ci95_low": low, "ci95_high": high})
            append_lines(out / "watch.jsonl", watch[-1:])

        def out_of_patience() -> bool:
            losses = [line["held_out_loss"] for line in watch]
            return 0 < args.patience < len(losses) - losses.index(min(losses))

        def ids_of(step: int) -> list[str]:
            numbers = range((step - 1) * per_step, step * per_step)
            return [data.rankings[row_at(s, rows, args.seed, ORDER)].pictures[0].where() for s in numbers]

        stopping = noted_signals()
        if rank == 0 and not watch:
            watch_held_out(0)
        buffer, then = [], time.perf_counter()
        steps = takewhile(
            lambda _: not any_process(rank == 0 and out_of_patience(), gloo), range(start + 1, args.steps + 1))
        for step in cli.progress(steps, args.steps - start, "training"):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args.lr, args.lr_schedule, args.warmup, step, args.steps)
            # This process's share of the rankings (step - 1) * per_step ... step * per_step of the run.
            first = (step - 1) * per_step + rank * args.batch_size
            some = [row_at(s, rows, args.seed, ORDER) for s in range(first, first + args.batch_size)]
            losses, margins, tied = compare(scorer, data, some, device)
            loss = losses.mean()
            loss.backward()
            average_gradients(parameters, world)
            grad_norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            accuracy = rightness(margins.detach(), tied).mean()
            logs = {"loss": loss.detach(), "accuracy": accuracy, "grad_norm": grad_norm}

            buffer.append((step, optimizer.param_groups[0]["lr"], logs))
            stop = any_process(bool(stopping), gloo)
            due = step % args.save_every == 0 or step == args.steps
            if due or stop or step == 1 or len(buffer) == 10:
                append_log(out, log_lines(buffer, (time.perf_counter() - then) / len(buffer)), ids_of, rank == 0)
                if due and rank == 0:                      # before the checkpoint: after it, a kill would lose it
                    watch_held_out(step)
                if (due or stop) and rank == 0:
                    save(step)
                if stop and step < args.steps:
                    raise KeyboardInterrupt
                buffer, then = [], time.perf_counter()
        if rank == 0:
            with averaged(parameters, best):
                found = look(scorer, data, held_out, args.batch_size, device)
            write_report(out, watch, found, counts | {"left_out": left_out})
            print(f"{out}: right in {percent_and_interval(found[1])} of {counts['held_out_pairs']} held-out pairs, "
                  f"{watch[0]['held_out_accuracy']:.1f} % at the start")
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        cli.refuse(
            left_out, f"{len(left_out)} pictures cannot be read, and are left out; {out / 'report.json'} names them")


if __name__ == "__main__":
    cli.run(main)
