"""Single-file checkpoints in the original LDM layout, as on Civitai: their names, and what else such a file can be."""

from torch import Tensor

from .errors import UserError

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
VAE_EXTRA = ("loss.", "model_ema.")            # the training's own, in vae-ft-mse-840000-ema-pruned for one: left out

# An LDM file has no config: it is SD1.5 or it is refused. These are the official repository's, in diffusers' words.
SD15 = {
    "unet": {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
        "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
        "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3},
    "vae": {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
        "norm_num_groups": 32, "out_channels": 3, "sample_size": 512, "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * 4},
    "text_encoder": {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu",
        "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
        "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768, "vocab_size": 49408,
        "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407},
    "scheduler": {
        "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None, "clip_sample": False},
}

RESBLOCK = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str) -> str:
    """A U-Net parameter's name -> its name in an LDM file, without the prefix. SD1.5's depth: 4 levels of 2 layers."""
    match name.split("."):
        case ["conv_in", w]:
            return f"input_blocks.0.0.{w}"
        case ["time_embedding", linear, w]:
            return f"time_embed.{0 if linear == 'linear_1' else 2}.{w}"
        case ["conv_norm_out", w]:
            return f"out.0.{w}"
        case ["conv_out", w]:
            return f"out.2.{w}"
        case ["down_blocks", i, "resnets", j, layer, w]:
            return f"input_blocks.{1 + 3 * int(i) + int(j)}.0.{RESBLOCK[layer]}.{w}"
        case ["down_blocks", i, "attentions", j, *rest]:
            return f"input_blocks.{1 + 3 * int(i) + int(j)}.1.{'.'.join(rest)}"
        case ["down_blocks", i, "downsamplers", _, "conv", w]:
            return f"input_blocks.{3 + 3 * int(i)}.0.op.{w}"
        case ["mid_block", "resnets", j, layer, w]:
            return f"middle_block.{2 * int(j)}.{RESBLOCK[layer]}.{w}"
        case ["mid_block", "attentions", _, *rest]:
            return f"middle_block.1.{'.'.join(rest)}"
        case ["up_blocks", i, "resnets", j, layer, w]:
            return f"output_blocks.{3 * int(i) + int(j)}.0.{RESBLOCK[layer]}.{w}"
        case ["up_blocks", i, "attentions", j, *rest]:
            return f"output_blocks.{3 * int(i) + int(j)}.1.{'.'.join(rest)}"
        case ["up_blocks", i, "upsamplers", _, "conv", w]:
            # Behind the block's attention, where it has one: the coarsest has none.
            return f"output_blocks.{3 * int(i) + 2}.{1 if i == '0' else 2}.conv.{w}"
    raise KeyError(name)


def vae_name(name: str) -> str:
    """A VAE parameter's name -> its name in an LDM file, without the prefix. The decoder's levels count backwards."""
    match name.split("."):
        case [side, "down_blocks", i, "resnets", j, layer, w]:
            return f"{side}.down.{i}.block.{j}.{layer.replace('conv_shortcut', 'nin_shortcut')}.{w}"
        case [side, "down_blocks", i, "downsamplers", _, "conv", w]:
            return f"{side}.down.{i}.downsample.conv.{w}"
        case [side, "up_blocks", i, "resnets", j, layer, w]:
            return f"{side}.up.{3 - int(i)}.block.{j}.{layer.replace('conv_shortcut', 'nin_shortcut')}.{w}"
        case [side, "up_blocks", i, "upsamplers", _, "conv", w]:
            return f"{side}.up.{3 - int(i)}.upsample.conv.{w}"
        case [side, "mid_block", "resnets", j, layer, w]:
            return f"{side}.mid.block_{int(j) + 1}.{layer}.{w}"
        case [side, "mid_block", "attentions", _, *layer, w]:
            return f"{side}.mid.attn_1.{VAE_ATTENTION['.'.join(layer)]}.{w}"
        case [side, "conv_norm_out", w]:
            return f"{side}.norm_out.{w}"
    return name                                                # conv_in, conv_out, quant_conv, post_quant_conv


def take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def rename(tensors: dict[str, Tensor], names: list[str], ldm_name) -> dict[str, Tensor]:
    """Tensors under LDM names -> under ours, `names`. What no name of ours answers to keeps its own, and is then
    refused by the strict load; what is missing stays missing, and is refused too."""
    ours = {ldm_name(name): name for name in names}
    return {ours.get(name, name): tensor for name, tensor in tensors.items()}


def kind_of_file(shapes: dict[str, tuple[int, ...]]) -> str:
    """From names and shapes alone: 'SD1.5' when the file can be loaded as --model, 'VAE' when as --vae, else words
    for a person: what the file is, and what to do with it."""
    def has(*pieces: str) -> bool:
        return any(piece in name for name in shapes for piece in pieces)

    first = shapes.get(UNET + "input_blocks.0.0.weight")
    to_k = shapes.get(UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if has("lora_unet_", "lora_te", "lycoris_", ".lora_", "_lora.", ".lora.", "hada_", "lokr_"):
        return "a LoRA; pass it with --lora, on top of a model"
    if has("control_model.", "controlnet_cond_embedding."):
        return "a ControlNet, which is not supported"
    if has("string_to_param", "emb_params"):
        return "a textual-inversion embedding, which is not supported"
    if has("conditioner.embedders.", UNET + "label_emb."):
        return "an SDXL checkpoint; only Stable Diffusion 1.x is supported"
    if has("joint_blocks", "double_blocks", "single_transformer_blocks"):
        return "an SD3 or Flux checkpoint; only Stable Diffusion 1.x is supported"
    if first is None and shapes and all(name.startswith(
            ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", *VAE_EXTRA, VAE)) for name in shapes):
        return "VAE"
    if has("down_blocks.") and first is None:
        return "one part of a diffusers folder; pass the folder that holds model_index.json"
    if has("text_model.") and first is None:
        return "a text encoder alone; pass the folder or file that holds the whole model"
    if first is None:
        return f"no Stable Diffusion checkpoint ({len(shapes)} tensors, the first {next(iter(shapes), 'none')!r})"
    width = to_k[-1] if to_k else None
    if len(first) == 4 and first[1] != 4:
        others = {9: "an inpainting", 8: "an instruct-pix2pix", 5: "a depth", 7: "an upscaling"}
        return f"{others.get(first[1], 'another')} model ({first[1]} input channels); only text-to-image is supported"
    if width == 1024:
        return "an SD2.x checkpoint; only Stable Diffusion 1.x is supported"
    if first != (320, 4, 3, 3) or width != 768:
        return f"not shaped like SD1.5 (first convolution {first}, text width {width})"
    if not has(VAE):
        return "an SD1.5 checkpoint without a VAE"
    return "SD1.5"


def checked(path, kind: str, wanted: str) -> None:
    """Raises UserError unless the file is the kind that is wanted."""
    if kind != wanted:
        what = {"VAE": "a VAE alone; pass it with --vae", "SD1.5": "a whole SD1.5 checkpoint"}.get(kind, kind)
        raise UserError(f"{path}: {what}")
