"""The memory of a step, counted while the real step runs on tensors without data.

The model, its adapter, the loss and the optimizer are those of the trainers; only their tensors are fake, so that a
model of any size is traced in seconds on any machine. Layers are alike: two small depths give every depth.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, TaskType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lacuna.cost.memory import QUANTISED_BYTES, chunk_of
from lacuna.cost.shape import Adapter, Step
from lacuna.finetune.adapters import target_modules, to_fp32
from lacuna.train.model import supervised_loss, transformer_blocks

PIECE = 512
"""Bytes that CUDA's allocator rounds up to."""
PHASES = ("forward", "last layer's backward", "backward", "update")


class MemoryTracker(TorchDispatchMode):
    """Bytes of all tensors that are alive, and their peak in each phase."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.phase = ""
        self.peaks: dict[str, int] = {}
        self._sizes: dict[int, int] = {}

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.peaks[phase] = self.live

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = -(-storage.nbytes() // PIECE) * PIECE
        self.live += self._sizes[key]
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class _PackedProduct(torch.autograd.Function):
    """A product with a weight that is unpacked for it, forward and backward.

    # ref: bitsandbytes/autograd/_functions.py, MatMul4Bit and MatMul8bitLt, of which the second keeps its inputs
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, shape: tuple[int, int], keeps_inputs: bool) -> Tensor:
        ctx.shape = shape
        ctx.inputs = inputs if keeps_inputs else None
        return inputs @ inputs.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] @ gradients[0].new_empty(ctx.shape), None, None


class _Quantised(nn.Module):
    """A projection of bitsandbytes, whose own tensors cannot be fake."""

    def __init__(self, linear: nn.Linear, adapter: Adapter) -> None:
        super().__init__()
        self.bits = adapter.bits or 4
        self.shape = (linear.out_features, linear.in_features)
        size = int(QUANTISED_BYTES[self.bits, adapter.double] * linear.weight.numel())
        self.packed = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        apply: Callable[..., Tensor] = _PackedProduct.apply
        return apply(inputs, self.shape, self.bits == 8)


class _FusedDropout(nn.Module):
    """CUDA's, which keeps a byte for a number; a CPU's keeps the factors."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.native_dropout(inputs, 0.05, True)[0]


class _QuantisedAdapter(nn.Module):
    """One with an adapter, as PEFT has it: it looks for CUDA's autocast alone, and elsewhere casts its inputs to fp32.

    # ref: peft/tuners/lora/bnb.py, requires_conversion
    """

    def __init__(self, adapted: Any, adapter: Adapter, casts: bool) -> None:
        super().__init__()
        self.base = _Quantised(adapted.base_layer, adapter)
        self.first, self.second = adapted.lora_A["default"], adapted.lora_B["default"]
        self.dropout = adapted.lora_dropout["default"]
        self.casts = casts

    def forward(self, inputs: Tensor) -> Tensor:
        product = self.base(inputs)
        result: Tensor = product.clone() if self.base.bits == 4 else product
        inputs = inputs.float() if self.casts else inputs
        change = self.second(self.first(self.dropout(inputs))) * 2.0
        total: Tensor = result + change.to(result.dtype)
        return total


@dataclass(frozen=True)
class Trace:
    """Bytes at the peak of each phase of an optimizer step, and of the frozen and trained weights alone."""

    peaks: dict[str, float]
    weights: float

    @property
    def peak(self) -> float:
        return max(self.peaks.values())


def trace_memory(config: PretrainedConfig, step: Step) -> Trace:
    """Trace a step at two small depths and extend it to the model's own.

    config: of a decoder whose layers are alike, or repeat a pattern of layer types. Both depths have a layer of every
    type below the last one, so that the masks of all types are there until then, as in a deep model.
    """
    text = config.get_text_config()
    period = _period(text.to_dict().get("layer_types") or ["alike"])
    depths = (period + 1, 2 * period + 1)
    if text.num_hidden_layers <= depths[1]:
        return _trace_depth(config, step, text.num_hidden_layers)
    shallow, deep = (_trace_depth(config, step, depth) for depth in depths)
    share: float = (text.num_hidden_layers - depths[0]) / (depths[1] - depths[0])

    def extended(first: float, second: float) -> float:
        return first + share * (second - first)

    peaks = {phase: extended(shallow.peaks[phase], deep.peaks[phase]) for phase in PHASES}
    return Trace(peaks, extended(shallow.weights, deep.weights))


def _period(kinds: list[str]) -> int:
    """After how many layers their kinds repeat."""
    return next(
        period
        for period in range(1, len(kinds) + 1)
        if all(kind == kinds[index % period] for index, kind in enumerate(kinds))
    )


def _trace_depth(config: PretrainedConfig, step: Step, layers: int) -> Trace:
    dtype = torch.bfloat16 if step.bf16 else torch.float32
    short = type(config).from_dict({**config.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(
            short,
            dtype=dtype if step.adapter else torch.float32,
            attn_implementation="eager" if step.attention == "eager" else "sdpa",
        )
        model = _adapted(causal_lm, step.adapter, step.device) if step.adapter else causal_lm
    with FakeTensorMode(), MemoryTracker() as tracker:
        tracker.enter("weights")
        _fill(model)
        causal_lm.tie_weights()
        if step.adapter and step.adapter.bits:
            _quantise(causal_lm, step.adapter, step.device)
        weights = tracker.live
        if step.checkpointing:
            causal_lm.activation_checkpointing_enable()
        _take_step(model.train(), causal_lm, step, dtype, tracker)
    return Trace({phase: float(tracker.peaks[phase]) for phase in PHASES}, weights)


def _adapted(causal_lm: PreTrainedModel, adapter: Adapter, device: str) -> nn.Module:
    """With an adapter on the layers that have these names, or, in a model that has none of them, on all linear ones."""
    known = target_modules(causal_lm, None)
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=adapter.rank,
        lora_dropout=0.05 if adapter.dropout else 0.0,
        target_modules=[name for name in adapter.targets if name in known] or known,
    )
    model = PeftModelForCausalLM(causal_lm, settings)
    to_fp32(model)
    if adapter.dropout and device == "cuda":
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.lora_dropout["default"] = _FusedDropout()
    return model


def _fill(model: nn.Module) -> None:
    """Fake tensors in place of meta ones, which autocast would pass over."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(empty, parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _quantise(causal_lm: PreTrainedModel, adapter: Adapter, device: str) -> None:
    for block in transformer_blocks(causal_lm):
        for parent in list(block.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, LoraLayer):
                    setattr(parent, name, _QuantisedAdapter(module, adapter, device != "cuda"))
                elif isinstance(module, nn.Linear):
                    setattr(parent, name, _Quantised(module, adapter))


def _take_step(
    model: nn.Module, causal_lm: PreTrainedModel, step: Step, dtype: torch.dtype, tracker: MemoryTracker
) -> None:
    """The last forward and backward pass before an update, and the update, with the optimizer's moments there."""
    blocks = transformer_blocks(causal_lm)
    blocks[-1].register_full_backward_hook(lambda *_: tracker.enter("backward"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if not step.accumulates:
        optimizer.zero_grad()
    ids, positions = torch.zeros(2, step.rows, step.length, dtype=torch.int64)
    predicting, targets = torch.zeros(2, step.rows * (step.length - 1), dtype=torch.int64)
    arguments: Any = {"position_ids": positions, "predicting": predicting, "targets": targets}
    chunk = chunk_of(step, causal_lm.config.get_text_config().vocab_size)
    tracker.enter("forward")
    loss = supervised_loss(causal_lm, ids, **arguments, scale=1.0, dtype=dtype, chunked=True, chunk=chunk)
    tracker.enter("last layer's backward")
    loss.backward()
    del loss
    tracker.enter("update")
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
