"""docs/scaling.md has the tables that benchmarks/scaling.py computes; a few of them by hand."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "scaling.py"
scaling = runpy.run_path(str(PROGRAM), run_name="scaling")
ONE, EIGHT, SEVENTY = scaling["MODELS"]


def test_every_table_of_the_program_stands_in_the_page() -> None:
    printed = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "scaling.md").read_text()
    tables = printed.strip().split("\n\n")
    assert len(tables) == 8
    for table in tables:
        assert f"\n\n{table}\n\n" in page, table.splitlines()[0]


@pytest.mark.parametrize(("model", "parameters"), [(ONE, 1.236e9), (EIGHT, 8.03e9), (SEVENTY, 70.55e9)])
def test_parameters_are_those_of_the_published_models(model: object, parameters: float) -> None:
    assert model.parameters == pytest.approx(parameters, rel=0.001)  # type: ignore[attr-defined]


def test_flops_of_a_token_by_hand() -> None:
    """8B: six FLOPs for each weight but the embedding's and the norms', and attention over half of 8,192 tokens."""
    assert EIGHT.flops == pytest.approx(6 * (8.03e9 - 0.525e9) + 12 * 32 * 4096 * 4096, rel=0.001)


def test_bytes_of_a_pass_by_hand() -> None:
    """8B on one node: 8 bytes of a weight, 6 of the root's, seven eighths of them over NVLink at 360 GB/s."""
    seconds, hops = scaling["full"](EIGHT, 8)
    assert seconds == pytest.approx((8 * 6.98e9 + 6 * 1.05e9) * 7 / 8 / 360e9, rel=0.001)
    assert hops == pytest.approx(98 * 7 * 1.9e-6)


def test_hops_of_a_ring_of_4096() -> None:
    """8B: 98 collectives, each of 4,095 hops, of which 511 lead to another node."""
    assert scaling["full"](EIGHT, 4096)[1] == pytest.approx(98 * (3584 * 1.9e-6 + 511 * 4.0e-6))


def test_hybrid_sends_as_many_bytes_over_the_network_as_full() -> None:
    assert scaling["hybrid"](EIGHT, 4096) == pytest.approx(8.03e9 / 40e9, rel=0.03)
    assert scaling["full"](EIGHT, 4096)[0] == pytest.approx(8.03e9 / 40e9, rel=0.04)


def test_what_of_70b_fits() -> None:
    assert scaling["longest"](SEVENTY, 8, True) == "none"
    assert scaling["longest"](SEVENTY, 64, True) == "8,192"
    assert scaling["fixed_memory"](SEVENTY, 64)[0] == pytest.approx(16 * 70.55e9 / 64, rel=0.001)


def test_headers_of_tensors_that_have_fewer_rows_than_there_are_processes() -> None:
    """On 8 processes every tensor of 8B is in all files: 9 of a block, 3 of the root, and two moments of each."""
    assert EIGHT.entries(8) == 8 * 3 * (32 * 9 + 3)
    assert EIGHT.entries(4096) < 4096 * 3 * (32 * 9 + 3)
