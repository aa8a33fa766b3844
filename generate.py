"""Draws pictures from prompts.

    python generate.py --prompt "a woman with red hair, blue shirt and white trousers, waving on a beach" --out out
    python generate.py --prompts paper_people/prompts_test.txt --limit 24 --lora run/lora.safetensors:0.5 --out tuned
    python generate.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts parti-people --num-images 4
    python generate.py --model majicmix.safetensors --prompts FILE.txt --height 1024 --width 704 --prompt-weights a1111

Writes OUT/00000.png ... (all pictures of the first prompt, then of the second, ...), each with its settings inside in
the form that A1111 and others read; OUT/images.jsonl; OUT/sheet.png; with --save-latents OUT/latents.safetensors.
A picture depends on its prompt, its seed and the settings alone: not on the batch, the device, or its neighbours.
Stopped and started again with the same command, it goes on; OUT/generate.json knows what the folder was begun with.
"""

import cli

# isort: split
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dataset.folder import begin, clear_unfinished, locked, noted
from model.checkpoint import Pipeline, load_pipeline
from model.errors import UserError
from model.files import digest_all, digest_of, files_read, read_tensors, write_tensors, write_text
from model.lora import load_lora, lora_disabled, merge_lora
from paper_people.draw import words
from pictures import open_picture, parameters, sheet, to_images, write_png
from sampling import encode_prompts, guided_eps, sample_ddim, sample_ddpm, sample_dpm_solver, sample_lan, timesteps

SAMPLER_NAMES = {"dpm++": "DPM++ 2M", "ddim": "DDIM", "ddpm": "DDPM"}        # as A1111 writes them
SHEET_PICTURES = 64
NOT_NOTED = ("out", "device", "batch_size", "prompt", "limit")       # in generate.json: the prompts are noted as inputs
MAY_CHANGE = ("model", "vae", "prompts", "category")                 # there: names, whose contents are inputs


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


def to_picture(pipeline: Pipeline, latent: Tensor, prompt: str, seed: int) -> Image.Image:
    """One scaled latent (4, h, w) -> its picture. Decoded alone, so that it does not depend on its batch. UserError,
    with the prompt and the seed, where there is none: a NaN would be a black picture, and judged as one."""
    pixels = decode(pipeline, latent[None])
    if not latent.isfinite().all() or not pixels.isfinite().all():
        raise UserError(
            f"seed {seed}, prompt {prompt[:80]!r}: NaN or infinite values instead of a picture; a lower --guidance, "
            "weight of a LoRA or of a word, or --dtype float32 may help")
    return to_images(pixels)[0]


def draw_pictures(
    args, pipeline: Pipeline, prompts: list[str], seeds: list[int], lan: bool = False,
) -> Iterator[tuple[Tensor, Image.Image]]:
    """One batch, as `args` says: prompts and as many seeds -> scaled latents (4, h, w) and pictures. Each prompt is
    encoded together with the negative one, equally long, and apart from the others."""
    with torch.no_grad():
        contexts = {prompt: encode_prompts(
            [args.negative_prompt, prompt], pipeline.tokenizer, pipeline.text_encoder, args.prompt_weights,
            args.clip_skip) for prompt in dict.fromkeys(prompts)}                                # (2, M, D) each
    # A batch shares one context length, M; only a1111's long prompts differ in it.
    for _, some in groupby(zip(prompts, seeds, strict=True), key=lambda one: contexts[one[0]].shape[1]):
        some = list(some)
        uncond, cond = torch.stack([contexts[prompt] for prompt, _ in some], dim=1)              # (B, M, D) each
        latents = draw(pipeline, cond, uncond, [seed for _, seed in some], args.height, args.width, args.steps,
                       args.guidance, args.sampler, lan)
        for latent, (prompt, seed) in zip(latents, some, strict=True):
            yield latent, to_picture(pipeline, latent, prompt, seed)


def load_loras(pipeline: Pipeline, specs: list[str]) -> None:
    """Adds LoRAs, each FILE or FILE:WEIGHT, to the U-Net and, where a file covers it, the text encoder."""
    for i, spec in enumerate(specs):
        path, weight = cli.split_lora(spec)
        load_lora(path, pipeline.unet, weight, f"lora{i}", pipeline.text_encoder)


def merge_loras(pipeline: Pipeline) -> None:
    """For drawing, except with LAN, which needs the base as well: a step takes a fifth less, and in half precision
    the LoRA's effect comes out as near to float32's as with the LoRA apart."""
    for part in (pipeline.unet, pipeline.text_encoder):
        merge_lora(part)


def check_sampling_options(args, pipeline: Pipeline) -> None:
    """Fills in the model's own size, and refuses what this model cannot do."""
    args.height = args.height if args.height is not None else pipeline.native_size[0]
    args.width = args.width if args.width is not None else pipeline.native_size[1]
    layers = len(pipeline.text_encoder.text_model.encoder.layers)
    if args.clip_skip >= layers:
        raise UserError(f"--clip-skip {args.clip_skip}: must be 0 to {layers - 1}; this model has {layers} layers")


def settings(args, pipeline: Pipeline, seed: int, steps: int | None = None) -> dict[str, object]:
    """What A1111 writes below a prompt; keys at their defaults are left out, as it does. `steps` are args' if None."""
    shown = drawing_settings(args) | {
        "Seed": seed, "Size": f"{args.width}x{args.height}",
        "Model": Path(pipeline.name).name.removesuffix(".safetensors")}
    if steps:
        shown["Steps"] = steps
    if args.vae:
        shown["VAE"] = Path(args.vae).name
    if loras := getattr(args, "lora", None):
        shown["LoRA"] = " ".join(Path(spec).name for spec in loras) + (" LAN" if args.lan else "")
    return shown


def drawing_settings(args) -> dict[str, object]:
    """Of these what two sides of a comparison should have in common."""
    clip_skip = {"Clip skip": args.clip_skip + 1} if args.clip_skip else {}
    return {"Steps": args.steps, "Sampler": SAMPLER_NAMES[args.sampler], "CFG scale": f"{args.guidance:g}", **clip_skip,
            "RNG": "CPU", "Prompt weights": args.prompt_weights}


def hint_at_vocabulary(prompts: list[str]) -> None:
    """Paper people know few words; others are drawn, but mean nothing to them."""
    known = words()
    unknown = sorted({word for prompt in prompts for word in re.findall(r"[a-z]+", prompt.lower())} - set(known))
    if unknown:
        print(f"paper people do not know: {', '.join(unknown[:10])}. They know: {', '.join(known)}", file=sys.stderr)


def parse_args():
    parser = cli.common_parser(__doc__)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    cli.add_prompt_options(parser, ".txt, .jsonl, .tsv, .csv, or the word parti-people")
    parser.add_argument(
        "--lora", action="append", default=[], type=cli.lora_spec, metavar="FILE[:WEIGHT]",
        help="repeatable; weight 1 unless given")
    parser.add_argument("--lan", action="store_true", help="with --lora: keep the base model's colours (Eq. 7)")
    parser.add_argument("--num-images", type=cli.whole(1), default=1, help="pictures a prompt")
    parser.add_argument("--out", default="out", metavar="DIR", help="the same command goes on with it")
    parser.add_argument("--save-latents", action="store_true", help="also the final scaled latents, float32")
    cli.add_sampling_options(parser)
    args = parser.parse_args()
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
    with files_read() as files:
        pipeline = load_pipeline(args.model, device, dtype, vae=args.vae, prediction_type=args.prediction_type)
        load_loras(pipeline, args.lora)
    if not args.lan:
        merge_loras(pipeline)
    check_sampling_options(args, pipeline)
    if args.model == "paper-people":
        hint_at_vocabulary(args.prompt)
    args.dtype = str(dtype).removeprefix("torch.")
    out, manifest = Path(args.out), Path(args.out) / "generate.json"
    options = {name: value for name, value in vars(args).items() if name not in NOT_NOTED}
    inputs = {"model": digest_all(files), "prompt": digest_of(args.prompt)}
    with locked(out):
        begin(manifest, options, inputs, MAY_CHANGE)
        noted(manifest, options, inputs)
        clear_unfinished(out)
        print(
            f"drawing {len(args.prompt) * args.num_images} pictures of {args.width}x{args.height} with "
            f"{pipeline.name}, {SAMPLER_NAMES[args.sampler]}, {args.steps} steps, guidance {args.guidance:g}, on "
            f"{device} in {args.dtype} to {out}")
        draw_all(args, pipeline, out)


def draw_all(args, pipeline: Pipeline, out: Path) -> None:
    """Draws what is not there yet, and writes the lists of what is."""
    rows = [
        {"file": f"{k * args.num_images + i:05d}.png", "prompt": prompt, "seed": args.seed + k * args.num_images + i}
        for k, prompt in enumerate(args.prompt) for i in range(args.num_images)]

    def latent_file(row: dict) -> Path:
        return out / "partial" / row["file"].replace(".png", ".safetensors")

    def is_done(row: dict) -> bool:
        kept = not args.save_latents or latent_file(row).is_file() or (out / "latents.safetensors").is_file()
        return (out / row["file"]).is_file() and kept

    # A batch is drawn anew unless all of it is there: in another batch a picture would be rounded differently.
    batches = [rows[i:i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    batches = [batch for batch in batches if not all(map(is_done, batch))]

    def drawn() -> Iterator[tuple[dict, Tensor, Image.Image]]:
        for batch in batches:
            prompts, seeds = [row["prompt"] for row in batch], [row["seed"] for row in batch]
            for row, (latent, image) in zip(batch, draw_pictures(args, pipeline, prompts, seeds, args.lan)):
                yield row, latent, image

    try:
        for row, latent, image in cli.progress(drawn(), sum(map(len, batches)), "drawing"):
            if not is_done(row):
                about = settings(args, pipeline, row["seed"])
                more = {"scheduler": pipeline.configs["scheduler"], "dtype": f"torch.{args.dtype}", "model": args.model}
                if args.save_latents:
                    write_tensors(latent_file(row), {"latents": latent})
                write_png(out / row["file"], image, {
                    "parameters": parameters(row["prompt"], args.negative_prompt, about),
                    "hg-dpo": json.dumps({**about, **more})})
    finally:                                     # after Ctrl-C, too: what is finished is listed and shown
        if done := [row for row in rows if is_done(row)]:
            write_text(out / "images.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done))
            columns = args.num_images if 1 < args.num_images <= 10 else min(8, len(rows))
            captions = [f"{row['seed']}: {row['prompt']}" for row in done[:SHEET_PICTURES]]
            shown = [open_picture(out / row["file"]) for row in done[:SHEET_PICTURES]]
            write_png(out / "sheet.png", sheet(shown, captions, columns))
    if args.save_latents and not (out / "latents.safetensors").is_file():
        latents = [read_tensors(latent_file(row))["latents"] for row in rows]
        write_tensors(out / "latents.safetensors", {"latents": torch.stack(latents)})
    shutil.rmtree(out / "partial", ignore_errors=True)
    if len(rows) > SHEET_PICTURES:
        print(f"{out / 'sheet.png'} shows the first {SHEET_PICTURES} of {len(rows)}")


if __name__ == "__main__":
    cli.run(main)
