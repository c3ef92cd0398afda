"""Conversations and texts → tokens and loss mask. The one renderer of training, fine-tuning and chat.

The mask comes from the template itself: from its `{% generation %}` marks where it has them, otherwise from what it
writes after its own generation prompt, up to and including its end-of-turn token. So it also works for templates that
nobody prepared for training. Whatever would train on the wrong tokens is counted, named, and stops the run.
"""

import re
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any, cast

import jinja2
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lacuna.data.formats import Conversation, Example, Message, Text
from lacuna.data.samples import EARLIER_THOUGHTS, EMPTY_TEXT, TEMPLATE_FLAG, Rendered, Sample, Spans, Unusable
from lacuna.data.template_date import NOW, with_date
from lacuna.data.written import (
    lacks_its_thought,
    not_written,
    takes_text_arguments,
    with_text_arguments,
    without_weight,
)
from lacuna.errors import ModelError

SENTINEL = "\u2045lacuna {}\u2046"


class Renderer:
    """A tokenizer and what was learnt about its chat template.

    today: what a template takes for the date. template_flag: by which the user gives another template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template_flag: str = TEMPLATE_FLAG, today: date | None = None
    ) -> None:
        self.tokenizer, self.template_flag = tokenizer, template_flag
        self.today = today or date.today()
        special = sorted(self.tokenizer.all_special_tokens, key=len, reverse=True)
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.control_tokens = sorted({*special, *added}, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, self.control_tokens)) or r"(?!)")

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None, prompt: bool = False) -> str:
        """The text that the model sees. prompt: end with what asks the assistant to speak."""
        text = self.tokenizer.apply_chat_template(
            self.for_template(messages),
            tools=tools,
            add_generation_prompt=prompt,
            tokenize=False,
            **self._dated(tools),
        )
        assert isinstance(text, str)
        return text

    @cached_property
    def writes_the_date(self) -> bool:
        """Whether the template writes today's date into what the model sees."""
        if self.tokenizer.chat_template is None or NOW not in self.tokenizer.get_chat_template():
            return False
        probe = [{"role": "user", "content": "question"}]
        days = (self.today, self.today - timedelta(days=400))
        return len({Renderer(self.tokenizer, today=day).render(probe) for day in days}) > 1

    def _dated(self, tools: list[Any] | None) -> dict[str, Any]:
        """The template, and the day that it takes for today."""
        template = self.tokenizer.get_chat_template(tools=tools)
        return with_date(template, self.today) if NOW in template else {"chat_template": template}

    def for_template(self, messages: Sequence[Message]) -> list[Message]:
        """Without what is said to the renderer alone, and with the arguments of calls as the template takes them."""
        has_calls = any(message.get("tool_calls") for message in messages)
        as_text = has_calls and self.takes_arguments_as_text
        return [without_weight(with_text_arguments(message) if as_text else message) for message in messages]

    @cached_property
    def takes_arguments_as_text(self) -> bool:
        """Whether the template fails at a call's arguments as an object, and does not where they are JSON text."""
        return takes_text_arguments(self.tokenizer)

    @cached_property
    def has_generation_marks(self) -> bool:
        template = self.tokenizer.get_chat_template()
        return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    @cached_property
    def end_of_turn(self) -> str:
        """What the template writes after an assistant's words, such as <|im_end|>: one control token or several.

        Raises ModelError where it writes none: the model would never learn to stop.
        """
        last, between = self._ends_of_a_turn
        if not last:
            raise ModelError(
                "the chat template writes no end-of-turn token after the assistant's words, so the model would never "
                f"learn to stop: pass another one with {self.template_flag}"
            )
        shared = [
            token for token, other in takewhile(lambda pair: pair[0] == pair[1], zip(last, between, strict=False))
        ]
        return "".join(shared or last[:1])

    @cached_property
    def stop_token(self) -> str:
        """The token after which generation stops: the last of end_of_turn."""
        return str(self._control_pattern.findall(self.end_of_turn)[-1])

    @cached_property
    def ends_earlier_turns(self) -> bool:
        """Whether the template writes the same end of a turn before a further message."""
        return "".join(self._ends_of_a_turn[1]).startswith(self.end_of_turn)

    @cached_property
    def _ends_of_a_turn(self) -> tuple[list[str], list[str]]:
        """The control tokens, one right after the other, behind the last reply and behind an earlier one."""
        texts = ["question", SENTINEL.format(0), SENTINEL.format(1)]
        roles = ["user", "assistant", "user"]
        probe = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        last = self.render(probe[:2]).partition(texts[1])[2]
        try:
            between = self.render(probe).partition(texts[1])[2].partition(texts[2])[0]
        except jinja2.TemplateError:
            between = ""
        return self._adjacent_control_tokens(last), self._adjacent_control_tokens(between)

    def _adjacent_control_tokens(self, text: str) -> list[str]:
        tokens: list[str] = []
        found = self._control_pattern.search(text)
        while found is not None and found[0]:
            tokens.append(found[0])
            found = self._control_pattern.match(text, found.end())
        return tokens

    @cached_property
    def encodes_in_parts(self) -> bool:
        """Whether parts of a text can be tokenised apart: not where the tokenizer puts a space before each."""
        letter = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return self.tokenizer.decode(letter + letter) == "aa"

    def conversations(self, batch: Sequence[Conversation]) -> list[Sample | Unusable]:
        """Render and tokenise together; what cannot be trained on comes back as Unusable."""
        rendered = [self._text_and_spans(conversation) for conversation in batch]
        encoded = iter(self._encode([item for item in rendered if not isinstance(item, Unusable)]))
        samples: list[Sample | Unusable] = []
        for conversation, item in zip(batch, rendered, strict=True):
            if isinstance(item, Unusable):
                samples.append(item)
                continue
            tokens, offsets = next(encoded)
            starts, ends = offsets[:, 0], offsets[:, 1]
            supervised = np.zeros(len(tokens), dtype=np.bool_)
            for start, end in item.spans:
                supervised |= (starts >= start) & (starts < end) & (ends > start)
            samples.append(self._checked(tokens, supervised, conversation.origin, item.note))
        return samples

    def _encode(self, rendered: list[Rendered]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Tokens of each text and their [start, end) characters.

        No token reaches over the start of a span, because the prompt ends there at inference.
        """
        if not rendered:
            return
        cuts = [[0, *(start for start, _ in item.spans if start and self.encodes_in_parts)] for item in rendered]
        parts = [
            item.text[start:end]
            for item, starts in zip(rendered, cuts, strict=True)
            for start, end in pairwise([*starts, len(item.text)])
        ]
        encoding = self.tokenizer(parts, add_special_tokens=False, return_offsets_mapping=True)
        ids = (np.asarray(part, dtype=np.int32) for part in encoding["input_ids"])
        offsets = (np.asarray(part, dtype=np.int64).reshape(-1, 2) for part in encoding["offset_mapping"])
        for starts in cuts:
            yield (
                np.concatenate([next(ids) for _ in starts]),
                np.concatenate([next(offsets) + start for start in starts]),
            )

    def _checked(
        self, tokens: NDArray[np.int32], supervised: NDArray[np.bool_], origin: str, note: str
    ) -> Sample | Unusable:
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(tokens) > 1 and tokens[0] == tokens[1] == bos:
            return Unusable("doubled BOS", origin)
        if supervised.all():
            return Unusable("everything is learned", origin)
        return Sample(tokens, supervised, note)

    def _text_and_spans(self, conversation: Conversation) -> Rendered | Unusable:
        """The rendered text and the character spans [start, end) that the assistant says."""
        messages, origin = conversation.messages, conversation.origin
        turns = [message for message in messages if message["role"] == "assistant"]
        if not any(turn.get("weight", 1) and (turn["content"].strip() or turn.get("tool_calls")) for turn in turns):
            return Unusable("nothing to learn", origin)
        sources: list[tuple[str, Any]] = [(f"the {message['role']}'s words", message) for message in messages]
        for name, source in [*sources, ("the tools", conversation.tools)]:
            if found := self._control_pattern.search(str(source)):
                return Unusable("control tokens in the text", origin, f"{found[0]!r} in {name}")
        try:
            text = self.render(messages, conversation.tools)
            spans = (
                self._marked_spans(conversation)
                if self.has_generation_marks
                else self._spans_after_prompts(text, conversation) or self._spans_of_contents(text, conversation)
            )
            ends = [
                self._ends(text[start:end], turn is messages[-1])
                for (start, end), turn in zip(spans or [], turns, strict=False)
            ]
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template is broken in its line {error.lineno}: {error.message}") from error
        except ModelError:
            raise
        except Exception as error:  # a template is a program of somebody else, and raises what it likes
            return Unusable("refused by the template", origin, str(error) or type(error).__name__)
        if (part := not_written(messages, conversation.tools, text)) is not None:
            return Unusable("left out by the template", origin, part)
        if spans is None or len(spans) != len(turns):
            return Unusable("assistant's words not found", origin)
        stripped = [lacks_its_thought(turn, text[start:end]) for turn, (start, end) in zip(turns, spans, strict=True)]
        if stripped[-1]:
            return Unusable("left out by the template", origin, "the assistant's thought")
        whole = zip(spans, ends, turns, stripped, strict=True)
        learned = [(span, ended) for span, ended, turn, lacks in whole if turn.get("weight", 1) and not lacks]
        if not learned:
            return Unusable("nothing to learn", origin)
        if not all(ended for _, ended in learned):
            return Unusable("no end of turn", origin)
        return Rendered(text, [span for span, _ in learned], EARLIER_THOUGHTS if any(stripped) else "")

    def _ends(self, words: str, is_last: bool) -> bool:
        """Whether a turn ends with the end-of-turn token, and so for all that is known not with a later turn's."""
        return words.endswith(self.end_of_turn) and (is_last or self.has_generation_marks or self.ends_earlier_turns)

    def _marked_spans(self, conversation: Conversation) -> Spans:
        """The template's `{% generation %}` blocks, without what they hold after the end-of-turn token."""
        rendered: Any = render_jinja_template(
            conversations=[self.for_template(conversation.messages)],
            tools=conversation.tools,
            return_assistant_tokens_mask=True,
            **self._dated(conversation.tools),
            **cast(dict[str, Any], self.tokenizer.special_tokens_map),
        )
        (text,), (marked,) = rendered
        turns: Spans = []
        for start, end in marked:
            if turns and start == turns[-1][1]:
                turns[-1] = (turns[-1][0], end)
            elif end > start:
                turns.append((start, end))
        return [(start, self._without_what_follows(text, start, end)) for start, end in turns]

    def _without_what_follows(self, text: str, start: int, end: int) -> int:
        """The end of the last end-of-turn in a span, where only white space and control tokens are behind it."""
        said = text.rfind(self.end_of_turn, start, end)
        cut = said + len(self.end_of_turn)
        return cut if said >= 0 and not self._control_pattern.sub("", text[cut:end]).strip() else end

    def _spans_after_prompts(self, text: str, conversation: Conversation) -> Spans | None:
        """Each turn starts where the text so far plus the generation prompt ends, or where the text leaves a prompt
        that goes on with a thought, which templates leave out of earlier turns; None where it says something else."""
        spans = []
        for index, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                return None
            prompt = self.render(conversation.messages[:index], conversation.tools, prompt=True)
            start = len(prompt)
            if not text.startswith(prompt):
                header = len(self.render(conversation.messages[:index], conversation.tools))
                same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, prompt, strict=False)))
                start = self._end_of_header(text[:same], header)
            is_last = index == len(conversation.messages) - 1
            longest = len(text if is_last else self.render(conversation.messages[: index + 1], conversation.tools))
            end = text.find(self.end_of_turn, start, longest)
            words, content = text[start : max(end, start)].strip(), message["content"].strip()
            if not text.startswith(prompt) and not (words == content if is_last else words and content.endswith(words)):
                return None
            spans.append((start, end + len(self.end_of_turn) if end >= 0 else start))
        return spans

    def _end_of_header(self, shared: str, header: int) -> int:
        """Where the header that begins at `header` ends: behind the last line break or control token that text and
        generation prompt share."""
        ends = [found.end() for found in self._control_pattern.finditer(shared, header) if found[0]]
        return max([*ends, shared.rfind("\n", header) + 1])

    def _spans_of_contents(self, text: str, conversation: Conversation) -> Spans | None:
        """For templates that write earlier turns otherwise: find where each turn's words stand among the others'."""
        contents = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
        turn = iter(range(len(contents)))
        marked = [
            {**message, "content": SENTINEL.format(next(turn))} if message["role"] == "assistant" else message
            for message in conversation.messages
        ]
        pieces = re.split(SENTINEL.format(r"\d+"), self.render(marked, conversation.tools))
        if len(pieces) != len(contents) + 1:
            return None
        for cleaned in (str, str.strip, str.lstrip, str.rstrip):
            said = [cleaned(content) for content in contents]
            joined, spans = pieces[0], []
            for words, after in zip(said, pieces[1:], strict=True):
                start = len(joined.rstrip(" "))
                joined += words
                end = after.find(self.end_of_turn)
                spans.append((start, len(joined) + (end + len(self.end_of_turn) if end >= 0 else 0)))
                joined += after
            if joined == text:
                return spans
        return None

    def texts(self, batch: Sequence[Text]) -> list[Sample | Unusable]:
        """Plain text, all of it supervised: BOS where the tokenizer uses one, the text's tokens, end-of-sequence.

        A control token's name inside the text stays text.
        """
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        if eos is None:
            raise ModelError("the tokenizer has no end-of-sequence token: plain text cannot be told where to end")
        starts_with_bos = bos is not None and bos in self.tokenizer("a")["input_ids"][:1]
        encoding = self.tokenizer([text.text for text in batch], add_special_tokens=False, split_special_tokens=True)
        samples: list[Sample | Unusable] = []
        for text, ids in zip(batch, encoding["input_ids"], strict=True):
            tokens = np.asarray([*([bos] if starts_with_bos else []), *ids, eos], dtype=np.int32)
            empty = Unusable(EMPTY_TEXT, text.origin)
            samples.append(Sample(tokens, np.ones(len(tokens), dtype=np.bool_)) if ids else empty)
        return samples

    def examples(self, batch: Sequence[Example]) -> list[Sample | Unusable]:
        """Render examples, which are all conversations or all texts."""
        if batch and isinstance(batch[0], Text):
            return self.texts([example for example in batch if isinstance(example, Text)])
        if self.tokenizer.chat_template is None:
            raise ModelError(
                f"{self.tokenizer.name_or_path}: the tokenizer has no chat template, and the data are conversations: "
                f"take the model's instruct version, or pass a Jinja file with {self.template_flag}"
            )
        return self.conversations([example for example in batch if isinstance(example, Conversation)])
