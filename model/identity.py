"""Whether pictures show the person of other pictures: distances of faces, lower is nearer.

    distance = load_identity("arcface")
    faces = [align(picture, landmarks) for picture, landmarks in ...]            # 112 x 112
    distance(faces, concept_faces)                                               # (B,): to the concept's, on average

    arcface         1 - cosine, 0 to 2                   iResNet (arXiv 1801.07698), faces of 112 x 112
    facenet         L2 of unit vectors, 0 to 2           InceptionResnetV1 (arXiv 1503.03832), faces of 160 x 160
    paper-people    skin, hair and build, 0 to 1         whole pictures, see paper_people/identity.py
    a file, a folder, a Hub id: either of the two networks, known by the names of its tensors

What HG-DPO's tables call ArcFace and VGGFace is not stated beyond the names; these are the public networks nearest to
them, trained on WebFace4M and VGGFace2. Nothing here finds a face: `align` wants its landmarks.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .builtin import BUILT_IN, named
from .checkpoint import load_weights
from .errors import UserError
from .hub import HUB_ID, find_file
from .ldm import kind_of_file
from .open_clip import read_weights
from .preprocess import to_pixels

Distance = Callable[[Sequence[Image.Image], Sequence[Image.Image]], Tensor]

SOURCES = {                                    # on the Hub; later revisions of FaceNet's have a pickle alone
    "arcface": "minchul/cvlface_arcface_ir101_webface4m",
    "facenet": "py-feat/facenet@8dd79278b755ee24ee9922619122df8a2b80b787"}
FILES = ("model.safetensors", "facenet_20180402_114759_vggface2.pth")
# Where the landmarks of a face of 112 x 112 belong, x and y: both eyes, the nose's tip, both corners of the mouth.
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))


# ArcFace

class IBasicBlock(nn.Module):
    """A residual block that begins and ends with a norm; its second convolution has the stride."""

    def __init__(self, dim_in: int, dim: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(dim_in)
        self.conv1 = nn.Conv2d(dim_in, dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.prelu = nn.PReLU(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(dim)
        self.downsample = nn.Identity() if stride == 1 else nn.Sequential(
            nn.Conv2d(dim_in, dim, 1, stride, bias=False), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(branch)) + self.downsample(x)


IRESNET_50, IRESNET_100 = (3, 4, 14, 3), (3, 13, 30, 3)        # blocks of the four levels


class IResNet(nn.Module):
    """insightface's, under its names. Each of the four levels halves the picture."""

    def __init__(self, blocks: tuple[int, ...] = IRESNET_100):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        dims = (64, 64, 128, 256, 512)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(IBasicBlock(dim_in, dim, 2), *(IBasicBlock(dim, dim, 1) for _ in range(n - 1)))
            for dim_in, dim, n in zip(dims, dims[1:], blocks))
        self.bn2 = nn.BatchNorm2d(512)
        self.fc = nn.Linear(512 * 7 * 7, 512)
        self.features = nn.BatchNorm1d(512)

    def forward(self, faces: Tensor) -> Tensor:
        """faces (B, 3, 112, 112) in [-1, 1] -> (B, 512), of any length."""
        x = self.prelu(self.bn1(self.conv1(faces)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))                # (B, 512, 7, 7)
        return self.features(self.fc(self.bn2(x).flatten(1)))


# FaceNet

class Conv(nn.Module):
    """A convolution, a norm (its eps is TensorFlow's) and a ReLU."""

    def __init__(
        self, dim_in: int, dim: int, kernel: int | tuple[int, int], stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(dim, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """What each branch makes of the input, one after the other in the channels."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.names = [f"branch{i}" for i in range(len(branches))]                # theirs in the checkpoint
        for name, branch in zip(self.names, branches):
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(name)(x) for name in self.names], dim=1)


class Residual(Branches):
    """x + scale * (a 1x1 convolution of the branches), and a ReLU unless it is `last`."""

    def __init__(self, dim: int, dim_branches: int, scale: float, *branches: nn.Module, last: bool = False):
        super().__init__(*branches)
        self.conv2d = nn.Conv2d(dim_branches, dim, 1)
        self.scale, self.last = scale, last

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.conv2d(super().forward(x))
        return x if self.last else F.relu(x)


def block35() -> Residual:
    return Residual(
        256, 3 * 32, 0.17, Conv(256, 32, 1),
        nn.Sequential(Conv(256, 32, 1), Conv(32, 32, 3, padding=1)),
        nn.Sequential(Conv(256, 32, 1), Conv(32, 32, 3, padding=1), Conv(32, 32, 3, padding=1)))


def block17() -> Residual:
    return Residual(
        896, 2 * 128, 0.1, Conv(896, 128, 1), nn.Sequential(
            Conv(896, 128, 1), Conv(128, 128, (1, 7), padding=(0, 3)), Conv(128, 128, (7, 1), padding=(3, 0))))


def block8(scale: float = 0.2, last: bool = False) -> Residual:
    return Residual(
        1792, 2 * 192, scale, Conv(1792, 192, 1), nn.Sequential(
            Conv(1792, 192, 1), Conv(192, 192, (1, 3), padding=(0, 1)), Conv(192, 192, (3, 1), padding=(1, 0))),
        last=last)


class InceptionResnetV1(nn.Module):
    """facenet-pytorch's, under its names, without the classifier that it was trained with."""

    def __init__(self):
        super().__init__()
        self.conv2d_1a = Conv(3, 32, 3, stride=2)
        self.conv2d_2a = Conv(32, 32, 3)
        self.conv2d_2b = Conv(32, 64, 3, padding=1)
        self.conv2d_3b = Conv(64, 80, 1)
        self.conv2d_4a = Conv(80, 192, 3)
        self.conv2d_4b = Conv(192, 256, 3, stride=2)
        self.repeat_1 = nn.Sequential(*(block35() for _ in range(5)))
        self.mixed_6a = Branches(
            Conv(256, 384, 3, stride=2),
            nn.Sequential(Conv(256, 192, 1), Conv(192, 192, 3, padding=1), Conv(192, 256, 3, stride=2)),
            nn.MaxPool2d(3, stride=2))
        self.repeat_2 = nn.Sequential(*(block17() for _ in range(10)))
        self.mixed_7a = Branches(
            nn.Sequential(Conv(896, 256, 1), Conv(256, 384, 3, stride=2)),
            nn.Sequential(Conv(896, 256, 1), Conv(256, 256, 3, stride=2)),
            nn.Sequential(Conv(896, 256, 1), Conv(256, 256, 3, padding=1), Conv(256, 256, 3, stride=2)),
            nn.MaxPool2d(3, stride=2))
        self.repeat_3 = nn.Sequential(*(block8() for _ in range(5)))
        self.block8 = block8(scale=1.0, last=True)
        self.last_linear = nn.Linear(1792, 512, bias=False)
        self.last_bn = nn.BatchNorm1d(512, eps=1e-3)

    def forward(self, faces: Tensor) -> Tensor:
        """faces (B, 3, 160, 160) in [-1, 1] -> (B, 512), unit vectors."""
        x = F.max_pool2d(self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(faces))), 3, stride=2)     # (B, 64, 38, 38)
        x = self.repeat_1(self.conv2d_4b(self.conv2d_4a(self.conv2d_3b(x))))     # (B, 256, 17, 17)
        x = self.repeat_2(self.mixed_6a(x))                                      # (B, 896, 8, 8)
        x = self.block8(self.repeat_3(self.mixed_7a(x)))                         # (B, 1792, 3, 3)
        return F.normalize(self.last_bn(self.last_linear(x.mean(dim=(2, 3)))), dim=1)


# Faces

def similarity(points: np.ndarray, targets: np.ndarray) -> tuple[complex, complex]:
    """Umeyama's least squares in the plane: (a, b) such that a * point + b is nearest to the targets, with points and
    targets (N,) complex, x + iy. |a| is the scale, a's angle the rotation, b the shift; it never mirrors."""
    centred = points - points.mean()
    a = np.vdot(centred, targets - targets.mean()) / np.vdot(centred, centred)
    return a, targets.mean() - a * points.mean()


def align(image: Image.Image, landmarks: Sequence[Sequence[float]], size: int = 112) -> Image.Image:
    """The face, upright and in its place, size x size, black where the picture ends.

    `landmarks` are five points (x, y) in pixels, 0 the middle of the first one: the eyes, the nose's tip, the corners
    of the mouth, of each two the one on the picture's left first. Bilinear, as insightface cuts faces for ArcFace. For
    FaceNet (`size` 160) it is a stand-in: its faces were boxes of a detector, upright as they were. UserError where
    the landmarks are no five points.
    """
    try:
        points = np.array(landmarks, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        points = np.empty(0)
    if points.shape != (5, 2) or not (np.abs(points) < 1e6).all() or not np.ptp(points, axis=0).any():
        shown = " ".join(str(landmarks).split())
        raise UserError(f"landmarks {shown:.60}: five points (x, y) expected: eyes, nose, corners of the mouth")
    a, b = similarity(points @ (1, 1j), np.array(TEMPLATE) @ (1, 1j) * size / 112)
    y, x = np.mgrid[:size, :size]
    at = (x + 1j * y - b) / a                                  # (size, size): where each pixel lies in the picture
    grid = np.stack([(2 * at.real + 1) / image.width - 1, (2 * at.imag + 1) / image.height - 1], axis=-1)
    pixels = to_pixels(image.convert("RGB"))
    face = F.grid_sample(pixels[None], torch.from_numpy(grid).float()[None], align_corners=False)[0]
    return Image.fromarray((255 * face).round().byte().permute(1, 2, 0).numpy())


class FaceDistance:
    """distance(pictures, concept_pictures) -> (B,) float32, on the CPU: each picture's distance to the concept's, on
    average. All are faces already, `size` x `size`."""

    size: int
    half_range: float                          # the network takes (byte - 127.5) / half_range

    def __init__(self, network: nn.Module):
        self.network = network

    def of_l2(self, apart: Tensor) -> Tensor:
        """The distance, from the L2 distance of the unit vectors."""
        return apart

    @torch.no_grad()
    def embed(self, pictures: Sequence[Image.Image], what: str = "picture") -> Tensor:
        """B faces -> (B, 512) float32, on the CPU: unit vectors. `what` is what errors call one."""
        if not pictures:
            raise UserError(f"no {what} to compare; a distance wants faces, and faces of the concept")
        for i, picture in enumerate(pictures, 1):
            if picture.size != (self.size, self.size):
                raise UserError(
                    f"{what} {i} of {len(pictures)} is {picture.width}x{picture.height}, no face of {self.size}x"
                    f"{self.size}; there is no face detector here, so cut it out with model.identity.align, by its "
                    "five landmarks")
        device = next(self.network.parameters()).device
        pixels = torch.stack([255 * to_pixels(picture.convert("RGB")) for picture in pictures])
        rows = [self.network(x.to(device)).cpu() for x in ((pixels - 127.5) / self.half_range).split(32)]
        return F.normalize(torch.cat(rows), dim=1)

    def __call__(self, pictures: Sequence[Image.Image], concept_pictures: Sequence[Image.Image]) -> Tensor:
        a, b = self.embed(pictures), self.embed(concept_pictures, "concept picture")
        apart = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")   # (B, N), exactly 0 of the same
        return self.of_l2(apart).mean(dim=1)


class ArcFace(FaceDistance):
    size, half_range = 112, 127.5

    def of_l2(self, apart: Tensor) -> Tensor:
        return apart**2 / 2                                    # 1 - cosine, without its rounding near 0


class FaceNet(FaceDistance):
    size, half_range = 160, 128.0


# Loading

def load_identity(name: str | Path, device: str | torch.device = "cpu") -> Distance:
    """Any of those that this file's head lists -> distance(pictures, concept_pictures) -> (B,).

    The networks are in float32 on every device. A file is read strictly; UserError says what it is instead.
    """
    name = str(name)
    if name in BUILT_IN:
        return named(BUILT_IN[name].identity)(torch.device(device))
    source = SOURCES.get(name, name)
    if not Path(source).exists() and not HUB_ID.fullmatch(source):
        raise UserError(
            f"{name}: no such file or folder, and no Hub id (owner/name), nor one of "
            f"{', '.join([*SOURCES, *BUILT_IN])}")
    path, hub = find_file(source, *FILES), " and ".join(SOURCES.values())
    if path.suffix == ".onnx":
        raise UserError(f"{path}: an ONNX graph, which is not read here; the Hub has {hub} as safetensors")
    # ArcFace's file has it inside two wrappers, and FaceNet's has the classifier as well.
    tensors = {key.removeprefix("model.net."): tensor for key, tensor in read_weights(path).items()
               if not key.startswith("logits.")}
    if "conv2d_1a.conv.weight" in tensors:
        return FaceNet(load_weights(InceptionResnetV1, tensors, path, device, torch.float32))
    blocks = tuple(
        len({key.split(".")[1] for key in tensors if key.startswith(f"layer{level}.")}) for level in range(1, 5))
    if blocks in (IRESNET_50, IRESNET_100):
        return ArcFace(load_weights(partial(IResNet, blocks), tensors, path, device, torch.float32))
    if "input_layer.0.weight" in tensors:
        kind = "an IR network such as AdaFace's"
    elif any(blocks):
        kind = f"a ResNet of {blocks} blocks"
    else:
        kind = kind_of_file({key: tuple(tensor.shape) for key, tensor in tensors.items()}).partition(";")[0]
    raise UserError(
        f"{path}: {kind}, and no ArcFace (iResNet-50 or -100) and no FaceNet (InceptionResnetV1); the Hub has {hub}")
