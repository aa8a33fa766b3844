"""Advantages: how much better a picture's reward is than that of others of its prompt. Prompts differ in what they can
reach, and scorers in their scale; neither should decide which pictures are learned from."""

import torch
from torch import Tensor


def z_scores(rewards: Tensor, among: Tensor, eps: float) -> Tensor:
    return (rewards - among.mean()) / (among.std(correction=0) + eps)


def rows_of(prompts: list[str]) -> dict[str, list[int]]:
    """Each prompt's places in the list."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return rows


def group_advantages(rewards: Tensor, prompts: list[str], limit: float = 5.0, eps: float = 1e-4) -> Tensor:
    """GRPO (arXiv 2402.03300, by Flow-GRPO, 2505.05470): rewards (B,) of B prompts, each several times -> (B,).

        A = clamp((r - mean) / (std + eps), -limit, limit)

    over the batch's pictures of the same prompt, std the population's. Limit and eps are Flow-GRPO's. Equal rewards
    have advantages of 0, and so has a prompt's only picture.
    """
    r = rewards.detach().double()      # in float32 the mean of equal rewards may be another number, by more than eps
    advantages = torch.empty_like(r)
    for rows in rows_of(prompts).values():
        advantages[rows] = z_scores(r[rows], r[rows], eps)
    return advantages.clamp(-limit, limit).to(rewards.dtype)


def running_advantages(
    rewards: Tensor, prompts: list[str], buffers: dict[str, list[float]], size: int = 16, least: int = 16,
    limit: float = 5.0, eps: float = 1e-6, scaled: bool = True,
) -> Tensor:
    """DDPO (arXiv 2305.13301): as `group_advantages`, over the prompt's last `size` rewards, those of the batch
    included; while it has fewer than `least`, over the whole batch.

    `buffers` is changed: it holds these rewards and belongs in the checkpoint, or a resumed run differs. The constants
    are those of the official code for PyTorch; the one for JAX has a size of 32 and a limit of 10. Not `scaled`, and
    without a limit, it is the reward less what is expected of the prompt: DPOK's, which learns a network to expect it.
    """
    r = rewards.detach().double()
    advantages = torch.empty_like(r)
    for prompt, rows in rows_of(prompts).items():
        buffers[prompt] = [*buffers.get(prompt, []), *r[rows].tolist()][-size:]
        among = r if len(buffers[prompt]) < least else r.new_tensor(buffers[prompt])
        advantages[rows] = z_scores(r[rows], among, eps) if scaled else r[rows] - among.mean()
    return advantages.clamp(-limit, limit).to(rewards.dtype)
