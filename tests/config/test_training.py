"""PretrainConfig and SFTConfig: what they refuse, and that every shipped config is one."""

import re
from pathlib import Path
from typing import Any

import pytest

from lacuna.config.files import check, merge_layers, read_layer
from lacuna.config.training import ALTERNATIVES, MAY_CHANGE_ON_RESUME, PretrainConfig, SFTConfig
from lacuna.config.training import FLAT as TRAINERS
from lacuna.errors import ConfigError
from lacuna.runs.folder import write_config

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*ROOT.glob("configs/*.toml"), *ROOT.glob("examples/quickstart/*.toml")])
MINIMAL = {"model_name": "m", "dataset": "d", "output_dir": "o"}


def problems(trainer: str = "sft", **settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check(TRAINERS[trainer], {**MINIMAL, **settings}, {})
    return error.value.problems


def test_the_least_config_is_a_model_data_a_folder_and_a_length() -> None:
    assert SFTConfig(**MINIMAL, steps=1).learning_rate == 2e-5
    assert PretrainConfig(**MINIMAL, epochs=1).learning_rate == 3e-4


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"steps": 1, "epochs": 1}, "give epochs or steps, not both"),
        ({"steps": 1, "warmup_share": 0.1, "warmup_steps": 0}, "give warmup_share or warmup_steps, not both"),
        (
            {"steps": 1, "validation_dataset": "v", "validation_share": 0.1},
            "give validation_dataset or validation_share, not both",
        ),
        ({}, "say how long to train: epochs or steps (--epochs or --steps)"),
        (
            {"steps": 1, "batch_size": 6, "micro_batch_size": 4},
            "batch_size 6 is not a multiple of micro_batch_size 4: try --micro-batch-size 3",
        ),
        (
            {"steps": 1, "batch_size": 7, "micro_batch_size": 8},
            "batch_size 7 is not a multiple of micro_batch_size 8: try --micro-batch-size 7",
        ),
        (
            {"steps": 1, "evaluate_every": 5, "keep_best": 3, "final_weights": "best", "validation_split": "test"},
            "evaluate_every, final_weights, keep_best, validation_split: there is no validation; "
            "give validation_dataset or validation_share",
        ),
        ({"steps": 1, "split_seed": 7}, "split_seed decides what validation_share keeps, which is not given"),
        ({"steps": 1, "tracker_project": "p"}, "tracker_project is W&B's: it needs tracker = 'wandb'"),
        (
            {"steps": 1, "tracker": "tensorboard", "tracker_project": "p"},
            "tracker_project is W&B's: it needs tracker = 'wandb'",
        ),
    ],
)
@pytest.mark.parametrize("trainer", ["pretrain", "sft"])
def test_settings_that_disagree_are_refused(trainer: str, settings: dict[str, Any], problem: str) -> None:
    assert problems(trainer, **settings) == [problem]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"streaming": True, "epochs": 1}, "streaming does not know the length of the data: give steps, not epochs"),
        (
            {"streaming": True, "steps": 1, "validation_share": 0.1},
            "streaming cannot set a share aside: give validation_dataset",
        ),
        ({"steps": 1, "streaming_window": 5}, "streaming_window needs streaming = true"),
    ],
)
def test_what_streaming_cannot_do_is_refused(settings: dict[str, Any], problem: str) -> None:
    assert problems("pretrain", **settings) == [problem]


def test_all_disagreements_are_listed_at_once() -> None:
    found = problems("pretrain", batch_size=3, micro_batch_size=2, tracker_project="p", streaming_window=5)
    assert [problem.split(":")[0].split(" ")[0] for problem in found] == [
        "say", "batch_size", "tracker_project", "streaming_window"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"validation_share": 0.1, "evaluate_every": 5, "keep_best": 3, "final_weights": "best"},
        {"validation_dataset": "v", "validation_split": "test"},
        {"keep_best": 0},
        {"tracker": "wandb", "tracker_project": "p"},
        {"warmup_steps": 10},
        {"warmup_steps": 0, "warmup_share": None},
        {"warmup_share": 0.0},
    ],
)
def test_settings_that_agree_are_taken(settings: dict[str, Any]) -> None:
    config = SFTConfig(**MINIMAL, steps=1, **settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_given_warmup_steps_replace_the_default_share() -> None:
    config = SFTConfig(**MINIMAL, steps=1, warmup_steps=10)
    assert (config.warmup_steps, config.warmup_share) == (10, None)


def test_no_warmup_at_all_is_a_share_of_zero() -> None:
    assert SFTConfig(**MINIMAL, steps=1, warmup_share=None).warmup_share == 0.0


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        SFTConfig(**MINIMAL, steps=1).seed = 3


@pytest.mark.parametrize("name", ["configs/pretrain_qwen.toml", "configs/sft_qwen.toml"])
def test_the_starting_points_are_shipped(name: str) -> None:
    assert ROOT / name in SHIPPED


@pytest.mark.parametrize("name", ["examples/quickstart/pretrain.toml", "examples/quickstart/sft.toml"])
def test_the_quickstart_is_shipped(name: str) -> None:
    assert ROOT / name in SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_parses_and_says_its_trainer(path: Path) -> None:
    layer = read_layer(path)
    model = TRAINERS[layer.values["trainer"]]
    config = check(model, *merge_layers([layer], ALTERNATIVES))
    assert config.model_fields_set == set(layer.values) | {"warmup_share"} & config.model_fields_set


@pytest.mark.parametrize("model", TRAINERS.values())
def test_every_setting_is_described_in_a_sentence(model: type[SFTConfig]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        assert re.fullmatch(r"[A-Za-z].*[.]", field.description), (name, field.description)


@pytest.mark.parametrize("trainer", ["pretrain", "sft"])
@pytest.mark.parametrize("length", [{"steps": 4}, {"epochs": 2}])
@pytest.mark.parametrize("more", [{}, {"validation_share": 0.5}, {"warmup_steps": 0}, {"warmup_share": None}])
def test_the_config_that_a_run_writes_can_be_run_again(
    tmp_path: Path, trainer: str, length: dict[str, Any], more: dict[str, Any]
) -> None:
    config = TRAINERS[trainer](**MINIMAL, **length, **more)
    write_config(tmp_path, config)
    assert check(TRAINERS[trainer], *merge_layers([read_layer(tmp_path / "config.toml")], ALTERNATIVES)) == config


def test_what_may_change_on_resume_are_settings() -> None:
    assert set(SFTConfig.model_fields) >= MAY_CHANGE_ON_RESUME
