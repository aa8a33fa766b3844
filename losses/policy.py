"""Policy gradients: every step of a rollout is an action, and the finished picture's reward is each one's.

log_probs (..., B) are `step_log_prob`s, of one step, (B,), or of all, (T, B); log_probs_old those of the policy that
drew the rollout; advantages (B,) constants, the same at every step. Log-probabilities are means over N elements, so a
ratio is the N-th root of the real one, and a clip of 1e-4 is on that root. The gradient of the expected reward is a sum
over steps; a mean over them is T times smaller, which Adam does not see.
"""

import torch
from torch import Tensor

from .diffusion_dpo import squared_error


@torch.no_grad()
def ratio_logs(ratio: Tensor, clip: float) -> dict[str, Tensor]:
    """Both are 0 on a rollout's first update; if not, the log-probabilities are not recomputed as they were drawn."""
    off = (ratio - 1).abs()
    return {"ratio_off": off.max(), "clipped": (off > clip).float().mean()}


def ddpo_sf_loss(log_probs: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """DDPO-SF (arXiv 2305.13301), the score function's estimator: log_probs (..., B), advantages (B,) -> the scalar
    loss and logged scalars.

        loss = -mean A * log_prob

    Right only for rollouts of this very policy: one update for each. The official code is trained with guidance 5,
    50 steps and advantages clamped to 5 (JAX: 10).
    """
    loss = -(advantages.detach() * log_probs).mean()
    return loss, {"ddpo": loss.detach()}


def ddpo_is_loss(
    log_probs: Tensor, log_probs_old: Tensor, advantages: Tensor, clip: float = 1e-4
) -> tuple[Tensor, dict[str, Tensor]]:
    """DDPO-IS (arXiv 2305.13301), importance sampling with PPO's clip: log_probs, log_probs_old (..., B), advantages
    (B,) -> the scalar loss and logged scalars.

        ratio = exp(log_prob - log_prob_old)
        loss = mean max(-A * ratio, -A * clamp(ratio, 1 - clip, 1 + clip))

    A step that went too far in the direction of its advantage has no gradient; one that went the other way keeps it.
    The clip is the official code's. The survey's Eq. 18 calls the policy that drew the samples p_ref, its name for the
    frozen reference; Eq. 19 clips the ratio times the gradient, a vector, where PPO has this maximum. At ratio 1 the
    gradient is DDPO-SF's.
    """
    ratio = (log_probs - log_probs_old.detach()).exp()
    advantages = advantages.detach()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
    return loss, {"ddpo": loss.detach(), **ratio_logs(ratio, clip)}


def dpok_loss(
    log_probs: Tensor, log_probs_old: Tensor, advantages: Tensor, reward_weight: float = 10.0, clip: float = 1e-4
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPOK (arXiv 2305.16381), without its KL, `kl_to_reference`: log_probs, log_probs_old (..., B), advantages (B,) ->
    the scalar loss and logged scalars.

        loss = -reward_weight * mean A * clamp(ratio, 1 - clip, 1 + clip)

    Without PPO's maximum: outside the clip no step has a gradient, whichever way it went. The constants are the
    official code's for one prompt, with a KL of weight 0.01; for many prompts they are 1000 and 0.1. Its guidance is
    7.5, and its advantage the reward less a learned value. In the survey reward_weight is missing from Eqs. 20 to 22,
    and Eq. 22 has the gradient of the whole trajectory's log-probability in a sum over t, so that it counts T times;
    each step's own is meant.
    """
    ratio = (log_probs - log_probs_old.detach()).exp()
    loss = -reward_weight * (advantages.detach() * ratio.clamp(1 - clip, 1 + clip)).mean()
    return loss, {"dpok": loss.detach(), **ratio_logs(ratio, clip)}


def kl_to_reference(eps: Tensor, eps_ref: Tensor, kl: str = "eps_mse", gain: Tensor | None = None) -> Tensor:
    """How far a step of the policy is from the frozen reference's: eps, eps_ref (B, C, H, W), guided as the rollout was
    -> (B,). Both have their gradients: eps_ref may depend on the policy by the x_t that it went to.

        mean_CHW (eps - eps_ref)^2               "eps_mse", DPOK's official code's
        gain^2 / 2 * mean_CHW (eps - eps_ref)^2  "gaussian": that of the two steps' distributions, by element, as the
                                                 log-probabilities are; gain (B,) is `sampling.eps_gain`
    """
    divergence = squared_error(eps, eps_ref)
    return divergence if kl == "eps_mse" else gain**2 / 2 * divergence
