"""What the page is guarded from: more than it takes, wherever that would lie."""

import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from gradio.utils import get_upload_folder

from stableavatar.apps.arriving import Arriving, upload_folder
from stableavatar.apps.running import _remove_broken_uploads
from stableavatar.apps.web.guard import _FORM, _MOST_JSON, Guard
from stableavatar.apps.web.texts import LANGUAGES, Texts
from stableavatar.jobs.quotas import LEAST_ROOM
from stableavatar.jobs.store import JobStore


def test_more_than_the_page_takes_is_refused_whatever_is_said_of_its_size(tmp_path: Path) -> None:
    """Of one request, whatever files are in it."""
    app = FastAPI()

    @app.post("/{path:path}")
    async def take(request: Request) -> int:
        return len(await request.body())

    guard = Guard(app, JobStore(tmp_path / "jobs"), (), most=5_000_000)
    client = TestClient(guard, base_url="http://127.0.0.1")
    for path, most in (("queue/join", _MOST_JSON), ("upload", 5_000_000 + _FORM)):
        for language in LANGUAGES:
            ask = functools.partial(client.post, f"/{language}/gradio_api/{path}")
            for sent in (bytes(most), iter([bytes(most)])):
                assert ask(content=sent).json() == most
            for sent in (bytes(most + 1), iter([bytes(most), b"."])):
                refused = ask(content=sent)
                assert refused.status_code == 413
                assert Texts(language)["too_large"] in refused.text
    assert client.post("/gradio_api/upload", content=bytes(6_000_000)).text == Texts("en")["too_large"]
    other = client.get("/zh/", headers={"host": "evil.example"})
    assert (other.status_code, other.text) == (403, Texts("zh")["own_name_alone"])


def test_it_is_known_where_gradio_has_what_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is looked for room, and for what was left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    assert upload_folder().resolve() == Path(get_upload_folder()) == tmp_path.resolve() / "gradio"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    assert upload_folder() == Path(get_upload_folder())
    looked_at: list[Path] = []

    def full(folder: Path) -> Any:
        looked_at.append(folder)
        return shutil._ntuple_diskusage(0, 0, 1000)  # type: ignore[attr-defined]

    store = JobStore(tmp_path / "jobs")
    monkeypatch.setattr(JobStore, "free_bytes", lambda _: 10 * LEAST_ROOM)
    monkeypatch.setattr(shutil, "disk_usage", full)
    arriving = Arriving(store)
    assert arriving.has_room(1000)
    assert not arriving.has_room(1001)
    assert set(looked_at) == {tmp_path}


def test_what_was_sent_and_left_is_removed_with_folders_that_are_empty(tmp_path: Path) -> None:
    for name in ("full", "empty", "fresh"):
        (tmp_path / name).mkdir()
    for file in (tmp_path / "broken", tmp_path / "arriving", tmp_path / "full" / "portrait.png"):
        file.write_bytes(b"...")
    for name in ("full", "empty", "broken"):
        os.utime(tmp_path / name, (0, 0))
    _remove_broken_uploads(tmp_path)
    assert sorted(it.name for it in tmp_path.iterdir()) == ["arriving", "fresh", "full"]
