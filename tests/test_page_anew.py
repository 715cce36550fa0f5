"""A page that is opened anew, or left, in a real browser: what it shows again, and what is given up."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from media_files import tone, write_wav
from networks import network
from pages import (
    DEMO,
    SECONDS,
    fill_in,
    needs_browser,
    open_browser,
    options_of_job,
    owner_of_page,
    served_page,
    visited,
    wait,
)
from stableavatar.jobs.store import JobStore


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, JobStore]]:
    with served_page(tmp_path_factory.mktemp("page")) as served:
        yield served


@pytest.fixture
def page(browser: Browser, served: tuple[str, JobStore]) -> Iterator[Page]:
    with visited(browser, served[0]) as page:
        yield page


@pytest.fixture
def long_speech(tmp_path: Path) -> Path:
    """As in the tests of the page."""
    return write_wav(tmp_path / "long-speech.wav", tone(30.0, 16000), 16000)


@needs_browser
def test_a_page_opened_anew_shows_what_is_in_the_making(page: Page, long_speech: Path) -> None:
    """With the form that it was asked for with, in the other language too."""
    fill_in(page, long_speech, steps=100, shown="0:30")
    page.locator("#prompt textarea").fill("A woman in blue")
    page.locator("#guidance input[value='audio-native']").check()
    expect(page.locator("#audio-scale input[type=number]")).to_have_value("2", timeout=20 * SECONDS)
    page.locator("#make").click()
    expect(page.locator("#status")).to_contain_text("Window", timeout=60 * SECONDS)
    page.reload()
    expect(page.locator("#status")).to_contain_text("Window", timeout=30 * SECONDS)
    expect(page.locator("#make")).to_have_text("Queue another video")
    page.locator("#language").click()
    expect(page.locator("#status")).to_contain_text("窗口", timeout=30 * SECONDS)
    expect(page.locator("#screen video")).to_be_visible()
    expect(page.locator("#prompt textarea")).to_have_value("A woman in blue", timeout=20 * SECONDS)
    expect(page.locator("#portrait img")).to_be_visible(timeout=20 * SECONDS)
    expect(page.locator("#speech").get_by_text("0:30").first).to_be_visible(timeout=20 * SECONDS)
    page.locator("#advanced button").first.click()
    expect(page.locator("#steps input[type=number]")).to_have_value("100")
    expect(page.locator("#seed :is(input, textarea)")).to_have_value("")
    expect(page.locator("#text-scale input[type=number]")).to_have_value("1")
    expect(page.locator("#text-scale")).to_contain_text("推荐 1")
    page.locator("#stop").click()
    expect(page.locator(".status.cancelled")).to_be_visible(timeout=30 * SECONDS)
    expect(page.locator("#make")).to_have_text("生成视频")


@needs_browser
def test_a_page_opened_anew_shows_what_was_made(page: Page, tmp_path: Path) -> None:
    """Which may have ended while nobody looked."""
    fill_in(page, write_wav(tmp_path / "speech.wav", tone(3.0, 16000), 16000))
    page.locator("#make").click()
    expect(page.locator(".status.completed")).to_be_visible(timeout=120 * SECONDS)
    made = page.locator("#screen video").get_attribute("data-job")
    page.reload()
    expect(page.locator(".status.completed a.download")).to_be_visible(timeout=30 * SECONDS)
    expect(page.locator(f"#screen video[data-job='{made}']")).to_be_visible()
    page.wait_for_function("document.querySelector('#screen video').videoWidth > 0", timeout=20 * SECONDS)
    assert page.locator("#screen video").evaluate("video => video.paused")  # nobody asked it to speak


@needs_browser
def test_an_example_is_filled_in_and_made(page: Page, served: tuple[str, JobStore]) -> None:
    page.locator("#example").click()
    expect(page.locator("#portrait img")).to_be_visible(timeout=20 * SECONDS)
    expect(page.locator("#speech").get_by_text("0:06").first).to_be_visible(timeout=20 * SECONDS)
    expect(page.locator("#prompt textarea")).to_have_value(re.compile("woman"))
    page.locator("#make").click()
    expect(page.locator("#status")).to_contain_text("Window", timeout=60 * SECONDS)
    job = served[1].list(owner_of_page(page))[0]
    assert job.portrait.read_bytes() == (DEMO / "portrait.png").read_bytes()
    assert job.speech is not None
    assert job.speech.read_bytes() == (DEMO / "speech.flac").read_bytes()
    page.locator("#stop").click()
    expect(page.locator(".status.cancelled")).to_be_visible(timeout=60 * SECONDS)


@needs_browser
def test_what_is_deleted_in_the_gallery_is_gone_from_the_screen(page: Page, long_speech: Path) -> None:
    fill_in(page, long_speech, steps=100, shown="0:30")
    page.locator("#make").click()
    expect(page.locator("#status")).to_contain_text("Window", timeout=60 * SECONDS)
    page.get_by_role("tab", name="Gallery").click()
    page.locator("#gallery .thumbnail-item").first.click()
    page.locator("#delete").click()
    page.locator("#delete-really").click()
    page.get_by_role("tab", name="Talk").click()
    expect(page.locator("#screen video")).to_have_count(0, timeout=30 * SECONDS)
    expect(page.locator("#status")).not_to_contain_text("Window")
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator("#make")).to_have_text("Make the video")


@needs_browser
def test_a_video_that_was_made_plays_on_when_another_is_refused_and_is_gone_when_it_is_deleted(
    page: Page, tmp_path: Path
) -> None:
    fill_in(page, write_wav(tmp_path / "speech.wav", tone(3.0, 16000), 16000))
    page.locator("#make").click()
    expect(page.locator(".status.completed")).to_be_visible(timeout=120 * SECONDS)
    video = page.locator("#screen video")
    page.wait_for_function("document.querySelector('#screen video').ended", timeout=60 * SECONDS)
    at = video.evaluate("video => video.currentTime")
    page.locator("#width :is(input, textarea)").fill("50")
    page.locator("#width :is(input, textarea)").press("Tab")
    page.locator("#make").click()
    expect(page.get_by_text("width 50 is not a multiple of 16")).to_be_visible(timeout=20 * SECONDS)
    expect(page.locator(".status.completed")).to_be_visible(timeout=20 * SECONDS)
    expect(page.locator("#make")).to_be_enabled()
    page.wait_for_timeout(1 * SECONDS)
    assert video.evaluate("video => video.currentTime") == at
    page.get_by_role("tab", name="Gallery").click()
    page.locator("#gallery .thumbnail-item").first.click()
    page.locator("#delete").click()
    page.locator("#delete-really").click()
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(0, timeout=20 * SECONDS)
    page.get_by_role("tab", name="Talk").click()
    expect(video).to_have_count(0, timeout=20 * SECONDS)
    expect(page.locator("#status")).to_have_text("")


@needs_browser
def test_what_failed_while_nobody_looked_is_told(page: Page, served: tuple[str, JobStore]) -> None:
    store, who = served[1], owner_of_page(page)
    folder = store.new_folder()
    (folder / "portrait").write_bytes(b"no picture")
    job = store.add(who, folder, options_of_job(), {"seconds": 1.0})
    wait(lambda: (found := store.get(who, job.id)) is not None and found.state == "failed", 60)
    page.reload()
    expect(page.locator(".status.failed")).to_contain_text("not a picture", timeout=30 * SECONDS)


@needs_browser
def test_what_a_tool_does_for_a_page_that_is_left_is_given_up(
    browser: Browser, served: tuple[str, JobStore], tmp_path: Path
) -> None:
    """It would keep others waiting."""
    folder = served[1].folder.parent
    (folder / "checkpoints").mkdir()
    network(folder / "checkpoints" / "Kim_Vocal_2.onnx", shape=(1, 4, 3072, 256))
    server = next(it for it in psutil.process_iter() if str(folder / "checkpoints") in _command(it))
    before = set(server.children(recursive=True))
    with visited(browser, served[0]) as page:
        page.get_by_role("tab", name="Separate vocals").click()
        long = write_wav(tmp_path / "long.wav", np.zeros(3000 * 8000), 8000)
        page.set_input_files("#separate-file input[type=file]", long)
        expect(page.locator("#separate-file")).to_contain_text("long", timeout=60 * SECONDS)
        page.locator("#separate-button").click()
        wait(lambda: bool(set(server.children(recursive=True)) - before), 30)
    wait(lambda: not set(server.children(recursive=True)) - before, 30)
    temporary = served[1].folder / "temporary"
    assert not [it for it in temporary.rglob("long.wav") if "gradio" not in it.parts], "it came to its end"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended
        return []
