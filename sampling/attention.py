"""Cross-attention maps of a U-Net: which places of a picture look at which words. N places, M text tokens, h heads."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn


def quarter_level(unet: nn.Module) -> int:
    """The U-Net's level with attention that is nearest to a quarter of the latent's size: 2, counted from the finest,
    which is 16x16 for SD1.5 at 512x512. The last one has it in the middle block."""
    last = len(unet.down_blocks) - 1
    return min((i for i, block in enumerate(unet.down_blocks) if i == last or len(block.attentions)),
               key=lambda i: abs(i - 2))


@contextlib.contextmanager
def attention_maps(unet: nn.Module, level: int) -> Iterator[list[Tensor]]:
    """Within the block every U-Net call adds to the list the maps (B, h, N, M) of the level's layers that attend to the
    text. A map is computed from its layer's inputs once more, beside it: what the layer returns is not touched."""
    maps: list[Tensor] = []

    def listen(layer: nn.Module, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:
        q, k = (to(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2).float()   # (B, h, N or M, D/h)
                for to, x in zip((layer.to_q, layer.to_k), inputs))
        maps.append((q @ k.transpose(-1, -2) / q.shape[-1]**0.5).softmax(dim=-1))

    blocks = [unet.down_blocks[level], unet.up_blocks[-1 - level]]
    blocks += [unet.mid_block] if level == len(unet.down_blocks) - 1 else []
    layers = [transformer.transformer_blocks[0].attn2 for block in blocks for transformer in block.attentions]
    hooks = [layer.register_forward_hook(listen) for layer in layers]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
