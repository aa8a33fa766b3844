"""InstantBooth (arXiv 2304.03411): a person who is given by pictures, drawn without tuning. A concept encoder and
adapters beside a frozen U-Net, which stays as it is, so that a LoRA that was trained on it drops in.

    concept = load_concept("concept.safetensors", pipeline)
    person = concept.look([open_picture(path, keep_alpha=True), ...])
    draw_people(pipeline, drawing, ["a photo of a sks person on a beach"], seeds=[0], people=[person])

    CLIP's image tower, frozen -> its pooled state -> `global_proj`, the mean over the pictures -> in the text features
                                                       in place of the placeholder's
                               -> all its tokens   -> `patch_proj`, joined over the pictures -> the adapters, one in
                                                       every transformer block, between self- and cross-attention

N places, T tokens of the tower (257 for ViT-L/14), D its width, C the text features' width, P = T * pictures. No code
of the authors is public: what their paper leaves open is decided here, and docs/methods.md says where.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .builtin import BUILT_IN
from .checkpoint import load_weights
from .clip import VisionTransformer
from .errors import UserError
from .files import read_header, read_tensors, write_tensors
from .preprocess import MEAN, clip_preprocess
from .scorers import OPENAI_CLIP, SCORERS, load_clip
from .tokenizer import Tokenizer
from .unet import Attention, TransformerBlock, UNet

if TYPE_CHECKING:
    from .checkpoint import Pipeline

SD15_DIMS = (320, 320, 640, 640, *[1280] * 6, *[640] * 3, *[320] * 3)            # of the U-Net's transformer blocks
LEAST_SHARE = 0.03                             # of a picture that its person, or the face alone, must cover
GREY = tuple(round(255 * mean) for mean in MEAN)               # what CLIP sees where there is nothing


# The trained part

class GatedSelfAttention(nn.Module):
    """tanh(gamma) * S([y, patches]), of which the places of y are kept, to be added to y: GLIGEN's, with gamma 0 at the
    start, when it changes nothing."""

    def __init__(self, dim: int, patch_dim: int, heads: int):
        super().__init__()
        self.proj = nn.Linear(patch_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.attn = Attention(dim, dim, heads)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, y: Tensor, patches: Tensor) -> Tensor:
        """y (B, N, dim), patches (B, P, C) -> (B, N, dim)."""
        with torch.autocast(y.device.type, y.dtype, enabled=y.dtype.itemsize < 4):               # float32 over half
            both = self.norm(torch.cat([y, self.proj(patches)], dim=1))                          # (B, N + P, dim)
            seen = self.attn(both[:, :y.shape[1]], both)       # only the places of y ask; all are asked
        return (self.gamma.tanh() * seen).to(y.dtype)


class AdaptedBlock(TransformerBlock):
    """What a U-Net's block becomes, in place; its names and tensors stay the checkpoint's."""

    adapters: tuple[Callable[[Tensor], Tensor], ...]           # a tuple, so that they are not among its parameters

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        for adapter in self.adapters:
            x = adapter(x)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Concept(nn.Module):
    """The two linear layers and the adapters. The defaults are SD1.5's, with CLIP ViT-L/14."""

    def __init__(self, dims: Sequence[int] = SD15_DIMS, context_dim: int = 768, vision_dim: int = 1024, heads: int = 8):
        super().__init__()
        self.global_proj = nn.Linear(vision_dim, context_dim)
        self.patch_proj = nn.Linear(vision_dim, context_dim)
        self.adapters = nn.ModuleList(GatedSelfAttention(dim, context_dim, heads) for dim in dims)
        self.shown: tuple[Tensor, float] | None = None         # patches (B, P, C), and the strength

    def inject(self, unet: UNet) -> None:
        """Puts each adapter into its block of the U-Net, where it acts within `showing`."""
        for block, adapter in zip(transformer_blocks(unet), self.adapters, strict=True):
            block.__class__ = AdaptedBlock
            block.adapters = (partial(self.adapt, adapter),)

    def adapt(self, adapter: GatedSelfAttention, x: Tensor) -> Tensor:
        """Of the rows of x the last, as many as there are patches: those before are the unconditional half of guidance,
        which thus leads towards the person, too."""
        if self.shown is None:
            return x
        patches, strength = self.shown
        rest = len(x) - len(patches)
        # Added to all of x, with zeros, for a sum keeps its layout in memory, by which the next kernels round.
        return x + F.pad(strength * adapter(x[rest:], patches), (0, 0, 0, 0, rest, 0))

    @contextlib.contextmanager
    def showing(self, patches: Tensor, strength: float = 1.0) -> Iterator[None]:
        """Within the block the U-Net sees patches (B, P, C). A backward pass that computes its blocks again is to be in
        it as well."""
        self.shown = patches, strength
        try:
            yield
        finally:
            self.shown = None


def transformer_blocks(unet: UNet) -> list[TransformerBlock]:
    return [module for module in unet.modules() if isinstance(module, TransformerBlock)]


# A person

@dataclass(frozen=True)
class Person:
    """What the encoder makes of a person's pictures."""

    feature: Tensor                            # (C,), for the placeholder
    patches: Tensor                            # (P, C), for the adapters


@dataclass
class ConceptModel:
    """A concept's parts, on a pipeline's device."""

    concept: Concept
    tower: VisionTransformer
    preprocessor: dict                         # the tower's preprocessor_config.json
    clip: str                                  # where the tower is from
    placeholder: str
    strength: float = 1.0                      # of the adapters; the authors draw with 0.3

    def pixels(self, picture: Image.Image) -> Tensor:
        """A picture that was cut out -> (3, H, W), on the tower's device."""
        return clip_preprocess(picture, self.preprocessor).to(self.tower.pre_layrnorm.weight.device)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, H, W) -> features (B, C), patches (B, T, C); the gradient ends at the two linear layers."""
        with torch.no_grad():
            tokens = self.tower.tokens(pixels)                                   # (B, T, D)
            pooled = self.tower.post_layernorm(tokens[:, 0])                     # (B, D)
        return self.concept.global_proj(pooled), self.concept.patch_proj(tokens)

    @torch.no_grad()
    def look(self, pictures: Sequence[Image.Image]) -> Person:
        """One person's pictures. Where they have an alpha channel it says what of them is the person."""
        features, patches = self.encode(torch.stack([self.pixels(cut_out(picture)) for picture in pictures]))
        return Person(features.mean(dim=0), patches.flatten(0, 1))

    def places(self, prompt: str, tokenizer: Tokenizer) -> list[int]:
        """Of the placeholder among the text features of a prompt. UserError where it is not in it."""
        places = [1 + i for i in tokenizer.find(self.placeholder, prompt)]       # after the start token
        if not places:
            raise UserError(f"prompt {prompt!r:.80}: no {self.placeholder!r} among the words that are read, which is "
                            "where the concept's person is to be")
        return places

    def say(self, context: Tensor, prompt: str, feature: Tensor, tokenizer: Tokenizer) -> Tensor:
        """The prompt's text features (M, C), with the person's (C,) at the placeholder's places."""
        at = torch.zeros(len(context), 1, dtype=torch.bool, device=context.device)
        at[self.places(prompt, tokenizer)] = True
        return torch.where(at, feature.to(context.dtype), context)

    def settings(self) -> dict[str, str]:
        """What a picture that is drawn with it says of itself."""
        return {"Concept strength": f"{self.strength:g}"}

    def without_placeholder(self, prompt: str) -> str:
        """What a scorer reads in place of a prompt: "a photo of a person" for "a photo of a sks person"."""
        found = rf"(?<!\w){re.escape(self.placeholder)}(?!\w)\s*"                 # as the tokenizer, in any case
        return re.sub(found, "", prompt, flags=re.IGNORECASE).strip()

    def showing(self, patches: Tensor) -> contextlib.AbstractContextManager:
        """Within the block the U-Net sees patches (B, P, C)."""
        return self.concept.showing(patches, self.strength)


def cut_out(picture: Image.Image, where: str = "a picture of the concept") -> Image.Image:
    """The square around what the alpha channel keeps of a picture, on grey; the whole picture where there is none, or
    where it keeps all. UserError where it keeps too little to be a person."""
    if "A" not in picture.getbands() or picture.getchannel("A").getextrema()[0] == 255:
        return picture.convert("RGB")
    alpha = picture.getchannel("A").point(lambda value: 255 * (value > 127))
    share = alpha.histogram()[255] / (picture.width * picture.height)
    if share < LEAST_SHARE:
        raise UserError(f"{where}: its alpha channel keeps {share:.1%} of it; a person covers {LEAST_SHARE:.0%} or "
                        "more. Cut it nearer, or give a picture without transparency")
    left, top, right, bottom = alpha.getbbox()
    side = max(right - left, bottom - top)
    left, top = (left + right - side) // 2, (top + bottom - side) // 2
    square = Image.new("RGB", (side, side), GREY)
    square.paste(picture.convert("RGB"), (-left, -top), alpha)
    return square


# Files

def concept_for(pipeline: "Pipeline", tower: VisionTransformer) -> Concept:
    """Of the sizes that go between the two."""
    blocks = transformer_blocks(pipeline.unet)
    return Concept(
        [block.norm1.normalized_shape[0] for block in blocks], pipeline.context_width,
        tower.pre_layrnorm.normalized_shape[0], blocks[0].attn1.heads)


def load_tower(clip: str, device: torch.device) -> tuple[VisionTransformer, dict]:
    """A CLIP's image tower, in float32 and frozen, and its preprocessor's config."""
    network, _, preprocessor = load_clip(SCORERS[clip].source if clip in SCORERS else clip, device, torch.float32)
    return network.vision_model, preprocessor


def new_concept(pipeline: "Pipeline", clip: str | None = None, placeholder: str = "sks") -> ConceptModel:
    """A concept to be trained, in the pipeline's U-Net. `clip` is a folder, a Hub id, or a name of model/scorers.py; by
    default OpenAI's ViT-L/14, or the CLIP of the built-in model's scorer."""
    clip = clip or (BUILT_IN[pipeline.name].scorer if pipeline.name in BUILT_IN else OPENAI_CLIP)
    tower, preprocessor = load_tower(clip, pipeline.device)
    concept = concept_for(pipeline, tower).to(pipeline.device)
    concept.inject(pipeline.unet)
    return ConceptModel(concept, tower, preprocessor, clip, placeholder)


def save_concept(path: Path, model: ConceptModel) -> None:
    """One safetensors file with what is trained; its metadata says of which CLIP the tower is, and the placeholder."""
    write_tensors(path, model.concept.state_dict(), {"clip": model.clip, "placeholder": model.placeholder})


def load_concept(path: str | Path, pipeline: "Pipeline", strength: float = 1.0) -> ConceptModel:
    """Reads a file of `save_concept` strictly, and puts it into the pipeline's U-Net. UserError where it is none, or
    was made for another U-Net or tower."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such concept file")
    shapes, metadata = read_header(Path(path))
    if not {"clip", "placeholder"} <= metadata.keys() or "global_proj.weight" not in shapes:
        raise UserError(f"{path}: not a concept; expected a file that train_concept.py wrote")
    try:
        tower, preprocessor = load_tower(metadata["clip"], pipeline.device)
    except UserError as error:
        raise UserError(f"{path}: it was trained with the CLIP {metadata['clip']!r:.200}, which is needed to draw: "
                        f"{error}") from None
    concept = load_weights(
        lambda: concept_for(pipeline, tower), read_tensors(Path(path)), f"{path}, a concept", pipeline.device,
        torch.float32)
    concept.inject(pipeline.unet)
    return ConceptModel(concept, tower, preprocessor, metadata["clip"], metadata["placeholder"], strength)
