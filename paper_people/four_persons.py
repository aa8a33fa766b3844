"""Four persons, each given by two pictures, in four prompts each: without a LoRA and, below, with it; the same seeds.

    python -m paper_people.four_persons --lora run/lora.safetensors --out docs/persons.png
"""

import cli

# isort: split
import random
from pathlib import Path

from model.checkpoint import load_pipeline
from model.concept import cut_out, load_concept
from pictures import sheet, write_png
from sampling import Drawing, draw_people

from . import world
from .concept_pictures import CONCEPT, concept_caption, cut_person

PERSONS = [{"skin": world.SKIN[skin], "hair": hair, "build": who} for skin, hair, who in (
    (0, "red", "woman"), (2, "black", "man"), (1, "blond", "man"), (2, "brown", "woman"))]
SCENES = [world.Person("man", "black", *rest) for rest in (
    ("blue", "white", "waving", "beach"), ("green", "black", "sitting", "forest"),
    ("purple", "yellow", "walking", "city"), ("white", "red", "cheering", "room"))]


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--lora", required=True, metavar="FILE[:WEIGHT]")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture")
    args = parser.parse_args()
    rng, prompts = random.Random(0), [concept_caption(scene) for scene in SCENES]
    given = [[cut_person(person, SCENES[0], rng) for _ in range(2)] for person in PERSONS]
    drawn = {}
    for label, loras in (("without", []), ("with HG-DPO", [args.lora])):
        pipeline = load_pipeline("paper-people")
        pipeline.add_loras(loras)
        pipeline.concept = load_concept(CONCEPT, pipeline, 0.3)
        drawing = Drawing(steps=10).for_model(pipeline)
        for k, pictures in enumerate(given):
            seeds, people = [4 * k + i for i in range(4)], [pipeline.concept.look(pictures)] * 4
            drawn[k, label] = [image for _, image in draw_people(pipeline, drawing, prompts, seeds, people)]
    images, captions = [], []
    for (k, label), some in sorted(drawn.items(), key=lambda item: (item[0][0], item[0][1] != "without")):
        images += [cut_out(given[k][label != "without"]), *some]
        captions += [f"person {k + 1}, {label}", *(prompt.partition(", ")[2] for prompt in prompts)]
    write_png(args.out, sheet(images, captions, columns=5))
    print(f"{args.out}: four persons, four prompts each")


if __name__ == "__main__":
    cli.run(main)
