"""Do people prefer it? A small web page that shows a prompt and two pictures, in random order, and counts the choices.

    python study.py --eval eval --out study.db                       # what evaluate.py drew; at http://127.0.0.1:8000/
    python study.py --eval table --sides baseline,hg-dpo --out study.db          # two of the sides of a --compare
    python study.py --out study.db --export eval-study               # win rates, and pairs to learn from
    python build_dataset.py --from-pairs eval-study/pairs.jsonl --out human

OUT                     SQLite: a row a participant and pair, on the disk before the next pair is shown
EXPORT/study.json       the candidate's win rates with 95 % intervals: of all answers, of majorities, of each person
EXPORT/pairs.jsonl      a line a pair that was answered: prompt, winner, loser, which lie in EXPORT/images/; and tie,
                        where there is no majority: train_scorer.py learns from it, build_dataset.py leaves it out

Nothing on the page tells the sides apart: each participant has an order of pairs and sides of their own, addresses
count the pairs as they are shown, and pictures are sent without the settings that generate.py writes into them.
"""

import cli

# isort: split
from pathlib import Path

from evaluation.study import export, open_study, serve


def parse_args():
    parser = cli.Parser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--eval", metavar="DIR", help="what evaluate.py wrote (default: what OUT was begun with)")
    parser.add_argument("--sides", metavar="BASELINE,CANDIDATE", help="two of its sides (default: where it has two)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the database; the same command goes on with it")
    parser.add_argument("--export", metavar="DIR", help="instead of the page: write what was chosen so far")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets in other machines, without a password")
    parser.add_argument("--port", type=cli.whole(0, 65535), default=8000, help="0 takes any that is free")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    path = Path(args.out)
    names = [name.strip() for name in args.sides.split(",")] if args.sides else None
    study = open_study(path, Path(args.eval) if args.eval else None, names)
    if not args.export:
        serve(study, path, args.host, args.port)
    else:
        table, pairs = export(study, path, Path(args.export))
        baseline, candidate = study.sides
        cli.print_table([f"{candidate} against {baseline}", "wins (95 % interval)", "ties as half", "answers"], table)
        print(f"{Path(args.export) / 'pairs.jsonl'}: {pairs} pairs")


if __name__ == "__main__":
    cli.run(main)
