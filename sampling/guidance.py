"""Classifier-free guidance (arXiv 2207.12598) as a closure: samplers see an eps_fn and know nothing of text."""

from collections.abc import Callable

import torch
from torch import Tensor

from .schedule import eps_from_v


def guided_eps(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor, context_uncond: Tensor, guidance_scale: float,
    alphas_cumprod: Tensor | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """-> eps_fn(x_t (B, C, H, W), t (B,)): eps_uncond + guidance_scale * (eps_cond - eps_uncond), by one U-Net call on
    2B rows. At guidance_scale <= 1 the unconditional half is left out, as diffusers does.

    context, context_uncond (B, M, D), in the U-Net's dtype; x_t is cast to it. With `alphas_cumprod` the U-Net is one
    that predicts v, and its guided prediction is turned into eps.
    """
    guided = guidance_scale > 1
    rows = torch.cat([context_uncond, context]) if guided else context
    if alphas_cumprod is not None:
        alphas_cumprod = alphas_cumprod.to(rows.device)

    def eps_fn(x_t: Tensor, t: Tensor) -> Tensor:
        x = x_t.to(rows.dtype)
        if guided:
            uncond, cond = unet(torch.cat([x, x]), torch.cat([t, t]), rows).chunk(2)
            out = uncond + guidance_scale * (cond - uncond)
        else:
            out = unet(x, t, rows)
        return out if alphas_cumprod is None else eps_from_v(out.to(x_t.dtype), x_t, t, alphas_cumprod)

    return eps_fn
