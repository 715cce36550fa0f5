"""The page as an application, without a browser: what it answers, and what its tables and its form say."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from starlette.testclient import TestClient

from stableavatar.apps.web import talk
from stableavatar.apps.web.downloads import Downloads
from stableavatar.apps.web.filling import FIELDS, as_asked, as_made
from stableavatar.apps.web.models import _table
from stableavatar.apps.web.page import _build, create_page
from stableavatar.apps.web.studio import COOKIE, Scratch, Studio, player
from stableavatar.apps.web.texts import Texts
from stableavatar.apps.web.tools import _missing
from stableavatar.jobs.intake import OPTIONS, FileChecker, Limits
from stableavatar.jobs.quotas import NoRoomError
from stableavatar.jobs.store import JobStore
from stableavatar.options import GenerateOptions, SamplingDefaults
from stored_jobs import add, found


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    limits = Limits()
    scratch = Scratch()
    yield Studio(
        JobStore(tmp_path / "jobs"),
        FileChecker(limits),
        limits,
        "tiny",
        SamplingDefaults(window=33),
        tmp_path / "vocals.onnx",
        Downloads(tmp_path),
        scratch,
    )
    scratch.close()


def test_a_browser_has_its_name_for_a_year_from_its_last_visit(studio: Studio) -> None:
    with TestClient(create_page(studio), base_url="http://127.0.0.1") as client:
        client.get("/en/")
        name = client.cookies[COOKIE]
        for address, renewed in (("/en/", True), ("/zh/", True), ("/health", False)):
            said = client.get(address).headers.get("set-cookie", "")
            assert (f"{COOKIE}={name}; Path=/; Max-Age=31536000" in said) == renewed, address
        client.cookies.clear()
        odd = {"cookie": f"{COOKIE}=x"}  # nothing that a browser says is said again unless it is of ours
        assert "set-cookie" not in client.get("/en/", headers=odd).headers


def test_gradio_keeps_no_history_with_the_token_of_who_runs_the_page(studio: Studio) -> None:
    with TestClient(create_page(studio), base_url="http://127.0.0.1") as client:
        assert not client.get("/en/config").json()["run_history"]
        for address in ("connect", "buckets", "records"):
            for method in ("GET", "POST"):
                answer = client.request(method, f"/en/gradio_api/run-history/{address}", json={})
                assert answer.status_code in (404, 405, 422), (address, answer.text)


def test_a_page_says_its_language_and_its_own_name(studio: Studio) -> None:
    """A link to it is shown with these words where people chat."""
    with TestClient(create_page(studio), base_url="http://127.0.0.1") as client:
        for language, tag, words in (("en", "en", "of any length"), ("zh", "zh-CN", "长度不限")):
            page = client.get(f"/{language}/").text
            head = page[: page.index("</head>")]
            assert re.search(r'<html lang="([^"]+)"', page)[1] == tag  # type: ignore[index]
            assert words in head
            assert "Click to try out" not in head


def test_every_page_can_watch_its_video(studio: Studio) -> None:
    """Each does it by an event, to the video's end; Gradio lets forty of them go on at a time."""
    assert _build(studio, "en")._queue.max_thread_count >= 200


def test_a_small_model_says_that_it_is_one(studio: Studio) -> None:
    with TestClient(create_page(studio), base_url="http://127.0.0.1") as client:
        for language, words in (("en", "128×128 pixels"), ("zh", "128×128 像素")):
            assert words in client.get(f"/{language}/").text


def test_the_form_is_filled_in_with_what_was_asked_for_or_with_what_was_made(
    studio: Studio, tmp_path: Path
) -> None:
    """The seed that was drawn makes the same video again; who opens the page anew did not ask for it."""
    asked = GenerateOptions(steps=7, order="causal", seed=5, text_scale=2.0)
    options = {**{name: getattr(asked, name) for name in OPTIONS}, "quality": 18}
    for drawn, seed in ((True, None), (False, 5)):
        whole = replace(add(studio.store, **options), details={"seconds": 0.6, "seed_drawn": drawn})
        job = replace(found(studio.store, whole), details=whole.details)
        values = dict(zip(FIELDS, as_asked(job, _folder(tmp_path, f"asked-{drawn}")), strict=True))
        assert (values["steps"], values["text_scale"], values["first_frames"]) == (7, 2.0, True)
        assert values["seed"] == seed
        assert Path(values["portrait"]).read_bytes() == job.portrait.read_bytes()
        again = dict(zip(FIELDS, as_made(job, _folder(tmp_path, f"made-{drawn}")), strict=True))
        assert again["seed"] == 5


def test_only_a_full_disk_is_no_room(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> Any:
        def ask(*_: Any) -> None:
            raise error

        monkeypatch.setattr(talk, "ask", ask)
        monkeypatch.setattr(talk, "sent", lambda path, _: Path(path))
        values: dict[str, Any] = dict.fromkeys(FIELDS)
        values |= {"portrait": "a", "speech": "b", "quality": 18, "first_frames": True}
        talk._ask(studio, Texts("en"), "ann", values)

    for error in (NoRoomError("There is no room"), OSError(28, "No space left on device")):
        with pytest.raises(gr.Error, match="no room"):
            fails(error)
    with pytest.raises(PermissionError):
        fails(PermissionError(13, "Permission denied"))


def test_what_is_missing_for_vocals_is_said_by_who_can_do_something_about_it(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    english = Texts("en")
    assert "Get it under Models" in _missing(studio, english)
    object.__setattr__(studio, "downloads", None)
    assert "whoever runs this page" in _missing(studio, english)
    studio.vocals.touch()
    assert _missing(studio, english) == ""
    monkeypatch.setattr("stableavatar.apps.web.tools.find_spec", lambda _: None)
    assert "pip install onnxruntime" in _missing(studio, english)


def test_the_table_of_models_speaks_the_pages_language(tmp_path: Path) -> None:
    chinese = _table(Texts("zh"), tmp_path / "checkpoints")
    assert "checkpoints" not in chinese
    assert len(re.findall("没有，或不完整", chinese)) == 3
    assert "随软件附带" in chinese


def test_what_was_made_does_not_speak_of_itself_when_the_page_is_opened(studio: Studio) -> None:
    job = found(studio.store, add(studio.store))
    assert "play()" in player(job, Texts("en")).split("onerror")[0]
    assert "play()" not in player(job, Texts("en"), plays=False).split("onerror")[0]


def _folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder
