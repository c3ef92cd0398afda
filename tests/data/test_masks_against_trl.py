"""What we learn of a conversation beside TRL's assistant-only loss, on the templates that TRL prepared for training.

TRL knows which tokens are the assistant's only where somebody wrote `{% generation %}` marks into a copy of the
template. We find them in the model's own template. What the assistant must say at inference is the measure of both:
from where the generation prompt ends up to and including its end-of-turn token. Every difference is stated in PAIRS.

TRL's templates are read from the installed package.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fixtures import WORDS
from lacuna.data.chat import Renderer
from lacuna.data.samples import Sample, Unusable
from lacuna.errors import ModelError
from templates import MISTRAL, decoded, dialogue, encoded, learned, result, sample

trl_templates = pytest.importorskip("trl.chat_template_utils", reason="compares with TRL, of lacuna[finetune]")
FOLDER = Path(trl_templates.__file__).parent / "chat_templates"

NO_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Pair:
    """NAME.jinja and NAME_training.jinja, and what TRL learns besides the assistant's words."""

    ends: str
    """What the assistant says last, by which generation stops. Written by hand, from the models' own settings."""
    before: str = ""
    """TRL also learns this before the words. We do not: the generation prompt supplies it."""
    after: str = ""
    """TRL also learns this after the end of turn. We do not: generation has stopped there."""
    after_all: str = ""
    """The same, after the last turn only."""
    rewritten: str = ""
    """TRL's copy writes this before the words of earlier turns, and learns it. The model's own template does not write
    it there, so a model in its second turn never sees such a first turn; we keep the model's own template."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """What makes the template's generation prompt ask for a reply without a thought."""
    prompts_to_think: str = ""
    """What the generation prompt goes on with, and replies without a thought do not have."""
    joins: bool = False
    """TRL's tokens reach over the end of the generation prompt, so that the model learns from others than it sees."""
    takes_system: bool = True


CHATML = Pair("<|im_end|>", after="\n")
DEEPSEEK = Pair("<｜end▁of▁sentence｜>", before="<｜Assistant｜>", prompts_to_think="<think>\n")
GEMMA = Pair("<end_of_turn>", after="\n")
NEMOTRON = Pair("<|im_end|>", before="<think></think>", after="\n", asked={"enable_thinking": False})
PHI3 = Pair("<|end|>", after="\n", after_all="</s>")
QWEN3_5 = Pair("<|im_end|>", before="<think>\n", after="\n", rewritten=NO_THOUGHT, joins=True)

PAIRS = {
    "cohere": Pair("<|END_OF_TURN_TOKEN|>"),
    "cohere2": Pair("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "deepseek_r1_distill": DEEPSEEK,
    "deepseekv3": DEEPSEEK,
    "diffusion_gemma": Pair("<turn|>", after="\n"),
    "gemma": Pair("<end_of_turn>", after="\n", takes_system=False),
    "gemma3": GEMMA,
    "gptoss": Pair("<|return|>", before="<|start|>assistant"),
    "lfm2": CHATML,
    "lfm2_v2": CHATML,
    "llama3": Pair("<|eot_id|>"),
    "muse_glimmer": Pair("<|eot|>", before="<|start|>assistant"),
    "nemotron_3_5_lightning": NEMOTRON,
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_ultra": NEMOTRON,
    "phi3": PHI3,
    "phi3_5": PHI3,
    "qwen2_5": Pair("<|im_end|>", before="\n", after="\n"),
    "qwen2_5_vl": CHATML,
    "qwen3": Pair("<|im_end|>", after="\n", rewritten=NO_THOUGHT),
    "qwen3_5_nothink": Pair("<|im_end|>", before=NO_THOUGHT, after="\n", rewritten=NO_THOUGHT),
    "qwen3_5_think": QWEN3_5,
    "qwen3_6": QWEN3_5,
    "qwen3_8": Pair("<|im_end|>", before="<think>\n", after="\n", joins=True),
    "qwen3_instruct_2507": CHATML,
    "qwen3_vl": CHATML,
}
GLM = "glm4moe"
"""It writes no end of turn after the last reply, so its own template is refused: see its own test."""
VISION = {"idefics3", "llava_next", "smolvlm"}
"""Left out: they read `content` as a list of texts and images, and write nothing of a plain one."""

CONVERSATIONS = {
    "one turn": dialogue("hello", "river stone"),
    "unicode": dialogue("grüß dich 🦊", "日本語 🏳️‍🌈 – naïve café – ok"),
    "turns": dialogue("one", "two", "three", "four"),
    "repeated": dialogue(*["same"] * 6),
    "system": dialogue("q", "a", "q2", "a2", system="be brief"),
    "spaces": dialogue(" q ", "  a ", "\tq2\n", " a2  "),
    "lines": dialogue("q\n\nr", "first\n\n\n  code:\n", "q2", "second\n\n"),
}


def cases() -> list[Any]:
    """Every pair with every conversation that it accepts."""
    found = []
    for name, pair in PAIRS.items():
        for title, messages in CONVERSATIONS.items():
            turns = sum(message["role"] == "assistant" for message in messages)
            if (title == "system" and not pair.takes_system) or (name == "gptoss" and turns > 1):
                continue  # each has its own test
            found.append(pytest.param(name, title, id=f"{name}-{title}"))
    return found


@cache
def template(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


CONTROL = [
    *["<s>", "</s>", "<pad>", "[INST]", "[/INST]"],
    *sorted(
        {
            token
            for name in [*PAIRS, GLM]
            for token in re.findall(
                r"<[|｜][\w▁]+[|｜]?>|<\w+\|>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>", template(name)
            )
        }
    ),
]
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 and Qwen part a text, so that newlines join as theirs do."""


@cache
def byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORD), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(CONTROL) + 420,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS) + "\n\n\n\nassistant\n\n    user\n\n" * 9] * 20, trainer)
    return tokenizer.to_str()


def renderer(chat_template: str) -> Renderer:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level()),
        extra_special_tokens=CONTROL,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    tokenizer.add_tokens(["<think>", "</think>"])  # in Qwen's and DeepSeek's tokenizers too these are no control tokens
    tokenizer.chat_template = chat_template
    return Renderer(tokenizer)


@cache
def own(name: str) -> Renderer:
    """With the template that the model comes with."""
    return renderer(template(name))


@cache
def marked(name: str) -> Renderer:
    """With TRL's copy for training."""
    return renderer(template(f"{name}_training"))


def trl_sample(name: str, messages: list[dict[str, Any]]) -> Sample:
    """What TRL's SFTTrainer trains on with `assistant_only_loss=True`."""
    encoding = own(name).tokenizer.apply_chat_template(
        messages,
        chat_template=template(f"{name}_training"),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return Sample(np.asarray(encoding["input_ids"], np.int32), np.asarray(encoding["assistant_masks"], np.bool_))


def borders(found: Sample) -> NDArray[np.int64]:
    """[runs, 2]: [start, end) of each unbroken run of supervised tokens."""
    return np.flatnonzero(np.diff(np.concatenate([[0], found.supervised.astype(int), [0]]))).reshape(-1, 2)


def widened(subject: Renderer, found: Sample, before: str, after: list[str]) -> list[bool]:
    """Our mask with the stated tokens before each run and after it."""
    mask = found.supervised.copy()
    for (start, end), text in zip(borders(found), after, strict=True):
        mask[start - len(encoded(subject, before)) : end + len(encoded(subject, text))] = True
    return mask.tolist()


def test_every_template_that_trl_prepared_is_compared_or_left_out_by_name() -> None:
    """A newer TRL may bring more. What we call its copy is what TRL itself would take."""
    prepared = {path.name.removesuffix("_training.jinja") for path in FOLDER.glob("*_training.jinja")}
    assert prepared == PAIRS.keys() | {GLM} | VISION
    for name in [*PAIRS, GLM]:
        assert trl_templates.get_training_chat_template(own(name).tokenizer) == template(f"{name}_training")


@pytest.mark.parametrize(
    ("name", "title"),
    cases(),
)
def test_we_learn_what_trl_learns_but_for_the_stated_differences(name: str, title: str) -> None:
    """From the model's own template, without marks: equal tokens and masks, or TRL's are ours and what PAIRS says."""
    subject, pair, messages = own(name), PAIRS[name], CONVERSATIONS[title]
    ours, theirs = sample(subject, messages), trl_sample(name, messages)
    said = learned(subject, ours)
    assert len(said) == sum(message["role"] == "assistant" for message in messages)
    assert all(words.endswith(pair.ends) for words in said)

    earlier = len(said) - 1
    before = [pair.rewritten or pair.before] * earlier + [pair.before]
    after = [pair.after] * earlier + [pair.after + pair.after_all]
    assert learned(subject, theirs) == [a + words + b for a, words, b in zip(before, said, after, strict=True)]

    text, end = "", 0
    for turn, (start, stop) in enumerate(borders(ours)):
        text += decoded(subject, ours.tokens[end:start]) + pair.rewritten * (turn < earlier)
        text, end = text + decoded(subject, ours.tokens[start:stop]), stop
    assert decoded(subject, theirs.tokens) == text + decoded(subject, ours.tokens[end:])

    if not (pair.rewritten and earlier):
        assert (theirs.tokens.tolist() == ours.tokens.tolist()) is not pair.joins
        if not pair.joins:
            assert theirs.supervised.tolist() == widened(subject, ours, pair.before, after)


@pytest.mark.parametrize(("name", "title"), cases())
def test_our_mask_begins_where_the_generation_prompt_ends(name: str, title: str) -> None:
    """So what TRL learns before it, the model never has to say."""
    subject, pair, messages = own(name), PAIRS[name], CONVERSATIONS[title]
    prompt = subject.tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=False, **pair.asked
    )
    prompt = prompt.removesuffix(pair.prompts_to_think)
    assert prompt.endswith(pair.before)
    found = sample(subject, messages)
    before = found.tokens[: borders(found)[-1][0]]
    assert decoded(subject, before) == prompt
    if title == "one turn":  # in later turns an engine may keep its own tokens of the earlier ones
        assert before.tolist() == encoded(subject, prompt)


@pytest.mark.parametrize(
    ("name", "title"),
    cases(),
)
def test_with_trls_own_marks_we_learn_what_is_marked_up_to_the_end_of_turn(name: str, title: str) -> None:
    """--chat-template with TRL's copy: the same tokens and the same start; nothing after the end of turn."""
    subject, pair, messages = marked(name), PAIRS[name], CONVERSATIONS[title]
    ours, theirs = sample(subject, messages), trl_sample(name, messages)
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    after = [pair.after] * (len(borders(ours)) - 1) + [pair.after + pair.after_all]
    assert theirs.supervised.tolist() == widened(subject, ours, "", after)
    assert all(words.endswith(pair.ends) for words in learned(subject, ours))


@pytest.mark.parametrize(
    "name", ["lfm2", "phi3", "qwen2_5", "qwen3_instruct_2507", "qwen3_vl", "qwen3_5_think", "qwen3_8"]
)
def test_a_reply_that_begins_with_newlines_follows_the_prompts_tokens(name: str) -> None:
    """TRL tokenises the whole text, where the prompt's last newline and the reply's first are one token.

    At inference the prompt has been tokenised by itself, so that token never comes. Ours do.
    """
    subject, messages = own(name), dialogue("q", "\n\nstone")
    prompt = encoded(subject, subject.render(messages[:-1], prompt=True))
    ours, theirs = sample(subject, messages), trl_sample(name, messages)
    assert decoded(subject, ours.tokens) == decoded(subject, theirs.tokens)
    assert ours.tokens[: len(prompt)].tolist() == prompt
    assert ours.supervised.argmax() == len(prompt)
    assert theirs.tokens[: len(prompt)].tolist() != prompt


def test_the_last_character_of_a_block_is_learned_whole() -> None:
    """TRL's mask leaves out the last byte of `é` at the end of a marked block, so the words have a hole."""
    messages = dialogue("q", "café")
    subject = own("diffusion_gemma")
    assert learned(subject, sample(subject, messages)) == ["café<turn|>"]
    assert learned(subject, trl_sample("diffusion_gemma", messages)) == ["caf\ufffd", "<turn|>\n"]


def test_gemma_takes_no_system_prompt_from_us_either() -> None:
    messages = dialogue("q", "a", system="be brief")
    found = result(own("gemma"), messages)
    assert isinstance(found, Unusable)
    assert (found.kind, found.detail) == ("refused by the template", "System role not supported")
    with pytest.raises(Exception, match="System role not supported"):
        trl_sample("gemma", messages)


def test_gpt_oss_learns_only_turns_that_end_as_the_model_ends_them() -> None:
    """Earlier turns are written with <|end|>, which the model must not say for <|return|>. TRL learns it all the same.

    Of a longer conversation the last turn can be learned: there we and TRL agree but for the header.
    """
    subject, messages = own("gptoss"), dialogue("q", "a", "q2", "a2")
    found = result(subject, messages)
    assert isinstance(found, Unusable)
    assert found.kind == "no end of turn"
    last = "<|channel|>final<|message|>a2<|return|>"
    theirs = trl_sample("gptoss", messages)
    assert learned(subject, theirs) == [
        "<|start|>assistant<|channel|>final<|message|>a<|end|>",
        "<|start|>assistant" + last,
    ]
    messages[1]["weight"] = 0
    ours = sample(subject, messages)
    assert learned(subject, ours) == [last]
    assert ours.tokens.tolist() == theirs.tokens.tolist()


@pytest.mark.parametrize("title", CONVERSATIONS)
def test_glm_has_an_end_of_turn_only_in_trls_copy(title: str) -> None:
    """GLM stops at the next speaker's token. Its own template does not write one at the end; with TRL's we agree."""
    with pytest.raises(ModelError, match="writes no end-of-turn token"):
        result(own(GLM), CONVERSATIONS[title])
    ours, theirs = sample(marked(GLM), CONVERSATIONS[title]), trl_sample(GLM, CONVERSATIONS[title])
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert ours.supervised.tolist() == theirs.supervised.tolist()
    assert all(words.endswith("<|user|>") for words in learned(marked(GLM), ours))


THOUGHTS = dialogue("q", "<think>\nhm\n</think>\n\na", "q2", "<think>\nhm2\n</think>\n\na2")
PROMPTS_TO_THINK = ["nemotron_3_nano", "nemotron_3_ultra", "qwen3_5_think", "qwen3_6"]


@pytest.mark.parametrize("name", PROMPTS_TO_THINK)
def test_a_thought_that_the_prompt_opens_is_learned_from_there(name: str) -> None:
    """TRL also learns the prompt's `<think>` and newline."""
    subject, messages = own(name), THOUGHTS[2:]
    ours, theirs = sample(subject, messages), trl_sample(name, messages)
    assert learned(subject, ours) == ["hm2\n</think>\n\na2<|im_end|>"]
    assert learned(subject, theirs) == ["<think>\nhm2\n</think>\n\na2<|im_end|>\n"]
    assert ours.tokens.tolist() == theirs.tokens.tolist()


@pytest.mark.parametrize("name", ["nemotron_3_nano", "nemotron_3_ultra"])
def test_thoughts_that_earlier_turns_get_emptied_are_refused_by_name(name: str) -> None:
    """The template writes `<think></think>` into earlier turns, which nobody said and which no prompt supplies."""
    found = result(own(name), THOUGHTS)
    assert isinstance(found, Unusable)
    assert found.kind == "assistant's words not found"


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6"])
def test_the_last_turns_thought_is_learned_also_after_others(name: str) -> None:
    """As with Qwen 3: what the template leaves of earlier turns, and all of the last one from the prompt on."""
    subject = own(name)
    found = sample(subject, THOUGHTS)
    assert learned(subject, found)[-1] == "hm2\n</think>\n\na2<|im_end|>"


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_a_thought_that_the_template_drops_is_refused_by_name(name: str) -> None:
    """Learning only what is left would teach a reasoning model not to reason. TRL's copy for R1 writes the thought."""
    found = result(own(name), THOUGHTS[2:])
    assert isinstance(found, Unusable)
    assert found.kind == "assistant's words not found"


@pytest.mark.parametrize(
    ("name", "said", "rest"),
    [
        (
            "llama3",
            ["stone<|eot_id|>", "a2\n\n b<|eot_id|>"],
            "<s><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "qwen3",
            [" stone <|im_end|>", "<think>\n\n</think>\n\na2\n\n b<|im_end|>"],
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n\n"
            "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n\n",
        ),
        (
            "gemma",
            ["stone<end_of_turn>", "a2\n\n b<end_of_turn>"],
            "<s><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n\n"
            "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\n\n",
        ),
        (
            "phi3",
            [" stone <|end|>", "a2\n\n b<|end|>"],
            "<|user|>\nq<|end|>\n<|assistant|>\n\n<|user|>\nq2<|end|>\n<|assistant|>\n\n</s>",
        ),
    ],
)
def test_learned_and_unlearned_text_read_by_hand(name: str, said: list[str], rest: str) -> None:
    """Not by comparison: what these families' models must say, and all that they are only shown."""
    subject = own(name)
    found = sample(subject, dialogue("q", " stone ", "q2", "a2\n\n b"))
    assert learned(subject, found) == said
    assert decoded(subject, found.tokens[~found.supervised]) == rest


MISTRAL_V3 = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
"""In the format of Mistral 7B Instruct v0.3: no generation prompt, and the words are trimmed."""


@pytest.mark.parametrize("chat_template", [MISTRAL, MISTRAL_V3], ids=["system last", "v0.3"])
def test_mistral_which_trl_refuses_is_learned_exactly(chat_template: str) -> None:
    subject = renderer(chat_template)
    with pytest.raises(ValueError, match="patching is not supported"):
        trl_templates.get_training_chat_template(subject.tokenizer)
    found = sample(subject, dialogue("hello", "river stone", "grüß dich", "日本語 🦊\n\nnaïve café"))
    assert learned(subject, found) == [" river stone</s>", " 日本語 🦊\n\nnaïve café</s>"]
    assert decoded(subject, found.tokens[~found.supervised]) == "<s>[INST] hello[/INST][INST] grüß dich[/INST]"
    prompt = subject.render(dialogue("hello"), prompt=True)
    assert found.tokens[: found.supervised.argmax()].tolist() == encoded(subject, prompt)


def test_a_system_prompt_that_mistral_v3_never_writes_before_a_reply_is_refused_by_name() -> None:
    """It comes with a user's message only if that is the last, and in training the last is the assistant's."""
    found = result(renderer(MISTRAL_V3), dialogue("q", "a", system="be brief"))
    assert isinstance(found, Unusable)
    assert found.kind == "left out by the template"
