#!/usr/bin/env python3
"""Take the pictures of docs/READING_A_REPORT.md: parts of report.html in a headless Chromium.

``python tools/picture_report.py figures/h100/results.json`` writes them into figures/reading/. It
needs selenium, Chromium and its chromedriver.
"""

import argparse
import base64
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

if importlib.util.find_spec("pagedattn") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pagedattn.report import cli

ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SLOWED, FACTOR = "decode-B64-4k-triton", 1.05
PICTURES = (
    # name, page, section, width, height at most, whether dark
    ("headline", "report", "headline", 1280, 560, False),
    ("roofline", "report", "roofline", 760, 680, False),
    ("speedup", "report", "heatmap", 760, 735, False),
    ("latency", "report", "latency", 1100, 512, False),
    ("rounds", "report", "ecdf", 760, 680, False),
    ("waste", "report", "waste", 760, 546, False),
    ("phone", "report", "headline", 390, 560, True),
    ("verdicts", "comparison", "verdicts", 1100, 400, False),
    ("changes", "comparison", "changes", 1100, 540, False),
)


def main() -> int:
    """Write the pictures; return 0."""
    parser = argparse.ArgumentParser(description="Take the pictures of docs/READING_A_REPORT.md.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("figures") / "reading")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_pages(options.results, folder)
        driver = _start(folder / "profile")
        try:
            for picture, page, section, width, height, is_dark in PICTURES:
                place = folder / f"{page}.html"
                image = _take(driver, place, section, (width, height), is_dark)
                (options.out / f"{picture}.png").write_bytes(image)
        finally:
            driver.quit()
    return 0


def _write_pages(results: Path, folder: Path) -> None:
    """Write the report, and a comparison with a copy in which one row is slower by 5 %."""
    content = json.loads(results.read_text(encoding="utf-8"))
    for row in content["benchmarks"]:
        if row["fullname"].endswith(f"[{SLOWED}]"):
            stats = row["stats"]
            for name in ("min", "q1", "median", "q3", "max"):
                stats[name] *= FACTOR
            stats["data"] = [FACTOR * seconds for seconds in stats["data"]]
    before, after = folder / "before.json", folder / "after.json"
    shutil.copy(results, before)
    after.write_text(json.dumps(content), encoding="utf-8")
    page = str(folder / "comparison.html")
    for words in (
        [str(results), "--out", str(folder), "--formats", "png"],
        ["compare", str(before), str(after), "--html", page],
    ):
        if cli.main(words):
            raise SystemExit(2)


def _start(profile: Path) -> Any:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}", "--hide-scrollbars"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def _take(driver: Any, page: Path, section: str, size: tuple[int, int], is_dark: bool) -> bytes:
    """Return a PNG of a section, of so many pixels in width, and in height at most."""
    width, most = size
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get(page.as_uri())
    top, height = driver.execute_script(
        "const box = document.getElementById(arguments[0]).getBoundingClientRect();"
        "return [box.top + scrollY, box.height]",
        section,
    )
    clip = {"x": 0, "y": top, "width": width, "height": min(height + 12, most), "scale": 1}
    words = {"captureBeyondViewport": True, "clip": clip}
    answer = driver.execute_cdp_cmd("Page.captureScreenshot", words)
    return base64.b64decode(answer["data"])


if __name__ == "__main__":
    sys.exit(main())
