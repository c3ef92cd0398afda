"""The benchmark programs run and compare the same work; here in small, so their figures mean nothing."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_training_step_compares_the_same_work() -> None:
    """It ends with an error where the programs' losses differ at the first step."""
    case = "packed"
    words = [sys.executable, str(BENCHMARKS / "training_step.py"), "--rounds", "1", "--steps", "2", "--case", case]
    words += ["--precision", "fp32", "--layers", "1"]
    outcome = subprocess.run(words, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    row = outcome.stdout.splitlines()[-1].split(" | ")
    assert row[0] == f"| {case}"
    assert all(float(cell.strip(" |")) > 0 for cell in row[2:])


def test_finetune_and_bare_trl_have_the_same_losses() -> None:
    """It ends with an error where they differ by more than 1e-4."""
    words = [sys.executable, str(BENCHMARKS / "finetune.py"), "--rounds", "1", "--steps", "2", "--precision", "fp32"]
    words += ["--layers", "1"]
    outcome = subprocess.run(words, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in outcome.stdout.splitlines()[2:]]
    assert [row[1] for row in rows[:2]] == ["lacuna", "TRL, its default"]
    assert all(float(row[2]) > 0 for row in rows[:-1])


def test_loss_memory_is_far_below_the_plain_loss() -> None:
    words = [sys.executable, str(BENCHMARKS / "loss_memory.py"), "--vocabulary", "16384"]
    outcome = subprocess.run(words, capture_output=True, text=True, check=True)
    for line in outcome.stdout.splitlines()[-2:]:
        _, plain, ours, _, _ = (cell.strip() for cell in line.strip("|").split("|"))
        assert float(ours) < 0.4 * float(plain)


def test_generate_compares_the_same_configs() -> None:
    """It ends with an error where OmegaConf or Hydra wrote other files or values than lacuna."""
    words = [sys.executable, str(BENCHMARKS / "generate.py"), "--sizes", "5", "--rounds", "1"]
    outcome = subprocess.run(words, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in outcome.stdout.splitlines()[2:]]
    programs = [program.partition(":")[0] for _, program, *_ in rows]
    assert programs == ["lacuna", "lacuna with torchtune's checks", "OmegaConf", "Hydra", "floor"]
    assert rows[0][4] == "1.00"
    assert all(row[0] == "5" and float(row[2]) >= 0 and float(row[3]) >= 0 and float(row[4]) > 0 for row in rows)


def test_memory_compares_formula_and_trace() -> None:
    """It ends with an error where they differ by more than is allowed."""
    words = [sys.executable, str(BENCHMARKS / "memory.py"), "--cases", "3", "--seed", "1"]
    outcome = subprocess.run(words, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in outcome.stdout.splitlines()[2:]]
    assert sum(int(row[1]) for row in rows) == 2 * 3
