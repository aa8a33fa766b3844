"""What concepts are trained on and drawn from: pictures with captions and masks (`read_concept_images`), and prompts
with the pictures of their people (`subjects`).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType

import torch
from PIL import Image

from model.concept import GREY, ConceptModel, Person, cut_out
from model.errors import UserError
from model.files import digest, digest_of, read_lines
from model.tokenizer import Tokenizer
from sampling import seeded

from .images import open_picture
from .preferences import cleaned, find_picture

# To train on

@dataclass(frozen=True)
class ConceptImage:
    """A picture, its caption with the placeholder, and the mask of its person, if there is one: white where it is,
    black or transparent elsewhere."""

    text: str
    file: Path
    mask: Path | None

    def load(self) -> Image.Image:
        return open_picture(self.file)

    def subject(self) -> Image.Image:
        """The picture's person, cut out by the mask; without one the whole picture."""
        picture = self.load()
        if self.mask is not None:
            mask = open_picture(self.mask, keep_alpha=True).convert("RGBA")
            mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask).convert("L")
            if mask.size != picture.size:
                raise UserError(f"{self.mask}: {mask.width}x{mask.height}, and its picture {self.file.name} is "
                                f"{picture.width}x{picture.height}")
            picture.putalpha(mask)
        return cut_out(picture, str(self.mask))


def read_concept_images(folder: Path) -> list[ConceptImage]:
    """A folder's metadata.jsonl: `file_name`, `text` and, where there is one, `mask`, a line a picture."""
    file, images = folder / "metadata.jsonl", []
    if not file.is_file():
        raise UserError(f"{file}: not there; expected a line for each picture, with file_name, text, and mask if any")
    for number, row in enumerate(read_lines(file, file_name=str, text=str, mask=(str, NoneType)), 1):
        where = f"{file}, row {number}"
        mask = find_picture(folder, row["mask"], where) if row.get("mask") else None
        images.append(ConceptImage(cleaned(row["text"]), find_picture(folder, row["file_name"], where), mask))
    if not images:
        raise UserError(f"{file}: no picture in it")
    return images


def unusable(images: list[ConceptImage], progress: Callable) -> list[str]:
    """What is wrong with pictures and masks that cannot be trained on. All are opened, several at once."""
    def problem(image: ConceptImage) -> str | None:
        try:
            image.subject()
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as threads:      # map begins with all that it is given, so some at a time
        found = (said for i in range(0, len(images), 1024) for said in threads.map(problem, images[i:i + 1024]))
        return [said for said in progress(found, len(images), "looking at the pictures") if said]


def digest_of_images(images: list[ConceptImage]) -> str:
    """Changes with the captions, and with the sizes of the files, which may be hundreds of gigabytes."""
    return digest_of([[image.text, *([file.name, file.stat().st_size] for file in (image.file, image.mask) if file)]
                      for image in images])


def augmented(picture: Image.Image, seed: int, number: int) -> Image.Image:
    """Mirrored or not, turned by up to 10 degrees, and cut to 90 to 100 % of its sides, so that nothing but the person
    goes from a picture to itself."""
    mirrored, angle, side, x, y = torch.rand(5, generator=seeded("a concept's picture", seed, number)).tolist()
    if mirrored < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(20 * angle - 10, Image.Resampling.BICUBIC, fillcolor=GREY)
    width, height = (round((0.9 + 0.1 * side) * edge) for edge in picture.size)
    left, top = round(x * (picture.width - width)), round(y * (picture.height - height))
    return picture.crop((left, top, left + width, top + height))


# To draw

def subjects(prompts: list[str], listing: str | None, pictures: list[str]) -> list[dict]:
    """What is to be drawn of people, {prompt, concept_images} each: all prompts with the same pictures, or those of the
    .jsonl `listing` each with its own, and with a `caption` for the scorers where it has one. UserError where there
    are none."""
    if pictures:
        files = [str(Path(file).resolve()) for file in pictures]
        return [{"prompt": prompt, "concept_images": files} for prompt in prompts]
    if listing is None or Path(listing).suffix != ".jsonl":
        raise UserError("--concept: no picture of a person; give --concept-image PICTURE, or --prompts FILE.jsonl with "
                        "concept_images in its lines")
    path, rows = Path(listing), []
    for number, row in enumerate(read_lines(path, prompt=str, concept_images=list, caption=(str, NoneType)), 1):
        where, names = f"{path}, row {number}", row["concept_images"]
        if not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where}: concept_images is {names!r:.60}; a list of one picture or more was expected")
        files = [str(find_picture(path.parent, name, where)) for name in names]
        caption = {"caption": cleaned(row["caption"])} if row.get("caption") else {}
        rows.append({"prompt": cleaned(row["prompt"]), "concept_images": files, **caption})
    return rows


def check_subjects(rows: list[dict], model: ConceptModel, tokenizer: Tokenizer) -> str:
    """Adds the caption where there is none: the prompt without the placeholder. -> the digest of all pictures.
    UserError on a prompt without the placeholder, and on a picture that cannot be read or shows too little."""
    for row in rows:
        model.places(row["prompt"], tokenizer)
        if "concept_images" not in row:
            raise UserError(f"prompt {row['prompt']!r:.80}: no picture of its person")
        row.setdefault("caption", model.without_placeholder(row["prompt"]))
    digests = {}
    for file in dict.fromkeys(file for row in rows for file in row["concept_images"]):
        cut_out(open_picture(Path(file), keep_alpha=True), file)
        digests[file] = digest(Path(file))
    return digest_of([[row["prompt"], [digests[file] for file in row["concept_images"]]] for row in rows])


def person_of(model: ConceptModel) -> Callable[[dict], Person]:
    """-> a row of `subjects` -> its person, whose pictures are looked at once."""
    @lru_cache(maxsize=64)
    def look(files: tuple[str, ...]) -> Person:
        return model.look([open_picture(Path(file), keep_alpha=True) for file in files])
    return lambda row: look(tuple(row["concept_images"]))
