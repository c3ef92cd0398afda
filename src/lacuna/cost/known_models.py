"""The numbers in the config.json of the models that the shipped configs name, so that these can be planned anywhere."""

from typing import Any

QWEN: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
}  # fmt: skip
MISTRAL: dict[str, Any] = {
    "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32768,
    "tie_word_embeddings": False, "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
    "sliding_window": None,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257,
}  # fmt: skip
KNOWN_MODELS = {
    "Qwen/Qwen2.5-0.5B": QWEN,
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN,
    "mistralai/Mistral-7B-Instruct-v0.3": MISTRAL,
    "gpt2": GPT2,
}
