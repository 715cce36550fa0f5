"""The page's pictures in the documentation, with `tiny` and the demo's files, at the widths of a desk and of a phone.

python tests/page_pictures.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from command_line import free_port
from pages import CHROMIUM, SECONDS, answers, wait

FOLDER = Path(__file__).parents[1] / "docs" / "page"


def shoot(page: Page, name: str, *, whole: bool = False) -> None:
    page.wait_for_timeout(1500)
    page.screenshot(path=FOLDER / f"{name}.png", full_page=whole)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "stableavatar", "app", "--folder", tempfile.mkdtemp(), "--port", str(port)]
    )
    address = f"http://127.0.0.1:{port}"
    wait(lambda: answers(f"{address}/health"), 60)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-US")
        page = context.new_page()
        page.goto(address)
        expect(page.locator("#make")).to_be_visible(timeout=30 * SECONDS)
        page.locator("#example").click()
        expect(page.locator("#speech").get_by_text("0:06").first).to_be_visible(timeout=20 * SECONDS)
        page.locator("#make").click()
        page.wait_for_function(
            "document.querySelector('#screen video')?.currentTime > 0.5", timeout=180 * SECONDS
        )
        page.mouse.move(5, 5)
        page.wait_for_timeout(4 * SECONDS)  # in which the player's buttons are hidden
        page.screenshot(path=FOLDER / "desktop.png")
        expect(page.locator(".status.completed")).to_be_visible(timeout=300 * SECONDS)
        page.get_by_role("tab", name="Gallery").click()
        page.locator("#gallery .thumbnail-item").first.click()
        shoot(page, "gallery", whole=True)
        state = context.storage_state()
        phone = browser.new_context(
            viewport={"width": 390, "height": 844}, locale="zh-CN", is_mobile=True, storage_state=state
        )
        small = phone.new_page()
        small.goto(address)
        expect(small.locator("#make")).to_be_visible(timeout=30 * SECONDS)
        # The same person's, who has another one in the making.
        page.get_by_role("tab", name="Talk").click()
        page.locator("#make").click()
        expect(page.locator(".status.in_progress")).to_be_visible(timeout=60 * SECONDS)
        small.reload()
        small.wait_for_function(
            "document.querySelector('#screen video')?.currentTime > 0.5", timeout=180 * SECONDS
        )
        small.screenshot(path=FOLDER / "phone.png", full_page=True)
        browser.close()
    process.terminate()
    process.wait(60)


if __name__ == "__main__":
    main()
