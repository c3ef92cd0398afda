"""The memory formula beside traces of the real step, the traces beside real steps, and numbers that a person can check.

benchmarks/memory.py compares hundreds of random cases.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import Run
from fixtures import make_model, write_texts
from lacuna.config.finetune import FinetuneConfig
from lacuna.cost.memory import QUANTISED_BYTES, chunk_of, step_memory, total
from lacuna.cost.shape import PROJECTIONS, Adapter, ModelShape, Step, model_shape
from lacuna.finetune.adapters import _keep_as_loaded, quantisation
from lacuna.preflight import trace
from lacuna.words import GIB
from model_configs import MODELS

ALL, ATTENTION, QV, MLP = PROJECTIONS, PROJECTIONS[:4], ("q_proj", "v_proj"), PROJECTIONS[4:]


def shape_of(name: str) -> ModelShape:
    shape = model_shape(MODELS[name])
    assert shape is not None
    return shape


def full(precision: str, **settings: Any) -> Step:
    return Step(**{"rows": 2, "length": 2048, "bf16": precision == "bf16", "checkpointing": True, **settings})


def lora(*adapter: Any, bits: int | None = None, double: bool = True, **settings: Any) -> Step:
    return full(settings.pop("precision", "bf16"), adapter=Adapter(*adapter, bits=bits, double=double), **settings)


PLAIN: dict[str, Any] = {"checkpointing": False}
ONCE: dict[str, Any] = {"accumulates": False}
CPU: dict[str, Any] = {"device": "cpu"}
LARGE: dict[str, Any] = {"rows": 8, "length": 4096}
CASES: list[tuple[str, Step]] = [
    ("SmolLM2-135M", full("fp32", **PLAIN)),
    ("SmolLM2-135M", full("bf16", **PLAIN, **ONCE, rows=8, length=512)),
    ("SmolLM2-135M", lora(8, QV, True, precision="fp32", **CPU)),
    ("SmolLM2-135M", lora(16, ALL, True, bits=4, precision="fp32", **CPU)),
    ("SmolLM2-135M", lora(64, ALL, False, bits=8, **ONCE)),
    ("Llama-3.2-1B", full("bf16")),
    ("Llama-3.2-1B", full("fp32", **PLAIN, **ONCE, rows=1)),
    ("Llama-3.2-1B", full("bf16", **ONCE, rows=8, length=512, **CPU)),
    ("Llama-3.2-1B", lora(16, ALL, True, **PLAIN)),
    ("Llama-3.2-1B", lora(64, ATTENTION, False, precision="fp32", rows=1, length=8192)),
    ("Llama-3.1-8B", full("fp32", **LARGE)),
    ("Llama-3.1-8B", full("bf16", **PLAIN)),
    ("Llama-3.1-8B", lora(16, ALL, True)),
    ("Llama-3.1-8B", lora(8, QV, False, **PLAIN, **ONCE)),
    ("Llama-3.1-8B", lora(64, ALL, True, bits=4, **LARGE)),
    ("Llama-3.1-8B", lora(16, ALL, False, bits=8, **PLAIN)),
    ("Llama-2-7B", full("bf16", **ONCE)),
    ("Llama-2-7B", lora(32, MLP, True, bits=4)),
    ("Llama-2-7B", lora(32, ALL, True, precision="fp32", **PLAIN)),
    ("Mistral-7B-v0.3", lora(16, ALL, True, bits=4, rows=4, length=4096)),
    ("Mistral-7B-v0.3", lora(16, ALL, True, bits=4, rows=1, double=False, **CPU)),
    ("Mistral-7B-v0.3", lora(16, ALL, True, bits=4, rows=4, length=4096, **PLAIN)),
    ("Mistral-7B-v0.3", lora(8, QV, False, bits=8, length=8192)),
    ("Mistral-7B-v0.3", full("fp32", length=8192, **PLAIN)),
    ("Qwen2.5-0.5B", full("fp32", **ONCE)),
    ("Qwen2.5-0.5B", full("bf16", rows=8, **PLAIN)),
    ("Qwen2.5-0.5B", lora(8, ATTENTION, True, length=512)),
    ("Qwen2.5-0.5B", lora(32, ALL, False, bits=4, double=False, rows=5, **PLAIN)),
    ("Qwen2.5-7B", full("bf16", rows=1, length=4096)),
    ("Qwen2.5-7B", lora(64, ATTENTION, True, **LARGE)),
    ("Qwen2.5-7B", lora(16, ALL, True, bits=8)),
    ("Qwen3-0.6B", full("fp32", rows=1, length=4096)),
    ("Qwen3-0.6B", full("bf16", rows=4, length=512, **PLAIN)),
    ("Qwen3-0.6B", lora(16, ALL, True, precision="fp32", **ONCE, **CPU)),
    ("Qwen3-8B", full("bf16", length=8192)),
    ("Qwen3-8B", lora(16, ALL, False, rows=3)),
    ("Qwen3-8B", lora(64, QV, True, bits=4)),
    ("Gemma-2B", full("fp32")),
    ("Gemma-2B", full("bf16", **PLAIN, **ONCE)),
    ("Gemma-2B", lora(16, ALL, True, bits=8, **LARGE)),
    ("Gemma-2B", lora(8, QV, False, bits=4, length=1024)),
    ("Gemma-2-2B", full("bf16", rows=1, length=1024, attention="eager")),
    ("Gemma-2-2B", lora(16, ALL, True, length=512, attention="eager", **PLAIN)),
    ("Gemma-3-1B", full("fp32", **ONCE)),
    ("Gemma-3-1B", lora(32, ATTENTION, False, bits=4, rows=6, length=4096)),
]


@pytest.mark.parametrize(("name", "step"), CASES)
def test_the_formula_is_the_traced_peak(name: str, step: Step) -> None:
    traced = trace.trace_memory(AutoConfig.for_model(**MODELS[name]), step).peak
    sizes = step_memory(shape_of(name), step)
    assert 0.97 < (sum(sizes.values()) - sizes["framework"]) / traced < 1.05


@pytest.mark.parametrize(("name", "layers"), [("Llama-3.2-1B", 6), ("Gemma-2-2B", 7)])
def test_two_shallow_models_give_a_deeper_one(name: str, layers: int) -> None:
    config = AutoConfig.for_model(**{**MODELS[name], "num_hidden_layers": layers})
    step = lora(16, QV, True, length=256, attention="eager")
    extended, traced = trace.trace_memory(config, step), trace._trace_depth(config, step, layers)
    assert extended.peaks == pytest.approx(traced.peaks, rel=1e-3)
    assert extended.weights == pytest.approx(traced.weights)


# Traces beside real steps.

TINY = {**MODELS["Llama-3.1-8B"], "hidden_size": 256, "intermediate_size": 768, "vocab_size": 2000}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}


def allocated(profiler: Any) -> float:
    """Most bytes that were there at one time of all that was allocated while it was watched."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def beside_a_product(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> float:
    """Bytes that a product takes for a while beside its result. It depends on the processor.

    In bf16: with units for it packed operands, for each thread; with AVX-512 alone the result in fp32; below, nothing.
    """
    left, right = torch.ones(rows, inputs, dtype=dtype), torch.ones(inputs, outputs, dtype=dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        product = left @ right
    return allocated(profiler) - product.nbytes


@pytest.mark.parametrize(("precision", "checkpointing", "accumulation"), [("bf16", True, 2), ("fp32", False, 1)])
def test_what_pretrain_allocates_is_the_traced_peak(
    run: Run, tmp_path: Path, precision: str, checkpointing: bool, accumulation: int
) -> None:
    folder = make_model(tmp_path / "model", hidden=256)
    data = write_texts(tmp_path / "texts.jsonl", rows=200)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outcome = run(
            "pretrain", model_name=folder, dataset=data, output_dir=tmp_path / "run", steps=2, sequence_length=512,
            batch_size=2 * accumulation, micro_batch_size=2, precision=precision, device="cpu",
            activation_checkpointing=str(checkpointing).lower(), initialise="pretrained",
        )  # fmt: skip
    assert outcome.code == 0, outcome.output
    step = full(precision, length=512, checkpointing=checkpointing, accumulates=accumulation > 1, device="cpu")
    config = AutoConfig.from_pretrained(folder)
    traced = trace.trace_memory(config, step).peak
    dtype = torch.bfloat16 if step.bf16 else torch.float32
    at_the_peak = beside_a_product(step.tokens, config.hidden_size, config.intermediate_size, dtype)
    assert allocated(profiler) == pytest.approx(traced + at_the_peak, rel=0.01)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_bitsandbytes_allocates_the_traced_peak(tmp_path: Path, bits: int, checkpointing: bool) -> None:
    config = AutoConfig.for_model(**TINY)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    settings = {"method": "qlora", "quantization_bits": bits}
    finetune = FinetuneConfig.model_validate({"model_name": "m", "dataset": "d", **settings})
    causal_lm = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=quantisation(finetune, torch.bfloat16)
    )
    _keep_as_loaded(causal_lm)
    step = lora(8, ALL, True, bits=bits, rows=1, checkpointing=checkpointing, device="cpu")
    assert step.adapter is not None
    model = trace._adapted(causal_lm, step.adapter, "cpu").train()
    if checkpointing:
        causal_lm.activation_checkpointing_enable()
    tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    weights = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trace._take_step(model, causal_lm, step, torch.bfloat16, trace.MemoryTracker())
    traced = trace.trace_memory(config, step)
    assert traced.weights == pytest.approx(weights, rel=0.02)
    assert weights + allocated(profiler) == pytest.approx(traced.peak, rel=0.03)


# Small numbers.

SMALL = ModelShape(
    "llama", hidden=8, layers=2, mlp=16, heads=2, key_value_heads=1, head_dimension=4, vocabulary=100, tied=False
)
MATRICES = 2 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16)
PARAMETERS = MATRICES + 2 * 2 * 8 + 8 + 2 * 100 * 8


def test_full_fine_tuning_holds_sixteen_bytes_a_parameter() -> None:
    sizes = step_memory(SMALL, full("bf16", rows=1, length=4))
    assert SMALL.parameters == PARAMETERS == 2792
    assert (sizes["weights"], sizes["gradients"], sizes["optimizer"]) == (4 * 2792, 4 * 2792, 8 * 2792)
    assert sizes["framework"] == 0.75 * GIB


def test_an_adapter_alone_is_trained() -> None:
    sizes = step_memory(SMALL, lora(2, QV, False, rows=1, length=4))
    adapter = 2 * 2 * ((8 + 8) + (8 + 4))
    assert sizes["weights"] == 2 * PARAMETERS + 4 * adapter
    assert (sizes["gradients"], sizes["optimizer"]) == (4 * adapter, 8 * adapter)
    quantised = step_memory(SMALL, lora(2, QV, False, bits=4, rows=1, length=4))
    assert sizes["weights"] - quantised["weights"] == (2 - QUANTISED_BYTES[4, True]) * MATRICES


def test_quantised_bytes() -> None:
    assert QUANTISED_BYTES[4, True] == 0.5 + 1 / 64 + 4 / 16384
    assert QUANTISED_BYTES[4, False] == 0.5 + 4 / 64
    assert QUANTISED_BYTES[8, True] == QUANTISED_BYTES[8, False] == 1


@pytest.mark.parametrize(
    ("device", "vocabulary", "chunk", "tokens"),
    [("cpu", 32768, None, 256), ("cuda", 32768, None, 4096), ("cuda", 2**20, None, 256), ("mps", 2**16, 100, 100)],
)
def test_logits_of_a_chunk_exist_at_one_time(device: str, vocabulary: int, chunk: int | None, tokens: int) -> None:
    assert chunk_of(full("bf16", rows=4, device=device, chunk=chunk), vocabulary) == tokens
    assert chunk_of(full("bf16", rows=1, length=8, device=device), vocabulary) == 8


def test_processes_share_what_is_trained_in_full_and_nothing_of_an_adapter() -> None:
    step = full("bf16", processes=4)
    assert step_memory(SMALL, step)["optimizer"] == 8 * PARAMETERS / 4
    layer = SMALL.block_matrices + SMALL.block_vectors
    gathered = 2 * (2 * 100 * 8 + 2 * layer) + 6 * layer
    assert step_memory(SMALL, step)["weights"] == 4 * PARAMETERS / 4 + gathered
    one, four = (step_memory(SMALL, lora(2, QV, False, processes=processes)) for processes in (1, 4))
    assert four == {**one, "gradients": 2 * one["gradients"]}


def test_flash_attention_keeps_no_mask_and_no_repeated_keys() -> None:
    sdpa, flash = (lora(16, ALL, True, attention=name) for name in ("sdpa", "flash_attention_2"))
    for name in ("inputs", "activations"):
        assert (
            step_memory(shape_of("Mistral-7B-v0.3"), flash)[name] < step_memory(shape_of("Mistral-7B-v0.3"), sdpa)[name]
        )


def test_peft_casts_quantised_inputs_where_there_is_no_cuda() -> None:
    on_cuda, on_a_mac = (lora(16, ALL, False, bits=4, device=device) for device in ("cuda", "mps"))
    shape = shape_of("Mistral-7B-v0.3")
    assert step_memory(shape, on_a_mac)["activations"] > step_memory(shape, on_cuda)["activations"]


# What holds for every shape.

SHAPES = st.builds(
    ModelShape,
    family=st.sampled_from(["llama", "qwen3", "gemma", "gemma3"]),
    hidden=st.sampled_from([1024, 2048, 4096]),
    layers=st.integers(8, 64),
    mlp=st.sampled_from([4096, 11008, 14336]),
    heads=st.just(32),
    key_value_heads=st.sampled_from([1, 2, 8, 32]),
    head_dimension=st.sampled_from([64, 128]),
    vocabulary=st.sampled_from([32000, 151936]),
    tied=st.booleans(),
)
ADAPTERS = st.builds(
    Adapter, st.integers(1, 128), st.sampled_from([ALL, ATTENTION, QV, MLP]), st.booleans(), st.sampled_from([None, 4])
)
STEPS = st.builds(
    Step, st.integers(1, 16), st.sampled_from([256, 1024, 4096, 8192]), st.just(True), st.booleans(),
    st.sampled_from(["cuda", "mps", "cpu"]), st.booleans(), st.sampled_from(["sdpa", "flash_attention_2"]),
    st.none() | ADAPTERS,
)  # fmt: skip


@given(SHAPES, STEPS)
def test_the_parts_are_the_whole_and_none_is_negative(shape: ModelShape, step: Step) -> None:
    sizes = step_memory(shape, step)
    assert sum(sizes.values()) == pytest.approx(total(shape, step))
    assert all(size >= 0 for size in sizes.values())


@given(SHAPES, STEPS)
def test_more_takes_more(shape: ModelShape, step: Step) -> None:
    before = total(shape, step)
    assert total(shape, replace(step, rows=step.rows + 1)) > before
    assert total(shape, replace(step, length=2 * step.length)) > before
    assert total(replace(shape, layers=shape.layers + 1), step) > before
    if step.adapter:
        assert total(shape, replace(step, adapter=replace(step.adapter, rank=2 * step.adapter.rank))) > before


@given(SHAPES, STEPS)
def test_checkpointing_never_takes_more(shape: ModelShape, step: Step) -> None:
    assert total(shape, replace(step, checkpointing=True)) <= total(shape, replace(step, checkpointing=False))


@given(SHAPES, STEPS, st.integers(1, 64))
def test_qlora_takes_less_than_lora_and_lora_less_than_full(shape: ModelShape, step: Step, rank: int) -> None:
    """On CUDA and with checkpointing: without, LoRA's dropout keeps more of the tokens than it saves on weights."""
    step = replace(step, rows=1, length=2048, checkpointing=True, device="cuda")
    adapter = Adapter(rank)
    qlora, lora_, full_ = (
        total(shape, replace(step, adapter=adapter)) for adapter in (replace(adapter, bits=4), adapter, None)
    )
    assert qlora < lora_ < full_
