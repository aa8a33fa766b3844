"""The models that ship with the repository, and what the programs take by default for each: the one place where the
product knows of the paper people.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path

PAPER_PEOPLE = Path(__file__).parent.parent / "paper_people"


@dataclass(frozen=True)
class BuiltIn:
    """A model that `--model` takes by its name, and its defaults. Code of its own stands here as "module:name", and is
    imported by `named` when it is asked for: a user of another model never loads it."""

    checkpoint: Path                   # a folder in diffusers' layout, with scorer/ and judge/ in it
    prompts_train: Path                # build_dataset.py's: a miniature knows few words, and other lists have others
    prompts_test: Path                 # evaluate.py's; no prompt is in both lists
    scorer: str                        # build_dataset.py's: the one that chooses the pairs
    scorers: str                       # evaluate.py's: that one, and a judge that never chose anything
    judges: dict[str, str]             # name -> a function, device -> judge, which can tell of its pictures alone
    identity: str                      # a function, device -> distance of people, as model/identity.py has of faces
    vocabulary: str                    # a function -> the list of words that it knows, so that others can be named


BUILT_IN = {
    "paper-people": BuiltIn(
        checkpoint=PAPER_PEOPLE / "checkpoint", prompts_train=PAPER_PEOPLE / "prompts_train.txt",
        prompts_test=PAPER_PEOPLE / "prompts_test.txt", scorer="paper-people", scorers="paper-people,judge",
        judges={
            "judge": "paper_people.judge:load_score", "judge-clean": "paper_people.judge:load_clean",
            "judge-matches": "paper_people.judge:load_matches", "judge-right": "paper_people.judge:load_right"},
        identity="paper_people.identity:load_distance",
        vocabulary="paper_people.world:words")}


def default_scorer(model: str) -> str:
    """What build_dataset.py selects by: the scorer that goes with the model, its own scorer/, or PickScore."""
    own = Path(model) / "scorer"
    return BUILT_IN[model].scorer if model in BUILT_IN else str(own) if own.is_dir() else "pickscore"


def default_scorers(model: str) -> str:
    """What evaluate.py judges by, likewise."""
    own = Path(model) / "scorer"
    if model in BUILT_IN:
        return BUILT_IN[model].scorers
    return str(own) if own.is_dir() else "pickscore,hpsv2,imagereward,aesthetic,clip"


def named(spec: str) -> object:
    """What "module:name" stands for."""
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)
