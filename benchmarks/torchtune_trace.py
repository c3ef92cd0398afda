"""Runs inside torchtune's environment, as a script: the peak of a recipe's step, and parameters, without any weights.

Reads one JSON request on standard input and answers with one JSON line. `traces`: torchtune configs with `length`, the
tokens of every row. The recipe's model takes two steps under fake tensors, which have shapes and no values, while a
dispatch mode adds up the storages that are alive (each rounded up to 512 bytes, as CUDA's allocator does). `builds`:
pairs of a builder and its arguments, of which parameters are counted. It can import torchtune, but not lacuna.
"""

import json
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torchtune import config, modules, training  # type: ignore[import-not-found]
from torchtune.models.llama3_1 import Llama3ScaledRoPE  # type: ignore[import-not-found]
from torchtune.modules.peft import get_adapter_params, set_trainable_params  # type: ignore[import-not-found]

Llama3ScaledRoPE.apply_scaling = lambda self, frequencies, *rest: frequencies  # its branches read values; same shapes
torch.nn.functional.dropout = lambda x, p, training, inplace: torch.native_dropout(x, p, training)[0]  # as on CUDA


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "NF4Tensor" for kind in types):
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = -(-storage.nbytes() // 512) * 512
            self.now += self.sizes[storage._cdata]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def make(section: Mapping[str, Any], *arguments: Any) -> Any:
    return config.instantiate(OmegaConf.create(dict(section)), *arguments)


def build(section: Mapping[str, Any]) -> Any:
    model = make(section)
    if adapters := get_adapter_params(model):
        set_trainable_params(model, adapters)
    return model


def trace(run: Mapping[str, Any]) -> int:
    """Bytes at the peak of the second step, when the optimizer has its states."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[run["dtype"]]
    rows, in_backward = run["batch_size"], run.get("optimizer_in_bwd", False)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        with training.set_default_dtype(dtype):
            model = build(run["model"])
        if run.get("enable_activation_checkpointing"):
            training.set_activation_checkpointing(model, {modules.TransformerSelfAttentionLayer})
        loss = make(run["loss"])
        if chunks := run["loss"].get("num_output_chunks", 8 if "Chunked" in run["loss"]["_component_"] else 0):
            model.set_num_output_chunks(chunks)
        if in_backward:
            each = {weight: make(run["optimizer"], [weight]) for weight in model.parameters()}
            training.register_optim_in_bwd_hooks(model=model, optim_dict=each)
        else:
            optimizer = make(run["optimizer"], model.parameters())
        for _ in range(2):
            live.peak = live.now
            for _ in range(run.get("gradient_accumulation_steps", 1)):
                micro_batch(model, loss, rows, run)
            if not in_backward:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return live.peak


def micro_batch(model: Any, loss: Any, rows: int, run: Mapping[str, Any]) -> None:
    tokens = torch.zeros(rows, run["length"], dtype=torch.long)
    positions = {"input_pos": torch.zeros_like(tokens)} if run.get("dataset", {}).get("packed") else {}
    logits = model(tokens, **positions)
    labels = torch.hstack((torch.zeros_like(tokens)[..., 1:], torch.full((rows, 1), -100)))
    if not isinstance(logits, list):
        labels, logits = labels.reshape(-1), logits.reshape(-1, logits.size(-1))
    value = loss(logits, labels) * rows
    del logits
    value.backward()


def parameters(component: str, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """All, and those that are trained."""
    with torch.device("meta"):
        model = build({"_component_": component, **arguments})
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr
    request = json.load(sys.stdin)
    found = {"traces": [trace(run) for run in request.get("traces", [])]}
    print(json.dumps({**found, "builds": [parameters(*pair) for pair in request.get("builds", [])]}), file=answer)
