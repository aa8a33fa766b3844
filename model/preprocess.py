"""Pictures as the scorers' networks take them: (3, H, W), normalised. Every reference does it in a way of its own, and
scores move when one takes another's:

    clip_preprocess     RGB, shortest edge resized, centre cut out        transformers' CLIP, PickScore, LAION aesthetic
    openai_preprocess   the same, but RGB last, and the cut rounded       ImageReward (and OpenAI's CLIP package)
    letterbox           longest edge resized, black bars, nothing cut     HPS v2 and v2.1

Each has a twin that takes pixels instead, (B, 3, H, W) in [0, 1] as a VAE draws them, and through which gradients flow:
clip_pixels, openai_pixels, letterbox_pixels. They resize as PIL does, kernel and all, but round nothing: a picture is
rounded to bytes, and PIL rounds again after either pass. Of pixels that are whole bytes they make the same where
nothing is resized, and in a letterbox; else they are off by 0.3/255 on average and 1.2/255 at most.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .errors import UserError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)      # OpenAI's, in all of them


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


def normalise(pixels: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]


def resize_shortest(image: Image.Image, size: int) -> Image.Image:
    """Bicubic, as PIL does it: with antialias. The long edge is cut off to whole pixels, not rounded."""
    short = min(image.size)
    if short == size:
        return image
    return image.resize(tuple(int(size * edge / short) for edge in image.size), Image.Resampling.BICUBIC)


def resize_shortest_pixels(pixels: Tensor, size: int) -> Tensor:
    """The same of pixels (B, 3, H, W). PIL resizes the width first, and cuts off what overshoots after either pass."""
    height, width = pixels.shape[-2:]
    short = min(height, width)
    if short == size:
        return pixels
    new_height, new_width = int(size * height / short), int(size * width / short)
    for shape in ((height, new_width), (new_height, new_width)):
        pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True).clamp(0, 1)
    return pixels


def cut_pixels(pixels: Tensor, left: int, top: int, width: int, height: int) -> Tensor:
    """The cut of (B, 3, H, W) that begins at `left` and `top`; black where it is wider than the picture."""
    right, bottom = left + width - pixels.shape[-1], top + height - pixels.shape[-2]
    return F.pad(pixels, (-left, right, -top, bottom))


def has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def over_white(image: Image.Image) -> Image.Image:
    """To RGB; what is transparent becomes white, as in transformers 5. Earlier ones showed the colours beneath."""
    if has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def clip_sizes(config: dict) -> tuple[int, int, int]:
    """Of a preprocessor_config.json: the shortest edge, and the cut's width and height."""
    size, crop = config.get("size", 224), config.get("crop_size", 224)
    size = size if isinstance(size, int) else size["shortest_edge"]
    return size, *((crop, crop) if isinstance(crop, int) else (crop["width"], crop["height"]))


def clip_preprocess(image: Image.Image, config: dict) -> Tensor:
    """A picture -> (3, H, W), normalised, as transformers' CLIPImageProcessor does with its preprocessor_config.json:
    to RGB, shortest edge to `size` (bicubic), centre crop, [0, 1], mean and std."""
    size, crop_width, crop_height = clip_sizes(config)
    image = resize_shortest(over_white(image), size)
    left, top = (image.width - crop_width) // 2, (image.height - crop_height) // 2
    image = image.crop((left, top, left + crop_width, top + crop_height))
    return normalise(to_pixels(image), config.get("image_mean", MEAN), config.get("image_std", STD))


def clip_pixels(pixels: Tensor, config: dict) -> Tensor:
    """`clip_preprocess` of pixels (B, 3, H, W) in [0, 1]."""
    size, width, height = clip_sizes(config)
    pixels = resize_shortest_pixels(pixels, size)
    left, top = (pixels.shape[-1] - width) // 2, (pixels.shape[-2] - height) // 2
    pixels = cut_pixels(pixels, left, top, width, height)
    return normalise(pixels, config.get("image_mean", MEAN), config.get("image_std", STD))


def openai_preprocess(image: Image.Image, size: int = 224) -> Tensor:
    """A picture -> (3, size, size), normalised. It is resized in its own mode, a palette's with the nearest pixel, and
    made RGB at the end; the corner of the cut is rounded to even, a pixel off from `clip_preprocess` at times."""
    image = resize_shortest(image, size)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return normalise(to_pixels(image.crop((left, top, left + size, top + size)).convert("RGB")))


def openai_pixels(pixels: Tensor, size: int = 224) -> Tensor:
    """`openai_preprocess` of pixels (B, 3, H, W) in [0, 1]."""
    pixels = resize_shortest_pixels(pixels, size)
    left, top = round((pixels.shape[-1] - size) / 2), round((pixels.shape[-2] - size) / 2)
    return normalise(cut_pixels(pixels, left, top, size, size))


def letterbox(image: Image.Image, size: int = 224, antialias: bool = False) -> Tensor:
    """A picture -> (3, size, size), normalised: resized as a float tensor, so that bicubic may overshoot [0, 1], with
    bars that are black before mean and std.

    `antialias` off is what torchvision gave when HPS was trained and published; it is on in torchvision from 0.17.
    The reference leaves a picture whose longest edge is `size` already without its bars, which then breaks its model;
    here it gets them.
    """
    return letterbox_pixels(to_pixels(image.convert("RGB"))[None], size, antialias)[0]


def letterbox_pixels(pixels: Tensor, size: int = 224, antialias: bool = False) -> Tensor:
    """`letterbox` of pixels (B, 3, H, W) in [0, 1]: itself. Without `antialias` a picture that shrinks to less than a
    quarter has pixels that are not looked at, and that get no gradient."""
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=antialias)
    return normalise(cut_pixels(pixels, -((size - width) // 2), -((size - height) // 2), size, size))


def to_batch(
    preprocess: Callable[[Image.Image], Tensor], images: Sequence[Image.Image], prompts: Sequence[str], like: Tensor,
) -> Tensor:
    """B pictures, of which each must have its prompt -> (B, 3, H, W) with the device and dtype of `like`."""
    check_prompts(len(images), prompts)
    return torch.stack([preprocess(image) for image in images]).to(like.device, like.dtype)


def check_prompts(pictures: int, prompts: Sequence[str]) -> None:
    if pictures != len(prompts):
        raise UserError(f"{pictures} pictures and {len(prompts)} prompts; a scorer wants one prompt a picture")


class NetworkScorer(ABC):
    """A scorer of pictures, and of pixels with a gradient. Each kind says how its network takes both, and scores."""

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """B pictures of any size and their B prompts -> (B,) float32, on the CPU."""
        return self.score(to_batch(self.prepare, images, prompts, self.like()), prompts).float().cpu()

    def reward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1], and their B prompts -> (B,) float32 on the network's device, with a gradient
        to the pixels: the score of the picture, but for what rounding changes in it (see the head of this file)."""
        check_prompts(len(pixels), prompts)
        like = self.like()
        return self.score(self.prepare_pixels(pixels).to(like.device, like.dtype), prompts).float()

    @abstractmethod
    def like(self) -> Tensor:
        """A tensor with the device and dtype of the network."""

    @abstractmethod
    def prepare(self, image: Image.Image) -> Tensor:
        """A picture of any size -> (3, H, W), normalised."""

    @abstractmethod
    def prepare_pixels(self, pixels: Tensor) -> Tensor:
        """The same of pixels (B, 3, H, W) in [0, 1], with a gradient."""

    @abstractmethod
    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """What was prepared, (B, 3, H, W), and B prompts -> (B,)."""
