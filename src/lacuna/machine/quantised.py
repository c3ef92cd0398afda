"""Whether bitsandbytes' quantised weights work here."""


def quantised_product(bits: int, device: str) -> bool:
    """Quantise a few weights and multiply by them: whether the product is finite. Raises what bitsandbytes raises."""
    import torch
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    layer = Linear4bit(64, 64) if bits == 4 else Linear8bitLt(64, 64, has_fp16_weights=False)
    product = layer.to(device)(torch.ones(1, 64, device=device))
    return bool(torch.isfinite(product).all())
