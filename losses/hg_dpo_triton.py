"""The two passes of `hg_dpo.PairSums` as Triton kernels: each reads its inputs once, at the memory's speed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def sums_kernel(eps, eps_ref, noise, out, pixels, planes, BLOCK: tl.constexpr, ACC: tl.constexpr):
    plane, part = tl.program_id(0), tl.program_id(1)           # plane: one row and channel; part: a block of its pixels
    i = part * BLOCK + tl.arange(0, BLOCK)
    inside = i < pixels
    at = plane.to(tl.int64) * pixels + i
    n = tl.load(noise + at, mask=inside, other=0.0).to(ACC)
    error = tl.load(eps + at, mask=inside, other=0.0).to(ACC) - n
    error_ref = tl.load(eps_ref + at, mask=inside, other=0.0).to(ACC) - n
    at_out = part * planes + plane
    stride = tl.num_programs(1) * planes
    tl.store(out + at_out, tl.sum(error * error, 0))
    tl.store(out + stride + at_out, tl.sum(error_ref * error_ref, 0))
    tl.store(out + 2 * stride + at_out, tl.sum(error - error_ref, 0))


@triton.jit
def gradient_kernel(eps, noise, grad, out, pixels, planes, BLOCK: tl.constexpr, ACC: tl.constexpr):
    plane, part = tl.program_id(0), tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    inside = i < pixels
    at = plane.to(tl.int64) * pixels + i
    a = 2 * tl.load(grad + plane)
    b = tl.load(grad + 2 * planes + plane)
    error = tl.load(eps + at, mask=inside).to(ACC) - tl.load(noise + at, mask=inside).to(ACC)
    tl.store(out + at, a * error + b, mask=inside)


def _grid(x: Tensor) -> tuple[int, int, tuple[int, int], object]:
    planes, pixels = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    return planes, pixels, (planes, triton.cdiv(pixels, BLOCK)), acc


def sums(eps: Tensor, eps_ref: Tensor, noise: Tensor) -> Tensor:
    """(2B, C, H, W) three times -> (3, 2B, C) float32 (float64 for float64). Parts are added in a fixed order, not by
    atomics, so that two runs agree bit for bit."""
    planes, pixels, grid, acc = _grid(eps)
    dtype = torch.promote_types(eps.dtype, torch.float32)
    out = torch.empty((3, grid[1], planes), dtype=dtype, device=eps.device)
    with torch.cuda.device_of(eps):                            # Triton launches on the current device, not the tensors'
        sums_kernel[grid](eps.contiguous(), eps_ref.contiguous(), noise.contiguous(), out, pixels, planes, BLOCK, acc)
    return out.sum(dim=1).unflatten(1, eps.shape[:2])


def gradient(eps: Tensor, noise: Tensor, grad: Tensor) -> Tensor:
    """eps, noise (2B, C, H, W) and the gradient (3, 2B, C) of the sums -> the gradient of eps, in its dtype."""
    planes, pixels, grid, acc = _grid(eps)
    out = torch.empty(eps.shape, dtype=eps.dtype, device=eps.device)
    with torch.cuda.device_of(eps):
        gradient_kernel[grid](eps.contiguous(), noise.contiguous(), grad.contiguous(), out, pixels, planes, BLOCK, acc)
    return out
