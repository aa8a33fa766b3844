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
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dataset.folder import clear_unfinished, locked, open_manifest, write_manifest
from dataset.images import open_picture
from model.builtin import BUILT_IN, named
from model.checkpoint import Pipeline, load_pipeline
from model.errors import UserError
from model.files import digest_all, digest_of, files_read, read_tensors, write_tensors, write_text
from pictures import parameters, sheet, write_png
from sampling import SAMPLERS, Drawing, draw_pictures, picture_settings

SHEET_PICTURES = 64
NOT_NOTED = ("out", "device", "batch_size", "prompt", "limit")       # in generate.json: the prompts are noted as inputs
MAY_CHANGE = ("model", "vae", "prompts", "category")                 # there: names, whose contents are inputs


def parse_args():
    parser = cli.common_parser(__doc__)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    cli.add_prompt_options(parser, ".txt, .jsonl, .tsv, .csv, or the word parti-people")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="repeatable; weight 1 unless given")
    parser.add_argument("--lan", action="store_true", help="with --lora: keep the base model's colours (Eq. 7)")
    parser.add_argument("--num-images", type=cli.whole(1), default=1, help="pictures a prompt")
    parser.add_argument("--out", default="out", metavar="DIR", help="the same command goes on with it")
    parser.add_argument("--save-latents", action="store_true", help="also the final scaled latents, float32")
    cli.add_drawing_options(parser, SAMPLERS)
    args = parser.parse_args()
    args.prompt += cli.read_prompts(args.prompts, args.category) if args.prompts else []
    args.prompt = args.prompt[:args.limit]
    if not args.prompt:
        raise UserError("no prompt; give --prompt TEXT or --prompts FILE")
    if args.lan and (not args.lora or SAMPLERS[args.sampler].stochastic):
        raise UserError("--lan needs --lora, and a sampler that draws no noise of its own (dpm++ or ddim)")
    return args


def hint_at_vocabulary(prompts: list[str], words: list[str]) -> None:
    """A model that ships with the repository knows few words; others are drawn, but mean nothing to it."""
    unknown = sorted({word for prompt in prompts for word in re.findall(r"[a-z]+", prompt.lower())} - set(words))
    if unknown:
        print(f"the model does not know: {', '.join(unknown[:10])}. It knows: {', '.join(words)}", file=sys.stderr)


def draw_all(
    out: Path, pipeline: Pipeline, drawing: Drawing, rows: list[dict], lan: bool, batch_size: int, save_latents: bool,
    columns: int,
) -> None:
    """Draws what is not there yet of `rows`, each {file, prompt, seed}; the sheet shows `columns` pictures a prompt."""
    def latent_file(row: dict) -> Path:
        return out / "partial" / row["file"].replace(".png", ".safetensors")

    def is_done(row: dict) -> bool:
        kept = not save_latents or latent_file(row).is_file() or (out / "latents.safetensors").is_file()
        return (out / row["file"]).is_file() and kept

    # A batch is drawn again unless all of it is there: in another batch a picture would be rounded differently.
    batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    batches = [batch for batch in batches if not all(map(is_done, batch))]

    def drawn() -> Iterator[tuple[dict, Tensor, Image.Image]]:
        for batch in batches:
            prompts, seeds = [row["prompt"] for row in batch], [row["seed"] for row in batch]
            for row, (latent, image) in zip(batch, draw_pictures(pipeline, drawing, prompts, seeds, lan)):
                yield row, latent, image

    try:
        for row, latent, image in cli.progress(drawn(), sum(map(len, batches)), "drawing"):
            if not is_done(row):
                settings = picture_settings(pipeline, drawing, row["seed"], lan)
                more = {"scheduler": pipeline.configs["scheduler"], "dtype": str(pipeline.dtype),
                        "model": pipeline.name}
                if save_latents:
                    write_tensors(latent_file(row), {"latents": latent})
                write_png(out / row["file"], image, {
                    "parameters": parameters(row["prompt"], drawing.negative_prompt, settings),
                    "hg-dpo": json.dumps({**settings, **more})})
    finally:                                     # after Ctrl-C, too: what is finished is listed and shown
        if done := [row for row in rows if is_done(row)]:
            write_text(out / "images.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done))
            columns = columns if 1 < columns <= 10 else min(8, len(rows))
            captions = [f"{row['seed']}: {row['prompt']}" for row in done[:SHEET_PICTURES]]
            shown = [open_picture(out / row["file"]) for row in done[:SHEET_PICTURES]]
            write_png(out / "sheet.png", sheet(shown, captions, columns))
    if save_latents and not (out / "latents.safetensors").is_file():
        latents = [read_tensors(latent_file(row))["latents"] for row in rows]
        write_tensors(out / "latents.safetensors", {"latents": torch.stack(latents)})
    shutil.rmtree(out / "partial", ignore_errors=True)
    if len(rows) > SHEET_PICTURES:
        print(f"{out / 'sheet.png'} shows the first {SHEET_PICTURES} of {len(rows)}")


def main() -> None:
    args = parse_args()
    device, dtype = cli.device_and_dtype(args.device, args.dtype)
    with files_read() as files:
        pipeline = load_pipeline(args.model, device, dtype, args.vae, args.prediction_type)
        pipeline.add_loras(args.lora)
    if not args.lan:
        pipeline.merge_loras()
    drawing = Drawing.of(vars(args)).for_model(pipeline)
    if args.model in BUILT_IN:
        hint_at_vocabulary(args.prompt, named(BUILT_IN[args.model].vocabulary)())
    rows = [
        {"file": f"{k * args.num_images + i:05d}.png", "prompt": prompt, "seed": args.seed + k * args.num_images + i}
        for k, prompt in enumerate(args.prompt) for i in range(args.num_images)]
    out, manifest = Path(args.out), Path(args.out) / "generate.json"
    options = vars(args) | asdict(drawing) | {"dtype": str(dtype).removeprefix("torch.")}
    options = {name: value for name, value in options.items() if name not in NOT_NOTED}
    inputs = {"model": digest_all(files), "prompt": digest_of(args.prompt)}
    with locked(out):
        open_manifest(manifest, options, inputs, MAY_CHANGE)
        write_manifest(manifest, options, inputs)
        clear_unfinished(out)
        print(
            f"drawing {len(rows)} pictures of {drawing.width}x{drawing.height} with {pipeline.name}, "
            f"{SAMPLERS[drawing.sampler].label}, {drawing.steps} steps, guidance {drawing.guidance:g}, on {device} in "
            f"{options['dtype']} to {out}")
        draw_all(out, pipeline, drawing, rows, args.lan, args.batch_size, args.save_latents, args.num_images)


if __name__ == "__main__":
    cli.run(main)
