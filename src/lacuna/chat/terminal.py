"""The conversation at a terminal, and the same from lines of a file or a pipe."""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

import click
from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from lacuna.chat.answer import Answer, Model, ask
from lacuna.chat.session import Reaction, Session, Turn, obey
from lacuna.chat.settings import Settings
from lacuna.data.formats import Message
from lacuna.errors import DataError, LacunaError
from lacuna.visible import visible, visible_json

PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("reference")
BLOCKS = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["reference", "inline"])
"""Finds where the blocks begin, and does not look into them."""
REFRESHES = 10
"""A second, of what is being written."""


class Words(Markdown):
    """Markdown in which tags are text, and lines end where the model ends them."""

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = PARSER.parse(text)
        for token in [one for outer in self.parsed for one in (outer, *(outer.children or ()))]:
            token.type = "hardbreak" if token.type == "softbreak" else token.type
            token.content = visible(token.content)


def blocks_of(text: str) -> list[str]:
    """The parts of Markdown that stand by themselves: whatever comes behind them, all but the last stay as they are."""
    lines = text.split("\n")
    starts = [token.map[0] for token in BLOCKS.parse(text) if token.level == 0 and token.map]
    return ["\n".join(lines[start:end]) for start, end in pairwise([0, *starts[1:], len(lines)])]


def fence_of(block: str) -> tuple[str, re.Pattern[str]] | None:
    """The first line of a block of code, and what ends it; None where the block is none."""
    opening = re.match(r" {0,3}((`|~)\2{2,}).*", block.lstrip("\n"))
    if opening is None:
        return None
    return opening[0], re.compile(rf" {{0,3}}{opening[2]}{{{len(opening[1])},}}[ \t]*")


class Screen:
    """Markdown as it comes: blocks that are complete are printed for good, the end of the last one is drawn anew.

    Time is linear in the text: a long block is looked at again only when it has doubled, or a fence has closed it.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lines: list[str] = []
        self._begun = ""
        self._fence: tuple[str, re.Pattern[str]] | None = None
        self._is_closed = False
        self._look_at = 0
        self._is_first = True
        self._live = Live(console=console, transient=True, refresh_per_second=REFRESHES)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def say(self, piece: str) -> None:
        first, *others = visible(piece).split("\n")
        self._begun += first
        for line in others:
            self._add(self._begun)
            self._begun = line
        self._live.update(Tail(self._tail()))

    def _add(self, line: str) -> None:
        self._lines.append(line)
        if len(self._lines) >= self._look_at or (self._is_closed and line.strip()):
            *whole, last = blocks_of("\n".join(self._lines))
            self._print(whole)
            self._lines = last.split("\n")
            self._fence = fence_of(last)
            self._is_closed = self._fence is not None and any(map(self._fence[1].fullmatch, self._lines[1:]))
            self._look_at = max(self.console.height, 2 * len(self._lines))
        elif self._fence is not None and self._fence[1].fullmatch(line):
            self._is_closed = True

    def _tail(self) -> str:
        """As much as the terminal has room for; of a block of code, beneath its first line."""
        height, width = self.console.height, self.console.width
        lines = [*self._lines[-height:], self._begun]
        text = "\n".join(lines)[-height * width :]
        is_cut = len(lines) <= len(self._lines) or len(text) == height * width
        return f"{self._fence[0]}\n{text}" if is_cut and self._fence is not None else text

    def _print(self, blocks: Iterable[str]) -> None:
        for block in filter(str.strip, blocks):
            if not self._is_first:
                self.console.print()
            self._is_first = False
            self.console.print(Words(block))

    def __exit__(self, *_: object) -> None:
        self._live.update(Text())
        self._live.stop()
        self._print(blocks_of("\n".join([*self._lines, self._begun])))


class Tail:
    """The last lines of what is being written: no more than the terminal has."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(Words(self.text), options, pad=False)[-(console.height - 2) :]:
            yield from line
            yield Segment.line()


class Plain:
    """Text as it comes."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> Self:
        return self

    def say(self, piece: str) -> None:
        self.console.file.write(visible(piece))
        self.console.file.flush()

    def __exit__(self, *_: object) -> None:
        self.console.print()


def show_answer(console: Console, model: Model, messages: list[Message], settings: Settings, seed: int) -> Answer:
    """Show the answer while it comes. Ctrl-C ends it, and what was said until then is the answer."""
    said: list[str] = []
    with Screen(console) if model.is_chat else Plain(console) as screen:

        def say(piece: str) -> None:
            said.append(piece)
            screen.say(piece)

        try:
            return ask(model, messages, settings, seed, say)
        except KeyboardInterrupt:
            return Answer("".join(said), "interrupted")


def answered(console: Console, model: Model, session: Session, reaction: Reaction) -> Session:
    """The session with the answer to a reaction's prompt. Raises LacunaError where there is none."""
    prompt, settings = reaction.prompt, reaction.session.settings
    assert prompt is not None
    messages = [*reaction.session.messages(), {"role": "user", "content": prompt}]
    answer = show_answer(console, model, messages, settings, reaction.seed)
    counted = f"{answer.answer_tokens} tokens in {answer.seconds:.1f} s"
    console.print(Text("; ".join([*answer.notes(), *[counted] * (answer.answer_tokens is not None)]), style="dim"))
    if answer.end == "interrupted" and not answer.text:
        return session
    return replace(reaction.session, turns=(*reaction.session.turns, Turn(prompt, answer.text.strip(), reaction.seed)))


def converse(model: Model, session: Session) -> None:
    """Until /exit or Ctrl-D."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    console = Console(highlight=False)
    file = history_file()
    lines: PromptSession[str] = PromptSession(history=FileHistory(file) if file is not None else InMemoryHistory())
    console.print(Text("/help lists the commands, Ctrl-D leaves", style="dim"))
    leaves = False
    while not leaves:
        try:
            line = lines.prompt("> ")
            if line.strip():
                reaction = obey(session, line)
                console.print(Text(visible(reaction.told), style="dim")) if reaction.told else None
                is_asked = reaction.prompt is not None
                session = answered(console, model, session, reaction) if is_asked else reaction.session
                leaves = reaction.leaves
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        except LacunaError as error:
            for problem in error.problems:
                console.print(Text(visible(f"error: {problem}"), style="red"))


def history_file() -> Path | None:
    """In the user's cache folder, for nobody else to read; None where it cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lacuna"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "chat_history").touch(mode=0o600)
    except OSError:
        return None
    return folder / "chat_history"


def answer_lines(model: Model, session: Session, lines: Iterable[bytes], as_json: bool) -> None:
    """Answer each line that is not blank, as a conversation of its own. Raises LacunaError that names the line."""
    for number, prompt in prompts_of(lines):
        messages = [*session.messages(), {"role": "user", "content": prompt}]
        try:
            answer = ask(model, messages, session.settings, session.settings.seed, lambda piece: None)
        except LacunaError as error:
            error.problems = [f"line {number}: {problem}" for problem in error.problems]
            raise
        if as_json:
            facts = {"prompt": prompt, **asdict(answer), "seed": session.settings.seed}
            click.echo(visible_json(json.dumps(facts, ensure_ascii=False)))
            continue
        click.echo(visible(answer.text))
        for note in answer.notes():
            click.echo(f"note: line {number}: {note}", err=True)
    sys.stdout.flush()


def prompts_of(lines: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank."""
    for number, line in enumerate(lines, 1):
        try:
            prompt = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"line {number}: not UTF-8 ({error.reason})") from error
        if prompt:
            yield number, prompt
