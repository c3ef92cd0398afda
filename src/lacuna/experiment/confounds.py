"""What changes between runs besides what the experiment varies. Nothing here is an error: it is said aloud."""

from collections.abc import Mapping, Sequence
from typing import Any

from lacuna.config.trees import MISSING, get, leaves
from lacuna.experiment.base import Base


def find_confounds(base: Base, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each difference in budget or scale that a reader of the results should know of."""
    if base.trainer == "torchtune":
        return _torchtune(base, runs)
    return _finetune(runs) if base.trainer == "finetune" else _ours(runs)


def _varies(runs: Sequence[Mapping[str, Any]], path: str) -> bool:
    values = [get(run, path) for run in runs]
    return any(value != values[0] for value in values)


def _listed(values: list[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in sorted(values)))


def _torchtune(base: Base, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    gpus = base.gpus
    notes = _adapter_scale(runs, "model.lora_rank", "model.lora_alpha")
    effective = [_product(run, ("batch_size", "gradient_accumulation_steps"), gpus) for run in runs]
    limited = any(get(run, "max_steps_per_epoch") not in (None, MISSING) for run in runs)
    if None not in effective and len(set(effective)) > 1:
        what = "samples seen" if limited else "optimizer steps per epoch"
        notes.append(
            f"confound: a step averages {_listed(effective)} samples (batch_size × gradient_accumulation_steps"
            f"{f' × {gpus} devices' if gpus > 1 else ''}), so the {what} differ between runs"
        )
    packed = [path for path in ("dataset.packed", "dataloader.packed") if _varies(runs, path)]
    if packed:
        notes.append(f"confound: {packed[0]} varies; packing puts several samples in a row, so there are fewer steps")
    elif _varies(runs, "tokenizer.max_seq_len"):
        is_packed = any(get(run, "dataset.packed") is True for run in runs)
        effect = "so do the samples in a packed row and the number of steps" if is_packed else "longer samples are cut"
        notes.append(f"confound: max_seq_len varies; {effect}")
    if any(_varies(runs, f"dataset.{name}") for name in ("source", "data_files", "split", "_component_")):
        notes.append("confound: the data vary; where their sizes do, the number of optimizer steps does too")
    if len(runs) > 1 and all(get(run, "seed") is None for run in runs):
        notes.append(
            "confound: seed is null, so every run draws its own; `seeds: [1, 2, 3]` makes it a part of the design"
        )
    if _varies(runs, "seed"):
        notes.append(_seeds(base, runs))
    return notes


def _adapter_scale(runs: Sequence[Mapping[str, Any]], rank_path: str, alpha_path: str) -> list[str]:
    scales = [(get(run, alpha_path), get(run, rank_path)) for run in runs]
    ratios = {
        alpha / rank for alpha, rank in scales if isinstance(alpha, int | float) and isinstance(rank, int) and rank
    }
    if not _varies(runs, rank_path) or _varies(runs, alpha_path) or len(ratios) < 2:
        return []
    return [
        f"confound: lora_alpha is {scales[0][0]} in every run while lora_rank varies, so the adapter's scale "
        "lora_alpha / lora_rank varies too; `derived: {lora_alpha: 2 * lora_rank}` keeps it"
    ]


def _finetune(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = _adapter_scale(runs, "training.lora_r", "training.lora_alpha")
    samples = [_product(run, ("training.batch_size", "training.gradient_accumulation_steps"), 1) for run in runs]
    if None not in samples and len(set(samples)) > 1:
        limited = any(isinstance(get(run, "training.max_steps"), int) for run in runs)
        what = "samples seen" if limited else "optimizer steps"
        notes.append(
            f"confound: a step averages {_listed(samples)} samples (batch_size × gradient_accumulation_steps), so the "
            f"{what} differ between runs"
        )
    if _varies(runs, "training.sequence_length"):
        notes.append("confound: sequence_length varies; what happens to longer samples decides how many are trained on")
    return notes


def _seeds(base: Base, runs: Sequence[Mapping[str, Any]]) -> str:
    order = "torchtune's sampler shuffles by seed 0 whatever the seed is, so the order of the data is the same"
    draws = any("dropout" in path and value for run in runs for path, value in leaves(run))
    recipe = str(base.recipe)
    if recipe.startswith(("full_", "qat_distributed")) and not draws:
        return (
            f"warning: seeds change nothing here: {order}, and full fine-tuning without dropout draws nothing else: "
            "the runs are equal to the bit, and what varies over them says nothing; leave seeds out, or set a dropout"
        )
    drawn = "the adapters' start and dropout" if "lora" in recipe or "knowledge" in recipe else "what the recipe draws"
    return f"seeds vary {drawn}, not the data: {order}"


def _ours(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    tokens = [_product(run, ("batch_size", "sequence_length"), 1) for run in runs]
    seen = {_product(run, ("batch_size", "sequence_length", "steps"), 1) for run in runs}
    notes = []
    if None not in tokens and len(set(tokens)) > 1:
        what = "tokens seen" if len(seen) > 1 else "optimizer steps"
        notes.append(
            f"confound: a step holds {_listed(tokens)} tokens (batch_size × sequence_length), so the {what} differ"
        )
    if _varies(runs, "packing"):
        notes.append("confound: packing varies; it puts several documents in a row, so there are fewer steps")
    return notes


def _product(run: Mapping[str, Any], paths: Sequence[str], factor: int) -> int | None:
    for path in paths:
        value = get(run, path)
        if type(value) is not int:
            return None
        factor *= value
    return factor
