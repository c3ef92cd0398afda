"""Runs on several processes, through the real command, under torchrun's engine and gloo; more in long/."""

import hashlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import Run, spawn
from fixtures import make_model, write_chat, write_texts
from lacuna.config.training import SFTConfig
from lacuna.data.loader import batches, pack_samples
from lacuna.data.samples import Sample
from lacuna.errors import ConfigError
from lacuna.runs.folder import read_status, starts_of, write_status
from lacuna.train.distributed import World, check_world
from several_processes import (
    SFT,
    assert_close,
    assert_same_bits,
    finished,
    losses,
    reached,
    torchrun,
    workers,
    write_settings,
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_settings(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def one(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in a single process."""
    return finished("sft", tmp_path_factory.mktemp("one") / "run", settings)


@pytest.fixture(scope="module")
def two(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in two."""
    return finished("sft", tmp_path_factory.mktemp("two") / "run", settings, gpus=2)


def test_two_processes_and_accumulation_equal_one(
    one: Path, two: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    assert_close(two, one)
    assert_close(finished("sft", tmp_path / "run", settings, micro_batch_size=1, gpus=2), one)
    assert starts_of(two)[-1]["devices"] == 2
    assert sorted(path.name for path in (two / "final").iterdir()) == sorted(
        path.name for path in (one / "final").iterdir()
    )
    assert json.loads((two / "final/config.json").read_text()) == json.loads((one / "final/config.json").read_text())


def test_the_number_of_processes_may_change_in_the_middle(one: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """1 → 3 → 2 processes, stopped after any step."""
    folder = tmp_path / "run"
    for gpus, until in ((1, 5), (3, 15), (2, None)):
        process = spawn("sft", output_dir=folder, **{**settings, "gpus": gpus})
        if until is None:
            assert "resuming from" in process.wait()
            assert process.popen.returncode == 0
        else:
            process.wait_until(reached(folder, until))
            output = process.stop(signal.SIGUSR1)
            assert process.popen.returncode == 128 + signal.SIGUSR1, output
            assert output.count("which is saved; go on with: ") == 1
            assert until <= read_status(folder)["step"] < settings["steps"]  # type: ignore[index]
    assert [start["devices"] for start in json.loads((folder / "provenance.json").read_text())["starts"]] == [1, 3, 2]
    assert_close(folder, one)


@given(
    rows=st.integers(1, 40), batch=st.integers(1, 12), seed=st.integers(0, 5), epochs=st.integers(1, 3),
    sizes=st.lists(st.sampled_from([1, 2, 3, 4, 7]), min_size=1, max_size=5), changes=st.integers(1, 4),
)  # fmt: skip
def test_all_processes_together_read_each_row_once_in_the_same_order(
    rows: int, batch: int, seed: int, epochs: int, sizes: list[int], changes: int
) -> None:
    """Whatever the number of processes, and however often it changes at a saved position."""
    packed = pack_samples(
        [Sample(np.full(3, i, dtype=np.int32), np.ones(3, dtype=np.bool_)) for i in range(rows)], 3, True
    )

    def digest(row: list[Sample]) -> str:
        return hashlib.sha256(b"".join(sample.tokens.tobytes() for sample in row)).hexdigest()

    alone = [[digest(row) for row in step.rows] for step in batches(packed, batch, seed, None, epochs * rows)]
    together: list[list[str]] = []
    position = None
    while len(together) < len(alone):
        size = sizes[len(together) // changes % len(sizes)]
        steps = [batches(packed, batch, seed, position, epochs * rows) for _ in range(size)]
        for _ in range(min(changes, len(alone) - len(together))):
            global_batches = [next(step) for step in steps]
            shares = [World(rank, size).share(found.places) for rank, found in enumerate(global_batches)]
            assert len({len(share) for share in shares}) == 1
            learned = [[digest(row) for row in share if row[0].supervised.any()] for share in shares]
            assert sum(len(share) - len(real) for share, real in zip(shares, learned, strict=True)) < size
            interleaved = [share[i] for i in range(len(learned[0])) for share in learned if i < len(share)]
            together.append(interleaved)
            position = global_batches[0].position
    assert together == alone


def test_a_signal_saves_and_the_same_command_goes_on(two: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = spawn("sft", output_dir=folder, **{**settings, "gpus": 2})
    process.wait_until(reached(folder, 13))
    output = process.stop(signal.SIGTERM)
    assert process.popen.returncode == 128 + signal.SIGTERM, output
    status = read_status(folder)
    assert status is not None
    assert status["state"] == "interrupted"
    assert (folder / f"checkpoints/step-{status['step']:08d}/manifest.json").is_file()
    assert "Traceback" not in output
    assert_same_bits(finished("sft", folder, settings, gpus=2), two)


def test_a_signal_while_loading_ends_at_once(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = spawn("sft", output_dir=folder, **{**settings, "gpus": 2})
    process.wait_until(lambda: read_status(folder) is not None)
    output = process.stop(signal.SIGINT)
    assert process.popen.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    assert read_status(folder)["state"] == "interrupted"  # type: ignore[index]


def test_a_killed_process_costs_no_more_than_the_steps_since_the_checkpoint(
    two: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = spawn("sft", output_dir=folder, **{**settings, "gpus": 2, "max_restarts": 1})
    process.wait_until(reached(folder, 25))
    workers(process.popen.pid)[1].send_signal(signal.SIGKILL)
    output = process.wait()
    assert process.popen.returncode == 0, output
    assert "process 1 was killed by SIGKILL" in output
    assert "restart 1 of 1" in output
    assert "Traceback" not in output
    assert_same_bits(folder, two)


def test_the_death_of_a_process_takes_the_others_down_and_is_told(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = spawn("sft", output_dir=folder, **{**settings, "gpus": 2, "max_restarts": 0})
    process.wait_until(lambda: read_status(folder) is not None)
    workers(process.popen.pid)[1].send_signal(signal.SIGKILL)
    started = time.monotonic()
    output = process.wait()
    assert time.monotonic() - started < 20
    assert process.popen.returncode == 128 + signal.SIGKILL
    assert output.count("error: process 1 was killed by SIGKILL (the system does that when memory runs out)") == 1
    assert "Traceback" not in output
    assert read_status(folder)["reason"].startswith("process 1 was killed")  # type: ignore[index]


def test_an_error_that_all_have_is_told_once_and_nothing_starts_again(settings: dict[str, Any], tmp_path: Path) -> None:
    process = spawn("sft", output_dir=tmp_path / "run", **{**settings, "gpus": 2, "sequence_length": 4096})
    output = process.wait()
    assert process.popen.returncode == 2
    assert output.count("error: ") == 1
    assert "sequence_length 4096 is more than the 512 positions" in output
    assert "restart" not in output
    assert read_status(tmp_path / "run")["can_be_mended"]  # type: ignore[index]


def test_one_process_that_fails_early_takes_the_others_down_with_its_own_error(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    script = 'if [ "$LOCAL_RANK" = 1 ]; then set -- "$@" --model-name /nowhere; fi'
    process = torchrun(folder, settings, "--standalone", script=script)
    output = process.wait()
    assert process.popen.returncode == 1
    assert output.count("error: model_name /nowhere: no such folder") == 1
    assert "no such folder" in read_status(folder)["reason"]  # type: ignore[index]


def test_pretraining_from_random_weights_and_a_stream(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    data = write_texts(tmp_path / "text.jsonl", rows=300)
    settings = {
        "model_name": tmp_path / "model", "initialise": "random", "dataset": data, "sequence_length": 64, "steps": 6,
        "batch_size": 6, "micro_batch_size": 2, "log_every": 1, "streaming": "true", "streaming_window": 8,
        "device": "cpu", "validation_dataset": data,
    }  # fmt: skip
    alone = finished("pretrain", tmp_path / "alone", settings)
    assert_close(finished("pretrain", tmp_path / "both", settings, gpus=2), alone)


@pytest.mark.parametrize("more", [{"activation_checkpointing": "true", "compile": "true"}, {"precision": "bf16"}])
def test_around_a_block(more: dict[str, str], tmp_path: Path) -> None:
    """Checkpointing, compilation and precision give the same in one process and in two."""
    make_model(tmp_path / "model", kind="llama")
    data = write_chat(tmp_path / "chat.jsonl", rows=60)
    settings = {**SFT, "model_name": tmp_path / "model", "dataset": data, "steps": 4, "validation_share": "none"}
    alone = finished("sft", tmp_path / "alone", {**settings, "precision": more.get("precision", "fp32")})
    both = finished("sft", tmp_path / "both", settings, gpus=2, **more)
    tolerance = 2e-3 if "precision" in more else 2e-5
    np.testing.assert_allclose(losses(both), losses(alone), rtol=tolerance)


def test_weights_that_are_stored_in_eight_bits_are_read_with_their_scales(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """As the hub's FP8 models are; transformers makes plain weights of them on a CPU."""
    model = make_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2 and "embed" not in name]:
        scale = tensors[name].abs().max() / 400
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1).float()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((model / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
    (model / "config.json").write_text(json.dumps({**values, "quantization_config": fp8}))
    short = {**settings, "model_name": model, "steps": 2}
    alone = finished("sft", tmp_path / "alone", short)
    both = finished("sft", tmp_path / "both", short, gpus=2)
    assert_close(both, alone)
    assert json.loads((both / "final/config.json").read_text()) == json.loads((alone / "final/config.json").read_text())


def test_a_failure_that_one_process_told_is_not_written_over_by_another(tmp_path: Path) -> None:
    write_status(tmp_path, "running", 4, 8)
    write_status(tmp_path, "failed", 4, 8, reason="why")
    write_status(tmp_path, "running", 5, 8)
    assert read_status(tmp_path)["reason"] == "why"  # type: ignore[index]
    write_status(tmp_path, "starting", 4, 8)
    write_status(tmp_path, "running", 5, 8)
    assert read_status(tmp_path)["state"] == "running"  # type: ignore[index]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"gpus": 2, "device": "auto"}, "gpus = 2: no CUDA device is here"),
        ({"gpus": 9}, "batch_size 8 leaves some of 9 gpus without a row"),
        ({"max_restarts": 1}, "max_restarts is for gpus > 1"),
        ({"sharding": "hybrid"}, "sharding 'hybrid' repeats a node's shards on other nodes"),
    ],
)
def test_refusals(run: Run, more: dict[str, Any], message: str, settings: dict[str, Any], tmp_path: Path) -> None:
    outcome = run("sft", output_dir=tmp_path / "run", **{**settings, **more})
    assert outcome.code == 2
    assert message in outcome.output


@pytest.mark.parametrize(
    ("world", "device", "more", "message"),
    [
        (World(0, 2, 0, 2), "cpu", {"gpus": 4}, "gpus = 4, but 2 processes were started here"),
        (World(0, 2, 0, 2), "mps", {}, "there is one GPU, for one process"),
        (World(0, 2, 0, 2), "cuda", {}, "2 processes were started, but there are 0 GPUs"),
        (World(0, 16, 0, 8), "cpu", {}, "batch_size 8 leaves some of 16 processes without a row"),
        (World(0, 2, 0, 2), "cpu", {"sharding": "hybrid"}, "and there are none: say 'full'"),
    ],
)
def test_processes_that_do_not_fit_the_config(world: World, device: str, more: dict[str, Any], message: str) -> None:
    config = SFTConfig(**{**SFT, "model_name": "model", "dataset": "data", "output_dir": "run", **more})
    with pytest.raises(ConfigError) as refused:
        check_world(config, world, device)
    assert message in str(refused.value)
    assert len(refused.value.problems) == 1
