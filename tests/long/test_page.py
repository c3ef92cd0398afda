"""What can be clicked on the report's page, and how it looks; reports/test_page.py has what it says."""

import re
from dataclasses import replace

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from browser import Open, choose_theme, click, lines, needs_browser, resize, texts
from lacuna.reports.curves import SHOWN_RUNS
from report_fixture import estimate, run_result, sample

DIGITS = r"mean 1\.89\d{9,}, interval 1\.79\d+ to 1\.99\d+, standard deviation 0\.04\d+, 3 seeds"


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
