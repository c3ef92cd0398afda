"""What a torchtune run takes: memory at the peak of a step, and the files of its checkpoints.

Every number is of one GPU. The sizes follow what autograd keeps in torchtune 0.6.1's own modules; a trace of the real
step under fake tensors proves them (benchmarks/torchtune_memory.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lacuna.config.trees import get
from lacuna.torchtune.model import TorchtuneModel
from lacuna.torchtune.settings import Step, read_step

CONTEXT = 0.75 * 2**30
"""CUDA's context, the allocator's rounding and cuBLAS' workspaces."""
NF4_BYTES = 0.5 + 1 / 64
"""Of a weight: four bits, and an 8-bit scale for 64 of them. # ref: arXiv 2305.14314, section 3"""
NF4_BUFFER = 14
"""Bytes for each weight of the matrix that is being turned back: two int64 indices of half of them, four halves in
16 bits, and the result, in torchao's NF4Tensor.get_original_weight."""
STASH = 5
"""Layers' inputs that offloading leaves on the GPU."""
Sizes = dict[str, float]
"""Bytes by what takes them."""


def torchtune_memory(
    model: TorchtuneModel, config: Mapping[str, Any], recipe: str, gpus: int, length: int
) -> Sizes | str:
    """Bytes on each GPU at the peak of a step by what takes them; or, as a sentence, why they are not known.

    length: tokens of the longest row of a batch.
    """
    step = read_step(config, recipe, gpus, length)
    if isinstance(step, str):
        return step
    return max(_moments(model, step), key=lambda sizes: sum(sizes.values()))


def assumptions(config: Mapping[str, Any], gpus: int) -> list[str]:
    """Where the numbers of torchtune_memory are above the truth or are no tensors' sizes, as sentences."""
    optimizer = str(get(config, "optimizer._component_")).rpartition(".")[2]
    cases = {
        "compile: true is planned as false, which takes more": config.get("compile") is True,
        "ac_mode is planned as no checkpointing, which takes more": config.get("ac_mode") is not None,
        f"{optimizer}'s states are planned on the GPU; they move to the host where it is full": "Paged" in optimizer,
        "what FSDP gathers is arithmetic that no trace has proved": gpus > 1,
    }
    return [sentence for sentence, holds in cases.items() if holds]


@dataclass(frozen=True)
class _Parts:
    """Bytes that several moments of a step have in common."""

    gradients: float
    """Of all that is trained, as far as they are kept for the optimizer."""
    earlier: float
    """The same from earlier forward passes."""
    head_gradient: float
    waiting: float
    """The head's gradient, where nothing takes it before the embedding's is there."""
    layer: float
    """What one layer keeps for its backward pass."""
    layer_input: float
    forward: float
    """What all layers keep until the backward pass."""
    recomputed: float
    """What checkpointing makes anew of the layer that is on its way back."""
    outside: float
    """What the last norm and the head keep."""
    in_mlp: float
    """What comes and goes on the way back through an MLP."""
    unsharded: float
    """Gradients of a layer on their way to the processes that keep them, and of the next one."""


def _parts(model: TorchtuneModel, step: Step) -> _Parts:
    shape, width = model.shape, step.width
    gradients = 0 if step.in_backward else width * model.trainable / step.gpus
    head = width * shape.embedding if model.is_full else 0
    layer = step.tokens * _kept_by_layer(model, step)
    layer_input = step.tokens * width * shape.hidden
    on_gpu = min(shape.layers, STASH) if step.offloading else shape.layers
    return _Parts(
        gradients=gradients,
        earlier=gradients if step.accumulates else 0,
        head_gradient=head,
        waiting=head if shape.tied or not step.in_backward else 0,
        layer=layer,
        layer_input=layer_input,
        forward=on_gpu * layer_input if step.checkpointing else shape.layers * layer,
        recomputed=layer if step.checkpointing else 0,
        outside=step.tokens * _kept_outside(model, step),
        in_mlp=step.tokens * width * (3 if model.dropout else 2) * shape.mlp,
        unsharded=2 * width * _trained_by_layer(model) if step.gpus > 1 else 0,
    )


@dataclass(frozen=True)
class _Moment:
    """What there is at a moment of a step besides what is always there, in bytes."""

    gradients: float
    activations: float = 0
    logits: float = 0
    buffers: float = 0
    """For turning a weight back from NF4."""
    states: float = 0
    """That the optimizer makes for a while."""


def _moments(model: TorchtuneModel, step: Step) -> Iterator[Sizes]:
    """The sizes at each moment of a step that can be its peak, in the step's order."""
    parts = _parts(model, step)
    moments = [_end_of_loss(model, step, parts)]
    if model.is_full:
        moments.append(_gradient_of_head(model, step, parts))
    if model.dora:
        moments.append(_norms_recomputed(model, step, parts))
    moments += _last_layer(model, step, parts)
    moments += [_first_layer(model, step, parts), _gradient_of_embedding(model, step, parts)]
    if step.copies_gradients and not step.in_backward:
        moments.append(_Moment(gradients=parts.gradients, states=parts.gradients))
    resident = _resident(model, step)
    for moment in moments:
        yield {
            **resident,
            "optimizer": resident["optimizer"] + moment.states,
            "gradients": moment.gradients,
            "activations": moment.activations,
            "logits and loss": moment.logits,
            "quantisation buffers": moment.buffers,
        }


def _end_of_loss(model: TorchtuneModel, step: Step, parts: _Parts) -> _Moment:
    """Of logits there are those in the weights' dtype and in fp32, or those in fp32 and two more of a chunk."""
    upcast = 4 / step.chunks if step.width == 2 else 0
    bytes_each = max(step.width + 4 + upcast, 4 + 8 / step.chunks)
    logits = model.shape.vocabulary * step.tokens * bytes_each
    return _Moment(gradients=parts.earlier, activations=parts.forward + parts.outside, logits=logits)


def _gradient_of_head(model: TorchtuneModel, step: Step, parts: _Parts) -> _Moment:
    """It is summed over the chunks of logits: the sum, the next summand and the new sum."""
    copies, unread = (3, 1 - 2 / step.chunks) if step.chunks > 1 else (1, 1)
    return _Moment(
        gradients=parts.earlier + copies * parts.head_gradient,
        activations=parts.forward + parts.outside,
        logits=step.width * model.shape.vocabulary * step.tokens * unread,
    )


def _norms_recomputed(model: TorchtuneModel, step: Step, parts: _Parts) -> _Moment:
    """DoRA's norms of weights, in the last layer."""
    passing = step.tokens * step.width * (model.shape.mlp + 2 * model.shape.hidden)
    kept = parts.forward + parts.recomputed + passing
    return _Moment(gradients=parts.earlier, activations=kept + _norms_of_weights(model, step))


def _last_layer(model: TorchtuneModel, step: Step, parts: _Parts) -> list[_Moment]:
    """On its way back: in its MLP, and while a weight is turned back from NF4. FSDP holds the head's gradient whole."""
    whole = parts.waiting if step.gpus > 1 else 0
    gradients = max(parts.earlier, parts.waiting - whole) + whole + parts.unsharded
    kept = parts.forward + parts.recomputed + parts.layer_input
    largest = max((_matrix(model, name) for name in model.quantised), default=0)
    return [
        _Moment(gradients=gradients, activations=kept + parts.in_mlp),
        _Moment(gradients=gradients, activations=kept, buffers=NF4_BUFFER * largest),
    ]


def _first_layer(model: TorchtuneModel, step: Step, parts: _Parts) -> _Moment:
    """On its way back, with the gradients of all layers behind it."""
    so_far = parts.waiting if step.in_backward else parts.gradients
    if model.is_full and not step.in_backward and not parts.earlier:
        so_far -= _ungrown(model, step)
    whole = parts.waiting if step.gpus > 1 else 0
    return _Moment(
        gradients=so_far + whole + parts.unsharded,
        activations=2 * parts.layer_input + parts.layer + parts.in_mlp,
    )


def _gradient_of_embedding(model: TorchtuneModel, step: Step, parts: _Parts) -> _Moment:
    """A tied head's gradient has waited for it, and their sum is a third; one of them counts among all gradients."""
    copies = 3 if model.shape.tied else 1
    if not parts.earlier and not step.in_backward:
        copies -= 1
    return _Moment(gradients=parts.gradients + parts.head_gradient * copies)


def _resident(model: TorchtuneModel, step: Step) -> Sizes:
    """What stays from step to step, and what FSDP gathers of it."""
    shape, width = model.shape, step.width
    quantised = shape.layers * sum(_matrix(model, name) for name in model.quantised)
    plain = width * (shape.parameters + model.adapter_parameters - quantised)
    weights = plain + NF4_BYTES * quantised
    sharded = 0 if step.cpu_offload else 1 / step.gpus
    gathered = 0.0
    if step.gpus > 1:
        outer = width * shape.embedding * (1 if shape.tied or not step.gathers_embedding else 2)
        of_layer = (weights - width * (shape.parameters - shape.layers * _block(model))) / shape.layers
        gathered = outer + of_layer * (2 if step.reshards else shape.layers)
    return {
        "weights": weights * sharded + 4 * model.longest * model.rope * model.rope_tables,
        "gathered by FSDP": gathered,
        "optimizer": step.state_bytes * model.trainable * sharded,
        "framework": CONTEXT,
    }


def _ungrown(model: TorchtuneModel, step: Step) -> float:
    """Gradients that are still to come while the first layer's MLP is on the way back."""
    embedding = 0 if model.shape.tied else model.shape.embedding
    return step.width * (_block(model) - _matrix(model, "down_proj") + embedding) / step.gpus


def _norms_of_weights(model: TorchtuneModel, step: Step) -> float:
    """What DoRA takes for the norms of the largest adapted matrix: an identity, its product, and two sums."""
    taken = [0.0]
    for name in model.adapters if model.dora else ():
        inputs, outputs = model.shape.widths[name]
        sums = max(2 * step.width, NF4_BUFFER if name in model.quantised else 0)
        taken.append(inputs * (step.width * (inputs + outputs) + sums * outputs))
    return max(taken)


def _matrix(model: TorchtuneModel, name: str) -> int:
    inputs, outputs = model.shape.widths[name]
    return inputs * outputs


def _block(model: TorchtuneModel) -> int:
    return model.shape.block_matrices + model.shape.block_vectors


def _trained_by_layer(model: TorchtuneModel) -> float:
    """Parameters of a layer that have a gradient."""
    return _block(model) if model.is_full else model.adapter_parameters / model.shape.layers


def _kept_by_layer(model: TorchtuneModel, step: Step) -> float:
    """Bytes of a token that the backward pass of a layer reads."""
    shape, width, has = model.shape, step.width, model.adapters
    norms = 4 if shape.family == "gemma2" else 2
    kept = norms * 4 * (shape.hidden * (2 if model.is_full else 1) + 1)
    linear = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)]
    kept += 4 * width * shape.attention
    if shape.family == "gemma2":
        kept += 8 * shape.heads * step.length
    else:
        kept += 4 * shape.heads
    kept += 3 * width * shape.mlp
    for group in linear:
        if model.is_full or (not model.dropout and set(group) & set(has)):
            kept += width * shape.widths[group[0]][0]
    for name in has:
        inputs, outputs = shape.widths[name]
        kept += width * model.rank
        kept += (width + 1) * inputs if model.dropout else 0
        kept += 2 * width * outputs if model.dora else 0
    return kept + (2 * 4 * model.rope if step.packed else 0)


def _kept_outside(model: TorchtuneModel, step: Step) -> float:
    """Bytes of a token that the last norm and the head keep."""
    shape = model.shape
    kept = 4 * (shape.hidden * (2 if model.is_full else 1) + 1)
    if model.is_full or model.head_adapter:
        kept += step.width * (shape.hidden + model.rank)
    return kept + (step.width * shape.hidden if shape.family == "gemma2" else 0)


@dataclass(frozen=True)
class CheckpointSizes:
    """Bytes that a run writes below its output_dir."""

    epoch: float
    """In each epoch's folder, all of which stay."""
    recipe_state: float
    """One file, overwritten by every epoch but the last, that resuming needs."""
    whole_run: float


def checkpoint_sizes(model: TorchtuneModel, config: Mapping[str, Any], recipe: str) -> CheckpointSizes | str:
    """Full weights in the config's dtype, adapters beside them, the optimizer's states between epochs.

    The small files that torchtune copies from checkpoint_dir into every epoch's folder are not among them.
    """
    step, epochs = read_step(config, recipe, 1, 1), config.get("epochs")
    if isinstance(step, str):
        return step
    if type(epochs) is not int:
        return f"epochs is {epochs!r}, no whole number"
    if config.get("enable_async_checkpointing") is True:
        return "the size of asynchronous checkpoints is not planned"
    kind = str(get(config, "checkpointer._component_"))
    is_phi = str(get(config, "checkpointer.model_type")).startswith("PHI")
    copies = 2 if kind.endswith("HFCheckpointer") and not is_phi else 1
    weights = 0 if config.get("save_adapter_weights_only") is True else model.shape.parameters
    epoch = float(step.width * (weights + copies * model.adapter_parameters))
    state = step.state_bytes * model.trainable if epochs > 1 else 0.0
    return CheckpointSizes(epoch, state, epochs * epoch + state)
