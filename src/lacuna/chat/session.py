"""A conversation at the terminal: its turns, and the commands that begin with a slash. Nothing here imports torch."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lacuna.chat.settings import Settings
from lacuna.config.files import Layer, check
from lacuna.data.formats import Broken, Message, read_file
from lacuna.data.schemas import detect_schema, to_examples
from lacuna.errors import ConfigError, DataError, RunError
from lacuna.files import write_whole
from lacuna.words import did_you_mean

HELP = """\
/reset             forget the conversation
/system [TEXT]     what the model is told first; without TEXT, nothing
/undo              take back the last prompt and its answer
/retry             answer the last prompt again, with the next seed
/save FILE         write the conversation as jsonl, as training reads it
/load FILE         go on with a conversation that was saved
/set [NAME VALUE]  temperature, top_p, max_tokens or seed; alone: show them
/help              this list
/exit              leave, as Ctrl-D does
Ctrl-C stops an answer. Pasted lines stay together. For a prompt that begins
with a slash, put a space before it."""


@dataclass(frozen=True)
class Turn:
    """A prompt, what was answered, and the seed of the answer."""

    user: str
    assistant: str
    seed: int


@dataclass(frozen=True)
class Session:
    settings: Settings
    system: str | None = None
    turns: tuple[Turn, ...] = ()

    def messages(self) -> list[Message]:
        """The conversation so far."""
        said = [{"role": "system", "content": self.system}] if self.system is not None else []
        for turn in self.turns:
            said += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.assistant}]
        return said


@dataclass(frozen=True)
class Reaction:
    """What a line comes to: the session after it, what to tell the user, and what to ask the model."""

    session: Session
    told: str = ""
    prompt: str | None = None
    seed: int = 0
    leaves: bool = False


def obey(session: Session, line: str) -> Reaction:
    """A line of the user's: a command, or a prompt. Raises ConfigError, DataError, RunError."""
    if not line.startswith("/"):
        return Reaction(session, prompt=line.strip(), seed=session.settings.seed)
    name, _, argument = line[1:].strip().partition(" ")
    if name not in COMMANDS:
        raise ConfigError(
            f"/{name}: no such command{did_you_mean(name, [*COMMANDS])}; /help lists them, and a space before it makes "
            "a slash part of a prompt"
        )
    takes, command = COMMANDS[name]
    argument = argument.strip()
    if argument and not takes:
        raise ConfigError(f"/{name} takes nothing behind it, not {argument!r}")
    if takes == "FILE" and not argument:
        raise ConfigError(f"/{name} FILE: name a file")
    return command(session, argument)


def _reset(session: Session, _: str) -> Reaction:
    return Reaction(replace(session, turns=()), "the conversation is forgotten")


def _system(session: Session, text: str) -> Reaction:
    return Reaction(replace(session, system=text or None), "from now on so" if text else "no system message")


def _undo(session: Session, _: str) -> Reaction:
    if not session.turns:
        raise ConfigError("/undo: there is nothing to take back")
    return Reaction(replace(session, turns=session.turns[:-1]), f"taken back: {session.turns[-1].user}")


def _retry(session: Session, _: str) -> Reaction:
    if not session.turns:
        raise ConfigError("/retry: there is no answer yet")
    last = session.turns[-1]
    return Reaction(replace(session, turns=session.turns[:-1]), prompt=last.user, seed=last.seed + 1)


def _save(session: Session, file: str) -> Reaction:
    path = Path(file).expanduser()
    if not session.turns:
        raise RunError("/save: there is nothing to save yet")
    if path.exists():
        raise RunError(f"/save {file}: is there already; name a new file")
    try:
        write_whole(path, json.dumps({"messages": session.messages()}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RunError(f"/save {file}: cannot be written: {error.strerror}") from error
    return Reaction(session, f"saved: {path}")


def _load(session: Session, file: str) -> Reaction:
    path = Path(file).expanduser()
    rows = list(read_file(path, "jsonl"))
    good = [row for row in rows if not isinstance(row, Broken)]
    examples = list(to_examples(rows, detect_schema(good, "chat", "text", str(path)))) if good else rows
    for example in examples:
        if isinstance(example, Broken):
            raise DataError(f"/load {example.origin}: {example.reason}")
    if len(examples) != 1:
        raise DataError(f"/load {file}: holds {len(examples)} conversations; one is wanted")
    messages: list[Message] = examples[0].messages  # type: ignore[union-attr]
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    said = messages[system is not None :]
    if not said or [message["role"] for message in said] != ["user", "assistant"] * (len(said) // 2):
        raise DataError(f"/load {file}: user and assistant must speak in turn, behind at most one system message")
    texts = [str(message["content"]) for message in said]
    seed = session.settings.seed
    turns = tuple(Turn(user, assistant, seed) for user, assistant in zip(texts[::2], texts[1::2], strict=True))
    return Reaction(replace(session, system=system, turns=turns), f"loaded: {len(turns)} turns")


def _set(session: Session, words: str) -> Reaction:
    name, _, value = words.partition(" ")
    values = session.settings.model_dump()
    if not name:
        return Reaction(session, ", ".join(f"{setting} {value}" for setting, value in values.items()))
    if name in values and not value.strip():
        raise ConfigError(f"/set {name} VALUE: say to what")
    settings = check_settings({**values, name: value.strip()}, "/set")
    return Reaction(replace(session, settings=settings), f"{name} {settings.model_dump()[name]}")


def check_settings(values: dict[str, object], where: str) -> Settings:
    """Raises ConfigError that says which is wrong. where: the user wrote them."""
    return check(Settings, values, dict.fromkeys(values, Layer(where, values)))


COMMANDS: dict[str, tuple[str, Callable[[Session, str], Reaction]]] = {
    "reset": ("", _reset),
    "system": ("TEXT", _system),
    "undo": ("", _undo),
    "retry": ("", _retry),
    "save": ("FILE", _save),
    "load": ("FILE", _load),
    "set": ("NAME VALUE", _set),
    "help": ("", lambda session, _: Reaction(session, HELP)),
    "exit": ("", lambda session, _: Reaction(session, leaves=True)),
}
"""Name to what may stand behind it, and what it does."""
