"""The conversation at a terminal, and the same from lines of a file or a pipe."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import click
from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from lacuna.chat.answer import Answer, Model, Reply, Settings, ask, notes
from lacuna.chat.session import Session, Step, Turn, obey
from lacuna.data.formats import Message
from lacuna.errors import DataError, LacunaError

PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Control characters as their pictures: no model's words move the cursor."""
REFRESHES = 10
"""A second, of what is being written."""


class Words(Markdown):
    """Markdown in which tags are text, and lines end where the model ends them."""

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = PARSER.parse(text)
        for child in (child for token in self.parsed for child in token.children or []):
            child.type = "hardbreak" if child.type == "softbreak" else child.type


class Tail:
    """The last lines of what is being written: no more than the terminal has."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(Words(self.text), options, pad=False)[-(console.height - 2) :]:
            yield from line
            yield Segment.line()


def whole_blocks(text: str) -> tuple[str, str]:
    """Markdown whose blocks are complete whatever follows, and the rest."""
    lines = text.split("\n")
    starts = [token.map[0] for token in PARSER.parse("\n".join(lines[:-1])) if token.level == 0 and token.map]
    begin = max(starts, default=0)
    return "\n".join(lines[:begin]), "\n".join(lines[begin:])


class Screen:
    """Markdown as it comes: blocks that are complete are printed for good, the last one is drawn anew."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.rest = ""
        self._is_first = True
        self._live = Live(console=console, transient=True, refresh_per_second=REFRESHES)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def say(self, piece: str) -> None:
        whole, self.rest = whole_blocks(self.rest + piece.translate(VISIBLE))
        self._print(whole)
        self._live.update(Tail(self.rest))

    def _print(self, text: str) -> None:
        if text.strip():
            if not self._is_first:
                self.console.print()
            self._is_first = False
            self.console.print(Words(text))

    def __exit__(self, *_: object) -> None:
        self._live.update(Text())
        self._live.stop()
        self._print(self.rest)


class Plain:
    """Text as it comes."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> Self:
        return self

    def say(self, piece: str) -> None:
        self.console.file.write(piece.translate(VISIBLE))
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
            return Answer(Reply("".join(said), "interrupted", None, None), None, 0.0)


def answered(console: Console, model: Model, step: Step) -> Session:
    """The session with the prompt's answer. Raises LacunaError where there is none."""
    session, prompt = step.session, step.prompt
    assert prompt is not None
    messages = [*session.messages(), {"role": "user", "content": prompt}]
    answer = show_answer(console, model, messages, session.settings, step.seed)
    reply = answer.reply
    speed = [f"{reply.answer_tokens} tokens in {answer.seconds:.1f} s"] if reply.answer_tokens is not None else []
    console.print(Text("; ".join([*notes(reply), *speed]), style="dim"))
    turn = Turn(prompt, reply.text.strip(), step.seed)
    return replace(session, turns=(*session.turns, turn)) if turn.assistant else session


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
                step = obey(session, line)
                console.print(Text(step.told.translate(VISIBLE), style="dim")) if step.told else None
                session = answered(console, model, step) if step.prompt is not None else step.session
                leaves = step.leaves
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        except LacunaError as error:
            for problem in error.problems:
                console.print(Text(f"error: {problem}".translate(VISIBLE), style="red"))


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
            facts = {"prompt": prompt, **answer.facts(), "seed": session.settings.seed}
            click.echo(json.dumps(facts, ensure_ascii=False))
            continue
        click.echo(answer.reply.text)
        for note in notes(answer.reply):
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
