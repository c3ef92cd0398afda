"""Prompt templates that torchtune had in 0.2 and has no longer, as what writes the same text in 0.6.1.

# ref: torchtune 0.2.1, torchtune/data/_instruct_templates.py and _chat_formats.py
"""

from collections.abc import Mapping
from typing import Any

from lacuna.config.trees import Values, copied, get, merge, nested

PATH = "tokenizer.prompt_template"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)
DROPPED: Mapping[str, Any] = {
    "AlpacaInstructTemplate": {"user": [ALPACA, "\n\n### Response:\n"]},
    "StackExchangedPairedTemplate": {"user": ["Question: ", "\n\nAnswer: "]},
    "ChatMLFormat": {
        "system": ["<|im_start|>system\n", "<|im_end|>\n"],
        "user": ["<|im_start|>user\n", "<|im_end|>\n"],
        "assistant": ["<|im_start|>assistant\n", "<|im_end|>"],
    },
    "Llama2ChatFormat": "torchtune.models.llama2.Llama2ChatTemplate",
    "MistralChatFormat": "torchtune.models.mistral.MistralChatTemplate",
}
"""Name in torchtune.data to prompt_template: a template's path, or what stands before and after each role's text.

0.6.1 has a ChatMLTemplate too, but that one ends an answer with a line break, which is learned.
"""
MORE = {
    "AlpacaInstructTemplate": "; for rows with a third column of inputs, torchtune.datasets.alpaca_dataset writes "
    "Alpaca's other text",
}


SHIPPED = ("SummarizeTemplate", "QuestionAnswerTemplate", "GrammarErrorCorrectionTemplate", "ChatMLTemplate")
"""Templates of torchtune.data, all with line breaks or spaces next to what they stand around."""


def loses_line_breaks(values: Mapping[str, Any]) -> bool:
    """Whether a template's white space never reaches the model: torchtune's Llama 3 tokenizer strips it from each part
    of a message, and what stands before and after a text are parts of their own.

    # ref: torchtune 0.6.1, torchtune/models/llama3/_tokenizer.py
    """
    template = get(values, PATH)
    if not str(get(values, "tokenizer._component_")).endswith(".llama3_tokenizer"):
        return False
    if isinstance(template, dict):
        texts = [text for pair in template.values() if isinstance(pair, list) for text in pair if isinstance(text, str)]
        return any(text != text.strip() for text in texts)
    return isinstance(template, str) and template.removeprefix("torchtune.data.") in SHIPPED


def with_todays_template(values: Values) -> tuple[Values, str | None]:
    """The config with a dropped template replaced, and the sentence that says so; else the same config and None."""
    given = get(values, PATH)
    name = given.removeprefix("torchtune.data.") if isinstance(given, str) else ""
    if name not in DROPPED:
        return values, None
    todays = DROPPED[name]
    what = todays if isinstance(todays, str) else "the texts before and after each role's"
    said = f"{PATH}: torchtune 0.6.1 has no {given}: it is written as {what}, which gives the same prompts"
    return merge(values, nested(PATH, copied(todays))), said + MORE.get(name, "")
