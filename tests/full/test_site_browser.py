"""A browser opens every page of the site, wide and narrow, light and dark, without an error or a sideways scroll.

pip install selenium; apt install chromium chromium-driver
pytest -p no:hypothesispytest tests/full/test_site_browser.py  # hypothesis warns of trio, which selenium brings
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jaxadapt

selenium = pytest.importorskip("selenium.webdriver")
ROOT = Path(__file__).parents[2]
WIDTHS, SCHEMES = (1280, 390), ("light", "dark")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with contextlib.closing(server.socket):
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str], Path]]:
    out = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "sphinx", "-q", "docs", str(out)], cwd=ROOT, check=True)
    pages = sorted(str(page.relative_to(out)) for page in out.rglob("*.html"))
    with serve(out) as at:
        yield at, pages, out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = selenium.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options)
    yield driver
    driver.quit()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_pages(address: tuple[str, list[str], Path], browser: Any, width: int, scheme: str):
    at, pages, _ = address
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert len(pages) > 25
    problems: list[str] = []
    for page in pages:
        browser.get(f"{at}/{page}")
        problems += [
            f"{page}: {entry['message']}" for entry in browser.get_log("browser") if entry["level"] == "SEVERE"
        ]
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        if wide > width:
            problems.append(f"{page}: {wide} pixels wide at {width}")
        dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        if page == "index.html":
            assert (sum(map(int, dark.strip("rgba()").split(",")[:3])) < 200) == (scheme == "dark"), dark
    assert problems == []


@pytest.mark.parametrize(("words", "page"), [("prefix tuning", "prompts"), ("MismatchError", "api/jaxadapt")])
def test_search(address: tuple[str, list[str], Path], browser: Any, words: str, page: str):
    browser.get(f"{address[0]}/search.html?q={words.replace(' ', '+')}")
    for _ in range(100):
        found = browser.execute_script("return [...document.querySelectorAll('#search-results li a')].map(a => a.href)")
        if any(page in link for link in found):
            return
        time.sleep(0.1)
    pytest.fail(f"{words}: found {found}")


def test_the_version_switcher(address: tuple[str, list[str], Path], browser: Any, tmp_path: Path):
    """Alone, a site has its own version. Beside others, the choice leads to the same page, or to the other's home."""
    entries = "return [...document.querySelectorAll('#versions option')].map(o => o.value)"
    browser.get(f"{address[0]}/prompts.html")
    assert browser.execute_script(entries) == [jaxadapt.__version__]
    for version in (jaxadapt.__version__, "9.0.0"):
        shutil.copytree(address[2], tmp_path / version)
    (tmp_path / "9.0.0/prompts.html").unlink()
    (tmp_path / "versions.json").write_text(json.dumps(["9.0.0", jaxadapt.__version__]))
    with serve(tmp_path) as several:
        for page, leads in (("api/jaxadapt.html", "9.0.0/api/jaxadapt.html"), ("prompts.html", "9.0.0/")):
            browser.get(f"{several}/{jaxadapt.__version__}/{page}")
            for _ in range(100):
                if len(browser.execute_script(entries)) == 2:
                    break
                time.sleep(0.1)
            assert browser.execute_script(entries) == ["9.0.0", jaxadapt.__version__]
            browser.execute_script(
                "const s = document.getElementById('versions'); s.value = '9.0.0';s.dispatchEvent(new Event('change'))"
            )
            for _ in range(100):
                if browser.current_url == f"{several}/{leads}":
                    break
                time.sleep(0.1)
            assert browser.current_url == f"{several}/{leads}"
    # From disk: nothing is fetched.
    browser.get_log("browser")
    browser.get((tmp_path / jaxadapt.__version__ / "index.html").as_uri())
    assert browser.execute_script(entries) == [jaxadapt.__version__]
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_copy_button_copies(address: tuple[str, list[str], Path], browser: Any):
    browser.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    browser.get(f"{address[0]}/index.html")
    text = browser.execute_script("return document.querySelector('pre').innerText")
    selenium.ActionChains(browser).move_to_element(browser.find_element("css selector", "pre")).perform()
    browser.find_element("css selector", "button.copybtn").click()
    copied = browser.execute_async_script(
        "const done = arguments[0]; setTimeout(() => navigator.clipboard.readText().then(done), 300)"
    )
    assert copied.strip() == text.strip()
