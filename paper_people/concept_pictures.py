"""Pictures for train_concept.py and for what comes after it: paper people in the captions of a concept.

    python -m paper_people.concept_pictures --out people              # people/train, people/test, people/validation

An identity is what a picture shows of a person and the caption does not say: skin, hair and build. The captions have
the placeholder at the place of who it is and of the hair, the only words that the model would not miss otherwise:
"a x with x hair, blue shirt and white trousers, waving on a beach".
train/ has the pictures that the model was trained on, wrong ones among them, each with the mask of its head.
test/ and validation/ have prompts of the lists of these names, in subjects.jsonl, each with pictures of a person, cut
out, in other clothes, another pose and another place, and the caption that the judges read.
"""

import cli

# isort: split
import json
import random
from dataclasses import replace
from functools import reduce
from pathlib import Path

from PIL import Image, ImageChops

from model.files import write_text
from pictures import write_png

from . import world
from .identity import dressed, elsewhere

CONCEPT = Path(__file__).with_name("concept.safetensors")        # trained on train/; docs/methods.md has the command
PLACEHOLDER = "x"
PLACES = ("beach", "city", "room")             # of which no two have a colour in common at one spot
HEAD = 18, 28                                  # where its square begins, and its side


def concept_caption(person: world.Person) -> str:
    who = f"a {person.who} with {person.hair} hair"
    return world.caption(person).replace(who, f"a {PLACEHOLDER} with {PLACEHOLDER} hair")


def mask_of(person: world.Person, seed: int, fault: str | None = None) -> Image.Image:
    """White where the rendered picture shows its person, where it stays the same in front of other places; of that the
    head, or what is in its place. The clothes are the caption's, and CLIP's tower sees skin better from near."""
    first, *others = (world.render(replace(person, place=place), seed, fault) for place in PLACES)
    bands = (band for other in others for band in ImageChops.difference(first, other).split())
    shown = reduce(ImageChops.lighter, bands).point(lambda value: 255 * (value < 8))
    top, head = shown.getbbox()[1], Image.new("L", shown.size)
    head.paste(255, (HEAD[0], top, HEAD[0] + HEAD[1], top + HEAD[1]))
    return ImageChops.multiply(shown, head)


def write_lines(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_training(out: Path, count: int) -> None:
    rng, rows = random.Random("people to train on"), []
    for i in cli.progress(range(count), count, "drawing"):
        example = world.example(rng)
        fault = example.fault if example.fault in world.ANATOMY_FAULTS else None
        write_png(out / f"{i:05d}.png", example.image)
        write_png(out / "masks" / f"{i:05d}.png", mask_of(example.drawn, example.seed, fault))
        rows.append({"file_name": f"{i:05d}.png", "text": concept_caption(example.described),
                     "mask": f"masks/{i:05d}.png"})
    write_lines(out / "metadata.jsonl", rows)


def cut_person(person: dict, shown: world.Person, rng: random.Random) -> Image.Image:
    """A picture of the person (see identity.py) in other clothes, another pose and another place than `shown`, with
    the mask for its alpha channel."""
    drawn, seed = dressed(person, elsewhere(shown, rng), rng)
    picture = world.render(drawn, seed)
    picture.putalpha(mask_of(drawn, seed))
    return picture


def write_subjects(out: Path, name: str, count: int, pictures: int) -> None:
    rng, rows = random.Random(f"people of {name}"), []
    captions = world.PROMPT_FILES[name].read_text().splitlines()[:count]
    for i, caption in enumerate(cli.progress(captions, len(captions), f"people of {name}")):
        shown = world.parse_caption(caption)
        person = {"skin": rng.choice(world.SKIN), "hair": shown.hair, "build": shown.who}
        names = [f"{i:03d}-{k}.png" for k in range(pictures)]
        for file in names:
            write_png(out / file, cut_person(person, shown, rng))
        rows.append({"prompt": concept_caption(shown), "concept_images": names, "caption": caption})
    write_lines(out / "subjects.jsonl", rows)


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--count", type=cli.whole(0), default=3000, help="pictures to train on")
    parser.add_argument("--people", type=cli.whole(1, 200), default=200, help="in test/, and in validation/")
    parser.add_argument("--pictures", type=cli.whole(1), default=2, help="of each of these")
    args = parser.parse_args()
    out = Path(args.out)
    if args.count:
        write_training(out / "train", args.count)
        print(f"{args.count} pictures in {out / 'train'}")
    for name in ("test", "validation"):
        write_subjects(out / name, name, args.people, args.pictures)
        print(f"{args.people} people in {out / name}")


if __name__ == "__main__":
    cli.run(main)
