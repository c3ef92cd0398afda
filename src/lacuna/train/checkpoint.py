"""Checkpoints: whole or absent, safetensors and JSON only, written beside the training.

A checkpoint is written into a hidden folder; last comes manifest.json with the size and SHA-256 of every file; then
the folder gets its name. Whoever finds a named folder whose files match its manifest has all of it.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from lacuna.errors import RunError
from lacuna.files import write_json, write_whole
from lacuna.runs.final import sync
from lacuna.runs.identity import Identity
from lacuna.runs.metrics import Mark
from lacuna.train.kept import Regular, checkpoint_name, entry, manifest_text, superfluous

warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class TrainingState:
    """What resumes besides tensors."""

    step: int
    position: dict[str, Any]
    """Where the next batch starts (lacuna.data.loader)."""
    tokens: int
    validation_loss: float | None
    precision: str
    data: str
    """Fingerprint of the packed data, or of the files that are streamed."""
    config: dict[str, Any]
    identity: Identity = field(default_factory=dict)
    """Of what else the run is made; nothing in checkpoints of a version before it was kept."""
    metrics: Mark | None = None
    """How metrics.jsonl began; None in checkpoints of a version before that was kept."""


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that resumes as tensors, by name: weights (shared ones once) and AdamW's moments."""
    moments = {f"optimizer.{name}": value for name, value in _moments_of(model, optimizer).items()}
    return {**weights_of(model), **moments}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Those that are trained; beside frozen ones, of an adapter's base, no buffer ever changes."""
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    tensors = {f"model.{name}": tensor.detach() for name, tensor in trained.items()}
    if not all(tensor.requires_grad for tensor in model.parameters()):
        return tensors
    stored = model.state_dict().keys()
    return tensors | {f"model.{name}": tensor for name, tensor in model.named_buffers() if name in stored}


def _moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer keeps of each weight. torch's own functions do not know bitsandbytes' optimizers, which lose
    their count of steps there."""
    if isinstance(optimizer, torch.optim.AdamW):
        moments: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=FLAT)
        return {name: value for name, value in moments.items() if isinstance(value, Tensor)}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    kept = ((names[p], key, value) for p, state in optimizer.state.items() for key, value in state.items())
    return {f"{name}/{key}": torch.as_tensor(value).clone() for name, key, value in kept}


def _restore_foreign(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what _moments_of an optimizer that is not torch's has kept."""
    stored = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    entries: dict[str, Any] = {name: entry for name, entry in stored.items() if name.startswith("optimizer.")}
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    load_tensors(checkpoint, tensors)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        weight, _, key = name.removeprefix("optimizer.").rpartition("/")
        is_count = tensor.ndim == 0
        optimizer.state[parameters[weight]][key] = tensor.item() if is_count else tensor.to(parameters[weight].device)


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Load weights and moments in place, whatever number of processes wrote them."""
    tensors = tensors_of(model, optimizer)
    load_tensors(checkpoint, tensors)
    if isinstance(optimizer, torch.optim.AdamW):
        moments: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=FLAT)
        loaded: dict[str, Any] = {
            name.removeprefix("optimizer."): value for name, value in tensors.items() if name.startswith("optimizer.")
        }
        set_optimizer_state_dict(model, optimizer, {**moments, **loaded}, options=FLAT)
    else:
        _restore_foreign(checkpoint, model, optimizer)
    return read_state(checkpoint)


def restore_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load the weights alone."""
    load_tensors(checkpoint, weights_of(model))


PLAIN = (torch.float32, torch.bfloat16, torch.float16)
"""How weights are stored that are nothing but themselves: in fewer bits, they lack their scales."""


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the plain tensors in a folder of safetensors."""
    stored: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in stored.items() if entry.properties.dtype in PLAIN}


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors from a folder of safetensors; of those that are split among processes, each reads its part."""
    is_split = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not is_split)


def read_state(checkpoint: Path) -> TrainingState:
    return TrainingState(**json.loads((checkpoint / "state.json").read_text()))


def gather(value: Any, group: Any) -> list[Any]:
    """Every process' value, by rank; without a group, the one of this process."""
    if group is None:
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread and keeps the best and the newest.

    Of many processes each writes its part; group: where they meet, which nothing else may use meanwhile.
    """

    def __init__(self, folder: Path, keep_last: int, keep_best: int, regular: Regular, group: Any = None) -> None:
        self.folder = folder
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.regular = regular
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*.partial"):
                shutil.rmtree(leftover)
            self._drop_superfluous()

    def save(self, tensors: dict[str, Tensor], state: TrainingState) -> None:
        """Copy the tensors and return; the rest happens beside the training. Waits for the save before it."""
        self.wait()
        name = checkpoint_name(state.step)
        partial, final = self.folder / f".{name}.partial", self.folder / name
        is_there, problem = self._from_first(lambda: _begin(partial, final))
        if problem is not None:
            raise problem
        if is_there:
            return
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        written = async_save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        assert isinstance(written, Future)
        self._pending = self._thread.submit(self._finish, written, partial, final, state)

    def _finish(self, written: "Future[Any]", partial: Path, final: Path, state: TrainingState) -> None:
        files, problem = {}, None
        try:
            written.result()
            files = _hashes(partial, self.rank)
        except (OSError, CheckpointException) as error:
            problem = _cannot_write(final.name, error)
        found = gather((files, problem), self.group)
        problem = next((theirs for _, theirs in found if theirs is not None), None)
        if problem is None:
            manifest = {name: entry for theirs, _ in found for name, entry in theirs.items()}
            _, problem = self._from_first(lambda: self._complete(partial, final, state, manifest))
        if problem is not None:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise problem

    def _complete(
        self, partial: Path, final: Path, state: TrainingState, manifest: dict[str, Any]
    ) -> tuple[bool, RunError | None]:
        try:
            write_json(partial / "state.json", asdict(state))
            manifest["state.json"] = entry(partial / "state.json")
            write_whole(partial / "manifest.json", manifest_text(dict(sorted(manifest.items()))))
            partial.rename(final)
            sync(self.folder)
            self._drop_superfluous()
        except OSError as error:
            return False, _cannot_write(final.name, error)
        return True, None

    def _drop_superfluous(self) -> None:
        """Also what a kill between a save and this has left over."""
        for name in superfluous(self.folder, self.keep_last, self.keep_best, self.regular):
            doomed = (self.folder / name).rename(self.folder / f".{name}.partial")
            shutil.rmtree(doomed)

    def _from_first(self, work: Callable[[], Any]) -> Any:
        """What the first process makes of it, in all."""
        return gather(work() if self.rank == 0 else None, self.group)[0]

    def wait(self) -> None:
        """Return when nothing is being written. Raises RunError where writing failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _begin(partial: Path, final: Path) -> tuple[bool, RunError | None]:
    """Whether the checkpoint is there already; otherwise its folder is made."""
    try:
        if not final.exists():
            partial.mkdir()
    except OSError as error:
        return False, _cannot_write(final.name, error)
    return final.exists(), None


def _hashes(folder: Path, rank: int) -> dict[str, Any]:
    """Size and SHA-256 of the files that this process wrote."""
    return {path.name: entry(path) for path in folder.glob(f"shard-{rank + 1:05d}-*")}


def _cannot_write(name: str, error: BaseException) -> RunError:
    causes = list(error.failures.values()) if isinstance(error, CheckpointException) else [error]
    cause = causes[0][0] if isinstance(causes[0], tuple) else causes[0]
    return RunError(
        f"checkpoint {name} could not be written: {cause}; the checkpoints before it are whole: make room on the "
        "disk, then run the same command to go on from the newest",
        is_shared=True,
    )
