"""The web page for a real browser: Debian's Chromium, driven by Playwright."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

import stableavatar
from command_line import toy_model
from stableavatar.apps.web.studio import owner_of
from stableavatar.jobs.intake import OPTIONS
from stableavatar.jobs.store import JobStore
from stableavatar.options import GenerateOptions

DEMO = Path(stableavatar.__file__).parent / "assets" / "demo"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 1000  # milliseconds, as Playwright counts

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@contextmanager
def open_browser(*arguments: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *arguments])
        yield browser
        browser.close()


@contextmanager
def served_page(folder: Path, **environment: str) -> Iterator[tuple[str, JobStore]]:
    """The page with the toy model: its address, and its jobs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stableavatar", "app", "--folder", str(folder / "videos"), "--port", "0",
         "--model", str(toy_model()), "--device", "cpu", "--checkpoints", str(folder / "checkpoints")],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    address = process.stderr.readline().removeprefix("Open ").split("/ in a browser")[0]
    wait(lambda: process.poll() is None and answers(f"{address}/health"), 120)
    store = JobStore(folder / "videos")
    wait(lambda: store.workers_ready() > 0, 120)
    yield address, store
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(60) in (0, 143)
    assert not psutil.wait_procs(family, timeout=20)[1]
    said = process.stderr.read()
    assert "Traceback" not in said, said


@contextmanager
def visited(browser: Browser, address: str) -> Iterator[Page]:
    """The page as somebody sees it who comes for the first time."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, locale="en-US", accept_downloads=True
    )
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    expect(page.locator("#make")).to_be_visible(timeout=30 * SECONDS)
    yield page
    context.close()
    assert not faults


def fill_in(
    page: Page, speech: Path, *, steps: int = 1, portrait: Path = DEMO / "portrait.png", shown: str = "0:03"
) -> None:
    """Portrait and speech (whose length is `shown`), and settings with which the toy model is quick."""
    page.set_input_files("#portrait input[type=file]", portrait)
    page.set_input_files("#speech input[type=file]", speech)
    expect(page.locator("#portrait img")).to_be_visible(timeout=20 * SECONDS)
    expect(page.locator("#speech").get_by_text(shown).first).to_be_visible(timeout=20 * SECONDS)
    if not page.locator("#steps input[type=number]").is_visible():
        page.locator("#advanced button").first.click()
    for name, value in (("steps", steps), ("text-scale", 1), ("audio-scale", 1)):
        page.locator(f"#{name} input[type=number]").fill(str(value))
        page.locator(f"#{name} input[type=number]").press("Enter")
    for name in ("width", "height"):
        page.locator(f"#{name} :is(input, textarea)").fill("48")
        page.locator(f"#{name} :is(input, textarea)").press("Tab")


def owner_of_page(page: Page) -> str:
    found = owner_of({cookie["name"]: cookie["value"] for cookie in page.context.cookies()})
    assert found is not None
    return found


def options_of_job() -> dict[str, Any]:
    options = GenerateOptions(duration=1.0, seed=1)
    return {**{name: getattr(options, name) for name in OPTIONS}, "quality": 20}


def answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def wait(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)
