"""Draw docs/picture.svg from the runs of `make quickstart`: what was learned, and how the rows were packed.

docs/sample.svg is what `lacuna data` shows of the same data, docs/memory.svg what a step of an 8B model takes.
"""

import io
import re
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer

from lacuna.config.files import check, merge_layers, read_layer
from lacuna.config.training import ALTERNATIVES, SFTConfig
from lacuna.cost.memory import step_memory
from lacuna.cost.shape import Adapter, ModelShape, Step
from lacuna.data.chat import Renderer
from lacuna.data.loader import PackedRow, load_rows
from lacuna.data.split import row_order
from lacuna.preflight.preview import preview
from lacuna.preflight.preview_text import show
from lacuna.runs.metrics import read_metrics
from lacuna.words import GIB

WIDTH, HEIGHT = 960, 330
INK, FAINT, FIRST, SECOND, LEARNED = "#24292f", "#8c959f", "#d0d7de", "#b6c2cf", "#2f6feb"


def text(x: float, y: float, words: str, size: int = 13, colour: str = INK, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" font-weight="{weight}">{words}</text>'


def curve(folder: Path, x: float, title: str) -> list[str]:
    """Training loss as a line, validation losses as dots, in a box of 230 × 190."""
    lines = read_metrics(folder)
    trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    last = trained[-1][0]
    top = max(loss for _, loss in trained + held_out)

    def at(step: float, loss: float) -> tuple[float, float]:
        return x + 230 * step / last, 270 - 190 * loss / top

    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(*point) for point in trained))
    dots = [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{INK}"/>' for a, b in (at(*point) for point in held_out)]
    first, end = held_out[0][1], held_out[-1][1]
    return [
        text(x, 44, title, 15, weight="bold"),
        f'<polyline points="{x},80 {x},270 {x + 230},270" fill="none" stroke="{FAINT}"/>',
        f'<polyline points="{points}" fill="none" stroke="{LEARNED}" stroke-width="2"/>',
        *dots,
        text(x + 80, 100, f"validation loss {first:.2f} → {end:.2f}"),
        text(x, 290, "step 0", 12, FAINT),
        text(x + 195, 290, f"{last}", 12, FAINT),
    ]


def packed_row(row: PackedRow, length: int, x: float, y: float, width: float) -> list[str]:
    """Documents as boxes of two greys, what the assistant says in blue."""
    scale = width / length
    shapes, start = [], 0
    for index, sample in enumerate(row):
        size = len(sample.tokens)
        colour = (FIRST, SECOND)[index % 2]
        shapes.append(
            f'<rect x="{x + start * scale:.1f}" y="{y}" width="{size * scale:.1f}" height="20" fill="{colour}"/>'
        )
        edges = [0, *(i for i in range(1, size) if sample.supervised[i] != sample.supervised[i - 1]), size]
        shapes += [
            f'<rect x="{x + (start + a) * scale:.1f}" y="{y}" width="{(b - a) * scale:.1f}" height="20" '
            f'fill="{LEARNED}"/>'
            for a, b in pairwise(edges)
            if sample.supervised[a]
        ]
        start += size
    shapes.append(f'<rect x="{x}" y="{y}" width="{width}" height="20" fill="none" stroke="{FAINT}"/>')
    return shapes


def in_colour(config: SFTConfig, renderer: Renderer) -> str:
    """`lacuna data` in a terminal of 80 columns, without fonts from the network."""
    console = Console(
        record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False,
        markup=False, emoji=False,
    )  # fmt: skip
    show(preview(config, renderer, [config.dataset], 1), renderer, console)
    svg = console.export_svg(title="lacuna data --config examples/quickstart/sft.toml")
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)


LLAMA_8B = ModelShape("llama", 4096, 32, 14336, 32, 8, 128, 128256, tied=False)
METHODS = {"full": None, "LoRA": Adapter(16), "QLoRA": Adapter(16, bits=4)}
PARTS = {
    "weights": "#1f4e9c", "gradients": "#2f6feb", "optimizer": "#8db4ff", "activations": "#d9822b",
    "logits and loss": "#f2c14e", "other": FAINT,
}  # fmt: skip


def memory_bars() -> str:
    """What a step of Llama 3.1 8B takes, by method, without checkpointing and with it."""
    shapes = [
        text(30, 32, "Llama 3.1 8B, bf16, 4 rows of 4,096 tokens, one H100: GiB at a step's peak", 15, weight="bold")
    ]
    y = 50
    for method, adapter in METHODS.items():
        for checkpointing in (False, True):
            step = Step(4, 4096, True, checkpointing, attention="flash_attention_2", adapter=adapter)
            sizes = step_memory(LLAMA_8B, step)
            sizes["other"] = sizes.pop("inputs") + sizes.pop("framework")
            shapes.append(text(30, y + 16, f"{method}{', checkpointing' if checkpointing else ''}"))
            x = 190.0
            for part, colour in PARTS.items():
                width = sizes[part] / GIB * 2.2
                shapes.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="22" fill="{colour}"/>')
                x += width
            shapes.append(text(x + 6, y + 16, f"{sum(sizes.values()) / GIB:.0f}"))
            y += 30
    limit = 190 + 79.1 * 2.2
    shapes.append(f'<line x1="{limit}" x2="{limit}" y1="44" y2="{y}" stroke="{INK}" stroke-dasharray="4 3"/>')
    shapes.append(text(limit + 4, y + 4, "80 GB", 12))
    for index, (part, colour) in enumerate(PARTS.items()):
        x = 190 + 125 * index
        shapes.append(f'<rect x="{x}" y="{y + 22}" width="12" height="12" fill="{colour}"/>')
        shapes.append(text(x + 18, y + 33, part, 12))
    return picture(shapes, y + 50)


def picture(shapes: list[str], height: int) -> str:
    style = 'font-family="system-ui, sans-serif"'
    body = "\n".join([f'<rect width="{WIDTH}" height="{height}" fill="white"/>', *shapes])
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {style}>\n{body}\n</svg>\n'


def main() -> None:
    Path("docs/memory.svg").write_text(memory_bars(), encoding="utf-8")
    layer = read_layer("examples/quickstart/sft.toml")
    config = check(SFTConfig, *merge_layers([layer], ALTERNATIVES))
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    renderer = Renderer(tokenizer)
    Path("docs/sample.svg").write_text(in_colour(config, renderer), encoding="utf-8")
    rows, _ = load_rows(config, renderer, lambda line: None)
    shapes = curve(Path("runs/quickstart/base"), 30, "pretrain")
    shapes += curve(Path("runs/quickstart/run_003"), 330, "sft")
    shapes.append(text(620, 44, "packed rows of the sft data", 15, weight="bold"))
    for place, index in enumerate(row_order(config.seed, 0, len(rows))[:6].tolist()):
        shapes += packed_row(rows.row(index), config.sequence_length, 620, 80 + 30 * place, 310)
    shapes += [
        text(620, 285, "grey: conversations, which never see each other", 12, FAINT),
        text(620, 303, "blue: the assistant's words, which alone are learned", 12, LEARNED),
    ]
    Path("docs/picture.svg").write_text(picture(shapes, HEIGHT), encoding="utf-8")


if __name__ == "__main__":
    main()
