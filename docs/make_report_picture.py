"""Take docs/report.png from a report's page: python docs/make_report_picture.py report.html

The page's first sections beside its plots, as Debian's chromium draws them; it needs chromium and chromium-driver.
"""

import base64
import sys
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

WIDTH, HEIGHT, SCALE = 1880, 1110, 0.75
STYLE = """
main { max-width: none; columns: 2; column-gap: 56px; padding: 40px 48px; }
section, .tiles, header { break-inside: avoid; }
section { margin-top: 36px; }
section[aria-labelledby=effects] { break-before: column; margin-top: 0; }
section:not(.verdict, [aria-labelledby=results], [aria-labelledby=effects], [aria-labelledby=curves]), footer,
section > h3, section > h3 ~ *, .card > :not(figcaption, .plot) { display: none; }
.cards { grid-template-columns: 1fr 1fr; }
"""
ARRANGE = """
const style = document.createElement("style");
style.textContent = arguments[0];
document.head.append(style);
dispatchEvent(new Event("resize"));
requestAnimationFrame(() => setTimeout(arguments[1], 500));
"""


def take(page: Path, picture: Path) -> None:
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for word in ("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(word)
    with Chrome(options=options, service=Service("/usr/bin/chromedriver")) as browser:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(page.resolve().as_uri())
        browser.execute_async_script(ARRANGE, STYLE)
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": SCALE}
        taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip})
        picture.write_bytes(base64.b64decode(taken["data"]))


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(__file__).with_name("report.png"))
