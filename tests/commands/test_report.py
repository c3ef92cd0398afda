"""From run folders to means, effects, differences and a verdict."""

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import lacuna
from conftest import Run
from experiment_folders import FINETUNE, SFT, validated, write_experiment, write_run
from lacuna.config.yaml_format import dump_yaml
from lacuna.errors import ConfigError, RunError
from lacuna.files import digest, write_json
from lacuna.launch.selection import missing_and_finished
from lacuna.reports.statistics import Measured, compare, effect_of, estimate, seeds_needed
from lacuna.runs.mapping import read_mapping, seal

RATES = {"learning_rate": [1e-3, 2e-3]}
LOW, HIGH = "learning_rate=0.001", "learning_rate=0.002"
HAND = {1e-3: {1: 1.0, 2: 1.2, 3: 1.4}, 2e-3: {1: 1.5, 2: 1.8, 3: 1.8}}
"""Means 1.2 and 1.7; differences 0.5, 0.6, 0.4: mean 0.5, deviation 0.1, t² = (0.5 / 0.1)² · 3 = 75.

With two degrees of freedom, p = 1 - t / √(t² + 2).
"""
T_OF_2 = 4.302653
"""97.5 % quantile of Student's t with two degrees of freedom, as any table has it."""


def write_study(folder: Path, losses: Any, **experiment: Any) -> list[dict[str, Any]]:
    """An experiment whose runs end with these losses, by learning rate and seed; those that are not there are not
    started."""
    seeds = sorted({seed for values in losses.values() for seed in values if seed is not None})
    entries = write_experiment(folder, variables={"learning_rate": [*losses]}, seeds=seeds, **experiment)
    for entry in entries:
        loss = losses[entry["params"]["learning_rate"]].get(entry["seed"])
        if loss is not None:
            write_run(folder, entry, validated(4.0, loss))
    return entries


def test_an_example_worked_by_hand(tmp_path: Path, run: Run) -> None:
    write_study(tmp_path, HAND, question="[red]Which rate? :smile:")
    made = lacuna.report(tmp_path / "configs")
    low, high = (arm.estimate for arm in made.arms)
    assert low is not None
    assert high is not None
    assert (low.mean, high.mean) == pytest.approx((1.2, 1.7))
    assert low.deviation == pytest.approx(0.2)
    assert (low.low, low.high) == pytest.approx((1.2 - T_OF_2 * 0.2 / 3**0.5, 1.2 + T_OF_2 * 0.2 / 3**0.5), rel=1e-6)
    of_arms, of_values = made.comparisons
    assert (of_arms.variable, of_arms.best, of_arms.other) == (None, LOW, HIGH)
    assert (of_values.variable, of_values.best, of_values.other) == ("learning_rate", "0.001", "0.002")
    for one in (of_arms, of_values):
        assert one.difference.mean == pytest.approx(0.5)
        assert one.difference.low == pytest.approx(0.5 - T_OF_2 * 0.1 / 3**0.5, rel=1e-6)
        assert one.p_value == pytest.approx(1 - (75 / 77) ** 0.5)
        assert one.is_clear
    assert made.winner == LOW
    assert (made.metric, made.goal) == ("validation_loss", "lowest")
    assert (made.totals["runs"], made.totals["finished"]) == (6, 6)
    printed = run("lacuna", "report", tmp_path / "configs" / "run_mapping.yaml").output
    for words in (
        "question: [red]Which rate? :smile:",
        "learning_rate=0.001 has the lowest validation_loss: 1.2 on average, clearly better than the other arm "
        "over 3 seeds",
        "A learning_rate=0.001 1.2 [0.7032, 1.697] 3/3",
        "B − A 0.5 [0.2516, 0.7484] 0.013 yes",
        "005 B: 0.002 3 finished 1.8 100",
        "6 of 6 runs finished",
    ):
        assert words in printed
    assert printed.index("has the lowest") < printed.index("Arms") < printed.index("Runs")


def test_the_goal_decides_which_arm_is_best(tmp_path: Path) -> None:
    write_study(tmp_path, HAND)
    made = lacuna.report(tmp_path / "configs", goal="highest")
    assert made.winner == HIGH
    assert made.comparisons[0].difference.mean == pytest.approx(-0.5)


def test_arms_that_cannot_be_told_apart(tmp_path: Path) -> None:
    write_study(tmp_path, {1e-3: {1: 1.0, 2: 1.2, 3: 1.4}, 2e-3: {1: 1.5, 2: 1.0, 3: 1.6}})
    made = lacuna.report(tmp_path / "configs")
    assert made.winner is None
    needed = seeds_needed(made.comparisons[0].difference, 1)
    assert needed is not None
    assert made.verdict == (
        f"no winner: {LOW} and {HIGH} cannot be told apart with 3 seeds; about {needed} seeds might do it, an "
        "estimate from these few"
    )


def test_one_seed_names_no_winner(tmp_path: Path) -> None:
    """Also where the experiment has no seeds at all."""
    for name, seeds in (("none", []), ("one", [7])):
        folder = tmp_path / name
        for entry in write_experiment(folder, variables=RATES, seeds=seeds):
            write_run(folder, entry, validated(1000 * entry["params"]["learning_rate"]))
        made = lacuna.report(folder / "configs")
        assert made.winner is None
        assert made.verdict == "one seed: no winner can be named; add `seeds: [1, 2, 3]` to the experiment"
        assert [run.seed for run in made.runs] == [*(seeds or [None]), *(seeds or [None])]
        assert made.comparisons[0].p_value is None
        assert made.arms[0].estimate == estimate([1.0])


def test_seeds_without_effect_are_no_certainty(tmp_path: Path) -> None:
    write_study(tmp_path, {1e-3: {1: 1.0, 2: 1.0}, 2e-3: {1: 1.5, 2: 1.5}})
    made = lacuna.report(tmp_path / "configs")
    assert made.winner is None
    assert made.verdict.startswith("no winner: the seeds made no difference, every arm has the same validation_loss")
    assert f"the seed makes no difference in {LOW}; {HIGH}: no uncertainty is known of it" in made.notes
    assert (made.comparisons[0].difference.low, made.comparisons[0].is_clear) == (None, False)


def test_equal_counts_are_not_a_seed_without_effect(tmp_path: Path) -> None:
    """Three seeds that answer as many questions right have not given the same model."""
    for name, high in (("differs", [0.0, 0.03, 0.01]), ("none", [0.5, 0.5, 0.5])):
        folder = tmp_path / name
        entries = write_study(folder, {1e-3: {1: 1.0, 2: 1.2, 3: 1.4}, 2e-3: {1: 1.5, 2: 1.0, 3: 1.6}})
        for entry, right in zip(entries, [0.98, 0.98, 0.98, *high], strict=True):
            evaluation = {"held_out_accuracy": right}
            Path(entry["output_dir"], "evaluation.json").write_text(json.dumps(evaluation))
    made = lacuna.report(tmp_path / "differs" / "configs", metric="held_out_accuracy")
    assert f"the same held_out_accuracy with each of 3 seeds: {LOW}" in made.notes
    assert not [note for note in made.notes if "the seed makes no difference" in note]
    assert made.winner == LOW
    difference = made.comparisons[0].difference
    deviation = (sum((value - 0.04 / 3) ** 2 for value in (0.0, 0.03, 0.01)) / 2) ** 0.5
    assert difference.mean == pytest.approx(0.04 / 3 - 0.98)
    assert difference.low is not None
    assert difference.mean - difference.low == pytest.approx(T_OF_2 * deviation / 3**0.5, rel=1e-6)
    made = lacuna.report(tmp_path / "none" / "configs", metric="held_out_accuracy")
    assert f"the same held_out_accuracy with each of 3 seeds: {LOW}; {HIGH}" in made.notes
    assert made.verdict == (
        "no winner: every arm has the same held_out_accuracy with each of its seeds; so no uncertainty is known"
    )


def test_arms_that_are_equal_at_every_seed(tmp_path: Path) -> None:
    write_study(tmp_path, {1e-3: {1: 1.0, 2: 1.1}, 2e-3: {1: 1.0, 2: 1.1}})
    made = lacuna.report(tmp_path / "configs")
    assert made.verdict == f"no winner: {LOW} and {HIGH} cannot be told apart with 2 seeds"
    assert f"{HIGH} and {LOW} are equal at every seed: what varies there changes nothing" in made.notes


def test_failed_and_missing_runs_are_said_and_do_not_count(tmp_path: Path, run: Run) -> None:
    entries = write_study(tmp_path, {1e-3: {1: 1.0, 2: 1.2, 3: 1.4}, 2e-3: {1: 1.5, 2: None, 3: None}})
    write_run(tmp_path, entries[4], validated(0.1), state="failed", reason="step 7: the loss is nan")
    made = lacuna.report(tmp_path / "configs")
    assert [run.state for run in made.runs[3:]] == ["finished", "failed", "not started"]
    assert (made.runs[4].metrics, made.runs[4].reason) == ({}, "step 7: the loss is nan")
    assert made.runs[4].curves == {"validation_loss": [(100, 0.1)]}
    assert [(len(arm.by_seed), arm.expected) for arm in made.arms] == [(3, 3), (1, 3)]
    assert made.verdict == f"no winner: {HIGH}: fewer than two finished seeds"
    (effect,) = made.effects
    assert (effect.matched, effect.left_out) == (1, 2)
    assert [level.estimate.mean for level in effect.levels] == [1.0, 1.5]
    printed = run("lacuna", "report", tmp_path / "configs").output
    assert "2 of 6 runs have no result: 1 failed, 1 not started" in printed
    assert "run_004 (learning_rate=0.002): failed: step 7: the loss is nan" in printed
    assert "not all arms have the same finished seeds" in printed
    assert "learning_rate: 2 finished runs left out of its effect" in printed


def test_comparisons_take_the_seeds_that_both_arms_have(tmp_path: Path) -> None:
    write_study(tmp_path, {1e-3: {1: 1.0, 2: 1.2, 3: 1.4, 4: None}, 2e-3: {1: None, 2: 1.8, 3: 1.9, 4: 1.7}})
    difference = lacuna.report(tmp_path / "configs").comparisons[0].difference
    assert (difference.count, difference.mean) == (2, pytest.approx(0.55))


def test_arms_without_a_common_seed(tmp_path: Path) -> None:
    write_study(tmp_path, {1e-3: {1: 1.0, 2: 1.2, 3: None, 4: None}, 2e-3: {1: None, 2: None, 3: 1.9, 4: 1.7}})
    made = lacuna.report(tmp_path / "configs")
    assert made.comparisons[0].difference.mean == pytest.approx(0.7)
    assert made.verdict.endswith("have 0 seeds in common, and differences are paired over seeds")
    assert "learning_rate: no combination of the rest has finished with every value: no effect is known" in made.notes


def test_an_arm_that_never_finished_leaves_no_winner(tmp_path: Path) -> None:
    write_study(tmp_path, {**HAND, 1.0: {1: None, 2: None, 3: None}})
    made = lacuna.report(tmp_path / "configs")
    assert made.winner is None
    assert made.verdict == (
        "no winner: learning_rate=1.0: fewer than two finished seeds; "
        f"of the others, {LOW} is the best, clearly better than each"
    )


def test_the_best_on_average_that_loses_over_common_seeds_is_no_winner(tmp_path: Path) -> None:
    losses = {1e-3: {1: 2.0, 2: 2.1, 3: 2.2, 4: 0.1, 5: 0.1}, 2e-3: {1: 1.5, 2: 1.61, 3: 1.7, 4: None, 5: None}}
    write_study(tmp_path, losses)
    made = lacuna.report(tmp_path / "configs")
    assert (made.comparisons[0].best, made.comparisons[0].is_clear) == (LOW, True)
    assert made.winner is None


def test_a_folder_with_a_run_of_other_settings_is_not_taken_for_the_run(tmp_path: Path) -> None:
    write_study(tmp_path, HAND)
    text = (tmp_path / "runs/run_001/config.toml").read_text()
    (tmp_path / "runs/run_001/config.toml").write_text(text.replace("batch_size = 8", "batch_size = 16"))
    (tmp_path / "runs/run_002/config.toml").unlink()
    (tmp_path / "runs/run_003/config.toml").write_text(text.replace('"sft"', '"pretrain"'))
    (tmp_path / "runs/run_004/config.toml").write_text(text.replace("steps = 100", "steps = 0"))
    made = lacuna.report(tmp_path / "configs")
    assert [run.state for run in made.runs] == ["finished", *["other settings"] * 4, "finished"]
    reasons = [run.reason for run in made.runs[1:5]]
    assert reasons[0] == f"the run in {tmp_path}/runs/run_001 has other settings (batch_size was 16, now 8)"
    assert reasons[1] == "the folder has no config.toml, which would say whose run it is"
    assert reasons[2] == f"output_dir {tmp_path}/runs/run_003 holds a pretrain run"
    assert "'steps' is 0" in reasons[3]
    assert [dict(arm.by_seed) for arm in made.arms] == [{1: 1.0}, {3: 1.8}]
    assert made.notes[0].startswith("4 folders with a run of other settings, which counts nowhere: run_001: the run")


def test_settings_that_vary_tell_runs_apart_also_where_a_resumed_run_may_change_them(tmp_path: Path) -> None:
    """Generated again with the values the other way round, each folder holds the other value's run."""
    entries = write_experiment(tmp_path, variables={"save_every": [25, 50]})
    for entry in entries:
        write_run(tmp_path, entry, validated(1.0))
    assert [run.state for run in lacuna.report(tmp_path / "configs").runs] == ["finished"] * 2
    write_experiment(tmp_path, variables={"save_every": [50, 25]})
    runs = lacuna.report(tmp_path / "configs").runs
    assert [run.state for run in runs] == ["other settings"] * 2
    assert runs[0].reason.endswith("has other settings (save_every was 25, now 50)")
    mapping = read_mapping(tmp_path / "configs")
    with pytest.raises(ConfigError, match=r"run_001: .* has other settings .save_every was 50, now 25.: move"):
        missing_and_finished(mapping, range(2))


def test_the_final_value_is_of_the_weights_that_the_run_was_told_to_keep(tmp_path: Path) -> None:
    """final_weights may change on resume; of a run that has finished, a later change is none of its weights."""
    (entry,) = write_experiment(tmp_path)
    write_run(tmp_path, entry, validated(4.0, 1.0, 2.0, 1.5))
    write_experiment(tmp_path, {**SFT, "final_weights": "best"})
    made = lacuna.report(tmp_path / "configs")
    assert made.runs[0].metrics == {"validation_loss": 1.5}
    assert made.how == "of the weights in final/: those of the last step"


def test_metrics_that_were_cut_off_give_no_final_value(tmp_path: Path) -> None:
    entries = write_study(tmp_path, HAND)
    file = tmp_path / "runs/run_001/metrics.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    write_json(Path(entries[1]["output_dir"]) / "evaluation.json", {"accuracy": 0.5})
    made = lacuna.report(tmp_path / "configs")
    assert made.runs[1].metrics == {"accuracy": 0.5}
    assert made.runs[1].reason == "metrics.jsonl ends at step 50 of 100: some of it is lost"
    assert "1 finished run without a number for validation_loss, not counted: run_001" in made.notes


def test_inputs_that_changed_between_two_runs_are_said(tmp_path: Path) -> None:
    entries = write_experiment(tmp_path, variables=RATES)
    for entry, state in zip(entries, "ab", strict=True):
        facts = {
            "data_files": [{"path": "data.jsonl", "sha256": state}, {"path": "same.jsonl", "sha256": "s"}],
            "model": "tiny", "weights_fingerprint": state, "tokenizer": "tiny", "tokenizer_sha256": "t",
            "git": {"commit": "c", "diff_sha256": None if state == "a" else "d"}, "lacuna_git": {"commit": state},
        }  # fmt: skip
        write_run(tmp_path, entry, validated(1.0), facts=facts)
    assert lacuna.report(tmp_path / "configs").notes[-3:] == (
        "not all runs were made from the same files: data.jsonl; model tiny changed between two runs",
        "runs were made at 2 different states of the git repository that they were started in",
        "runs were made at 2 different states of lacuna's source",
    )


@pytest.mark.parametrize(
    ("variables", "facts", "note"),
    [
        ({"validation_share": [0.1, 0.2]}, [{}, {}], "runs have their validation_loss from different data, so it"),
        (
            RATES,
            [{"tokenizer_sha256": "a"}, {"tokenizer_sha256": "b"}],
            "runs have different tokenizers: validation_loss",
        ),
        (
            {"dataset": ["a.jsonl", "b.jsonl"]},
            [{"data_files": [{"use": "training", "path": name, "sha256": name}]} for name in "ab"],
            "runs have their validation_loss from different data, so it",
        ),
        (
            {"dataset": ["a.jsonl", "b.jsonl"]},
            [
                {"data_files": [{"use": "training", "path": name}, {"use": "validation", "path": "v", "sha256": "v"}]}
                for name in "ab"
            ],
            None,
        ),
    ],
)
def test_losses_that_cannot_be_compared_are_said(
    tmp_path: Path, variables: Any, facts: list[dict[str, Any]], note: str | None
) -> None:
    for entry, more in zip(write_experiment(tmp_path, variables=variables), facts, strict=True):
        run = write_run(tmp_path, entry, validated(1.0), facts=more)
        write_json(run / "evaluation.json", {"accuracy": 0.5})
    notes = lacuna.report(tmp_path / "configs").notes
    assert "different data" not in "".join(notes) if note is None else notes[0].startswith(note)
    assert not any("different data" in found for found in lacuna.report(tmp_path / "configs", "accuracy").notes)


def test_runs_whose_validation_rows_came_from_the_seed_are_told(tmp_path: Path) -> None:
    """Of an older lacuna, which kept no version of its preparation."""
    of_today, of_then = {"data_preparation": "2"}, {}
    for entry, more in zip(write_experiment(tmp_path, variables=RATES), (of_today, of_then), strict=True):
        files = [{"use": "training", "path": "a.jsonl", "sha256": "a"}]
        write_run(tmp_path, entry, validated(1.0), facts={"data_files": files, **more})
    notes = lacuna.report(tmp_path / "configs").notes
    assert notes[0].startswith("runs have their validation_loss from different data")
    assert notes[1] == (
        "1 run begun by an older version of lacuna, which drew the validation rows by the run's seed and could train "
        "on copies of them (run_001): compare them with each other only; without its folder, a run is trained anew"
    )


DAMAGED = [b"", b"\xff", b"[]", b"{}", b'{"starts": [5]}', b'{"starts": null}', b'{"starts": [{"devices": "x"}]}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_provenance_is_told(tmp_path: Path, content: bytes, run: Run) -> None:
    (entry,) = write_experiment(tmp_path)
    folder = write_run(tmp_path, entry, validated(1.0))
    (folder / "provenance.json").write_bytes(content)
    for command, target in (("report", tmp_path / "configs"), ("run", tmp_path / "configs"), ("replay", folder)):
        outcome = run("lacuna", command, target)
        assert (outcome.code, "provenance.json: is damaged" in outcome.output) == (2, True), outcome.output
        assert "Traceback" not in outcome.output


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"state": 5}', b'{"state": "finished", "step": "x"}', b'{"state": "finished", "loss": []}'],
)
def test_a_damaged_status_is_no_finished_run_and_no_crash(tmp_path: Path, content: bytes, run: Run) -> None:
    (entry,) = write_experiment(tmp_path)
    folder = write_run(tmp_path, entry, validated(1.0))
    (folder / "status.json").write_bytes(content)
    (found,) = lacuna.report(tmp_path / "configs").runs
    assert (found.state, found.reason) == ("died", "status.json cannot be read; starting the run mends it")
    assert "1 run: 1 died" in run("lacuna", "status", tmp_path / "configs").output


@pytest.mark.parametrize("content", ["x", '[{"job": "1"}]', "5"])
def test_a_damaged_record_of_jobs_is_told(tmp_path: Path, content: str, run: Run) -> None:
    write_experiment(tmp_path)
    (tmp_path / "configs" / "slurm_jobs.json").write_text(content)
    outcome = run("lacuna", "report", tmp_path / "configs")
    assert (outcome.code, "slurm_jobs.json: is damaged" in outcome.output) == (2, True)


def test_lines_of_metrics_that_are_none_are_left_out(tmp_path: Path) -> None:
    (entry,) = write_experiment(tmp_path)
    folder = write_run(tmp_path, entry, validated(1.0))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\n[1]\nnull\n{"loss": 1}\n{"step": "a", "loss": 1}\n{"step": 1' + b"0" * 5000 + b"}\n")
    assert lacuna.report(tmp_path / "configs").runs[0].metrics == {"validation_loss": 1.0}


def test_what_may_change_on_resume_makes_no_other_run(tmp_path: Path) -> None:
    write_study(tmp_path, HAND)
    file = tmp_path / "runs/run_001/config.toml"
    file.write_text(file.read_text().replace("log_every = 10", "log_every = 5"))
    assert lacuna.report(tmp_path / "configs").totals["finished"] == 6


@pytest.mark.parametrize(
    ("more", "losses", "final"),
    [
        ({}, [4.0, 1.0, 2.0, 1.5], 1.5),
        ({"final_weights": "best"}, [4.0, 1.0, 2.0, 1.5], 1.0),
        ({"final_weights": "best", "save_every": 75}, [4.0, 1.0, 2.0, 2.5], 2.0),
        ({"final_weights": "best", "keep_best": 0, "keep_last": 1}, [4.0, 1.0, 2.0, 1.5], 1.5),
    ],
)
def test_a_validation_loss_is_of_the_weights_in_final(
    tmp_path: Path, more: dict[str, Any], losses: list[float], final: float
) -> None:
    (entry,) = write_experiment(tmp_path, {**SFT, "save_every": 25, "evaluate_every": 25, **more})
    write_run(tmp_path, entry, [{"step": 0, "validation_loss": 0.5}, *validated(*losses)])
    made = lacuna.report(tmp_path / "configs")
    assert made.runs[0].metrics["validation_loss"] == final
    assert ("best checkpoint" in made.how) == bool(more)
    assert made.verdict == f"one arm, nothing to compare: validation_loss {final:.4g} over 1 seed"


def test_a_training_loss_is_the_mean_of_the_last_tenth(tmp_path: Path) -> None:
    (entry,) = write_experiment(tmp_path)
    lines = [{"step": step, "loss": 100 - step, "gradient_norm": step / 2, "tokens": 8 * step} for step in range(1, 21)]
    write_run(
        tmp_path, entry, [*lines, {"no": "step"}], step=20, seconds=7200.0, facts={"device": "H100", "devices": 4}
    )
    (run,) = lacuna.report(tmp_path / "configs").runs
    assert run.metrics == {"loss": 80.5, "gradient_norm": 10.0, "tokens": 160}
    assert run.curves["gradient_norm"][:2] == [(1, 0.5), (2, 1.0)]
    assert run.budget == {
        "steps": 20, "tokens": 160, "batch_size": 8, "packing": True, "seconds": 7200.0, "devices": 4,
        "gpu_hours": 8.0,
    }  # fmt: skip
    assert lacuna.report(tmp_path / "configs").totals == {"runs": 1, "finished": 1, "tokens": 160, "gpu_hours": 8.0}


def test_targets_are_known_where_every_step_is_logged(tmp_path: Path) -> None:
    (entry,) = write_experiment(tmp_path)
    write_run(tmp_path, entry, [{"step": step, "loss": 1.0, "targets": step} for step in range(1, 101)], seconds=36.0)
    made = lacuna.report(tmp_path / "configs")
    assert made.runs[0].budget["targets"] == 5050
    assert made.totals["cpu_hours"] == pytest.approx(0.01)


def test_metrics_of_a_users_own_evaluation(tmp_path: Path, run: Run) -> None:
    for entry in write_study(tmp_path, HAND):
        accuracy = 0.9 - entry["params"]["learning_rate"] * 100 + entry["seed"] / 100
        write_json(Path(entry["output_dir"]) / "evaluation.json", {"accuracy": accuracy, "length": 5})
    made = lacuna.report(tmp_path / "configs", metric="accuracy")
    assert (made.goal, made.how) == ("highest", "as each run's evaluation.json has it")
    assert made.winner == LOW
    assert made.comparisons[0].difference.mean == pytest.approx(-0.1)
    refused = run("lacuna", "report", tmp_path / "configs", "--metric", "length")
    assert refused.code == 2
    assert (
        "--metric length: its name does not say what is better: add --goal lowest or --goal highest" in refused.output
    )
    assert run("lacuna", "report", tmp_path / "configs", "--metric", "length", "--goal", "lowest").code == 0
    unknown = run("lacuna", "report", tmp_path / "configs", "--metric", "acuracy")
    assert "no run has it; did you mean 'accuracy'?; there are accuracy, length, validation_loss" in unknown.output
    assert lacuna.report(tmp_path / "configs", metric="eval_loss").metric == "validation_loss"


def test_without_a_loss_the_metric_has_to_be_chosen(tmp_path: Path) -> None:
    (entry,) = write_experiment(tmp_path)
    write_json(write_run(tmp_path, entry) / "evaluation.json", {"f1": 0.5, "accuracy": 1})
    with pytest.raises(ConfigError, match="no run has validation_loss or loss: choose a --metric: accuracy, f1"):
        lacuna.report(tmp_path / "configs")
    with pytest.raises(ConfigError, match="--goal least: it is lowest or highest"):
        lacuna.report(tmp_path / "configs", metric="f1", goal="least")  # type: ignore[arg-type]
    assert lacuna.report(tmp_path / "configs", metric="f1").verdict == "one arm, nothing to compare: f1 0.5 over 1 seed"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"accuracy": "0.9"}', "'accuracy' is '0.9', which is no finite number"),
        ('{"f1": true}', "'f1' is True, which is no finite number"),
        ('{"f1": NaN}', "'f1' is nan, which is no finite number"),
        ('{"f1": 1' + "0" * 400 + "}", "which is no finite number"),
        ("[1]", "should be one JSON object of numbers"),
        ("{", "cannot be read"),
        ('{"validation_loss": 1.0}', "validation_loss: metrics.jsonl has that name too: choose another"),
    ],
)
def test_an_evaluation_that_cannot_be_read_is_no_silence(tmp_path: Path, text: str, problem: str) -> None:
    write_study(tmp_path, HAND)
    for name in ("run_000", "run_005"):
        (tmp_path / "runs" / name / "evaluation.json").write_text(text)
    with pytest.raises(RunError) as error:
        lacuna.report(tmp_path / "configs")
    assert [str(tmp_path / "runs/run_000") in error.value.problems[0], len(error.value.problems)] == [True, 2]
    assert all(problem in line for line in error.value.problems)


def test_what_is_no_number_does_not_count(tmp_path: Path) -> None:
    entries = write_study(tmp_path, {1e-3: {1: 1.0, 2: 1.2}, 2e-3: {1: 1.5, 2: None}})
    write_run(tmp_path, entries[3], validated(3.0, math.nan))
    made = lacuna.report(tmp_path / "configs")
    assert dict(made.arms[1].by_seed) == {1: 1.5}
    assert made.runs[3].curves == {"validation_loss": [(50, 3.0)]}
    assert made.runs[3].reason == "not a number: validation_loss"
    assert "1 finished run without a number for validation_loss, not counted: run_003" in made.notes


def test_before_anything_has_finished(tmp_path: Path, run: Run) -> None:
    """Also: of many runs only some are listed."""
    rates = [step / 1000 for step in range(1, 43)]
    entries = write_experiment(tmp_path, variables={"learning_rate": rates})
    write_run(tmp_path, entries[0], [{"step": 1, "loss": 4.0}], state="interrupted", reason="stopped after step 1")
    made = lacuna.report(tmp_path / "configs")
    assert made.verdict == "no results: no run has finished (1 interrupted, 41 not started)"
    assert (made.metric, made.comparisons) == ("loss", ())
    printed = run("lacuna", "report", tmp_path / "configs").output
    assert "Arms, the 40 best of 42" in printed
    assert "Runs, the first 40 of 42 (--csv has all)" in printed
    assert "… and 2 more (--csv has all)" in printed
    assert "AN learning_rate=0.04 no finished run 0/1" in printed
    assert lacuna.report(tmp_path / "configs", metric="loss").verdict == made.verdict


def test_a_metric_that_only_unfinished_runs_have(tmp_path: Path) -> None:
    entries = write_study(tmp_path, HAND)
    (tmp_path / "runs/run_000/status.json").write_text('{"state": "failed", "step": 9, "reason": "disk full"}')
    (tmp_path / "runs/run_000/metrics.jsonl").write_text('{"step": 9, "loss": 1.0}\n')
    assert len(entries) == 6
    made = lacuna.report(tmp_path / "configs", metric="loss")
    assert made.verdict == "no results: no finished run has loss"


def test_a_seed_among_the_variables_is_the_seed(tmp_path: Path) -> None:
    entries = write_experiment(tmp_path, variables={**RATES, "seed": [1, 2, 3]})
    for entry in entries:
        write_run(tmp_path, entry, validated(HAND[entry["params"]["learning_rate"]][entry["params"]["seed"]]))
    made = lacuna.report(tmp_path / "configs")
    assert made.winner == LOW
    assert [arm.name for arm in made.arms] == [LOW, HIGH]
    assert [effect.variable for effect in made.effects] == ["learning_rate"]


def test_effects_of_two_variables_and_differences_in_budget(tmp_path: Path, run: Run) -> None:
    entries = write_experiment(tmp_path, variables={**RATES, "batch_size": [8, 16]}, seeds=[1, 2])
    for entry in entries:
        rate, rows = entry["params"]["learning_rate"], entry["params"]["batch_size"]
        loss = 1000 * rate + rows / 8 + entry["seed"] / 10 + (rate > 1e-3) * entry["seed"] / 100
        write_run(tmp_path, entry, [*validated(loss), {"step": 100, "loss": 1.0, "tokens": rows * 1000}])
    made = lacuna.report(tmp_path / "configs")
    rate, batch = made.effects
    assert (rate.variable, rate.matched, rate.left_out) == ("learning_rate", 4, 0)
    assert [dict(level.by_seed) for level in rate.levels] == [
        {1: pytest.approx(2.6), 2: pytest.approx(2.7)},
        {1: pytest.approx(3.61), 2: pytest.approx(3.72)},
    ]
    assert [level.value for level in batch.levels] == [8, 16]
    of_variables = [one for one in made.comparisons if one.variable is not None]
    assert [(one.best, one.other) for one in of_variables] == [("0.001", "0.002"), ("8", "16")]
    p_value = stats.ttest_rel([3.61, 3.72], [2.6, 2.7]).pvalue
    assert of_variables[0].p_value == pytest.approx(2 * p_value)
    assert len(made.comparisons) == 3 + 2
    said = f"8,000 in {LOW}, batch_size=8; {HIGH}, batch_size=8 | 16,000 in {LOW}, batch_size=16; {HIGH}, batch_size=16"
    assert f"arms differ in tokens trained on: {said}" in made.notes
    assert any(note.startswith("arms differ in effective batch size: 8 in") for note in made.notes)
    printed = run("lacuna", "report", tmp_path / "configs").output
    assert "learning_rate, over 4 matched combinations" in printed
    assert "batch_size: 16 − 8" in printed


def test_settings_that_vary_together_are_one_variable(tmp_path: Path) -> None:
    pairs = [{"learning_rate": 1e-3, "batch_size": 8}, {"learning_rate": 2e-3, "batch_size": 16}]
    entries = write_experiment(tmp_path, paired=pairs, variables={"packing": [True, False]}, seeds=[1, 2])
    for entry in entries:
        write_run(tmp_path, entry, validated(entry["params"]["batch_size"] + entry["seed"] ** 2))
    made = lacuna.report(tmp_path / "configs")
    assert [effect.variable for effect in made.effects] == ["packing", "learning_rate, batch_size"]
    assert [level.value for level in made.effects[1].levels] == pairs
    assert made.comparisons[-1].other == "learning_rate=0.002, batch_size=16"
    assert any(note.startswith("arms differ in packing: true in") for note in made.notes)


def test_the_batch_of_an_adapter_run_counts_its_processes(tmp_path: Path) -> None:
    entries = write_experiment(tmp_path, FINETUNE, variables={"lora_rank": [8, 16]})
    for entry, device, version in zip(entries, ("H100", "A100"), ("2.13", "2.14"), strict=True):
        facts = {"device": device, "devices": 2, "packages": {"torch": version, "trl": "1.16"}}
        write_run(tmp_path, entry, validated(1.0), facts=facts)
    made = lacuna.report(tmp_path / "configs")
    assert [run.budget["batch_size"] for run in made.runs] == [32, 32]
    assert made.notes[-2:] == (
        "runs were made on different devices: A100, H100",
        "runs were made with different versions of torch: 2.13, 2.14",
    )


def test_the_runs_of_torchtune(tmp_path: Path) -> None:
    """Its configs are recognised by their bytes."""
    configs, runs = tmp_path / "configs", []
    configs.mkdir()
    for index, rate in enumerate([1e-4, 1e-4, 2e-4, 2e-4]):
        name, folder = f"run_{index:03d}", tmp_path / "runs" / f"run_{index:03d}"
        values = {"batch_size": 2, "gradient_accumulation_steps": 4, "epochs": 1, "dataset": {"packed": True}}
        text = dump_yaml({**values, "optimizer": {"lr": rate}, "seed": index % 2})
        (configs / f"{name}.yaml").write_text(text)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(text if index != 3 else "epochs: 9\n")
        write_json(folder / "status.json", {"state": "finished", "step": 0, "total_steps": None})
        (folder / "metrics.jsonl").write_text(f'{{"step": 5, "loss": {index // 2 + 1.0}}}\n')
        entry = {"id": name, "params": {"learning_rate": rate}, "seed": index % 2, "config": f"{name}.yaml"}
        runs.append({**entry, "sha256": digest(text.encode()), "output_dir": str(folder)})
    head = {"experiment": {"experiment_name": "tune"}, "trainer": "torchtune", "base": "b", "recipe": "r", "gpus": 2}
    (configs / "run_mapping.yaml").write_text(seal(dump_yaml({**head, "runs": runs})))
    made = lacuna.report(configs)
    assert [run.state for run in made.runs] == ["finished", "finished", "finished", "other settings"]
    assert "is not the config that the mapping names" in made.runs[3].reason
    budget = {"steps": 5, "batch_size": 16, "packing": True, "epochs": 1, "devices": 2}
    assert made.runs[0].budget == budget
    assert made.metric == "loss"
    assert made.verdict == "no winner: learning_rate=0.0002: fewer than two finished seeds"


def test_a_table_for_other_programs(tmp_path: Path, run: Run) -> None:
    entries = write_study(tmp_path, {1e-3: {1: 1 / 3, 2: 1.2}, 2e-3: {1: 1.5, 2: None}})
    write_run(tmp_path, entries[3], state="failed", reason='a "quoted", long\nreason')
    printed = run("lacuna", "report", tmp_path / "configs", "--csv", tmp_path / "runs.csv").output
    assert f"written: {tmp_path}/runs.csv" in printed
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [entry["id"] for entry in entries]
    assert float(rows[0]["metric.validation_loss"]) == 1 / 3
    assert (rows[2]["setting.learning_rate"], rows[2]["seed"], rows[2]["budget.packing"]) == ("0.002", "1", "true")
    assert (rows[3]["state"], rows[3]["reason"]) == ("failed", 'a "quoted", long\nreason')
    assert rows[3]["metric.validation_loss"] == ""


def test_lists_stand_in_the_table_as_json(tmp_path: Path) -> None:
    modules = [["q_proj"], ["q_proj", "v_proj"]]
    write_experiment(tmp_path, FINETUNE, variables={"target_modules": modules})
    lacuna.report(tmp_path / "configs", csv=tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="") as file:
        assert [json.loads(row["setting.target_modules"]) for row in csv.DictReader(file)] == modules


def test_json_has_the_numbers_of_python(tmp_path: Path, capfd: pytest.CaptureFixture[str], run: Run) -> None:
    write_study(tmp_path, HAND)
    made = lacuna.report(tmp_path / "configs")
    printed = json.loads(run("lacuna", "report", tmp_path / "configs", "--json").output)
    assert printed["verdict"] == made.verdict
    assert printed["arms"][0]["estimate"]["low"] == made.arms[0].estimate.low  # type: ignore[union-attr]
    assert printed["comparisons"][0]["p_value"] == made.comparisons[0].p_value
    assert "curves" not in printed["runs"][0]


def test_the_python_of_the_report_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, HAND)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    (snippet,) = [block.removeprefix("python\n") for block in text.split("```") if block.startswith("python\n")]
    exec(snippet, {})
    assert "has the lowest validation_loss" in capsys.readouterr().out
    assert lacuna.report("configs").mapping == "configs/run_mapping.yaml"


def test_what_cannot_be_reported_is_said(tmp_path: Path, run: Run) -> None:
    write_study(tmp_path, HAND)
    missing = run("lacuna", "report", tmp_path / "nothing")
    assert (missing.code, "no such folder" in missing.output) == (2, True)
    undesigned = run("lacuna", "report", tmp_path / "runs")
    assert undesigned.code == 2
    assert "no run_mapping.yaml is in it" in undesigned.output
    assert "lacuna generate EXPERIMENT.yaml" in undesigned.output
    ending = run("lacuna", "report", tmp_path / "configs", "--csv", tmp_path / "base.yaml")
    assert (ending.code, "give a file that ends in .csv" in ending.output) == (2, True)
    unwritable = run("lacuna", "report", tmp_path / "configs", "--csv", tmp_path / "no" / "runs.csv")
    assert unwritable.code == 2
    assert f"error: {tmp_path}/no/runs.csv: cannot be written: No such file or directory" in unwritable.output
    (tmp_path / "configs" / "run_003.yaml").write_text("changed: true\n")
    (tmp_path / "configs" / "run_004.yaml").unlink()
    with pytest.raises(ConfigError, match=r"2 configs are missing, or were changed .* \(run_003.yaml, run_004.yaml\)"):
        lacuna.report(tmp_path / "configs")


def test_a_run_that_was_trained(tmp_path: Path, model_folder: Path, chat_file: Path, run: Run) -> None:
    """The trainer's own folder is recognised as the mapping's run."""
    base = {**SFT, "model_name": str(model_folder), "dataset": str(chat_file), "steps": 2, "batch_size": 4}
    (entry,) = write_experiment(tmp_path, {**base, "sequence_length": 64, "device": "cpu"})
    assert run("sft", "@", tmp_path / "configs" / "run_000.yaml").code == 0
    made = lacuna.report(tmp_path / "configs")
    (trained,) = made.runs
    assert (trained.state, trained.budget["steps"], trained.seed) == ("finished", 2, entry["seed"])
    assert 5 < trained.metrics["validation_loss"] < 7
    assert trained.budget["tokens"] > 0


NUMBERS = st.floats(-100, 100).map(lambda number: round(number, 6))


@given(st.lists(NUMBERS, min_size=2, max_size=8, unique=True))
def test_an_interval_is_scipys(values: list[float]) -> None:
    found = estimate(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)


@given(st.integers(2, 8), st.integers(1, 10), st.integers())
def test_a_paired_difference_is_scipys(count: int, comparisons: int, seed: int) -> None:
    generator = random.Random(seed)
    best, other = ({seed: generator.gauss(0, 1) for seed in range(count)} for _ in range(2))
    found = compare(None, ("best", best), ("other", {**other, 99: 1.0}), comparisons)
    test = stats.ttest_rel([*other.values()], [*best.values()])
    interval = test.confidence_interval(1 - 0.05 / comparisons)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(min(1.0, test.pvalue * comparisons))
    assert found.is_clear == (test.pvalue * comparisons < 0.05)


def test_a_difference_that_never_varies() -> None:
    best = {seed: seed / 10 for seed in range(3)}
    shifted = compare(None, ("best", best), ("other", {seed: value + 0.3 for seed, value in best.items()}), 1)
    assert (shifted.difference.low, shifted.p_value, shifted.is_clear) == (pytest.approx(0.3), 0.0, True)
    equal = compare(None, ("best", best), ("other", best), 1)
    assert (equal.difference.mean, equal.p_value, equal.is_clear) == (0.0, 1.0, False)


def test_the_number_of_seeds_that_would_be_needed() -> None:
    """d = s: the table of the paired t-test says ten pairs for a power of 80 %."""
    wide = compare(None, ("a", {1: 0.0, 2: 0.0, 3: 0.1}), ("b", {1: 0.0, 2: 1.0, 3: 2.1}), 1).difference
    assert (wide.mean, wide.deviation) == pytest.approx((1.0, 1.0))
    assert seeds_needed(wide, 1) in (10, 11)
    assert (seeds_needed(wide, 5) or 0) > (seeds_needed(wide, 1) or 0)
    assert seeds_needed(estimate([1.0, -1.0]), 1) is None
    assert seeds_needed(estimate([1.0, -1.0, 0.001]), 1) is None


@given(st.integers(0, 2**12 - 1))
def test_an_effect_counts_every_finished_run_once(mask: int) -> None:
    """Matched or left out; and over matched cells, what the other variable does is the same for all values."""
    designed = [{"a": a, "b": b} for a in (1, 2) for b in (1, 2) for _ in range(3)]
    runs = [Measured(one, index % 3, 10.0 * one["b"] + one["a"]) for index, one in enumerate(designed)]
    finished = [run for index, run in enumerate(runs) if mask >> index & 1]
    found = effect_of(["a"], designed, finished, "a")
    assert 2 * found.matched + found.left_out == len(finished)
    if found.matched:
        first, second = found.levels
        assert [second.by_seed[seed] - first.by_seed[seed] for seed in first.by_seed] == [1.0] * len(first.by_seed)
    else:
        assert found.levels == ()
