"""`lacuna plan`: what a run, or an experiment, will take; and `--dry-run`, which shows the plan of one run here."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import Run
from lacuna.config.finetune import FinetuneConfig
from lacuna.config.trainers import load_trainer_config
from lacuna.config.training import SFTConfig
from lacuna.config.yaml_format import dump_yaml
from lacuna.cost.advice import FINETUNE, LOOP, USABLE, advise, changes, fits, largest_rows
from lacuna.cost.flops import Speed, flops_of, measured_speed
from lacuna.cost.known_models import KNOWN_MODELS
from lacuna.cost.memory import total
from lacuna.cost.shape import Adapter, ModelShape, Step, model_shape
from lacuna.cost.step import step_of
from lacuna.machine.detect import NAMED, Device, named_device
from lacuna.train.planned import memory_line
from lacuna.words import GIB

ROOT = Path(__file__).parents[2]
MISTRAL_7B = {
    "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN_HALF = {
    "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, values in (("mistral", MISTRAL_7B), ("qwen", QWEN_HALF)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    (tmp_path / "mistral.yaml").write_text("model: {path: mistral}\n")
    (tmp_path / "qwen.toml").write_text('model_name = "qwen"\n')
    return tmp_path


@pytest.fixture
def small(here: Path, model_folder: Path, chat_file: Path) -> Path:
    """A config whose model and data are here."""
    file = here / "small.toml"
    file.write_text(
        f'trainer = "sft"\nmodel_name = "{model_folder}"\ndataset = "{chat_file}"\noutput_dir = "out/run"\n'
        "sequence_length = 128\nbatch_size = 4\nmicro_batch_size = 2\nepochs = 2\n"
    )
    return file


def plan(run: Run, *words: object, code: int = 0) -> dict[str, Any]:
    """The only run of a plan."""
    outcome = run("lacuna", "plan", *words, "--json")
    assert outcome.code == code, outcome.output
    answer, _ = json.JSONDecoder().raw_decode(outcome.output, outcome.output.index('{"name"'))
    (found,) = answer["runs"]
    return {**found, "said": answer["notes"]}


GOLDEN = {
    ("training_config_h100.yaml", "mistral.yaml", "h100"): (7_289_966_592, 41_943_040, 14.3, 0.47, 2.5),
    ("training_config_m4.yaml", "mistral.yaml", "m4-32gb"): (7_289_966_592, 41_943_040, 7.4, 0.47, 2.5),
    ("training_config_m4.yaml", "mistral.yaml", "h100"): (7_289_966_592, 41_943_040, 6.4, 0.47, 2.5),
    ("sft_qwen.toml", "qwen.toml", "h100"): (494_032_768, 494_032_768, 39.3, 5.52, 23.0),
    ("pretrain_qwen.toml", "qwen.toml", "h100"): (494_032_768, 494_032_768, 24.2, 5.52, 23.0),
}
"""Of the shipped configs: parameters, those trained, and GiB of a step, a checkpoint and the whole run."""


@pytest.mark.parametrize(("files", "expected"), GOLDEN.items(), ids=lambda value: " ".join(map(str, value)))
def test_golden_plans_of_the_shipped_configs(
    files: tuple[str, str, str], expected: tuple[float, ...], run: Run
) -> None:
    config, model, device = files
    found = plan(run, ROOT / "configs" / config, model, "--device", device)
    sizes = (found["peak"], found["checkpoint"], found["disk"])
    gib = (round(sizes[0] / GIB, 1), round(sizes[1] / GIB, 2), round(sizes[2] / GIB, 1))
    assert (found["parameters"], found["trained"], *gib) == expected
    assert found["fits"]


def test_the_text_says_what_the_json_says(run: Run) -> None:
    words = (ROOT / "configs" / "training_config_h100.yaml", "mistral.yaml", "--device", "h100")
    found, text = plan(run, *words), run("lacuna", "plan", *words).output
    assert "parameters 7,289,966,592, trained: 41,943,040 (0.58%)" in text
    assert f"memory {found['peak'] / GIB:.1f} GiB at the peak of a step: fits" in text
    assert "data not counted: " in text
    assert "activation checkpointing on" in text
    assert re.search(r"advice room is left: training.batch_size: up to 16 would fit", text)


def test_what_does_not_fit_ends_with_1_and_says_what_would(run: Run, here: Path) -> None:
    (here / "full.toml").write_text(
        'trainer = "sft"\nmodel_name = "mistral"\ndataset = "d.jsonl"\noutput_dir = "o"\nsteps = 100\n'
    )
    found = plan(run, "full.toml", "--device", "a100", code=1)
    assert (found["fits"], found["checkpointing"]) == (False, True)
    assert found["advice"] == ["would fit: --gpus 2"]
    assert plan(run, "full.toml", "--device", "4090", code=1)["advice"] != []
    text = run("lacuna", "plan", "full.toml", "--device", "a100").output
    assert "DOES NOT FIT" in text
    assert "steps 100, 13,107,200 tokens" in text
    assert "note tokens and time take every row to be full" in text
    assert "weights 27.0 GiB" in text


def test_fitting_on_more_gpus(run: Run, here: Path) -> None:
    (here / "full.toml").write_text(
        'trainer = "sft"\nmodel_name = "mistral"\ndataset = "d.jsonl"\noutput_dir = "o"\nsteps = 100\ngpus = 8\n'
    )
    found = plan(run, "full.toml", "--device", "h100")
    assert found["processes"] == 8
    assert found["memory"]["optimizer"] == 8 * 7_248_023_552 / 8
    assert found["gpu_hours"] == pytest.approx(found["seconds"] * 8 / 3600)


def test_data_that_are_here_are_counted(run: Run, small: Path) -> None:
    found = plan(run, "small.toml", "--device", "cpu")
    assert found["data"]["documents"] == 40
    assert found["steps"] == found["data"]["steps"]
    assert found["tokens"] == 2 * found["data"]["tokens"]
    assert found["not_counted"] is None
    assert any("schema chat" in note for note in found["said"])


def test_flops_are_those_of_the_trainers_mfu(run: Run, small: Path, model_folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from lacuna.train.metrics import model_flops

    shape = model_shape(json.loads((model_folder / "config.json").read_text()))
    assert shape is not None
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    assert flops_of(shape, None) == model_flops(model, 128)
    found = plan(run, "small.toml", "--device", "h100", "--mfu", "0.5")
    counts = found["data"]
    expected = flops_of(shape, None).training(*(2 * counts[name] for name in ("tokens", "targets", "attention_pairs")))
    assert found["flops"] == expected
    assert found["seconds"] == pytest.approx(expected / (989.4e12 * 0.5))
    assert found["speed"] == {"source": "given", "mfu": 0.5, "tokens_per_second": None}


def test_a_speed_that_was_measured_here_is_taken(run: Run, small: Path, here: Path, model_folder: Path) -> None:
    assert plan(run, "small.toml")["seconds"] is None
    beside = here / "out" / "another"
    beside.mkdir(parents=True)
    (beside / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "tokens_per_second": speed}) + "\n" for step, speed in ((1, 3), (2, 50)))
    )
    (beside / "provenance.json").write_text(json.dumps({"starts": [{"device": "CPU"}]}))
    (beside / "config.toml").write_text(f'model_name = "{model_folder}"\n')
    found = plan(run, "small.toml")
    assert found["speed"]["tokens_per_second"] == 50
    assert found["seconds"] == found["tokens"] / 50
    assert "measured in" in run("lacuna", "plan", "small.toml").output
    assert measured_speed("out/run", "another model", "CPU") is None
    assert measured_speed("out/run", str(model_folder), "NVIDIA H100") is None
    (beside / "metrics.jsonl").write_text(2 * '{"step": 1, "tokens_per_second": 1, "mfu": 0.3}\n')
    assert measured_speed("out/run", "another model", "CPU") == Speed("measured in out/another", mfu=0.3)


def test_the_formula_and_a_trace_agree(run: Run, small: Path) -> None:
    formula, traced = plan(run, "small.toml", "--device", "cpu"), plan(run, "small.toml", "--device", "cpu", "--trace")
    assert list(traced["memory"]) == ["traced step", "framework"]
    assert formula["peak"] == pytest.approx(traced["peak"], rel=0.1)


def test_a_model_of_another_kind_has_no_made_up_memory(run: Run, here: Path, chat_file: Path) -> None:
    (here / "gpt2").mkdir()
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 512, "n_positions": 128}
    (here / "gpt2" / "config.json").write_text(json.dumps(gpt2))
    (here / "gpt2.toml").write_text(
        'trainer = "sft"\nmodel_name = "gpt2"\ndataset = "d.jsonl"\noutput_dir = "o"\nsteps = 5\nsequence_length = 64\n'
    )
    found = plan(run, "gpt2.toml", "--device", "h100")
    assert (found["memory"], found["parameters"]) == (None, None)
    assert "its layers are of a kind that the formula does not know; --trace does" in found["notes"][0]
    assert plan(run, "gpt2.toml", "--device", "h100", "--trace")["peak"] > GIB / 2
    (here / "adapter.yaml").write_text(
        "model: {path: gpt2}\ndataset: {path: d.jsonl}\ntraining: {target_modules: [c_attn], sequence_length: 64}\n"
    )
    assert plan(run, "adapter.yaml", "--device", "h100")["memory"] is None
    assert plan(run, "adapter.yaml", "--device", "h100", "--trace")["peak"] > GIB / 2


def test_adapters_on_layers_that_a_model_does_not_have(run: Run, here: Path) -> None:
    (here / "adapter.yaml").write_text(
        "model: {path: mistral}\ndataset: {path: d.jsonl}\ntraining: {target_modules: [q_proj, c_attn]}\n"
    )
    found = plan(run, "adapter.yaml", "--device", "h100")
    assert (found["memory"], found["notes"]) == (None, ["target_modules: mistral has no c_attn"])
    assert plan(run, "adapter.yaml", "--device", "h100", "--trace")["memory"] is None


# Experiments


def experiment(here: Path, base: Path, **more: Any) -> Path:
    file = here / "experiment.yaml"
    file.write_text(dump_yaml({"experiment_name": "study", "base_config_file": str(base), **more}))
    return file


def test_an_experiment_has_a_line_for_each_run_and_sums(run: Run, small: Path, here: Path) -> None:
    experiment(here, small, variables={"sequence_length": [128, 256]}, seeds=[1, 2])
    outcome = run("lacuna", "plan", "experiment.yaml", "--device", "h100")
    assert outcome.code == 0, outcome.output
    assert re.findall(r"run_\d{3}", outcome.output) == ["run_000", "run_001", "run_002", "run_003"]
    assert re.search(r"all [\d.]+ GPU-hours, [\d,]+ tokens, [\d.]+ MiB of disk", outcome.output)
    assert outcome.output.count("schema chat") == 1
    assert run("lacuna", "generate", "experiment.yaml").code == 0
    again = run("lacuna", "plan", "configs", "--device", "h100")
    table = re.compile(r"run_000.*GPU-hours")
    assert table.findall(again.output) == table.findall(outcome.output)
    assert run("lacuna", "plan", "configs/run_mapping.yaml", "--device", "h100").output == again.output


def test_runs_that_do_not_fit_are_named(run: Run, here: Path) -> None:
    base = here / "full.toml"
    base.write_text(
        'trainer = "sft"\nmodel_name = "mistral"\ndataset = "d.jsonl"\noutput_dir = "o"\nsteps = 100\ngpus = 8\n'
    )
    experiment(here, base, variables={"sequence_length": [1024, 32768]})
    outcome = run("lacuna", "plan", "experiment.yaml", "--device", "a100-40gb")
    assert outcome.code == 1
    assert "DO NOT FIT 1 of 2: run_001" in outcome.output


def test_a_thousand_runs_take_seconds(run: Run, small: Path, here: Path) -> None:
    rates = [round(1e-5 * (1 + index), 8) for index in range(20)]
    experiment(here, small, variables={"learning_rate": rates, "sequence_length": [32, 64]}, seeds=list(range(25)))
    plan(run, "small.toml", "--device", "h100")
    started = time.process_time()
    outcome = run("lacuna", "plan", "experiment.yaml", "--device", "h100")
    assert time.process_time() - started < 15, "3 s where it was measured"
    assert outcome.code == 0
    assert "1000 runs" in outcome.output
    assert "and 980 more" in outcome.output


def test_torchtunes_runs_are_planned_too(run: Run, here: Path) -> None:
    (here / "study.yaml").write_text(
        dump_yaml(
            {
                "experiment_name": "ranks", "base_config": "llama3_2/1B_lora_single_device",
                "variables": {"lora_rank": [8, 64]},
                "controls": {"tokenizer": {"max_seq_len": 512}},
            }
        )
    )  # fmt: skip
    outcome = run("lacuna", "plan", "study.yaml", "--device", "4090", "--json")
    assert outcome.code == 0, outcome.output
    first, second = json.loads(outcome.output[outcome.output.index('{"name"') :])["runs"]
    assert first["trained"] < second["trained"]
    assert first["peak"] < second["peak"] < 23 * GIB
    assert first["not_counted"] is not None
    assert (
        "--trace is for our own trainers" in run("lacuna", "plan", "study.yaml", "--device", "4090", "--trace").output
    )


# The shipped configs, without a network


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("pretrain_qwen.toml", 494_032_768),
        ("sft_qwen.toml", 494_032_768),
        ("training_config_h100.yaml", 7_248_023_552 + 41_943_040),
        ("training_config_m4.yaml", 7_248_023_552 + 41_943_040),
    ],
)
def test_a_shipped_config_is_planned_where_nothing_of_its_model_is(name: str, parameters: int, run: Run) -> None:
    one = plan(run, ROOT / "configs" / name, "--device", "h100")
    assert one["parameters"] == parameters
    assert one["fits"] is True
    (said,) = [note for note in one["notes"] if "planned with" in note]
    assert said == f"{one['model']}: its config.json is not in the hub's cache, and the hub does not give it; " + (
        "planned with the shape that lacuna knows of it"
    )


def test_the_shape_of_a_folder_that_is_not_here_is_its_bases_which_a_trace_takes_too(run: Run) -> None:
    one = plan(run, ROOT / "configs" / "finetune.yaml", "--device", "h100", "--trace")
    assert one["notes"][-1] == "./models/gpt2: no such folder; planned with the shape that lacuna knows of gpt2"
    assert one["memory"]["traced step"] > 0.4 * GIB


def test_every_model_that_a_shipped_config_names_is_known() -> None:
    configs = [load_trainer_config([str(file)]) for file in (ROOT / "configs").iterdir()]
    bases = {config.base_model or config.model_name for config in configs if isinstance(config, FinetuneConfig)}
    named = bases | {config.model_name for config in configs if not isinstance(config, FinetuneConfig)}
    assert named == KNOWN_MODELS.keys()


def test_the_known_shape_of_gpt2_is_gpt2s() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**KNOWN_MODELS["gpt2"]))
    assert model.num_parameters() == 124_439_808


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.toml", "--device", "h100"], "gone.toml"),
        (["mistral.yaml", "--device", "h1000"], "no device is known as 'h1000'"),
        (["bad.toml", "--device", "h100"], "unknown setting 'stepps'; did you mean 'steps'?"),
        (["torchtune.yaml", "torchtune.yaml"], "torchtune's configs are planned one at a time"),
        (["cuda.toml"], "device 'cuda' is not available here (available: cpu)"),
        (["mistral.yaml", "--mfu", "2"], "--mfu"),
    ],
)
def test_bad_input_is_refused(words: list[str], message: str, run: Run, here: Path) -> None:
    (here / "bad.toml").write_text('trainer = "sft"\nmodel_name = "m"\ndataset = "d"\noutput_dir = "o"\nstepps = 5\n')
    (here / "cuda.toml").write_text(
        'trainer = "sft"\nmodel_name = "m"\ndataset = "d"\noutput_dir = "o"\nsteps = 5\ndevice = "cuda"\n'
    )
    (here / "torchtune.yaml").write_text("tokenizer: {path: x}\nbatch_size: 2\n")
    outcome = run("lacuna", "plan", *words)
    assert outcome.code == 2, outcome.output
    assert message in outcome.output


# Dry runs of our own loop; finetune's are in config/test_finetune.py


def test_a_dry_run_shows_settings_and_plan_and_writes_nothing(run: Run, small: Path, here: Path) -> None:
    outcome = run("sft", "@", small, "--dry-run", device="cpu", seed=7)
    assert outcome.code == 0, outcome.output
    assert "seed 7 --seed" in outcome.output
    assert f"batch_size 4 {small}:6" in outcome.output
    assert re.search(r"data 40 documents, [\d,]+ tokens", outcome.output)
    assert "would stop" not in outcome.output
    assert not (here / "out").exists()


def test_a_dry_run_lists_all_that_would_stop_the_run(run: Run, small: Path) -> None:
    outcome = run("sft", "@", small, "--dry-run", model_name="./gone", dataset="no.jsonl", device="cpu")
    assert outcome.code == 1, outcome.output
    assert "would stop: model_name ./gone: no such folder" in outcome.output
    assert "would stop: no.jsonl: no such file" in outcome.output
    outcome = run("sft", "@", small, "--dry-run", batch_size=4000, micro_batch_size=4, device="cpu")
    assert outcome.code == 1
    assert "would stop: " in outcome.output
    assert "batch_size is 4000 rows" in outcome.output


# Advice

shapes = st.builds(
    lambda family, units, layers, ratio, heads, vocabulary, tied: ModelShape(
        family, 64 * units * heads, layers, int(64 * units * heads * ratio), heads, max(heads // 4, 1), 64, vocabulary,
        tied,
    ),
    st.sampled_from(["llama", "qwen3", "gemma", "gemma3"]), st.integers(1, 2), st.integers(4, 48),
    st.floats(2.5, 4.5), st.sampled_from([8, 16, 32]), st.integers(1000, 200_000), st.booleans(),
)  # fmt: skip
adapters = st.none() | st.builds(
    Adapter, st.integers(1, 128), dropout=st.booleans(), bits=st.sampled_from([None, 4]), double=st.booleans()
)
steps = st.builds(
    Step, rows=st.integers(1, 64), length=st.sampled_from([512, 2048, 8192]), bf16=st.booleans(),
    checkpointing=st.booleans(), accumulates=st.booleans(), adapter=adapters,
)  # fmt: skip


@given(shapes, steps, st.sampled_from([gib for _, gib in NAMED.values()]))
def test_advice_holds(shape: ModelShape, step: Step, gib: float) -> None:
    """What is said to fit fits, and the largest number of rows is the largest."""
    memory = int(gib * GIB)
    names = LOOP if step.adapter is None else FINETUNE
    said = advise(shape, step, memory, names, 10**6)
    if not fits(shape, step, memory):
        assert said
        single = {f"would fit: {text}" for text, changed in changes(shape, step, names) if fits(shape, changed, memory)}
        assert set(said) == single if single else len(said) == 1
    rows = largest_rows(shape, step, memory)
    assert rows == 0 or total(shape, replace(step, rows=rows)) <= USABLE * memory
    assert total(shape, replace(step, rows=rows + 1)) > USABLE * memory


def test_a_step_that_nothing_makes_fit() -> None:
    shape = model_shape(MISTRAL_7B)
    assert shape is not None
    step = Step(1, 4096, True, True, adapter=Adapter(16, bits=4))
    (said,) = advise(shape, step, 3 * GIB, FINETUNE, 16)
    assert said.startswith("nothing would make it fit: with ")
    (said,) = advise(shape, Step(8, 8192, True, False, adapter=Adapter(16)), int(7.5 * GIB), FINETUNE, 16)
    assert said.startswith("would fit: training.gradient_checkpointing: true, training.batch_size: 1 (")
    assert said.endswith(", together")
    assert advise(shape, step, None, FINETUNE, 16) == []


def test_named_devices_are_what_a_plan_can_be_for(run: Run) -> None:
    for name in (*NAMED, "m4-32gb", "m3-128gb"):
        memory = named_device(name).memory
        assert memory is not None
        assert (
            plan(run, ROOT / "configs" / "training_config_m4.yaml", "mistral.yaml", "--device", name)["device_memory"]
            == memory
        )


def test_the_line_of_a_run_on_an_accelerator() -> None:
    predicted = {"weights": 10.0 * GIB, "activations": 2.0 * GIB, "framework": 0.5 * GIB}
    line = memory_line(predicted, Device("cuda", "NVIDIA H100", 80 * GIB))
    assert line == "memory of a step: about 12.5 GiB (weights 10.0, activations 2.0, framework 0.5)"
    line = memory_line(predicted, Device("cuda", "NVIDIA L4", 12 * GIB))
    assert line is not None
    assert line.endswith("of 12.0 GiB: warning: it will probably not fit; `lacuna plan` says what would")
    assert memory_line({}, Device("cuda", "NVIDIA H100", 80 * GIB)) is None
    assert memory_line(predicted, Device("cpu", "CPU")) is None


def test_activation_checkpointing_is_for_steps_that_would_not_fit() -> None:
    config = SFTConfig(model_name="m", dataset="d", output_dir="o", steps=1, micro_batch_size=8, batch_size=8)
    shape = model_shape(QWEN_HALF)

    def is_on(gib: int, **changes: object) -> bool:
        device = Device("cuda", "NVIDIA H100", gib * GIB)
        return step_of(config.model_copy(update=changes), shape, device).checkpointing

    assert (is_on(80), is_on(24)) == (False, True)
    assert (is_on(80, activation_checkpointing=True), is_on(24, activation_checkpointing=False)) == (True, False)
    assert not step_of(config, shape, Device("cpu", "CPU")).checkpointing
    assert step_of(config, None, Device("cuda", "NVIDIA H100", 80 * GIB)).checkpointing
