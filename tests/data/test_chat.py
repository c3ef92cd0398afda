"""The one renderer, on templates with the shapes of the field's: what is learned is what the assistant says."""

from datetime import date
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fixtures import CHATML, TRL_TEMPLATE, WORDS, make_tokenizer
from lacuna.data.chat import Renderer
from lacuna.data.formats import Conversation, Message, Text
from lacuna.data.samples import ADVICE, EARLIER_THOUGHTS, EMPTY_TEXT, Sample, Unusable, stop_on_unusable
from lacuna.errors import DataError, ModelError
from templates import (
    CHATML_MARKED,
    CHATML_WIDELY_MARKED,
    CONTROL,
    FAMILIES,
    GPT_OSS,
    LLAMA3,
    MISTRAL,
    byte_level,
    decoded,
    dialogue,
    encoded,
    family_renderer,
    learned,
    renderer,
    result,
    sample,
)

TURNS = [
    ("hello", "river stone"),
    ("grüß dich 🦊", "日本語 🏳️‍🌈 – naïve café"),
    ("q", "\n\nafter newlines"),
    ("q", "\n\n\n    code:\n\n\n"),
    ("one", "two", "three", "four"),
    ("river", "\nstone 🌊", "cloud\n", "amber", "ünï", "  field  "),
    ("same", "same", "same", "same", "same", "same"),
]


@pytest.mark.parametrize("contents", TURNS, ids=lambda contents: f"{len(contents) // 2} turns {contents[1]!r}")
@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_the_assistants_words_and_end_of_turn_are_learned(name: str, contents: tuple[str, ...]) -> None:
    subject = family_renderer(name)
    found = sample(subject, dialogue(*contents))
    said = contents[1::2]
    assert learned(subject, found) == [
        FAMILIES[name].said(words, turn == len(said) - 1) for turn, words in enumerate(said)
    ]
    assert decoded(subject, found.tokens) == subject.render(dialogue(*contents))


@pytest.mark.parametrize("contents", TURNS, ids=lambda contents: f"{len(contents) // 2} turns {contents[1]!r}")
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.prompt_is_prefix])
def test_what_comes_before_is_what_the_model_sees_when_asked(name: str, contents: tuple[str, ...]) -> None:
    subject = family_renderer(name)
    found = sample(subject, dialogue(*contents))
    before = found.tokens[: int(found.supervised.argmax())].tolist()
    assert before == encoded(subject, subject.render(dialogue(contents[0]), prompt=True))


def test_a_prompt_that_opens_a_thought_is_not_what_the_template_writes_later() -> None:
    """DeepSeek's: the one family whose prompt cannot be a prefix; the words are found by themselves."""
    subject = family_renderer("deepseek")
    found = sample(subject, dialogue("q", "a"))
    assert decoded(subject, found.tokens[~found.supervised]) == "<s><｜User｜>q<｜Assistant｜>"


WRITTEN = st.text(st.characters(codec="utf-8"), max_size=20).filter(
    lambda words: not any(token in words for token in CONTROL)
)
SAID = WRITTEN.filter(lambda words: bool(words.strip()))


@given(
    name=st.sampled_from(sorted(FAMILIES)),
    contents=st.lists(st.tuples(WRITTEN, SAID), min_size=1, max_size=3).map(lambda turns: sum(turns, ())),
)
def test_any_words_are_learned_exactly(name: str, contents: tuple[str, ...]) -> None:
    subject, family = family_renderer(name), FAMILIES[name]
    found = sample(subject, dialogue(*contents))
    said = contents[1::2]
    assert learned(subject, found) == [family.said(words, turn == len(said) - 1) for turn, words in enumerate(said)]
    if family.prompt_is_prefix:
        before = found.tokens[: int(found.supervised.argmax())].tolist()
        assert before == encoded(subject, subject.render(dialogue(contents[0]), prompt=True))


@given(contents=st.lists(st.tuples(WRITTEN, SAID), min_size=1, max_size=3).map(lambda turns: sum(turns, ())))
def test_marks_and_no_marks_agree(contents: tuple[str, ...]) -> None:
    first, second = (sample(family_renderer(name), dialogue(*contents)) for name in ("chatml", "chatml marked"))
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.supervised.tolist() == second.supervised.tolist()


def test_marks_that_go_beyond_the_end_of_turn_end_with_it() -> None:
    subject = renderer(CHATML_WIDELY_MARKED)
    assert learned(subject, sample(subject, dialogue("q", "a", "q2", "a2"))) == [
        "<|im_start|>assistant\na<|im_end|>",
        "<|im_start|>assistant\na2<|im_end|>",
    ]


@pytest.mark.parametrize("name", ["chatml", "chatml marked", "llama3", "mistral", "qwen3", "deepseek"])
def test_a_system_prompt_is_seen_and_not_learned(name: str) -> None:
    subject, family = family_renderer(name), FAMILIES[name]
    found = sample(subject, dialogue("q", "a", "q2", "a2", system="be brief"))
    assert learned(subject, found) == [family.said("a", False), family.said("a2", True)]
    assert "be brief" in decoded(subject, found.tokens[~found.supervised])


def test_a_system_prompt_that_wanders_to_the_last_turn_shifts_no_mask() -> None:
    subject = family_renderer("mistral")
    found = sample(subject, dialogue("q", "a", "q2", "a2", system="S"))
    assert decoded(subject, found.tokens) == "<s>[INST] q[/INST] a</s>[INST] S\n\nq2[/INST] a2</s>"
    assert learned(subject, found) == [" a</s>", " a2</s>"]


def test_a_turn_whose_thought_the_template_leaves_out_is_not_learned_and_that_is_said() -> None:
    """Learned, it would teach not to think."""
    subject = family_renderer("qwen3")
    inline = dialogue("q", "<think>\nhm\n</think>\n\na", "q2", "<think>\nhm2\n</think>\n\na2")
    found = sample(subject, inline)
    assert learned(subject, found) == ["<think>\nhm2\n</think>\n\na2<|im_end|>"]
    assert found.note == EARLIER_THOUGHTS
    without = sample(subject, dialogue("q", "a", "q2", "a2"))
    assert (len(learned(subject, without)), without.note) == (2, "")


def test_a_thought_that_the_template_never_writes_stops_the_run() -> None:
    messages = dialogue("q", "a")
    messages[1]["reasoning_content"] = "hm"
    (found,) = family_renderer("chatml").examples([Conversation(messages, None, "here")])
    assert found == Unusable("left out by the template", "here", "the assistant's thought")


def calls(arguments: dict[str, Any], result: str = "-3") -> list[Message]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": "a"},
    ]


WRITES_CALLS = CHATML.replace(
    "message['content'] + '<|im_end|>",
    "message['content'] + (CALL if message.tool_calls else '') + '<|im_end|>",
)
"""CALL: what is written of the first call."""
WHOLE = "(message.tool_calls[0].function | tojson)"


@pytest.mark.parametrize(
    ("written", "tools", "part"),
    [
        (WHOLE, None, None),
        ("'nothing'", None, "the assistant's call of a tool"),
        ("message.tool_calls[0].function.name", None, "the arguments of the assistant's call of a tool"),
        (WHOLE, [{"type": "function", "function": {"name": "forecast"}}], "the tools"),
        (WHOLE, [{"name": "weather"}], None),
    ],
)
def test_calls_tools_and_results_that_the_template_does_not_write_stop_the_run(
    written: str, tools: list[Any] | None, part: str | None
) -> None:
    subject = Renderer(make_tokenizer(WRITES_CALLS.replace("CALL", written)))
    (found,) = subject.examples([Conversation(calls({"city": 'Os"lo'}), tools, "here")])
    if part is None:
        assert isinstance(found, Sample)
        return
    assert found == Unusable("left out by the template", "here", part)


@pytest.mark.parametrize(
    ("written", "part"), [("m.content | tojson", None), ("m.content", None), ("''", "the tool's words")]
)
def test_a_result_may_be_written_as_json_but_not_left_out(written: str, part: str | None) -> None:
    template = CHATML.replace("message", "m").replace(
        "m['content'] +", f"(m.role == 'tool' and ({written}) or m.content) +"
    )
    messages = calls({}, 'two\nlines "quoted"')
    del messages[1]["tool_calls"]
    messages[1]["content"] = "b"
    if part is not None:
        template = template.replace("for m in ms", "for m in messages if m.role != 'tool'")
    subject = Renderer(make_tokenizer(template.replace("in ms", "in messages")))
    (found,) = subject.examples([Conversation(messages, None, "here")])
    assert (found.detail if isinstance(found, Unusable) else None) == part


def test_arguments_are_text_where_the_template_takes_nothing_else() -> None:
    """DeepSeek V3 adds them to a text."""
    function = "message.tool_calls[0].function"
    written = f"('call ' + {function}.name + {function}.arguments)"
    subject = Renderer(make_tokenizer(WRITES_CALLS.replace("CALL", written)))
    assert subject.takes_arguments_as_text
    (found,) = subject.examples([Conversation(calls({"city": "Oslo"}), None, "here")])
    assert isinstance(found, Sample)
    assert learned(subject, found) == ['call weather{"city": "Oslo"}<|im_end|>', "a<|im_end|>"]
    assert not family_renderer("chatml").takes_arguments_as_text


def test_any_exception_of_a_template_is_a_refusal_with_its_words() -> None:
    template = CHATML.replace("message['content'] +", "message['content'] + (message.number | default('')) +")
    subject = Renderer(make_tokenizer(template))
    messages = dialogue("q", "a")
    assert isinstance(subject.examples([Conversation(messages, None, "here")])[0], Sample)
    messages[0]["number"] = 3
    (found,) = subject.examples([Conversation(messages, None, "here")])
    assert found == Unusable("refused by the template", "here", 'can only concatenate str (not "int") to str')


@pytest.mark.parametrize("name", ["chatml", "chatml marked", "deepseek"])
def test_turns_of_weight_zero_are_seen_and_not_learned(name: str) -> None:
    subject, family = family_renderer(name), FAMILIES[name]
    messages = dialogue("q", "a", "q2", "a2", "q3", "a3")
    messages[1]["weight"] = messages[5]["weight"] = 0
    messages[3]["weight"] = 1
    found = sample(subject, messages)
    assert learned(subject, found) == [family.said("a2", False)]
    assert decoded(subject, found.tokens) == subject.render(messages)


@pytest.mark.parametrize("name", ["chatml", "chatml marked", "llama3", "deepseek"])
def test_an_assistant_may_speak_first_and_twice(name: str) -> None:
    subject, family = family_renderer(name), FAMILIES[name]
    roles = ["assistant", "user", "assistant", "assistant"]
    messages = [{"role": role, "content": f"w{n}"} for n, role in enumerate(roles)]
    assert learned(subject, sample(subject, messages)) == [
        family.said(words, words == "w3") for words in ("w0", "w2", "w3")
    ]


@pytest.mark.parametrize("trimmed", ["m.content", "m.content.strip()", "m.content.lstrip()", "m.content.rstrip()"])
def test_words_that_the_template_trims_are_found_also_by_themselves(trimmed: str) -> None:
    """Where the assistant speaks first there is no prompt to start from."""
    subject = renderer(LLAMA3.replace("m.content | trim", trimmed))
    messages = [{"role": "assistant", "content": " \n hello \n "}, *dialogue("q", " \n a \n ")]
    said = {"m.content": str, "m.content.strip()": str.strip, "m.content.lstrip()": str.lstrip}.get(trimmed, str.rstrip)
    assert learned(subject, sample(subject, messages)) == [
        said(" \n hello \n ") + "<|eot_id|>",
        said(" \n a \n ") + "<|eot_id|>",
    ]


def test_the_template_does_not_see_weights() -> None:
    subject = renderer(
        "{%- for m in messages %}{{ raise_exception('weight!') if m.weight is defined }}{%- endfor %}" + CHATML
    )
    messages = dialogue("q", "a", "q2", "a2")
    messages[1]["weight"], messages[3]["weight"] = 0, 1
    assert learned(subject, sample(subject, messages)) == ["a2<|im_end|>"]


@pytest.mark.parametrize("name", ["chatml", "chatml marked", "llama3", "deepseek"])
def test_a_conversation_may_end_with_the_user(name: str) -> None:
    subject, family = family_renderer(name), FAMILIES[name]
    assert learned(subject, sample(subject, dialogue("q", "a", "unanswered"))) == [family.said("a", False)]


def test_many_conversations_are_rendered_as_each_alone() -> None:
    subject = family_renderer("qwen3")
    batch = [Conversation(dialogue(*contents), None, "x") for contents in [*TURNS, ("q", "")]]
    together = subject.conversations(batch)
    assert [type(found) for found in together] == [Sample] * len(TURNS) + [Unusable]
    for found, conversation in zip(together[:-1], batch, strict=False):
        (alone,) = subject.conversations([conversation])
        assert isinstance(found, Sample)
        assert isinstance(alone, Sample)
        assert found.tokens.tolist() == alone.tokens.tolist()
        assert found.supervised.tolist() == alone.supervised.tolist()
    assert subject.conversations([]) == []


TOOLS = (
    "{%- if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{%- for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{%- endfor %}"
    "{{ '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
CALL = {"function": {"name": "f", "arguments": {"b": 1, "a": "é"}}}


def test_calls_are_learned_and_their_results_are_not() -> None:
    subject = renderer(TOOLS)
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "a"},
    ]
    found = result(subject, messages, [{"name": "f"}])
    assert isinstance(found, Sample)
    assert learned(subject, found) == [
        '<call>{"name": "f", "arguments": {"b": 1, "a": "é"}}</call><|im_end|>',
        "a<|im_end|>",
    ]
    assert decoded(subject, found.tokens).startswith('<|im_start|>system\n[{"name": "f"}]<|im_end|>\n')


def test_a_call_that_ends_with_another_token_does_not_teach_its_result() -> None:
    """Llama 3.1's built-in tools end with <|eom_id|>."""
    other_end = TOOLS.replace(
        "{{ '<|im_end|>\n' }}{%- endfor %}", "{{ ('<|end|>' if m.tool_calls else '<|im_end|>') + '\n' }}{%- endfor %}"
    )
    assert other_end != TOOLS
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "a"},
    ]
    assert unusable(renderer(other_end), messages) == ("no end of turn", "")
    assert unusable(renderer(other_end), messages[:3]) == ("no end of turn", "")


class TestTokenizersWithHabits:
    def test_spaces_are_learned_where_offsets_leave_them_out(self) -> None:
        subject = renderer(CHATML)
        subject.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        words = "    indented     code    "
        assert learned(subject, sample(subject, dialogue("q    ", words))) == [words + "<|im_end|>"]

    def test_an_end_of_turn_that_swallows_the_line_break_is_learned(self) -> None:
        """Phi-3's control tokens do."""
        tokenizer = Tokenizer.from_str(byte_level().to_str())
        tokenizer.add_special_tokens([AddedToken("<|done|>", rstrip=True, special=True)])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|done|>")
        fast.chat_template = CHATML.replace("<|im_end|>", "<|done|>")
        subject = Renderer(fast)
        found = sample(subject, dialogue("q", "a", "q2", "a2"))
        assert learned(subject, found) == ["a<|done|>", "a2<|done|>"]

    def test_a_tokenizer_that_puts_spaces_before_words_sees_the_text_as_a_whole(self) -> None:
        """Llama 2's and Mistral's."""
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.BpeTrainer(
            vocab_size=200, special_tokens=["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], show_progress=False
        )
        tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            extra_special_tokens=["[INST]", "[/INST]"],
        )
        fast.chat_template = MISTRAL
        subject = Renderer(fast)
        assert not subject.encodes_in_parts
        found = sample(subject, dialogue("river", "stone cloud", "amber", "field"))
        whole = encoded(subject, subject.render(dialogue("river", "stone cloud", "amber", "field")))
        assert found.tokens.tolist() == whole
        runs = fast.convert_ids_to_tokens(found.tokens[found.supervised].tolist())
        assert "".join(runs) == "▁stone▁cloud</s>▁field</s>"

    def test_a_byte_level_tokenizer_ends_the_prompts_last_token_with_the_prompt(self) -> None:
        """Otherwise the model would learn after tokens that it never sees: newlines join over the border."""
        subject = renderer(CHATML)
        assert subject.encodes_in_parts
        found = sample(subject, dialogue("q", "\n\na"))
        assert found.tokens.tolist() != encoded(subject, subject.render(dialogue("q", "\n\na")))
        assert learned(subject, found) == ["\n\na<|im_end|>"]


def unusable(subject: Renderer, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> tuple[str, str]:
    """Kind and detail."""
    found = result(subject, messages, tools)
    assert isinstance(found, Unusable), found
    assert found.origin == "data.jsonl:7"
    return found.kind, found.detail


class TestUnusable:
    @pytest.mark.parametrize(
        "messages",
        [
            dialogue("only a question"),
            dialogue("q", ""),
            dialogue("q", " \n"),
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}],
        ],
    )
    @pytest.mark.parametrize("name", ["chatml", "chatml marked"])
    def test_nothing_to_learn(self, name: str, messages: list[dict[str, Any]]) -> None:
        assert unusable(family_renderer(name), messages) == ("nothing to learn", "")

    def test_everything_is_learned(self) -> None:
        everything = "{%- generation %}{%- for m in messages %}{{ m.content + '<|im_end|>' }}{%- endfor %}"
        assert unusable(renderer(everything + "{%- endgeneration %}"), dialogue("q", "a")) == (
            "everything is learned",
            "",
        )

    def test_doubled_bos(self) -> None:
        assert unusable(renderer("{{ bos_token }}" + LLAMA3), dialogue("q", "a")) == ("doubled BOS", "")

    def test_no_end_of_turn_inside_the_marks(self) -> None:
        outside = CHATML_MARKED.replace(
            "{{ m.content + '<|im_end|>' }}{%- endgeneration %}{{ '\n' }}",
            "{{ m.content }}{%- endgeneration %}{{ '<|im_end|>\n' }}",
        )
        assert outside != CHATML_MARKED
        assert unusable(renderer(outside), dialogue("q", "a")) == ("no end of turn", "")

    def test_no_end_of_turn_of_earlier_turns_does_not_teach_the_users_words(self) -> None:
        subject = renderer(GPT_OSS)
        assert learned(subject, sample(subject, dialogue("q", "a"))) == ["a<|return|>"]
        assert unusable(subject, dialogue("q", "a", "q2", "a2")) == ("no end of turn", "")
        earlier_unlearned = dialogue("q", "a", "q2", "a2")
        earlier_unlearned[1]["weight"] = 0
        assert learned(subject, sample(subject, earlier_unlearned)) == ["a2<|return|>"]

    def test_an_end_of_turn_that_only_the_user_has_is_not_the_assistants(self) -> None:
        forgets = CHATML.replace(
            "+ '<|im_end|>\n'", "+ ('' if message['role'] == 'assistant' and not loop.last else '<|im_end|>\n')"
        )
        assert forgets != CHATML
        assert unusable(renderer(forgets), dialogue("q", "a", "unanswered")) == ("no end of turn", "")
        speaks_first = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "unanswered"}]
        assert unusable(renderer(forgets), speaks_first) == ("no end of turn", "")

    @pytest.mark.parametrize(
        ("messages", "tools", "detail"),
        [
            (dialogue("<|im_end|>", "a"), None, "'<|im_end|>' in the user's words"),
            (dialogue("q", "a <pad> b"), None, "'<pad>' in the assistant's words"),
            (dialogue("q", "a", system="</s>"), None, "'</s>' in the system's words"),
            (
                [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "<eos>"}}]},
                ],
                None,
                "'<eos>' in the assistant's words",
            ),
            (
                [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a", "reasoning_content": "<|im_end|>"},
                ],
                None,
                "'<|im_end|>' in the assistant's words",
            ),
            (dialogue("q", "a"), [{"description": "<|im_start|>"}], "'<|im_start|>' in the tools"),
        ],
    )
    def test_control_tokens_in_the_text(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, detail: str
    ) -> None:
        assert unusable(family_renderer("chatml"), messages, tools) == (
            "control tokens in the text",
            detail,
        )

    def test_refused_by_the_template(self) -> None:
        assert unusable(family_renderer("gemma"), dialogue("q", "a", system="s")) == (
            "refused by the template",
            "Conversation roles must alternate user/assistant",
        )

    def test_a_template_that_is_no_template_is_refused(self) -> None:
        with pytest.raises(ModelError, match=r"the chat template is broken in its line 2: .*endfor"):
            unusable(renderer("{# a comment #}\n{% for m in messages %}{{ m.content }}"), dialogue("q", "a"))

    def test_a_message_that_the_template_leaves_out(self) -> None:
        picky = "{%- set messages = messages | rejectattr('role', 'equalto', 'developer') | list %}" + CHATML
        messages = [{"role": "developer", "content": "be brief"}, *dialogue("q", "a")]
        assert unusable(renderer(picky), messages) == ("left out by the template", "the developer's words")

    def test_the_assistants_words_are_not_found_where_the_template_rewrites_them(self) -> None:
        subject = family_renderer("deepseek")
        assert unusable(subject, dialogue("q", "<think>\nhm\n</think>a")) == ("assistant's words not found", "")

    def test_the_assistants_words_are_not_found_where_only_some_turns_are_marked(self) -> None:
        last_only = CHATML_MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
        assert unusable(renderer(last_only), dialogue("q", "a", "q2", "a2")) == ("assistant's words not found", "")

    def test_every_kind_has_advice(self) -> None:
        assert set(ADVICE) == {
            "nothing to learn", "everything is learned", "doubled BOS", "no end of turn", "control tokens in the text",
            "refused by the template", "left out by the template", "assistant's words not found",
        }  # fmt: skip

    def test_all_kinds_are_counted_and_stop_together(self) -> None:
        with pytest.raises(DataError) as error:
            stop_on_unusable(
                [
                    Unusable("doubled BOS", "a:1"),
                    Unusable("control tokens in the text", "a:2", "'<s>' in the user's words"),
                    Unusable("doubled BOS", "a:3"),
                ],
                total=9,
            )
        assert error.value.problems == [
            "a:1: doubled BOS; 2 of 9 samples (also a:3): the text begins with the BOS token that the tokenizer adds "
            "too; remove one",
            "a:2: control tokens in the text ('<s>' in the user's words); 1 of 9 samples: they would steer the model "
            "as if the template had written them; remove them",
        ]

    def test_nothing_unusable_stops_nothing(self) -> None:
        stop_on_unusable([], total=9)


class TestModels:
    def test_a_template_without_end_of_turn_is_refused(self) -> None:
        plain = "{%- for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{%- endfor %}"
        with pytest.raises(ModelError, match="writes no end-of-turn token after the assistant's words"):
            renderer(plain).conversations([Conversation(dialogue("q", "a"), None, "x")])

    def test_a_tokenizer_without_a_template_takes_no_conversations(self) -> None:
        with pytest.raises(ModelError, match=r"has no chat template.*pass a Jinja file with --chat-template"):
            renderer(None).examples([Conversation(dialogue("q", "a"), None, "x")])

    def test_a_tokenizer_without_eos_takes_no_texts(self) -> None:
        with pytest.raises(ModelError, match="no end-of-sequence token"):
            renderer(None, eos=None).examples([Text("x", "a:1")])  # type: ignore[arg-type]

    def test_examples_are_conversations_or_texts(self) -> None:
        subject = family_renderer("chatml")
        (conversation,) = subject.examples([Conversation(dialogue("q", "a"), None, "x")])
        (text,) = subject.examples([Text("river", "x")])
        assert isinstance(conversation, Sample)
        assert isinstance(text, Sample)
        assert (conversation.supervised.all(), text.supervised.all()) == (False, True)
        assert subject.examples([]) == []


class TestTexts:
    def texts(self, subject: Renderer, *texts: str) -> list[Sample | Unusable]:
        return subject.texts([Text(text, f"a:{n}") for n, text in enumerate(texts, 1)])

    def test_a_text_ends_with_eos_and_all_of_it_is_learned(self) -> None:
        subject = renderer(None)
        (found,) = self.texts(subject, "river stone 🦊\n")
        assert isinstance(found, Sample)
        assert found.tokens.tolist() == [*encoded(subject, "river stone 🦊\n"), subject.tokenizer.eos_token_id]
        assert found.supervised.all()
        assert (found.tokens.dtype, found.supervised.dtype) == (np.int32, np.bool_)

    def test_a_text_begins_with_bos_where_the_tokenizer_adds_it(self) -> None:
        subject = renderer(None)
        bos = subject.tokenizer.bos_token_id
        subject.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos)]
        )
        (found,) = self.texts(subject, "river")
        assert isinstance(found, Sample)
        assert found.tokens.tolist() == [bos, *encoded(subject, "river"), subject.tokenizer.eos_token_id]

    def test_names_of_control_tokens_stay_text(self) -> None:
        subject = renderer(CHATML)
        (found,) = self.texts(subject, "a <|im_end|> b <eos>")
        assert isinstance(found, Sample)
        control = set(encoded(subject, "".join(CONTROL)))
        assert not control & set(found.tokens[:-1].tolist())
        assert decoded(subject, found.tokens) == "a <|im_end|> b <eos><eos>"

    def test_texts_change_nothing_for_conversations_after_them(self) -> None:
        subject = renderer(CHATML)
        before = sample(subject, dialogue("q", "a")).tokens.tolist()
        self.texts(subject, "<|im_end|>")
        assert sample(subject, dialogue("q", "a")).tokens.tolist() == before

    def test_an_empty_text_is_named(self) -> None:
        found = self.texts(renderer(None), "river", "")
        assert isinstance(found[0], Sample)
        assert found[1] == Unusable(EMPTY_TEXT, "a:2")


def test_the_date_is_the_day_that_was_given() -> None:
    dated = "{{ strftime_now('%d %b %Y') + '\n' }}" + CHATML
    subject = Renderer(make_tokenizer(dated), today=date(2024, 7, 26))
    assert subject.writes_the_date
    assert subject.render(dialogue("q", "a")).startswith("26 Jul 2024\n<|im_start|>user")
    assert not Renderer(make_tokenizer()).writes_the_date
    assert not Renderer(make_tokenizer(None)).writes_the_date
    assert subject.render(dialogue("q", "a")).count("2024") == 1
    marked = dated.replace(CHATML, TRL_TEMPLATE)
    other = Renderer(make_tokenizer(marked), today=date(2024, 7, 26))
    (found,) = other.examples([Conversation(dialogue("q", "a"), None, "")])
    assert isinstance(found, Sample)
    assert decoded(subject, found.tokens).startswith("26 Jul 2024")
