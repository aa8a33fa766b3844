"""PRO (arXiv 2306.17492) without its temperatures: a whole pool in its order, by Plackett and Luce."""

import torch
from torch import Tensor

from .diffusion_dpo import pair_logs, squared_error


def pro_loss(
    eps: Tensor, eps_ref: Tensor, noise: Tensor, scores: Tensor, beta: float = 2500.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """eps, eps_ref, noise (K * B, C, H, W), all first pictures first, noise and step shared within a pool; scores
    (B, K), of which only the order counts. -> the scalar loss and logged scalars.

        r_k = beta * (mse_ref_k - mse_k)
        loss = mean_B sum_k (log (exp r_k + sum_{j worse than k} exp r_j) - r_k) / (K - 1)

    Each picture is to be chosen from itself and those that are worse, equal scores saying nothing of each other. For
    K = 2 it is Diffusion-DPO, beta included. No official code for diffusion; Diffusion-LPO
    (arXiv 2510.01540) is the same idea. PRO also has temperatures from the gaps between scores, which are left out, and
    adds beta times the likelihood of the best: its beta is that weight, which the survey's Eq. 14 puts before the
    ranking instead.

    The logs of pairs are about the best and the worst. Before the first step the loss is ln(K!) / (K - 1).
    """
    k = scores.shape[1]
    mse, mse_ref = (squared_error(x, noise).unflatten(0, (k, -1)) for x in (eps, eps_ref.detach()))
    r = beta * (mse_ref - mse)                                 # (K, B)
    worse = scores.T[:, None] > scores.T                       # (K, K, B): the second is worse than the first
    among = worse | torch.eye(k, dtype=torch.bool, device=r.device)[:, :, None]
    rest = torch.where(among, r, -torch.inf).logsumexp(dim=1)
    loss = (rest - r).sum(dim=0).mean() / (k - 1)
    ends = torch.stack([scores.argmax(dim=1), scores.argmin(dim=1)])             # (2, B)
    pairs = (x.gather(0, ends).flatten() for x in (mse, mse_ref))                # (2B,), all best, then all worst
    return loss, {"pro": loss.detach(), **pair_logs(*pairs)}
