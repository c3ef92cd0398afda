"""The tables of docs/scaling.md: what limits training on many GPUs, computed from the models' shapes.

Nothing is measured here, and nothing needs torch. The page says where each of the numbers comes from.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, log2, sqrt

SCALES = (8, 64, 512, 4096)
NODE = 8
SEQUENCE = 8192
RATE = 989e12 * 0.45
"""FLOP/s of a GPU: H100's bf16 peak times the assumed MFU."""
NVLINK, NETWORK = 450e9 * 0.8, 50e9 * 0.8
"""Bytes/s of a GPU, each way: within a node, and through its own network card."""
MEMORY = 72e9
"""Bytes of 80 GB that a step may take; the rest is fragmentation."""
RING_NVLINK, RING_NETWORK, TREE_NETWORK = 1.9e-6, 4.0e-6, 8.5e-6
"""Seconds of a hop."""
HASHING, STAGING = 1.5e9, 5e9
"""Bytes/s of a process: SHA-256 of a file, copies from GPU to host."""
SHARED_DISK, NODE_DISK = 20e9, 2e9
"""Bytes/s of the file system: all of it, and what one node gets."""
HEADER_ENTRY, HEADER_MEMORY = 31e-6, 773
"""Seconds and bytes for each tensor in a file's header."""
BATCH_ROW = 0.6e-6
"""Seconds of each process for each row of the whole batch, of which it builds its own."""
GPU_HOURS_BETWEEN_FAILURES = 54 * 24 * 16_384 / 466
READING = 1e6
"""Tokens/s that a process reads and tokenises."""


@dataclass(frozen=True)
class Model:
    """The shape of a Llama 3 model."""

    name: str
    layers: int
    hidden: int
    heads: int
    head: int
    mlp: int
    is_tied: bool
    key_value_heads: int = 8
    vocabulary: int = 128_256

    @property
    def rows_of_a_block(self) -> list[tuple[int, int]]:
        """First dimension and size of every weight of a block."""
        wide, narrow = self.heads * self.head, self.key_value_heads * self.head
        hidden, mlp = self.hidden, self.mlp
        attention = [(wide, wide * hidden), *[(narrow, narrow * hidden)] * 2, (hidden, hidden * wide)]
        return [*attention, *[(mlp, mlp * hidden)] * 2, (hidden, hidden * mlp), *[(hidden, hidden)] * 2]

    @property
    def block(self) -> int:
        return sum(size for _, size in self.rows_of_a_block)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def root(self) -> int:
        """Weights outside the blocks: embedding, last norm, head."""
        return self.embedding * (1 if self.is_tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.root

    @property
    def flops(self) -> float:
        """Of a token in a row of one document of SEQUENCE tokens, as train/metrics.py counts them."""
        matrices = self.layers * (self.block - 2 * self.hidden) + self.embedding
        return 6 * matrices + 12 * self.layers * self.heads * self.head * (SEQUENCE + 1) / 2

    def entries(self, gpus: int) -> int:
        """Tensors in the headers of all files of a checkpoint: a weight and its moments are split by rows."""
        outside = [(self.vocabulary, 0)] * (1 if self.is_tied else 2) + [(self.hidden, 0)]
        split = [ceil(rows / ceil(rows / gpus)) for rows, _ in self.rows_of_a_block * self.layers + outside]
        return 3 * sum(split)


MODELS = (
    Model("1B", 16, 2048, 32, 64, 8192, is_tied=True),
    Model("8B", 32, 4096, 32, 128, 14336, is_tied=False),
    Model("70B", 80, 8192, 64, 128, 28672, is_tied=False),
)


def compute(model: Model, tokens: int = SEQUENCE) -> float:
    """Seconds of a forward and backward pass."""
    return model.flops * tokens / RATE


def full(model: Model, gpus: int) -> tuple[float, float]:
    """Seconds that a pass' bytes and its hops take with sharding 'full'."""
    blocks = model.layers * model.block
    moved = 2 * (2 * blocks + model.root) + 4 * (blocks + model.root)
    wire = NVLINK if gpus == NODE else NODE * NETWORK
    inside, between = gpus - gpus // NODE, gpus // NODE - 1
    collectives = 3 * model.layers + 2
    return moved * (1 - 1 / gpus) / wire, collectives * (inside * RING_NVLINK + between * RING_NETWORK)


def hybrid(model: Model, gpus: int) -> float:
    """Seconds of a pass with sharding 'hybrid': the longer of NVLink's part and the network's."""
    nodes = gpus // NODE
    reduced = 2 * (1 - 1 / nodes) * 4 * model.parameters / NODE / NETWORK
    return max(sum(full(model, NODE)), reduced + (model.layers + 1) * 2 * log2(nodes) * TREE_NETWORK)


def balance(model: Model, seconds: float) -> float:
    """Tokens for each GPU and pass whose computation takes as long."""
    return seconds * RATE / model.flops


def fixed_memory(model: Model, shards: int) -> tuple[float, float]:
    """Bytes of a GPU that do not depend on the tokens: what is split, and what is whole for a while."""
    whole = 16 * model.block + 2 * model.root + 6 * model.embedding
    return 16 * model.parameters / shards, whole + 2.8e9


def longest(model: Model, shards: int, is_checkpointed: bool) -> str:
    """Tokens of a pass that fit beside that, in whole 1,024s."""
    kept = 24 * model.hidden + 10 * model.mlp
    token = model.layers * 4 * model.hidden + 1.4 * kept if is_checkpointed else model.layers * kept
    tokens = int((MEMORY - sum(fixed_memory(model, shards))) / token) // 1024 * 1024
    return f"{tokens:,}" if tokens > 0 else "none"


def writing(model: Model, gpus: int) -> float:
    """Seconds until a checkpoint is on disk and hashed."""
    size = 12 * model.parameters
    return max(size / SHARED_DISK, size / (gpus // NODE) / NODE_DISK) + size / gpus / HASHING


def table(head: str, rows: Iterable[tuple[object, ...]]) -> str:
    names = head.split(" | ")
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in [names, ["---"] * len(names), *rows]]
    return "\n".join(lines) + "\n"


def tables() -> list[str]:
    """Everything that the page shows, in its order."""
    cases = [(model, gpus) for model in MODELS for gpus in SCALES]
    failures = {gpus: GPU_HOURS_BETWEEN_FAILURES / gpus for gpus in SCALES}
    middle = MODELS[1]

    def of_models(text: str) -> str:
        return " | ".join(f"{model.name}: {text}" for model in MODELS)

    def save_interval(model: Model, gpus: int) -> float:
        standstill = 1 + 12 * model.parameters / gpus / STAGING
        return max(sqrt(2 * standstill * failures[gpus] * 3600), writing(model, gpus))

    return [
        table("model | parameters | of a block | of the root | GFLOP per token | tokens/s of a GPU | s per 8,192", [
            (m.name, f"{m.parameters / 1e9:.2f}e9", f"{m.block / 1e6:.0f}e6", f"{m.root / 1e6:.0f}e6",
             f"{m.flops / 1e9:.1f}", f"{RATE / m.flops:,.0f}", f"{compute(m):.2f}") for m in MODELS]),
        table("model | GPUs | compute, s | full: bytes, s | full: hops, s | full: balance, tokens "
              "| hybrid: all, s | hybrid: balance, tokens", [
            (m.name, f"{gpus:,}", f"{compute(m):.2f}", *(f"{part:.3f}" for part in full(m, gpus)),
             f"{balance(m, sum(full(m, gpus))):,.0f}",
             *((f"{hybrid(m, gpus):.3f}", f"{balance(m, hybrid(m, gpus)):,.0f}") if gpus > NODE else ("–", "–")))
            for m, gpus in cases]),
        table("model | split over | split, GB | whole, GB | longest pass, checkpointed | not checkpointed", [
            (m.name, f"{gpus:,}" + (" (or hybrid)" if gpus == NODE else ""),
             *(f"{part / 1e9:.1f}" for part in fixed_memory(m, gpus)), longest(m, gpus, True), longest(m, gpus, False))
            for m, gpus in cases if gpus <= 512]),
        table("model | checkpoint, GB | checked at start, s | final folder, GB | random start, GB", [
            (m.name, f"{12 * m.parameters / 1e9:,.0f}", f"{12 * m.parameters / HASHING:,.0f}",
             f"{2 * m.parameters / 1e9:.0f}", f"{4 * m.parameters / 1e9:.0f}") for m in MODELS]),
        table(f"GPUs | {of_models('GB of a host')} | {of_models('on disk, s')}", [
            (f"{gpus:,}", *(f"{12 * m.parameters * NODE / gpus / 1e9:.1f}" for m in MODELS),
             *(f"{writing(m, gpus):.0f}" for m in MODELS)) for gpus in SCALES]),
        table("GPUs | sockets of a process | of a node | GB out of the store | headers opened by all "
              "| 8B: entries that each reads | s | GB of a node", [
            (f"{gpus:,}", f"{3 * (gpus - 1):,}", f"{3 * (gpus - 1) * NODE:,}",
             f"{3 * gpus**2 * (8 * gpus + 60) / 1e9:,.2f}", f"{gpus**2:,}", f"{middle.entries(gpus):,}",
             f"{middle.entries(gpus) * HEADER_ENTRY:.1f}", f"{middle.entries(gpus) * HEADER_MEMORY * NODE / 1e9:.1f}")
            for gpus in SCALES]),
        table(f"GPUs | {of_models('10⁶ tokens/s')} | batch, ms | {of_models('of a pass')}", [
            (f"{gpus:,}", *(f"{gpus * RATE / m.flops / READING:.2f}" for m in MODELS), f"{gpus * BATCH_ROW * 1e3:.1f}",
             *(f"{gpus * BATCH_ROW / compute(m):.1%}" for m in MODELS)) for gpus in SCALES]),
        table(f"GPUs | hours between failures | {of_models('minutes')} | {of_models('`save_every`')}", [
            (f"{gpus:,}", f"{failures[gpus]:,.0f}", *(f"{save_interval(m, gpus) / 60:.0f}" for m in MODELS),
             *(f"{float(f'{save_interval(m, gpus) / compute(m):.2g}'):,.0f}" for m in MODELS)) for gpus in SCALES]),
    ]  # fmt: skip


if __name__ == "__main__":
    print("\n".join(tables()))
