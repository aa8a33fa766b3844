"""evaluate.py from outside: whose pictures win, by how much, what is written, and how it goes on and ends."""

import base64
import colorsys
import io
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

import cli
import evaluate
import generate
from dataset.folder import locked
from evaluation import report
from evaluation import sides as side_room
from evaluation.statistics import colour_shift, colours, spread, wilson, win_rate
from model.checkpoint import load_pipeline
from model.lora import inject_lora, lora_layers, save_lora
from model.scorers import load_scorer
from pictures import curves
from sampling import encode_prompts, seeded

PROMPTS = [
    "a photo of a cat", 'two birds </script><img src=x onerror="alert(1)"> & <b>', "8k, {a} woman", "a\u2028tree", "雨"]
FEW = ["--steps", 3, "--batch-size", 2]


# The statistics

def test_win_rate_by_hand():
    rate = win_rate([1.0] * 157 + [0.0] * 20, [0.0] * 157 + [1.0] * 20)
    assert (rate["wins"], rate["ties"], rate["losses"]) == (157, 0, 20)
    assert round(rate["percent"], 2) == 88.70 == round(100 * 157 / 177, 2)       # the paper's 88.70
    # HPS has 12 ties in the paper's evaluation of 177, and 158 of the 176 decided: 89.77.
    rate = win_rate([2.0] * 158 + [1.0] * 18 + [5.0], [1.0] * 158 + [2.0] * 18 + [5.0])
    assert (rate["wins"], rate["ties"], rate["losses"]) == (158, 1, 18) and round(rate["percent"], 2) == 89.77
    assert rate["percent_ties_half"] == 100 * 158.5 / 177
    assert win_rate([1.0, 2.0], [1.0, 2.0]) == {
        "wins": 0, "ties": 2, "losses": 0, "percent": None, "percent_ties_half": 50.0, "ci95": [0.0, 100.0]}


@pytest.mark.parametrize("wins, n", [(157, 177), (1, 3), (50, 100), (0, 8), (8, 8)])
def test_wilson_bounds_are_the_shares_just_1_96_deviations_away(wins, n):
    for bound in wilson(wins, n):
        assert 0 <= bound <= 1
        if 0 < bound < 1:
            assert abs(wins / n - bound) / math.sqrt(bound * (1 - bound) / n) == pytest.approx(1.959964, rel=1e-6)
    low, high = wilson(wins, n)
    assert low <= wins / n <= high and (low == pytest.approx(0, abs=1e-12)) == (wins == 0)


def test_colours_are_colorsys():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    pixels[0] = [[0, 0, 0], [255, 255, 255], [90, 90, 90], [255, 0, 0], [0, 255, 255], [200, 200, 10], [3, 3, 200]]
    hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in pixels.reshape(-1, 3) / 255])
    found = colours(Image.fromarray(pixels))
    assert [found[name] for name in ("hue", "saturation", "value")] == pytest.approx(hsv.mean(axis=0), abs=1e-12)
    assert found["hue_x"] == pytest.approx(np.cos(2 * np.pi * hsv[:, 0]).mean(), abs=1e-12)
    assert [found[name] for name in ("red", "green", "blue")] == pytest.approx(pixels.mean(axis=(0, 1)) / 255)


def test_colour_shift_by_hand():
    def flat(*rgb):
        return colours(Image.new("RGB", (8, 4), rgb))

    # From dark orange (30 degrees) to pure yellow (60 degrees): twice the hue, the same saturation, more value.
    shift = colour_shift([flat(255, 255, 0)], [flat(200, 100, 0)])
    assert shift["hue"] == pytest.approx(100) and shift["saturation"] == pytest.approx(0)
    assert shift["value"] == pytest.approx(27.5) and shift["hue_degrees"] == pytest.approx(30)
    assert shift["rgb"] == pytest.approx([55, 155, 0])
    # Over the end of the circle the arithmetic mean says -97 %, the angle 20 degrees.
    shift = colour_shift([flat(255, 42, 0)] * 2, [flat(255, 0, 42)] * 2)
    assert shift["hue"] < -95 and shift["hue_degrees"] == pytest.approx(20, abs=0.5)
    # Means are over all pictures; grey has no hue to change from.
    shift = colour_shift([flat(0, 0, 0), flat(100, 100, 100)], [flat(50, 50, 50), flat(0, 0, 0)])
    assert shift["hue"] is None and shift["saturation"] is None and shift["value"] == pytest.approx(100)


def test_spread_by_hand():
    e = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]])
    assert spread(e, ["a", "a", "a", "b"]).tolist() == [1.5, 1.0, 1.5, 0.0]


# The program

@pytest.fixture
def run(tiny, tmp_path, monkeypatch, capsys):
    def run(*args, out="eval", model=tiny, code=0, main=evaluate.main):
        """Calls a program as the command line does -> its folder, its stdout and stderr."""
        argv = ["program.py", "--device", "cpu", "--out", tmp_path / out, *(["--model", model] if model else []), *args]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)       # cli.run has its own
        capsys.readouterr()
        if code:
            with pytest.raises(SystemExit) as ended:
                cli.run(main)
            assert ended.value.code == code
        else:
            cli.run(main)
        return tmp_path / out, *capsys.readouterr()
    return run


@pytest.fixture(scope="module")
def loras(tiny, tmp_path_factory):
    """Two LoRAs that change the pictures."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("a", "b")):
        unet = load_pipeline(tiny).unet
        inject_lora(unet, generator=torch.Generator().manual_seed(seed))
        for i, layer in enumerate(lora_layers(unet).values()):
            nn.init.normal_(layer.lora_B["default"], std=0.3, generator=torch.Generator().manual_seed(100 * seed + i))
        save_lora(folder / f"{name}.safetensors", unet)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory, tokenizer_folder):
    """A tiny random scorer, as transformers writes it."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tower = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
    CLIPModel(CLIPConfig(
        text_config=dict(tower, vocab_size=49408, eos_token_id=49407),
        vision_config=dict(tower, image_size=28, patch_size=7), projection_dim=20)).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def red(tmp_path_factory):
    """A scorer of one's own: the mean red."""
    path = tmp_path_factory.mktemp("own") / "red.py"
    path.write_text(
        "import numpy as np\nclass Red:\n    def __init__(self, device): pass\n"
        "    def __call__(self, images, prompts):\n"
        "        return [float(np.asarray(image.convert('RGB'))[..., 0].mean()) for image in images]\n")
    return f"{path}:Red"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def contents(out):
    """Every file that is not hidden, by its bytes."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and path.name[0] != "."}


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_a_candidate_against_the_bare_model(run, loras, clip, red, prompts):
    lora = f"{loras / 'a.safetensors'}:0.7"
    options = ["--prompts", prompts, "--seed", 5, *FEW]
    out, stdout, stderr = run("--lora", lora, "--scorers", f"{clip},{red}", *options)
    found = read(out / "report.json")

    # Both sides are what generate.py draws.
    for name, more in (("baseline", []), ("candidate", ["--lora", lora])):
        drawn, *_ = run(*options, *more, out=f"drawn-{name}", main=generate.main)
        for n in range(5):
            assert np.abs(pixels(drawn / f"{n:05d}.png") - pixels(out / "images" / name / f"{n:05d}.png")).max() <= 1
        text = Image.open(out / "images" / name / "00001.png").text["parameters"]
        assert text == Image.open(drawn / "00001.png").text["parameters"] and ("LoRA: " in text) == bool(more)
        assert lines(out / "images" / name / "images.jsonl") == lines(drawn / "images.jsonl")

    page = np.asarray(Image.open(out / "sheet.png").convert("RGB"), dtype=int)      # a column a prompt, base on top
    base, tuned = (pixels(out / "images" / name / "00000.png") for name in ("baseline", "candidate"))
    scale = 192 // len(base)
    assert np.array_equal(page[8:200:scale, 8:200:scale][:len(base)], base) and not np.array_equal(base, tuned)

    # The report says what the scorers say of these pictures.
    pictures = {side: [Image.open(out / "images" / side / f"{n:05d}.png") for n in range(5)] for side in found["sides"]}
    for name in (str(clip), red):
        scorer = load_scorer(name)
        said = {side: scorer(images, PROMPTS).tolist() for side, images in pictures.items()}
        wins = sum(c > b for c, b in zip(said["candidate"], said["baseline"]))
        rate = found["win_rate"][name]
        assert (rate["wins"], rate["ties"], rate["losses"]) == (wins, 0, 5 - wins)
        assert rate["percent"] == pytest.approx(20 * wins) == rate["percent_ties_half"] and len(rate["ci95"]) == 2
        for side in said:
            kept = [row[name] for row in lines(out / f"scores-{side}.jsonl")]
            assert kept == pytest.approx(said[side], abs=1e-4)
            assert found["mean_score"][name][side] == pytest.approx(np.mean(said[side]), abs=1e-4)
    shift = colour_shift(*([colours(image) for image in pictures[side]] for side in ("candidate", "baseline")))
    assert found["colour_shift"] == shift
    assert {*shift} == {"hue", "saturation", "value", "hue_degrees", "rgb"}
    assert found["candidates"] == {"candidate": {name: found[name] for name in ("win_rate", "colour_shift")}}
    assert found["left_out"] == [] and "diversity" not in found
    assert [row["seed"] for row in lines(out / "scores-baseline.jsonl")] == [5, 6, 7, 8, 9]
    assert "candidate  " in stdout and " % (" in stdout and "Traceback" not in stderr

    # A LoRA without weight is the base: all ties.
    nothing, stdout, _ = run(
        "--lora", lora[:-3] + "0", "--scorers", f"{clip},{red}", "--prompts", prompts, *FEW, out="nothing")
    found = read(nothing / "report.json")
    assert all(rate["ties"] == 5 and rate["percent"] is None for rate in found["win_rate"].values())
    assert found["colour_shift"] == {"hue": 0, "saturation": 0, "value": 0, "hue_degrees": 0, "rgb": [0, 0, 0]}
    assert "all tied" in stdout


def test_several_candidates_share_a_baseline_and_more_may_come(run, loras, red, prompts, monkeypatch):
    a, b = loras / "a.safetensors", loras / "b.safetensors"
    options = ["--prompts", prompts, "--limit", 2, "--scorers", red, *FEW]
    out, *_ = run("--compare", f"a={a}:0.5", *options)
    before = contents(out)
    drawn = []
    draw_side = evaluate.draw_side
    draw_pictures = side_room.draw_pictures
    monkeypatch.setattr(evaluate, "draw_side", lambda side, *more: drawn.append(side.name) or draw_side(
        side, *more))
    monkeypatch.setattr(side_room, "draw_pictures", lambda *args: drawn.append("drawn") or draw_pictures(*args))
    out, stdout, _ = run("--compare", f"a={a}:0.5,both={a}:0.5+{b},lan={a}:0.5+lan", *options)
    found = read(out / "report.json")
    assert drawn == ["baseline", "a", "both", "drawn", "lan", "drawn"]
    assert list(found["candidates"]) == ["a", "both", "lan"] and "win_rate" not in found
    assert found["sides"]["lan"].endswith("a.safetensors:0.5 + LAN") and len(stdout.splitlines()) >= 5
    after = contents(out)
    assert all(after[name] == before[name] for name in before if name.startswith("images/"))
    assert len({after[f"images/{side}/00000.png"] for side in ("baseline", "a", "both", "lan")}) == 4
    # LAN keeps the base's colours (in latents; in pixels, nearly).
    shifts = {name: found["candidates"][name]["colour_shift"]["rgb"] for name in ("a", "lan")}
    assert np.abs(shifts["lan"]).sum() < np.abs(shifts["a"]).sum()

    (again := loras / "changed.safetensors").write_bytes(b.read_bytes())
    run("--compare", f"x={again}", *options)
    again.write_bytes(a.read_bytes())
    *_, stderr = run("--compare", f"x={again}", *options, code=2)
    assert "with other contents; choose another --out" in stderr
    *_, stderr = run("--compare", f"a={a}:0.6", *options, code=2)
    assert "a.safetensors:0.5, and now it is" in stderr and stderr.count("\n") == 1


def test_what_changed_under_its_name_is_refused(run, tiny, clip, prompts, tmp_path):
    """A model that was trained on, and a scorer that was edited: pictures and scores that are there are of the old."""
    model, own, kept = tmp_path / "model", tmp_path / "own.py", tmp_path / "scorer"
    shutil.copytree(tiny, model)
    shutil.copytree(clip, kept)
    (tmp_path / "neighbour.py").write_text("VALUE = 1.0\n")
    own.write_text("import neighbour\ndef score(images, prompts):\n    return [neighbour.VALUE] * len(images)\n")
    options = ["--candidate", model, "--prompts", prompts, "--limit", 1, "--scorers", f"{own}:score,{kept}", *FEW]
    out, *_ = run(*options)
    before = contents(out)
    for path, words in (
            (model / "unet" / "diffusion_pytorch_model.safetensors", "its candidate is"),
            (own, "own.py:score has changed"), (tmp_path / "neighbour.py", "own.py:score has changed"),
            (kept / "model.safetensors", f"{kept} has changed")):
        content = path.read_bytes()
        if path.suffix == ".py":
            path.write_bytes(content + b"\n")
        else:
            save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
        *_, stderr = run(*options, code=2)
        assert words in stderr and "choose another --out" in stderr and contents(out) == before
        path.write_bytes(content)
    run(*options)
    assert contents(out) == before


def test_folders_that_were_not_drawn_alike_are_told(run, red, prompts):
    """What a sampler and a guidance do is not the candidate's doing: it is said, here and in the report."""
    one, *_ = run("--prompts", prompts, "--limit", 2, *FEW, out="one", main=generate.main)
    two, *_ = run("--prompts", prompts, "--limit", 2, *FEW, "--sampler", "ddim", "--guidance", 1, "--negative-prompt",
                  "x, y", out="two", main=generate.main)
    out, _, stderr = run("--candidate", two, "--baseline", one, "--scorers", red, "--seed", 0)
    told = ["Sampler is DPM++ 2M (baseline) and DDIM (candidate)", "CFG scale is 5 (baseline) and 1 (candidate)",
            "Negative prompt is the default (baseline) and x, y (candidate)"]
    assert read(out / "report.json")["not_drawn_alike"] == told
    assert [line for line in stderr.splitlines() if "alike" in line] == [
        f"not drawn alike: {line}; this is judged, too" for line in told]
    assert all(line in (out / "report.html").read_text() for line in told)
    out, _, stderr = run("--candidate", one, "--scorers", red, *FEW, out="c")
    assert "not_drawn_alike" not in read(out / "report.json") and "alike" not in stderr
    out, _, stderr = run("--candidate", one, "--scorers", red, "--steps", 4, out="d")
    assert "Steps is 4 (baseline) and 3 (candidate)" in stderr


def test_fid_is_of_the_pictures_that_are_judged(run, red, prompts, monkeypatch, tmp_path):
    """Not of the sheet, nor of older pictures, nor of those beyond --limit."""
    drawn, *_ = run("--prompts", prompts, *FEW, out="drawn", main=generate.main)
    shutil.copy(drawn / "00000.png", drawn / "stale.png")
    seen = []

    def calculate_metrics(input1, input2, **_):
        seen.append(sorted(path.read_bytes() for path in Path(input1).iterdir()))
        return {"frechet_inception_distance": 1.0}
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(
        calculate_metrics=calculate_metrics, __spec__=object()))
    (tmp_path / "real").mkdir()
    run("--candidate", drawn, "--limit", 2, "--scorers", red, "--fid", tmp_path / "real", *FEW)
    assert seen[1] == sorted((drawn / f"0000{n}.png").read_bytes() for n in range(2)) and len(seen[0]) == 2


class Killed(BaseException):
    pass


def test_killed_at_any_moment_it_goes_on_to_the_same_end(run, loras, clip, red, prompts, monkeypatch):
    options = ["--lora", loras / "a.safetensors", "--num-images", 2, "--limit", 3, "--prompts", prompts,
               "--scorers", f"{clip},{red}", *FEW]
    whole, *_ = run(*options, out="whole")

    def die_at(module, name, number):
        """The `number`th call of a function ends the process; what it was about to do is not done."""
        calls, function = [], getattr(module, name)

        def counted(*args, **kwargs):
            calls.append(args)
            if len(calls) == number:
                raise Killed
            return function(*args, **kwargs)
        monkeypatch.setattr(module, name, counted)
        return lambda: monkeypatch.setattr(module, name, function)

    drawn = []
    for module, name, number in (
            (side_room, "write_png", 4), (side_room, "write_png", 5), (evaluate, "open_picture", 9),
            (evaluate, "open_picture", 8), (evaluate, "page", 1)):
        undo = die_at(module, name, number)
        with pytest.raises(Killed):
            run(*options)
        undo()
        drawn.append(len(list((whole.parent / "eval").glob("images/*/*.png"))))
    partial = whole.parent / "eval" / "partial"
    assert drawn == [3, 7, 12, 12, 12] and not partial.exists()                  # 12 pictures, none twice
    (whole.parent / "eval" / "images" / "candidate" / ".00001.png.1.part").touch()         # as a kill leaves it
    out, *_ = run(*options)
    assert contents(out) == contents(whole) and not list(out.rglob("*.part"))

    # The end of a line that a kill cut off does not matter, nor does a scorer that is added later.
    partial.mkdir()
    (partial / "baseline.0-of-1.jsonl").write_text('{"file": "00000.png", "judge')
    judged = len(lines(out / "scores-baseline.jsonl"))
    out, *_ = run(*options[:-6], "--scorers", red, *FEW)
    assert judged == 6 and list(read(out / "report.json")["win_rate"]) == [red]
    out, *_ = run(*options)
    assert contents(out) == contents(whole)

    shutil.rmtree(out)
    for shard in ("1/2", "0/2"):
        out, stdout, _ = run(*options, "--shard", shard)
        assert ("the others' are not" in stdout) == (shard == "1/2")
    assert contents(out) == contents(whole)
    *_, stderr = run(*options, "--shard", "2/2", code=2)
    assert "must be I/N" in stderr

    for option, value in (("--steps", 4), ("--num-images", 1)):
        *_, stderr = run(*options, option, value, code=2)
        assert f"begun with {option} " in stderr and stderr.count("\n") == 1
    prompts.write_text("another\n" * 3)
    *_, stderr = run(*options, code=2)
    assert "--prompts has other contents" in stderr
    with locked(out):
        *_, stderr = run(*options, code=2)
    assert "another process" in stderr
    (whole.parent / "full").mkdir()
    (whole.parent / "full" / "thesis.txt").write_text("mine")
    *_, stderr = run(*options, out="full", code=2)
    assert "holds other files" in stderr


def test_diversity_is_the_mean_distance_of_a_prompts_pictures(run, loras, clip, prompts):
    out, *_ = run("--lora", loras / "a.safetensors", "--num-images", 3, "--limit", 2, "--prompts", prompts,
                  "--scorers", clip, *FEW)
    model, processor = CLIPModel.from_pretrained(clip), CLIPImageProcessor.from_pretrained(clip)
    for side, value in read(out / "report.json")["diversity"].items():
        images = [Image.open(out / "images" / side / f"{n:05d}.png") for n in range(6)]
        with torch.no_grad():
            vision = model.vision_model(processor(images, return_tensors="pt").pixel_values)
            e = nn.functional.normalize(model.visual_projection(vision.pooler_output), dim=1)
        pairs = [(i, j) for k in (0, 3) for i in range(k, k + 3) for j in range(i + 1, k + 3)]
        assert value == pytest.approx(np.mean([1 - (e[i] @ e[j]).item() for i, j in pairs]), rel=1e-3) and value > 1e-6


# Folders of pictures

def save_folder(folder, images, seeds=None, prompts=PROMPTS):
    folder.mkdir()
    for n, image in enumerate(images):
        image.save(folder / f"{n:05d}.png")
    rows = [{"file": f"{n:05d}.png", "prompt": prompt, "seed": n if seeds is None else seeds[n]}
            for n, prompt in enumerate(prompts[:len(images)])]
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def greys(*levels, size=(16, 24)):
    return [Image.new("RGB", size, (level,) * 3) for level in levels]


def test_folders_of_pictures_and_what_is_wrong_with_them(run, tmp_path, red):
    base = save_folder(tmp_path / "base", greys(50, 60, 70, 80, 90))
    tuned = save_folder(tmp_path / "tuned", greys(55, 60, 69, 90, 99))
    sides = ["--candidate", tuned, "--baseline", base, "--scorers", red]
    out, *_ = run(*sides, model=None)
    rate = read(out / "report.json")["win_rate"][red]
    assert (rate["wins"], rate["ties"], rate["losses"]) == (3, 1, 1) and rate["percent"] == 75.0
    assert read(out / "report.json")["settings"] == {"height": 24, "width": 16}
    assert not (out / "images").exists()

    # A picture that was drawn anew must be judged anew.
    shutil.copy(tuned / "00001.png", tuned / "00000.png")
    *_, stderr = run(*sides, model=None, code=2)
    assert "other contents" in stderr

    # What cannot be read is named, a line each; the rest is judged.
    broken = shutil.copytree(tuned, tmp_path / "broken")
    (broken / "00003.png").write_bytes((broken / "00003.png").read_bytes()[:60])
    Image.new("RGB", (50_000, 2)).save(broken / "00004.png")
    args = ["--candidate", broken, *sides[2:4], "--scorers", f"{red},clip:{tmp_path / 'none'},nobody/knows.py:It"]
    out, stdout, stderr = run(*args, model=None, out="broken out", code=2)
    for part in ("00003.png", "00004.png: 50000x2", "clip:", "knows.py:It is left out"):
        assert len([line for line in stderr.splitlines() if part in line and "program.py: " in line]) == 1, part
    found = read(out / "report.json")
    assert found["pictures"] == 3 and list(found["win_rate"]) == [red] and len(found["left_out"]) == 4
    assert "00003.png" in (out / "report.html").read_text() and "75.0 %" not in stdout

    def refused(candidate, *more):
        *_, stderr = run("--candidate", candidate, *sides[2:], *more, model=None, out="refused", code=2)
        assert stderr.count("\n") == 1
        return stderr

    assert "pictures of 24x24, where" in refused(save_folder(tmp_path / "size", greys(1, 2, 3, 4, 5, size=(24, 24))))
    assert "the seed 7, where" in refused(save_folder(tmp_path / "seeds", greys(1, 2, 3, 4, 5), seeds=[7, 1, 2, 3, 4]))
    assert "4 pictures, where" in refused(save_folder(tmp_path / "few", greys(1, 2, 3, 4)))
    (tmp_path / "few" / "00003.png").unlink()
    assert "4 pictures in images.jsonl; 1 are not there (00003.png" in refused(tmp_path / "few")
    outside = save_folder(tmp_path / "outside", greys(1))
    (outside / "images.jsonl").write_text('{"file": "../base/00000.png", "prompt": "a", "seed": 0}\n')
    assert "lies outside the folder" in refused(outside)
    for more, words in (({"seed": 2**64}, "seed is 18446744073709551616; a whole number"),
                        ({"seed": 0, "concept_images": [5]}, "concept_images is [5]; a list of pictures")):
        (outside / "images.jsonl").write_text(json.dumps({"file": "00000.png", "prompt": "a", **more}) + "\n")
        assert words in refused(outside)
    (outside / "01.png").symlink_to(tmp_path / "few" / "00001.png")
    (outside / "images.jsonl").write_text('{"file": "01.png", "prompt": "a", "seed": 0}\n')
    assert "'01.png' lies outside the folder, or is a link to there" in refused(outside)
    (outside / "inner").mkdir()                # a study would copy pictures of one name over each other
    (outside / "00000.png").rename(outside / "inner" / "00000.png")
    (outside / "images.jsonl").write_text('{"file": "inner/00000.png", "prompt": "a", "seed": 0}\n')
    assert "lies in a folder of its own" in refused(outside)
    assert "--width 512" in refused(tuned, "--width", 512)
    assert "--prompts" in refused(tuned, "--prompts", "prompts.txt")
    assert "a LoRA comes too late" in refused(f"{tuned}+a.safetensors")


# Preferences

def test_preference_accuracy_of_scorers(run, tmp_path, red):
    levels = [(9, 3), (200, 100), (5, 5), (20, 90), (61, 60)]                    # preferred, other
    rows = []
    for n, (better, worse) in enumerate(levels):
        for kind, image in zip("wl", greys(better, worse)):
            image.save(tmp_path / f"{n}{kind}.png")
        rows.append({"prompt": PROMPTS[n], "winner": f"{n}w.png", "loser": f"{n}l.png"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "4l.png").write_bytes(b"no picture")
    args = ["--preference-accuracy", tmp_path / "pairs.jsonl", "--scorers", red]
    out, stdout, stderr = run(*args, code=2)
    assert "4l.png" in stderr and stderr.count("program.py: ") == 1
    found = read(out / "report.json")
    assert found["pairs"] == 4 and found["preference_accuracy"][red] == win_rate([9, 200, 5, 20], [3, 100, 5, 90])
    assert found["preference_accuracy"][red]["percent_ties_half"] == 62.5 and "62.5 %" in stdout


@torch.no_grad()
def test_implicit_reward_is_the_difference_of_diffusers_errors(run, tiny, loras, tmp_path):
    """Of one pair, worked out with diffusers' networks and schedule, the LoRA merged by hand."""
    images = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8)) for n in (0, 1)]
    for kind, image in zip("wl", images):
        image.save(tmp_path / f"{kind}.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": PROMPTS[0], "winner": "w.png", "loser": "l.png"}))
    lora = loras / "a.safetensors"
    out, *_ = run("--preference-accuracy", tmp_path / "pairs.jsonl", "--lora", f"{lora}:0.5", "--scorers", ",")

    ours = load_pipeline(tiny)
    context = encode_prompts([PROMPTS[0]], ours.tokenizer, ours.text_encoder).expand(10, -1, -1)
    unet, vae = UNet2DConditionModel.from_pretrained(tiny / "unet"), AutoencoderKL.from_pretrained(tiny / "vae")
    tuned = UNet2DConditionModel.from_pretrained(tiny / "unet")
    ours.add_loras([f"{lora}:0.5"])
    for path, layer in lora_layers(ours.unet).items():
        A, B = layer.lora_A["lora0"], layer.lora_B["lora0"]
        tuned.get_submodule(path).weight += 0.5 * (B @ A)                         # alpha is the rank
    scheduler = DDPMScheduler.from_pretrained(tiny / "scheduler")
    rewards = []
    for side, image in zip(("preferred", "other"), images):
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        x0 = vae.encode(x).latent_dist.mean * vae.config.scaling_factor
        t, noise = draws(PROMPTS[0], x0)                                         # the same for both pictures
        x_t = scheduler.add_noise(x0.expand_as(noise), noise, t)
        errors = [(net(x_t, t, context).sample - noise).pow(2).flatten(1).mean(1) for net in (unet, tuned)]
        rewards.append((errors[0] - errors[1]).mean().item())
        found = lines(out / f"scores-{side}.jsonl")[0]["implicit-reward"]
        assert found == pytest.approx(rewards[-1], rel=1e-4, abs=1e-6)
    rate = read(out / "report.json")["preference_accuracy"]["implicit-reward"]
    assert rate["wins"] == (rewards[0] > rewards[1]) and rate["ties"] == 0
    several, *_ = run("--preference-accuracy", tmp_path / "pairs.jsonl", "--compare",          # one beside others
                      f"half={lora}:0.5,b={loras / 'b.safetensors'}", "--scorers", ",")
    line = lines(several / "scores-other.jsonl")[0]
    assert line["implicit-reward-half"] == found != line["implicit-reward-b"]


def draws(prompt, x0):
    """Ten steps, one in each tenth of the schedule, and ten noises."""
    generator = seeded(f"t and noise of the implicit reward for {prompt}", 0)
    t = ((torch.arange(10) + torch.rand(10, generator=generator)) * 100).long()
    return t, torch.randn(10, *x0.shape[1:], generator=generator)


# The page

class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag, **wanted):
        return [found for name, found in self.tags if name == tag and wanted.items() <= found.items()]


@pytest.fixture
def log(tmp_path):
    folder = tmp_path / "training"
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(
        json.dumps({"step": s, "loss": 1 / s, "dpo": 0.69 - s / 1e4, "lr": 1e-5}) + "\n" for s in range(1, 1001)))
    return folder


def reds(levels):
    return [Image.new("RGB", (16, 24), (level, 128, 60)) for level in levels]


@pytest.fixture
def a_report(run, tmp_path, red, log):
    base = save_folder(tmp_path / "base", reds([100] * 5))
    tuned = save_folder(tmp_path / "tuned", reds([110, 70, 100, 180, 90]))
    return run("--candidate", tuned, "--baseline", base, "--scorers", red, "--run", log, model=None)[0] / "report.html"


def test_the_page_holds_all_and_needs_nothing(a_report, red):
    text = a_report.read_text(encoding="utf-8")
    page = Page(text)
    images = page.all("img")
    assert len(images) == 10 and len([t for t in page.all("article") if t["id"].startswith("pair-")]) == 5
    assert not any("onerror" in attributes for _, attributes in page.tags)       # prompts are text, never tags
    assert PROMPTS[1] in page.words
    for n, attributes in enumerate(images):
        kind, data = attributes["src"].split(",")
        assert kind == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        level = [100, [110, 70, 100, 180, 90][n // 2]][n % 2]
        assert image.size == (16, 24) and image.convert("RGB").getpixel((3, 3)) == (level, 128, 60)
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?://", text)
    assert "50.0 %" in text and "2 won, 1 tied, 2 lost" in text and "step 1" in text and "Training: training" in text
    assert len(page.all("option")) == 1 + 1 + 2 and page.all("option", value=f"candidate/{red}")


def test_training_curves_of_what_is_no_number():
    log = [{"step": 1, "loss": 0.5, "dpo": 10**400, "stat": 1e308}, {"step": 2, "loss": 0.25, "dpo": 1, "stat": 1}]
    assert "loss" in report.training_curves(log) and "dpo" not in report.training_curves(log)
    pixels = [curves({"loss": values}).tobytes() for values in ([1.0, 0.0, 2.0], [1.0, math.nan, 2.0], [1, 10**400, 2])]
    assert pixels[0] == pixels[1] == pixels[2]


def test_thumbnails_are_small_and_in_shape():
    image = Image.effect_noise((704, 1024), 60).convert("RGB").resize((704, 1024))
    kind, data = report.data_uri(image, 60_000).split(",")
    thumb = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg;base64" and thumb.size == (203, 295) and len(data) < 40_000


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_browser_sorts_the_pairs(a_report, tmp_path, red):
    orders = {
        "": [0, 1, 2, 3, 4], f"#sort=candidate/{red}&first=regressions": [1, 4, 2, 0, 3],
        f"#sort=candidate/{red}&first=gains": [3, 0, 2, 4, 1], "#sort=nobody/nothing": [0, 1, 2, 3, 4]}
    for n, (place, order) in enumerate(orders.items()):
        done = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={tmp_path / f'profile-{n}'}", "--enable-logging=stderr", "--virtual-time-budget=2000",
             "--dump-dom", a_report.as_uri() + place], capture_output=True, text=True, timeout=120)
        ids = [t["id"] for t in Page(done.stdout).all("article")]
        assert ids == [f"pair-{i}" for i in order]
        assert "CONSOLE" not in done.stderr


# Bad input

@pytest.mark.parametrize("args, message", [
    ([], "nothing to judge: give one of --lora, --candidate and --compare"),
    (["--lora", "a", "--candidate", "b"], "--lora and --candidate: give one of"),
    (["--compare", "baseline=a.safetensors"], "expected NAME=LORA"),
    (["--compare", "../x=a.safetensors"], "expected NAME=LORA"),
    (["--compare", "x=a.safetensors,x=b.safetensors"], "stands for two"),
    (["--lora", "no.safetensors"], "no.safetensors: no such LoRA file"),
    (["--candidate", "{tiny}", "--lan"], "LAN needs a LoRA"),
    (["--candidate", "{tiny}", "--num-images", "0"], "--num-images 0"),
    (["--candidate", "{tiny}", "--limit", "0"], "--limit 0"),
    (["--candidate", "{tiny}", "--steps", "0"], "--steps 0"),
    (["--candidate", "{tiny}", "--run", "nowhere"], "no log.jsonl"),
    (["--candidate", "{tiny}", "--fid", "nowhere"], "no such folder"),
    (["--preference-accuracy", "no.json"], "no.json"),
    (["--preference-accuracy", "no.json", "--candidate", "x"], "--candidate: with --preference-accuracy"),
    (["--preference-accuracy", "no.json", "--baseline", "x"], "--baseline goes without --preference-accuracy"),
])
def test_bad_input_is_one_line(run, tiny, prompts, args, message):
    args = [arg.replace("{tiny}", str(tiny)) for arg in args]
    out, _, stderr = run(*args, "--prompts", prompts, code=2)
    assert message in stderr and stderr.count("\n") == 1
    assert not (out / "report.json").exists()


def test_fid_names_the_library_that_is_missing(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    *_, stderr = run("--candidate", tiny, "--fid", tmp_path, code=2)
    assert 'pip install "hg-dpo[fid]"' in stderr and stderr.count("\n") == 1
