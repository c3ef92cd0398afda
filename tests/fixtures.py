"""Tiny real models, tokenizers and data for tests, made on the spot."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
TRL_TEMPLATE = (
    "{%- for message in messages %}{%- if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{%- else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
"""ChatML with the marks by which TRL finds the assistant's words."""
WORDS = [
    "river",
    "stone",
    "cloud",
    "amber",
    "field",
    "light",
    "north",
    "quiet",
    "paper",
    "glass",
    "winter",
    "summer",
    "copper",
    "silver",
    "meadow",
]


def make_tokenizer(chat_template: str | None = CHATML, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens with ChatML's control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        **({"bos_token": "<s>"} if bos else {}),
    )
    fast.chat_template = chat_template
    return fast


def make_model(folder: Path, kind: str = "qwen3", vocabulary: int = 400, hidden: int = 32, layers: int = 2) -> Path:
    """A random model of a few thousand weights with its tokenizer, as a Hugging Face folder."""
    import torch

    torch.manual_seed(0)
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "head_dim": hidden // 4,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 3,
    }
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **shape))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def sentence(generator: random.Random, longest: int = 12) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(1, longest)))


def write_chat(path: Path, rows: int = 40, seed: int = 0) -> Path:
    """Conversations of one or two turns, as OpenAI's jsonl."""
    generator = random.Random(seed)
    with path.open("w") as file:
        for _ in range(rows):
            messages = []
            for _ in range(generator.randint(1, 2)):
                messages.append({"role": "user", "content": sentence(generator)})
                messages.append({"role": "assistant", "content": sentence(generator)})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_texts(path: Path, rows: int = 60, seed: int = 0) -> Path:
    generator = random.Random(seed)
    path.write_text("".join(json.dumps({"text": sentence(generator, 40)}) + "\n" for _ in range(rows)))
    return path
