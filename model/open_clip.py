"""Scorers as their authors publish them: pickles of plain tensors, and CLIPs under open_clip's (and OpenAI's) names, as
HPS has them, to ours, which are transformers'.
"""

from pathlib import Path

from torch import Tensor

from .files import read_pickle, read_tensors
from .hub import PICKLES

BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2"}
OTHERS = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight"}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, a pickle too (see `read_pickle`)."""
    return read_pickle(path) if path.suffix in PICKLES else read_tensors(path)


def from_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under open_clip's names -> under ours. In a block q, k and v are one matrix; the two projections are
    stored [in, out]. What has another name keeps it: our own pass, and others are refused by the strict load."""
    for prefix in ("module.", "model."):                       # of a model saved inside DDP, or inside a wrapper
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    ours = {}
    for name, tensor in tensors.items():
        match name.removeprefix("visual.").split("."):
            case ["transformer", "resblocks", n, *rest]:
                tower = "vision_model" if name.startswith("visual.") else "text_model"
                layer, part = f"{tower}.encoder.layers.{n}", ".".join(rest)
                if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
                    for letter, third in zip("qkv", tensor.chunk(3)):
                        ours[f"{layer}.self_attn.{letter}_proj.{part.removeprefix('attn.in_proj_')}"] = third
                else:
                    head, _, w = part.rpartition(".")
                    ours[f"{layer}.{BLOCK.get(head, head)}.{w}"] = tensor
            case ["proj" | "text_projection"]:
                ours[OTHERS[name]] = tensor.T.contiguous()
            case _:
                ours[OTHERS.get(name, name)] = tensor
    return ours
