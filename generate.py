"""Draws pictures from prompts.

    python generate.py --prompt "a woman with red hair, blue shirt and white trousers, waving on a beach" --out out
    python generate.py --prompts paper_people/prompts_test.txt --limit 24 --lora run/lora.safetensors:0.5 --out tuned
    python generate.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts parti-people --num-images 4
    python generate.py --model majicmix.safetensors --prompts FILE.txt --height 1024 --width 704 --prompt-weights a1111

Writes OUT/00000.png ... (all pictures of the first prompt, then of the second, ...), each with its settings inside in
the form that A1111 and others read; OUT/images.jsonl; OUT/sheet.png; with --save-latents OUT/latents.safetensors.
A picture depends on its prompt, its seed and the settings alone: not on the batch, the device, or its neighbours.
"""

import json
import re
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

import cli
from model.checkpoint import Pipeline, load_pipeline
from model.errors import UserError
from model.files import write_tensors, write_text
from model.lora import load_lora, lora_disabled
from paper_people.draw import words
from pictures import parameters, sheet, to_images, write_png
from sampling import encode_prompts, guided_eps, sample_ddim, sample_ddpm, sample_dpm_solver, sample_lan, timesteps

SAMPLER_NAMES = {"dpm++": "DPM++ 2M", "ddim": "DDIM", "ddpm": "DDPM"}        # as A1111 writes them
SHEET_PICTURES = 64


def initial_noise(seeds: list[int], height: int, width: int) -> tuple[Tensor, list[torch.Generator]]:
    """Noise (B, 4, height, width) float32, drawn on the CPU by one generator a seed: the same on every device and in
    every batch, and the same as diffusers'. The generators go on where it ends, for samplers that draw more."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return torch.cat([torch.randn((1, 4, height, width), generator=g) for g in generators]), generators


@torch.no_grad()
def draw(
    pipeline: Pipeline, context: Tensor, context_uncond: Tensor, seeds: list[int], height: int, width: int,
    steps: int = 50, guidance: float = 5.0, sampler: str = "dpm++", lan: bool = False,
) -> Tensor:
    """One batch: contexts (B, M, D) and B seeds -> scaled latents (B, 4, height/8, width/8), float32. With `lan` the
    U-Net's LoRA is held to its base's colours (Eq. 7)."""
    scheduler, alphas_cumprod = pipeline.configs["scheduler"], pipeline.alphas_cumprod
    x, generators = initial_noise(seeds, height // pipeline.vae.downscale, width // pipeline.vae.downscale)
    x = x.to(pipeline.device)
    of_v = alphas_cumprod if scheduler.get("prediction_type") == "v_prediction" else None
    eps_fn = guided_eps(pipeline.unet, context, context_uncond, guidance, of_v)

    def sample(eps_fn: Callable, x: Tensor, after_step: Callable | None = None) -> Tensor:
        if sampler == "dpm++":
            return sample_dpm_solver(eps_fn, x, alphas_cumprod, steps, scheduler, after_step)
        ts = timesteps(steps, scheduler)
        if sampler == "ddim":
            return sample_ddim(eps_fn, x, alphas_cumprod, ts, scheduler.get("set_alpha_to_one", True), after_step)
        return sample_ddpm(eps_fn, x, alphas_cumprod, ts, generators, after_step)

    def base(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        with lora_disabled(pipeline.unet):
            return pipeline.unet(x_t, t, context)

    if lan:
        return sample_lan(sample, eps_fn, guided_eps(base, context, context_uncond, guidance, of_v), x)
    return sample(eps_fn, x)


@torch.no_grad()
def decode(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Scaled latents (B, 4, h, w) -> pictures (B, 3, H, W), about [-1, 1]."""
    return pipeline.vae.decode(pipeline.vae.from_latent(latents.float()))


def load_loras(pipeline: Pipeline, specs: list[str]) -> None:
    """Adds LoRAs, each FILE or FILE:WEIGHT, to the U-Net and, where a file covers it, the text encoder."""
    for i, spec in enumerate(specs):
        path, colon, weight = spec.rpartition(":")
        try:
            weight = float(weight) if colon else 1.0
        except ValueError:                       # a colon that belongs to the path
            path, weight = spec, 1.0
        load_lora(path or spec, pipeline.unet, weight, f"lora{i}", pipeline.text_encoder)


def check_sampling_options(args, pipeline: Pipeline) -> None:
    """Fills in the model's own size, and refuses what cannot be drawn."""
    args.height = args.height if args.height is not None else pipeline.native_size[0]
    args.width = args.width if args.width is not None else pipeline.native_size[1]
    for option in ("height", "width"):
        pixels = getattr(args, option)
        if pixels < 8 or pixels % 8:
            raise UserError(f"--{option} {pixels}: must be a multiple of 8, such as {max(8, round(pixels / 8) * 8)}")
    if not 1 <= args.steps <= 1000:
        raise UserError(f"--steps {args.steps}: must be 1 to 1000")
    if not 0 <= args.guidance < float("inf"):
        raise UserError(f"--guidance {args.guidance}: must be a number of 0 or more (1 is off)")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: must be 0 or more, and less than 2^63")
    layers = len(pipeline.text_encoder.text_model.encoder.layers)
    if not 0 <= args.clip_skip < layers:
        raise UserError(f"--clip-skip {args.clip_skip}: must be 0 to {layers - 1}; this model has {layers} layers")


def settings(args, pipeline: Pipeline, seed: int) -> dict[str, object]:
    """What A1111 writes below a prompt; keys at their defaults are left out, as it does."""
    shown = {
        "Steps": args.steps, "Sampler": SAMPLER_NAMES[args.sampler], "CFG scale": f"{args.guidance:g}", "Seed": seed,
        "Size": f"{args.width}x{args.height}", "Model": Path(pipeline.name).name.removesuffix(".safetensors")}
    if args.clip_skip:
        shown["Clip skip"] = args.clip_skip + 1
    if args.vae:
        shown["VAE"] = Path(args.vae).name
    if loras := getattr(args, "lora", None):
        shown["LoRA"] = " ".join(Path(spec).name for spec in loras) + (" LAN" if args.lan else "")
    return shown | {"RNG": "CPU", "Prompt weights": args.prompt_weights}


def hint_at_vocabulary(prompts: list[str]) -> None:
    """Paper people know few words; others are drawn, but mean nothing to them."""
    known = words()
    unknown = sorted({word for prompt in prompts for word in re.findall(r"[a-z]+", prompt.lower())} - set(known))
    if unknown:
        print(f"paper people do not know: {', '.join(unknown[:10])}. They know: {', '.join(known)}", file=sys.stderr)


def parse_args():
    parser = cli.common_parser(__doc__)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    parser.add_argument("--prompts", metavar="FILE", help=".txt, .jsonl, .tsv, .csv, or the word parti-people")
    parser.add_argument("--category", help="with a table of prompts: keep the rows whose Category this is")
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="repeatable; weight 1 unless given")
    parser.add_argument("--lan", action="store_true", help="with --lora: keep the base model's colours (Eq. 7)")
    parser.add_argument("--num-images", type=int, default=1, help="pictures a prompt")
    parser.add_argument("--out", default="out", metavar="DIR")
    parser.add_argument("--save-latents", action="store_true", help="also the final scaled latents, float32")
    cli.add_sampling_options(parser)
    args = parser.parse_args()
    for name in ("num_images", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    args.prompt += cli.read_prompts(args.prompts, args.category) if args.prompts else []
    args.prompt = args.prompt[:args.limit]
    if not args.prompt:
        raise UserError("no prompt; give --prompt TEXT or --prompts FILE")
    if args.lan and (not args.lora or args.sampler == "ddpm"):
        raise UserError("--lan needs --lora, and a sampler that draws no noise of its own (dpm++ or ddim)")
    return args


def main() -> None:
    args = parse_args()
    device, dtype = cli.device_and_dtype(args)
    pipeline = load_pipeline(args.model, device, dtype, vae=args.vae, prediction_type=args.prediction_type)
    check_sampling_options(args, pipeline)
    load_loras(pipeline, args.lora)
    if args.model == "paper-people":
        hint_at_vocabulary(args.prompt)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    total = len(args.prompt) * args.num_images
    print(
        f"drawing {total} pictures of {args.width}x{args.height} with {pipeline.name}, {SAMPLER_NAMES[args.sampler]}, "
        f"{args.steps} steps, guidance {args.guidance:g}, on {device} in {str(dtype).removeprefix('torch.')} to {out}")

    # Each prompt is encoded once, together with the negative one (equally long), and apart from the other prompts.
    with torch.no_grad():
        contexts = [
            encode_prompts([args.negative_prompt, prompt], pipeline.tokenizer, pipeline.text_encoder,
                           args.prompt_weights, args.clip_skip) for prompt in args.prompt]       # (2, M, D) each
    queue = [(k, args.seed + k * args.num_images + i) for k in range(len(args.prompt)) for i in range(args.num_images)]
    # A batch shares one context length, M; only a1111's long prompts differ in it.
    runs = [list(run) for _, run in groupby(queue, key=lambda item: contexts[item[0]].shape[1])]
    batches = [run[i:i + args.batch_size] for run in runs for i in range(0, len(run), args.batch_size)]

    def drawn():
        """Draws batch after batch; passes on (prompt, seed, latent, picture), a picture at a time."""
        for batch in batches:
            both = torch.stack([contexts[k] for k, _ in batch], dim=1)                           # (2, B, M, D)
            latents = draw(pipeline, both[1], both[0], [seed for _, seed in batch], args.height, args.width,
                           args.steps, args.guidance, args.sampler, args.lan)
            for (k, seed), latent in zip(batch, latents, strict=True):
                yield args.prompt[k], seed, latent, to_images(decode(pipeline, latent[None]))[0]

    rows, shown, latents = [], [], []
    try:
        for n, (prompt, seed, latent, image) in enumerate(cli.progress(drawn(), total, "drawing")):
            row = {"file": f"{n:05d}.png", "prompt": prompt, "seed": seed}
            about = settings(args, pipeline, seed)
            private = {**about, "scheduler": pipeline.configs["scheduler"], "dtype": str(dtype), "model": args.model}
            write_png(out / row["file"], image, {
                "parameters": parameters(prompt, args.negative_prompt, about), "hg-dpo": json.dumps(private)})
            rows.append(row)
            latents.append(latent.cpu())
            shown += [image] if n < SHEET_PICTURES else []
    finally:                                     # after Ctrl-C, too: what is finished is listed and shown
        if rows:
            write_text(out / "images.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            columns = args.num_images if 1 < args.num_images <= 10 else min(8, total)
            captions = [f"{row['seed']}: {row['prompt']}" for row in rows[:len(shown)]]
            write_png(out / "sheet.png", sheet(shown, captions, columns))
            if args.save_latents:
                write_tensors(out / "latents.safetensors", {"latents": torch.stack(latents)})
    if len(shown) < total:
        print(f"{out / 'sheet.png'} shows the first {len(shown)} of {total}")


if __name__ == "__main__":
    cli.run(main)
