"""An adapter and its base as one plain model, proven to say the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModelForCausalLM
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lacuna.errors import ModelError, RunError

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, in fp32."""


def merge(run_folder: str, output: str) -> str:
    """Write base plus adapter as one model, in the base's precision, and return what was compared.

    Raises RunError, ModelError: no adapter there, its base cannot be loaded, the output is taken, or the merged model
    does not say what base and adapter say.
    """
    adapter = find_adapter(Path(run_folder))
    target = Path(output)
    if target.exists():
        raise RunError(f"--output {output}: is there already; name a new folder")
    try:
        settings = json.loads((adapter / "adapter_config.json").read_text())
        base, revision = settings["base_model_name_or_path"], settings.get("revision") or "main"
    except (ValueError, KeyError, OSError) as error:
        raise RunError(f"{adapter / 'adapter_config.json'}: damaged: {error}") from error
    if not (adapter / "adapter_model.safetensors").is_file():
        raise RunError(f"{adapter}: there is no adapter_model.safetensors in it")
    where = "" if Path(base).is_dir() else f" (no such folder in {Path.cwd()}, and not from the hub)"
    try:
        dtype = AutoModelForCausalLM.from_pretrained(base, revision=revision).dtype
        model = AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype=torch.float32)
        has_tokenizer = (adapter / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(adapter if has_tokenizer else base)
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ModelError(f"{adapter}: its base model {base} cannot be loaded{where}: {said}") from error
    try:
        with_adapter = PeftModelForCausalLM.from_pretrained(model, str(adapter)).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{adapter}: the adapter does not load: {str(error).splitlines()[0]}") from error
    expected = logits_of(with_adapter)
    merged: Any = with_adapter.merge_and_unload()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.to(dtype).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    found = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32).eval()
    difference = float((logits_of(found) - expected).abs().max() / expected.abs().max())
    tolerance = TOLERANCE if dtype == torch.float32 else 256 * TOLERANCE
    if not difference <= tolerance:
        shutil.rmtree(partial)
        raise ModelError(
            f"{adapter}: the merged model's logits differ from base plus adapter by {difference:.1e} of the largest, "
            f"more than {tolerance:.0e}: nothing was written"
        )
    partial.rename(target)
    return f"merged: {target}; its logits differ from base plus adapter by {difference:.1e} of the largest"


def find_adapter(folder: Path) -> Path:
    """The adapter of a run folder, of its final folder, or the folder itself."""
    for place in (folder / "final", folder):
        if (place / "adapter_config.json").is_file():
            return place
    raise RunError(f"{folder}: no adapter there (adapter_config.json, in it or in its final folder)")


@torch.no_grad()
def logits_of(model: Any) -> Float[Tensor, "rows length vocabulary"]:
    """For a few fixed rows of tokens."""
    vocabulary: int = model.get_input_embeddings().num_embeddings
    ids = torch.arange(48).reshape(2, 24) * 7919 % vocabulary
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()
