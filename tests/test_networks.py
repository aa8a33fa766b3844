"""The networks against the libraries they replace: same names, same weights, same numbers.

Every parameter is random, norms and biases too (the libraries start many at 0 or 1, which hides mistakes); the names
come from the oracle and are loaded strictly into both. float64 must agree to 1e-9, float32 to 1e-5 of the largest
value. `python -m benchmarks.parity` prints the figures.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from model.checkpoint import mend_text_names, mend_vae_names
from model.clip import CLIP, CLIPTextEncoder, CLIPVisionEncoder
from model.unet import UNet, timestep_embedding
from model.vae import VAE


@dataclass
class Case:
    """One network, or one side of it, in both forms. `inputs` makes what both `run`s take after their network."""

    ours: Callable[[], nn.Module]
    oracle: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    run: Callable[..., Tensor]
    run_oracle: Callable[..., Tensor]
    mend: Callable[[dict], dict] = dict        # the oracle's names to ours, where a library's version changed them
    gain: tuple[str, float] = ("", 1.0)        # a weight to multiply, and by how much


# Weights and inputs

def random_weights(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A value for every parameter that keeps activations near 1. Each is a window of its own into one random block per
    fan-in, so that even the 860 M parameters of SD1.5's U-Net take a second and 0.3 GB."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    fan_in = {name: shape[1:].numel() if len(shape) > 1 else 100 for name, shape in shapes.items()}
    size = {fan: max(shapes[name].numel() for name in shapes if fan_in[name] == fan) for fan in fan_in.values()}
    # A prime length, so that no two rows of a matrix are the same.
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    blocks = {fan: noise.repeat((n + 64 * len(shapes)) // len(noise) + 1) * fan**-0.5 for fan, n in size.items()}
    weights = {}
    for i, (name, shape) in enumerate(shapes.items()):
        window = blocks[fan_in[name]][64 * i:64 * i + shape.numel()].view(shape)
        weights[name] = 1 + window if len(shape) == 1 and name.endswith("weight") else window   # norms: about 1
    return weights


def build_pair(case: Case, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Ours and the oracle with the same weights, which both share in memory."""
    with torch.device("meta"):
        ours, oracle = case.ours(), case.oracle()
    weights = random_weights(oracle, dtype)
    name, factor = case.gain
    if name:
        weights[name] = weights[name] * factor
    oracle.load_state_dict(weights, strict=True, assign=True)
    ours.load_state_dict(case.mend(weights), strict=True, assign=True)
    for name, buffer in oracle.named_buffers():                                  # position_ids, in no state dict
        parent = oracle.get_submodule(name.rpartition(".")[0])
        parent.register_buffer(name.rpartition(".")[2], torch.arange(buffer.shape[-1])[None], persistent=False)
    return ours.eval().requires_grad_(False), oracle.eval().requires_grad_(False)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def tokens(vocab_size: int, *texts: int) -> Tensor:
    """77 ids a text: `texts` words (an id below the last one), then the end token (the last id) to the end."""
    ids = torch.randint(vocab_size - 1, (len(texts), 77), generator=torch.Generator().manual_seed(0))
    return torch.where(torch.arange(77) < torch.tensor(texts)[:, None], ids, vocab_size - 1)


def to_dtype(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) if x.is_floating_point() else x for x in inputs]


def parity(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[float, float]:
    """-> the largest absolute difference, and the same relative to the largest value."""
    ours, oracle = (net.to(device) for net in build_pair(case, dtype))
    inputs = [x.to(device) for x in to_dtype(case.inputs(), dtype)]
    with torch.no_grad():
        got, wanted = case.run(ours, *inputs), case.run_oracle(oracle, *inputs)
    assert got.shape == wanted.shape and got.dtype == wanted.dtype == dtype
    largest = wanted.abs().max().item()
    assert 0.05 < largest < 1e3, f"the comparison says nothing at values of {largest}"
    error = (got - wanted).abs().max().item()
    return error, error / largest


# The networks

def unet_case(widths, attention, layers, heads, context_dim, groups, sizes, steps, full=False) -> Case:
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]
    return Case(
        lambda: UNet() if full else UNet(widths, attention, layers, heads, context_dim, groups),
        lambda: UNet2DConditionModel(
            block_out_channels=widths, down_block_types=down, up_block_types=up, layers_per_block=layers,
            attention_head_dim=heads, cross_attention_dim=context_dim, norm_num_groups=groups),
        lambda: (randn(len(steps), 4, *sizes), torch.tensor(steps), randn(len(steps), 77, context_dim)),
        lambda net, x_t, t, context: net(x_t, t, context),
        lambda net, x_t, t, context: net(x_t, t, context).sample)


def vae_case(widths, layers, groups, encode, shape, full=False) -> Case:
    def run_encode(net, images):
        return torch.cat(net.encode(images), dim=1)

    def run_oracle_encode(net, images):
        q = net.encode(images).latent_dist
        return torch.cat([q.mean, q.logvar], dim=1)

    return Case(
        lambda: VAE() if full else VAE(widths, layers, norm_num_groups=groups),
        lambda: AutoencoderKL(
            block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * len(widths), norm_num_groups=groups,
            up_block_types=["UpDecoderBlock2D"] * len(widths), layers_per_block=layers),
        lambda: (randn(*shape),),
        run_encode if encode else lambda net, z: net.decode(z),
        run_oracle_encode if encode else lambda net, z: net.decode(z).sample,
        gain=("quant_conv.weight", 60.0) if encode else ("", 1.0))               # so that logvar leaves [-30, 20]


def text_case(vocab_size, width, layers, heads, hidden, act, texts, clip_skip=0, full=False) -> Case:
    def run_oracle(net, input_ids):
        states = net(input_ids, output_hidden_states=True).hidden_states
        return getattr(net, "text_model", net).final_layer_norm(states[-1 - clip_skip])

    return Case(
        lambda: CLIPTextEncoder() if full else CLIPTextEncoder(vocab_size, width, layers, heads, hidden, 77, act),
        lambda: CLIPTextModel(CLIPTextConfig(
            vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=hidden, hidden_act=act, bos_token_id=0, eos_token_id=vocab_size - 1)),
        lambda: (tokens(vocab_size, *texts),),
        lambda net, input_ids: net(input_ids, clip_skip),
        run_oracle if clip_skip else lambda net, input_ids: net(input_ids).last_hidden_state,
        mend=mend_text_names)


def vision_case(size, patch, width, layers, heads, hidden, act, batch) -> Case:
    return Case(
        lambda: CLIPVisionEncoder(size, patch, width, layers, heads, hidden, act),
        lambda: CLIPVisionModel(CLIPVisionConfig(
            image_size=size, patch_size=patch, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=hidden, hidden_act=act)),
        lambda: (randn(batch, 3, size, size),),
        lambda net, images: net(images),
        lambda net, images: net(pixel_values=images).pooler_output,
        mend=lambda weights: {"vision_model." + name.removeprefix("vision_model."): w for name, w in weights.items()})


def clip_case(side, eos_in_config=98) -> Case:
    """Both towers, of unequal widths and depths. Configs of old CLIPs (PickScore's too) give the end token as 2."""
    text = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=72, hidden_act="gelu")
    vision = dict(text, hidden_size=48, num_hidden_layers=2, image_size=28, patch_size=7)

    def run(net, input_ids, images):
        by_text, by_image = net.embed_text(input_ids), net.embed_images(images)
        return {"text": by_text, "images": by_image, "logits": net.logit_scale.exp() * by_text @ by_image.T}[side]

    def run_oracle(net, input_ids, images):
        out = net(input_ids=input_ids, pixel_values=images)
        return {"text": out.text_embeds, "images": out.image_embeds, "logits": out.logits_per_text}[side]

    return Case(
        lambda: CLIP(dict(text, vocab_size=99), vision, projection_dim=24, eos=98),
        lambda: CLIPModel(CLIPConfig(
            text_config=dict(text, vocab_size=99, bos_token_id=0, eos_token_id=eos_in_config), vision_config=vision,
            projection_dim=24)),
        lambda: (tokens(99, 76, 0, 30, 7, 76), randn(3, 3, 28, 28)), run, run_oracle)


# Odd on purpose: three or four levels of unequal widths, attention on the last level or only in the middle, sizes that
# halve with a remainder, odd batches, another step in each row.
SMALL = {
    "U-Net": unet_case((32, 64, 96), (True, True, False), 2, 4, 24, 16, (9, 13), (0, 500, 999)),
    "U-Net, attention on the last level": unet_case(
        (24, 16, 40, 32), (False, True, False, True), 1, 2, 20, 8, (5, 7), (1, 999, 37, 640, 2)),
    "VAE encode": vae_case((16, 32, 48), 1, 8, True, (3, 3, 36, 52)),
    "VAE encode, odd pixels": vae_case((32, 16, 24, 40), 2, 4, True, (1, 3, 43, 57)),
    "VAE decode": vae_case((16, 32, 48), 1, 8, False, (3, 4, 5, 7)),
    "VAE decode, 4 levels": vae_case((32, 16, 24, 40), 2, 4, False, (1, 4, 3, 1)),
    "CLIP text": text_case(99, 32, 3, 4, 72, "quick_gelu", (76, 0, 30)),
    "CLIP text, gelu": text_case(99, 40, 2, 5, 64, "gelu", (5,)),
    "CLIP text, clip skip 1": text_case(99, 32, 3, 4, 72, "quick_gelu", (76, 0, 30), clip_skip=1),
    "CLIP text, clip skip 2": text_case(99, 32, 3, 4, 72, "quick_gelu", (76, 0, 30), clip_skip=2),
    "CLIP vision": vision_case(28, 7, 48, 3, 4, 72, "quick_gelu", 3),
    "CLIP vision, gelu": vision_case(30, 10, 32, 2, 2, 64, "gelu", 1),
    "CLIP text embeddings": clip_case("text"),
    "CLIP text embeddings, old config": clip_case("text", eos_in_config=2),
    "CLIP image embeddings": clip_case("images"),
    "CLIP logits": clip_case("logits"),
}
# The real widths and depths; small pictures, since the number of parameters does not depend on them.
FULL = {
    "U-Net": unet_case(
        (320, 640, 1280, 1280), (True, True, True, False), 2, 8, 768, 32, (9, 7), (999, 0, 421), full=True),
    "VAE encode": vae_case((128, 256, 512, 512), 2, 32, True, (1, 3, 40, 24), full=True),
    "VAE decode": vae_case((128, 256, 512, 512), 2, 32, False, (1, 4, 5, 3), full=True),
    "CLIP text": text_case(49408, 768, 12, 12, 3072, "quick_gelu", (20,), full=True),
    "CLIP vision": vision_case(56, 14, 1024, 24, 16, 4096, "quick_gelu", 1),
}
CASES = {f"{name}, {size}": case for size, cases in (("small", SMALL), ("full", FULL)) for name, case in cases.items()}
NETS = {name: SMALL[name] for name in ("U-Net", "VAE encode", "VAE decode", "CLIP text", "CLIP vision", "CLIP logits")}


# Numbers

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equal_to_the_oracle(case, dtype, record_property):
    absolute, relative = parity(case, dtype)
    record_property("absolute error", absolute)
    record_property("relative error", relative)
    print(f"absolute {absolute:.1e}, relative {relative:.1e}", end=" ")
    assert absolute < 1e-9 if dtype == torch.float64 else relative < 1e-5


def test_both_ends_of_the_clamp_of_logvar_are_reached():
    """Otherwise the parity above would hold without the clamp."""
    case = SMALL["VAE encode"]
    _, logvar = build_pair(case, torch.float64)[0].encode(*case.inputs())
    assert logvar.min() == -30 and logvar.max() == 20 and 0.1 < (logvar.abs() < 20).double().mean()


def test_timestep_embedding_has_known_values():
    """Cosines first, frequencies 10000^(-i / 160), always float32: computed by hand for t = 500."""
    emb = timestep_embedding(torch.tensor([500]), 320)[0]
    torch.testing.assert_close(
        emb[[0, 1, 160, 161]], torch.tensor([-0.883849, 0.702759, -0.467772, 0.711428]), rtol=0, atol=1e-6)


def test_latents_are_scaled_both_ways():
    """0.18215 times what the VAE makes is what the U-Net sees."""
    vae, z = VAE((8, 8), norm_num_groups=4), torch.ones(1, 4, 2, 2)
    torch.testing.assert_close(vae.to_latent(z), 0.18215 * z)
    torch.testing.assert_close(vae.from_latent(vae.to_latent(z)), z)


# Names

@pytest.mark.parametrize("part, net, mend, tensors, parameters", [
    ("unet", UNet, dict, 686, 859_520_964),
    ("vae", VAE, mend_vae_names, 248, 83_653_863),
    ("text_encoder", CLIPTextEncoder, mend_text_names, 196, 123_060_480),
], ids=["unet", "vae", "text_encoder"])
def test_the_official_files_names_and_shapes(part, net, mend, tensors, parameters):
    """What stands in the headers of SD1.5's own weight files (the VAE's old attention names, the text encoder's index
    buffer) is, once mended, exactly what the default constructors ask for."""
    manifest = json.loads((Path(__file__).parent / "data" / f"sd15_{part}_keys.json").read_text())
    published = mend({name: torch.empty(shape, device="meta") for name, shape in manifest.items()})
    with torch.device("meta"):
        wanted = net().state_dict()
    assert {name: x.shape for name, x in wanted.items()} == {name: x.shape for name, x in published.items()}
    assert len(wanted) == tensors and sum(x.numel() for x in wanted.values()) == parameters


def test_the_names_and_shapes_of_pickscores_clip():
    """ViT-H/14 with a projection of 1024, the CLIP that PickScore and HPS are."""
    text = dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, hidden_act="gelu")
    vision = dict(
        hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, hidden_act="gelu",
        image_size=224, patch_size=14)
    with torch.device("meta"):
        ours = CLIP(text, vision, projection_dim=1024).state_dict()
        oracle = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)).state_dict()
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in oracle.items()}


# Behaviour

@pytest.mark.parametrize("case", NETS.values(), ids=NETS)
def test_inputs_are_left_as_they_were(case):
    ours, _ = build_pair(case, torch.float32)
    inputs = to_dtype(case.inputs(), torch.float32)
    before = copy.deepcopy(inputs)
    case.run(ours, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


def test_every_parameter_takes_part():
    """A backward pass reaches all of them: nothing is built that the forward forgets."""
    for name, case in (("U-Net", SMALL["U-Net"]), ("CLIP", SMALL["CLIP logits"])):
        ours, _ = build_pair(case, torch.float32)
        case.run(ours.requires_grad_(True), *to_dtype(case.inputs(), torch.float32)).sum().backward()
        assert [n for n, p in ours.named_parameters() if p.grad is None] == [], name
    vae, _ = build_pair(SMALL["VAE decode"], torch.float32)
    mean, logvar = vae.requires_grad_(True).encode(torch.rand(1, 3, 12, 12))
    vae.decode(mean + logvar).sum().backward()
    assert [n for n, p in vae.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("case", [NETS["U-Net"], NETS["VAE encode"], NETS["VAE decode"]], ids=list(NETS)[:3])
def test_channels_last_changes_nothing(case):
    """The memory layout that convolutions like best on a GPU, in the weights and in the input."""
    ours, _ = build_pair(case, torch.float64)
    inputs = case.inputs()
    wanted = case.run(ours, *inputs)
    ours = ours.to(memory_format=torch.channels_last)
    inputs = [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]
    assert ours.state_dict() and (case.run(ours, *inputs) - wanted).abs().max() < 1e-9


def test_unet_compiles_as_one_graph():
    """No graph break: nothing in the forward that Python has to decide from values."""
    ours, _ = build_pair(SMALL["U-Net"], torch.float32)
    inputs = to_dtype(SMALL["U-Net"].inputs(), torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), ours(*inputs))


def test_no_forward_reads_a_value_back():
    """On the meta device there are no values: a forward that waits for the GPU (`.item()`, an `if` on a tensor) fails
    here. At full size, for the 704 x 1024 pictures of the paper."""
    with torch.device("meta"):
        eps = UNet()(torch.empty(2, 4, 128, 88), torch.empty(2, dtype=torch.long), torch.empty(2, 77, 768))
        mean, logvar = VAE().encode(torch.empty(1, 3, 1024, 704))
        images = VAE().decode(mean)
        context = CLIPTextEncoder()(torch.empty(2, 77, dtype=torch.long))
        pooled = CLIPVisionEncoder()(torch.empty(2, 3, 224, 224))
        small = CLIP(dict(vocab_size=99, hidden_size=32, num_attention_heads=4), dict(image_size=28, patch_size=7))
        embedding = small.embed_text(torch.empty(2, 77, dtype=torch.long))
    assert eps.shape == (2, 4, 128, 88) and mean.shape == logvar.shape == (1, 4, 128, 88)
    assert images.shape == (1, 3, 1024, 704)
    assert context.shape == (2, 77, 768) and pooled.shape == (2, 1024) and embedding.shape == (2, 768)
