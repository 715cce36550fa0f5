"""The page's tab of models, with a hub on the loopback that is slow."""

import re
from pathlib import Path

from playwright.sync_api import expect

from hub_server import hub_with_published
from pages import SECONDS, needs_browser, open_browser, served_page, visited, wait
from stableavatar.checkpoints import hub
from stableavatar.checkpoints.layout import find_published


@needs_browser
def test_published_weights_are_downloaded_with_progress(tmp_path: Path) -> None:
    with hub_with_published() as server:
        base = "Wan2.1-Fun-V1.1-1.3B-InP/diffusion_pytorch_model.safetensors"
        server.repositories[hub.PUBLISHED_REPOSITORY][base] = bytes(100_000_000)
        server.seconds = 3.0
        environment = {
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(tmp_path / "home"),
            "no_proxy": "127.0.0.1",
        }
        with (
            served_page(tmp_path, **environment) as (address, _),
            open_browser() as browser,
            visited(browser, address) as page,
        ):
            page.get_by_role("tab", name="Models").click()
            expect(page.locator("#models")).to_contain_text("tiny", timeout=20 * SECONDS)
            page.locator("#get-weights").click()
            said = page.locator("#download-said")
            expect(said).to_contain_text("Asking which files", timeout=20 * SECONDS)
            expect(said).to_contain_text(re.compile(r"0\.0[1-9] of 0\.10 GB"), timeout=120 * SECONDS)
            box = said.bounding_box()
            assert box is not None
            assert box["height"] >= 80  # or the bar would not be seen
            page.locator("#stop-download").click()
            expect(said).to_contain_text("Stopped", timeout=20 * SECONDS)
            page.wait_for_timeout(4 * SECONDS)  # in which it would have come to its end
            assert not (tmp_path / "checkpoints" / base).exists()
            server.seconds = 0.5
            page.locator("#get-weights").click()
            expect(said).to_contain_text("Complete.", timeout=180 * SECONDS)
            expect(said.locator("code")).to_have_text(f"--model {tmp_path / 'checkpoints'} --variant square")
            expect(page.locator("#models")).to_contain_text("square, 512×512ready", timeout=20 * SECONDS)
            assert not (tmp_path / "checkpoints" / "Kim_Vocal_2.onnx").exists()
            page.locator("#get-vocals").click()
            wait((tmp_path / "checkpoints" / "Kim_Vocal_2.onnx").exists, 180)
        assert find_published(tmp_path / "checkpoints").missing("square") == []
