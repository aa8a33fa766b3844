"""The concept encoder, its adapters and train_concept.py: beside a U-Net that stays what it is; trained, stopped and
split as train.py is; drawn with, judged, and refused where something is missing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention import GatedSelfAttentionDense
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPModel

import evaluate
import generate
import score
import train_concept
from dataset.concepts import augmented, read_concept_images
from dataset.folder import write_manifest
from dataset.images import open_picture, read_captions
from evaluation.judges import judge_identity, measure, note_judge
from evaluation.study import read_study
from model.checkpoint import load_pipeline
from model.concept import (
    GREY,
    SD15_DIMS,
    Concept,
    GatedSelfAttention,
    cut_out,
    load_concept,
    new_concept,
    save_concept,
    transformer_blocks,
)
from model.errors import UserError
from model.files import files_read
from model.identity import FaceDistance, load_identity
from model.lora import inject_lora, lora_layers, save_lora
from model.unet import UNet
from paper_people import concept_pictures, world
from sampling import Drawing, draw_people, draw_pictures

ROOT = Path(__file__).parent.parent
PROMPT = "a photo of a sks person on a beach"


def disc(colour: str, x: int = 24, alpha: bool = False, size: int = 48) -> Image.Image:
    """A person, for want of a better one; with its alpha channel, if asked for."""
    picture, mask = Image.new("RGB", (size, size), "navy"), Image.new("L", (size, size))
    for canvas, fill in ((picture, colour), (mask, 255)):
        ImageDraw.Draw(canvas).ellipse((x - 12, 8, x + 12, 40), fill=fill)
    if alpha:
        picture.putalpha(mask)
    return picture


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of pictures with masks."""
    folder = tmp_path_factory.mktemp("images")
    lines = []
    for i, colour in enumerate(("red", "lime", "yellow", "white", "orange")):
        disc(colour, 18 + 3 * i).save(folder / f"{i}.png")
        disc(colour, 18 + 3 * i, alpha=True).getchannel("A").save(folder / f"{i}-mask.png")
        lines.append({"file_name": f"{i}.png", "text": PROMPT, "mask": f"{i}-mask.png"})
    del lines[-1]["mask"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def pipeline(tiny):
    return load_pipeline(tiny)


def moved(model: Concept) -> Concept:
    """As if it had learned something."""
    torch.manual_seed(7)
    for adapter in model.adapters:
        nn.init.constant_(adapter.gamma, 0.7)
    return model


@pytest.fixture
def concept_file(tiny, tiny_scorer, tmp_path):
    torch.manual_seed(3)
    model = new_concept(load_pipeline(tiny), str(tiny_scorer))
    moved(model.concept)
    save_concept(tmp_path / "concept.safetensors", model)
    return tmp_path / "concept.safetensors"


# The networks

def test_an_adapter_is_gligens(generator=None):
    torch.manual_seed(0)
    theirs = GatedSelfAttentionDense(query_dim=32, context_dim=24, n_heads=4, d_head=8).double()
    theirs.alpha_attn.data.fill_(0.6)                          # its second gate, of a feed-forward, stays at 0
    ours = GatedSelfAttention(32, 24, 4).double()
    names = {"proj": "linear", "norm": "norm1", "attn": "attn"}
    state = {name: theirs.state_dict()[names[name.partition(".")[0]] + name[len(name.partition(".")[0]):]]
             for name in ours.state_dict() if name != "gamma"}
    ours.load_state_dict(state | {"gamma": theirs.alpha_attn.data})
    y, patches = torch.randn(2, 10, 32, dtype=torch.float64), torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(y + ours(y, patches), theirs(y, patches), rtol=0, atol=1e-12)


def test_the_tower_gives_transformers_states(tiny_scorer, pipeline):
    model = new_concept(pipeline, str(tiny_scorer))
    theirs = CLIPModel.from_pretrained(tiny_scorer).vision_model.eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.tower.tokens(pixels), theirs(pixels).last_hidden_state, rtol=0, atol=1e-5)


def test_the_defaults_are_sd15s():
    with torch.device("meta"):
        unet, concept = UNet(), Concept()
    assert [block.norm1.normalized_shape[0] for block in transformer_blocks(unet)] == list(SD15_DIMS)
    concept.inject(unet)
    assert concept.global_proj.weight.shape == (768, 1024) and concept.adapters[4].attn.heads == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unet_stays_bit_for_bit(dtype, tiny, tiny_scorer):
    """With gamma at 0, at strength 0, and where no one is shown; and not otherwise. Its names are the checkpoint's."""
    pipeline = load_pipeline(tiny, dtype=dtype)
    names = list(pipeline.unet.state_dict())
    given = torch.randn(2, 4, 8, 8, dtype=dtype), torch.tensor([3, 800]), torch.randn(2, 77, 32, dtype=dtype)
    patches = torch.randn(2, 17, 32)
    with torch.no_grad():
        base = pipeline.unet(*given)
        model = new_concept(pipeline, str(tiny_scorer))
        assert list(pipeline.unet.state_dict()) == names
        with model.concept.showing(patches):
            assert torch.equal(pipeline.unet(*given), base)
        moved(model.concept)
        with model.concept.showing(patches):
            first = pipeline.unet(*given)
        assert not torch.equal(first, base) and first.dtype == dtype
        with model.concept.showing(patches, 0.0):
            assert torch.equal(pipeline.unet(*given), base)
        with model.concept.showing(patches[1:]):               # guidance: its first half, without the text, sees no one
            half = pipeline.unet(*given)
        assert torch.equal(half[0], base[0])
        torch.testing.assert_close(half[1], first[1], rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
        assert torch.equal(pipeline.unet(*given), base)
        inject_lora(pipeline.unet, 2, 2.0)                     # finds its 8 layers a block, and none of the adapters
        assert len(lora_layers(pipeline.unet)) == 8 * len(model.concept.adapters)


def test_only_the_concept_learns(pipeline, tiny_scorer):
    model = new_concept(pipeline, str(tiny_scorer))
    moved(model.concept)
    features, patches = model.encode(torch.randn(2, 3, 32, 32))
    context = torch.stack([model.say(torch.randn(77, 32), PROMPT, one, pipeline.tokenizer) for one in features])
    with model.concept.showing(patches):
        pipeline.unet(torch.randn(2, 4, 8, 8), torch.tensor([5, 500]), context).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.concept.parameters())
    assert not any(p.requires_grad for p in (*pipeline.unet.parameters(), *model.tower.parameters()))


def test_the_placeholder_alone_is_replaced(pipeline, tiny_scorer):
    model = new_concept(pipeline, str(tiny_scorer))
    context, feature = torch.randn(77, 32), torch.randn(32)
    said = model.say(context, PROMPT, feature, pipeline.tokenizer)
    place = 1 + PROMPT.split().index("sks")                    # each of these words is a token of CLIP's
    assert torch.equal(said[place], feature)
    assert torch.equal(said[torch.arange(77) != place], context[torch.arange(77) != place])
    assert model.without_placeholder("A SKS person, sks, with skss hair") == "A person, , with skss hair"
    model.placeholder = "<sks>"
    assert model.without_placeholder("a <sks> person, as <SKS>") == "a person, as"
    model.placeholder = "sks"
    for prompt in ("a photo of a person", "a skss person", "very " * 80 + "sks"):
        with pytest.raises(UserError, match="no 'sks' among the words"):
            model.say(context, prompt, feature, pipeline.tokenizer)


def test_a_person_of_several_pictures(pipeline, tiny_scorer):
    model = new_concept(pipeline, str(tiny_scorer))
    red, lime = (model.look([disc(colour)]) for colour in ("red", "lime"))
    both = model.look([disc("red"), disc("lime")])
    torch.testing.assert_close(both.feature, (red.feature + lime.feature) / 2)
    torch.testing.assert_close(both.patches, torch.cat([red.patches, lime.patches]))
    assert red.patches.shape == (17, 32) and not torch.equal(red.feature, lime.feature)


def test_a_person_is_cut_out():
    cut = cut_out(disc("red", x=30, alpha=True))
    assert cut.size == (33, 33) and cut.mode == "RGB"
    assert cut.getpixel((16, 16)) == (255, 0, 0) and cut.getpixel((0, 0)) == GREY and cut.getpixel((32, 32)) == GREY
    assert cut_out(disc("red")) == disc("red")                 # without an alpha channel it is the whole picture
    assert cut_out(disc("red").convert("RGBA")) == disc("red")                   # as it is with one that keeps all
    with pytest.raises(UserError, match="its alpha channel keeps 0.0% of it; a person covers 3% or more"):
        cut_out(Image.new("RGBA", (40, 40), (255, 0, 0, 0)))


# Files

def test_a_file_is_read_back(concept_file, tiny, tiny_scorer):
    model = load_concept(concept_file, load_pipeline(tiny), 0.5)
    assert model.placeholder == "sks" and model.clip == str(tiny_scorer) and model.strength == 0.5
    state = load_file(concept_file)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.concept.state_dict().items())
    assert not any(p.requires_grad for p in model.concept.parameters())


def test_other_files_are_refused(concept_file, tiny, tiny_scorer, tmp_path):
    from safetensors.torch import save_file
    pipeline, bad = load_pipeline(tiny), tmp_path / "bad.safetensors"
    inject_lora(pipeline.unet, 2, 2.0)
    save_lora(bad, pipeline.unet)
    with pytest.raises(UserError, match="not a concept; expected a file that train_concept.py wrote"):
        load_concept(bad, pipeline)
    metadata, state = {"clip": str(tiny_scorer), "placeholder": "sks"}, load_file(concept_file)
    last = max(name for name in state if "gamma" in name)
    save_file({name: tensor for name, tensor in state.items() if name != last}, bad, metadata)
    with pytest.raises(UserError, match=f"bad.safetensors, a concept: .* missing: 1 .{last}"):
        load_concept(bad, pipeline)
    save_file(state | {"patch_proj.weight": torch.zeros(32, 64)}, bad, metadata)
    with pytest.raises(UserError, match=r"patch_proj.weight is \(32, 64\), expected \(32, 32\)"):
        load_concept(bad, pipeline)
    save_file(state, bad, metadata | {"clip": "gone/far/away"})
    with pytest.raises(UserError, match="bad.safetensors: it was trained with the CLIP 'gone/far/away', which is need"):
        load_concept(bad, pipeline)
    with pytest.raises(UserError, match="no such concept file"):
        load_concept(tmp_path / "none.safetensors", pipeline)


# Training

@pytest.fixture
def options(tiny, tiny_scorer, images):
    return ["--model", tiny, "--images", images, "--clip", tiny_scorer, "--device", "cpu", "--batch-size", 2,
            "--lr", 1e-2, "--adapter-lr", 1e-2]


def lines_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_killed_and_resumed_is_the_run_that_was_not(options, program, interrupted, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run = [*options, "--save-every", 2, "--steps", 4, "--ema", 0.5, "--lr-schedule", "linear"]
    assert program(train_concept, *run, "--out", straight, "--sample-every", 4) == 0
    with interrupted(train_concept, 4):
        assert program(train_concept, *run, "--out", killed) == 130
    assert torch.load(killed / "checkpoint" / "state.pt", weights_only=True)["step"] == 2
    assert program(train_concept, *run, "--out", killed) == 0
    assert (straight / "concept.safetensors").read_bytes() == (killed / "concept.safetensors").read_bytes()
    assert lines_of(straight) == lines_of(killed) and len(lines_of(killed)) == 4
    assert lines_of(killed)[0]["gate"] == pytest.approx(np.tanh(1e-2), rel=0.01)         # Adam's first step, from 0
    assert (straight / "samples" / "000004.png").is_file()
    card = (killed / "README.md").read_text()
    assert "4 steps on 5 pictures" in card and "| adapter_lr | 0.01 |" in card


def test_less_memory_is_the_same_training(options, program, tmp_path):
    """What the backward pass computes again sees the person, too."""
    runs = {name: tmp_path / name for name in ("plain", "--gradient-checkpointing")}
    for name, out in runs.items():
        assert program(train_concept, *options, "--steps", 2, "--out", out, *([name] if name != "plain" else [])) == 0
    plain, other = (load_file(out / "concept.safetensors") for out in runs.values())
    for name in plain:
        torch.testing.assert_close(plain[name], other[name], rtol=0, atol=1e-5)


def test_sigterm_saves_first(options, program, interrupted, tmp_path):
    with interrupted(train_concept, 2, signal.SIGTERM):
        assert program(train_concept, *options, "--save-every", 50, "--steps", 3, "--out", tmp_path / "run") == 130
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["step"] == 2


TWO = """
import sys
import train_concept
sys.argv = {command}
train_concept.main()
"""


def test_two_processes_are_one_with_twice_the_batch(options, program, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run = [*options, "--steps", 2]
    assert program(train_concept, *run, "--batch-size", 2, "--out", one) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["train_concept.py", *map(str, run), "--batch-size", "1", "--out", str(two)]
    processes = [subprocess.Popen(
        [sys.executable, "-c", TWO.format(command=command)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                          "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}) for rank in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    assert (lines_of(one)[1]["loss"], lines_of(one)[1]["gate"]) == pytest.approx(
        (lines_of(two)[1]["loss"], lines_of(two)[1]["gate"]), rel=1e-4)
    ours, theirs = (load_file(out / "concept.safetensors") for out in (one, two))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-4)


def test_what_a_sample_is_depends_on_its_number_alone():
    picture = cut_out(disc("red", alpha=True))
    assert augmented(picture, 0, 5) == augmented(picture, 0, 5)
    assert len({augmented(picture, seed, number).tobytes() for seed in (0, 1) for number in range(4)}) == 8


@pytest.mark.parametrize(("change", "words"), [
    ({"metadata": '{"file_name": "0.png", "text": "a photo of a person"}'}, "no 'sks' among the words"),
    ({"metadata": '{"file_name": "9.png", "text": "a sks"}'}, "row 1: '9.png' is not in"),
    ({"metadata": '{"file_name": "../0.png", "text": "a sks"}'}, "leads out of"),
    ({"metadata": '{"file_name": "0.png", "text": "a sks", "mask": 3}'}, "mask is 3"),
    ({"metadata": ""}, "no picture in it"),
    ({"metadata": None}, "metadata.jsonl: not there"),
    ({"dtype": "float16"}, "small gradients vanish"),
    ({"clip": "nowhere"}, "nowhere"),
])
def test_what_cannot_be_trained_on_is_one_line(change, words, options, images, program, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "0.png").write_bytes((images / "0.png").read_bytes())
    if change.get("metadata") is not None:
        (folder / "metadata.jsonl").write_text(change["metadata"])
    given = {"images": folder if "metadata" in change else images, **change}
    more = [part for name, value in given.items() if name != "metadata" for part in (f"--{name}", value)]
    assert program(train_concept, *options, *more, "--steps", 1, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1


def test_pictures_that_cannot_be_trained_on_are_all_named_at_once(options, images, program, tmp_path, capsys):
    """Before the run begins: once it has, its pictures may not change."""
    folder = shutil.copytree(images, tmp_path / "images")
    Image.new("L", (48, 48)).save(folder / "0-mask.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    run = [*options, "--images", folder, "--steps", 1, "--out", tmp_path / "run"]
    assert program(train_concept, *run) == 2 and not (tmp_path / "run").exists()
    *named, last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train_concept.py")]
    assert "0-mask.png: its alpha channel keeps 0.0% of it" in named[0] and "3.png: not a readable" in named[1]
    assert "2 of 5 pictures of" in last and "metadata.jsonl" in last
    shutil.copytree(images, folder, dirs_exist_ok=True)
    assert program(train_concept, *run) == 0


def test_a_mask_of_another_size_is_named(images):
    one = read_concept_images(images)[0]
    other = type(one)(one.text, one.file, images / "m.png")
    Image.new("L", (8, 8), 255).save(images / "m.png")
    with pytest.raises(UserError, match=r"m.png: 8x8, and its picture 0.png is 48x48"):
        other.subject()


def test_what_is_transparent_in_a_mask_is_not_the_person(images, tmp_path):
    """A mask that was cut out, white on nothing, is the mask of the white."""
    one = read_concept_images(images)[0]
    mask = Image.open(one.mask).convert("L")
    white = Image.new("L", mask.size, 255)
    Image.merge("RGBA", (white, white, white, mask)).save(tmp_path / "mask.png")
    other = type(one)(one.text, one.file, tmp_path / "mask.png")
    assert other.subject().tobytes() == one.subject().tobytes()


# Drawing and judging

def drawn(out: Path) -> list[np.ndarray]:
    return [np.asarray(open_picture(path)) for path in sorted(out.glob("0*.png"))]


@pytest.fixture
def draw(tiny, program, tmp_path):
    def draw(name: str, *more, code: int = 0) -> Path:
        arguments = ["--model", tiny, "--device", "cpu", "--steps", 3, "--out", tmp_path / name, *more]
        assert program(generate, *arguments) == code
        return tmp_path / name
    return draw


def test_generate_draws_a_person(concept_file, draw, tmp_path, tiny, capsys):
    """The picture depends on the person; at strength 0 it is the base's, bit for bit; beside a LoRA, and with LAN."""
    disc("red", alpha=True).save(tmp_path / "red.png")
    disc("lime", alpha=True).save(tmp_path / "lime.png")
    prompt = ["--prompt", PROMPT, "--num-images", 2]
    concept = [*prompt, "--concept", concept_file, "--concept-image", tmp_path / "red.png"]
    base, red = draw("base", *prompt), draw("red", *concept)
    off = draw("off", *concept, "--concept-strength", 0)
    lime = draw("lime", *concept[:-1], tmp_path / "lime.png")
    assert [np.array_equal(*two) for two in zip(drawn(base), drawn(off))] == [True, True]
    for other in (base, lime):
        assert not any(np.array_equal(*two) for two in zip(drawn(red), drawn(other)))
    assert "Concept strength: 0.3" in Image.open(red / "00000.png").info["parameters"]
    listed = json.loads((red / "images.jsonl").read_text().splitlines()[0])
    assert listed["caption"] == "a photo of a person on a beach" and listed["concept_images"] == [
        str(tmp_path / "red.png")]
    pipeline = load_pipeline(tiny)
    torch.manual_seed(1)
    inject_lora(pipeline.unet, 2, 2.0)
    for layer in lora_layers(pipeline.unet).values():
        nn.init.normal_(layer.lora_B["default"], std=0.1)
    save_lora(tmp_path / "lora.safetensors", pipeline.unet)
    lora = draw("lora", *concept, "--lora", tmp_path / "lora.safetensors")
    lan = draw("lan", *concept, "--lora", tmp_path / "lora.safetensors", "--lan")
    assert not np.array_equal(drawn(red)[0], drawn(lora)[0]) and not np.array_equal(drawn(lora)[0], drawn(lan)[0])
    disc("blue", alpha=True).save(tmp_path / "red.png")        # an input that changed under its name
    draw("red", *concept, code=2)
    assert "--concept-image has other contents than when this was begun" in capsys.readouterr().err


def test_people_of_a_list(concept_file, draw, tmp_path):
    """Each prompt with the pictures of its own person, be they more or fewer: as when each is drawn alone."""
    for colour in ("red", "lime"):
        disc(colour, alpha=True).save(tmp_path / f"{colour}.png")
    rows = [{"prompt": PROMPT, "concept_images": ["red.png"], "caption": "a red one"},
            {"prompt": PROMPT, "concept_images": ["red.png", "lime.png"]},
            {"prompt": PROMPT, "concept_images": ["lime.png"]}]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = draw("list", "--concept", concept_file, "--prompts", tmp_path / "people.jsonl", "--batch-size", 3)
    pictures = drawn(out)
    for i, row in enumerate(rows):
        alone = draw(f"alone{i}", "--concept", concept_file, "--prompt", PROMPT, "--seed", i, "--concept-image",
                     *(tmp_path / name for name in row["concept_images"]))
        assert np.abs(drawn(alone)[0].astype(int) - pictures[i]).max() <= 1
    captions = [json.loads(line)["caption"] for line in (out / "images.jsonl").read_text().splitlines()]
    assert captions == ["a red one", *["a photo of a person on a beach"] * 2]


@pytest.mark.parametrize(("more", "words"), [
    (["--concept", "FILE"], "no picture of a person; give --concept-image"),
    (["--concept", "FILE", "--concept-image", "none.png"], "none.png: no such picture"),
    (["--concept", "FILE", "--concept-image", "clear.png"], "clear.png: its alpha channel keeps 0.0%"),
    (["--concept", "none", "--concept-image", "red.png"], "none: no such concept file"),
    (["--concept-image", "red.png"], "go with --concept FILE"),
    (["--concept", "FILE", "--concept-image", "red.png", "--best-of", 2], "--concept goes without --best-of"),
    (["--concept", "FILE", "--concept-image", "red.png", "--prompt-weights", "a1111"], "goes without --prompt-weights"),
    (["--concept", "FILE", "--concept-image", "red.png", "--prompt", "a person"], "no 'sks' among the words"),
    (["--concept", "FILE", "--concept-image", "red.png", "--concept-strength", -1], "must be a number of at least 0"),
])
def test_what_cannot_be_drawn_is_one_line(more, words, concept_file, draw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    disc("red", alpha=True).save("red.png")
    Image.new("RGBA", (40, 40)).save("clear.png")
    draw("out", "--prompt", PROMPT, *(concept_file if part == "FILE" else part for part in more), code=2)
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "00000.png").exists()


def test_faces_are_cut_out_by_their_landmarks(tmp_path):
    """Of the drawn pictures and of the concept's, where landmarks.jsonl beside them tells; else they are faces."""
    class Sizes(FaceDistance):
        size = 112

        def __init__(self):
            self.seen = []

        def __call__(self, pictures, concept_pictures):
            self.seen.append([picture.size for picture in (*pictures, *concept_pictures)])
            return torch.full((len(pictures),), 0.25)

    points = [[10, 10], [20, 10], [15, 16], [11, 21], [19, 21]]
    for name in ("drawn", "concept"):
        (tmp_path / name).mkdir()
        disc("red").save(tmp_path / name / "a.png")
        disc("red", size=112).save(tmp_path / name / "b.png")
        (tmp_path / name / "landmarks.jsonl").write_text(json.dumps({"file": "a.png", "landmarks": points}) + "\n")
    distance, concept = Sizes(), [str(tmp_path / "concept" / name) for name in ("a.png", "b.png")]
    files = [tmp_path / "drawn" / name for name in ("a.png", "b.png")]
    people = [(file, concept) for file in files]
    with files_read() as read:
        judge = judge_identity(distance, people)
    assert judge([open_picture(file) for file in files], people).tolist() == [-0.25, -0.25]
    assert distance.seen == [[(112, 112)] * 4]
    assert read == {*map(Path, concept), *(tmp_path / name / "landmarks.jsonl" for name in ("drawn", "concept"))}


def test_a_caption_stands_in_for_a_prompt_of_people_alone(tmp_path):
    """A list of one's own may have captions that mean something else."""
    rows = [{"file": "a.png", "prompt": "a sks person", "caption": "a person", "concept_images": ["b.png"]},
            {"file": "c.png", "prompt": "a cat", "caption": "IMG_1"}]
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["prompt"] for row in read_captions(tmp_path / "images.jsonl")] == ["a person", "a cat"]


def test_jobs_that_ask_different_judges_do_not_mix(tmp_path):
    """The judge's file changed between two jobs' starts, before either had an answer."""
    write_manifest(tmp_path / "evaluation.json", {}, {}, sides={}, judges={})
    row = {"file": "a.png", "prompt": "a"}

    def judge(images, prompts):
        note_judge(tmp_path, ["baseline"], "mine", "of the other job")
        return [1.0]
    with pytest.raises(UserError, match="another job asks another mine"):
        measure(tmp_path, ["baseline"], [[row]], lambda side, row: disc("red"), {"mine": lambda: judge}, "0-of-2",
                lambda items, *_: items)
    assert not (tmp_path / "partial").exists()


def test_who_has_said_nothing_yet_may_change(tmp_path):
    """Landmarks that come after a first try, say; who has judged may not."""
    write_manifest(tmp_path / "evaluation.json", {}, {}, sides={}, judges={})
    for digest in ("without landmarks", "with them"):
        note_judge(tmp_path, ["baseline"], "identity:arcface", digest)
    (tmp_path / "scores-baseline.jsonl").write_text('{"file": "a.png", "identity:arcface": -0.5}\n')
    note_judge(tmp_path, ["baseline"], "identity:arcface", "with them")
    with pytest.raises(UserError, match="identity:arcface has changed since"):
        note_judge(tmp_path, ["baseline"], "identity:arcface", "with others")


def test_evaluate_judges_people(concept_file, tiny, tiny_scorer, program, draw, tmp_path, capsys):
    """Scorers read the caption, identity judges the concept's pictures; folders that generate.py wrote bring both."""
    disc("red", alpha=True).save(tmp_path / "red.png")
    own = tmp_path / "own.py"
    own.write_text("def told(images, prompts):\n    return [float(len(prompt)) for prompt in prompts]\n")
    scorers = f"{own}:told,identity:paper-people"
    concept = ["--concept", concept_file, "--concept-image", tmp_path / "red.png", "--concept-strength", 1]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPT + "\n")
    common = ["--model", tiny, "--device", "cpu", "--steps", 3, "--scorers", scorers]
    pipeline = load_pipeline(tiny)
    inject_lora(pipeline.unet, 2, 2.0)
    save_lora(tmp_path / "lora.safetensors", pipeline.unet)
    assert program(evaluate, *common, "--prompts", prompts, "--num-images", 2, *concept, "--lora",
                   tmp_path / "lora.safetensors", "--out", tmp_path / "eval") == 0
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert report["candidates"]["candidate"]["win_rate"]["identity:paper-people"]["ties"] == 2   # the LoRA does nothing
    line = json.loads((tmp_path / "eval" / "scores-candidate.jsonl").read_text().splitlines()[0])
    assert -1 <= line["identity:paper-people"] < 0 and line[f"{own}:told"] == 30
    with_person = draw("with", "--prompt", PROMPT, *concept)
    assert program(evaluate, *common, "--candidate", with_person, "--baseline", with_person, "--out",
                   tmp_path / "folders") == 0
    assert program(score, "--images", with_person, "--scorers", f"{own}:told", "--out", tmp_path / "scores.jsonl") == 0
    scored = json.loads((tmp_path / "scores.jsonl").read_text())
    assert scored["prompt"] == "a photo of a person on a beach" and scored["scores"] == {f"{own}:told": 30}
    pairs = read_study(tmp_path / "folders", None).pairs                         # whom people are asked about
    assert [prompt for prompt, *_ in pairs] == ["a photo of a person on a beach"]

    disc("blue", alpha=True).save(tmp_path / "red.png")
    capsys.readouterr()
    again = ["--candidate", with_person, "--baseline", with_person, "--out", tmp_path / "folders"]
    assert program(evaluate, *common, *again) == 2
    assert "identity:paper-people has changed since" in capsys.readouterr().err
    stronger = draw("stronger", "--prompt", PROMPT, *concept[:-1], 0.5)
    without = draw("without", "--prompt", PROMPT)
    program(evaluate, *common, "--candidate", stronger, "--baseline", with_person, "--out", tmp_path / "unlike")
    assert "Concept strength is 1 (baseline) and 0.5 (candidate)" in capsys.readouterr().err
    assert program(evaluate, *common, "--candidate", without, "--baseline", without, "--out", tmp_path / "no") == 2
    assert "was drawn without a concept" in capsys.readouterr().err


# The one that ships

def test_the_shipped_concept_draws_the_person(program, tmp_path):
    """Of eight prompts, each with a person in other clothes and another place: what is drawn is nearer to the person
    than without the concept, and nearer than to the next prompt's person; and the prompt does not tell who it is."""
    people = tmp_path / "people"
    assert program(concept_pictures, "--out", people, "--count", 2, "--people", 8) == 0
    rows = [json.loads(line) for line in (people / "test" / "subjects.jsonl").read_text().splitlines()]
    assert not {"man", "woman", *world.HAIR} & set(" ".join(row["prompt"].split(",")[0] for row in rows).split())
    train, _ = read_concept_images(people / "train")
    assert "x hair" in train.text and train.subject().size[0] < 40
    pipeline = load_pipeline("paper-people")
    pipeline.concept = load_concept(concept_pictures.CONCEPT, pipeline, 0.3)
    files = [[people / "test" / name for name in row["concept_images"]] for row in rows]
    persons = [pipeline.concept.look([open_picture(file, keep_alpha=True) for file in some]) for some in files]
    drawing, prompts, seeds = Drawing(steps=8).for_model(pipeline), [row["prompt"] for row in rows], list(range(8))
    with_person = [image for _, image in draw_people(pipeline, drawing, prompts, seeds, persons)]
    without = [image for _, image in draw_pictures(pipeline, drawing, prompts, seeds)]
    distance = load_identity("paper-people")
    shown = [[open_picture(file, keep_alpha=True).convert("RGB") for file in some] for some in files]

    def mean(pictures: list[Image.Image], concepts: list) -> float:
        return sum(distance([picture], concept).item() for picture, concept in zip(pictures, concepts)) / 8
    assert mean(with_person, shown) < mean(without, shown) - 0.1
    assert mean(with_person, shown) < mean(with_person, shown[1:] + shown[:1]) - 0.1
