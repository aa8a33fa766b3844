"""Makes the miniature checkpoint of the paper people from nothing: it draws the pictures and trains every part.

    python -m paper_people.make --out made            # about an hour on two cores; made/checkpoint is the result
    python -m paper_people.make --out try --quick     # half a minute: every stage, nothing learned

In this order: autoencoder; words, a CLIP, and from it the preference scorer, whose text tower is also the U-Net's;
U-Net; judge. Then the checkpoint is put together in half precision and measured as it is. Stopped at any moment and
started again with the same command, it goes on where it was. OUT gets a picture after each stage, figures.json, and
the model card, README.md.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import cli
from model.checkpoint import Pipeline, load_pipeline, save_pipeline
from model.clip import CLIP
from model.errors import UserError
from model.files import write_tensors, write_text
from model.scorers import load_scorer
from model.vae import VAE
from sampling import make_alphas_cumprod

from . import configs, data, preference, world
from .card import model_card
from .judge import Judge, load_judge, save_judge
from .measure import Book, measure_pool, measure_samples, show_samples
from .parts import Recipe, Run, make_clip, make_judge, make_scorer, make_text_encoder, make_unet, make_vae, save_array

QUICK = Recipe(
    pictures=260, triples=64, through_vae=16, tests=32, vae_steps=2, decoder_steps=2, clip_steps=2, unet_steps=2,
    pose_steps=2, scorer_steps=2, judge_steps=2, samples=4, pool_prompts=2, pool=3)


def seen_through_vae(run: Run, name: str, triples: dict[str, np.ndarray], vae: VAE, noise: float) -> dict:
    """The first `recipe.through_vae` of the triples, as the VAE gives them back (kept in the folder)."""
    path = run.out / f"{name}_vae.npy"
    part = {key: value[:run.recipe.through_vae] for key, value in triples.items()}
    if not path.exists():
        flat = part["images"].reshape(-1, *part["images"].shape[2:])
        save_array(path, data.through_vae(vae, flat, f"{name} through the VAE", noise))
    return {**part, "images": np.load(path).reshape(part["images"].shape)}


def make_triples(run: Run, name: str, vae: VAE) -> dict[str, np.ndarray]:
    """Triples to learn from: some as the VAE gives them back, from latents that are a little off."""
    triples = run.triples(name, run.recipe.triples)
    triples["images"][:run.recipe.through_vae] = seen_through_vae(run, name, triples, vae, noise=0.3)["images"]
    return triples


def save_checkpoint(folder: Path, pipeline: Pipeline, scorer: CLIP, judge: Judge) -> None:
    """Hub layout, half precision; scorer/ is a transformers CLIPModel folder."""
    save_pipeline(pipeline, folder, torch.float16)
    tensors = {name: weight.half() for name, weight in scorer.state_dict().items()}
    write_tensors(folder / "scorer" / "model.safetensors", tensors)
    pairs = (("config", configs.clip_config(pipeline.tokenizer)), ("preprocessor_config", configs.PREPROCESSOR))
    for name, config in pairs:
        write_text(folder / "scorer" / f"{name}.json", json.dumps(config, indent=2) + "\n")
    pipeline.tokenizer.save(folder / "scorer")
    save_judge(judge, folder / "judge")


def make(out: Path, recipe: Recipe, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, recipe, seed, Book(out / "figures.json"))
    settings = {**asdict(recipe), "seed": seed}
    hardware = f"{torch.get_num_threads()} CPU cores"
    if "recipe" not in run.book:
        run.book.write("recipe", **settings, hardware=hardware)
    if run.book.figures["recipe"] != {**settings, "hardware": run.book.figures["recipe"]["hardware"]}:
        raise UserError(f"{out}: was begun with another recipe or seed; give another --out, or the options of then")

    training = data.drawn(out, "training", data.training_chunk, recipe.pictures, str(seed))
    wrong = training["faults"] > 0
    anatomy = training["faults"][wrong] <= len(world.ANATOMY_FAULTS)
    run.book.write("world", pictures=len(wrong), wrong=float(wrong.mean()), anatomy=float(anatomy.mean()))
    tests = run.triples("tests", recipe.tests)
    vae = make_vae(run, training["images"], tests["images"][:, 0])
    tests_vae = seen_through_vae(run, "tests", tests, vae, noise=0.0)

    tokenizer = preference.make_tokenizer()
    triples = make_triples(run, "scorer_triples", vae)
    student = make_clip(run, tokenizer, triples, tests)
    scorer = make_scorer(run, tokenizer, student, triples, tests, tests_vae)
    text_encoder = make_text_encoder(tokenizer, scorer)
    unet = make_unet(run, vae, text_encoder, tokenizer, training)
    parts = {
        "unet": configs.UNET, "vae": {**configs.VAE, "scaling_factor": vae.scaling_factor},
        "scheduler": configs.SCHEDULER, "text_encoder": configs.clip_config(tokenizer)["text_config"]}
    alphas_cumprod = make_alphas_cumprod(configs.SCHEDULER)
    pipeline = Pipeline(unet, vae, text_encoder, tokenizer, alphas_cumprod, parts, "paper-people")
    show_samples(out / "3_unet.png", pipeline, min(48, recipe.samples))

    judge = make_judge(run, make_triples(run, "judge_triples", vae), tests, tests_vae)
    folder = out / "checkpoint"
    save_checkpoint(folder, pipeline, scorer, judge)

    # From here on as anyone would use it.
    pipeline, judge = load_pipeline(folder), load_judge(folder / "judge")
    if "samples" not in run.book:
        measure_samples(recipe.samples, out, run.book, pipeline, judge)
    if "pool" not in run.book:
        scorer = load_scorer(folder / "scorer")
        measure_pool(recipe.pool_prompts, recipe.pool, out, run.book, pipeline, judge, scorer)
    sizes = {path.parent.name: 0.0 for path in folder.rglob("*/*")}
    for path in folder.rglob("*/*"):
        sizes[path.parent.name] += path.stat().st_size / 1e6
    run.book.write("megabytes", **sizes)
    write_text(out / "README.md", model_card(run.book.figures))
    print(f"{folder}: {sum(sizes.values()):.1f} MB; the model card is {out / 'README.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--out", required=True, metavar="DIR", help="for all stages; the result is DIR/checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="everything follows from it")
    parser.add_argument("--quick", action="store_true", help="a few steps of every stage, to try the script")
    args = parser.parse_args()
    print(f"making the paper people in {args.out}: six trainings on {torch.get_num_threads()} threads")
    make(Path(args.out), QUICK if args.quick else Recipe(), args.seed)


if __name__ == "__main__":
    cli.run(main)
