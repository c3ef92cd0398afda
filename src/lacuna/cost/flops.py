"""Floating-point operations of training, and the time that they take. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from lacuna.config.files import read_layer
from lacuna.cost.memory import trained_parameters
from lacuna.cost.shape import Adapter, ModelShape
from lacuna.errors import LacunaError
from lacuna.runs.folder import starts_of
from lacuna.runs.metrics import read_metrics

ASSUMED_MFU = {"full": 0.40, "lora": 0.35, "qlora": 0.25}
"""Shares of a GPU's peak that are usual for models of some billion weights; unpacking 4-bit weights takes time."""
RECOMPUTED = 0.75
"""Of that where activations are recomputed: three passes over the layers become four."""


@dataclass(frozen=True)
class ModelFlops:
    """The numbers of a model that decide its FLOPs."""

    block_parameters: int
    """Weights of the matrix products in all transformer blocks."""
    head_parameters: int
    """hidden size × vocabulary."""
    all_parameters: int
    layers: int
    attention_width: int
    """heads × head dimension."""
    frozen_block_parameters: int = 0
    """Of block_parameters, those that are not trained."""
    is_head_frozen: bool = False

    def training(self, tokens: int, targets: int, attention_pairs: int) -> int:
        """FLOPs of a forward and backward pass that cannot be avoided; recomputation does not count.

        A weight costs 2 FLOPs for each token forward and 4 backward, 2 where it is frozen; a query-key pair costs
        4 × attention width forward (scores, then values) and twice that backward. The head is needed for supervised
        tokens only. attention_pairs: of causal attention within documents, n(n+1)/2 for n tokens.
        """
        return (
            (6 * self.block_parameters - 2 * self.frozen_block_parameters) * tokens
            + (4 if self.is_head_frozen else 6) * self.head_parameters * targets
            + 12 * self.layers * self.attention_width * attention_pairs
        )

    def palm(self, tokens: int, sequence_length: int) -> int:
        """FLOPs as PaLM counts them: every parameter, full attention over the whole row.

        # ref: Chowdhery et al. 2022, arXiv 2204.02311, appendix B
        """
        return tokens * (6 * self.all_parameters + 12 * self.layers * self.attention_width * sequence_length)


def flops_of(shape: ModelShape, adapter: Adapter | None) -> ModelFlops:
    """The same numbers as train/metrics.py takes from the model itself."""
    matrices = shape.layers * shape.block_matrices
    added = trained_parameters(shape, adapter) if adapter else 0
    return ModelFlops(
        block_parameters=matrices + added,
        head_parameters=shape.embedding,
        all_parameters=shape.parameters + added,
        layers=shape.layers,
        attention_width=shape.attention,
        frozen_block_parameters=matrices if adapter else 0,
        is_head_frozen=adapter is not None,
    )


@dataclass(frozen=True)
class Speed:
    """How fast a run is taken to be. source: where that is from, in words."""

    source: str
    mfu: float | None = None
    tokens_per_second: float | None = None


def measured_speed(output_dir: str, model: str, device: str) -> Speed | None:
    """What runs in this folder, or beside it, reached on this kind of device: MFU, or tokens/s of the same model."""
    folder = Path(output_dir).expanduser()
    beside = sorted(path.parent for path in folder.parent.glob("*/metrics.jsonl")) if folder.parent.is_dir() else []
    for place in dict.fromkeys([folder, *beside]):
        lines = [line for line in read_metrics(place) if "tokens_per_second" in line][1:]
        starts = starts_of(place)
        if not lines or not starts or starts[-1].get("device") != device:
            continue
        shares = [line["mfu"] for line in lines if "mfu" in line]
        if shares:
            return Speed(f"measured in {place}", mfu=median(shares))
        if _model_of(place) == model:
            return Speed(f"measured in {place}", tokens_per_second=median(line["tokens_per_second"] for line in lines))
    return None


def _model_of(folder: Path) -> str | None:
    try:
        values = read_layer(folder / "config.toml").values
    except LacunaError:
        return None
    place: str | None = values.get("model_name") or values.get("model", {}).get("path")
    return place


def assumed_speed(adapter: Adapter | None, checkpointing: bool) -> Speed:
    """A usual MFU."""
    kind = "full" if adapter is None else "qlora" if adapter.bits else "lora"
    share = ASSUMED_MFU[kind] * (RECOMPUTED if checkpointing else 1.0)
    return Speed("assumed: docs/memory.md", mfu=share)
