"""The parts of the miniature checkpoint, each trained from nothing, measured as it will be stored, and pictured.

Every `make_...` may be called again after an interruption: what is finished is read from the folder of the run.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cli import progress
from model.clip import CLIP, CLIPTextEncoder, CLIPVisionEncoder
from model.files import atomic_write
from model.tokenizer import Tokenizer
from model.unet import UNet
from model.vae import VAE
from pictures import sheet, write_png
from sampling import add_noise, make_alphas_cumprod

from . import configs, data, preference, world
from .fit import fit, plain_attention
from .judge import Judge, check, judge_pictures
from .judge import make_loss as judge_loss
from .measure import Book

CAPTION_DROPOUT = 0.1


@dataclass(frozen=True)
class Recipe:
    """How much of everything. The sizes of the networks stand in configs.py."""

    pictures: int = 33_000             # the U-Net's and the VAE's
    triples: int = 12_000              # the CLIP's and the scorer's, and as many others for the judge (see data.py)
    through_vae: int = 3_000           # of the triples, how many are seen as the VAE gives them back
    tests: int = 1_000                 # held-out triples
    vae_steps: int = 3_600
    decoder_steps: int = 800
    clip_steps: int = 400
    unet_steps: int = 2_400
    pose_steps: int = 500              # of the U-Net again, with weight on the noise levels that decide the pose
    scorer_steps: int = 1_000
    judge_steps: int = 700
    samples: int = 500                 # pictures of test prompts that the judge counts
    pool_prompts: int = 60             # test prompts of which a pool of `pool` pictures each is drawn
    pool: int = 20


@dataclass(frozen=True)
class Run:
    out: Path
    recipe: Recipe
    seed: int
    book: Book

    def triples(self, name: str, count: int) -> dict[str, np.ndarray]:
        return data.drawn(self.out, name, data.triple_chunk, count, str(self.seed))


def round_half(module: nn.Module) -> nn.Module:
    """The module with the weights that the checkpoint will hold; all figures are of these."""
    return module.half().float().eval().requires_grad_(False)


def as_images(arrays: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(array) for array in arrays.reshape(-1, *arrays.shape[-3:])]


def save_array(path: Path, array: np.ndarray) -> None:
    with atomic_write(path) as part, open(part, "wb") as file:
        np.save(file, array)


# Autoencoder

def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbours, along the rows and down the columns."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def vae_loss(vae: VAE, images: np.ndarray, steps: int):
    def loss_of_step(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        # Small crops first: they show the network more edges a second than whole pictures do.
        size, batch = (32, 24) if step < 0.72 * steps else (64, 8)
        rows, (top, left) = torch.randint(len(images), (batch,)), torch.randint(64 - size + 1, (2,)).tolist()
        x = data.to_tensor(images[rows.numpy(), top:top + size, left:left + size])
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = vae.encode(x)
            y = vae.decode(mean + torch.randn_like(mean) * (logvar / 2).exp())
        mean, logvar, y = mean.float(), logvar.float(), y.float()
        mse = (y - x).pow(2).mean()
        error = (y - x).abs().mean() + mse + 0.3 * sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x)))
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        return error + 1e-3 * kl, {"mse": mse.detach(), "kl": kl.detach()}

    return loss_of_step


def decoder_loss(vae: VAE, images: np.ndarray):
    """The last decibel: the decoder alone, on whole pictures, towards the mean squared error that PSNR counts."""
    def loss_of_step(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = data.to_tensor(images[torch.randint(len(images), (8,)).numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                mean, logvar = vae.encode(x)
            y = vae.decode(mean + torch.randn_like(mean) * (logvar / 2).exp())
        mse = (y.float() - x).pow(2).mean()
        return (y.float() - x).abs().mean() + 4 * mse, {"mse": mse.detach()}

    return loss_of_step


@torch.no_grad()
def encode(vae: VAE, images: np.ndarray) -> Tensor:
    """uint8 (N, 64, 64, 3) -> the means of their latents (N, 4, 16, 16), unscaled."""
    batches = np.array_split(images, -(-len(images) // 64))
    with torch.autocast("cpu", torch.bfloat16):
        means = [vae.encode(data.to_tensor(b))[0].float() for b in progress(batches, len(batches), "encoding")]
    return torch.cat(means)


def make_vae(run: Run, images: np.ndarray, tests: np.ndarray) -> VAE:
    """images, tests uint8 (N, 64, 64, 3)."""
    torch.manual_seed(run.seed)
    steps, decoder_steps = run.recipe.vae_steps, run.recipe.decoder_steps
    vae = VAE(**configs.arguments(configs.VAE, VAE))
    seconds = fit("vae", run.out, vae, vae_loss(vae, images, steps), steps, 1.5e-3, run.seed)
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])
    seconds += fit("decoder", run.out, decoder, decoder_loss(vae, images), decoder_steps, 5e-4, run.seed)
    round_half(vae)
    if "vae" not in run.book:
        latents = encode(vae, tests)
        with torch.no_grad():
            back = torch.cat([vae.decode(z) for z in latents.split(50)])
        mse = ((back.clamp(-1, 1) - data.to_tensor(tests)) / 2).pow(2).mean()
        shown = as_images(tests[:24]) + as_images(data.to_array(back[:24]))
        write_png(run.out / "1_vae.png", sheet(shown, ["drawn"] * 24 + ["from the VAE"] * 24, 12, 128))
        run.book.write(
            "vae", seconds=seconds, steps=steps + decoder_steps, psnr=-10 * mse.log10().item(),
            scaling_factor=1 / latents.std().item(), channel_mean=latents.mean((0, 2, 3)).tolist(),
            channel_std=latents.std((0, 2, 3)).tolist())
    vae.scaling_factor = run.book.figures["vae"]["scaling_factor"]
    return vae


# CLIP and preference scorer

def text_arguments(tokenizer: Tokenizer) -> dict:
    return configs.arguments(configs.clip_config(tokenizer)["text_config"], CLIPTextEncoder)


def make_clip(
    run: Run, tokenizer: Tokenizer, triples: dict[str, np.ndarray], tests: dict[str, np.ndarray],
) -> preference.Student:
    """The CLIP, not rounded: the scorer goes on from it."""
    torch.manual_seed(run.seed)
    clip = preference.make_clip(
        text_arguments(tokenizer), configs.arguments(configs.VISION, CLIPVisionEncoder),
        configs.TEXT["projection_dim"], tokenizer)
    student = preference.Student(clip, configs.VISION["hidden_size"])
    loss = preference.make_loss(student, tokenizer, triples, 48, preference=False)
    with plain_attention():
        seconds = fit("clip", run.out, student, loss, run.recipe.clip_steps, 1e-3, run.seed)
    if "clip" not in run.book:
        rounded = round_half(copy.deepcopy(student.clip))
        tests = {key: value[:256] for key, value in tests.items()}
        pictures, captions = preference.embed(rounded, tokenizer, tests)
        nearest = (pictures[:, 0] @ captions.T).argmax(dim=1).tolist()
        found = [world.caption(data.person(tests["people"][i])) for i in nearest[:24]]
        write_png(run.out / "2_clip.png", sheet(as_images(tests["images"][:24, 0]), found, 8, 128))
        run.book.write(
            "clip", seconds=seconds, steps=run.recipe.clip_steps,
            recall=float(np.mean([i == j for i, j in enumerate(nearest)])))
    return student


def make_scorer(
    run: Run, tokenizer: Tokenizer, student: preference.Student, triples: dict[str, np.ndarray],
    tests: dict[str, np.ndarray], tests_vae: dict[str, np.ndarray],
) -> CLIP:
    loss = preference.make_loss(student, tokenizer, triples, 48, preference=True)
    with plain_attention():
        seconds = fit("scorer", run.out, student, loss, run.recipe.scorer_steps, 6e-4, run.seed + 1)
    scorer = round_half(student.clip)
    if "scorer" not in run.book:
        first = {key: value[:8] for key, value in tests_vae.items()}
        pictures, captions = preference.embed(scorer, tokenizer, first)
        scores = scorer.logit_scale.exp() * (pictures * captions[:, None]).sum(dim=2)            # (8, 3)
        names = [["right", data.FAULTS[i], data.FAULTS[j]] for i, j in zip(first["faults"], first["kinds"])]
        texts = [f"{name}: {score:.2f}" for row in zip(names, scores.tolist()) for name, score in zip(*row)]
        write_png(run.out / "4_scorer.png", sheet(as_images(first["images"]), texts, 6, 128))
        run.book.write(
            "scorer", seconds=seconds, steps=run.recipe.scorer_steps,
            pairs=preference.pair_accuracy(scorer, tokenizer, tests),
            pairs_after_vae=preference.pair_accuracy(scorer, tokenizer, tests_vae))
    return scorer


def make_text_encoder(tokenizer: Tokenizer, scorer: CLIP) -> CLIPTextEncoder:
    """The U-Net's: the scorer's text tower. Contrast alone leaves "waving" next to "cheering", because other words
    suffice to find a picture, and then the U-Net cannot tell them apart either; preference draws them apart."""
    text_encoder = CLIPTextEncoder(**text_arguments(tokenizer))
    text_encoder.text_model = scorer.text_model
    return text_encoder


# Judge

def make_judge(
    run: Run, triples: dict[str, np.ndarray], tests: dict[str, np.ndarray], tests_vae: dict[str, np.ndarray],
) -> Judge:
    torch.manual_seed(run.seed + 2)
    judge = Judge()
    loss, steps = judge_loss(judge, triples, 64), run.recipe.judge_steps
    seconds = fit("judge", run.out, judge, loss, steps, 1.5e-3, run.seed + 2)
    round_half(judge)
    if "judge" not in run.book:
        images = as_images(tests_vae["images"][:8])
        captions = [world.caption(data.person(numbers)) for numbers in tests_vae["people"][:8] for _ in range(3)]
        verdicts = judge_pictures(judge, images, captions)
        texts = [f"{v.fault or 'whole'}, {'as' if v.matches else 'not as'} the caption says" for v in verdicts]
        write_png(run.out / "5_judge.png", sheet(images, texts, 6, 128))
        run.book.write(
            "judge", seconds=seconds, steps=steps, drawn=check(judge, tests), after_vae=check(judge, tests_vae))
    return judge


# U-Net

def unet_loss(
    unet: UNet, latents: Tensor, people: np.ndarray, text_encoder: CLIPTextEncoder, tokenizer: Tokenizer, pose: bool,
):
    """latents (N, 4, 16, 16), scaled; people (N, 6) as their captions have them.

    The plain loss comes mostly from the last traces of noise, where only edges are left to decide. With `pose`, high
    noise is drawn more often, and low noise weighs less (min-SNR weights, arXiv 2303.09556, with gamma 5).
    """
    ids = tokenizer.encode([world.caption(data.person(numbers)) for numbers in people])           # (N, 77)
    empty = tokenizer.encode([""])
    alphas_cumprod = make_alphas_cumprod(configs.SCHEDULER)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rows, t = torch.randint(len(latents), (32,)), torch.rand(32)
        t = (1000 * (t.sqrt() if pose else t)).long()
        x0 = latents[rows].float()
        eps = torch.randn_like(x0)
        x_t = add_noise(x0, eps, t, alphas_cumprod)
        shown_ids = torch.where(torch.rand(32, 1) < CAPTION_DROPOUT, empty, ids[rows])                # (B, 77)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                context = text_encoder(shown_ids)
            predicted = unet(x_t, t, context)
        loss = (predicted.float() - eps).pow(2).flatten(1).mean(1)                               # (B,)
        snr = alphas_cumprod[t] / (1 - alphas_cumprod[t])
        return (loss * (5 / snr).clamp(max=1)).mean() if pose else loss.mean(), {"mse": loss.mean().detach()}

    return loss_of_step


def make_unet(
    run: Run, vae: VAE, text_encoder: CLIPTextEncoder, tokenizer: Tokenizer, training: dict[str, np.ndarray],
) -> UNet:
    torch.manual_seed(run.seed + 3)
    levels = len(configs.UNET["block_out_channels"])
    unet = UNet(**configs.arguments(configs.UNET, UNet), attention=(True,) * levels)
    path, steps = run.out / "latents.npy", run.recipe.unet_steps
    if not path.exists():
        save_array(path, vae.to_latent(encode(vae, training["images"])).half().numpy())
    latents, pose_steps = torch.from_numpy(np.load(path)), run.recipe.pose_steps
    given = training["people"], text_encoder, tokenizer
    with plain_attention():
        seconds = fit("unet", run.out, unet, unet_loss(unet, latents, *given, False), steps, 1e-3, run.seed + 3)
        loss = unet_loss(unet, latents, *given, True)
        seconds += fit("unet_pose", run.out, unet, loss, pose_steps, 7e-4, run.seed + 4)
    if "unet" not in run.book:
        log = json.loads((run.out / "unet_pose.json").read_text())["log"]
        run.book.write(
            "unet", seconds=seconds, steps=steps + pose_steps, loss=float(np.mean([e["loss"] for e in log[-20:]])))
    return round_half(unet)
