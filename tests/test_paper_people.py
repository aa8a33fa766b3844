"""The miniature checkpoint, the script that makes it, and its judge."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from evaluation.judges import load_judge
from model.builtin import BUILT_IN
from model.checkpoint import load_pipeline
from model.errors import UserError
from model.files import read_json, read_lines
from model.scorers import load_scorer
from paper_people import data, judge, pairs, preference, world
from sampling import Drawing, decode, encode_prompts, sample_latents
from sampling.drawing import to_images

ROOT = Path(__file__).parent.parent
CHECKPOINT = BUILT_IN["paper-people"].checkpoint
PROMPT = "a woman with red hair, blue shirt and white trousers, waving on a beach"
MAKE = [sys.executable, "-m", "paper_people.make", "--quick", "--out"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed_at(out: Path, name: str) -> None:
    """A run of the whole script, with a few steps of every stage, until it has made this file."""
    process = subprocess.Popen([*MAKE, out], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 200
    while not (out / name).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (out / name).exists() and not (out / "checkpoint").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run that was killed on the way and went on to the end."""
    out = tmp_path_factory.mktemp("made")
    killed_at(out, "vae.safetensors")
    subprocess.run([*MAKE, out], cwd=ROOT, check=True, timeout=1800)
    return out


def test_quick_run_makes_everything(made):
    names = {path.name for path in (made / "checkpoint").iterdir()}
    assert names == {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler", "scorer", "judge"}
    assert len(list(made.glob("[1-9]_*.png"))) == 7
    figures = json.loads((made / "figures.json").read_text())
    stages = {"recipe", "world", "vae", "clip", "unet", "scorer", "judge", "samples", "pool", "megabytes"}
    assert set(figures) == stages
    assert "# Paper people" in (made / "README.md").read_text()
    assert not list(made.rglob("*.part")) and not list(made.glob("*.state.pt"))
    pipeline = load_pipeline(made / "checkpoint")
    assert pipeline.native_size == (64, 64)


def test_killed_run_goes_on_to_the_same_weights(made, tmp_path):
    """As one that nothing happened to, as far as that goes here."""
    killed_at(tmp_path, "scorer.safetensors")
    for name in ("vae", "decoder", "clip", "scorer"):
        assert (tmp_path / f"{name}.safetensors").read_bytes() == (made / f"{name}.safetensors").read_bytes(), name


def test_training_resumes_exactly(tmp_path, monkeypatch):
    """Steps, a stop, and the other steps are the steps in one go."""
    from paper_people import fit as module
    monkeypatch.setattr(module, "SAVE_SECONDS", -1)            # a state after every step

    def run(folder: Path, stop: int | None) -> torch.Tensor:
        torch.manual_seed(5)
        net = torch.nn.Linear(4, 4)

        def loss_of_step(step):
            if step == stop:
                raise KeyboardInterrupt
            loss = (net(torch.randn(8, 4)) - 1).pow(2).mean()
            return loss, {"mse": loss.detach()}

        module.fit("net", folder, net, loss_of_step, 6, 0.1, seed=0)
        return net.weight

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run(tmp_path / "a", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", 4)
    assert torch.equal(run(tmp_path / "b", None), whole)
    assert torch.equal(run(tmp_path / "b", None), whole)       # and once more, from the finished file


def test_another_seed_in_the_same_folder_is_refused(made):
    result = subprocess.run([*MAKE, made, "--seed", "1"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "another recipe or seed" in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_every_word_is_one_token():
    transformers = pytest.importorskip("transformers")
    tokenizer = preference.make_tokenizer()
    assert all(len(tokenizer.token_ids(word)) == 1 for word in world.words())
    captions = [world.caption(person) for person in world.all_people()[::97]]
    assert max(len(tokenizer.token_ids(caption)) for caption in captions) + 2 <= preference.TOKENS
    theirs = transformers.CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    texts = [*captions, "", "Zebra, WOMAN's  hat!", "größe 42"]
    assert theirs(texts, padding="max_length", truncation=True).input_ids == tokenizer.encode(texts).tolist()


def test_state_of_a_word_speaks_of_it():
    """What the U-Net reads at the word of a colour is mostly that colour, not the words before it."""
    people = world.all_people()[::31]
    words = world.caption(people[0]).replace(",", " ,").split()
    pipeline = load_pipeline(CHECKPOINT)
    with torch.no_grad():
        context = pipeline.text_encoder(pipeline.tokenizer.encode([world.caption(person) for person in people]))
    for name in ("hair", "shirt", "trousers"):
        states = context[:, words.index(name)]                 # of the word before it: the start token comes first
        values = [getattr(person, name) for person in people]
        means = {v: states[[v == other for other in values]].mean(0) for v in set(values)}
        between = torch.stack([means[v] for v in values]).var(0).sum()
        assert between >= 0.5 * states.var(0).sum()


def test_checkpoint_is_small_and_half():
    assert sum(map(len, files(CHECKPOINT).values())) <= 24e6


def test_diffusers_draws_our_picture():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32)
    theirs.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(7)
    latents = theirs(
        PROMPT, num_inference_steps=10, guidance_scale=5.0, generator=generator, output_type="latent").images
    ours = load_pipeline(CHECKPOINT)
    with torch.no_grad():
        uncond, cond = encode_prompts(["", PROMPT], ours.tokenizer, ours.text_encoder)[:, None]
    x0 = sample_latents(ours, Drawing(steps=10).for_model(ours), cond, uncond, [7])
    assert (x0 - latents).abs().max() <= 1e-5 * latents.abs().max()
    assert decode(ours, x0).shape == (1, 3, 64, 64)


def test_scorer_is_a_clip_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPModel.from_pretrained(CHECKPOINT / "scorer", torch_dtype=torch.float32).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(CHECKPOINT / "scorer")
    processor = transformers.CLIPImageProcessor.from_pretrained(CHECKPOINT / "scorer")
    person = world.parse_caption(PROMPT)
    images = [world.render(person, seed, fault) for seed in range(3) for fault in (None, "missing_leg")]
    with torch.no_grad():
        inputs = tokenizer([PROMPT], padding="max_length", return_tensors="pt").input_ids
        expected = theirs(input_ids=inputs, **processor(images, return_tensors="pt")).logits_per_image[:, 0]
    scores = load_scorer("paper-people")(images, [PROMPT] * 6)
    assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-4)
    assert (scores[0::2] > scores[1::2]).float().mean() >= 0.6


@pytest.fixture(scope="module")
def triples() -> dict[str, np.ndarray]:
    return data.triple_chunk("a seed of the tests", 120)


def test_scorer_and_judge_tell_right_from_wrong(triples):
    scorer = load_scorer("paper-people")
    accuracy = preference.pair_accuracy(scorer.clip, scorer.tokenizer, triples)
    assert accuracy["overall"] >= 0.85
    figures = judge.check(judge.load_judge(CHECKPOINT / "judge"), triples)
    assert figures["broken found"] >= 0.85 and figures["false alarm"] <= 0.1
    assert min(figures[name] for name in world.ATTRIBUTES) >= 0.9


def test_checkpoint_draws_people(triples):
    """Most samples show the described clothes and place, and some are wrong: the miniature has something to learn."""
    pipeline, eye = load_pipeline(CHECKPOINT), judge.load_judge(CHECKPOINT / "judge")
    prompts = world.PROMPT_FILES["test"].read_text().splitlines()[:24]
    with torch.no_grad():
        uncond, *conds = encode_prompts(["", *prompts], pipeline.tokenizer, pipeline.text_encoder)
    context = torch.stack(conds)
    drawing = Drawing(steps=10).for_model(pipeline)
    latents = sample_latents(pipeline, drawing, context, uncond.expand_as(context), list(range(24)))
    verdicts = judge.judge_pictures(eye, to_images(decode(pipeline, latents)), prompts)
    described = [world.parse_caption(prompt) for prompt in prompts]
    for name in ("who", "shirt", "trousers", "place"):
        assert sum(getattr(v.shown, name) == getattr(d, name) for v, d in zip(verdicts, described, strict=True)) >= 17
    assert 0 < sum(verdict.right for verdict in verdicts) < 24


def test_judge_reads_the_caption(triples):
    eye = judge.load_judge(CHECKPOINT / "judge")
    person = data.person(triples["people"][0])
    image = Image.fromarray(triples["images"][0, 0])
    images, captions = [image, image], [world.caption(person), PROMPT]
    verdict, other = judge.judge_pictures(eye, images, captions)
    assert verdict.right and verdict.shown == person and verdict.score > other.score
    for name, expected in (("judge-clean", [1, 1]), ("judge-matches", [1, 0]), ("judge-right", [1, 0])):
        assert load_judge(name, torch.device("cpu"))(images, captions).tolist() == expected
    with pytest.raises(UserError, match="not a caption"):
        judge.judge_pictures(eye, [image], ["a dog on a beach"])


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_part_is_named(part, tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=part):
        load_pipeline(folder)


def test_missing_judge_is_named(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        judge.load_judge(tmp_path / "judge")


def test_shipped_pairs_are_those_that_the_checkpoint_draws(tmp_path, monkeypatch):
    """Unpacked they are a dataset of build_dataset.py; drawn again from their seeds, the first two are the same."""
    monkeypatch.setattr(pairs, "read_lines", lambda path, **expected: read_lines(path, **expected)[:2])
    pairs.unpack(tmp_path)
    about, lines = read_json(tmp_path / "dataset.json"), read_lines(tmp_path / "pairs-00000.jsonl")
    shard, options = load_file(tmp_path / "shard-00000.safetensors"), about["options"]
    pipeline = load_pipeline("paper-people", dtype=getattr(torch, options["dtype"]))
    for k, line in enumerate(lines):
        seeds = [line["seeds"][line[kind]] for kind in ("winner", "loser")]
        with torch.no_grad():
            uncond, context = encode_prompts(["", line["prompt"]], pipeline.tokenizer, pipeline.text_encoder)
        drawing = Drawing(options["steps"], options["guidance"]).for_model(pipeline)
        latents = sample_latents(pipeline, drawing, context.expand(2, -1, -1), uncond.expand(2, -1, -1), seeds)
        stored = torch.stack([shard["latents_w"][k], shard["latents_l"][k]]).float()
        pictures = to_images(decode(load_pipeline("paper-people"), stored))
        for kind, picture in zip("wl", pictures):
            unpacked = np.asarray(Image.open(tmp_path / "images" / f"{line['id']}_{kind}.png"), dtype=int)
            assert np.abs(unpacked - np.asarray(picture, dtype=int)).max() <= 2
        # Another processor rounds otherwise, and the sampler carries it on; another picture is 1.4 away.
        assert ((stored - latents).flatten(1).norm(dim=1) / latents.flatten(1).norm(dim=1)).max() < 0.2
    assert len(read_lines(pairs.PAIRS / "pairs-00000.jsonl")) >= 512 and about["finished"]
