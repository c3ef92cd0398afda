"""The FLOP formula against torch's own count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GemmaConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from lacuna.machine.detect import Device
from lacuna.train.metrics import Window, model_flops

BASE = {"vocab_size": 500, "max_position_embeddings": 4096}
LLAMA = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = [
    (LlamaConfig(**BASE, **LLAMA, num_key_value_heads=4), 1, 64),
    (LlamaConfig(**BASE, **LLAMA, num_key_value_heads=2), 3, 32),
    (LlamaConfig(**BASE, **{**LLAMA, "num_hidden_layers": 5}, num_key_value_heads=1, tie_word_embeddings=True), 2, 40),
    (Qwen2Config(**BASE, **LLAMA, num_key_value_heads=2), 2, 64),
    (Qwen2Config(**{**BASE, "vocab_size": 5000}, **LLAMA, num_key_value_heads=2, tie_word_embeddings=True), 1, 16),
    (Qwen3Config(**BASE, **LLAMA, num_key_value_heads=2, head_dim=32), 2, 48),
    (Qwen3Config(**BASE, **{**LLAMA, "hidden_size": 96}, num_key_value_heads=4, head_dim=16), 1, 200),
    (MistralConfig(**BASE, **LLAMA, num_key_value_heads=2, sliding_window=None), 2, 64),
    (GemmaConfig(**BASE, **LLAMA, num_key_value_heads=1, head_dim=16), 2, 64),
    (GPT2Config(vocab_size=500, n_embd=64, n_layer=3, n_head=4, n_positions=256), 2, 64),
]


@pytest.mark.parametrize(("config", "batch", "length"), SHAPES)
def test_formula_agrees_with_torchs_count(config: object, batch: int, length: int) -> None:
    """torch counts the whole attention square, so the formula gets all length² pairs and every token as a target."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    flops = model_flops(model, length)
    assert flops is not None
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(500, (batch, length)), use_cache=False).logits.sum().backward()
    tokens = batch * length
    ours = flops.training(tokens, targets=tokens, attention_pairs=batch * length**2)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_a_small_case_by_hand() -> None:
    """One layer of width 4: q, k, v, o have 16 weights each, the three MLP matrices 4 × 6; the head 4 × 10."""
    config = LlamaConfig(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    flops = model_flops(AutoModelForCausalLM.from_config(config), 8)
    assert flops is not None
    assert flops.block_parameters == 4 * 16 + 3 * 24
    assert flops.training(tokens=8, targets=3, attention_pairs=36) == 6 * 136 * 8 + 6 * 40 * 3 + 12 * 4 * 36
    assert flops.palm(tokens=8, sequence_length=8) == 8 * (6 * flops.all_parameters + 12 * 4 * 8)


def test_no_number_where_the_formula_would_be_wrong() -> None:
    experts = MixtralConfig(**BASE, **LLAMA, num_key_value_heads=2, num_local_experts=2)
    assert model_flops(AutoModelForCausalLM.from_config(experts), 64) is None
    window = Qwen2Config(
        **BASE, **LLAMA, num_key_value_heads=2, use_sliding_window=True, sliding_window=32, max_window_layers=0
    )
    assert model_flops(AutoModelForCausalLM.from_config(window), 64) is None
    assert model_flops(AutoModelForCausalLM.from_config(window), 32) is not None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA L40", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_the_peak_is_of_just_this_product_or_unknown(name: str, peak: float | None) -> None:
    assert Device("cuda", name).peak_bf16_flops == peak


def test_no_number_for_a_window_or_layers_of_another_kind() -> None:
    window = MistralConfig(**BASE, **LLAMA, num_key_value_heads=2, sliding_window=32)
    assert model_flops(AutoModelForCausalLM.from_config(window), 64) is None
    convolution = Lfm2Config(**BASE, **LLAMA, num_key_value_heads=2, full_attn_idxs=[1])
    assert model_flops(AutoModelForCausalLM.from_config(convolution), 64) is None


def test_the_peak_is_only_used_where_it_is_known() -> None:
    window = Window(seconds=2.0, data_seconds=0.5, tokens=100, flops=10**12, palm_flops=2 * 10**12)
    assert window.speed(None) == {"tokens_per_second": 50.0, "data_wait": 0.25}
    assert window.speed(1e12) == {"tokens_per_second": 50.0, "data_wait": 0.25, "mfu": 0.5, "mfu_palm": 1.0}
