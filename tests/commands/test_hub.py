"""Models and data sets by their hub names, with the real client libraries, from a hub on this machine."""

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import SCRIPTS, Process, flags
from forked import Server
from hub_contents import CHATS, MODEL, TEXTS, write_chats, write_fineweb, write_qwen
from hub_server import Hub, serve
from lacuna.runs.folder import starts_of
from lacuna.runs.metrics import read_metrics

CLOSED = "http://127.0.0.1:9"
SMALL = {
    "batch_size": 4, "micro_batch_size": 2, "sequence_length": 64, "learning_rate": 1e-2, "log_every": 1,
    "device": "cpu", "model_name": MODEL,
}  # fmt: skip
STREAMED = {**SMALL, "dataset": TEXTS, "dataset_subset": "sample-10BT", "streaming": "true", "streaming_window": 8}
TINY_STREAM = {**STREAMED, "dataset_subset": "sample-tiny"}
CHAT = {
    **SMALL, "dataset": CHATS, "dataset_split": "train_sft", "validation_dataset": CHATS,
    "validation_split": "test_sft", "sequence_length": 96, "epochs": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    write_qwen(root / "models" / MODEL / "main", seed=0)
    write_qwen(root / "models" / MODEL / "v1", seed=1)
    write_fineweb(root / "datasets" / TEXTS / "main", seed=0)
    write_chats(root / "datasets" / CHATS / "main")
    with serve(root) as running:
        yield running


@dataclass
class Machine:
    """Servers of commands, for the hub and for one that is out of reach, and what both have downloaded."""

    open: Server
    closed: Server
    cache: Path


@pytest.fixture(scope="module")
def machine(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    cache = tmp_path_factory.mktemp("downloads") / "cache"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["HF_HOME"] = str(cache)
    known = Server({**environment, "HF_ENDPOINT": hub.endpoint}, "lacuna.train.start", "datasets")
    unknown = Server({**environment, "HF_ENDPOINT": CLOSED}, "torch.distributed.fsdp")  # the client must not be loaded
    yield Machine(known, unknown, cache)
    known.close()
    unknown.close()


@dataclass
class Workplace:
    """A folder on a machine that knows the hub, or cannot reach it."""

    folder: Path
    server: Server

    def start(self, command: str, *arguments: object, **settings: object) -> Process:
        words = [str(SCRIPTS / command), *map(str, arguments), *flags(**settings)]
        return Process(*words, forked=True, server=self.server, folder=self.folder, environment=self.server.environment)

    def run(self, command: str, *arguments: object, **settings: object) -> tuple[int, str]:
        process = self.start(command, *arguments, **settings)
        output = process.wait()
        assert process.popen.returncode is not None
        return process.popen.returncode, output

    def losses(self, run: str) -> list[float]:
        return [line["loss"] for line in read_metrics(self.folder / run) if "loss" in line]


@pytest.fixture
def workplace(machine: Machine, tmp_path: Path) -> Workplace:
    """Nothing has been downloaded yet."""
    shutil.rmtree(machine.cache, ignore_errors=True)
    return Workplace(tmp_path, machine.open)


def test_the_first_command_of_the_readme(workplace: Workplace) -> None:
    shutil.copytree(Path(__file__).parents[2] / "configs", workplace.folder / "configs")
    command = "pretrain @ configs/pretrain_qwen.toml --model-name Qwen/Qwen2.5-0.5B --batch-size 4 --steps 100"
    code, output = workplace.run(*command.split())
    assert code == 0, output
    assert re.search(r"step 100/100 .* [\d,]+ tok/s", output)
    losses = workplace.losses("runs/pretrain_qwen")
    assert losses[-1] < losses[0] - 0.3
    run = workplace.folder / "runs" / "pretrain_qwen"
    assert len(list(run.glob("checkpoints/step-*100"))) == 1
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    model.generate(**tokenizer("the river", return_tensors="pt"), max_new_tokens=2)


def test_a_stream_goes_on_after_it_was_stopped_and_killed_although_the_data_set_has_a_new_commit(
    hub: Hub, workplace: Workplace
) -> None:
    settings = {**TINY_STREAM, "steps": 150, "save_every": 10}
    code, output = workplace.run("pretrain", **settings, output_dir="straight")
    assert code == 0, output
    assert read_metrics(workplace.folder / "straight")[-1]["epoch"] > 0
    interrupt(workplace, "stopped", settings, signal.SIGTERM, after_step=20)
    repository = hub.root / "datasets" / TEXTS
    (repository / "main").rename(repository / "before")
    try:
        write_fineweb(repository / "main", seed=5)
        interrupt(workplace, "stopped", settings, signal.SIGKILL, after_step=70)
        code, output = workplace.run("pretrain", **settings, output_dir="stopped")
    finally:
        shutil.rmtree(repository / "main")
        (repository / "before").rename(repository / "main")
    assert code == 0, output
    assert "resuming from" in output
    straight, stopped = (
        load_file(workplace.folder / run / "final/model.safetensors") for run in ("straight", "stopped")
    )
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    assert workplace.losses("straight") == workplace.losses("stopped")


def interrupt(workplace: Workplace, run: str, settings: dict[str, object], number: int, after_step: int) -> None:
    process = workplace.start("pretrain", **settings, output_dir=run)
    process.wait_until(lambda: any(line["step"] >= after_step for line in read_metrics(workplace.folder / run)))
    output = process.stop(number)
    assert process.popen.returncode == (128 + number if number == signal.SIGTERM else -number), output


def test_a_stop_is_obeyed_while_the_hub_does_not_answer(hub: Hub, workplace: Workplace) -> None:
    process = workplace.start("pretrain", **TINY_STREAM, steps=5000, save_every=5000, output_dir="out")
    run = workplace.folder / "out"
    process.wait_until(lambda: read_metrics(run))
    hub.answering.clear()
    try:
        before = 0
        while (seen := read_metrics(run)[-1]["step"]) > before:
            before = seen
            time.sleep(2)
        output = process.stop(signal.SIGTERM, seconds=30)
    finally:
        hub.answering.set()
    assert process.popen.returncode == 128 + signal.SIGTERM, output
    assert f"stopped after step {seen}, which is saved" in output
    assert [path.name for path in run.glob("checkpoints/step-*")] == [f"step-{seen:08}"]


def test_sft_on_named_splits_and_again_without_network(machine: Machine, workplace: Workplace) -> None:
    code, output = workplace.run("sft", **CHAT, output_dir="online")
    assert code == 0, output
    assert f"{CHATS}: 40 documents" in output
    assert f"{CHATS}: 10 documents" in output
    before, *_, after = [
        line["validation_loss"] for line in read_metrics(workplace.folder / "online") if "validation_loss" in line
    ]
    assert after < before
    started = time.perf_counter()
    code, output = Workplace(workplace.folder, machine.closed).run("sft", **CHAT, output_dir="offline")
    assert code == 0, output
    assert time.perf_counter() - started < 60
    assert f"warning: the hub {CLOSED} cannot be reached" in output
    assert workplace.losses("offline") == workplace.losses("online")
    (online,), (offline,) = (starts_of(workplace.folder / run) for run in ("online", "offline"))
    commits = [entry["commit"] for entry in online["data_files"]]
    assert [len(commit) for commit in commits] == [40, 40]
    for name in ("data_files", "model_commit", "weights_fingerprint", "tokenizer_sha256"):
        assert offline[name] == online[name] is not None


def test_model_revision_picks_the_weights(hub: Hub, workplace: Workplace) -> None:
    settings = {**CHAT, "steps": 1, "output_dir": "main"}
    del settings["epochs"]
    folder = hub.root / "models" / MODEL / "v1"
    for changes in ({}, {"model_revision": "v1", "output_dir": "v1"}, {"model_name": folder, "output_dir": "folder"}):
        code, output = workplace.run("sft", **{**settings, **changes})
        assert code == 0, output
    assert workplace.losses("v1") == workplace.losses("folder") != workplace.losses("main")
    main, v1, own = (starts_of(workplace.folder / run)[0] for run in ("main", "v1", "folder"))
    assert len(main["model_commit"]) == len(v1["model_commit"]) == 40
    assert (main["model_commit"] != v1["model_commit"], own["model_commit"]) == (True, None)
    assert v1["weights_fingerprint"] == own["weights_fingerprint"] != main["weights_fingerprint"]


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        (
            {"model_name": "Qwen/Qwen2.5-0.6B", "dataset": "someone/nothing"},
            [
                "model_name Qwen/Qwen2.5-0.6B: no such folder or hub model; a private one needs `hf auth login`",
                "someone/nothing: no such file or folder, and not on the hub either",
            ],
        ),
        (
            {"model_revision": "v2", "dataset_split": "train_sft"},
            [
                f"model_revision v2: no such commit, tag or branch of {MODEL}",
                f"{TEXTS}: no split 'train_sft'; there are: train",
            ],
        ),
        ({"dataset_subset": "sample-10B"}, [f"{TEXTS}: cannot be loaded from the hub: BuilderConfig 'sample-10B' not"]),
        ({"text_column": "texts"}, [f"{TEXTS}: the columns are text, id; needed are text: texts"]),
    ],
)
def test_what_the_hub_does_not_have(workplace: Workplace, changes: dict[str, str], problems: list[str]) -> None:
    assert_refused(*workplace.run("pretrain", **{**STREAMED, "steps": 2, "output_dir": "out", **changes}), problems)


def test_unknown_split_in_memory_is_refused_before_the_download(hub: Hub, workplace: Workplace) -> None:
    seen = len(hub.requests)
    outcome = workplace.run("sft", **{**CHAT, "dataset_split": "train"}, output_dir="out")
    assert_refused(*outcome, [f"{CHATS}: no split 'train'; there are: train_sft, test_sft"])
    assert not [request for request in hub.requests[seen:] if "jsonl" in request]


def test_without_network_a_name_is_refused_within_seconds(machine: Machine, workplace: Workplace) -> None:
    started = time.perf_counter()
    outcome = Workplace(workplace.folder, machine.closed).run("pretrain", **STREAMED, steps=2, output_dir="out")
    assert time.perf_counter() - started < 60
    problems = [
        f"model_name {MODEL}: no such folder, not downloaded before, and the hub is out of reach",
        f"{TEXTS}: cannot be loaded from the hub: Couldn't reach",
    ]
    assert_refused(*outcome, problems)


def assert_refused(code: int, output: str, problems: list[str]) -> None:
    errors = [line.removeprefix("error: ") for line in output.splitlines() if not line.startswith("warning: ")]
    assert code == 2, output
    assert len(errors) == len(problems), output
    assert all(error.startswith(problem) for error, problem in zip(errors, problems, strict=True)), output
