"""The report's page, opened in a real browser."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from lacuna.installation import install_command
from lacuna.reports.curves import ALL_POINTS, MOST_POINTS, SHOWN_RUNS, mean_curve, point_limit, scale_of, thinned
from lacuna.reports.numbers import decimals, duration, interval, number, p_value, round_values, text
from lacuna.reports.page import as_script, write_page
from lacuna.reports.results import Estimate, Report
from report_fixture import estimate, run_result, sample

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="Debian's chromium is not installed"
)
DIGITS = r"mean 1\.89\d{9,}, interval 1\.79\d+ to 1\.99\d+, standard deviation 0\.04\d+, 3 seeds"
HOSTILE = "</script><img src=x onerror=document.title='taken'>\"'&amp; <b>ü</b> \u2028"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for word in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=1280,1000"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield chrome
    chrome.quit()


Open = Callable[[Report], None]


def resize(browser: Chrome, width: int) -> None:
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def choose_theme(browser: Chrome, theme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.fixture
def open_page(browser: Chrome, tmp_path: Path) -> Iterator[Open]:
    """Open a report's page; at the end of the test nothing was wrong, and nothing was asked of any host."""

    def open_(report: Report) -> None:
        write_page(report, tmp_path / "report.html")
        resize(browser, 1280)
        choose_theme(browser, "light")
        browser.get((tmp_path / "report.html").as_uri())

    browser.get_log("browser"), browser.get_log("performance")
    yield open_
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [found["params"]["request"]["url"] for found in messages if found["method"] == "Network.requestWillBeSent"]
    assert len(asked) >= 1
    assert {url.partition(":")[0] for url in asked} <= {"file", "data", "blob"}


def texts(browser: Chrome, selector: str) -> list[str]:
    return [found.text for found in browser.find_elements(By.CSS_SELECTOR, selector)]


def lines(browser: Chrome) -> int:
    """Curves that are drawn."""
    return len(browser.find_elements(By.CSS_SELECTOR, "#plot .scatterlayer .trace path.js-line"))


def click(browser: Chrome, selector: str) -> None:
    browser.execute_script("arguments[0].click()", browser.find_element(By.CSS_SELECTOR, selector))


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


@needs_browser
def test_runs_and_arms_are_hidden_and_shown_by_a_click(browser: Chrome, open_page: Open) -> None:
    open_page(sample())
    means, started = 5, 14
    assert lines(browser) == started + means
    click(browser, "#means")
    assert lines(browser) == started
    click(browser, "[data-run='0']")
    assert lines(browser) == started - 1
    assert browser.find_element(By.ID, "count").text == "13 of 14 runs with validation_loss shown"
    click(browser, "[data-run='0']")
    assert lines(browser) == started
    click(browser, "[data-arm='0']")
    assert lines(browser) == started - 3
    click(browser, "#none")
    assert lines(browser) == 0
    box = browser.find_element(By.CSS_SELECTOR, "[data-arm='4']")
    box.send_keys(Keys.SPACE)
    assert lines(browser) == 3


@needs_browser
def test_the_metric_is_chosen(browser: Chrome, open_page: Open) -> None:
    open_page(sample())
    axis = "#plot .ytitle"
    assert texts(browser, axis) == ["validation_loss"]
    Select(browser.find_element(By.ID, "metric")).select_by_visible_text("loss")
    assert texts(browser, axis) == ["loss"]
    assert len(browser.execute_script("return document.getElementById('plot').data[0].x")) == 400


@needs_browser
def test_what_each_variable_does_is_drawn(browser: Chrome, open_page: Open) -> None:
    open_page(sample())
    assert texts(browser, "#effect-0 .xtitle, #effect-1 .xtitle") == ["learning_rate (log scale)", "lora_rank"]
    assert texts(browser, "#effect-0 .xtick") == ["1e-05", "0.0001", "0.001"]
    assert len(browser.find_elements(By.CSS_SELECTOR, "#effect-0 .errorbar")) == 3
    assert texts(browser, ".heat tbody tr") == ["1e-05 1.894 1.871", "0.0001 1.677 1.627", "0.001 missing 1.436"]
    cell = browser.find_element(By.CSS_SELECTOR, ".heat tbody td")
    assert re.fullmatch(DIGITS, str(cell.get_attribute("title")))


@needs_browser
def test_the_page_never_scrolls_sideways(browser: Chrome, open_page: Open) -> None:
    report = sample()
    runs = tuple(replace(run, reason="x" * 300, folder="/scratch/" + "y" * 200) for run in report.runs)
    open_page(replace(report, runs=runs, verdict="z" * 200))
    for width in (1280, 700, 390):
        resize(browser, width)
        browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        assert 0 < browser.find_element(By.ID, "plot").size["width"] < width


@needs_browser
def test_dark_mode_reaches_the_plots_at_once(browser: Chrome, open_page: Open) -> None:
    def colours() -> list[str]:
        script = (
            "return [getComputedStyle(document.body).backgroundColor, "
            "document.querySelector('#plot .xtick text').style.fill, "
            "document.querySelector('#plot path.js-line').style.stroke]"
        )
        return [str(found) for found in browser.execute_script(script)]

    open_page(sample())
    light = colours()
    choose_theme(browser, "dark")
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    dark = colours()
    assert light == ["rgb(250, 250, 248)", "rgb(89, 99, 110)", light[2]]
    assert dark == ["rgb(18, 21, 24)", "rgb(159, 169, 181)", dark[2]]
    assert light[2] != dark[2]


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


@needs_browser
def test_a_report_without_a_finished_run_opens(browser: Chrome, open_page: Open) -> None:
    report = sample()
    runs = tuple(
        replace(run, state="not started", metrics={}, curves={}, budget={}, facts={}, folder=None)
        for run in report.runs
    )  # fmt: skip
    arms = tuple(replace(arm, by_seed={}, estimate=None) for arm in report.arms)
    verdict = "No run has finished."
    open_page(replace(report, runs=runs, arms=arms, effects=(), comparisons=(), totals={}, verdict=verdict))
    assert texts(browser, ".sentence") == [verdict]
    assert texts(browser, "section[aria-labelledby=results] td.graph") == ["no finished run has it"] * 5
    assert browser.find_elements(By.ID, "plot") == []


@needs_browser
def test_one_seed_and_names_as_values_have_no_whiskers_but_dots(browser: Chrome, open_page: Open) -> None:
    report = sample()
    arms = tuple(replace(arm, by_seed={None: 1.5}, estimate=estimate([1.5]), expected=1) for arm in report.arms)
    level = replace(report.effects[0].levels[0], value="a", estimate=estimate([1.5]), by_seed={None: 1.5})
    effect = replace(report.effects[0], levels=(level, replace(level, value="b", estimate=estimate([2.5]))))
    open_page(replace(report, arms=arms, effects=(effect,), comparisons=()))
    assert len(browser.find_elements(By.CSS_SELECTOR, ".whisker .mean")) == 5
    assert browser.find_elements(By.CSS_SELECTOR, ".whisker .bar") == []
    assert texts(browser, "#effect-0 .xtick") == ["a", "b"]


@needs_browser
def test_of_many_runs_some_are_drawn_and_the_page_says_so(browser: Chrome, open_page: Open) -> None:
    report = sample()
    runs = tuple(replace(run_result(0, 1e-5, 8, seed, steps=80), id=f"run_{seed}") for seed in range(70))
    open_page(replace(report, runs=runs, arms=report.arms[:1], comparisons=(), effects=()))
    assert lines(browser) == SHOWN_RUNS + 1
    assert "60 of 70 runs are drawn at first" in texts(browser, "section[aria-labelledby=curves]")[0]


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
