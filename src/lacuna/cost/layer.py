"""What a step keeps of a layer for its backward pass, and what it takes there for a while: tensors and their bytes."""

from typing import NamedTuple

from lacuna.cost.shape import PROJECTIONS, Adapter, ModelShape, Step

SAME_INPUT = (PROJECTIONS[:3], PROJECTIONS[3:4], PROJECTIONS[4:6], PROJECTIONS[6:])
"""Projections that read the same tensor."""

Sizes = dict[str, float]
"""Bytes by the name of what takes them."""


class Case(NamedTuple):
    """What decides the memory that the backward pass of a layer's MLP takes for a while beside an adapter."""

    bf16: bool
    bits: int | None
    dropout: bool
    adapts_mlp: bool


class Transient(NamedTuple):
    """Bytes of a token that come and go in the backward pass of a layer's MLP, less what it has freed by then."""

    hidden: int
    """For each unit of hidden size."""
    mlp: int
    """For each unit of MLP width."""


ADAPTER_TRANSIENT = {
    Case(bf16=False, bits=None, dropout=False, adapts_mlp=False): Transient(hidden=0, mlp=12),
    Case(bf16=False, bits=None, dropout=False, adapts_mlp=True): Transient(hidden=0, mlp=8),
    Case(bf16=False, bits=None, dropout=True, adapts_mlp=False): Transient(hidden=0, mlp=12),
    Case(bf16=False, bits=None, dropout=True, adapts_mlp=True): Transient(hidden=12, mlp=4),
    Case(bf16=False, bits=4, dropout=False, adapts_mlp=True): Transient(hidden=4, mlp=8),
    Case(bf16=False, bits=4, dropout=True, adapts_mlp=True): Transient(hidden=16, mlp=4),
    Case(bf16=True, bits=None, dropout=False, adapts_mlp=False): Transient(hidden=2, mlp=6),
    Case(bf16=True, bits=None, dropout=False, adapts_mlp=True): Transient(hidden=10, mlp=6),
    Case(bf16=True, bits=None, dropout=True, adapts_mlp=False): Transient(hidden=2, mlp=6),
    Case(bf16=True, bits=None, dropout=True, adapts_mlp=True): Transient(hidden=10, mlp=10),
    Case(bf16=True, bits=4, dropout=False, adapts_mlp=False): Transient(hidden=2, mlp=6),
    Case(bf16=True, bits=4, dropout=False, adapts_mlp=True): Transient(hidden=6, mlp=4),
    Case(bf16=True, bits=4, dropout=True, adapts_mlp=False): Transient(hidden=2, mlp=6),
    Case(bf16=True, bits=4, dropout=True, adapts_mlp=True): Transient(hidden=12, mlp=2),
    Case(bf16=True, bits=8, dropout=False, adapts_mlp=False): Transient(hidden=0, mlp=4),
    Case(bf16=True, bits=8, dropout=False, adapts_mlp=True): Transient(hidden=0, mlp=4),
    Case(bf16=True, bits=8, dropout=True, adapts_mlp=False): Transient(hidden=-2, mlp=4),
    Case(bf16=True, bits=8, dropout=True, adapts_mlp=True): Transient(hidden=8, mlp=0),
}
"""As counted in traces. In fp32 8-bit weights take what plain ones do, and 4-bit ones too where no MLP is adapted."""
CAST_TRANSIENT = {
    (4, False): Transient(hidden=12, mlp=6),
    (4, True): Transient(hidden=12, mlp=10),
    (8, False): Transient(hidden=8, mlp=4),
    (8, True): Transient(hidden=8, mlp=8),
}
"""The same by bits and dropout, with an adapter in the MLP, where PEFT casts its inputs to fp32: see casts_inputs."""


def casts_inputs(step: Step, adapter: Adapter) -> bool:
    """Whether an adapter's inputs are cast to fp32; for quantised weights PEFT knows CUDA's autocast alone.

    # ref: peft/tuners/lora/bnb.py, requires_conversion
    """
    return step.bf16 and (adapter.bits is None or step.device != "cuda")


def kept_of_layer(shape: ModelShape, step: Step) -> float:
    """Bytes that the backward pass of a layer needs, without its weights."""
    kept = _norms_kept(shape, step) | _attention_kept(shape, step) | _mlp_kept(shape, step)
    if step.adapter:
        kept |= _adapter_kept(shape, step, step.adapter)
    return float(step.tokens * sum(kept.values()))


def _norms_kept(shape: ModelShape, step: Step) -> Sizes:
    """Bytes of a token that a layer's norms keep; they are computed in fp32."""
    norms = 4 if shape.norms_twice else 2
    kept = {"norms: inputs": 4.0 * norms * shape.hidden, "norms: scales of rows": 4.0 * norms}
    if step.adapter is None:
        kept["norms: results before the weight"] = 4 * norms * shape.hidden
    if shape.norms_heads:
        width = shape.attention + shape.key_value
        kept["norms of heads: inputs"] = 4 * width
        kept["norms of heads: scales"] = 4 * (shape.heads + shape.key_value_heads)
        if step.adapter is None:
            kept["norms of heads: results before the weight"] = width * (step.width if shape.family == "qwen3" else 4)
    return kept


def _attention_kept(shape: ModelShape, step: Step) -> Sizes:
    """Bytes of a token that attention keeps, from the inputs of its projections to the input of the last one."""
    width, repeated = step.width, _repeated(shape, step)
    kept = {
        "queries": float(width * shape.attention),
        "keys and values, repeated": width * repeated * shape.attention,
        "keys and values": width * (2 - repeated) * shape.key_value,
    }
    if step.adapter is None:
        copies = 3 if step.bf16 else 1
        kept["inputs of the projections, under autocast one for each"] = width * copies * shape.hidden
    if step.attention != "eager" or step.adapter is None:
        kept["results"] = width * shape.attention
    if step.attention != "eager":
        kept["sums of the softmax"] = 4 * shape.heads
    if step.attention == "sdpa":
        kept["mask"] = width * step.length
    if step.attention == "eager":
        kept["scores"] = _score_bytes(shape, step) * shape.heads * step.length
    return kept


def _score_bytes(shape: ModelShape, step: Step) -> int:
    """Bytes that eager attention keeps for a pair of tokens: the softmax in fp32, and what comes before or after."""
    if shape.family == "gemma2":
        return 8
    return 6 if step.bf16 else 4


def _repeated(shape: ModelShape, step: Step) -> int:
    """Of keys and values, how many are repeated for the heads that share them; a view does for a single head."""
    if step.attention == "flash_attention_2":
        return 0
    if shape.key_value_heads > 1 or step.attention == "eager":
        return 2
    return 1 if step.bf16 and step.adapter is None else 0


def _mlp_kept(shape: ModelShape, step: Step) -> Sizes:
    """Bytes of a token that the MLP keeps."""
    each = float(step.width * shape.mlp)
    kept = {"gate": each, "activated gate": each, "up": each}
    if step.adapter is None:
        copies = 2 if step.bf16 else 1
        kept["inputs of gate and up, under autocast one for each"] = step.width * copies * shape.hidden
        kept["input of down"] = each
    return kept


def _adapter_kept(shape: ModelShape, step: Step, adapter: Adapter) -> Sizes:
    """Bytes of a token that LoRA's two matrices keep in a layer, and 8-bit products beside them."""
    width, casts = step.width, casts_inputs(step, adapter)
    inputs = sum(shape.widths[name][0] for name in adapter.targets)
    kept = {"inputs of the second matrices": float(width * adapter.rank * len(adapter.targets))}
    if adapter.dropout:
        kept["dropout: masks"] = inputs * _mask_bytes(step, casts)
    if adapter.dropout or casts:
        kept["inputs of the first matrices, one for each"] = width * inputs
    if adapter.bits == 8:
        kept["inputs of 8-bit products"] = width * (2 * shape.hidden + shape.mlp)
    elif not adapter.dropout and not casts:
        kept["inputs of the first matrices"] = width * _shared_inputs(shape, step, adapter)
    return kept


def _mask_bytes(step: Step, casts: bool) -> int:
    """Of the dropout's mask for a number: CUDA keeps a truth value, others the number that it is multiplied by."""
    if step.device == "cuda":
        return 1
    return 4 if casts else step.width


def _shared_inputs(shape: ModelShape, step: Step, adapter: Adapter) -> int:
    """Width of what adapted projections read, once where they read the same. What o_proj reads is kept as attention's
    result, but by eager attention."""
    width = 0
    for group in SAME_INPUT:
        is_kept_already = group == ("o_proj",) and step.attention != "eager"
        if not is_kept_already and not set(group).isdisjoint(adapter.targets):
            width += shape.widths[group[0]][0]
    return width


def transient(shape: ModelShape, step: Step) -> float:
    """Bytes that come and go in a layer's backward pass, at their most."""
    candidates = [_adapter_transient(step, step.adapter)] if step.adapter else _full_transients(shape, step)
    most = max(each.hidden * shape.hidden + each.mlp * shape.mlp for each in candidates)
    if step.attention == "eager":
        scores = (6 if step.bf16 else 8) * shape.heads * step.length
        most = max(most, scores - 16 * shape.hidden - 4 * step.width * shape.mlp)
    return float(step.tokens * most)


def _full_transients(shape: ModelShape, step: Step) -> list[Transient]:
    """Of all weights' training, of which the largest counts."""
    if not step.bf16:
        return [Transient(hidden=0, mlp=8)]
    found = [Transient(hidden=5, mlp=2)]
    if shape.norms_twice:
        found.append(Transient(hidden=21, mlp=0))
    if not step.checkpointing:
        found.append(Transient(hidden=26, mlp=0))
    return found


def _adapter_transient(step: Step, adapter: Adapter) -> Transient:
    adapts_mlp = not set(PROJECTIONS[4:]).isdisjoint(adapter.targets)
    if adapter.bits and adapts_mlp and casts_inputs(step, adapter):
        return CAST_TRANSIENT[adapter.bits, adapter.dropout]
    counts_bits = step.bf16 or (adapter.bits == 4 and adapts_mlp)
    return ADAPTER_TRANSIENT[Case(step.bf16, adapter.bits if counts_bits else None, adapter.dropout, adapts_mlp)]
