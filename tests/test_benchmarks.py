"""The benchmark programs run and compare the same work; here with few steps, so their figures mean nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("case", ["equal lengths", "padded", "packed"])
def test_training_step_compares_the_same_work(case: str) -> None:
    """It ends with an error where the programs' losses differ at the first step."""
    words = [sys.executable, str(BENCHMARKS / "training_step.py"), "--rounds", "1", "--steps", "2", "--case", case]
    outcome = subprocess.run([*words, "--precision", "fp32"], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    row = outcome.stdout.splitlines()[-1].split(" | ")
    assert row[0] == f"| {case}"
    assert all(float(cell.strip(" |")) > 0 for cell in row[2:])


def test_loss_memory_is_far_below_the_plain_loss() -> None:
    words = [sys.executable, str(BENCHMARKS / "loss_memory.py")]
    outcome = subprocess.run(words, capture_output=True, text=True, check=True)
    for line in outcome.stdout.splitlines()[-2:]:
        _, plain, ours, _, _ = (cell.strip() for cell in line.strip("|").split("|"))
        assert float(ours) < 0.4 * float(plain)
