"""Takes docs/report.png from out/report.html in headless Chromium: `make screenshot` after `make demo`."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]


def main() -> None:
    """Opens the report, clicks a token of the last frame but one, and takes the picture."""
    report = Path("out/report.html").resolve()
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not report.exists() or browser_path is None:
        sys.exit("screenshot: needs out/report.html (make demo) and an installed Chromium.")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(report.as_uri())
        page.wait_for_selector("body[data-ready]")
        canvases = page.locator("canvas[data-frame]")
        canvases.nth(canvases.count() - 2).click()
        page.screenshot(path="docs/report.png", full_page=True)
        browser.close()
    print("docs/report.png")


if __name__ == "__main__":
    main()
