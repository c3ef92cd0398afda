"""Many processes: how they agree, what each of them computes, and how the model is split among them.

Around a transformer block, from the inside: compilation, activation checkpointing, sharding. The weights of a block
are gathered before it runs, freed after it, and gathered again for its backward pass, while the next one's are on
their way; gradients are summed in fp32 as soon as a block has them.
"""

import os
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lacuna.config.training import TrainingConfig
from lacuna.data.loader import PackedRow, PackedRows, Place
from lacuna.data.samples import Sample
from lacuna.errors import ConfigError, LacunaError, RunError
from lacuna.train.checkpoint import gather, weights_of
from lacuna.train.model import Execution, LossModel, transformer_blocks

Result = TypeVar("Result")
SOCKETS = 4
"""To each other process, at most: a group's, of three groups, and the store's."""
PATIENCE = timedelta(days=7)
"""For what the processes agree on between steps, where one may have to read all data; torchrun ends who waits for the
dead."""

STALE_ADDRESSES = (
    "torchrun has started the processes again, but tells them the addresses of those that died: set "
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, as scripts/launch.sh does"
)


@dataclass(frozen=True)
class World:
    """The processes that train together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    groups: tuple[Any, ...] = (None, None)
    """Process groups on the hosts: for agreements, and for the thread that writes checkpoints."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Result) -> list[Result]:
        """The values of all processes, by rank."""
        return gather(value, self.groups[0])

    def agreed(self, work: Callable[[], Result]) -> Result:
        """Do it in every process. Where some raise a LacunaError, all raise the problems of all."""
        if self.size == 1:
            return work()
        result, problems = None, []
        try:
            result = work()
        except LacunaError as error:
            problems = error.problems
        found = dict.fromkeys(problem for theirs in self.gather(problems) for problem in theirs)
        if found:
            raise ConfigError(list(found), is_shared=True)
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], Result]) -> Result:
        """Do it in the first process; all have its result, or raise its error."""
        return self.gather(self.agreed(lambda: work() if self.is_first else None))[0]  # type: ignore[return-value]

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def greatest(self, value: int, device: torch.device | str) -> int:
        """The largest of all processes' values."""
        if self.size == 1:
            return value
        found = torch.tensor(value, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def share(self, places: Sequence[Place]) -> list[PackedRow]:
        """This process' rows of a batch; all get as many, because all gather the same weights at the same time."""
        mine = [packed.row(index) for packed, index in places[self.rank :: self.size]]
        most = -(-len(places) // self.size)
        packed, index = places[0]
        idle = [Sample(packed.row(index)[0].tokens[:2], np.zeros(2, dtype=np.bool_))]
        return mine + [idle] * (most - len(mine))


@contextmanager
def join() -> Iterator[World]:
    """The processes that torchrun started, or this one alone. gloo connects those that talk to each other, not all.

    Raises RunError where torchrun started them again in a way that cannot work.
    # ref: https://github.com/pytorch/pytorch/issues/135712
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World()
        return
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise RunError(STALE_ADDRESSES)
    local_rank = int(os.environ["LOCAL_RANK"])
    on_cuda = torch.cuda.is_available() and local_rank < torch.cuda.device_count()
    if on_cuda:
        torch.cuda.set_device(local_rank)
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, min(1024 + SOCKETS * size, most)), most))
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    groups = tuple(dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
    try:
        yield World(dist.get_rank(), size, local_rank, int(os.environ["LOCAL_WORLD_SIZE"]), groups)
    finally:
        dist.destroy_process_group()


def check_world(config: TrainingConfig, world: World, device: str) -> None:
    """Raise ConfigError where the processes are not those that the config asks for."""
    problems = []
    if config.gpus not in (1, world.local_size):
        problems.append(f"gpus = {config.gpus}, but {world.local_size} processes were started here: make them agree")
    if world.size > 1 and device == "mps":
        problems.append(
            f"device 'mps': there is one GPU, for one process: say {config.flag('gpus')} 1, or --device cpu"
        )
    if device == "cuda" and world.local_size > torch.cuda.device_count():
        problems.append(f"{world.local_size} processes were started, but there are {torch.cuda.device_count()} GPUs")
    if (rows := config.rows_in_step(world.size)) < world.size:
        batch = f"{config.spelled('batch_size')} {rows}"
        problems.append(f"{batch} leaves some of {world.size} processes without a row: raise it")
    if config.sharding == "hybrid" and world.size == world.local_size:
        problems.append("sharding 'hybrid' repeats a node's shards on other nodes, and there are none: say 'full'")
    if problems:
        raise ConfigError(problems)


def load_once(world: World, load: Callable[[], tuple[PackedRows, PackedRows | None]]) -> Any:
    """What load() gives, made by one process of each node, and mapped by all of them."""
    if world.local_size == 1:
        return world.agreed(load)
    leads = world.local_rank == 0
    with tempfile.TemporaryDirectory(prefix="lacuna-") as own:
        rows: Any = world.agreed(load if leads else lambda: None)
        world.agreed(lambda: _write_rows(Path(own), rows or ()))
        there = world.gather((own, [part is not None for part in rows or ()]))
        folder, parts = there[world.rank - world.local_rank]
        rows = tuple(_mapped(Path(folder), index) if exists else None for index, exists in enumerate(parts))
        world.gather(None)
    return rows


def _write_rows(folder: Path, rows: Sequence[PackedRows | None]) -> None:
    try:
        for index, part in enumerate(rows):
            for field in fields(PackedRows) if part is not None else ():
                np.save(folder / f"{index}-{field.name}.npy", getattr(part, field.name))
    except OSError as error:
        raise RunError(
            f"{folder}: the data cannot be written there for the other processes: {error.strerror}; set TMPDIR to a "
            "folder with room"
        ) from error


def _mapped(folder: Path, index: int) -> PackedRows:
    arrays = {field.name: np.load(folder / f"{index}-{field.name}.npy", mmap_mode="r") for field in fields(PackedRows)}
    return PackedRows(**arrays)


def shard(model: LossModel, config: TrainingConfig, world: World, execution: Execution) -> None:
    """Split weights, gradients and optimizer among the processes, block by block.

    In bf16, weights travel in bf16 and are summed in fp32; what autocast keeps in fp32 beside the matrix products,
    the residual stream among it, stays so, so that a run is the same on any number of devices.
    # ref: Zhao et al. 2023, PyTorch FSDP, arXiv 2304.11277
    """
    nodes = world.size // world.local_size
    if config.sharding == "hybrid":
        mesh = init_device_mesh(
            execution.device.type, (nodes, world.local_size), mesh_dim_names=("repeated", "sharded")
        )
    else:
        mesh = init_device_mesh(execution.device.type, (world.size,), mesh_dim_names=("sharded",))
    in_bf16 = execution.dtype == torch.bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if in_bf16 else None,
        reduce_dtype=torch.float32 if in_bf16 else None,
        cast_forward_inputs=False,
    )
    blocks = transformer_blocks(model.causal_lm)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "prove")
    sharded = [block for block in blocks if isinstance(block, FSDPModule)]
    for block, after in pairwise(sharded):
        block.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([block])
    model.causal_lm.get_input_embeddings().register_forward_hook(_to_fp32)


def _to_fp32(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.float()


def sum_over_nodes(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass adds up the gradients of all nodes: with hybrid sharding the last of a step is
    enough, as a node keeps its own sums split."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(wanted)


def free_gathered(model: nn.Module) -> None:
    """After a forward pass without a backward pass the root's weights are still there whole: split them again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is split among processes, put together in all of them; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_weights(causal_lm: PreTrainedModel, world: World) -> dict[str, Tensor]:
    """The weights put together one by one in the first process, on its host; nothing in the others."""
    weights = {}
    for name, tensor in weights_of(causal_lm).items():
        full = whole(tensor)
        if world.is_first:
            weights[name.removeprefix("model.")] = full.cpu()
    return weights
