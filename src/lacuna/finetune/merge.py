"""An adapter and its base as one plain model, proven to say the same."""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import PeftModelForCausalLM
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lacuna.data.chat import Renderer
from lacuna.errors import ChangedBaseError, ModelError, RunError
from lacuna.runs.card import merged_card
from lacuna.runs.final import refuse_damaged_final
from lacuna.runs.identity import changed_base
from lacuna.train.final import new_folder
from lacuna.train.model import stop_at_end_of_turn

TOLERANCE = 1e-4
"""Largest difference of logits in fp32, relative to the largest logit."""


def merge(run_folder: str, output: str, allow_changed_base: bool = False) -> str:
    """Write base plus adapter as one model, in the base's precision, and return what was compared.

    Proven before it is written: in fp32 the merged model says what base and adapter say. Proven after: the files hold
    its weights, rounded to the base's precision. What that rounding changes is told.
    allow_changed_base: merge over a base that has changed since the adapter was trained.
    Raises RunError, ModelError: no adapter there, its base cannot be loaded or is another one, the output is taken, or
    not the same.
    """
    adapter = find_adapter(Path(run_folder))
    refuse_damaged_final(adapter.parent)
    if not allow_changed_base and (changed := changed_base(adapter.parent)):
        raise ChangedBaseError(adapter, changed)
    target = Path(output)
    if target.exists():
        raise RunError(f"--output {output}: is there already; name a new folder")
    model, dtype, tokenizer = load_base(adapter)
    try:
        with_adapter: Any = PeftModelForCausalLM.from_pretrained(model, str(adapter)).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{adapter}: the adapter does not load: {_reason(error)}") from error
    tokens = _tokens_to_compare(model, with_adapter)
    expected = logits_of(with_adapter, tokens)
    merged = with_adapter.merge_and_unload()
    difference = relative(logits_of(merged, tokens), expected)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"{adapter}: the merged model's logits differ from base plus adapter by {difference:.1e} of the largest: "
            "nothing was written"
        )
    if tokenizer.chat_template is not None:
        stop_at_end_of_turn(merged, tokenizer, Renderer(tokenizer).stop_token)
    with new_folder(target) as partial:
        merged.to(dtype).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        found = AutoModelForCausalLM.from_pretrained(partial, dtype=dtype, trust_remote_code=False).eval()
        weights = found.state_dict()
        if not all(torch.equal(weights[name], tensor) for name, tensor in merged.state_dict().items()):
            raise RunError(f"--output {output}: the files hold other weights than were written; is the disk sound?")
        rounding = relative(logits_of(found.float(), tokens), expected)
        proof = (
            f"its logits differ from base plus adapter by {difference:.1e} of the largest, "
            f"in {str(dtype).removeprefix('torch.')} by {rounding:.1e}"
        )
        base = with_adapter.active_peft_config.base_model_name_or_path
        card = merged_card(adapter, base, proof, tokenizer.chat_template is not None)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return f"merged: {target}; {proof}"


def load_base(adapter: Path) -> tuple[Any, torch.dtype, Any]:
    """The adapter's base in fp32, its stored precision, and the adapter's tokenizer or else the base's."""
    try:
        settings = json.loads((adapter / "adapter_config.json").read_text())
        base, revision = settings["base_model_name_or_path"], settings.get("revision") or "main"
    except (ValueError, KeyError, OSError) as error:
        raise RunError(f"{adapter / 'adapter_config.json'}: damaged: {error}") from error
    if not (adapter / "adapter_model.safetensors").is_file():
        raise RunError(f"{adapter}: there is no adapter_model.safetensors in it")
    where = "" if Path(base).is_dir() else f" (no such folder in {Path.cwd()}, and not from the hub)"
    source = {"revision": revision, "trust_remote_code": False, "use_safetensors": True}
    try:
        stored = AutoModelForCausalLM.from_pretrained(base, **source)
        if hasattr(stored.config, "quantization_config"):
            raise ModelError(
                f"{adapter}: its base model {base} is quantised itself: there are no weights to merge into"
            )
        dtype = stored.dtype
        has_tokenizer = (adapter / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(adapter if has_tokenizer else base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ModelError(f"{adapter}: its base model {base} cannot be loaded{where}: {said}") from error
    return stored.float(), dtype, tokenizer


def find_adapter(folder: Path) -> Path:
    """The adapter of a run folder, of its final folder, or the folder itself."""
    for place in (folder / "final", folder):
        if (place / "adapter_config.json").is_file():
            return place
    raise RunError(f"{folder}: no adapter there (adapter_config.json, in it or in its final folder)")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _reason(error: BaseException) -> str:
    """The first line of what was raised, and where shapes disagree, both of them."""
    first, *rest = str(error).splitlines()
    return " ".join([first, *(line.strip() for line in rest if "shape" in line)])


def _tokens_to_compare(model: Any, with_adapter: Any) -> Int[Tensor, "rows length"]:
    """A few fixed rows of tokens, and those whose embeddings the adapter has trained by themselves."""
    vocabulary: int = model.config.get_text_config().vocab_size
    trained = with_adapter.active_peft_config.trainable_token_indices or []
    listed = trained if isinstance(trained, list) else [token for tokens in trained.values() for token in tokens]
    fixed = torch.arange(48).reshape(2, 24) * 7919 % vocabulary
    if not listed:
        return fixed
    own = torch.tensor(listed[:24]).repeat(24)[:24]
    return torch.cat([fixed, own[None]])


@torch.no_grad()
def logits_of(model: Any, tokens: Int[Tensor, "rows length"]) -> Float[Tensor, "rows length vocabulary"]:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()
