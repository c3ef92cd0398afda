"""Cross-entropy of a linear head without the (tokens × vocabulary) logits."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lacuna.cost.memory import chunk_tokens


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk, while the chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, dtype: torch.dtype, chunk: int
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(dtype)
            for start in range(0, len(hidden), chunk):
                rows = hidden[start : start + chunk].to(dtype)
                wanted = targets[start : start + chunk, None]
                logits = (rows @ head.T).float()
                largest = logits.amax(dim=-1, keepdim=True)
                of_targets = logits.gather(1, wanted)
                sums = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
                loss += (sums.log() + largest - of_targets).sum()
                if hidden_gradient is None and weight_gradient is None:
                    continue
                logits.mul_(scale / sums)
                logits.scatter_add_(1, wanted, torch.full_like(wanted, -scale, dtype=torch.float32))
                gradient = logits.to(dtype)
                if hidden_gradient is not None:
                    hidden_gradient[start : start + chunk] = gradient @ head
                if weight_gradient is not None and dtype == torch.float32:
                    weight_gradient.addmm_(gradient.T, rows)
                elif weight_gradient is not None:
                    weight_gradient += gradient.T @ rows
                del logits, gradient
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (loss_gradient,) = gradients
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return (
            None if hidden_gradient is None else hidden_gradient * loss_gradient.to(hidden_gradient.dtype),
            None if weight_gradient is None else weight_gradient.mul_(loss_gradient).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


def chunked_cross_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int[Tensor, " tokens"],
    scale: float,
    dtype: torch.dtype,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Sum of -log softmax(hidden @ weight.T)[target] over the tokens, times scale, in fp32.

    scale: one over the number of supervised tokens of the whole optimizer step. It is applied before the gradients
    are rounded to dtype, the precision of the matrix products; the weight's gradient adds up in fp32.
    chunk: tokens whose logits exist at one time; None: what is fast on the device.
    # ref: Hsu et al. 2024, Liger Kernel, arXiv 2410.10989, section 3.2 (fused linear cross-entropy)
    """
    apply: Callable[..., Tensor] = _ChunkedLinearCrossEntropy.apply
    return apply(hidden, weight, targets, scale, dtype, chunk or chunk_tokens(hidden.device.type, weight.shape[0]))
