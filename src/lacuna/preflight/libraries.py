"""A small real run of each library whose import proves nothing: they hold code for one processor or another.

A run returns what it did, or a check where there is more to say; it raises where the library does not work.
"""

from lacuna.machine.detect import choose_device
from lacuna.machine.quantised import quantised_product
from lacuna.preflight.check import Check


def bitsandbytes() -> str:
    device = choose_device("auto")
    for bits in (4, 8):
        if not quantised_product(bits, device.type):
            raise RuntimeError(f"the {bits}-bit product is not finite on {device.name}")
    return f"4-bit and 8-bit products on {device.name}"


def flash_attn() -> Check | str:
    import torch

    if not torch.cuda.is_available():
        return Check("flash-attn", "skipped", "it needs CUDA; attention is torch's own")
    from flash_attn import flash_attn_func

    heads = torch.ones(1, 8, 2, 64, device="cuda", dtype=torch.bfloat16)
    if not torch.equal(flash_attn_func(heads, heads, heads, causal=True), heads):
        raise RuntimeError("its attention over equal values is wrong")
    return "a forward pass"
