"""The pairs that ship with the paper people: a dataset ready for train.py without drawing 20,000 pictures first.

    python -m paper_people.pairs --out data                # unpacks them, as build_dataset.py leaves a dataset
    python -m paper_people.pairs --pack data               # keeps a dataset of build_dataset.py as the shipped ones

They were made, with the checkpoint beside them, by the command that pairs/dataset.json tells; only winners' and losers'
latents are kept. The texts are encoded again; of the pictures only the sheet's are decoded.
"""

import cli

# isort: split
import argparse
import json
from pathlib import Path

import torch

from dataset.folder import locked, open_manifest, write_manifest
from dataset.reader import read_manifest, read_shard
from dataset.rows import SHEET_PAIRS, Row, clear_parts, make_rows, pending_rows, summarise
from model.builtin import PAPER_PEOPLE
from model.checkpoint import load_pipeline
from model.errors import UserError
from model.files import digest_all, files_read, read_lines, read_tensors, write_tensors, write_text
from sampling import encode_prompts, to_picture

PAIRS = PAPER_PEOPLE / "pairs"


def pack(data: Path) -> None:
    manifest = read_manifest(data)
    if manifest["model"] != "paper-people":
        raise UserError(f"{data}: a dataset of paper people is needed")
    shards = [read_shard(data, manifest, name) for name in manifest["shards"]]
    latents = {key: torch.cat([shard[key] for shard, _ in shards]) for key in ("latents_w", "latents_l")}
    write_tensors(PAIRS / "latents.safetensors", latents)
    write_text(PAIRS / "pairs-00000.jsonl", "".join(json.dumps(line) + "\n" for _, lines in shards for line in lines))
    write_text(PAIRS / "dataset.json", json.dumps({**manifest, "files": {}}, indent=2) + "\n")
    print(f"{PAIRS}: {len(latents['latents_w'])} pairs")


def unpack(out: Path) -> None:
    manifest = read_manifest(PAIRS)
    with files_read() as files:
        pipeline = load_pipeline("paper-people")
        latents = read_tensors(PAIRS / "latents.safetensors")
        lines = read_lines(PAIRS / "pairs-00000.jsonl", prompt=str)
    if manifest["scaling_factor"] != pipeline.vae.scaling_factor:
        raise UserError(f"{PAIRS}: made with another checkpoint; make them again, then --pack")

    @torch.no_grad()
    def row(k: int) -> Row:
        context = encode_prompts([lines[k]["prompt"]], pipeline.tokenizer, pipeline.text_encoder)[0]
        tensors = {key: tensor[k] for key, tensor in latents.items()}

        def picture(side: str):
            seed = lines[k]["seeds"][lines[k]["winner" if side == "w" else "loser"]]
            return to_picture(pipeline, tensors[f"latents_{side}"].float(), lines[k]["prompt"], seed)

        pictures = {side: picture(side) for side in ("wl" if k < SHEET_PAIRS else "")}
        return {key: value for key, value in lines[k].items() if key != "id"}, {**tensors, "context": context}, pictures

    rows, options, inputs = len(lines), manifest["options"], {"model": digest_all(files)}
    model = {key: manifest[key] for key in ("model", "context_width", "scaling_factor", "latent")}
    with locked(out):
        before = open_manifest(out / "dataset.json", options, inputs)
        missing, _ = pending_rows(out, rows)
        if not before or missing:
            write_manifest(out / "dataset.json", options, inputs, finished=False, rows=rows)
        make_rows(
            out, rows, missing, [], lambda k: lines[k]["prompt"], row, lambda line, name: None, "pair", cli.progress)
        write_manifest(out / "dataset.json", options, inputs, finished=True, rows=rows, **model, **summarise(out, rows))
        clear_parts(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.Help)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="DIR", help="unpack there")
    what.add_argument("--pack", metavar="DIR", help="a finished dataset, made with --model paper-people")
    args = parser.parse_args()
    pack(Path(args.pack)) if args.pack else unpack(Path(args.out))


if __name__ == "__main__":
    cli.run(main)
