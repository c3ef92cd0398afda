"""A report's page in a real browser."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from lacuna.reports.page import write_page
from lacuna.reports.results import Report

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="Debian's chromium is not installed"
)


def start_browser() -> Iterator[Chrome]:
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


def page_opener(browser: Chrome, tmp_path: Path) -> Iterator[Open]:
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
