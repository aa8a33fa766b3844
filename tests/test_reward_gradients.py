"""Scores with a gradient: against the exact scores of the same pictures, against finite differences, and put to use.

Small random networks of every kind, and the paper people's own scorer, which is a real one.
"""

import math
import re

import pytest
import torch
from PIL import Image
from test_more_scorers import ARGUMENTS, WORDS, random_state, small_network
from test_scorers import picture
from torch import Tensor

from model.clip import CLIP
from model.errors import UserError
from model.image_reward import ImageReward, WordPiece
from model.preprocess import (
    STD,
    clip_pixels,
    clip_preprocess,
    letterbox,
    letterbox_pixels,
    openai_pixels,
    openai_preprocess,
    to_pixels,
)
from model.reward_head import RewardHead
from model.scorers import HPS2, SCORERS, Aesthetic, CLIPScore, PickScore, ScorerEntry, load_reward, load_scorer
from model.tokenizer import Tokenizer

PROMPT = "a woman with red hair waving on a beach"
PREPROCESSOR = {"size": {"shortest_edge": 30}, "crop_size": 28}                  # resized and cut


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return WordPiece(path)


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch, words):
    """The names of `SCORERS` load small random networks: of 28 pixels, and of 32 for ImageReward."""
    def filled(network: torch.nn.Module, dtype: torch.dtype):
        network.load_state_dict(random_state(network))
        return network.to(dtype).eval().requires_grad_(False)

    def clip(dtype: torch.dtype) -> CLIP:
        network = filled(CLIP(**ARGUMENTS), dtype)
        network.logit_scale.fill_(math.log(100))
        return network

    kinds = {
        "pickscore": lambda dtype: PickScore(clip(dtype), Tokenizer.clip(), PREPROCESSOR),
        "clip": lambda dtype: CLIPScore(clip(dtype), Tokenizer.clip(), PREPROCESSOR, "here"),
        "hpsv2": lambda dtype: HPS2(clip(dtype), Tokenizer.clip(), 28, False),
        "hpsv2-antialias": lambda dtype: HPS2(clip(dtype), Tokenizer.clip(), 28, True),
        "aesthetic": lambda dtype: Aesthetic(clip(dtype), PREPROCESSOR, filled(RewardHead(24), dtype)),
        "imagereward": lambda dtype: ImageReward(filled(small_network(), dtype), words)}
    for name, make in kinds.items():
        monkeypatch.setitem(SCORERS, name, ScorerEntry(lambda source, device, dtype, make=make: make(dtype), ""))


KINDS = ["pickscore", "clip", "hpsv2", "hpsv2-antialias", "aesthetic", "imagereward"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def batch(*images: Image.Image, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pictures of one size -> (B, 3, H, W) in [0, 1]."""
    return torch.stack([to_pixels(image) for image in images]).to(dtype)


def to_picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


# Pixels

WIDE = {"size": 60, "crop_size": {"height": 70, "width": 90}}                    # a cut wider than the picture
PREPARED = {                   # of a picture, of pixels; the shortest edge that PIL makes, and rounds
    "clip": (lambda x: clip_preprocess(x, {}), lambda x: clip_pixels(x, {}), 224),
    "clip, a wide cut": (lambda x: clip_preprocess(x, WIDE), lambda x: clip_pixels(x, WIDE), 60),
    "openai": (openai_preprocess, openai_pixels, 224),
    "letterbox": (letterbox, letterbox_pixels, None),
    "letterbox, antialias": (lambda x: letterbox(x, 60, True), lambda x: letterbox_pixels(x, 60, True), None)}


@pytest.mark.parametrize("exact, of_pixels, edge", PREPARED.values(), ids=PREPARED)
def test_pixels_are_prepared_as_pictures_are(exact, of_pixels, edge):
    """Smaller and larger, wide and tall: PIL rounds after either pass to 1/255, and nothing else differs. Nothing is
    rounded in a letterbox, nor where nothing is resized."""
    for width, height in ((704, 1024), (300, 224), (454, 448), (64, 64), (224, 301), (60, 99), (100, 37), (9, 5)):
        image = picture(width, height, width)
        wanted, got = exact(image), of_pixels(batch(image))[0]
        assert got.shape == wanted.shape and got.dtype == torch.float32
        error = (got - wanted).abs() * torch.tensor(STD)[:, None, None] * 255
        if edge in (None, min(width, height)):
            assert torch.equal(got, wanted), (width, height)
        else:
            assert 0.7 < error.max() < 1.2 and error.mean() < 0.31, (width, height)


def test_pixels_keep_their_device_and_type():
    x = batch(picture(50, 40), dtype=torch.float64)
    for prepare in (lambda x: clip_pixels(x, {}), openai_pixels, letterbox_pixels):
        assert prepare(x).dtype == torch.float64
        torch.testing.assert_close(prepare(x).float(), prepare(x.float()), rtol=0, atol=1e-4)
        assert prepare(x.to("meta")).device.type == "meta"


# Numbers

SIZES = [(28, 28), (30, 41), (32, 32), (33, 47), (96, 64), (140, 300), (22, 20)]
AT_ITS_SIZE = {"pickscore": (30, 41), "clip": (30, 41), "aesthetic": (30, 41), "imagereward": (32, 32)}


@pytest.mark.parametrize("kind", [*KINDS, "paper-people"])
def test_a_reward_is_the_score(kind):
    """The same to the last digits where PIL does not resize, else within 7 % of the scores' standard deviation."""
    scorer, reward = load_scorer(kind), load_reward(kind)
    largest = 0.0
    for size in SIZES:
        images = [picture(*size, seed) for seed in range(6)]
        prompts = [PROMPT, "a cat"] * 3
        wanted, got = scorer(images, prompts), reward(batch(*images), prompts)
        assert got.shape == (6,) and got.dtype == torch.float32 and len(set(wanted.tolist())) == 6
        same = kind.startswith("hpsv2") or AT_ITS_SIZE.get(kind, (96, 64)) == size
        error = ((got - wanted).abs().max() / wanted.std()).item()
        largest = max(largest, error)
        assert error < (1e-4 if same else 0.07), size
    print(f"{largest:.1e}", end=" ")


@every_kind
def test_gradients_equal_finite_differences(kind):
    """In float64, along random directions; resized and cut, and without overshooting, where a cut-off has an edge."""
    scorer, generator = load_scorer(kind, dtype=torch.float64), torch.Generator().manual_seed(0)
    x = 0.3 + 0.4 * torch.rand((2, 3, 41, 36), generator=generator, dtype=torch.float64)
    prompts = [PROMPT, "a cat"]
    weights = torch.tensor([1.0, -0.7])
    leaf = x.clone().requires_grad_()
    total = (load_reward(kind, dtype=torch.float64)(leaf, prompts) * weights).sum()
    gradient, = torch.autograd.grad(total, leaf)
    assert gradient.dtype == torch.float64 and gradient.isfinite().all()

    def score(x: Tensor) -> Tensor:            # in float64, which a reward is not at its end
        return (scorer.score(scorer.prepare_pixels(x), prompts) * weights).sum()

    for _ in range(4):
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        step = 1e-6 * direction
        difference = (score(x + step) - score(x - step)) / 2e-6
        error = ((gradient * direction).sum() - difference).abs() / gradient.norm()
        print(f"{error:.1e}", end=" ")
        assert error < 1e-6


@pytest.mark.parametrize("kind", [*KINDS, "paper-people", "0.5*clip+2*aesthetic"])
def test_ascent_raises_the_exact_score(kind):
    """Ten steps of at most 2/255 a value; the score is that of the picture that is kept, rounded, in both."""
    scorer, reward = load_scorer(kind), load_reward(kind)
    x = batch(picture(80, 100), picture(80, 100, 1))
    prompts = [PROMPT, "a cat"]
    before = scorer([to_picture(one) for one in x], prompts)
    for _ in range(10):
        x.requires_grad_()
        gradient, = torch.autograd.grad(reward(x, prompts).sum(), x)
        x = (x.detach() + 2 / 255 * gradient.sign()).clamp(0, 1)
    after = scorer([to_picture(one) for one in x], prompts)
    torch.testing.assert_close(reward(x, prompts), after, rtol=0.02, atol=0.02 * (after - before).min().item())
    assert (after > before).all()
    spread = scorer([picture(80, 100, seed) for seed in range(8)], [PROMPT] * 8).std()
    print(((after - before) / spread).tolist(), end=" ")
    assert ((after - before) > spread).all()


@every_kind
def test_a_picture_gets_no_gradient_of_its_neighbours(kind):
    x = batch(picture(40, 50), picture(40, 50, 1)).requires_grad_()
    reward = load_reward(kind)
    both, = torch.autograd.grad(reward(x, [PROMPT, "a cat"])[1], x)
    alone, = torch.autograd.grad(reward(x[1:], ["a cat"]).sum(), x)
    assert both[0].abs().max() == 0 and both[1].abs().max() > 0
    torch.testing.assert_close(both[1], alone[1], rtol=1e-4, atol=1e-4 * alone.abs().max().item())


# Memory

@every_kind
def test_layers_are_computed_again_and_parameters_take_no_gradient(kind):
    """The same gradient as of the scorer that keeps everything, to the last bit; the layers that see the picture run
    twice."""
    x = batch(picture(28, 28)).requires_grad_()
    wanted, = torch.autograd.grad(load_scorer(kind).reward(x, [PROMPT]).sum(), x)
    reward = load_reward(kind)
    runs = {}
    for part in vars(reward.__self__).values():
        for name, module in part.named_modules() if isinstance(part, torch.nn.Module) else ():
            if re.fullmatch(r".*(encoder\.layers?|blocks)\.\d+", name):
                runs[name] = 0

                def count(*_, name=name):
                    runs[name] += 1
                next(module.children()).register_forward_hook(count)
            assert not any(parameter.requires_grad for parameter in module.parameters())
    score = reward(x, [PROMPT])
    sees = {name: n for name, n in runs.items() if not name.startswith("text_model")}
    assert set(sees.values()) == {1} and len(sees) >= 3
    got, = torch.autograd.grad(score.sum(), x)
    assert torch.equal(got, wanted) and wanted.abs().max() > 0
    assert {runs[name] for name in sees} == {2}


# Names

def test_sums_are_sums():
    x, prompts = batch(picture(40, 50), picture(40, 50, 1)).requires_grad_(), [PROMPT, "a cat"]
    parts = {name: load_reward(name)(x, prompts) for name in ("hpsv2", "imagereward")}
    total = load_reward("0.5*hpsv2 + -2*imagereward")(x, prompts)
    torch.testing.assert_close(total, 0.5 * parts["hpsv2"] - 2 * parts["imagereward"])
    wanted = [torch.autograd.grad(part.sum(), x)[0] for part in parts.values()]
    got, = torch.autograd.grad(total.sum(), x)
    torch.testing.assert_close(got, 0.5 * wanted[0] - 2 * wanted[1])
    torch.testing.assert_close(load_reward("3*hpsv2")(x, prompts), 3 * parts["hpsv2"])


OWN = '''
class Plain:
    def __init__(self, device):
        pass

    def __call__(self, images, prompts):
        return [image.getpixel((0, 0))[0] / 255 for image in images]

class Bright(Plain):
    def reward(self, pixels, prompts):
        return pixels[:, 0, 0, 0]

def function(images, prompts):
    return [0.0] * len(images)
'''


def test_what_has_no_gradient_is_refused_in_one_line(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    for name, named in ((f"{own}:Plain", f"{own}:Plain"), (f"{own}:function", f"{own}:function"),
                        (f"0.5*hpsv2+{own}:Plain", f"{own}:Plain")):
        with pytest.raises(UserError) as error:
            load_reward(name)
        message = str(error.value)
        assert message.startswith(f"{named}: no gradient") and "PickScore" in message and "\n" not in message
    for name in ("judge", "judge-clean", "hpsv3"):                               # no scorers, so no rewards
        with pytest.raises(UserError, match=f"{name}: no such file.*nor one of pickscore"):
            load_reward(name)


def test_ones_own_class_may_have_a_gradient(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    image = picture(40, 50)
    x = batch(image).requires_grad_()
    total = load_reward(f"2*{own}:Bright")(x, [PROMPT])
    torch.testing.assert_close(total, 2 * load_scorer(f"{own}:Bright")([image], [PROMPT]))
    assert torch.autograd.grad(total.sum(), x)[0].sum() == 2


def test_every_picture_has_its_prompt():
    with pytest.raises(UserError, match="2 pictures and 1 prompts"):
        load_reward("hpsv2")(torch.zeros(2, 3, 28, 28), [PROMPT])
