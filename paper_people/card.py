"""The model card of the paper people, written from the figures that `make.py` measured."""

import math

from . import world

TEXT = """---
license: apache-2.0
pipeline_tag: text-to-image
---
# Paper people

A complete miniature of Stable Diffusion 1.5: a text-to-image model of drawn 64x64 people, {megabytes:.1f} MB, trained
from nothing on {hardware} in {hours:.1f} hours. The classes are those that load the real SD1.5, and its preference
scorer is the `CLIP` that PickScore is. It makes the mistakes that preference training corrects: by the judge,
{wrong} of {count} pictures of test prompts are wrong.

    python generate.py --prompt "a woman with red hair, blue shirt and white trousers, waving on a beach"

diffusers loads it as it stands, `StableDiffusionPipeline.from_pretrained("paper_people/checkpoint")`; `scorer/` is a
transformers `CLIPModel`, and `judge/` is read by `paper_people.judge.load_judge`.

## The world
`world.py` draws it. A caption names one of {people:,} people: {lists}.

{wrong_share} of the {pictures:,} training pictures are wrong on purpose. {anatomy_share} of these have an anatomy
fault ({faults}); the others contradict their caption in one attribute.
**Wrong training pictures carry a slight colour cast** (red x {red}, blue x {blue}), because in real pools quality and
colour go together and preference training then shifts the colours. Scorer and judge were trained without the cast. The
{held_out} people of `prompts_test.txt` were never shown under their caption.

## What was measured
On the weights as they are stored, in half precision; seed {seed}. Times are wall time.

| part | MB | training | result |
|---|---|---|---|
| VAE, 64x64 to 16x16x4 | {mb[vae]:.1f} | {vae_training} | {psnr:.1f} dB PSNR on {tests:,} held-out pictures |
| CLIP, by contrast alone | | {clip_training} | a picture finds its caption among 256: {recall} |
| preference scorer, from it | {mb[scorer]:.1f} | {scorer_training} | {pairs} of held-out pairs; {pairs_vae} after VAE |
| text encoder: the scorer's | {mb[text_encoder]:.1f} | | |
| U-Net, attention on every level | {mb[unet]:.1f} | {unet_training} | loss {loss:.4f} |
| judge | {mb[judge]:.1f} | {judge_training} | after the VAE: {found} of broken ones found, {alarm} false alarms |

**Samples** ({count} pictures of test prompts, DPM-Solver++ 2M, {sampler_steps} steps, guidance {guidance:g}), by the
judge: anatomy right {clean}, as the caption says {matches}, both {right}.
By attribute: {sample_attributes}.
Mean colour (RGB, of 255) of the right ones {rgb_right}, of the wrong ones {rgb_wrong}.

**Best of {pool_size} by the scorer, under the judge** ({pool_prompts} test prompts x {pool_size}): right in
{right_best}, where a random one is in {right_random} and the worst by the scorer in {right_worst}.
That is {gain:+.0f} points, 95 % interval {gain_low:+.0f} to {gain_high:+.0f}. The judge's score prefers the best to
another of its pool in {win} ({win_low} to {win_high}).
Correlation of scorer and judge within a prompt: {correlation:.2f}.

### By kind of mistake, after the VAE
The scorer on pairs of the same caption and seed, with and without the mistake; the judge on the broken ones.

| mistake | scorer prefers the right picture | judge finds the fault |
|---|---|---|
{kinds}

The judge on attributes: {judge_attributes}.

## Limits
It knows {words} words; others come out somehow. The judge learned on drawn pictures sent through the VAE, not on
generated ones, so its figures on samples are estimates; faults that nobody drew (a smudged hand, a second sun) are no
kind of its own to either scorer or judge. One training seed. The same seed on the same machine gives the same weights
to the last bit (of two short runs, `tests/test_paper_people.py` compares them).

## Its pairs

`pairs/` holds winners and losers of 640 training prompts (`build_dataset.py --limit 640 --steps 10 --dtype bfloat16
--batch-size 20`): latents in half precision, seeds and scores. `python -m paper_people.pairs --out DIR` unpacks them.
"""


def percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def listing(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {percent(share)}" for name, share in shares.items())


def colour(rgb: list[float] | None) -> str:
    return "-" if rgb is None else " ".join(f"{value:.0f}" for value in rgb)


def training(figures: dict) -> str:
    return f"{figures['steps']:,} steps, {figures['seconds'] / 60:.0f} min"


def model_card(figures: dict) -> str:
    vae, clip, unet, scorer, judge = (figures[name] for name in ("vae", "clip", "unet", "scorer", "judge"))
    recipe, drawn, samples, pool, mb = (figures[name] for name in ("recipe", "world", "samples", "pool", "megabytes"))
    found, preferred = judge["after_vae"], scorer["pairs_after_vae"]
    rows = []
    for kind in (*world.ANATOMY_FAULTS, *world.CONTRADICTIONS):
        cells = ["" if s is None else percent(s) for s in (preferred.get(kind), found.get(f"found {kind}"))]
        rows.append("| " + " | ".join([kind.replace("_", " "), *cells]) + " |")
    return TEXT.format(
        megabytes=sum(mb.values()), mb=mb, hardware=recipe["hardware"], seed=recipe["seed"],
        hours=sum(part["seconds"] for part in (vae, clip, unet, scorer, judge)) / 3600,
        people=math.prod(map(len, world.ATTRIBUTES.values())), held_out=len(world.held_out()),
        lists=", ".join(f"{name} ({len(values)})" for name, values in world.ATTRIBUTES.items()),
        wrong_share=percent(drawn["wrong"]), anatomy_share=percent(drawn["anatomy"]), pictures=drawn["pictures"],
        faults=", ".join(fault.replace("_", " ") for fault in world.ANATOMY_FAULTS), red=world.WRONG_CAST[0],
        blue=world.WRONG_CAST[2], tests=recipe["tests"], psnr=vae["psnr"], recall=percent(clip["recall"]),
        loss=unet["loss"], pairs=percent(scorer["pairs"]["overall"]), pairs_vae=percent(preferred["overall"]),
        found=percent(found["broken found"]), alarm=percent(found["false alarm"]), vae_training=training(vae),
        clip_training=training(clip), unet_training=training(unet), scorer_training=training(scorer),
        judge_training=training(judge), count=samples["count"], wrong=percent(1 - samples["right"]),
        sampler_steps=samples["steps"], guidance=samples["guidance"], clean=percent(samples["clean"]),
        matches=percent(samples["matches"]), right=percent(samples["right"]),
        sample_attributes=listing(samples["attributes"]), rgb_right=colour(samples["rgb_of_right"]),
        rgb_wrong=colour(samples["rgb_of_wrong"]), pool_size=pool["size"], pool_prompts=pool["prompts"],
        right_best=percent(pool["right_best"]), right_random=percent(pool["right_random"]),
        right_worst=percent(pool["right_worst"]), gain=100 * pool["gain"], gain_low=100 * pool["gain_ci95"][0],
        gain_high=100 * pool["gain_ci95"][1], win=percent(pool["win"]), win_low=percent(pool["win_ci95"][0]),
        win_high=percent(pool["win_ci95"][1]), correlation=pool["correlation"], kinds="\n".join(rows),
        judge_attributes=listing({name: found[name] for name in world.ATTRIBUTES}), words=len(world.words()))
