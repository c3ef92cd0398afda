"""The same prompts to several models, one model in memory at a time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lacuna.chat.answer import Answer, ask
from lacuna.chat.find import FoundModel
from lacuna.chat.local import free_memory, load
from lacuna.chat.settings import Settings
from lacuna.chat.terminal import prompts_of
from lacuna.data.formats import SHOWN_PROBLEMS, Broken, Conversation, Message, Row, read_file
from lacuna.data.schemas import detect_schema, to_examples
from lacuna.errors import DataError, RunError
from lacuna.files import write_whole
from lacuna.visible import visible
from lacuna.words import Tell


@dataclass(frozen=True)
class Prompt:
    """messages: end with the user's words. reference: what the file says that the answer should be."""

    messages: list[Message]
    reference: str | None


def read_prompts(file: str) -> list[Prompt]:
    """Of a .jsonl with `messages` or `prompt`; of a .txt each line is a prompt.

    Words of the assistant at the end of messages are the reference. Raises DataError that lists what is wrong.
    """
    path = Path(file).expanduser()
    if path.suffix == ".txt":
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise DataError(f"--prompts {file}: {error.strerror}") from error
        prompts = [Prompt([{"role": "user", "content": text}], None) for _, text in prompts_of(lines)]
    elif path.suffix == ".jsonl":
        prompts = _of_rows(list(read_file(path)))
    else:
        raise DataError(f"--prompts {file}: ends in .jsonl (messages, or prompt) or .txt (a prompt a line)")
    if not prompts:
        raise DataError(f"--prompts {file}: no prompt is in it")
    return prompts


def _of_rows(rows: Sequence[Row | Broken]) -> list[Prompt]:
    found = [_of_row(row) for row in rows]
    problems = [f"{row.origin}: {row.reason}" for row in found if isinstance(row, Broken)]
    if problems:
        raise DataError([*problems[:SHOWN_PROBLEMS], *(["…"] if problems[SHOWN_PROBLEMS:] else [])])
    return [row for row in found if isinstance(row, Prompt)]


def _of_row(row: Row | Broken) -> Prompt | Broken:
    if isinstance(row, Broken):
        return row
    if [*row.values] not in (["messages"], ["prompt"]):
        return Broken(
            row.origin, f"its columns are {', '.join(row.values)}; wanted is messages or prompt, nothing else"
        )
    value = row.values.get("prompt")
    row = Row({"messages": [{"role": "user", "content": value}]}, row.origin) if "prompt" in row.values else row
    (example,) = to_examples([row], detect_schema([row], "chat", "text", row.origin))
    if not isinstance(example, Conversation):
        return Broken(row.origin, example.reason if isinstance(example, Broken) else "no conversation")
    last = example.messages[-1]
    asked = example.messages[:-1] if last["role"] == "assistant" else example.messages
    if not asked or asked[-1]["role"] != "user":
        return Broken(row.origin, "before the answer, the user must have the last word")
    return Prompt(asked, last["content"] if last["role"] == "assistant" else None)


def check_output(file: str | None) -> None:
    """Before a model is loaded. Raises RunError."""
    if file is not None and (Path(file).exists() or not Path(file).absolute().parent.is_dir()):
        why = "is there already; name a new file" if Path(file).exists() else f"no folder {Path(file).parent}"
        raise RunError(f"--output {file}: {why}")


def answers_of(found: FoundModel, prompts: Sequence[Prompt], settings: Settings, tell: Tell) -> list[Answer]:
    """Each from the settings' seed; the model is out of memory afterwards."""
    model = load(found, tell)
    tell(f"{found.name}: {len(prompts)} prompts")
    answers = [ask(model, prompt.messages, settings, settings.seed, lambda piece: None) for prompt in prompts]
    del model
    free_memory()
    return answers


def compare(
    models: Sequence[FoundModel], prompts: Sequence[Prompt], settings: Settings, output: str | None, tell: Tell
) -> Table:
    """Answers side by side; output gets a line of JSON for each prompt. Raises LacunaError."""
    answers = {model.name: answers_of(model, prompts, settings, tell) for model in models}
    if output is not None:
        lines = [
            {
                "messages": prompt.messages,
                "reference": prompt.reference,
                "answers": {name: asdict(of_model[place]) for name, of_model in answers.items()},
            }
            for place, prompt in enumerate(prompts)
        ]
        try:
            write_whole(Path(output), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        except OSError as error:
            raise RunError(f"--output {output}: cannot be written: {error.strerror}") from error
    return side_by_side(prompts, answers)


def side_by_side(prompts: Sequence[Prompt], answers: Mapping[str, Sequence[Answer]]) -> Table:
    """A row for each prompt; last, how many answers are the reference."""
    has_reference = any(prompt.reference is not None for prompt in prompts)
    table = Table(show_lines=True)
    for name in ("prompt", *(["reference"] if has_reference else []), *answers):
        table.add_column(Text(visible(name)), overflow="fold")
    for place, prompt in enumerate(prompts):
        cells = [prompt.messages[-1]["content"], *([prompt.reference or ""] if has_reference else [])]
        for of_model in answers.values():
            answer = of_model[place]
            cells.append("\n".join([answer.text.strip(), *(f"({note})" for note in answer.notes())]))
        table.add_row(*(Text(visible(cell)) for cell in cells))
    if has_reference:
        wanted = [(place, prompt.reference.strip()) for place, prompt in enumerate(prompts) if prompt.reference]
        rights = [sum(of[place].text.strip() == text for place, text in wanted) for of in answers.values()]
        table.add_row("equal to the reference", "", *(f"{right} of {len(wanted)}" for right in rights))
    return table


def show(table: Table) -> None:
    Console(highlight=False).print(table)
