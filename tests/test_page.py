"""The web page in a real browser: Debian's Chromium, driven by Playwright."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from media_files import tone, write_wav
from networks import network
from pages import (
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
from stableavatar.jobs.quotas import Quotas
from stableavatar.jobs.store import JobStore
from stableavatar.media.reading import probe, read_frames


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
def other(browser: Browser, served: tuple[str, JobStore]) -> Iterator[Page]:
    """Somebody else's."""
    with visited(browser, served[0]) as page:
        yield page


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    return write_wav(tmp_path / "speech.wav", tone(3.0, 16000), 16000)


@pytest.fixture
def long_speech(tmp_path: Path) -> Path:
    """Of half a minute: its video is still being made when a test has looked at it and stops it, on quick
    machines too."""
    return write_wav(tmp_path / "long-speech.wav", tone(30.0, 16000), 16000)


@needs_browser
def test_a_video_plays_while_it_is_made_and_is_downloaded(
    page: Page, speech: Path, tmp_path: Path, served: tuple[str, JobStore]
) -> None:
    """Without anything being chosen for that."""
    fill_in(page, speech, steps=80)
    page.locator("#prompt textarea").fill("A woman is talking")
    page.locator("#make").click()
    expect(page.locator("#screen video")).to_be_visible(timeout=30 * SECONDS)
    page.wait_for_function("document.querySelector('#screen video').currentTime > 0.3", timeout=60 * SECONDS)
    assert page.locator(".status.in_progress").is_visible(), "the first frames were seen only at the end"
    expect(page.locator("#status")).to_contain_text("Window", timeout=20 * SECONDS)
    expect(page.locator(".status.completed")).to_be_visible(timeout=120 * SECONDS)
    assert served[1].list(owner_of_page(page))[0].options["order"] == "causal"
    page.wait_for_function("document.querySelector('#screen video').currentTime > 2", timeout=30 * SECONDS)
    with page.expect_download() as downloading:
        page.locator("a.download").click()
    downloading.value.save_as(tmp_path / "talk.mp4")
    info = probe(tmp_path / "talk.mp4")
    assert (info.frames, info.width, info.height) == (75, 48, 48)
    assert abs(info.sound_seconds - 3.0) < 0.05
    assert len({frame.tobytes() for frame in read_frames(tmp_path / "talk.mp4")}) > 30


@needs_browser
def test_stop_stops_and_keeps_what_is_there(page: Page, long_speech: Path, tmp_path: Path) -> None:
    fill_in(page, long_speech, steps=100, shown="0:30")
    page.locator("#first-frames input").check()
    page.locator("#make").click()
    page.wait_for_function("document.querySelector('#screen video')?.videoWidth > 0", timeout=60 * SECONDS)
    page.locator("#stop").click()
    expect(page.locator(".status.cancelled")).to_contain_text("is kept", timeout=30 * SECONDS)
    with page.expect_download() as downloading:
        page.locator("a.download").click()
    downloading.value.save_as(tmp_path / "part.mp4")
    assert 0 < probe(tmp_path / "part.mp4").frames < 750
    expect(page.locator("#stop")).to_be_disabled()


@needs_browser
def test_two_people_queue_and_neither_sees_the_others_video(
    page: Page, other: Page, speech: Path, long_speech: Path, served: tuple[str, JobStore]
) -> None:
    fill_in(page, long_speech, steps=30, shown="0:30")
    fill_in(other, speech, steps=12)
    page.locator("#make").click()
    expect(page.locator("#status")).to_contain_text("Window", timeout=60 * SECONDS)
    other.locator("#make").click()
    expect(other.locator(".status.queued")).to_contain_text("One video before yours", timeout=20 * SECONDS)
    for visitor in (page, other):
        expect(visitor.locator(".status.completed")).to_be_visible(timeout=120 * SECONDS)
    address = served[0]
    theirs = other.locator("#screen video").get_attribute("data-job")
    assert page.request.get(f"{address}/video/{theirs}.mp4").status == 404
    assert other.request.get(f"{address}/video/{theirs}.mp4").status == 200
    page.get_by_role("tab", name="Gallery").click()
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(1, timeout=20 * SECONDS)


@needs_browser
def test_a_second_video_of_one_page_takes_the_place_of_the_first(
    page: Page, tmp_path: Path, served: tuple[str, JobStore]
) -> None:
    speech = write_wav(tmp_path / "speech.wav", tone(14.0, 16000), 16000)
    fill_in(page, speech, steps=100, shown="0:14")
    page.locator("#make").click()
    expect(page.locator("#status")).to_contain_text("Window", timeout=60 * SECONDS)
    first = page.locator("#screen video").get_attribute("data-job")
    page.locator("#make").click()
    expect(page.locator(".status.queued")).to_be_visible(timeout=20 * SECONDS)
    expect(page.locator("#screen video")).to_have_count(0)  # one that waits holds no connection
    page.wait_for_timeout(3 * SECONDS)  # the first goes on meanwhile
    expect(page.locator(".status.queued")).to_be_visible()
    expect(page.locator(".status.completed a.download")).to_be_visible(timeout=120 * SECONDS)
    second = page.locator("#screen video").get_attribute("data-job")
    assert second != first
    assert page.locator("a.download").get_attribute("href") == f"/video/{second}.mp4"
    page.get_by_role("tab", name="Gallery").click()
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(2, timeout=20 * SECONDS)


@needs_browser
def test_a_portrait_is_used_as_it_was_sent(
    page: Page, long_speech: Path, tmp_path: Path, served: tuple[str, JobStore]
) -> None:
    cut_out = np.zeros((64, 64, 4), np.uint8)
    cut_out[16:48, 16:48] = (200, 120, 90, 255)
    Image.fromarray(cut_out).save(tmp_path / "cut-out.png")
    fill_in(page, long_speech, portrait=tmp_path / "cut-out.png", steps=100, shown="0:30")
    page.locator("#size-of-picture").click()
    expect(page.locator("#width :is(input, textarea)")).not_to_have_value("48", timeout=20 * SECONDS)
    page.locator("#make").click()
    expect(page.locator("#screen video")).to_be_visible(timeout=30 * SECONDS)
    job = page.locator("#screen video").get_attribute("data-job")
    kept = served[1].folder / "jobs" / str(job) / "portrait"
    assert kept.read_bytes() == (tmp_path / "cut-out.png").read_bytes()
    page.locator("#stop").click()


@needs_browser
def test_the_gallery_uses_settings_again_and_deletes(
    page: Page, speech: Path, served: tuple[str, JobStore]
) -> None:
    fill_in(page, speech, steps=2)
    page.locator("#prompt textarea").fill("A woman in blue")
    page.locator("#make").click()
    expect(page.locator(".status.completed")).to_be_visible(timeout=120 * SECONDS)
    page.reload()
    expect(page.locator("#make")).to_be_visible(timeout=30 * SECONDS)
    page.get_by_role("tab", name="Gallery").click()
    page.locator("#gallery .thumbnail-item").first.click()
    expect(page.locator("#gallery-settings")).to_contain_text("A woman in blue", timeout=20 * SECONDS)
    expect(page.locator("#gallery-screen a.download")).to_be_visible()
    page.wait_for_function(
        "document.querySelector('#gallery-screen video').videoWidth > 0", timeout=20 * SECONDS
    )
    page.locator("#use-again").click()
    expect(page.locator("#prompt textarea")).to_have_value("A woman in blue", timeout=20 * SECONDS)
    expect(page.locator("#portrait img")).to_be_visible(timeout=20 * SECONDS)
    expect(page.locator("#gallery-screen video")).to_have_count(0)  # it would go on talking unseen
    page.locator("#advanced button").first.click()
    expect(page.locator("#steps input[type=number]")).to_have_value("2")
    expect(page.locator("#width :is(input, textarea)")).to_have_value("48")
    page.locator("#make").click()
    who, store = owner_of_page(page), served[1]
    wait(lambda: [job.state for job in store.list(who)] == ["completed"] * 2, 120)
    page.get_by_role("tab", name="Gallery").click()
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(2, timeout=20 * SECONDS)
    page.locator("#gallery .thumbnail-item").first.click()
    expect(page.locator("#delete")).to_be_visible(timeout=20 * SECONDS)
    page.locator("#delete").click()  # it asks
    page.locator("#keep").click()
    expect(page.locator("#delete")).to_be_visible(timeout=20 * SECONDS)
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(2)
    page.locator("#delete").click()
    page.locator("#delete-really").click()
    expect(page.locator("#gallery .thumbnail-item")).to_have_count(1, timeout=20 * SECONDS)


@needs_browser
def test_what_is_in_the_making_is_in_the_gallery_and_stopped_there(
    page: Page, long_speech: Path, served: tuple[str, JobStore]
) -> None:
    """The first of two videos too, which the page no longer looks at."""
    fill_in(page, long_speech, steps=100, shown="0:30")
    page.locator("#first-frames input").check()
    who = owner_of_page(page)
    for count in (1, 2):
        page.locator("#make").click()
        wait(lambda count=count: len(served[1].list(who, limit=5)) == count, 60)
    page.get_by_role("tab", name="Gallery").click()
    items = page.locator("#gallery .thumbnail-item")
    expect(items).to_have_count(2, timeout=20 * SECONDS)
    expect(items.nth(1)).to_contain_text("in the making")
    for left in (1, 0):
        items.nth(left).click()
        expect(page.locator("#delete")).to_be_visible(timeout=20 * SECONDS)
        if left:  # the one that runs: stopped, it is not gone
            page.locator("#gallery-stop").click()
            wait(lambda: served[1].list(who, limit=5)[1].state == "cancelled", 60)
            expect(page.locator("#gallery-stop")).not_to_be_visible(timeout=20 * SECONDS)
        page.locator("#delete").click()
        page.locator("#delete-really").click()
        expect(items).to_have_count(left, timeout=30 * SECONDS)


@needs_browser
def test_where_nothing_can_be_played_while_it_is_made_the_file_is_played(page: Page, speech: Path) -> None:
    page.route("**/live/*", lambda route: route.abort())
    fill_in(page, speech, steps=2)
    page.locator("#make").click()
    expect(page.locator(".status.completed")).to_be_visible(timeout=120 * SECONDS)
    page.wait_for_function("document.querySelector('#screen video').currentTime > 0.3", timeout=30 * SECONDS)
    assert "/video/" in page.locator("#screen video").evaluate("video => video.currentSrc")


@needs_browser
def test_the_gallery_has_older_ones_too(page: Page, speech: Path, served: tuple[str, JobStore]) -> None:
    fill_in(page, speech)
    page.locator("#make").click()
    expect(page.locator(".status.completed")).to_be_visible(timeout=120 * SECONDS)
    store, who = JobStore(served[1].folder, Quotas(waiting_each=100)), owner_of_page(page)
    (made,) = store.list(who, limit=5)
    for _ in range(60):  # whose video is there, so that the worker has nothing to do
        folder = store.new_folder()
        for name in ("portrait", "video.mp4"):
            shutil.copyfile(made.folder / name, folder / name)
        store.add(who, folder, options_of_job(), {"seconds": 3.0})
    wait(lambda: all(job.state == "completed" for job in store.list(who, limit=100)), 120)
    page.get_by_role("tab", name="Gallery").click()
    items = page.locator("#gallery .thumbnail-item")
    expect(items).to_have_count(60, timeout=60 * SECONDS)
    page.locator("#older").click()
    expect(items).to_have_count(61, timeout=60 * SECONDS)
    expect(page.locator("#older")).not_to_be_visible(timeout=20 * SECONDS)


@needs_browser
def test_what_is_wrong_is_a_sentence(page: Page, speech: Path, tmp_path: Path) -> None:
    said = page.get_by_text("Choose a portrait first.").first
    for _ in range(4):  # a button that is to be seen is not at once one that is heard
        page.locator("#make").click()
        with contextlib.suppress(AssertionError):
            expect(said).to_be_visible(timeout=5 * SECONDS)
            break
    expect(said).to_be_visible()
    fill_in(page, speech)
    page.locator("#seed :is(input, textarea)").fill("seven")
    page.locator("#make").click()
    expect(page.get_by_text("Seed: seven is no number")).to_be_visible(timeout=20 * SECONDS)
    page.locator("#seed :is(input, textarea)").fill("7")
    page.locator("#width :is(input, textarea)").fill("50")
    page.locator("#width :is(input, textarea)").press("Tab")
    page.locator("#make").click()
    expect(page.get_by_text("width 50 is not a multiple of 16")).to_be_visible(timeout=20 * SECONDS)
    expect(page.locator("#make")).to_be_enabled()
    expect(page.locator("#status")).to_have_text("")
    assert "Traceback" not in page.content()


@needs_browser
def test_a_pressed_button_is_heard_at_once(page: Page, speech: Path) -> None:
    """Before the files have been looked at, which may take its time."""
    fill_in(page, speech)
    held: list[Route] = []
    holding = True

    def hold(route: Route) -> None:
        if holding:
            held.append(route)
        else:
            route.continue_()

    page.route("**/gradio_api/queue/join*", hold)
    page.locator("#make").click()
    expect(page.locator("#status")).to_contain_text("Looking at your files", timeout=20 * SECONDS)
    expect(page.locator("#make")).to_be_disabled()
    holding = False
    for route in held:
        route.continue_()
    expect(page.locator(".status.completed")).to_be_visible(timeout=60 * SECONDS)
    expect(page.locator("#make")).to_be_enabled()


@needs_browser
def test_what_is_no_picture_is_said(page: Page, speech: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"This is not what its name says. " * 9)
    fill_in(page, speech, portrait=tmp_path / "broken.png")
    for button in ("#size-of-picture", "#make"):
        page.locator(button).click()
        message = page.get_by_text("not a picture").first
        expect(message).to_be_visible(timeout=20 * SECONDS)
        assert "/" not in message.inner_text()
        page.locator(".toast-close").first.click()
    assert "Traceback" not in page.content()


@needs_browser
def test_the_size_follows_the_picture_and_is_swapped(page: Page, speech: Path) -> None:
    fill_in(page, speech)
    page.locator("#size-of-picture").click()
    expect(page.locator("#width :is(input, textarea)")).not_to_have_value("48", timeout=20 * SECONDS)
    width, height = (
        page.locator(f"#{name} :is(input, textarea)").input_value() for name in ("width", "height")
    )
    assert int(width) % 16 == int(height) % 16 == 0
    page.locator("#width :is(input, textarea)").fill("64")
    page.locator("#width :is(input, textarea)").press("Tab")
    page.locator("#swap").click()
    expect(page.locator("#height :is(input, textarea)")).to_have_value("64", timeout=20 * SECONDS)
    expect(page.locator("#width :is(input, textarea)")).to_have_value(height)


@needs_browser
def test_strengths_are_those_of_the_guidance(page: Page, speech: Path) -> None:
    fill_in(page, speech)
    strengths = [page.locator(f"#{name} input[type=number]") for name in ("text-scale", "audio-scale")]
    for rule, values in (("audio-native", ("1", "2")), ("three-branch", ("3", "5"))):
        page.locator(f"#guidance input[value='{rule}']").check()
        for field, value in zip(strengths, values, strict=True):
            expect(field).to_have_value(value, timeout=20 * SECONDS)
        for name, value in zip(("text-scale", "audio-scale"), values, strict=True):
            advice = page.locator(f"#{name}").get_by_text(f"{value} suits this model")
            expect(advice).to_be_visible(timeout=20 * SECONDS)


@needs_browser
def test_languages(page: Page, browser: Browser, served: tuple[str, JobStore]) -> None:
    expect(page.locator("#make")).to_have_text("Make the video")
    page.locator("#language").click()
    expect(page.locator("#make")).to_have_text("生成视频", timeout=30 * SECONDS)
    expect(page.locator("#portrait")).to_contain_text("点击上传")  # Gradio's words, in an English browser
    page.locator("#language").click()
    expect(page.locator("#make")).to_have_text("Make the video", timeout=30 * SECONDS)
    context = browser.new_context(locale="zh-CN", viewport={"width": 390, "height": 844}, is_mobile=True)
    chinese = context.new_page()
    chinese.goto(served[0])
    expect(chinese.locator("#make")).to_have_text("生成视频", timeout=30 * SECONDS)
    assert chinese.evaluate("document.documentElement.scrollWidth") <= 390, "wider than a phone"
    context.close()


@needs_browser
def test_on_a_phone_nothing_is_wider_than_it(
    browser: Browser, served: tuple[str, JobStore], speech: Path
) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, locale="en-US")
    phone = context.new_page()
    phone.goto(served[0])
    fill_in(phone, speech, steps=20)
    phone.locator("#first-frames input").check()
    phone.locator("#make").click()
    phone.wait_for_function("document.querySelector('#screen video')?.videoWidth > 0", timeout=60 * SECONDS)
    expect(phone.locator("#screen")).to_be_in_viewport(ratio=0.9)
    widths = {"while it is made": phone.evaluate("document.documentElement.scrollWidth")}
    expect(phone.locator(".status.completed")).to_be_visible(timeout=120 * SECONDS)
    widths["done"] = phone.evaluate("document.documentElement.scrollWidth")
    for name in ("Extract audio", "Separate vocals", "Gallery", "Models"):
        tab = phone.get_by_role("tab", name=name)
        if not tab.is_visible():  # those that have no room are behind a button
            phone.locator(".overflow-menu > button").click()
            tab = phone.locator(".overflow-dropdown button", has_text=name)
        tab.click()
        if name == "Gallery":
            phone.locator("#gallery .thumbnail-item").first.click()
            expect(phone.locator("#gallery-screen video")).to_be_visible(timeout=20 * SECONDS)
        phone.wait_for_timeout(500)
        widths[name] = phone.evaluate("document.documentElement.scrollWidth")
    context.close()
    assert max(widths.values()) <= 390, widths


@needs_browser
def test_the_sound_of_a_video_is_extracted(
    page: Page, tmp_path: Path, speech: Path, served: tuple[str, JobStore]
) -> None:
    page.get_by_role("tab", name="Extract audio").click()
    page.set_input_files("#extract-file input[type=file]", speech)
    expect(page.locator("#extract-file")).to_contain_text("speech", timeout=20 * SECONDS)
    result = page.locator("#extract-result").get_by_text("0:03").first
    for _ in range(4):  # as above
        page.locator("#extract-button").click()
        with contextlib.suppress(AssertionError):
            expect(result).to_be_visible(timeout=15 * SECONDS)
            break
    expect(result).to_be_visible()
    page.get_by_role("tab", name="Separate vocals").click()
    expect(page.locator("#separate-lacks")).to_contain_text("Get it under Models", timeout=20 * SECONDS)
    expect(page.locator("#separate-button")).to_be_disabled()
    checkpoints = served[1].folder.parent / "checkpoints"
    checkpoints.mkdir()
    network(checkpoints / "Kim_Vocal_2.onnx", shape=(1, 4, 3072, 256))  # which keeps everything
    page.get_by_role("tab", name="Models").click()
    expect(page.locator("#models")).to_contain_text("Network for vocals", timeout=30 * SECONDS)
    page.get_by_role("tab", name="Separate vocals").click()
    page.set_input_files("#separate-file input[type=file]", speech)
    expect(page.locator("#separate-file")).to_contain_text("speech", timeout=20 * SECONDS)
    page.locator("#separate-button").click()
    expect(page.locator("#separate-result").get_by_text("0:03").first).to_be_visible(timeout=60 * SECONDS)
    page.reload()
    page.get_by_role("tab", name="Separate vocals").click()
    long = write_wav(tmp_path / "long.wav", np.zeros(3000 * 8000), 8000)
    page.set_input_files("#separate-file input[type=file]", long)
    expect(page.locator("#separate-file")).to_contain_text("long", timeout=60 * SECONDS)
    page.locator("#separate-button").click()
    page.wait_for_timeout(3 * SECONDS)
    page.locator("#separate-stop").click()
    expect(page.get_by_text("Stopped.").first).to_be_visible(timeout=20 * SECONDS)
