"""What a torchtune run takes, beside torchtune itself: its modules, a trace of its step, its data sets, its files."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lacuna import generate
from lacuna.config.files import read_layer
from lacuna.errors import ConfigError
from lacuna.torchtune import environment as torchtune
from lacuna.torchtune.memory import CONTEXT, NF4_BYTES, assumptions, checkpoint_sizes, torchtune_memory
from lacuna.torchtune.model import FAMILIES, RECIPES, TorchtuneModel, model_of
from lacuna.torchtune.steps import Counts, step_length, torchtune_counts
from torchtune_fixture import ROOT, losses, make_llama, tiny_controls, train, write_rows

FULL, FULL_DISTRIBUTED, LORA, LORA_DISTRIBUTED = RECIPES
TRACE = ROOT / "benchmarks" / "torchtune_trace.py"
QV = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8}
ALL = {**QV, "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True}
SIZES = {
    "vocab_size": 2000, "num_layers": 3, "num_heads": 8, "num_kv_heads": 2, "embed_dim": 512, "max_seq_len": 512,
    "intermediate_dim": 1536,
}  # fmt: skip


HEAD = {"gemma": {"head_dim": 64}, "gemma2": {"head_dim": 64}}


@pytest.fixture(scope="module")
def environment() -> torchtune.Environment:
    return torchtune.need_environment(None)


def config(builder: str, model: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    name = builder.removeprefix("lora_")
    component = {"_component_": f"torchtune.models.{name}.{builder}"}
    return {
        "model": {**component, **SIZES, **HEAD.get(name, {}), **(model or {})},
        "tokenizer": {"max_seq_len": 256},
        "batch_size": 2,
        "length": 256,
        "dtype": "bf16",
        "epochs": 3,
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "lr": 1e-4},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        **settings,
    }


def planned(
    environment: torchtune.Environment, values: dict[str, Any], recipe: str = "", gpus: int = 1
) -> dict[str, float]:
    recipe = recipe or (LORA if "lora" in values["model"]["_component_"] else FULL)
    model = model_of(values, recipe, environment)
    assert isinstance(model, TorchtuneModel), model
    sizes = torchtune_memory(model, values, recipe, gpus, values["length"])
    assert isinstance(sizes, dict), sizes
    return sizes


# Beside torchtune's own modules, in one process of its environment.

CHECKPOINTING = {"enable_activation_checkpointing": True}
TRACED = [
    config("llama3_2", **CHECKPOINTING, gradient_accumulation_steps=2),
    config("llama2", **CHECKPOINTING, optimizer_in_bwd=True),
    config("lora_llama3_1", {**ALL, "quantize_base": True}, **CHECKPOINTING, length=16),
    config("lora_phi3", {**QV, "use_dora": True}, **CHECKPOINTING),
    config("lora_qwen2", {**ALL, "lora_dropout": 0.1}, loss={"_component_": "torch.nn.CrossEntropyLoss"}),
    config("lora_gemma2", ALL),
]
for traced in TRACED:
    traced["model"]["num_layers"] = 2
SMALL = ("llama3_2.llama3_2_1b", "qwen2_5.qwen2_5_0_5b", "gemma2.gemma2_2b")
ADAPTED = {"lora_attn_modules": ["q_proj", "output_proj"], "apply_lora_to_mlp": True, "use_dora": True, "lora_rank": 24}
BUILT: list[tuple[str, dict[str, Any]]] = [
    *((f"torchtune.models.{name}", {}) for name in SMALL),
    *((f"torchtune.models.{name}.{name}", {**SIZES, **HEAD.get(name, {})}) for name in FAMILIES),
    *((f"torchtune.models.{name}.lora_{name}", {**SIZES, **HEAD.get(name, {}), **ADAPTED, "lora_alpha": 1})
      for name in FAMILIES),
    ("torchtune.models.llama3.lora_llama3", {**SIZES, **QV, "apply_lora_to_output": True}),
    ("torchtune.models.llama3_2.qlora_llama3_2_1b", {"lora_attn_modules": ["v_proj"], "quantize_base": False}),
]  # fmt: skip
"""benchmarks/torchtune_memory.py has all 157."""


@pytest.fixture(scope="module")
def truth(environment: torchtune.Environment) -> dict[str, list[Any]]:
    request = json.dumps({"traces": TRACED, "builds": BUILT})
    process = subprocess.run(
        [environment.python, str(TRACE)], input=request, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    answer: dict[str, list[Any]] = json.loads(process.stdout)
    return answer


def test_parameters_are_those_of_torchtunes_modules(
    environment: torchtune.Environment, truth: dict[str, list[Any]]
) -> None:
    for (component, arguments), counted in zip(BUILT, truth["builds"], strict=True):
        recipe = LORA if "lora" in component else FULL
        model = model_of({"model": {"_component_": component, **arguments}}, recipe, environment)
        assert isinstance(model, TorchtuneModel), model
        total = model.shape.parameters + model.adapter_parameters
        assert [total, model.trainable] == counted, component


def test_the_plan_is_the_traced_peak(environment: torchtune.Environment, truth: dict[str, list[Any]]) -> None:
    for values, peak in zip(TRACED, truth["traces"], strict=True):
        share = (sum(planned(environment, values).values()) - CONTEXT) / peak
        assert 0.97 < share < 1.05, (share, values)


def test_every_shipped_config_of_the_planned_recipes_has_a_plan(environment: torchtune.Environment) -> None:
    refused = {}
    for recipe in torchtune.recipes(environment):
        values = read_layer(recipe.file).values
        model = model_of(values, recipe.recipe, environment)
        if recipe.recipe in RECIPES and isinstance(model, TorchtuneModel):
            sizes = torchtune_memory(model, values, recipe.recipe, 8, 2048)
            assert isinstance(sizes, dict), sizes
            assert not isinstance(checkpoint_sizes(model, values, recipe.recipe), str)
        elif recipe.recipe in RECIPES:
            refused[recipe.config] = model
    assert all("vision" in name for name in refused)
    assert len(refused) == 9


# Arithmetic.


def test_full_fine_tuning_holds_weights_gradients_and_two_moments(environment: torchtune.Environment) -> None:
    values = config("llama2", gradient_accumulation_steps=2, length=1)
    parameters = 2 * 2000 * 512 + 512 + 3 * (512 * (512 + 2 * 128 + 512) + 3 * 512 * 1536 + 2 * 512)
    sizes = planned(environment, values)
    assert sizes["weights"] == 2 * parameters + 4 * 512 * 64
    assert sizes["optimizer"] == 4 * parameters
    assert sizes["gradients"] == 2 * parameters + 3 * 2 * 2000 * 512
    assert sizes["framework"] == 0.75 * 2**30
    for name, bytes_each in (("PagedAdamW", 8), ("PagedAdamW8bit", 2.03125), ("AdamW8bit", 2.03125)):
        changed = {**values, "optimizer": {"_component_": f"bitsandbytes.optim.{name}"}}
        assert planned(environment, changed)["optimizer"] == bytes_each * parameters
    momentum = {"_component_": "torch.optim.SGD", "fused": True, "momentum": 0.9}
    assert planned(environment, {**values, "optimizer": momentum})["optimizer"] == 2 * parameters
    del momentum["momentum"]
    assert planned(environment, {**values, "optimizer": momentum})["optimizer"] == 0


def test_fsdp_divides_what_stays_and_gathers_two_layers(environment: torchtune.Environment) -> None:
    values = config("llama2")
    whole, shard = planned(environment, values), planned(environment, values, FULL_DISTRIBUTED, 4)
    rope = 4 * 512 * 64
    layer = 512 * (512 + 2 * 128 + 512) + 3 * 512 * 1536 + 2 * 512
    assert shard["weights"] - rope == (whole["weights"] - rope) / 4
    assert shard["optimizer"] == whole["optimizer"] / 4
    assert shard["gathered by FSDP"] == 2 * (2 * 2000 * 512 + 2 * layer)
    kept = planned(environment, {**values, "fsdp_reshard_after_forward": False}, FULL_DISTRIBUTED, 4)
    assert kept["gathered by FSDP"] == 2 * (2 * 2000 * 512 + 3 * layer)
    apart = planned(environment, {**values, "custom_sharded_layers": ["tok_embeddings"]}, FULL_DISTRIBUTED, 4)
    assert apart["gathered by FSDP"] == 2 * (2000 * 512 + 2 * layer)
    assert planned(environment, {**values, "fsdp_cpu_offload": True}, FULL_DISTRIBUTED, 4)["optimizer"] == 0
    assert whole["gathered by FSDP"] == 0
    assert planned(environment, values, FULL, 4) == whole


def test_nf4_is_for_the_projections_alone(environment: torchtune.Environment) -> None:
    plain, quantised = (config("lora_llama3_1", {**QV, "quantize_base": kind}, length=1) for kind in (False, True))
    matrices = 3 * (512 * (512 + 2 * 128 + 512) + 3 * 512 * 1536)
    before, after = planned(environment, plain), planned(environment, quantised)
    assert before["weights"] - after["weights"] == pytest.approx((2 - NF4_BYTES) * matrices)
    assert after["quantisation buffers"] == 14 * 512 * 1536


def test_offloading_leaves_five_layers_inputs(environment: torchtune.Environment) -> None:
    deep = {"num_layers": 12}
    kept, offloaded = (
        planned(environment, config("lora_llama3", {**QV, **deep}, **CHECKPOINTING, enable_activation_offloading=on))[
            "activations"
        ]
        for on in (False, True)
    )
    assert kept - offloaded == 7 * 2 * 256 * 512 * 2


def test_what_is_planned_as_something_else_is_said() -> None:
    assert assumptions(config("llama2"), 1) == []
    paged = {"_component_": "bitsandbytes.optim.PagedAdamW"}
    assert [sentence.split(" ")[0] for sentence in assumptions(
        config("llama2", compile=True, ac_mode="selective", optimizer=paged), 2
    )] == ["compile:", "ac_mode", "PagedAdamW's", "what"]  # fmt: skip


# Reasons instead of numbers.


@pytest.mark.parametrize(
    ("component", "recipe", "reason"),
    [
        (
            "torchtune.models.llama2.llama2_7b",
            "full_dpo_distributed",
            "the memory of full_dpo_distributed is not planned",
        ),
        ("torchtune.models.llama2.llama2_7b", "knowledge_distillation_single_device", "is not planned; it is of full_"),
        ("torchtune.models.llama3_2_vision.llama3_2_vision_11b", FULL, "vision_11b is none of torchtune's builders"),
        ("torchtune.models.mistral.mistral_reward_7b", FULL, "mistral_reward_7b is none of"),
        ("torchtune.models.llama2.llama9", FULL, "llama9 is none of"),
        ("my.models.llama2_7b", FULL, "my.models.llama2_7b is none of"),
        (None, FULL, "None is none of"),
        ("torchtune.models.llama2.llama2", FULL, "model: vocab_size, num_layers, num_heads, embed_dim, max_seq_len"),
    ],
)
def test_what_is_no_plain_decoder_has_a_reason(
    environment: torchtune.Environment, component: str | None, recipe: str, reason: str
) -> None:
    found = model_of({"model": {"_component_": component}}, recipe, environment)
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dtype": "fp8"}, "dtype is 'fp8'; bf16, fp16 and fp32 are planned"),
        ({"optimizer": {"_component_": "my.Lion"}}, "what my.Lion keeps is not known; known are torch.optim.AdamW"),
        ({"loss": {"_component_": "my.Loss"}}, "what my.Loss keeps is not known"),
        ({"tensor_parallel_dim": 2}, "tensor parallelism is not planned"),
        ({"batch_size": "${size}"}, "batch_size and gradient_accumulation_steps should be whole numbers"),
    ],
)
def test_settings_whose_memory_is_not_known_have_a_reason(
    environment: torchtune.Environment, settings: dict[str, Any], reason: str
) -> None:
    values = config("llama2", **settings)
    model = model_of(values, FULL, environment)
    assert isinstance(model, TorchtuneModel)
    for found in (torchtune_memory(model, values, FULL, 1, 64), checkpoint_sizes(model, values, FULL)):
        assert isinstance(found, str)
        assert found.startswith(reason)


def test_checkpoints_without_a_size_have_a_reason(environment: torchtune.Environment) -> None:
    values = config("llama2", epochs="many")
    model = model_of(values, FULL, environment)
    assert isinstance(model, TorchtuneModel)
    assert checkpoint_sizes(model, values, FULL) == "epochs is 'many', no whole number"
    later = {**values, "epochs": 2, "enable_async_checkpointing": True}
    assert checkpoint_sizes(model, later, FULL_DISTRIBUTED) == "the size of asynchronous checkpoints is not planned"


# A real run, and data sets.


@dataclass
class Run:
    values: dict[str, Any]
    folder: Path
    tiny: dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """LoRA for three epochs of 16 batches, three in a step."""
    folder = tmp_path_factory.mktemp("run")
    tiny = tiny_controls(make_llama(folder / "Llama-tiny"), write_rows(folder / "train.jsonl"), "lora_llama3_2")
    controls = {**tiny, "output_dir": str(folder / "runs"), "epochs": 3, "gradient_accumulation_steps": 3}
    settings = {"experiment_name": "t", "base_config": "llama3_2/1B_lora_single_device", "controls": controls}
    controls["max_steps_per_epoch"] = None
    done = generate({**settings, "variables": {"learning_rate": [1e-2]}}, folder / "configs", validate=False)
    train(done.command)
    return Run(read_layer(folder / "configs" / "run_000.yaml").values, Path(str(done.runs[0].output_dir)), tiny)


@pytest.fixture(scope="module")
def counted(environment: torchtune.Environment, run: Run) -> dict[str, Counts | str]:
    """The run's own counts, and those of variations of it, by one process."""
    rows = run.tiny["dataset"]
    tokenizer = {"_component_": "torchtune.models.llama3.llama3_tokenizer", **run.tiny["tokenizer"]}
    plain = {"tokenizer": tokenizer, "dataset": rows, "batch_size": 4, "epochs": 1}
    wide = {**plain, "tokenizer": {**tokenizer, "max_seq_len": 200}, "batch_size": 1}
    text = {"_component_": "torchtune.datasets.text_completion_dataset", "column": "input", "packed": True}
    configs = {
        "run": (run.values, 1),
        "plain": (plain, 1),
        "cut": ({**plain, "tokenizer": {**tokenizer, "max_seq_len": 20}}, 1),
        "linked": ({**plain, "tokenizer": {**tokenizer, "max_seq_len": "${limit}"}, "limit": 20}, 1),
        "packed": ({**wide, "dataset": {**rows, "packed": True}}, 1),
        "texts": ({**wide, "dataset": {**rows, **text}}, 1),
        "two": ({**plain, "dataset": [rows, rows]}, 2),
        "few": ({**plain, "max_steps_per_epoch": 2}, 1),
        "hub": ({**plain, "dataset": {"_component_": "torchtune.datasets.alpaca_dataset"}}, 1),
        "no epochs": ({**plain, "epochs": 0}, 1),
        **{f"again {index}": (plain, 1) for index in range(1000)},
    }
    return dict(zip(configs, torchtune_counts(environment, [*configs.values()]), strict=True))


def test_a_real_run_takes_the_planned_steps_and_files(
    environment: torchtune.Environment, run: Run, counted: dict[str, Any]
) -> None:
    model, counts = model_of(run.values, LORA, environment), counted["run"]
    assert isinstance(model, TorchtuneModel)
    assert (counts.samples, counts.rows, counts.truncated, counts.steps_per_epoch) == (64, 64, 0, 64 // 4 // 3)
    assert counts.tokens_seen == round(3 * counts.tokens * 60 / 64)
    assert len(losses(str(run.folder))) == counts.steps == 15
    sizes = checkpoint_sizes(model, run.values, LORA)
    assert not isinstance(sizes, str)
    files = [path for path in (run.folder / "epoch_2").iterdir() if path.suffix in (".safetensors", ".pt")]
    assert 0 <= sum(path.stat().st_size for path in files) - sizes.epoch < 40_000
    assert 0 <= (run.folder / "recipe_state" / "recipe_state.pt").stat().st_size - sizes.recipe_state < 60_000
    assert sizes.whole_run == 3 * sizes.epoch + sizes.recipe_state
    assert step_length(model, run.values, counts) == (counts.longest, "the longest row of the data")
    assert step_length(model, run.values, "unread") == (64, "tokenizer.max_seq_len")
    assert step_length(model, {**run.values, "tokenizer": {}}, "unread")[0] == 512


def test_counts_are_those_of_torchtunes_data_sets(counted: dict[str, Any]) -> None:
    plain, packed, two, texts = (counted[name] for name in ("plain", "packed", "two", "texts"))
    assert [counted[f"again {index}"] for index in range(1000)] == [plain] * 1000
    assert (plain.rows, plain.truncated, plain.steps, plain.tokens_seen) == (64, 0, 16, plain.tokens)
    assert 0 < plain.learned < plain.tokens
    assert (counted["cut"].truncated, counted["cut"].longest, counted["cut"].tokens) == (64, 20, 64 * 20)
    assert counted["linked"] == counted["cut"]
    assert (packed.tokens, packed.samples, packed.longest, packed.steps) == (plain.tokens, 64, 200, packed.rows)
    assert plain.tokens / 200 <= packed.rows <= 64 / (200 // plain.longest) + 1
    assert texts.rows == -(-texts.tokens // 200)
    assert texts.learned == texts.tokens
    assert (two.samples, two.steps, two.tokens) == (128, 128 // 2 // 4, 2 * plain.tokens)
    assert (counted["few"].steps, counted["few"].tokens_seen) == (2, round(plain.tokens / 8))


def test_data_that_cannot_be_counted_have_a_reason(counted: dict[str, Any]) -> None:
    assert counted["hub"].startswith("the data cannot be counted here: ")
    assert counted["no epochs"] == "batch_size, gradient_accumulation_steps, epochs should be whole numbers above 0"


def test_a_broken_environment_is_an_error() -> None:
    broken = torchtune.Environment("/bin/false", Path("/nowhere"))
    with pytest.raises(ConfigError, match=r"inside_counts\.py could not run with /bin/false: exit code 1"):
        torchtune_counts(broken, [({}, 1)])
