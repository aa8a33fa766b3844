"""A training step of Diffusion-DPO at SD1.5's size, ours beside diffusers' script with peft, random weights.

    python benchmarks/train_step.py [--size 256] [--pairs 1] [--dtype bfloat16] [--device cuda] [--rounds 5]
                                    [--sides ours,peer,ours-compiled,peer-compiled] [--gradient-checkpointing]

The peer does what diffusers' train_diffusion_dpo.py does: VAE and text encoder, policy, reference with the adapters
disabled, loss, backward, clipping, AdamW. Ours is `train.py`'s step, HG-DPO's two losses; latents and context come
ready from the dataset. Each runs in a process of its own, in turn; the ratios are medians of the rounds' ratios.
"U-Net part" is policy and reference forward, loss and backward. Memory is the process's peak (on CUDA the allocator's).
The rate counts the operations of the U-Net part; its share is of a large matrix product's rate.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.shared import machine, matrix_rate, options, ratios  # noqa: E402

SIDES = ("ours", "peer", "ours-compiled", "peer-compiled")
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


def ours(args, compiled: bool, device: torch.device, dtype: torch.dtype, clock: Clock):
    from losses import hg_dpo_loss
    from model.ldm import SD15
    from model.lora import inject_lora
    from model.unet import UNet
    from sampling import add_noise, make_alphas_cumprod, onto
    from train import make_optimizer, predictions
    from training.memory import save_memory
    unet = made(UNet, device, dtype)
    parameters = inject_lora(unet)
    save_memory(unet, args.gradient_checkpointing, compiled)
    optimizer = make_optimizer("adamw", parameters, lr=1e-5)
    alphas_cumprod = make_alphas_cumprod(SD15["scheduler"]).to(device)
    n, latent = args.pairs, (4, args.size[0] // 8, args.size[1] // 8)
    x0 = torch.randn(2 * n, *latent, device=device)
    context = torch.randn(n, 77, 768, device=device, dtype=dtype).repeat(2, 1, 1)

    def step() -> None:
        t = onto(device, torch.randint(0, 1000, (n,)))
        noise = onto(device, torch.randn(n, *latent)).repeat(2, 1, 1, 1)
        x_t = add_noise(x0, noise, t.repeat(2), alphas_cumprod)
        predicted = predictions(unet, x_t, t.repeat(2), context, reference=True, compiled=compiled)
        loss, _ = hg_dpo_loss(**predicted, noise=noise, timesteps=t, alphas_cumprod=alphas_cumprod)
        loss.backward()
        clock.mark("U-Net part")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark("optimiser")

    return step


def peer(args, compiled: bool, device: torch.device, dtype: torch.dtype, clock: Clock):
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
    if compiled:
        unet.compile()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    n = args.pairs
    pixels = torch.rand(2 * n, 3, *args.size, device=device, dtype=dtype) * 2 - 1
    ids = torch.randint(0, 49408, (n, 77), device=device)

    def step() -> None:
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            context = text_encoder(ids)[0].repeat(2, 1, 1)
        clock.mark("VAE and text")
        noise = torch.randn_like(latents[:n]).repeat(2, 1, 1, 1)
        t = torch.randint(0, 1000, (n,), device=device).repeat(2)
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


def work(args, side: str, pipe) -> None:
    """A process: sets up, then a step for every message; answers with its parts' seconds and the peak so far."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    clock, make = Clock(device), ours if side.startswith("ours") else peer
    step = make(args, side.endswith("compiled"), device, dtype, clock)
    while pipe.recv():
        clock.start()
        step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((clock.seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else peak))


def main() -> None:
    from benchmarks.cost import count  # here: what the two processes measure should have none of it
    from benchmarks.results.page import markdown
    parser = options(__doc__, SIDES)
    parser.add_argument("--pairs", type=int, default=1, help="a step")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in all")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    pipes, context = {}, multiprocessing.get_context("spawn")
    for side in args.sides:
        pipes[side], there = context.Pipe()
        context.Process(target=work, args=(args, side, there), daemon=True).start()
    answers = {side: [] for side in pipes}
    for _ in range(args.rounds + 1):
        for side, pipe in pipes.items():
            pipe.send(True)
            answers[side].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)

    def seconds(parts: tuple[str, ...]) -> dict[str, list[float]]:
        return {side: [sum(one[part] for part in parts) for one, _ in found[1:]] for side, found in answers.items()}

    height, width = args.size
    work_done, peak = args.pairs * count(height, width)["pair"], matrix_rate(device, dtype)
    print(f"{args.pairs} pairs of {width}x{height}, {args.dtype}, {machine(device)}; a matrix product does {peak:.2f} "
          f"TFLOP/s; ratios are medians of {args.rounds}\n")
    unet, whole, lines = seconds(("U-Net part",)), seconds(TIMED), []
    head = ["", "U-Net part", "ratio", "whole step", "ratio", "peak memory", "pairs/s", "share"]
    for side in answers:
        a, b, memory = statistics.median(unet[side]), statistics.median(whole[side]), answers[side][-1][1]
        lines.append([
            side, f"{a:.3f} s", f"{ratios(unet)[side]:.2f}", f"{b:.3f} s", f"{ratios(whole)[side]:.2f}",
            f"{memory / 1e9:.2f} GB", f"{args.pairs / b:.2f}", f"{100 * work_done / a / peak:.0f} %"])
    print(markdown(head, lines), end="")


if __name__ == "__main__":
    main()
