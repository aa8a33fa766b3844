"""The U-Net of Stable Diffusion 1.5: predicts the noise eps in a latent x_t, given the step t and the text.

Equal in numbers, and in every parameter name, to diffusers' `UNet2DConditionModel` with SD1.5's config. Left out on
purpose: everything another model needs (linear projections, added conditions, class labels, dropout).

Axes: B batch, C channels, H W latent height and width, N = H*W tokens, M text tokens, D width, h heads.

    conv_in          4 ->  320   88x128 latent (a 704x1024 picture)
    down_blocks.0         320   2 x (ResBlock, SpatialTransformer), Downsample
    down_blocks.1         640   2 x (ResBlock, SpatialTransformer), Downsample
    down_blocks.2        1280   2 x (ResBlock, SpatialTransformer), Downsample
    down_blocks.3        1280   2 x  ResBlock
    mid_block            1280        ResBlock, SpatialTransformer, ResBlock
    up_blocks.0          1280   3 x  ResBlock,                      Upsample
    up_blocks.1          1280   3 x (ResBlock, SpatialTransformer), Upsample
    up_blocks.2           640   3 x (ResBlock, SpatialTransformer), Upsample
    up_blocks.3           320   3 x (ResBlock, SpatialTransformer)
    conv_out       320 ->   4
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the step: t (B,) -> (B, dim) float32, the cosines first, frequencies 10000^(-i / (dim/2))."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * freqs                                          # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, dim_out)
        self.linear_2 = nn.Linear(dim_out, dim_out)

    def forward(self, emb: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(emb)))


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, c_temb: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_temb, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.out_layers(h)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))

    def in_layers(self, x: Tensor) -> Tensor:
        return self.conv1(F.silu(self.norm1(x)))                                 # (B, c_out, H, W)

    def out_layers(self, h: Tensor) -> Tensor:
        return self.conv2(F.silu(self.norm2(h)))                                 # (B, c_out, H, W)


class Attention(nn.Module):
    """Multi-head attention of x on the text, or on itself where no text is given."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])                       # a list for its name, to_out.0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)         # (B, h, N, D/h)
        k = self.to_k(context).unflatten(-1, (self.heads, -1)).transpose(1, 2)   # (B, h, M, D/h)
        v = self.to_v(context).unflatten(-1, (self.heads, -1)).transpose(1, 2)   # (B, h, M, D/h)
        out = F.scaled_dot_product_attention(q, k, v)                            # (B, h, N, D/h)
        return self.to_out[0](out.transpose(1, 2).flatten(2))                    # (B, N, D)


class GEGLU(nn.Module):
    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(self.proj(x))

    def gated(self, h: Tensor) -> Tensor:
        value, gate = h.chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        # The checkpoint counts a dropout at index 1; an Identity keeps the names net.0 and net.2.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, context_dim, heads)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x))
        tokens = h.flatten(2).transpose(1, 2)                                    # (B, N, C)
        tokens = self.transformer_blocks[0](tokens, context)
        h = tokens.transpose(1, 2).unflatten(2, x.shape[2:])                     # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        # To the size of the skip it meets next, not simply twice: an odd size was halved rounding up.
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class DownBlock(nn.Module):
    def __init__(self, c_in, c_out, c_temb, context_dim, layers, heads, groups, attention, downsample):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResBlock(c_in if i == 0 else c_out, c_out, c_temb, groups) for i in range(layers)])
        self.attentions = nn.ModuleList(
            [SpatialTransformer(c_out, context_dim, heads, groups) for _ in range(layers if attention else 0)])
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if downsample else [])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if len(self.attentions):
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)                                                    # (B, C, ceil(H/2), ceil(W/2))
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    def __init__(self, dim, c_temb, context_dim, heads, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(dim, dim, c_temb, groups), ResBlock(dim, dim, c_temb, groups)])
        self.attentions = nn.ModuleList([SpatialTransformer(dim, context_dim, heads, groups)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, temb)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, temb)


class UpBlock(nn.Module):
    def __init__(self, c_in, c_skips, c_out, c_temb, context_dim, heads, groups, attention, upsample):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResBlock((c_in if i == 0 else c_out) + c_skip, c_out, c_temb, groups) for i, c_skip in enumerate(c_skips)])
        self.attentions = nn.ModuleList(
            [SpatialTransformer(c_out, context_dim, heads, groups) for _ in range(len(c_skips) if attention else 0)])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor, size: torch.Size) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips[-1 - i]], dim=1), temb)
            if len(self.attentions):
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


class UNet(nn.Module):
    """eps = UNet()(x_t, t, context). The defaults are SD1.5's; arguments have the names they have in config.json,
    save `attention`, which says for each level, from the finest, whether its blocks hold transformers."""

    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        attention: tuple[bool, ...] = (True, True, True, False),
        layers_per_block: int = 2,
        attention_head_dim: int = 8,     # the number of heads, in spite of its name; as in the Hub's config
        cross_attention_dim: int = 768,
        norm_num_groups: int = 32,
        in_channels: int = 4,
        out_channels: int = 4,
    ):
        super().__init__()
        widths, heads, groups = block_out_channels, attention_head_dim, norm_num_groups
        c_temb, last = 4 * widths[0], len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], c_temb)

        self.down_blocks = nn.ModuleList()
        c, c_skips = widths[0], [widths[0]]
        for i, c_out in enumerate(widths):
            self.down_blocks.append(DownBlock(
                c, c_out, c_temb, cross_attention_dim, layers_per_block, heads, groups, attention[i], i < last))
            c_skips += [c_out] * (layers_per_block + (i < last))
            c = c_out
        self.mid_block = MidBlock(c, c_temb, cross_attention_dim, heads, groups)
        self.up_blocks = nn.ModuleList()
        for i, c_out in reversed(list(enumerate(widths))):
            taken = [c_skips.pop() for _ in range(layers_per_block + 1)]
            self.up_blocks.append(UpBlock(
                c, taken, c_out, c_temb, cross_attention_dim, heads, groups, attention[i], i > 0))
            c = c_out

        self.conv_norm_out = nn.GroupNorm(groups, c, eps=1e-5)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x_t (B, 4, H, W), t (B,) in 0..999, context (B, M, 768) -> eps (B, 4, H, W). Any H and W."""
        temb = self.time_embedding(timestep_embedding(t, self.conv_in.out_channels).to(x_t.dtype))
        x = self.conv_in(x_t)
        skips = [x]
        for block in self.down_blocks:
            x, block_skips = block(x, temb, context)
            skips = skips + block_skips
        x = self.mid_block(x, temb, context)
        for block in self.up_blocks:
            n = len(block.resnets)
            taken, skips = skips[-n:], skips[:-n]
            x = block(x, taken, temb, context, skips[-1].shape[2:] if skips else x.shape[2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))
