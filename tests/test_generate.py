"""generate.py from outside: the same pictures as diffusers' pipeline, what it writes, and how it ends."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image, ImageFont
from safetensors.torch import load_file, save_file

import cli
import generate
from dataset.folder import locked
from model.checkpoint import load_pipeline
from model.errors import UserError
from model.lora import inject_lora, save_lora
from pictures import parameters, sheet, wrapped

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")       # diffusers, with a newer numpy


@pytest.fixture
def run(tiny, tmp_path, monkeypatch, capsys):
    def run(*args, out="out", model=tiny, code=0):
        """Calls the program as the command line does -> its folder, its stdout and stderr."""
        out = tmp_path / out
        argv = ["generate.py", "--model", model, "--device", "cpu", "--out", out, *args]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)       # cli.run has its own
        capsys.readouterr()
        if code:
            with pytest.raises(SystemExit) as ended:
                cli.run(generate.main)
            assert ended.value.code == code
        else:
            cli.run(generate.main)
        return out, *capsys.readouterr()
    return run


def latents(out):
    return load_file(out / "latents.safetensors")["latents"]


def rows(out):
    return [json.loads(line) for line in (out / "images.jsonl").read_text(encoding="utf-8").splitlines()]


def relative(a, b):
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


# The oracle

@functools.cache
def diffusers_pipeline(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe.scheduler.config


@torch.no_grad()
def theirs(folder, prompts, seeds, kind, negative="", clip_skip=0, changes=(), **options):
    pipe, config = diffusers_pipeline(folder)
    pipe.scheduler = kind.from_config(config, **dict(changes))
    if clip_skip:                               # their own option fails with transformers 5, and has it for one side

        def embed(texts):
            ids = pipe.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            states = pipe.text_encoder(ids.input_ids, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
            return getattr(pipe.text_encoder, "text_model", pipe.text_encoder).final_layer_norm(states)

        texts = {"prompt_embeds": embed(prompts), "negative_prompt_embeds": embed([negative] * len(prompts))}
    else:
        texts = {"prompt": prompts, "negative_prompt": [negative] * len(prompts)}
    x = pipe(**texts, **options, generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
             output_type="latent").images
    decoded = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    return x, pipe.image_processor.postprocess(decoded, output_type="pil")


@pytest.fixture(scope="module")
def tiny_official(tiny, tmp_path_factory):
    """As the official SD1.5, whose scheduler_config.json has no timestep_spacing: linspace, for DPM-Solver."""
    folder = tmp_path_factory.mktemp("official") / "official"
    shutil.copytree(tiny, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    assert config.pop("timestep_spacing") == "leading"
    path.write_text(json.dumps(config))
    return folder


DPM = DPMSolverMultistepScheduler
FEW = {"num_inference_steps": 10}
SAME_AS_DIFFUSERS = {
    "two prompts, two pictures each": (
        ["--num-images", 2, "--batch-size", 3], DPM, {"prompts": ["a cat", "a cat", "two dogs!", "two dogs!"]}),
    "negative prompt, not square": (
        ["--negative-prompt", "blurry, bad hands", "--height", 40, "--width", 56], DPM,
        {"negative": "blurry, bad hands", "height": 40, "width": 56}),
    "clip skip": (["--clip-skip", 1, "--negative-prompt", "blurry"], DPM, {"clip_skip": 1, "negative": "blurry"}),
    "no guidance": (["--guidance", 1, "--steps", 10], DPM, {"guidance_scale": 1.0, **FEW}),
    "v-prediction": (
        ["--prediction-type", "v_prediction", "--steps", 10], DPM,
        {"changes": {"prediction_type": "v_prediction"}, **FEW}),
    "ddim": (["--sampler", "ddim", "--steps", 10], DDIMScheduler, {"changes": {"clip_sample": False}, **FEW}),
    "ddpm": (["--sampler", "ddpm", "--steps", 10], DDPMScheduler, {"changes": {"clip_sample": False}, **FEW}),
}


def check_same_as_diffusers(run, folder, args, kind, options):
    options = {"prompts": ["8k, a woman with red hair (waving:1.2)"], "num_inference_steps": 50, "guidance_scale": 5.0,
               **options}
    expected, images = theirs(folder, seeds=range(11, 11 + len(options["prompts"])), kind=kind, **options)
    asked = [arg for prompt in dict.fromkeys(options["prompts"]) for arg in ("--prompt", prompt)]
    out, *_ = run(*asked, "--seed", 11, "--save-latents", *args, model=folder)
    assert relative(latents(out), expected) < 1e-5
    for i, image in enumerate(images):
        mine = np.array(Image.open(out / f"{i:05d}.png")).astype(int)
        assert mine.std() > 5 and np.abs(mine - np.array(image).astype(int)).max() <= 1
    return expected


@pytest.mark.parametrize("case", SAME_AS_DIFFUSERS)
def test_pictures_are_diffusers(run, tiny, case):
    check_same_as_diffusers(run, tiny, *SAME_AS_DIFFUSERS[case])


def test_the_official_config_means_linspace(run, tiny, tiny_official):
    check_same_as_diffusers(run, tiny_official, [], DPM, {})
    linspace, leading = (
        latents(run("--prompt", "a cat", "--steps", 5, "--save-latents", model=folder, out=folder.name + "5")[0])
        for folder in (tiny_official, tiny))
    assert relative(leading, linspace) > 0.01                                    # not the picture of "leading"


# What is written

LONG = "red hair, " * 40 + "a hat"              # more than the 75 tokens of one chunk


@pytest.mark.parametrize("options, prompts", [
    ([], ["a cat", "a dog", "two birds"]),
    (["--sampler", "ddpm"], ["a cat", "a dog", "two birds"]),
    (["--prompt-weights", "a1111", "--negative-prompt", "bad"], ["a (cat:1.3)", LONG, "two birds"]),
], ids=["dpm++", "ddpm", "prompts of unequal length"])
def test_a_picture_does_not_depend_on_its_neighbours(run, options, prompts):
    args = [*options, "--steps", 4, "--save-latents"]
    asked = [arg for prompt in prompts for arg in ("--prompt", prompt)]
    out, stdout, _ = run(*asked, "--num-images", 2, "--seed", 7, *args)
    together = latents(out)
    assert together.shape == (6, 4, 8, 8) and together.dtype == torch.float32 and torch.isfinite(together).all()
    assert rows(out) == [
        {"file": f"{2 * k + i:05d}.png", "prompt": prompt, "seed": 7 + 2 * k + i}
        for k, prompt in enumerate(prompts) for i in range(2)]
    names = {"generate.json", "images.jsonl", "sheet.png", "latents.safetensors", *(f"{n:05d}.png" for n in range(6))}
    assert {path.name for path in out.iterdir() if path.name[0] != "."} == names
    assert re.fullmatch(r"drawing 6 pictures of 32x32 with .*, 4 steps, guidance 5, on cpu in float32 to .*\n", stdout)

    one_by_one, *_ = run(*asked, "--num-images", 2, "--seed", 7, "--batch-size", 1, *args, out="one by one")
    assert relative(latents(one_by_one), together) < 1e-5
    for n in (1, 3, 4):
        alone, *_ = run("--prompt", prompts[n // 2], "--seed", 7 + n, *args, out=f"alone {n}")
        assert relative(latents(alone), together[n:n + 1]) < 1e-5
        ours, theirs = np.array(Image.open(alone / "00000.png")), np.array(Image.open(out / f"{n:05d}.png"))
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1

    page = Image.open(out / "sheet.png")        # a row for every prompt
    first = Image.open(out / "00000.png").resize((192, 192), Image.Resampling.NEAREST)
    assert page.width == 2 * 200 + 8 and page.height > 3 * 200
    assert np.array_equal(np.array(page.crop((8, 8, 200, 200))), np.array(first))


def read_parameters(text):
    """The way A1111 reads it back: settings are the last line where it has three pairs or more."""
    *lines, last = text.split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(pairs) >= 3
    negative = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    return "\n".join(lines[:negative]), "\n".join(lines[negative:]).removeprefix("Negative prompt:").strip(), {
        key: json.loads(value) if value.startswith('"') else value for key, value in pairs}


def test_the_settings_are_inside_the_picture(run, tiny, tmp_path):
    model = tmp_path / "my, model: v1.5"
    model.symlink_to(tiny)
    prompt, negative = "a cat, (bust shot:1.2): 5\nand 猫, café 🙂", "blurry, \"bad\": hands"
    out, *_ = run("--prompt", prompt, "--prompt", "a café", "--negative-prompt", negative, "--steps", 2, "--clip-skip",
                  1, "--guidance", 7.5, "--seed", 5, "--width", 40, model=model)
    image = Image.open(out / "00000.png")
    settings = {
        "Steps": "2", "Sampler": "DPM++ 2M", "CFG scale": "7.5", "Seed": "5", "Size": "40x32",
        "Model": "my, model: v1.5", "Clip skip": "2", "RNG": "CPU", "Prompt weights": "off"}
    assert image.size == (40, 32)
    assert read_parameters(image.info["parameters"]) == (prompt, negative, settings)
    assert read_parameters(Image.open(out / "00001.png").info["parameters"]) == (
        "a café", negative, {**settings, "Seed": "6"})
    private = json.loads(image.info["hg-dpo"])
    assert private["scheduler"] == json.loads((tiny / "scheduler" / "scheduler_config.json").read_text())
    assert private["dtype"] == "torch.float32" and private["model"] == str(model) and private["Seed"] == 5
    assert rows(out)[0]["prompt"] == prompt and "猫" in (out / "images.jsonl").read_text(encoding="utf-8")
    assert "Negative prompt" not in parameters("a", "", {"Steps": 1})


def test_prompt_weights(run):
    pictures = {}
    for weights, prompt in (("off", "a (cat:1.5)"), ("a1111", "a (cat:1.5)"), ("a1111", "a cat"), ("off", "a cat")):
        out, *_ = run("--prompt", prompt, "--prompt-weights", weights, "--steps", 3, "--save-latents",
                      out=f"{weights} {prompt}")
        assert read_parameters(Image.open(out / "00000.png").info["parameters"])[2]["Prompt weights"] == weights
        pictures[weights, prompt] = latents(out)
    assert torch.equal(pictures["a1111", "a cat"], pictures["off", "a cat"])
    for other in (("off", "a (cat:1.5)"), ("off", "a cat")):
        assert relative(pictures["a1111", "a (cat:1.5)"], pictures[other]) > 1e-3
    _, _, stderr = run("--prompt", LONG, "--steps", 1, out="long")
    assert stderr.startswith("warning: the last 47 of 122 tokens")


def test_a_sheet_shows_the_first_pictures(run, monkeypatch):
    monkeypatch.setattr(generate, "SHEET_PICTURES", 3)
    out, stdout, _ = run("--prompt", "a cat", "--num-images", 5, "--steps", 1, "--height", 8, "--width", 16)
    assert stdout.endswith("shows the first 3 of 5\n") and len(rows(out)) == 5
    assert not (out / "latents.safetensors").exists()


def test_sheets_of_every_shape():
    captions = ["", "猫, café со снегом", "no_space_" * 300_000, "masterpiece, best quality, " * 20, "1: a cat"]
    for size in ((704, 1024), (1024, 704), (32, 32), (4096, 8), (128, 1024)):
        pictures = [Image.new("RGB", size, (200, 30, 10 * i)) for i in range(5)]
        page = sheet(pictures, captions, 3)
        w, h = (page.width - 8) // 3, (page.height - 8) // 2
        for i in range(5):                      # every picture is where it belongs, with white around it
            box = np.array(page.crop((i % 3 * w, i // 3 * h, (i % 3 + 1) * w, (i // 3 + 1) * h)))
            assert (box == (200, 30, 10 * i)).all(-1).any() and (box[:8] == 255).all() and (box[:, :8] == 255).all()
    font = ImageFont.load_default(11)
    for caption in captions:
        lines = wrapped(caption, font, 132)
        assert len(lines) <= 3 and all(font.getlength(line) <= 140 for line in lines)
    assert wrapped("a cat  on\na mat", font, 132) == ["a cat on a mat"]
    assert wrapped(captions[3], font, 132)[2].endswith(" ...")


# Prompt files

PARTI = "Prompt\tCategory\tNote\na \"quoted cat\tAnimals\t\n\nan old man\tPeople\tx\n \tPeople\t\na child\tPeople\n"
FILES = [
    ("p.txt", "\ufeffa cat\r\n\r\n  a dog, 猫\u2028and more \n", None, ["a cat", "a dog, 猫\u2028and more"]),
    ("p.jsonl", '\ufeff{"prompt": "a cat", "seed": 1}\n\n{"prompt": "a\u2028b\\nc"}\n{"prompt": "half \\ud83d"}', None,
     ["a cat", "a\u2028b\nc", "half ?"]),
    ("p.tsv", PARTI, None, ['a "quoted cat', "an old man", "a child"]),
    ("p.tsv", PARTI, "People", ["an old man", "a child"]),
    ("p.csv", '\ufeffid,prompt,Category\n1,"a cat, asleep\nand ""warm""",Animals\n2,a man,People\n3\n', None,
     ['a cat, asleep\nand "warm"', "a man"]),
    ("p.CSV", "Category,Prompt\nPeople,a man\nAnimals,a cat\n", "People", ["a man"]),
]


@pytest.mark.parametrize("name, text, category, expected", FILES)
def test_prompt_files(tmp_path, name, text, category, expected):
    (tmp_path / name).write_bytes(text.encode())
    assert cli.read_prompts(str(tmp_path / name), category) == expected


def test_prompts_from_the_command_line_and_a_file(run, tmp_path):
    (tmp_path / "p.csv").write_text("Category,Prompt\nPeople,a man\nAnimals,a cat\nPeople,\"a child, asleep\"\n")
    out, *_ = run("--prompt", "first", "--prompts", tmp_path / "p.csv", "--category", "People", "--steps", 1)
    assert [row["prompt"] for row in rows(out)] == ["first", "a man", "a child, asleep"]


BAD_FILES = {
    "empty.txt": (b"\xef\xbb\xbf\n \n", "no prompt in it"),
    "none.txt": (None, "no such prompt file"),
    "latin1.txt": ("café".encode("latin-1"), "text in UTF-8"),
    "broken.jsonl": (b'{"prompt": "a"}\n{"prompt": ', "broken.jsonl:2: not JSON"),
    "other.jsonl": (b'{"text": "a"}', "other.jsonl:1"),
    "number.jsonl": (b'{"prompt": 5}', "number.jsonl:1"),
    "list.jsonl": (b'["prompt"]', "list.jsonl:1"),
    "text.csv": (b"text,Category\na,b\n", "its columns are text, Category; expected Prompt"),
    "head.csv": (b"a" * 200_000, "head.csv:0: field larger than field limit"),
    "prompts.json": (b'["a cat", "a dog"]', "prompts.json: a .json; expected .txt, .jsonl, .tsv or .csv"),
    "quote.csv": (b'prompt\n"' + b"a" * 200_000, "quote.csv:1: field larger than field limit"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_prompt_files(tmp_path, name):
    content, message = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        cli.read_prompts(str(tmp_path / name))
    if name.endswith(("txt", "jsonl")) and content is not None:
        with pytest.raises(UserError, match="needs a table"):
            cli.read_prompts(str(tmp_path / name), "People")


# Going on

class Killed(BaseException):
    pass


def contents(out):
    return {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name[0] != "."}


def test_it_goes_on_where_it_was_killed(run, monkeypatch, tmp_path, tiny, capsys):
    """Killed before each of its writes and started again, it ends with the same bytes; other prompts, settings or
    weights in the same folder are refused, so that no picture stands under the wrong words."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    command = ["--prompt", "a cat", "--prompt", "a dog", "--num-images", 2, "--steps", 2, "--batch-size", 3,
               "--save-latents"]
    whole, *_ = run(*command, out="whole", model=model)
    left = [0]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if -100 < left[0] < 1:             # dead: nothing more is written, whatever still runs
                raise Killed
            return function(*args, **kwargs)
        return call
    for name in ("write_manifest", "write_png", "write_tensors", "write_text"):
        monkeypatch.setattr(generate, name, counted(getattr(generate, name)))
    for number in range(1, 13):
        left[0] = number
        with contextlib.suppress(Killed):
            run(*command, out=f"{number}", model=model)
        assert left[0] < 1 or number == 12
        left[0] = -100
        out, *_ = run(*command, out=f"{number}", model=model)
        assert contents(out) == contents(whole), number

    for change, words in (
            (["--steps", 3], "--steps 2, and now it is 3"), (["--prompt", "a bird"], "--prompt has other"),
            (["--num-images", 1], "--num-images 2"), (["--negative-prompt", "x"], "--negative-prompt ")):
        *_, stderr = run(*command, *change, out="whole", model=model, code=2)
        assert words in stderr and stderr.count("\n") == 1
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    *_, stderr = run(*command, out="whole", model=model, code=2)
    assert "--model has other contents" in stderr
    with locked(whole):
        *_, stderr = run(*command, out="whole", model=model, code=2)
    assert "another process is at work" in stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    *_, stderr = run(*command, out="mine", model=model, code=2)
    assert "holds other files" in stderr


@pytest.mark.parametrize("options", [
    ["--guidance", 1e38], ["--prompt-weights", "a1111", "--prompt", f"(red:{10**60})"],
    ["--lora", "LORA:1e30"]], ids=["guidance", "word", "lora"])
def test_no_picture_comes_of_nan(run, tiny, tmp_path, options):
    """Instead of a black picture and exit 0: a line with the prompt and the seed."""
    pipeline = load_pipeline(tiny)
    for parameter in inject_lora(pipeline.unet):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    save_lora(tmp_path / "lora.safetensors", pipeline.unet)
    options = [str(option).replace("LORA", str(tmp_path / "lora.safetensors")) for option in options]
    out, _, stderr = run("--prompt", "a cat", "--seed", 3, "--steps", 3, *options, code=2)
    assert re.search(r"seed [34], prompt '.*': NaN or infinite values", stderr.splitlines()[-1])
    *_, stderr = run("--prompt", "a", "--lora", f"{tmp_path / 'lora.safetensors'}:nan", out="new", code=2)
    assert "lora.safetensors:nan: must have a weight that is a finite number" in stderr


# How it ends

BAD = {
    "no prompt": ([], "no prompt"),
    "no file": (["--prompts", "nowhere.txt"], "no such prompt file"),
    "a folder": (["--prompts", "."], "no such prompt file"),
    "no category": (["--prompts", "p.csv", "--category", "Cars"], "of the category Cars"),
    "steps 0": (["--steps", 0], "--steps 0"),
    "steps 1001": (["--steps", 1001], "--steps 1001"),
    "steps many": (["--steps", "many"], "--steps many: must be a whole number"),
    "height 100": (["--height", 100], "--height 100: must be a multiple of 8, such as 96"),
    "width 0": (["--width", 0], "--width 0"),
    "width -8": (["--width", -8], "--width -8"),
    "guidance nan": (["--guidance", "nan"], "--guidance nan"),
    "guidance inf": (["--guidance", "inf"], "--guidance inf"),
    "guidance -1": (["--guidance", -1], "--guidance -1"),
    "batch size 0": (["--batch-size", 0], "--batch-size 0"),
    "num images 0": (["--num-images", 0], "--num-images 0"),
    "clip skip 99": (["--clip-skip", 99], "--clip-skip 99: must be 0 to 2"),
    "clip skip -1": (["--clip-skip", -1], "--clip-skip -1"),
    "seed -1": (["--seed", -1], "--seed -1"),
    "seed 2^64": (["--seed", 2**64], "--seed"),
    "device": (["--device", "abacus"], "--device abacus"),
    "sampler": (["--sampler", "euler"], "argument --sampler"),
    "option": (["--stepz", 3], "--stepz"),
    "model": (["--model", "/nowhere/at/all"], "/nowhere/at/all: no such file or folder"),
    "out is a file": (["--out", "p.csv"], "p.csv"),
    "out below a file": (["--out", "p.csv/out"], "p.csv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_code_2(run, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    Path("p.csv").write_text("Prompt,Category\na cat,Animals\n")
    args, message = BAD[case]
    args = args if "--prompts" in args or case == "no prompt" else ["--prompt", "a cat", *args]
    _, _, stderr = run("--steps", 1, *args, code=2)
    assert re.fullmatch(r"generate\.py: [^\n]+\n", stderr) and message in stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["p.csv"]
    assert Path("p.csv").read_text() == "Prompt,Category\na cat,Animals\n"


def test_help(run, capsys):
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == 0 and "(default: dpm++)" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_finished(tiny, tmp_path):
    """In a process of its own: 130, one line, and a whole folder of the pictures drawn so far."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "generate.py", "--model", tiny, "--device", "cpu", "--out", out, "--prompt", "a cat",
         "--num-images", "100000", "--steps", "2", "--batch-size", "2", "--save-latents"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (out / "00002.png").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stdout.startswith("drawing 100000 pictures")
    assert stderr.splitlines()[-1] == "generate.py: stopped; what was finished is saved" and "Traceback" not in stderr
    files = [row["file"] for row in rows(out)]
    pictures = sorted(path.name for path in out.iterdir() if path.name[:5].isdigit())
    assert len(files) >= 2 and files == pictures[:len(files)] and len(pictures) <= len(files) + 1
    for name in files:
        Image.open(out / name).verify()
    assert len(list((out / "partial").iterdir())) in (len(files), len(files) + 1) and (out / "sheet.png").exists()
    assert not list(out.rglob("*.part"))        # no half-written file


def test_compiled_it_draws_the_same(tiny, run, monkeypatch, tmp_path):
    """A compiler that changes nothing stands in for Inductor, which takes a minute: what is drawn goes through it, with
    the LoRA and, for LAN, without."""
    graphs = []

    def compile(unet) -> None:
        unet.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)

    unet = load_pipeline(tiny).unet
    for parameter in inject_lora(unet, 2, 2.0):
        parameter.data.normal_(std=0.1)
    save_lora(tmp_path / "lora.safetensors", unet)
    monkeypatch.setattr(generate, "compile_unet", compile)
    options = ("--prompt", "a", "--steps", 2, "--lora", tmp_path / "lora.safetensors", "--lan", "--save-latents")
    plain, _, _ = run(*options)
    assert not graphs
    compiled, _, _ = run(*options, "--compile", out="compiled")
    assert len(graphs) == 2 and relative(latents(compiled), latents(plain)) < 1e-5
    _, _, err = run("--prompt", "a", "--excite", "a", "--compile", out="excited", code=2)
    assert "--excite goes without --compile" in err
