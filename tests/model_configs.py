"""The numbers in the config.json of real models."""

from typing import Any

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _config(
    model_type: str, hidden: int, layers: int, mlp: int, heads: int, key_value_heads: int, vocabulary: int,
    tied: bool = False, **others: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": model_type, "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp,
        "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, **SPECIAL, **others,
    }  # fmt: skip


MODELS = {
    "SmolLM2-135M": _config("llama", 576, 30, 1536, 9, 3, 49152, True),
    "Llama-3.2-1B": _config("llama", 2048, 16, 8192, 32, 8, 128256, True, head_dim=64),
    "Llama-3.1-8B": _config("llama", 4096, 32, 14336, 32, 8, 128256),
    "Llama-2-7B": _config("llama", 4096, 32, 11008, 32, 32, 32000),
    "Mistral-7B-v0.3": _config("mistral", 4096, 32, 14336, 32, 8, 32768, sliding_window=None),
    "Qwen2.5-0.5B": _config("qwen2", 896, 24, 4864, 14, 2, 151936, True),
    "Qwen2.5-7B": _config("qwen2", 3584, 28, 18944, 28, 4, 152064),
    "Qwen3-0.6B": _config("qwen3", 1024, 28, 3072, 16, 8, 151936, True, head_dim=128),
    "Qwen3-8B": _config("qwen3", 4096, 36, 12288, 32, 8, 151936, head_dim=128),
    "Gemma-2B": _config("gemma", 2048, 18, 16384, 8, 1, 256000, True, head_dim=256),
    "Gemma-2-2B": _config("gemma2", 2304, 26, 9216, 8, 4, 256000, True, head_dim=256),
    "Gemma-3-1B": _config("gemma3_text", 1152, 26, 6912, 4, 1, 262144, True, head_dim=256),
}
