"""Data sets by their names on the Hugging Face hub, and what to do where the hub does not answer."""

import http.client
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from lacuna.config.training import TrainingConfig
from lacuna.data.find import find_files
from lacuna.data.formats import Broken, Row, of_arrow
from lacuna.errors import DataError, MissingExtraError
from lacuna.visible import shown_url, visible, without_passwords
from lacuna.words import did_you_mean

RowsWithState = Iterator[tuple[Row | Broken, Callable[[], Any]]]
PROBE_SECONDS = 5
ENDPOINT = "https://huggingface.co"


def stay_offline_if_unreachable(config: TrainingConfig) -> None:
    """As stay_offline, for the model and the data of a config."""
    if not os.environ.get("HF_HUB_OFFLINE"):
        stay_offline(_names_on_the_hub(config))


def stay_offline(names: Sequence[str]) -> None:
    """Where names are on the hub and it does not answer, let the client libraries use only what they downloaded before,
    and say so.

    Left alone they retry for minutes. They read HF_HUB_OFFLINE when they are imported: call this first.
    """
    if os.environ.get("HF_HUB_OFFLINE") or not names:
        return
    if reason := unreachable():
        endpoint = shown_url(os.environ.get("HF_ENDPOINT") or ENDPOINT)
        os.environ["HF_HUB_OFFLINE"] = "1"
        said = without_passwords(f"the hub {endpoint} cannot be reached ({reason})")
        click.echo(visible(f"warning: {said}: using what is downloaded"), err=True)


def unreachable() -> str | None:
    """Why the hub does not answer; None where it does, even if it refuses."""
    endpoint = os.environ.get("HF_ENDPOINT") or ENDPOINT
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS).close()
    except (urllib.error.HTTPError, http.client.HTTPException):
        return None
    except OSError as error:
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLError) else str(reason)
    return None


def _names_on_the_hub(config: TrainingConfig) -> list[str]:
    names = models_on_the_hub(config.model_name)
    for dataset in filter(None, (config.dataset, config.validation_dataset)):
        try:
            names += [dataset] if find_files(dataset) is None else []
        except DataError:
            continue
    return names


def models_on_the_hub(name: str) -> list[str]:
    """The name, where it is none of a folder."""
    is_name = re.fullmatch(r"[\w\-][\w.\-]*(/[\w.\-]+)?", name)
    return [name] if is_name and not Path(name).is_dir() else []


def hub_beginning(config: TrainingConfig, name: str, state: Any) -> Any:
    """The state before the first row, in the commit of another state, or in the newest one."""
    if state is not None:
        return {**state, "number": 0, "hub": None}
    builder = _builder(config.dataset_subset, name, None)
    return {"number": 0, "hub": None, "commit": builder.hash, "format": builder.name}


def hub_commit(subset: str | None, name: str) -> str:
    """The commit that a hub data set is read at. Raises DataError."""
    return str(_builder(subset, name, None).hash)


def hub_rows(subset: str | None, name: str, split: str, state: Any, streaming: bool) -> RowsWithState:
    """Rows of a hub data set, each with a function that gives the state after it.

    state: go on after it, in the same commit of the data set. Raises DataError.
    """
    builder = _builder(subset, name, state["commit"] if state else None)
    _check_split(builder, name, split)
    if state is not None and (builder.hash, builder.name) != (state["commit"], state["format"]):
        raise DataError(
            f"{name}: the run read commit {state['commit']} as {state['format']}, but only {builder.hash} as "
            f"{builder.name} is there; go on where the hub can be reached"
        )
    number = state["number"] if state else 0
    try:
        if streaming:
            data = builder.as_streaming_dataset(split)
        else:
            builder.download_and_prepare()
            data = builder.as_dataset(split)
        if state is not None and state["hub"] is not None:
            data.load_state_dict(state["hub"])
        for values in data:
            number += 1
            yield Row(of_arrow(values), f"{name} ({split}): row {number}"), partial(_state, builder, data, number)
    except Exception as error:
        raise DataError(f"{name} ({split}): reading broke off after row {number}: {_said(error)}") from error


def _state(builder: Any, data: Any, number: int) -> Any:
    return {"hub": data.state_dict(), "number": number, "commit": builder.hash, "format": builder.name}


def _builder(subset: str | None, name: str, commit: str | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("train", "datasets") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return datasets.load_dataset_builder(name, subset, revision=commit)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(f"{name}: no such file or folder, and not on the hub either: {_said(error)}") from error
    except Exception as error:
        raise DataError(f"{name}: cannot be loaded from the hub: {_said(error)}") from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_split(builder: Any, name: str, split: str) -> None:
    """Before anything is downloaded. A split may be a sum of splits and of slices of them."""
    known = [str(known) for known in builder.config.data_files or builder.info.splits or ()]
    for part in split.split("+"):
        wanted = part.partition("[")[0].strip()
        if known and wanted not in (*known, "all"):
            raise DataError(f"{name}: no split {wanted!r}; there are: {', '.join(known)}{did_you_mean(wanted, known)}")
