"""Which of a repository's files a model needs, and a local folder that has them: the user's own, or the Hub's copy.
A scorer may also be one file, in a folder or alone. Nothing here reads weights or needs torch.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import UserError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")             # ./name and ../name are paths
PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
PICKLES = (".pt", ".pth")


def weight_files(files: Sequence[str], folder: str, stem: str) -> list[str]:
    """Of all file names of a repository those that hold one part's weights: the plain ones before a variant (fp16
    before others), whole before sharded (the index comes first), safetensors before `.bin`; empty where none do."""
    prefix = f"{folder}/{stem}" if folder else stem
    ends = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
    named = [re.fullmatch(r"\.(\w+)\.safetensors|\.safetensors\.index\.(\w+)\.json", end) for end in ends]
    variants = {match[1] or match[2] for match in named if match}
    for variant in ["", *sorted(variants, key=lambda v: (v != "fp16", v))]:
        dot = variant and f".{variant}"
        if f"{dot}.safetensors" in ends:
            return [f"{prefix}{dot}.safetensors"]
        if (index := f".safetensors.index{dot}.json") in ends:
            shards = [e for e in ends if re.sub(r"-\d+-of-\d+", "", e) == f"{dot}.safetensors"]
            return [prefix + index, *(prefix + e for e in sorted(shards))]
    pickled = (f"{folder}/" if folder else "") + ("pytorch_model.bin" if stem == "model" else f"{stem}.bin")
    return [pickled] if pickled in files else []


def pipeline_files(files: Sequence[str]) -> list[str]:
    """Of all file names of a repository those that `load_pipeline` reads."""
    needed = ["model_index.json", "scheduler/scheduler_config.json"]
    for part, stem in PARTS.items():
        needed += [f"{part}/config.json", *weight_files(files, part, stem)]
    return needed + [name for name in files if name.startswith("tokenizer/")]


def vae_files(files: Sequence[str]) -> list[str]:
    """The same for a VAE alone, in a repository of its own or as a part of one."""
    folder = "vae" if "vae/config.json" in files else ""
    return [f"{folder}/config.json".lstrip("/"), *weight_files(files, folder, PARTS["vae"])]


def fetch(source: str, needed: Callable[[Sequence[str]], list[str]]) -> Path:
    """The folder that holds a model: `source` itself, or the local copy of the Hub's `id` or `id@revision`, with only
    the `needed` ones of its files downloaded. Without a network, or with HF_HUB_OFFLINE, what the cache has."""
    if Path(source).is_dir():
        return Path(source)
    if not HUB_ID.fullmatch(source) or source.endswith((".safetensors", ".ckpt", ".bin")):
        raise UserError(f"{source}: no such file or folder, and no Hub id (owner/name or owner/name@revision)")
    # Imported here: it reads its settings from the environment at import, and nothing local needs it.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = source.partition("@")
    revision = revision or "main"
    instead = "or give the path of a local folder or .safetensors file"
    try:
        try:
            files = [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or []]
        except (RepositoryNotFoundError, RevisionNotFoundError):         # a gated one's error is a RepositoryNotFound
            raise
        except Exception:         # transport errors have no class in common over huggingface_hub's versions
            # No answer, but the cache may have the model. One file stands for all: a listing needs the network.
            return Path(snapshot_download(repo, revision=revision, allow_patterns=needed([])[0], local_files_only=True))
        wanted = needed(files)
        if wanted[0] in files:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
        reason = f"no {wanted[0]} in this repository; if it has a single .safetensors, download and give that"
    except GatedRepoError:
        reason = f"gated on the Hub; accept its terms on its page there, then `hf auth login`, {instead}"
    except RepositoryNotFoundError:
        reason = f"not on the Hub, or private (`hf auth login`); check the spelling, {instead}"
    except RevisionNotFoundError:
        reason = f"the Hub has no revision {revision!r} of {repo}"
    except LocalEntryNotFoundError:
        reason = f"the Hub cannot be reached and the model is not in the cache; go online, {instead}"
    except Exception as error:
        reason = f"the download broke off ({type(error).__name__}: {error}); run again to go on, {instead}"
    raise UserError(f"{source}: {' '.join(reason.split())}")


def fetch_for(file: str, source: str, needed: Callable[[Sequence[str]], list[str]]) -> Path:
    """`fetch`, whose refusal also names the file that is wanted."""
    try:
        return fetch(source, needed)
    except UserError as error:
        raise UserError(f"{error} (for {file})") from None


def find_file(source: str, *names: str) -> Path:
    """`source` itself, or what a folder or a Hub repository has first of `names`."""
    if Path(source).is_file():
        return Path(source)
    if source.endswith((*PICKLES, ".safetensors", ".bin")):
        raise UserError(f"{source}: no such file")
    folder = fetch_for(names[0], source, lambda files: [next((n for n in names if n in files), names[0])])
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{source}: no {' or '.join(names)} here")
