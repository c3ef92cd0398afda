"""Chat templates with the shapes of the field's, and what the renderer makes of a conversation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fixtures import CHATML, WORDS
from lacuna.data.chat import Renderer, Sample, Unusable
from lacuna.data.formats import Conversation

CHATML_MARKED = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{%- generation %}{{ m.content + '<|im_end|>' }}{%- endgeneration %}{{ '\n' }}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
CHATML_WIDELY_MARKED = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{%- endgeneration %}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{%- for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}"
    "{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}"
    "{%- for m in rest %}{%- if m.role == 'user' %}{%- if system is defined and m == users[-1] %}"
    "{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}{%- else %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{%- endif %}{%- else %}{{ ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{%- for m in messages %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{%- endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{%- endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set words = m.content %}{%- set thought = '' %}"
    "{%- if '</think>' in words %}"
    "{%- set thought = words.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set words = words.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + words.lstrip('\n') }}"
    "{%- else %}{{ '<|im_start|>assistant\n' + words }}{%- endif %}{{ '<|im_end|>\n' }}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{%- elif m.role == 'system' %}{{ m.content }}"
    "{%- else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{%- endif %}"
)
GPT_OSS = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{ '<|start|>assistant<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{%- endif %}"
)
CONTROL = [
    "<eos>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<｜User｜>", "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>", "<|start|>", "<|message|>", "<|end|>", "<|return|>",
]  # fmt: skip


@cache
def byte_level() -> Tokenizer:
    """Byte-level BPE that joins newlines and spaces, as the real ones do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=440,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS) + "\n\n\n\nassistant\n\n    user\n\n" * 9] * 20, trainer)
    return tokenizer


def renderer(template: str | None, eos: str = "<eos>", bos: str | None = "<s>", **tokens: Any) -> Renderer:
    copy = Tokenizer.from_str(byte_level().to_str())
    named = {"bos_token": bos, "eos_token": eos, "pad_token": "<pad>", **tokens}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=copy, extra_special_tokens=CONTROL, **{k: v for k, v in named.items() if v is not None}
    )
    fast.chat_template = template
    return Renderer(fast)


@dataclass(frozen=True)
class Family:
    """A template, and what it makes of what the assistant says."""

    template: str
    said: Callable[[str, bool], str]
    """(content, whether it is the last turn) → the text to be learned."""
    eos: str = "<eos>"
    prompt_is_prefix: bool = True


FAMILIES = {
    "chatml": Family(CHATML, lambda words, _: words + "<|im_end|>"),
    "chatml marked": Family(CHATML_MARKED, lambda words, _: words + "<|im_end|>"),
    "llama3": Family(LLAMA3, lambda words, _: words.strip() + "<|eot_id|>"),
    "mistral": Family(MISTRAL, lambda words, _: " " + words + "</s>", eos="</s>"),
    "gemma": Family(GEMMA, lambda words, _: words.strip() + "<end_of_turn>"),
    "qwen3": Family(
        QWEN3,
        lambda words, last: ("<think>\n\n</think>\n\n" + words.lstrip("\n") if last else words) + "<|im_end|>",
    ),
    "deepseek": Family(
        DEEPSEEK,
        lambda words, _: words + "<｜end▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        prompt_is_prefix=False,
    ),
}


@cache
def family_renderer(name: str) -> Renderer:
    return renderer(FAMILIES[name].template, FAMILIES[name].eos)


def dialogue(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Contents of user and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


def result(subject: Renderer, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> Sample | Unusable:
    (found,) = subject.conversations([Conversation(messages, tools, "data.jsonl:7")])
    return found


def sample(subject: Renderer, messages: list[dict[str, Any]]) -> Sample:
    found = result(subject, messages)
    assert isinstance(found, Sample), found
    return found


def learned(subject: Renderer, found: Sample) -> list[str]:
    """The text of each unbroken run of supervised tokens."""
    borders = np.flatnonzero(np.diff(np.concatenate([[0], found.supervised.astype(int), [0]]))).reshape(-1, 2)
    return [decoded(subject, found.tokens[start:end]) for start, end in borders]


def decoded(subject: Renderer, tokens: Sequence[int] | np.ndarray) -> str:
    text = subject.tokenizer.decode(list(map(int, tokens)), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def encoded(subject: Renderer, text: str) -> list[int]:
    return list(subject.tokenizer(text, add_special_tokens=False)["input_ids"])
