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

from .diffusion_dpo import diffusion_dpo_loss
from .hg_dpo import hg_dpo_loss
from .sft import sft_loss
from .statistic_matching import lambda_for

# eps, eps_ref, noise (K * B, C, H, W): with pairs K is 2, all winners first; with winners 1; with pools their size,
# all first pictures first. timesteps (B,), one a prompt; alphas_cumprod (1000,); scores (B, K), the scorer's.
GIVEN = ("eps", "eps_ref", "noise", "timesteps", "alphas_cumprod", "scores")


@dataclass(frozen=True)
class Option:
    """A number that a loss takes. Its default stands in the loss's signature."""

    help: str
    least: float | None = None
    above: float | None = None
    auto: Callable[[int, int], float] | None = None     # the word auto is this of the latents' height and width


@dataclass(frozen=True)
class Loss:
    function: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    options: dict[str, Option] = field(default_factory=dict)
    data: str = "pairs"                # or winners, which captioned pictures have as well; or pool, of --keep pool
    # What it logs before the first step, when policy and reference are the same: anything else is a bug.
    at_start: dict[str, float] = field(default_factory=dict)

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

LOSSES = {
    "hg-dpo": Loss(hg_dpo_loss, {"beta": BETA, "lambda_stat": LAMBDA_STAT}, at_start={"dpo": math.log(2), "stat": 0.0}),
    "dpo": Loss(diffusion_dpo_loss, {"beta": BETA}, at_start={"dpo": math.log(2)}),
    "sft": Loss(sft_loss, data="winners"),
}
