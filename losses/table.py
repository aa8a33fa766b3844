"""The table of losses. A new one is a function in a file of its own, and a line here: train.py and its --help follow.

A loss takes by name what it wants of a step's tensors, `GIVEN`, and options of its own, which have defaults; it returns
a scalar, and a dict of what is worth logging. One that takes `eps_ref` gets the frozen reference's prediction; for
others the reference is not computed.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .cdpo import cdpo_loss
from .diffusion_dpo import diffusion_dpo_loss
from .dspo import dspo_loss
from .hg_dpo import hg_dpo_loss
from .hinge import hinge_loss
from .ipo import ipo_loss
from .kto import kto_loss
from .mapo import mapo_loss
from .orpo import orpo_loss
from .pro import pro_loss
from .rdpo import rdpo_loss
from .rwr import rwr_loss
from .sdpo import sdpo_loss
from .sft import sft_loss
from .statistic_matching import lambda_for

# eps, eps_ref, noise (K * B, C, H, W): with pairs K is 2, all winners first; with winners and labels 1; with pools
# their size, all first pictures first. timesteps (B,), one a prompt, or a picture with labels; alphas_cumprod (1000,);
# scores (B, K), the scorer's; labels (B,), +1 for a picture that is liked, -1 for one that is not.
GIVEN = ("eps", "eps_ref", "noise", "timesteps", "alphas_cumprod", "scores", "labels")


@dataclass(frozen=True)
class Option:
    """A number that a loss takes. Its default stands in the loss's signature."""

    help: str
    least: float | None = None
    above: float | None = None
    below: float | None = None
    auto: Callable[[int, int], float] | None = None     # the word auto is this of the latents' height and width
    instead_of: str | None = None              # an option that means nothing beside it


@dataclass(frozen=True)
class Loss:
    function: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    options: dict[str, Option] = field(default_factory=dict)
    # pairs; winners, which captioned pictures have as well; labels: winners and losers as single pictures, each with
    # its label; or pool, of --keep pool.
    data: str = "pairs"
    # What it logs before the first step, when policy and reference are the same: anything else is a bug.
    at_start: dict[str, float] = field(default_factory=dict)
    together: bool = False                     # it depends on which rows are in a batch with each other

    def wants(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)

    def takes(self, name: str) -> bool:
        return name in self.wants()

    def defaults(self) -> dict[str, float]:
        """Of its options."""
        return {name: self.wants()[name].default for name in self.options}

    def __call__(self, options: dict[str, float], **given: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        wants = self.wants()
        return self.function(**{name: value for name, value in (given | options).items() if name in wants})


BETA = Option("strength of the pull to the reference (Eq. 3)", above=0)
LAMBDA_STAT = Option(
    "weight of statistic matching (Eq. 8); the paper's is for 704x1024; auto is 10000 * 88 * 128 / (h * w) for latents "
    "of h x w: 27,500 for 512x512", least=0, auto=lambda_for)
DISCOUNT = Option("of 50 sampler steps each counts this times the noisier one before it; 1 is off", above=0)
WINNER_PENALTY = Option("of winners that become worse, as a share of beta; 0 is off", least=0)
LABEL_SMOOTHING = Option("share of pairs taken to be labelled the wrong way round", least=0, below=0.5)

LN2 = math.log(2)
UNMOVED = {"mse_w_gain": 0.0, "mse_l_gain": 0.0}       # for losses whose value before the first step is not one number

LOSSES = {
    "hg-dpo": Loss(
        hg_dpo_loss, {"beta": BETA, "lambda_stat": LAMBDA_STAT, "discount": DISCOUNT, "winner_penalty": WINNER_PENALTY},
        at_start={"dpo": LN2, "stat": 0.0}),
    "dpo": Loss(
        diffusion_dpo_loss, {"beta": BETA, "discount": DISCOUNT, "winner_penalty": WINNER_PENALTY},
        at_start={"dpo": LN2}),
    "sft": Loss(sft_loss, data="winners"),
    "ipo": Loss(
        ipo_loss, {"beta": BETA, "ipo_tau": Option("the logit is drawn to 1 / (2 * this)", above=0)},
        at_start=UNMOVED),
    "hinge": Loss(hinge_loss, {"beta": BETA}, at_start={"hinge": 1.0}),
    "cdpo": Loss(cdpo_loss, {"beta": BETA, "label_smoothing": LABEL_SMOOTHING}, at_start={"cdpo": LN2}),
    "rdpo": Loss(rdpo_loss, {"beta": BETA, "label_smoothing": LABEL_SMOOTHING}, at_start={"rdpo": LN2}),
    "kto": Loss(kto_loss, {"beta": BETA}, data="labels", at_start={"kto": 0.5}, together=True),
    "mapo": Loss(mapo_loss, {"mapo_beta": Option("weight of the margin beside the winners' error", least=0)}),
    "orpo": Loss(orpo_loss, {"orpo_weight": Option("weight of the odds' ratio beside the winners' error", least=0)}),
    "pro": Loss(pro_loss, {"beta": BETA}, data="pool", at_start=UNMOVED),
    "rwr": Loss(
        rwr_loss,
        {"reward_scale": Option("a picture counts as exp(this times its score); 0 is all alike", least=0),
         "top": Option("instead: the best of a pool count, this share of it, all alike; 0 is off", least=0, below=1,
                       instead_of="reward_scale")},
        data="pool"),
    "dspo": Loss(
        dspo_loss, {"dspo_beta": Option("strength of the push off the reference", above=0)}, at_start=UNMOVED),
    "sdpo": Loss(
        sdpo_loss,
        {"beta": BETA, "sdpo_mu": Option("share of the winners' gain that losers may not undo", least=0, below=1)},
        at_start={"sdpo": LN2}, together=True),
}
