"""Runs inside torchtune's environment, as a script: how many samples, tokens and rows a run's data has.

Reads one JSON request on standard input, `runs`: configs with `tokenizer` and `dataset`. Answers with one JSON line:
for each the counts, or the reason why there are none. It can import torchtune and what it needs, but not lacuna.
"""

import inspect
import json
import os
import sys
import warnings
from typing import Any

UNLEARNED = -100


def count(tokenizer: Any, unlimited: Any, section: dict[str, Any]) -> dict[str, int]:
    """Of one data set. unlimited: the same tokenizer without a longest length, to see what the limit cuts."""
    from omegaconf import OmegaConf
    from torchtune import config  # type: ignore[import-not-found]
    from torchtune.config._utils import _get_component_from_path  # type: ignore[import-not-found]
    from torchtune.datasets import PackedDataset  # type: ignore[import-not-found]

    plain = {key: value for key, value in section.items() if key not in ("packed", "split_across_pack")}
    cut, whole = (config.instantiate(OmegaConf.create(plain), each) for each in (tokenizer, unlimited))
    limit = tokenizer.max_seq_len
    lengths, learned, truncated = [], 0, 0
    for index in range(len(cut)):
        sample = cut[index]
        lengths.append(len(sample["tokens"]))
        learned += sum(int(label != UNLEARNED) for label in sample["labels"])
        truncated += limit is not None and lengths[-1] >= limit - 1 and len(whole[index]["tokens"]) > lengths[-1]
    rows = len(lengths)
    if section.get("packed"):
        known = inspect.signature(_get_component_from_path(section["_component_"])).parameters
        splits = known["split_across_pack"].default if "split_across_pack" in known else False
        samples = [{"tokens": [0] * length, "labels": [0] * length} for length in lengths]
        splits = section.get("split_across_pack", splits)
        rows = len(PackedDataset(samples, max_seq_len=limit, split_across_pack=splits))
    longest = limit if section.get("packed") else max(lengths, default=0)
    return {
        "samples": len(lengths), "rows": rows, "tokens": sum(lengths), "learned": learned, "longest": longest,
        "truncated": truncated,
    }  # fmt: skip


def counts(run: dict[str, Any]) -> dict[str, int] | str:
    from omegaconf import OmegaConf
    from torchtune import config

    try:
        resolved: Any = OmegaConf.create(run)
        settings = resolved.tokenizer
        tokenizer = config.instantiate(settings)
        unlimited = config.instantiate(settings, **({"max_seq_len": None} if "max_seq_len" in settings else {}))
        sections: Any = OmegaConf.to_container(resolved, resolve=True)["dataset"]  # type: ignore[index, call-overload]
        parts = [count(tokenizer, unlimited, part) for part in (sections if isinstance(sections, list) else [sections])]
    except Exception as error:  # of torchtune, of its tokenizers, of datasets and of the hub client
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the data cannot be counted here: {reason}"
    return {name: (max if name == "longest" else sum)(part[name] for part in parts) for name in parts[0]}


def main() -> None:
    warnings.filterwarnings("ignore")
    answer, sys.stdout = sys.stdout, sys.stderr
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    request = json.load(sys.stdin)
    sys.path[:] = [*sys.path[1:], os.getcwd()]  # components of the user's own, found as torchtune finds them
    print(json.dumps([counts(run) for run in request["runs"]]), file=answer)


if __name__ == "__main__":
    main()
