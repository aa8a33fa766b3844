"""Preferences on rollouts: DPO with the log-probabilities of denoising steps, as `step_log_prob` has them, where
Diffusion-DPO has a bound made of errors.

Each log-ratio to the frozen reference is clamped so narrowly that the logits stay near 0: the losses stay near ln 2
while they learn, and their gradient is that of a straight line.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def clamped_log_ratio(log_probs: Tensor, log_probs_ref: Tensor, clip: float) -> Tensor:
    """log clamp(p / p_ref, 1 - clip, 1 + clip); no gradient outside."""
    return (log_probs - log_probs_ref.detach()).clamp(math.log(1 - clip), math.log(1 + clip))


@torch.no_grad()
def logit_logs(logit: Tensor) -> dict[str, Tensor]:
    return {"implicit_accuracy": ((logit > 0).float() + 0.5 * (logit == 0).float()).mean()}


def d3po_loss(
    log_probs: Tensor, log_probs_ref: Tensor, beta: float = 0.1, clip: float = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """D3PO (arXiv 2311.13231): pairs of rollouts from one prompt and one first noise; log_probs, log_probs_ref
    (..., 2B), of one step or of all, winners first. -> the scalar loss and logged scalars.

        r = log clamp(p / p_ref, 1 - clip, 1 + clip);   loss = -mean log sigmoid(beta * (r_w - r_l))

    Each step is a preference of its own, and all count the same. Constants of the official code, with guidance 5 and 20
    steps. Its ties add ln 2 and no gradient; here they are left out of the batch. The survey says that D3PO shares the
    right side of its Eq. 24; it has no factor T there, and the clamp. Before the first step the loss is ln 2.
    """
    r_w, r_l = clamped_log_ratio(log_probs, log_probs_ref, clip).chunk(2, dim=-1)
    logit = beta * (r_w - r_l)                                 # (..., B)
    loss = -F.logsigmoid(logit).mean()
    return loss, {"d3po": loss.detach(), **logit_logs(logit)}


def dense_loss(
    log_probs: Tensor, log_probs_ref: Tensor, discount: float = 0.9, beta: float = 10.0, clip: float = 1e-4
) -> tuple[Tensor, dict[str, Tensor]]:
    """A dense reward by temporal discounting (arXiv 2402.08265): pairs of rollouts; log_probs, log_probs_ref (T, 2B) of
    all steps, the noisiest first, winners first. -> the scalar loss and logged scalars.

        w_i = discount^i / sum_j discount^j;   r = sum_i w_i * clamp(log_prob_i - log_prob_ref_i, -clip, clip)
        loss = -mean_B log sigmoid(beta * (r_w - r_l))

    The official code, of these constants, draws three steps of each rollout by w and takes their mean; this is what it
    expects, without the variance. It ranks any number of rollouts, by default two of five, as here. Discount 1 is the
    plain mean over the steps. The loss needs all steps at once: a trainer differentiates it by the log-probabilities
    first, and then each of them by itself. Before the first step it is ln 2.
    """
    steps = len(log_probs)
    weights = discount ** torch.arange(steps, dtype=log_probs.dtype, device=log_probs.device)    # (T,)
    log_ratio = (log_probs - log_probs_ref.detach()).clamp(-clip, clip)
    r_w, r_l = ((weights / weights.sum()) @ log_ratio).chunk(2)
    logit = beta * (r_w - r_l)                                 # (B,)
    loss = -F.logsigmoid(logit).mean()
    return loss, {"dense": loss.detach(), **logit_logs(logit)}


def spo_loss(
    log_probs: Tensor, log_probs_ref: Tensor, scores: Tensor, beta: float = 10.0, clip: float = 0.1, margin: float = 0.3
) -> tuple[Tensor, dict[str, Tensor]]:
    """SPO (arXiv 2406.04314): preferences within one step. K candidates x_{t_prev} are drawn from the same x_t;
    log_probs, log_probs_ref (K, B) are theirs, all by one eps at x_t; scores (K, B) those of the pictures that they
    imply, by an eps predicted at each. -> the scalar loss and logged scalars.

        w, l = argmax_K scores, argmin_K scores;   kept where sigmoid(s_w - s_l) - sigmoid(s_l - s_w) > margin
        r = log clamp(p / p_ref, 1 - clip, 1 + clip)
        loss = -mean_kept log sigmoid(beta * (r_w - r_l));   0 where none is kept

    Scores are logits of a preference, as PickScore's are. Constants of the official code, which has K = 4, guidance 5
    and the last 16 of 20 steps, a scorer trained on noisy pictures, and goes on from a candidate drawn at random: from
    the best it is worse by far. Before the first step the loss is ln 2.
    """
    best, worst = scores.argmax(dim=0, keepdim=True), scores.argmin(dim=0, keepdim=True)         # (1, B)
    kept = torch.tanh((scores.gather(0, best) - scores.gather(0, worst)) / 2) > margin
    r = clamped_log_ratio(log_probs, log_probs_ref, clip)      # (K, B)
    logit = beta * (r.gather(0, best) - r.gather(0, worst))
    loss = (-F.logsigmoid(logit) * kept).sum() / kept.sum().clamp(min=1)
    return loss, {"spo": loss.detach(), "kept": kept.float().mean(), **logit_logs(logit)}
