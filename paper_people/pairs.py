"""The pairs that ship with the paper people: a dataset ready for train.py without drawing 20,000 pictures first.

    python -m paper_people.pairs --out data                # unpacks them, as build_dataset.py leaves a dataset
    python -m paper_people.pairs --pack data               # keeps a dataset of build_dataset.py as the shipped ones

They were made, with the checkpoint beside them, by the command that pairs/dataset.json tells; only winners' and losers'
latents are kept. The texts are encoded anew; of the pictures only the sheet's are decoded.
"""

import argparse
import json
from pathlib import Path

import torch

import cli
from build_dataset import SHARD, SHEET_PAIRS, begin, finish, join_rows, locked, make_row, read_lines
from generate import decode
from model.checkpoint import PAPER_PEOPLE, load_pipeline
from model.errors import UserError
from model.files import read_json, read_tensors, write_tensors, write_text
from pictures import to_images
from sampling import encode_prompts

PAIRS = PAPER_PEOPLE.parent / "pairs"


def pack(data: Path) -> None:
    about = read_json(data / "dataset.json")
    if not about["finished"] or about["model"] != "paper-people":
        raise UserError(f"{data}: a finished dataset of paper people is needed")
    shards = [read_tensors(data / name) for name in about["shards"]]
    latents = {key: torch.cat([shard[key] for shard in shards]) for key in ("latents_w", "latents_l")}
    write_tensors(PAIRS / "latents.safetensors", latents)
    write_text(PAIRS / "pairs-00000.jsonl", "".join(json.dumps(line) + "\n" for line in read_lines(data)))
    write_text(PAIRS / "dataset.json", json.dumps(about, indent=2) + "\n")
    print(f"{PAIRS}: {len(latents['latents_w'])} pairs")


def unpack(out: Path) -> None:
    about, pipeline = read_json(PAIRS / "dataset.json"), load_pipeline("paper-people")
    latents, lines = read_tensors(PAIRS / "latents.safetensors"), read_lines(PAIRS)

    @torch.no_grad()
    def row(k: int) -> tuple[dict, dict, dict]:
        line = {key: value for key, value in lines[k].items() if key != "id"}
        context = encode_prompts([line["prompt"]], pipeline.tokenizer, pipeline.text_encoder)[0]
        tensors = {key: tensor[k] for key, tensor in latents.items()}
        kinds = "wl" if k < SHEET_PAIRS else ""
        pictures = {kind: to_images(decode(pipeline, tensors[f"latents_{kind}"][None]))[0] for kind in kinds}
        return line, {**tensors, "context": context}, pictures

    facts = {key: about[key] for key in ("model", "context_width", "scaling_factor", "latent")}
    if facts["scaling_factor"] != pipeline.vae.scaling_factor:
        raise UserError(f"{PAIRS}: made with another checkpoint; make them again, then --pack")
    with locked(out, 0, 1):
        begin(out, about["options"])
        for shard in cli.progress(range(len(about["shards"])), len(about["shards"]), "unpacking"):
            numbers = range(shard * SHARD, min((shard + 1) * SHARD, len(lines)))
            if not (out / f"shard-{shard:05d}.safetensors").is_file():
                for k in numbers:
                    make_row(out, k, row, lambda line, name: None)
                join_rows(out, shard, numbers)
        finish(out, about["options"], facts, len(about["shards"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.Help)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="DIR", help="unpack there")
    what.add_argument("--pack", metavar="DIR", help="a finished dataset, made with --model paper-people")
    args = parser.parse_args()
    pack(Path(args.pack)) if args.pack else unpack(Path(args.out))


if __name__ == "__main__":
    cli.run(main)
