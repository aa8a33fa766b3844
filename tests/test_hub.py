"""The Hub for real: the programs and huggingface_hub's own client, in a process of their own, against the local server
of `hub.py`."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub import Hub
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
UNET = "unet/diffusion_pytorch_model.safetensors"
NEEDED = {
    "model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json", "unet/config.json", UNET,
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
    "text_encoder/model.safetensors"}
NOT_NEEDED = (
    "README.md", ".gitattributes", "v1-5-pruned.ckpt", "v1-5-pruned-emaonly.safetensors", "v1-inference.yaml",
    "safety_checker/config.json", "safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json",
    "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors", "vae/diffusion_pytorch_model.fp16.bin",
    "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack")
# `fetch` alone, as load_pipeline calls it, without torch's second of import.
FETCH = """
import sys
from model.errors import UserError
from model.hub import fetch, pipeline_files, vae_files
assert "torch" not in sys.modules
try:
    print(fetch(sys.argv[1], {"model": pipeline_files, "vae": vae_files}[sys.argv[2]]))
except UserError as error:
    sys.exit(str(error))
"""
NOBODY = "http://127.0.0.1:9"          # a port without a server


def python(*args, env: dict, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, env=env | more, capture_output=True, text=True, timeout=300)


def fetch(source: str, kind: str = "model", *, env: dict, **more: str) -> Path:
    done = python("-c", FETCH, source, kind, env=env, **more)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return Path(done.stdout.strip())


def refusal(done: subprocess.CompletedProcess) -> str:
    """The one line of a program that ended with 2."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == "", done.stderr
    return done.stderr.removeprefix("generate.py: ").strip()


def generate(model: str, out: Path, *args: str, env: dict, **more: str) -> subprocess.CompletedProcess:
    args = ("--model", model, "--prompt", "x", "--steps", "1", "--out", out, *args)
    return python("generate.py", *args, env=env, **more)


@pytest.fixture
def repo(tiny, tmp_path):
    """`tiny` as a repository, among everything else that repositories hold."""
    folder = shutil.copytree(tiny, tmp_path / "repo")
    for name in NOT_NEEDED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not to be downloaded")
    return folder


def test_only_what_is_needed_is_downloaded_and_only_once(repo, tmp_path):
    other = shutil.copytree(repo, tmp_path / "other")
    (other / "scheduler/scheduler_config.json").write_text("{}")
    with Hub({"org/model": repo}, revisions={"org/model": {"v2": other}}) as hub:
        env = hub.env(tmp_path / "home")
        folder = fetch("org/model", env=env)
        assert sorted(hub.downloads("org/model")) == sorted(NEEDED)
        assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == NEEDED
        for name in NEEDED:
            assert (folder / name).read_bytes() == (repo / name).read_bytes()

        hub.requests.clear()
        assert fetch("org/model@main", env=env) == folder
        assert hub.downloads("org/model") == []                                       # the cache has it
        new = fetch("org/model@v2", env=env)
        assert hub.downloads("org/model") == ["scheduler/scheduler_config.json"]      # and of v2 all that is unchanged
        assert new != folder and (new / "scheduler/scheduler_config.json").read_text() == "{}"

        (repo / "scheduler/scheduler_config.json").write_text('{"steps_offset": 1}')
        hub.publish("org/model", repo)
        newest = fetch("org/model", env=env)                                          # main has moved on
        assert (newest / "scheduler/scheduler_config.json").read_text() == '{"steps_offset": 1}'

        # Without a network: the same, at once.
        start = time.monotonic()
        assert fetch("org/model", env=env, HF_HUB_OFFLINE="1") == newest
        assert fetch("org/model@v2", env=env, HF_HUB_OFFLINE="1") == new
        assert fetch("org/model", env=env, HF_ENDPOINT=NOBODY) == newest
        assert time.monotonic() - start < 60
        done = python("-c", FETCH, "org/model@v3", "model", env=env, HF_HUB_OFFLINE="1")
        assert "org/model@v3: the Hub cannot be reached and the model is not in the cache" in done.stderr


def test_a_program_draws_with_a_model_and_a_vae_from_the_hub(repo, tmp_path):
    """A VAE's repository has its files at the root, and here pictures that differ."""
    vae = tmp_path / "vae"
    shutil.copytree(repo / "vae", vae)
    tensors = load_file(vae / "diffusion_pytorch_model.safetensors")
    save_file(tensors | {"decoder.conv_out.bias": torch.ones(3)}, vae / "diffusion_pytorch_model.safetensors")
    (vae / "README.md").write_text("not to be downloaded")
    with Hub({"org/model": repo, "org/vae": vae}) as hub:
        env = hub.env(tmp_path / "home")
        pictures = []
        for out, args in (("own", []), ("other", ["--vae", "org/vae"])):
            done = generate("org/model", tmp_path / out, *args, env=env)
            assert done.returncode == 0, done.stderr
            pictures.append((tmp_path / out / "00000.png").read_bytes())
        assert pictures[0] != pictures[1]
        assert sorted(hub.downloads("org/model")) == sorted(NEEDED)
        assert sorted(hub.downloads("org/vae")) == ["config.json", "diffusion_pytorch_model.safetensors"]
        offline = fetch("org/vae", "vae", env=env, HF_HUB_OFFLINE="1")
        assert (offline / "diffusion_pytorch_model.safetensors").is_file()
        inside = fetch("org/model", "vae", env=hub.env(tmp_path / "another home"))    # the VAE of a whole model
        assert [path.name for path in inside.iterdir()] == ["vae"]


def test_a_connection_that_closes_is_taken_up_where_it_was(repo, tmp_path):
    path = repo / UNET
    path.write_bytes(bytes(16 << 20))
    with Hub({"org/model": repo}) as hub:
        hub.break_after(UNET, 12 << 20)
        done = python("-c", FETCH, "org/model", "model", env=hub.env(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        ranges = [request.range for request in hub.requests if request.method == "GET" and request.path.endswith(UNET)]
        assert ranges[0] is None and ranges[-1] == f"bytes={10 << 20}-"               # it is kept in steps of 10 MiB
        assert (Path(done.stdout.strip()) / UNET).read_bytes() == path.read_bytes()


def test_a_download_that_breaks_off_goes_on_when_run_again(repo, tmp_path):
    with Hub({"org/model": repo}) as hub:
        env = hub.env(tmp_path / "home")
        hub.break_after(UNET, 1 << 20, reset=True)
        line = refusal(generate("org/model", tmp_path / "out", env=env))
        assert line.startswith("org/model: the download broke off (") and "; run again to go on, or give" in line
        assert not (tmp_path / "out").exists()
        [snapshot] = (tmp_path / "home/hub/models--org--model/snapshots").iterdir()
        kept = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
        assert UNET not in kept

        line = refusal(generate("org/model", tmp_path / "out", env=env, HF_HUB_OFFLINE="1"))
        assert line.startswith((str(snapshot), "org/model: "))                       # the first thing that is not there
        hub.requests.clear()
        assert fetch("org/model", env=env) == snapshot
        assert sorted(hub.downloads("org/model")) == sorted(NEEDED - kept)
        assert (snapshot / UNET).read_bytes() == (repo / UNET).read_bytes()


@pytest.mark.parametrize("model, more, line", [
    ("org/secret", {}, "gated on the Hub; accept its terms on its page there, then `hf auth login`, or give"),
    ("org/closed", {}, "gated on the Hub"), ("org/secret", {"HF_TOKEN": "hf_of_a_stranger"}, "gated on the Hub"),
    ("org/typo", {}, "not on the Hub, or private (`hf auth login`); check the spelling, or give the path of a local"),
    ("org/model@v9", {}, "the Hub has no revision 'v9' of org/model"),
    ("org/model", {"HF_ENDPOINT": NOBODY}, "the Hub cannot be reached and the model is not in the cache; go online"),
    ("org/model", {"HF_HUB_OFFLINE": "1"}, "the Hub cannot be reached and the model is not in the cache; go online")])
def test_what_the_hub_refuses_is_one_line(model, more, line, repo, tmp_path):
    with Hub({"org/model": repo, "org/secret": repo}, gated={"org/secret", "org/closed"}) as hub:
        start = time.monotonic()
        done = generate(model, tmp_path / "out", env=hub.env(tmp_path / "home"), **more)
        assert refusal(done).startswith(f"{model}: {line}"), done.stderr
        assert time.monotonic() - start < 60
        assert hub.downloads(model) == [] and not (tmp_path / "out").exists()


def test_a_member_gets_a_gated_model(repo, tmp_path):
    with Hub({"org/secret": repo}, gated={"org/secret"}) as hub:
        fetch("org/secret", env=hub.env(tmp_path / "home"), HF_TOKEN="hf_of_a_member")
        assert sorted(hub.downloads("org/secret")) == sorted(NEEDED)


def test_a_repository_that_is_no_model(tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/README.md").write_text("# Notes")
    with Hub({"org/notes": tmp_path / "repo"}) as hub:
        line = refusal(generate("org/notes", tmp_path / "out", env=hub.env(tmp_path / "home")))
        assert line.startswith("org/notes: no model_index.json in this repository")
        assert hub.downloads("org/notes") == []


def test_parti_prompts_without_a_network(tiny, tmp_path):
    with Hub({}) as hub:
        env = hub.env(tmp_path)
    done = generate(str(tiny), tmp_path / "out", "--prompts", "parti-people", env=env, HF_HUB_OFFLINE="1")
    assert refusal(done).startswith("parti-people: PartiPrompts.tsv is not in the cache and cannot be had from the Hub")
