"""A preview in the terminal: numbers, bars, and samples in which what is learned is green."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lacuna.config.finetune import FinetuneConfig
from lacuna.config.training import TrainingConfig
from lacuna.data.chat import Renderer
from lacuna.data.formats import SHOWN_PROBLEMS
from lacuna.errors import needs_extra
from lacuna.preflight.preview import PartPreview, Preview, Shown, preview
from lacuna.train.loading import load_tokenizer
from lacuna.visible import escaped

BAR_WIDTH = 40
SHOWN_TOKENS = 600
"""Of a sample; the middle of a longer one is left out."""
OPEN, CLOSE = "⟦", "⟧"
"""Around what is learned, where there is no colour."""
STYLES = {
    (False, False): "dim", (False, True): "dim reverse", (True, False): "green", (True, True): "green reverse",
}  # fmt: skip
"""Of tokens that are (learned, control tokens)."""


def look(config: TrainingConfig, files: Sequence[str], samples: int, as_json: bool) -> bool:
    """Print a preview of the config's data or of files; whether a run would stop. Raises ModelError: no tokenizer."""
    if isinstance(config, FinetuneConfig):
        with needs_extra("finetune", "peft"):
            import lacuna.finetune.checks  # noqa: F401
    renderer = Renderer(load_tokenizer(config), config.flag("chat_template"))
    found = preview(config, renderer, files, samples)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        show(found, renderer, Console(highlight=False, soft_wrap=True, markup=False, emoji=False))
    return bool(found.problems)


def show(found: Preview, renderer: Renderer, console: Console) -> None:
    for part in found.parts:
        _show_part(part, renderer, console)
    for note in [*found.notes, *map(str, found.copies)]:
        style = "bold yellow" if note.startswith("warning") else ""
        console.print(Text(escaped(note), style))
    for problem in found.problems:
        console.print(Text(f"would stop: {escaped(problem)}", "red"))


def _show_part(part: PartPreview, renderer: Renderer, console: Console) -> None:
    console.print(Text(escaped(part.name), "bold"))
    console.print(f"  {'format':10} {part.format}, schema {escaped(part.schema)}")
    for name, value in _facts(part):
        console.print(f"  {name:10} {escaped(value)}")
    console.print(f"  {'length':10} median {part.median:,}, longest {part.longest:,} tokens")
    most = max(count for _, _, count in part.histogram)
    bars = Table.grid(padding=(0, 1, 0, 0))
    for column in ("right", "left", "right"):
        bars.add_column(justify=column, no_wrap=True)
    for first, last, count in part.histogram:
        bars.add_row(f"{first:,}–{last:,}", Bar(most, 0, count, width=BAR_WIDTH), f"{count:,}")
    console.print(bars)
    for sample in part.samples:
        _show_sample(sample, renderer, console)
    console.print()


def _facts(part: PartPreview) -> Iterator[tuple[str, str]]:
    left_out = {
        "too long": part.dropped, "empty": part.empty, "broken": part.broken,
        "unusable": sum(map(len, part.unusable.values())),
    }  # fmt: skip
    without = ", ".join(f"{count:,} {why}" for why, count in left_out.items() if count)
    yield "documents", f"{part.documents:,}{f'; left out: {without}' if without else ''}"
    cut = f"; {part.truncated:,} documents are cut off" if part.truncated else ""
    yield "tokens", f"{part.tokens:,}, {part.targets / max(part.tokens, 1):.1%} of them learned{cut}"
    if part.rows is not None:
        yield "rows", f"{part.rows:,}{f', {part.fill:.1%} full' if part.fill is not None else ', one document each'}"
    if part.unused_columns:
        yield "not used", f"columns {', '.join(part.unused_columns)}"
    for kind, places in part.unusable.items():
        more = f" and {len(places) - SHOWN_PROBLEMS:,} more" if len(places) > SHOWN_PROBLEMS else ""
        yield "unusable", f"{kind}: {len(places):,} ({', '.join(places[:SHOWN_PROBLEMS])}{more})"


def _show_sample(sample: Shown, renderer: Renderer, console: Console) -> None:
    has_colour = console.color_system is not None and not console.no_color
    console.print(Text(f"  {escaped(sample.origin)}: {len(sample.tokens):,} tokens", "bold"))
    text = Text()
    half = SHOWN_TOKENS // 2
    left_out = len(sample.tokens) - 2 * half
    ends = [sample.tokens[:half], sample.tokens[-half:]] if left_out > 0 else [sample.tokens]
    for number, tokens in enumerate(ends):
        if number:
            text.append(f"\n… {left_out:,} tokens …\n", "italic")
        before: list[int] = []
        for learned, group in groupby(tokens, lambda token: token.learned):
            text.append(OPEN if learned and not has_colour else "")
            for special, run in groupby(group, lambda token: token.special):
                ids = [token.id for token in run]
                text.append(_visible(ids, before, renderer), STYLES[learned, special])
                before = ids[-1:]
            text.append(CLOSE if learned and not has_colour else "")
    if text.plain.endswith("\n"):
        text.right_crop(1)
    console.print(text)


def _visible(ids: list[int], before: list[int], renderer: Renderer) -> str:
    """What tokens say after the one before them, with line breaks and control characters to be seen."""
    known, both = (str(renderer.tokenizer.decode(part)) for part in (before, before + ids))
    said = both.removeprefix(known)
    return "\n".join(escaped(line) + "⏎" for line in said.split("\n")).removesuffix("⏎")
