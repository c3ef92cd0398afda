"""The report's page, opened in a real browser; long/test_page.py clicks on it."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from browser import Open, needs_browser, texts
from lacuna.installation import install_command
from lacuna.reports.curves import ALL_POINTS, MOST_POINTS, mean_curve, point_limit, scale_of, thinned
from lacuna.reports.numbers import decimals, duration, interval, number, p_value, round_values, text
from lacuna.reports.page import as_script, write_page
from lacuna.reports.results import Estimate, Report
from report_fixture import sample

HOSTILE = "</script><img src=x onerror=document.title='taken'>\"'&amp; <b>ü</b> \u2028"


@needs_browser
def test_the_page_answers_what_was_asked(browser: Chrome, open_page: Open) -> None:
    open_page(sample())
    assert browser.title == "lora_rank_study"
    assert texts(browser, ".question") == ["Does a larger LoRA rank learn the task better, and at which learning rate?"]
    assert texts(browser, ".sentence")[0].startswith("No winner")
    assert texts(browser, ".winner, .won") == []
    headings = [int(found.tag_name[1]) for found in browser.find_elements(By.CSS_SELECTOR, "h1, h2, h3")]
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert browser.find_elements(By.CSS_SELECTOR, "thead th:not([scope]), tbody th:not([scope])") == []
    assert all(found.get_attribute("aria-label") for found in browser.find_elements(By.CSS_SELECTOR, "svg.whisker"))
    rows = texts(browser, "section[aria-labelledby=runs] tbody tr")
    assert rows[0].startswith("run_004 failed\nCUDA out of memory: lower micro_batch_size")
    assert rows[1].startswith("run_011 not started")
    assert len(rows) == 15
    assert "differs" in texts(browser, "section[aria-labelledby=budget] thead")[0]
    assert "lacuna replay runs/rank/run_000" in texts(browser, "section[aria-labelledby=reproduce]")[0]


def test_a_winner_is_marked_and_only_then(tmp_path: Path) -> None:
    best = "learning_rate=0.001, lora_rank=32"
    marks = {}
    for winner in (None, best):
        write_page(sample(winner=winner), tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        marks[winner] = [page.count(mark) for mark in ('<tr class="winner">', ">best</span>", 'class="verdict won"')]
    assert marks == {None: [0, 0, 0], best: [1, 1, 1]}


def hostile() -> Report:
    """A report in which every text is one that a careless page would take for markup."""
    report = sample()
    arms = {arm.name: f"{HOSTILE} {index}" for index, arm in enumerate(report.arms)}
    runs = [
        replace(
            run, id=f"{run.id}{HOSTILE}", arm=arms[run.arm], reason=HOSTILE, folder=HOSTILE, facts={HOSTILE: HOSTILE},
            settings={HOSTILE: HOSTILE}, curves={f"{HOSTILE}{name}": curve for name, curve in run.curves.items()},
        )
        for run in report.runs
    ]  # fmt: skip
    effect = report.effects[0]
    levels = tuple(replace(level, value=HOSTILE + str(level.value)) for level in effect.levels)
    return replace(
        report,
        experiment=dict.fromkeys(("experiment_name", "question", "hypothesis", "researcher"), HOSTILE)
        | {"tags": [HOSTILE], "variables": {HOSTILE: [HOSTILE]}, "controls": {HOSTILE: HOSTILE}},
        trainer=HOSTILE, base=HOSTILE, mapping=HOSTILE, metric=HOSTILE, how=HOSTILE, verdict=HOSTILE, notes=(HOSTILE,),
        runs=tuple(runs),
        arms=tuple(replace(arm, name=arms[arm.name], settings={HOSTILE: HOSTILE}) for arm in report.arms),
        effects=(replace(effect, variable=HOSTILE, levels=levels),),
        comparisons=tuple(replace(c, best=arms[c.best], other=arms[c.other]) for c in report.comparisons),
    )  # fmt: skip


@needs_browser
def test_hostile_names_stay_text(browser: Chrome, open_page: Open) -> None:
    open_page(hostile())
    assert browser.find_elements(By.CSS_SELECTOR, "img, main b b, main script") == []
    assert browser.execute_script("return document.querySelector('h1').textContent") == HOSTILE
    assert browser.execute_script("return document.querySelector('#effect-0 .xtitle').textContent") == HOSTILE.strip()
    script = "const e = document.getElementById('plot'); Plotly.Fx.hover(e, [{curveNumber: 0, pointNumber: 1}]);"
    browser.execute_script(script)
    wait = WebDriverWait(browser, 10, poll_frequency=0.05)
    label = wait.until(lambda found: found.find_element(By.CSS_SELECTOR, ".hovertext"))
    assert f"run_012{HOSTILE}" in str(label.get_property("textContent"))


def test_the_page_allows_its_own_scripts_and_no_request(tmp_path: Path) -> None:
    write_page(sample(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-\S+' 'sha256-\S+'", rules["script-src"])
    assert set(rules) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    write_page(sample(), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_json_of_the_page_cannot_end_its_script() -> None:
    assert "<" not in as_script({"a": "</script><!--"})
    assert json.loads(as_script({"a": "</script>"})) == {"a": "</script>"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_script(float("nan"))


@given(st.lists(st.floats(width=32), min_size=1, max_size=400), st.integers(4, 60))
def test_a_thinned_curve_keeps_its_ends_and_extremes(values: list[float], limit: int) -> None:
    curve = list(enumerate(values))
    steps, kept = thinned(curve, limit)
    assert len(steps) == len(kept) <= max(limit, 4)
    assert (steps[0], steps[-1]) == (0, len(values) - 1)
    assert steps == sorted(set(steps))
    finite = [value for value in values if abs(value) < float("inf")]
    found = [value for value in kept if value is not None]
    if finite:
        assert min(found) == pytest.approx(min(finite), rel=1e-6)
        assert max(found) == pytest.approx(max(finite), rel=1e-6)
    if len(values) <= limit:
        assert steps == [*range(len(values))]


def test_curves_have_fewer_points_where_there_are_many() -> None:
    assert point_limit(0) == point_limit(600) == MOST_POINTS
    assert point_limit(2000) * 2000 == ALL_POINTS
    assert point_limit(10**6) == 50


def test_the_mean_is_over_the_steps_that_all_curves_have() -> None:
    assert mean_curve([[(1, 2.0), (2, 3.0)], [(2, 5.0), (3, 1.0)]]) == [(2, 4.0)]


def test_numbers_that_span_two_decades_get_a_logarithmic_axis() -> None:
    found: list[list[Any]] = [[1e-5, 1e-3], [1e-4, 3e-4], [0, 100], [True, False], ["a", 1], [8, 800]]
    assert [scale_of(values) for values in found] == ["log", "linear", "linear", "category", "category", "log"]


def test_numbers_have_sensible_digits() -> None:
    assert [number(value) for value in (1.23456, 12345678, 1e-5, 3.0, 0.00012346, float("inf"))] == [
        "1.235", "12,345,678", "1e-05", "3", "0.0001235", "inf",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (0.5, 45, 720, 11_100)] == ["0.5 s", "45 s", "12 min", "3 h 05 min"]
    assert [text(value) for value in (None, True, 1e-5, "a", [1], {"a": None, "b": 2}, {})] == [
        "none", "true", "1e-05", "a", "[1]", "a=none, b=2", "{}",
    ]  # fmt: skip
    assert [p_value(value) for value in (None, 0.0001, 0.04)] == ["–", "< 0.001", "0.040"]
    wide = Estimate(1.23456, 1.2, 1.27, 3, 0.1)
    assert interval(wide, decimals([wide])) == ("1.235", "[1.200, 1.270]")
    same = Estimate(1.5, 1.5, 1.5, 3, 0.0)
    assert interval(same, decimals([same, None])) == ("1.5", "[1.5, 1.5]")
    assert interval(Estimate(2.0, None, None, 1, None), 2) == ("2.00", "")


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_an_axis_has_two_to_six_round_values(low: float, width: float) -> None:
    ticks = [value for value, _ in round_values(low, low + width)]
    assert 1 <= len(ticks) <= 6
    assert all(low - width * 1e-6 <= tick <= low + width * (1 + 1e-6) for tick in ticks)


def test_the_page_without_its_extra_names_the_install_command(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['plotly'] = None\n"
        "from pathlib import Path\nfrom report_fixture import sample\nfrom lacuna.reports.page import write_page\n"
        "write_page(sample(), Path('report.html'))"
    )
    path = {"PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=path)
    assert "MissingExtraError: this command needs 'plotly.offline', which is not installed" in result.stderr
    assert f"not installed: {install_command('report')}" in result.stderr
    assert list(tmp_path.iterdir()) == []
