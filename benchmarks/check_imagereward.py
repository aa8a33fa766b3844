"""ImageReward's published scores, with its published weights: needs the network, once.

    python benchmarks/check_imagereward.py [--images DIR] [--device cuda]

Downloads ImageReward.pt (1.8 GB, the Hub's THUDM/ImageReward) and BERT's words (google-bert/bert-base-uncased) into the
Hub's cache, and the four pictures of the authors' README (1.webp to 4.webp, from their GitHub repository) into DIR.
Prints ours beside theirs; ends with 1 if one is more than 0.01 off.
"""

import sys
import urllib.request
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import cli  # noqa: E402
from dataset.images import open_picture  # noqa: E402
from model.scorers import load_scorer  # noqa: E402

PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
PUBLISHED = [0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492]
PICTURES = "https://github.com/THUDM/ImageReward/raw/main/assets/images"
CLOSE = 0.01                                   # theirs were scored on a GPU; preprocessing amiss costs 0.05 and more


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--images", default="imagereward_pictures", metavar="DIR")
    parser.add_argument("--device", type=cli.device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scorer", default="imagereward", help="imagereward:SOURCE takes the weights from elsewhere")
    args = parser.parse_args()

    folder = Path(args.images)
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(1, 5):
        if not (folder / f"{n}.webp").is_file():
            urllib.request.urlretrieve(f"{PICTURES}/{n}.webp", folder / f"{n}.webp")
    images = [open_picture(folder / f"{n}.webp") for n in range(1, 5)]
    scores = load_scorer(args.scorer, args.device)(images, [PROMPT] * 4).tolist()
    for n, (ours, theirs) in enumerate(zip(scores, PUBLISHED), 1):
        print(f"{n}.webp: ours {ours:+.4f}, published {theirs:+.4f}, difference {ours - theirs:+.4f}")
    worst = max(abs(ours - theirs) for ours, theirs in zip(scores, PUBLISHED))
    print(f"largest difference {worst:.4f}: {'reproduced' if worst <= CLOSE else 'NOT reproduced'}")
    sys.exit(worst > CLOSE)


if __name__ == "__main__":
    cli.run(main)
