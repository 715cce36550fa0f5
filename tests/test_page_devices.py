"""The page's microphone and camera, which Chromium plays from a file and draws."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, expect

from media_files import tone, write_wav
from pages import SECONDS, needs_browser, open_browser, served_page, visited
from stableavatar.media.audio import Speech
from stableavatar.media.reading import probe

HERTZ = 440.0


@pytest.fixture
def with_devices(tmp_path: Path) -> Iterator[Browser]:
    """A browser whose microphone hears a tone, and whose visitor lets pages use it."""
    heard = write_wav(tmp_path / "heard.wav", tone(5.0, 48_000, HERTZ), 48_000)
    with open_browser(
        "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={heard}",
    ) as browser:  # fmt: skip
        yield browser


@needs_browser
def test_somebody_speaks_and_is_photographed(tmp_path: Path, with_devices: Browser) -> None:
    with served_page(tmp_path) as (address, _), visited(with_devices, address) as page:
        page.context.grant_permissions(["microphone", "camera"], origin=address)
        page.locator("#portrait button[aria-label='Capture from camera']").click()
        page.get_by_text("Click to Access Webcam").first.click()
        page.wait_for_timeout(3 * SECONDS)  # in which the camera begins
        page.locator("#portrait button[aria-label='capture photo']").click()
        expect(page.locator("#portrait img").locator("visible=true")).to_be_visible(timeout=20 * SECONDS)
        page.locator("#speech button[aria-label='Record audio']").click()
        page.locator("#speech .record-button").click()
        page.wait_for_timeout(2.5 * SECONDS)
        page.locator("#speech .stop-button").click()
        expect(page.locator("#speech .play-pause-button")).to_be_visible(timeout=20 * SECONDS)
        page.locator("#advanced button").first.click()
        for name, value in (("steps", 2), ("text-scale", 1), ("audio-scale", 1)):
            page.locator(f"#{name} input[type=number]").fill(str(value))
            page.locator(f"#{name} input[type=number]").press("Enter")
        for name in ("width", "height"):
            page.locator(f"#{name} :is(input, textarea)").fill("48")
            page.locator(f"#{name} :is(input, textarea)").press("Tab")
        page.locator("#make").click()
        expect(page.locator(".status.completed")).to_be_visible(timeout=120 * SECONDS)
        with page.expect_download() as downloading:
            page.locator("a.download").click()
        downloading.value.save_as(tmp_path / "talk.mp4")
    info = probe(tmp_path / "talk.mp4")
    assert 1.0 < info.sound_seconds < 4.0
    assert abs(info.frames / 25 - info.sound_seconds) < 0.1
    said = Speech.open(tmp_path / "talk.mp4").samples(0, 16_000)
    spectrum = np.abs(np.fft.rfft(said * np.hanning(len(said))))
    assert abs(int(spectrum.argmax()) - HERTZ) <= 2  # of a second: a bin is a hertz
