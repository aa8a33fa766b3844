"""The folder of a training run: its log, its checkpoint, its model card.

    log.jsonl             a line a step
    checkpoint/state.pt   what the run goes on from: step, parameters, optimizer
    curves.png, README.md
"""

import contextlib
import json
import math
import signal
import zipfile
from collections.abc import Callable, Container, Iterator
from itertools import takewhile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataset.folder import clear_unfinished, locked, open_manifest, write_manifest
from losses.processes import mean_of_processes
from model.errors import UserError
from model.files import digest_of, is_a, is_plain, read_lines, write_pickle, write_text
from pictures import curves, write_png

LOGS = ("log.jsonl", "watch.jsonl", "rewards.jsonl")
CURVES = ("reward", "judge", "loss", "dpo", "stat", "kl", "implicit_accuracy", "grad_norm")


@contextlib.contextmanager
def begun(
    manifest: Path, settings: dict, inputs: dict[str, str], may_change: Container[str], rank: int, world: int,
) -> Iterator[str]:
    """The run's folder, locked, with a manifest; see dataset/folder.py. Rank 0 alone writes there; the others wait
    until it is ready. -> the digest of what the run is, of `may_change` by its contents alone."""
    with locked(manifest.parent) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            open_manifest(manifest, settings, inputs, may_change)
            clear_unfinished(manifest.parent)
            write_manifest(manifest, settings, inputs)
        if world > 1:
            dist.barrier()
        yield digest_of([{name: value for name, value in settings.items() if name not in may_change}, inputs])


def noted_signals() -> list[bool]:
    """From now on SIGTERM and Ctrl-C end nothing: they fill this list, and the run saves first."""
    noted: list[bool] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: noted.append(True))
    return noted


def resume(
    out: Path, run: str, parameters: list[nn.Parameter], average: list[Tensor], optimizer, rank: int,
) -> int:
    """The step that the run in `out` has reached, with its parameters, their average (or none) and optimizer; 0 for a
    new one. `run` is the digest of what the run is."""
    state_file, step, digests = out / "checkpoint" / "state.pt", 0, {}
    if state_file.is_file():
        try:
            with zipfile.ZipFile(state_file) as entries:       # torch looks at no checksum
                if entries.testzip():
                    raise ValueError("it has changed since it was written")
            state = torch.load(state_file, map_location="cpu", weights_only=True)
            saved, step = [*state["parameters"], *state.get("average", [])], state["step"]
            digests = dict(state.get("logs", {}))                # checkpoints of before they came have none
            if state["run"] != run or not all(map(is_plain, saved)) \
                    or [p.shape for p in saved] != [p.shape for p in (*parameters, *average)]:
                raise ValueError("of another run")
            if not is_a(step, int) or step < 1:
                raise ValueError(f"step {step!r}")
            moments = state["optimizer"]["state"]
            if not all(fits(kept, parameters[i], optimizer) for i, kept in moments.items()):
                raise ValueError("the optimizer's moments are of other parameters")
            # Its settings are the run's, which are the same; a file's own could be anything.
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        except Exception as error:             # zip, pickle, key and runtime errors alike mean a bad file
            reason = " ".join(f"{error}".split())[:80]
            raise UserError(f"{state_file}: not this run's checkpoint ({reason}); put the right one back, or remove "
                            f"{state_file.parent} to begin again") from None
        for ours, theirs in zip((*parameters, *average), saved):
            ours.data.copy_(theirs)
    for log_file in (out / name for name in LOGS):
        if rank == 0 and (log_file.is_file() or log_file.name in digests):
            # A killed run has logged steps past its checkpoint; they come again.
            lines = [line for line in read_log(log_file, cut=True) if line["step"] <= step]
            if digests.get(log_file.name) not in (None, digest_of_log(lines)):
                raise UserError(f"{log_file}: its lines are not those of the checkpoint beside it; put the right file "
                                f"back, or remove {state_file.parent} to begin again")
            write_text(log_file, "".join(json.dumps(line) + "\n" for line in lines))
    return step


def digest_of_log(lines: list[dict]) -> str:
    """Of all but the seconds, which no two runs have in common."""
    return digest_of([line | {"seconds": 0} for line in lines])


def fits(kept: dict, parameter: nn.Parameter, optimizer) -> bool:
    """Whether this is what the optimizer keeps of a parameter: two moments of its shape, and the steps that they are
    of. KeyError where one is not there."""
    names = ("exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.AdamW) else ("state1", "state2")    # 8 bits
    return all(is_plain(kept[name]) and kept[name].shape == parameter.shape for name in names) \
        and is_plain(steps := torch.as_tensor(kept["step"])) and steps.numel() == 1


def read_log(path: Path, cut: bool = False) -> list[dict]:
    """Its lines, all with the same keys, each a number; `cut` as in `read_lines`."""
    lines = read_lines(path, cut=cut, step=int)
    for line in lines:
        if line.keys() != lines[-1].keys() or not all(is_a(value, float) for value in line.values()):
            raise UserError(f"{path}: the line of step {line['step']} is damaged; mend or remove it")
    return lines


def log_lines(steps: list[tuple[int, float, dict[str, Tensor]]], seconds: float) -> list[dict]:
    """(step, learning rate, logs) of some steps -> their lines, all processes' mean. The one place where the device is
    waited for."""
    keys = list(steps[0][2])
    values = torch.stack([torch.stack([logs[key].float() for key in keys]) for _, _, logs in steps])
    return [{"step": step, **dict(zip(keys, row)), "lr": lr, "seconds": round(seconds, 4)}
            for (step, lr, _), row in zip(steps, mean_of_processes(values).tolist())]


def check_start(line: dict, at_start: dict[str, float]) -> None:
    """Before the first step a new LoRA changes nothing: policy and reference are the same network, or precision or the
    reference is wrong. So the loss is known."""
    if line["step"] > 1 or not at_start or not math.isfinite(line["loss"]):
        return
    for key, expected in at_start.items():
        if not math.isclose(line[key], expected, rel_tol=1e-5, abs_tol=1e-12):
            raise UserError(f"step 1: {key} is {line[key]}, and must be {expected}; a bug")
    print(f"step 1: {', '.join(f'{key} = {line[key]:g}' for key in at_start)}, as it must be")


def append_log(out: Path, lines: list[dict], ids_of: Callable[[int], list[str]], write: bool) -> None:
    """The lines up to the first whose loss or gradient is not finite, which ends the run; `ids_of` its step are the
    pairs that it is about."""
    good = list(takewhile(lambda line: math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]), lines))
    if write:
        append_lines(out / "log.jsonl", good)
    for bad in lines[len(good):]:
        raise UserError(
            f"step {bad['step']}: the loss is {bad['loss']}, its gradient {bad['grad_norm']}; pairs "
            f"{', '.join(ids_of(bad['step']))}; {out / 'checkpoint'} keeps the last good state")


def append_lines(path: Path, lines: list[dict]) -> None:
    with open(path, "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def save_checkpoint(
    out: Path, run: str, step: int, parameters: list[nn.Parameter], average: list[Tensor], optimizer, card: str,
) -> None:
    """Curves, the model card, which begins with `card`, and at last the checkpoint: what stands before it is written
    again after a kill."""
    log = read_log(out / "log.jsonl")
    shown = [key for key in CURVES if key in log[-1]]
    write_png(out / "curves.png", curves({key: [line[key] for line in log] for key in shown}))
    last = log[-50:]
    keys = [key for key in last[0] if key not in ("step", "lr", "seconds")]
    figures = {key: sum(line[key] for line in last) / len(last) for key in keys}
    write_text(out / "README.md", card + f"\n| mean of the last {len(last)} steps | |\n|---|---|\n"
               + "".join(f"| {key} | {value:.6g} |\n" for key, value in figures.items()))
    write_pickle(out / "checkpoint" / "state.pt", {
        "run": run, "step": step, "parameters": [p.detach().cpu() for p in parameters],
        "logs": {name: digest_of_log(read_log(out / name)) for name in LOGS if (out / name).is_file()},
        "optimizer": optimizer.state_dict(), **({"average": [mean.cpu() for mean in average]} if average else {})})


def model_card(model: str, method: str, learned: str, lora: bool, settings: dict) -> str:
    """The head of a README.md fit for the Hub."""
    use = ('```python\npipe.load_lora_weights(FOLDER, weight_name="lora.safetensors")\n'
           "pipe.fuse_lora(lora_scale=0.5)\n```\n\n") if lora else ""
    tags = ", ".join(["stable-diffusion", method, *["lora"] * lora])
    return (
        f"---\nbase_model: {model}\nlibrary_name: diffusers\ntags: [{tags}]\n---\n\n"
        f"# {method} on {model}\n\n{learned}.\n\n{use}"
        "| setting | value |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in settings.items()))
