"""One training step of Diffusion-DPO at SD1.5's size, ours beside diffusers' script with peft, random weights.

    python benchmarks/train_step.py [--size 256] [--dtype bfloat16] [--device cuda] [--rounds 5] [--compile]
                                    [--gradient-checkpointing]

One pair. The peer does what diffusers' train_diffusion_dpo.py does: VAE and text encoder, policy, reference with the
adapters disabled, loss, backward, clipping, AdamW. Ours is `train.py`'s step, HG-DPO's two losses; latents and context
come ready from the dataset. Each runs in a process of its own, in turn; the ratios are medians of the rounds' ratios.
"U-Net part" is policy and reference forward, loss and backward. Memory is the process's peak (on CUDA the allocator's).
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
TIMED = ("VAE and text", "U-Net part", "optimiser")


class Clock:
    """Seconds of a step's parts; on CUDA it waits for the device at every mark."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    def start(self) -> None:
        self.seconds, self.then = dict.fromkeys(TIMED, 0.0), time.perf_counter()

    def mark(self, part: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] += now - self.then
        self.then = now


def made(make, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """In its dtype from the start: a float32 copy would be the peak of memory."""
    torch.set_default_dtype(dtype)
    module = make().to(device).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return module


def ours(args, device: torch.device, dtype: torch.dtype, clock: Clock):
    from losses import hg_dpo_loss
    from model.ldm import SD15
    from model.lora import inject_lora
    from model.unet import UNet
    from sampling import add_noise, make_alphas_cumprod
    from train import make_optimizer, predictions
    from training.memory import save_memory
    unet = made(UNet, device, dtype)
    parameters = inject_lora(unet)
    save_memory(unet, args.gradient_checkpointing, args.compile)
    optimizer = make_optimizer("adamw", parameters, lr=1e-5)
    alphas_cumprod = make_alphas_cumprod(SD15["scheduler"]).to(device)
    side = args.size // 8
    x0 = torch.randn(2, 4, side, side, device=device)
    context = torch.randn(1, 77, 768, device=device, dtype=dtype).repeat(2, 1, 1)

    def step() -> None:
        t = torch.randint(0, 1000, (1,)).to(device)
        noise = torch.randn(1, 4, side, side).to(device).repeat(2, 1, 1, 1)
        x_t = add_noise(x0, noise, t.repeat(2), alphas_cumprod)
        predicted = predictions(unet, x_t, t.repeat(2), context, reference=True, compiled=args.compile)
        loss, _ = hg_dpo_loss(**predicted, noise=noise, timesteps=t, alphas_cumprod=alphas_cumprod)
        loss.backward()
        clock.mark("U-Net part")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark("optimiser")

    return step


def peer(args, device: torch.device, dtype: torch.dtype, clock: Clock):
    import torch.nn.functional as F
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from transformers import CLIPTextConfig, CLIPTextModel

    from model.ldm import SD15

    def arguments(config: dict) -> dict:
        return {key: value for key, value in config.items() if key[0] != "_"}

    vae = made(lambda: AutoencoderKL(**arguments(SD15["vae"])), device, dtype)
    text_encoder = made(lambda: CLIPTextModel(CLIPTextConfig(**SD15["text_encoder"])), device, dtype)
    unet = made(lambda: UNet2DConditionModel(**arguments(SD15["unet"])), device, dtype)
    unet.add_adapter(LoraConfig(
        r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.compile:
        unet.compile()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pixels = torch.rand(2, 3, args.size, args.size, device=device, dtype=dtype) * 2 - 1
    ids = torch.randint(0, 49408, (1, 77), device=device)

    def step() -> None:
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            context = text_encoder(ids)[0].repeat(2, 1, 1)
        clock.mark("VAE and text")
        noise = torch.randn_like(latents[:1]).repeat(2, 1, 1, 1)
        t = torch.randint(0, 1000, (1,), device=device).repeat(2)
        x_t = scheduler.add_noise(latents, noise, t)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            eps = unet(x_t, t, context).sample
            error_w, error_l = F.mse_loss(eps.float(), noise.float(), reduction="none").mean((1, 2, 3)).chunk(2)
            unet.disable_adapters()
            with torch.no_grad():
                eps = unet(x_t, t, context).sample
                ref_w, ref_l = F.mse_loss(eps.float(), noise.float(), reduction="none").mean((1, 2, 3)).chunk(2)
            unet.enable_adapters()
            loss = -F.logsigmoid(-2500.0 * ((error_w - ref_w) - (error_l - ref_l))).mean()
        loss.backward()
        clock.mark("U-Net part")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.mark("optimiser")

    return step


def work(args, make, pipe) -> None:
    """A process: sets up, then a step for every message; answers with its parts' seconds and the peak so far."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    clock = Clock(device)
    step = make(args, device, dtype, clock)
    while pipe.recv():
        clock.start()
        step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((clock.seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else peak))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up")
    parser.add_argument("--compile", action="store_true", help="torch.compile both U-Nets")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in both")
    args = parser.parse_args()

    pipes, context = [], multiprocessing.get_context("spawn")
    for make in (ours, peer):
        here, there = context.Pipe()
        context.Process(target=work, args=(args, make, there), daemon=True).start()
        pipes.append(here)
    rounds = []
    for _ in range(args.rounds + 1):
        answers = []
        for pipe in pipes:
            pipe.send(True)
            answers.append(pipe.recv())
        rounds.append(answers)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"one pair at {args.size}x{args.size}, {args.dtype}, {machine}, torch {torch.__version__}")
    print(f"{'':14}{'ours':>9}{'peer':>9}{'ratio':>8}   (medians of {args.rounds})")
    for name, parts in (*((part, [part]) for part in TIMED), ("whole step", TIMED)):
        seconds = [[sum(values[part] for part in parts) for values, _ in answers] for answers in rounds[1:]]
        a, b = (statistics.median(column) for column in zip(*seconds))
        print(f"{name:14}{a:8.3f}s{b:8.3f}s{statistics.median(x / y for x, y in seconds):8.2f}")
    (_, a), (_, b) = rounds[-1]
    print(f"{'peak memory':14}{a / 1e9:7.2f}GB{b / 1e9:7.2f}GB{a / b:8.2f}")
    for pipe in pipes:
        pipe.send(False)


if __name__ == "__main__":
    main()
