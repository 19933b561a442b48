#!/usr/bin/env python3
"""Take the pictures of docs/READING_A_REPORT.md: parts of report.html in a headless Chromium.

``python tools/picture_report.py figures/h100/results.json`` writes them into figures/reading/. It
needs selenium, Chromium and its chromedriver.
"""

import base64
import contextlib
import importlib.util
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

if importlib.util.find_spec("pagedattn") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pagedattn.report import cli
from pagedattn.report.arguments import Parser
from pagedattn.report.output import require_no_source, write_into
from pagedattn.report.results import load_run
from pagedattn.report.text import clean
from pagedattn.report.values import ResultsError

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


def main(arguments: list[str] | None = None) -> int:
    """Write the pictures; return 0, or 2 after one sentence on stderr."""
    parser = Parser(
        prog="picture_report.py", description="Take the pictures of docs/READING_A_REPORT.md."
    )
    parser.add_argument(
        "results", type=Path, help="results file with kernels on a GPU, one named triton"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("figures") / "reading",
        help="default: %(default)s",
    )
    try:
        options = parser.parse_args(arguments)
        targets = [options.out / f"{name}.png" for name, *_ in PICTURES]
        require_no_source(targets, [options.results])
        load_run([options.results])  # what is wrong with it is told by its own name
        with tempfile.TemporaryDirectory() as name:
            _write_pages(options.results, Path(name))
            _require_sections(options.results, Path(name))
            written, _ = write_into(options.out, (), lambda out: _take_all(Path(name), out))
        print(f"Written to {clean(str(options.out))}: {', '.join(written)}")
    except ResultsError as error:
        print(clean(str(error)), file=sys.stderr)
        return 2
    return 0


def _require_sections(results: Path, pages: Path) -> None:
    """Raise ResultsError if a page lacks what is pictured of it."""
    for page in dict.fromkeys(picture[1] for picture in PICTURES):
        text = (pages / f"{page}.html").read_text(encoding="utf-8")
        sections = dict.fromkeys(picture[2] for picture in PICTURES if picture[1] == page)
        absent = [name for name in sections if f'<section id="{name}"' not in text]
        if absent:
            raise ResultsError(
                f"{results} has not all that is pictured: its {page} is without "
                f"{', '.join(absent)}."
            )


def _take_all(pages: Path, out: Path) -> None:
    driver = _start(pages / "profile")
    try:
        for picture, page, section, width, height, is_dark in PICTURES:
            image = _take(driver, pages / f"{page}.html", section, (width, height), is_dark)
            (out / f"{picture}.png").write_bytes(image)
    finally:
        driver.quit()


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
        with contextlib.redirect_stdout(io.StringIO()):  # what it prints is of a folder that goes
            code = cli.main(words)
        if code:
            raise SystemExit(code)


def _start(profile: Path) -> Any:
    """Start a browser; raise ResultsError if what that needs is not here."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError as error:
        raise ResultsError(f"Pictures need selenium ({error}): pip install selenium.") from None
    if chromium is None or driver is None:
        raise ResultsError("Pictures need Chromium and its chromedriver, which are not here.")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}", "--hide-scrollbars"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=Service(driver))


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
