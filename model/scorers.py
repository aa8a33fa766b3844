"""Scorers judge how well a picture fits its prompt: `scorer(images, prompts) -> (B,)`, one score a pair, higher is
better. PickScore (arXiv 2305.01569) is the one that HG-DPO selects its pairs by.

    pickscore               exp(logit_scale) * cosine, about 17 to 25     CLIP ViT-H/14, tuned on people's choices
    hpsv2, hpsv2.1          cosine, about 0.2 to 0.35                     CLIP ViT-H/14, likewise, letterboxed pictures
    imagereward             about -2 to 2                                 BLIP, see image_reward.py
    aesthetic               about 4 to 7; the prompt is ignored           LAION's head on CLIP ViT-L/14
    clip                    100 * cosine, about 15 to 35                  OpenAI's CLIP ViT-L/14
    paper-people, a folder, a Hub id: any CLIP in transformers' layout, scored as pickscore
    FILE.py:NAME            one's own: a class, called with the device once, whose objects score; or a function that
                            scores, (images, prompts) -> B numbers. FILE.py may import files that lie beside it
    0.5*pickscore+2*imagereward   a weighted sum of any of them

The names are those of the table SCORERS below, where a new scorer is one line.
`NAME:SOURCE` takes the weights from elsewhere: a file, a folder or a Hub id (clip:openai/clip-vit-base-patch32).
Scores of one prompt's pictures compare; those of different prompts do so less, those of different scorers not at all.

`load_reward` gives the same with a gradient: reward(pixels (B, 3, H, W) in [0, 1], prompts) -> (B,). All of these have
it, but for one's own, which has where it is a class with a method `reward` of this form.
"""

import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from modulefinder import ModuleFinder
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .builtin import BUILT_IN
from .checkpoint import check_tokenizer, load_weights, read_part
from .clip import CLIP
from .configs import clip_arguments
from .errors import UserError
from .files import digest_all, digest_of, is_a, read_json, was_read
from .hub import HUB_ID, fetch_for, find_file, weight_files
from .image_reward import WEIGHTS as IMAGE_REWARD
from .image_reward import load_image_reward
from .open_clip import from_open_clip, read_weights
from .preprocess import NetworkScorer, clip_pixels, clip_preprocess, letterbox, letterbox_pixels
from .reward_head import RewardHead
from .tokenizer import Tokenizer

Scorer = Callable[[Sequence[Image.Image], Sequence[str]], Tensor]
Reward = Callable[[Tensor, Sequence[str]], Tensor]

PICKSCORE = "yuvalkirstain/PickScore_v1"
OPENAI_CLIP = "openai/clip-vit-large-patch14"
AESTHETIC = "ttj/sac-logos-ava1-l14-linearMSE"                 # LAION's own file as safetensors, its head alone
# The authors publish pickles only; their sizes in bytes tell the versions apart.
HPS_REPOSITORY = "xswu/HPSv2"
HPS = {"hpsv2": ("HPS_v2_compressed.pt", 1_972_484_501), "hpsv2.1": ("HPS_v2.1_compressed.pt", 1_972_490_005)}
VIT_H = {
    "text": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "hidden_act": "gelu"},
    "vision": {
        "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120,
        "hidden_act": "gelu"},
    "projection_dim": 1024}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


# The CLIP family

class CLIPScorer(NetworkScorer):
    def __init__(self, clip: CLIP, tokenizer: Tokenizer, preprocessor: dict):
        self.clip, self.tokenizer, self.preprocessor = clip, tokenizer, preprocessor

    def like(self) -> Tensor:
        return self.clip.logit_scale

    def prepare(self, image: Image.Image) -> Tensor:
        return clip_preprocess(image, self.preprocessor)

    def prepare_pixels(self, pixels: Tensor) -> Tensor:
        return clip_pixels(pixels, self.preprocessor)

    def cosines(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """B prepared pictures and their B prompts -> the cosines of their embeddings (B,)."""
        texts = list(dict.fromkeys(prompts))                   # the pictures of one prompt share its embedding
        text = self.clip.embed_text(self.tokenizer.encode(texts).to(pixels.device))              # (texts, D)
        text = text[torch.tensor([texts.index(prompt) for prompt in prompts], device=pixels.device)]
        return (text * self.clip.embed_images(pixels)).sum(dim=-1)


class PickScore(CLIPScorer):
    """score = exp(logit_scale) * cosine(text, image): about 17 to 25 for the real PickScore. Differences between
    pictures of one prompt mean something; between prompts they do not."""

    formula = "exp(logit_scale) * cosine"

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.logit_scale.exp() * self.cosines(pixels, prompts)


class CLIPScore(CLIPScorer):
    """score = 100 * cosine(text, image), not cut off at 0."""

    def __init__(self, clip: CLIP, tokenizer: Tokenizer, preprocessor: dict, source: str):
        super().__init__(clip, tokenizer, preprocessor)
        self.formula = f"100 * cosine, {source}"

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return 100 * self.cosines(pixels, prompts)


class HPS2(CLIPScorer):
    """score = cosine(text, image), without the logit scale that PickScore has. Versions 2 and 2.1 do not compare."""

    def __init__(self, clip: CLIP, tokenizer: Tokenizer, image_size: int = 224, antialias: bool = False):
        self.clip, self.tokenizer, self.image_size, self.antialias = clip, tokenizer, image_size, antialias
        self.formula = f"cosine, resized with{'' if antialias else 'out'} antialias"

    def prepare(self, image: Image.Image) -> Tensor:
        return letterbox(image, self.image_size, self.antialias)

    def prepare_pixels(self, pixels: Tensor) -> Tensor:
        return letterbox_pixels(pixels, self.image_size, self.antialias)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.cosines(pixels, prompts)


class Aesthetic(CLIPScorer):
    """score = LAION's head on the picture's unit vector: about 4 to 7. The prompts are ignored."""

    formula = "LAION's head on CLIP's image embedding"

    def __init__(self, clip: CLIP, preprocessor: dict, head: RewardHead):
        self.clip, self.preprocessor, self.head = clip, preprocessor, head

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.clip.embed_images(pixels))


# Loading

def scorer_files(files: Sequence[str]) -> list[str]:
    """Of all file names of a scorer's repository those that are read."""
    return ["config.json", "preprocessor_config.json", "processor_config.json", *weight_files(files, "", "model"),
            *(name for name in files if name in TOKENIZER_FILES)]


def load_clip(source: str, device: str | torch.device, dtype: torch.dtype) -> tuple[CLIP, Tokenizer, dict]:
    """A CLIP in transformers' layout, a folder or a Hub id -> both towers, its tokenizer, its preprocessor's config."""
    folder = fetch_for("model.safetensors", source, scorer_files)
    config, tensors, where = read_part(folder, "", "model")
    tokenizer = Tokenizer.from_folder(folder)
    arguments = clip_arguments(config, f"{source}: config.json")
    check_tokenizer(tokenizer, arguments["text"], source)
    tensors = {k: v for k, v in tensors.items() if not k.endswith("embeddings.position_ids")}
    clip = load_weights(lambda: CLIP(**arguments, eos=tokenizer.eos), tensors, where, device, dtype)
    return clip, tokenizer, clip_preprocessor(folder, arguments["vision"]["image_size"])


def clip_preprocessor(folder: Path, image_size: int) -> dict:
    """preprocessor_config.json, or the same in the processor_config.json that transformers 5 writes. Refuses by name
    what `clip_preprocess` does not do."""
    path, config = folder / "preprocessor_config.json", {"size": image_size, "crop_size": image_size}
    if path.is_file():
        config |= read_json(path)
    elif (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"
        config |= read_json(path, image_processor=dict)["image_processor"]
    square = {"height": image_size, "width": image_size}
    fixed = {"do_resize": [True], "do_center_crop": [True], "do_rescale": [True], "do_normalize": [True],
             "resample": [3], "crop_size": [image_size, square]}
    for key, values in fixed.items():
        if config.get(key, values[0]) not in values:
            raise UserError(f"{path}: {key} is {config[key]!r:.60}, and this network takes {values[0]}")
    size = config["size"].get("shortest_edge") if isinstance(config["size"], dict) else config["size"]
    if not is_a(size, int) or not 1 <= size <= 2 * image_size:
        raise UserError(f"{path}: size is {config['size']!r:.60}; a shortest_edge of {2 * image_size} at most was "
                        "expected")
    for key, least in (("image_mean", -1000), ("image_std", 0.001)):
        value = config.get(key, [1, 1, 1])
        if not is_a(value, list) or len(value) != 3 or not all(is_a(x, float) and least <= x <= 1000 for x in value):
            raise UserError(f"{path}: {key} is {value!r:.60}; three numbers from {least} to 1000 were expected")
    return config


def load_pickscore(source: str, device: str | torch.device, dtype: torch.dtype) -> PickScore:
    return PickScore(*load_clip(source, device, dtype))


def load_clip_score(source: str, device: str | torch.device, dtype: torch.dtype) -> CLIPScore:
    return CLIPScore(*load_clip(source, device, dtype), source)


def load_hps(
    version: str, antialias: bool, source: str, device: str | torch.device, dtype: torch.dtype, arguments: dict = VIT_H,
) -> HPS2:
    """`source` is the weight file, or a folder or Hub id that has it."""
    path = find_file(source, HPS[version][0], "model.safetensors")
    for other, (_, size) in HPS.items():
        if other != version and path.stat().st_size == size:
            raise UserError(
                f"{path}: by its size this is {other}, not {version}; the Hub's Space {HPS_REPOSITORY} has v2 under a "
                f"name of v2.1, so take {HPS[version][0]} from the model repository {HPS_REPOSITORY}")
    tokenizer = Tokenizer.clip()
    clip = load_weights(
        lambda: CLIP(**arguments, eos=tokenizer.eos), from_open_clip(read_weights(path)), path, device, dtype)
    return HPS2(clip, tokenizer, arguments["vision"].get("image_size", 224), antialias)


def load_aesthetic(
    source: str, device: str | torch.device, dtype: torch.dtype, clip_source: str = OPENAI_CLIP,
) -> Aesthetic:
    """`source` is the head: LAION's .pth, or a folder or Hub id that has it."""
    path = find_file(source, "model.safetensors", "sac+logos+ava1-l14-linearMSE.pth")
    head = load_weights(RewardHead, read_weights(path), path, device, dtype)
    clip, _, preprocessor = load_clip(clip_source, device, dtype)
    del clip.text_model, clip.text_projection                  # half of its memory
    return Aesthetic(clip, preprocessor, head)


def load_own(file: str, name: str, device: str | torch.device) -> Scorer:
    """A scorer of one's own, a class or a function (see the head). An error that it raises while it scores is its
    author's, and keeps its traceback."""
    made = getattr(load_module(Path(file)), name, None)
    if not callable(made):
        raise UserError(f"{file}: no class and no function {name} in it; a scorer of one's own is FILE.py:NAME")
    scorer = made(device) if inspect.isclass(made) else made

    def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        found = scorer(images, prompts)
        try:
            scores = torch.as_tensor(found, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError):          # no numbers
            scores = None
        if scores is None or scores.shape != (len(images),) or not scores.isfinite().all():
            shown = " ".join(repr(found if scores is None else scores.tolist()).split())
            raise UserError(f"{file}:{name}: {len(images)} finite scores expected, got {shown:.60}")
        return scores
    if hasattr(scorer, "reward"):
        score.reward = scorer.reward
    return score


def load_module(file: Path) -> ModuleType:
    """Runs a Python file. It finds its neighbours, after everything that is installed and our own modules."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; a scorer of one's own is FILE.py:NAME")
    file = file.resolve()
    folder = file.parent
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    name = f"own_scorer_{digest_of(str(file))[:16]}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module                 # dataclasses look there for the module that they are in
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:               # its own, or a neighbour's
        raise UserError(f"{error.filename or file}:{error.lineno or 1}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if folder in Path(frame.filename).parents]
        where = f"{own[-1].filename}:{own[-1].lineno}" if own else file
        raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    finder = ModuleFinder([str(folder)])       # all that the file imports from its folder, itself among them
    finder.run_script(str(file))
    for found in finder.modules.values():
        if found.__file__:
            was_read(Path(found.__file__))
    return module


def parse_sum(text: str) -> list[tuple[float, str]]:
    """"0.5*pickscore+2*imagereward" -> [(0.5, "pickscore"), (2.0, "imagereward")]. A term without a weight has 1."""
    pieces = text, text.partition(":")[2], text.rpartition(":")[0]
    if any(Path(piece).exists() for piece in pieces if piece):                   # a path may hold a + or a *
        return [(1.0, text)]
    terms = []
    for term in text.split("+"):
        weight, star, name = term.rpartition("*")
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not name.strip():
            raise UserError(f"{text}: {term!r} is no term of a sum; expected WEIGHT*SCORER+WEIGHT*SCORER")
        terms.append((value, name.strip()))
    return terms


@dataclass(frozen=True)
class ScorerEntry:
    """A scorer that has a name. `load(source, device, dtype)` makes it."""

    load: Callable[[str, str | torch.device, torch.dtype], Scorer]
    source: str                                # of its weights, unless NAME:SOURCE says another
    image_tower: bool = False                  # it has `clip` and `preprocessor`, by which diversity is measured
    reads_prompt: bool = True                  # False: it can score pictures that have no prompts


SCORERS = {
    "pickscore": ScorerEntry(load_pickscore, PICKSCORE, image_tower=True),
    "paper-people": ScorerEntry(load_pickscore, str(BUILT_IN["paper-people"].checkpoint / "scorer"), image_tower=True),
    "hpsv2": ScorerEntry(partial(load_hps, "hpsv2", False), HPS_REPOSITORY),
    "hpsv2-antialias": ScorerEntry(partial(load_hps, "hpsv2", True), HPS_REPOSITORY),
    "hpsv2.1": ScorerEntry(partial(load_hps, "hpsv2.1", False), HPS_REPOSITORY),
    "hpsv2.1-antialias": ScorerEntry(partial(load_hps, "hpsv2.1", True), HPS_REPOSITORY),
    "imagereward": ScorerEntry(load_image_reward, IMAGE_REWARD),
    "aesthetic": ScorerEntry(load_aesthetic, AESTHETIC, image_tower=True, reads_prompt=False),
    "clip": ScorerEntry(load_clip_score, OPENAI_CLIP, image_tower=True)}


def entry_of(name: str) -> ScorerEntry | None:
    """Of "NAME" or "NAME:SOURCE"; None where there is no such name: a sum, a folder, a Hub id, one's own."""
    return SCORERS.get(name.partition(":")[0])


def has_image_tower(name: str) -> bool:
    """Whether diversity can be measured with the scorer: one of the table that says so, or a folder, a CLIP."""
    entry = entry_of(name)
    return entry.image_tower if entry else Path(name).is_dir()


def reads_prompts(name: str) -> bool:
    """Whether a score depends on the prompt."""
    entry = entry_of(name)
    return entry is None or entry.reads_prompt


def load_scorer(
    name: str | Path = "pickscore", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Scorer:
    """Any of the scorers that this file's head lists. hpsv2-antialias and hpsv2.1-antialias resize as torchvision does
    since 0.17, with antialias.

    float32 by default, on every device: in half precision scores fall on a grid so coarse that it makes ties.
    """
    terms = parse_sum(str(name))
    if len(terms) > 1 or terms[0][0] != 1:
        return weighted_sum([(weight, load_scorer(part, device, dtype)) for weight, part in terms])
    name = terms[0][1]
    if own := re.fullmatch(r"(.+\.py):(\w+)", name):
        return load_own(own[1], own[2], device)
    if entry := entry_of(name):
        return entry.load(name.partition(":")[2] or entry.source, device, dtype)
    if not Path(name).exists() and not HUB_ID.fullmatch(name):
        raise UserError(
            f"{name}: no such file or folder, and no Hub id (owner/name), nor FILE.py:NAME, nor one of "
            f"{', '.join(SCORERS)}")
    return load_pickscore(name, device, dtype)


def digest_of_scorer(name: str, files: Iterable[Path]) -> str:
    """Changes with the `files` that a scorer was read from, and with what else it is: which of those that one file has;
    a sum as it is written, for its files do not tell which has which weight."""
    contents, terms = digest_all(files), parse_sum(name)
    if len(terms) > 1 or terms[0][0] != 1:
        return digest_of([terms, contents])
    own, entry = re.fullmatch(r".+\.py:(\w+)", name), entry_of(name)
    plain = entry is None or entry.load is load_pickscore
    return contents if plain and not own else digest_of([own[1] if own else name.partition(":")[0], contents])


def weighted_sum(parts: list[tuple[float, Callable]]) -> Callable:
    """Of scorers, or of rewards."""
    return lambda pictures, prompts: sum(weight * part(pictures, prompts) for weight, part in parts)


def load_reward(
    name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Reward:
    """A scorer with a gradient: pixels (B, 3, H, W) in [0, 1], as a VAE draws them, and B prompts -> (B,) float32. See
    `NetworkScorer.reward` for how near it is to the score. No parameter takes a gradient, and of every layer of the
    towers only the input is kept: the layer is computed again in the backward pass. UserError where there is none."""
    terms = parse_sum(str(name))
    if len(terms) > 1 or terms[0][0] != 1:
        return weighted_sum([(weight, load_reward(part, device, dtype)) for weight, part in terms])
    scorer = load_scorer(name, device, dtype)
    if not hasattr(scorer, "reward"):
        raise UserError(
            f"{name}: no gradient, for it has no method reward(pixels, prompts); PickScore, HPS, ImageReward, "
            "Aesthetic, CLIP score, a CLIP of one's own and weighted sums of these have gradients")
    for network in vars(scorer).values():
        for module in network.modules() if isinstance(network, nn.Module) else ():
            for layer in module if isinstance(module, nn.ModuleList) else ():
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return scorer.reward
