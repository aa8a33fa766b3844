"""Whether two pictures show the same paper person, whatever they wear and do, and wherever: by skin, hair and build.

    distance = load_distance(torch.device("cpu"))
    distance(pictures, concept_pictures)         # (B,) from 0, the same, to 1: skin, hair and build all differ
    python -m paper_people.identity              # how well it tells a person from another one, on rendered pictures

The judge says what hair and what build (a man's or a woman's) it sees. Of skin it knows nothing, for no caption names
it. So skin is read off the face, whose place the judge's pose tells; and as a tone, for a model draws tones between
the three that it saw.

By the command, on 200 people: the same person in another pose, place and clothes is nearer than another person with an
AUC of 1.0000, as rendered and through the VAE; with noise on the latents of 0.9996, and of 0.9936 where nothing but
skin differs.
"""

import cli

# isort: split
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model.builtin import BUILT_IN
from model.checkpoint import load_vae
from model.errors import UserError

from . import data, world
from .judge import Judge, load_judge

CHECKPOINT = BUILT_IN["paper-people"].checkpoint
ROWS, COLUMNS = slice(16, 22), slice(29, 36)   # of a standing person's face, wherever the renderer puts the person
SITTING_ROWS = slice(ROWS.start + world.SIT_DROP, ROWS.stop + world.SIT_DROP)
TONES = torch.linspace(0, 1, 33)               # of skin: 0 is world.SKIN's first, the lightest, 1 its last
COLOURS = F.interpolate(                       # theirs, (33, 3) of 255
    torch.tensor(world.SKIN).float().T[None], len(TONES), mode="linear", align_corners=True)[0].T
WIDTH = 16.0                                   # of 255: how far from a tone's colour a pixel still counts for it


def tone_of(x: Tensor, sitting: Tensor) -> Tensor:
    """Pictures (B, 3, 64, 64) in [-1, 1] and whether their people sit (B,) -> the skin's tone (B,), on average over
    what the pixels of the face look like. Where none looks like skin it is 0.5."""
    face = torch.where(sitting[:, None, None, None], x[:, :, SITTING_ROWS, COLUMNS], x[:, :, ROWS, COLUMNS])
    pixels = 255 * (face.flatten(2).transpose(1, 2) + 1) / 2                     # (B, 42, 3)
    votes = (-(torch.cdist(pixels, COLOURS) / WIDTH) ** 2).exp().sum(dim=1)      # (B, 33)
    weights = votes**2                         # the face's own tone counts for more than what is at its edges
    return (weights @ TONES + 0.5) / (weights.sum(dim=1) + 1)


@torch.no_grad()
def describe(judge: Judge, images: Sequence[Image.Image]) -> Tensor:
    """B pictures -> (B, 8), probabilities in three groups: dark or light skin, 4 colours of hair, 2 builds."""
    if not images:
        raise UserError("no picture to compare; a distance wants pictures, and pictures of the concept")
    pixels = np.stack([np.asarray(image.convert("RGB").resize((world.SIZE, world.SIZE))) for image in images])
    rows = []
    for x in data.to_tensor(pixels).split(64):
        logits = judge(x)
        tone = tone_of(x, logits["pose"].argmax(dim=1) == tuple(world.POSES).index("sitting"))[:, None]
        rows.append(torch.cat([tone, 1 - tone, logits["hair"].softmax(dim=1), logits["who"].softmax(dim=1)], dim=1))
    return torch.cat(rows)


def differ(a: Tensor, b: Tensor) -> Tensor:
    """Of what `describe` says of pictures, (..., 8) each -> (...,): the groups' mean total variation, so that hair
    that is another for sure is 1/3."""
    return (a - b).abs().sum(dim=-1) / 6


def load_distance(device: torch.device) -> Callable[[Sequence[Image.Image], Sequence[Image.Image]], Tensor]:
    """What model/identity.py has by the name of paper-people: given the device -> distance(pictures,
    concept_pictures) -> (B,) float32, the mean over the concept's pictures. Like the judges, it stays on the CPU."""
    judge = load_judge(CHECKPOINT / "judge")
    return lambda pictures, concept_pictures: differ(
        describe(judge, pictures)[:, None], describe(judge, concept_pictures)).mean(dim=1)


# How well it tells people apart

PARTS = {"skin": world.SKIN, "hair": tuple(world.HAIR), "build": world.WHO}      # what stays with a person


def person_at_random(rng: random.Random) -> dict:
    return {part: rng.choice(values) for part, values in PARTS.items()}


def another(person: dict, name: str, rng: random.Random) -> dict:
    """Who differs in the part of that `name` alone, or, where it names no part, in anything."""
    while (other := person_at_random(rng)) == person or name in PARTS and other[name] == person[name]:
        pass
    return {**person, name: other[name]} if name in PARTS else other


def dressed(person: dict, shown: world.Person, rng: random.Random) -> tuple[world.Person, int]:
    """The person in the clothes, the pose and the place of `shown`, and a seed for the renderer, which takes the skin
    from it, with the first number that it draws."""
    while random.Random(seed := rng.getrandbits(32)).choice(world.SKIN) != person["skin"]:
        pass
    return replace(shown, hair=person["hair"], who=person["build"]), seed


def picture_of(person: dict, shown: world.Person, rng: random.Random) -> Image.Image:
    return world.render(*dressed(person, shown, rng))


def elsewhere(shown: world.Person, rng: random.Random) -> world.Person:
    """Another pose in another place, and clothes at random."""
    while (other := world.random_person(rng)).pose == shown.pose or other.place == shown.place:
        pass
    return other


def rendered(count: int, seed: int = 0) -> dict[str, list[Image.Image]]:
    """`count` people -> a picture of each ("concept"), and for each of them five from elsewhere: of the same person,
    of another one, and of three others who differ in the part that is the key."""
    rng, images = random.Random(seed), {name: [] for name in ("concept", "same", "anything", *PARTS)}
    for _ in range(count):
        person, shown = person_at_random(rng), world.random_person(rng)
        images["concept"].append(picture_of(person, shown, rng))
        for name in ("same", "anything", *PARTS):
            who = person if name == "same" else another(person, name, rng)
            images[name].append(picture_of(who, elsewhere(shown, rng), rng))
    return images


def auc(same: Tensor, others: Tensor) -> float:
    """How often the distance (N,) of a person's two pictures is below that (M,) of two people's; ties count half."""
    return ((same[:, None] < others).double() + (same[:, None] == others).double() / 2).mean().item()


def separation(judge: Judge, images: dict[str, list[Image.Image]]) -> dict[str, float]:
    """Of what `rendered` gave: the AUC of the same person against every kind of another one."""
    described = {name: describe(judge, row) for name, row in images.items()}
    apart = {name: differ(row, described["concept"]) for name, row in described.items()}
    return {name: auc(apart["same"], apart[name]) for name in ("anything", *PARTS)}


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--count", type=cli.whole(1), default=200, help="people, each with six pictures")
    args = parser.parse_args()
    judge, (vae, _), drawn = load_judge(CHECKPOINT / "judge"), load_vae(CHECKPOINT), rendered(args.count)
    print(f"{args.count} people: how often the same one, elsewhere, is nearer than one who differs in")
    # The last as the judge was trained: a model's latents are not as clean as an encoder's.
    for label, noise in (("as rendered", None), ("through the VAE", 0.0), ("the same, with noise", 0.3)):
        images = drawn if noise is None else {
            name: [*map(Image.fromarray, data.through_vae(vae, np.stack([*map(np.asarray, row)]), name, noise))]
            for name, row in drawn.items()}
        print(f"{label:22s}" + ", ".join(f"{name} {value:.4f}" for name, value in separation(judge, images).items()))


if __name__ == "__main__":
    cli.run(main)
