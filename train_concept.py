"""Trains a concept encoder and its adapters (InstantBooth, arXiv 2304.03411), by which a person who is given by one or
more pictures is drawn, without any tuning for that person. Everything else is frozen. One file; copy it.

    python -m paper_people.concept_pictures --out people
    python train_concept.py --images people/train --out concept --placeholder x --lr 1e-3 --adapter-lr 1e-3
    python train_concept.py --model owner/name --images photos --out concept               # the paper's settings
    torchrun --nproc-per-node 4 train_concept.py --model owner/name --images photos --out concept

IMAGES/metadata.jsonl has a line a picture: `file_name`, `text` with the placeholder before the class noun ("a photo of
a sks person on a beach"), and `mask`, a picture that is white where the person is, if there is one.

One step: the person is cut out, mirrored, turned and cropped -> CLIP's image tower -> the placeholder's text feature
and the adapters' patches; the whole picture -> latent -> x_t -> eps -> the error of the noise -> AdamW. There are no
two pictures of one person: what a picture shows of its person and its caption does not say is what is learned.

What picture s of the run is, its cut, t and noise depend on --seed and s alone: see train.py.
"""

import cli

# isort: split
import time
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataset.concepts import augmented, digest_of_images, read_concept_images, unusable
from dataset.images import fit, to_latent
from losses.diffusion_dpo import squared_error
from model.checkpoint import load_pipeline
from model.concept import new_concept, save_concept
from model.errors import UserError
from model.files import digest_all, files_read
from pictures import sheet, write_png
from sampling import Drawing, add_noise, draw_people, onto
from training.average import averaged, update_average
from training.memory import make_optimizer, save_memory
from training.order import row_at, step_and_noise
from training.parallel import any_process, average_gradients, join_processes
from training.rate import SCHEDULES, learning_rate
from training.run import append_log, begun, log_lines, model_card, noted_signals, resume, save_checkpoint

MAY_CHANGE = ("model", "images", "clip")           # of these the contents count
NOTED = (*MAY_CHANGE, "placeholder", "lr", "adapter_lr", "warmup", "lr_schedule", "ema", "seed", "height", "width",
         "optimizer", "max_grad_norm", "dtype", "prediction_type")


def parse_args():
    parser = cli.common_parser(__doc__)
    parser.add_argument("--images", required=True, metavar="DIR", help="pictures, with a metadata.jsonl")
    parser.add_argument("--out", required=True, metavar="DIR", help="the run; the same command goes on with it")
    parser.add_argument("--clip", metavar="CLIP", help="whose image tower sees the person: a Hub id, a folder, or a "
                        "name of model/scorers.py (default: openai/clip-vit-large-patch14, or the built-in model's)")
    parser.add_argument("--placeholder", default="sks", metavar="WORD", help="what stands for the person in captions")
    parser.add_argument("--adapter-lr", type=cli.real(above=0), default=1e-6, help="learning rate of the adapters; "
                        "--lr is that of the two linear layers")
    parser.add_argument("--height", type=cli.pixels, help="pixels (default: the model's own size)")
    parser.add_argument("--width", type=cli.pixels, help="pixels (default: the model's own size)")
    cli.add_training_options(
        parser, SCHEDULES, "pictures", lr=1e-4, batch_size=16, grad_accum=1, steps=320_000, save_every=1000)
    args = parser.parse_args()
    cli.refuse_float16(args.dtype)
    return args


def main() -> None:
    args = parse_args()
    rank, world = cli.rank_and_world()
    device, dtype = cli.device_and_dtype(args.device, args.dtype)
    gloo = join_processes(device, world, timeout=timedelta(days=2))        # the others wait while the first looks
    with files_read() as files:
        pipeline = load_pipeline(args.model, device, dtype, args.vae, args.prediction_type)
    if pipeline.predicts_v:
        raise UserError(f"{args.model}: predicts v; training is written for models that predict the noise")
    images = read_concept_images(Path(args.images))
    inputs = {"model": digest_all(files), "images": digest_of_images(images)}
    torch.manual_seed(args.seed)                           # for the new layers' first weights
    with files_read() as files:
        model = new_concept(pipeline, args.clip, args.placeholder)
    inputs["clip"] = digest_all(files)
    pipeline.concept, args.clip = model, model.clip
    for image in images:                                   # now, and not in the middle of the work
        model.places(image.text, pipeline.tokenizer)
    if rank == 0 and not (Path(args.out) / "config.json").is_file():
        problems = unusable(images, cli.progress)
        cli.refuse(problems, f"{len(problems)} of {len(images)} pictures of {args.images} cannot be trained on; mend "
                   "them, or take them out of metadata.jsonl")
    unet, concept, alphas_cumprod = pipeline.unet, model.concept, pipeline.alphas_cumprod.to(device)
    drawing = Drawing(height=args.height, width=args.width, steps=20).for_model(pipeline)
    linear = [*concept.global_proj.parameters(), *concept.patch_proj.parameters()]
    adapters = list(concept.adapters.parameters())
    parameters = linear + adapters
    optimizer = make_optimizer(args.optimizer, linear, args.lr)
    optimizer.add_param_group({"params": adapters})
    average = [parameter.detach().clone() for parameter in parameters] if args.ema else []
    save_memory(unet, args.gradient_checkpointing, args.compile)

    @lru_cache(maxsize=4096)
    def latent(i: int) -> Tensor:                          # (4, h, w)
        return to_latent(fit(images[i].load(), drawing.width, drawing.height), pipeline)

    out, every = Path(args.out), list(range(len(images)))
    per_step = args.batch_size * args.grad_accum * world
    settings = {name: getattr(args, name) for name in NOTED} | {"dtype": cli.name_of(dtype)}
    settings |= {"pictures_per_step": per_step}
    settings |= {"steps": args.steps} if args.lr_schedule != "constant" else {}

    def save(step: int) -> None:
        with averaged(parameters, average):
            save_concept(out / "concept.safetensors", model)
        learned = f"{step} steps on {len(images)} pictures of `{Path(args.images).name}`"
        card = model_card(args.model, "instantbooth", learned, lora=False, settings=settings)
        save_checkpoint(out, run, step, parameters, average, optimizer, card)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def draw_samples(step: int) -> None:
        """The first pictures' people, and below them what the model draws of them by their captions."""
        shown = images[:8]
        subjects, texts = [image.subject() for image in shown], [image.text for image in shown]
        with averaged(parameters, average):
            people = [model.look([subject]) for subject in subjects]
            drawn = [image for _, image in draw_people(pipeline, drawing, texts, list(range(len(shown))), people)]
        write_png(out / "samples" / f"{step:06d}.png", sheet([*subjects, *drawn], 2 * texts, columns=len(shown)))

    with begun(out / "config.json", settings, inputs, MAY_CHANGE, rank, world) as run:
        start = resume(out, run, parameters, average, optimizer, rank)
        print(
            f"a concept of {len(images)} pictures of {args.images}, {sum(p.numel() for p in parameters):,} parameters "
            f"beside {args.model}, {per_step} pictures a step, steps {start + 1} to {args.steps}, on {world} x "
            f"{device} in {dtype}")
        stopping = noted_signals()

        def numbers_of(step: int, micro: int) -> range:
            """This process's share of the pictures (step - 1) * per_step ... step * per_step of the run."""
            first = (step - 1) * per_step + (micro * world + rank) * args.batch_size
            return range(first, first + args.batch_size)

        def row(s: int) -> int:
            return row_at(s, every, args.seed, "order of a concept's pictures")

        buffer, then = [], time.perf_counter()
        for step in cli.progress(range(start + 1, args.steps + 1), args.steps - start, "training"):
            for group, lr in zip(optimizer.param_groups, (args.lr, args.adapter_lr)):
                group["lr"] = learning_rate(lr, args.lr_schedule, args.warmup, step, args.steps)
            logs = {"loss": torch.zeros((), device=device)}
            for micro in range(args.grad_accum):
                numbers = numbers_of(step, micro)
                rows = [row(s) for s in numbers]
                x0 = torch.stack([latent(i) for i in rows])                      # (B, 4, h, w)
                t, noise = step_and_noise(numbers, x0.shape[1:], args.seed, "t and noise of a concept's picture")
                t, noise = onto(device, t), onto(device, noise)
                x_t = add_noise(x0, noise, t, alphas_cumprod).to(dtype)
                pixels = torch.stack([model.pixels(augmented(images[i].subject(), args.seed, s))
                                      for i, s in zip(rows, numbers)])           # (B, 3, H, W)
                features, patches = model.encode(pixels)                         # (B, C), (B, T, C)
                texts = [images[i].text for i in rows]
                context = torch.stack([model.say(*one, pipeline.tokenizer) for one in zip(
                    drawing.encode(texts, pipeline), texts, features)])          # (B, M, C)
                with concept.showing(patches):                                   # the backward pass, too
                    loss = squared_error(unet(x_t, t, context), noise).mean() / args.grad_accum
                    loss.backward()
                logs["loss"] += loss.detach()
            average_gradients(parameters, world)
            logs["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            update_average(average, parameters, args.ema, step)
            logs["gate"] = torch.stack([adapter.gamma.detach().tanh().abs() for adapter in concept.adapters]).mean()

            buffer.append((step, optimizer.param_groups[0]["lr"], logs))
            stop = any_process(bool(stopping), gloo)
            due = step % args.save_every == 0 or step == args.steps
            sample = args.sample_every and (step % args.sample_every == 0 or step == args.steps)
            if due or stop or sample or step == 1 or len(buffer) == 10:
                lines = log_lines(buffer, (time.perf_counter() - then) / len(buffer))
                append_log(out, lines, lambda step: [images[row(s)].file.name for s in numbers_of(step, 0)],
                           write=rank == 0)
                if sample and rank == 0:
                    draw_samples(step)
                if (due or stop) and rank == 0:
                    save(step)
                if stop and step < args.steps:
                    raise KeyboardInterrupt
                buffer, then = [], time.perf_counter()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)
