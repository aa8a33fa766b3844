"""CLIP's text and vision towers. SD1.5 conditions on the text tower; PickScore and other scorers use both.

Equal in numbers and names to transformers' `CLIPTextModel`, `CLIPVisionModel` and `CLIPModel`. A picture or a text is
pooled as CLIP does: the class token's, or the first end token's, final state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU. Its CLIPs need it; LAION's (PickScore, HPS) were trained with the exact one."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)       # (B, h, N, D/h)
        k = self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))                     # (B, N, D)


class MLP(nn.Module):
    def __init__(self, dim: int, dim_hidden: int, act: str):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim_hidden)
        self.fc2 = nn.Linear(dim_hidden, dim)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, dim_hidden: int, act: str):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, heads)
        self.layer_norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, dim_hidden, act)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, layers: int, dim: int, heads: int, dim_hidden: int, act: str):
        super().__init__()
        self.layers = nn.ModuleList([Layer(dim, heads, dim_hidden, act) for _ in range(layers)])


class TextEmbeddings(nn.Module):
    def __init__(self, vocab_size: int, positions: int, dim: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.position_embedding = nn.Embedding(positions, dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.token_embedding(input_ids) + self.position_embedding(positions)


class TextTransformer(nn.Module):
    def __init__(self, vocab_size, positions, dim, layers, heads, dim_hidden, act):
        super().__init__()
        self.embeddings = TextEmbeddings(vocab_size, positions, dim)
        self.encoder = Encoder(layers, dim, heads, dim_hidden, act)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, input_ids: Tensor, clip_skip: int = 0) -> Tensor:
        x = self.embeddings(input_ids)                                           # (B, N, D)
        for layer in self.encoder.layers[:len(self.encoder.layers) - clip_skip]:
            x = layer(x, causal=True)                # causal is the only mask: the padding after the end is attended
        return self.final_layer_norm(x)


class CLIPTextEncoder(nn.Module):
    """The defaults are SD1.5's (ViT-L/14's text tower); arguments have the names they have in config.json."""

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
    ):
        super().__init__()
        self.text_model = TextTransformer(
            vocab_size, max_position_embeddings, hidden_size, num_hidden_layers, num_attention_heads,
            intermediate_size, hidden_act)

    def forward(self, input_ids: Tensor, clip_skip: int = 0) -> Tensor:
        """input_ids (B, N) -> context (B, N, D): every token's state, without the last `clip_skip` layers (A1111
        calls clip_skip 1 "Clip skip: 2"), after the final norm."""
        return self.text_model(input_ids, clip_skip)


class VisionEmbeddings(nn.Module):
    def __init__(self, image_size: int, patch_size: int, dim: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(dim))
        self.patch_embedding = nn.Conv2d(3, dim, patch_size, stride=patch_size, bias=False)
        self.position_embedding = nn.Embedding((image_size // patch_size) ** 2 + 1, dim)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)        # (B, N-1, D)
        class_token = self.class_embedding.expand(len(images), 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    def __init__(self, image_size, patch_size, dim, layers, heads, dim_hidden, act):
        super().__init__()
        self.embeddings = VisionEmbeddings(image_size, patch_size, dim)
        self.pre_layrnorm = nn.LayerNorm(dim)                                    # misspelt in every checkpoint
        self.encoder = Encoder(layers, dim, heads, dim_hidden, act)
        self.post_layernorm = nn.LayerNorm(dim)

    def tokens(self, images: Tensor) -> Tensor:
        x = self.pre_layrnorm(self.embeddings(images))                           # (B, N, D), the class token first
        for layer in self.encoder.layers:
            x = layer(x, causal=False)
        return x                                                                 # without the final norm

    def forward(self, images: Tensor) -> Tensor:
        return self.post_layernorm(self.tokens(images)[:, 0])                    # (B, D)


class CLIPVisionEncoder(nn.Module):
    """The defaults are ViT-L/14's; arguments have the names they have in config.json."""

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 4096,
        hidden_act: str = "quick_gelu",
    ):
        super().__init__()
        self.vision_model = VisionTransformer(
            image_size, patch_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, image_size, image_size), normalised as CLIP's -> pooled (B, D), after the final norm."""
        return self.vision_model(images)


class CLIP(nn.Module):
    """Both towers projected into one space: `text` and `vision` hold the towers' arguments, as the two parts of
    config.json do; `eos` is the id of the token whose state is a text's embedding."""

    def __init__(self, text: dict, vision: dict, projection_dim: int = 768, eos: int = 49407):
        super().__init__()
        self.eos = eos
        text_encoder, vision_encoder = CLIPTextEncoder(**text), CLIPVisionEncoder(**vision)
        self.text_model, self.vision_model = text_encoder.text_model, vision_encoder.vision_model
        d_text = self.text_model.final_layer_norm.normalized_shape[0]
        d_vision = self.vision_model.post_layernorm.normalized_shape[0]
        self.text_projection = nn.Linear(d_text, projection_dim, bias=False)
        self.visual_projection = nn.Linear(d_vision, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))                    # ln(1 / 0.07)

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, N) -> unit vectors (B, projection_dim)."""
        return self.project_text(self.text_model(input_ids), input_ids)

    def project_text(self, context: Tensor, input_ids: Tensor) -> Tensor:
        """The text tower's states (B, N, D) of input_ids (B, N) -> unit vectors (B, projection_dim)."""
        first_eos = (input_ids == self.eos).int().argmax(dim=1)
        pooled = context[torch.arange(len(context), device=context.device), first_eos]           # (B, D)
        return F.normalize(self.text_projection(pooled), dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W), normalised as CLIP's -> unit vectors (B, projection_dim)."""
        return F.normalize(self.visual_projection(self.vision_model(images)), dim=-1)
