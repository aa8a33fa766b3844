"""The processes of torchrun: what they tell each other."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def join_processes(device: torch.device, world: int, **options) -> dist.ProcessGroup | None:
    """Meets the other processes, if there are any. -> their group on the CPU, for `any_process` and `gathered`;
    `options`, such as how long one waits for the others, are
    both groups'."""
    if world == 1:
        return None
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)
    return dist.new_group(backend="gloo", **options)


def average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """All processes' gradients become their mean, in one message."""
    if world > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, grad in zip(parameters, (flat / world).split([p.numel() for p in parameters])):
            p.grad.copy_(grad.view_as(p))


def any_process(flag: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether it is set in any process. By gloo, between CPUs: to read it from a device would wait for that every
    step."""
    if group is None:
        return flag
    votes = torch.tensor(float(flag))
    dist.all_reduce(votes, group=group)
    return votes.item() > 0


def gathered(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(N, ...) on the CPU -> (N, processes, ...), by gloo."""
    if group is None:
        return values[:, None]
    everyones = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, values, group=group)
    return torch.stack(everyones, dim=1)
