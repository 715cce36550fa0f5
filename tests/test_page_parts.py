"""The parts of the page without a browser: its texts, its form, files that visitors send, and who is let in."""

import asyncio
import functools
import os
import shutil
import threading
from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import gradio as gr
import pytest
from fastapi.responses import PlainTextResponse
from gradio.utils import get_upload_folder
from starlette.testclient import TestClient

from serving import until
from stableavatar.apps.web import gallery
from stableavatar.apps.web.downloads import Downloads
from stableavatar.apps.web.filling import FIELDS
from stableavatar.apps.web.guard import _MOST_ARRIVING, _MOST_ARRIVING_EACH, Guard
from stableavatar.apps.web.studio import COOKIE, Scratch, cookies_of, guarded, owner_of, sent
from stableavatar.apps.web.texts import TEXTS, Texts, preferred
from stableavatar.errors import InputError
from stableavatar.jobs.intake import OPTIONS
from stableavatar.jobs.quotas import LEAST_ROOM
from stableavatar.jobs.store import JobStore
from stableavatar.options import GenerateOptions


def test_cookies_of_others_do_not_hide_the_pages() -> None:
    """Of another program on this machine: cookies are not told apart by port."""
    for text in (
        'prefs={"a":1}; stableavatar=abc',
        "stableavatar=abc; x=a b",
        "a@b=c; stableavatar=abc; flag",
    ):
        scope = {"type": "http", "headers": [(b"cookie", text.encode())]}
        assert cookies_of(scope)["stableavatar"] == "abc", text


def test_every_text_is_in_both_languages() -> None:
    english, chinese = Texts("en"), Texts("zh")
    for name, (one, other) in TEXTS.items():
        assert one, name
        assert other, name
        if name not in ("title", "prompt_default", "portrait"):
            assert one != other, name
        fields = [sorted(part.split("}")[0] for part in text.split("{")[1:]) for text in (one, other)]
        assert fields[0] == fields[1], name
    assert english.time(5) == "5 s"
    assert chinese.time(300) == "5 分钟"
    assert [preferred(it) for it in ("zh-CN,zh;q=0.9,en", "en-GB,zh", "fr,de", "")] == [
        "zh",
        "en",
        "en",
        "en",
    ]


def test_the_form_has_every_option_that_a_request_may_choose() -> None:
    assert set(OPTIONS) - {"order"} <= set(FIELDS)  # the order is *First frames at once*
    for name in ("guidance", "overlap_weights", "speech_normalisation", "fit"):
        kind = get_type_hints(GenerateOptions)[name]
        assert all(f"{name}_{choice}" in TEXTS for choice in get_args(kind)), name


def test_a_request_cannot_name_other_files_of_the_machine(tmp_path: Path) -> None:
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"...")
    link = folder / f"{tmp_path.name}.png"
    link.symlink_to(mine)
    try:
        for path in (mine, link, folder, "/dev/zero", folder / ".." / ".." / "etc" / "passwd"):
            with pytest.raises(gr.Error, match="Choose a file"):
                sent(str(path), Texts("en"))
    finally:
        link.unlink()
    given = folder / f"{tmp_path.name}-given.png"
    given.write_bytes(b"...")
    assert sent(str(given), Texts("en")) == given.resolve()
    given.unlink()


def test_folders_for_files_are_gone_after_a_while_but_not_under_those_who_use_them() -> None:
    scratch = Scratch()
    old = scratch.folder()
    with scratch.held() as held:
        for folder in (old, held):
            os.utime(folder, (0, 0))
        scratch.folder()
        assert not old.exists()
        assert held.exists()
    scratch.folder()
    assert held.exists()  # Gradio takes its copy now
    shutil.rmtree(held.parent)  # as systems do that clean such folders
    assert scratch.folder().is_dir()
    scratch.close()
    assert not held.parent.exists()


def test_the_gallery_names_every_setting_in_both_languages() -> None:
    """What a video says of itself, in the words of the page."""
    of_file = {
        "version",
        "model",
        "lora",
        "dtype",
        "quality",
        "preset",
        "frame_count",
        "first_frame_seconds",
        "by_hand",
    }
    names = {f.name for f in fields(GenerateOptions)} | set(OPTIONS) | of_file
    for language in (Texts("en"), Texts("zh")):
        said = {language[name] for name in TEXTS}
        assert not [name for name in names if gallery._named(name, language) not in said]
        for name in ("order", "aspect", "fit", "guidance", "overlap_weights", "speech_normalisation"):
            choices = get_args(get_type_hints(GenerateOptions)[name])
            assert not [it for it in choices if gallery._valued(name, it, language) not in said]
        assert gallery._valued("model", "tiny", language) == "tiny"


async def _application(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("the page")(scope, receive, send)


@pytest.mark.parametrize(
    ("hosts", "headers", "status"),
    [
        ((), {"host": "127.0.0.1:7860"}, 200),
        ((), {"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ((), {"host": "[::1]:7860", "origin": "http://[::1]:7860"}, 200),
        ((), {"host": "127.0.0.1:7860", "origin": "https://evil.example"}, 403),
        ((), {"host": "127.0.0.1:7860", "origin": "null"}, 403),
        ((), {"host": "evil.example:7860"}, 403),  # whose name points here
        (("avatar.example",), {"host": "avatar.example", "origin": "https://avatar.example"}, 200),
        (("avatar.example",), {"host": "127.0.0.1", "origin": "https://avatar.example"}, 200),
        (("avatar.example",), {"host": "avatar.example", "origin": "https://evil.example"}, 403),
        (None, {"host": "10.0.0.7:7860", "origin": "http://10.0.0.7:7860"}, 200),
        (None, {"host": "studio.lan"}, 200),
        (
            None,
            {"host": "10.0.0.7", "origin": "https://avatar.example", "x-forwarded-host": "avatar.example"},
            200,
        ),
        (None, {"host": "10.0.0.7:7860", "origin": "https://evil.example"}, 403),
        (None, {"host": "10.0.0.7:7860", "origin": "null"}, 403),
        (("avatar.example",), {"host": "Avatar.Example:8443"}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(
    tmp_path: Path, hosts: tuple[str, ...] | None, headers: dict[str, str], status: int
) -> None:
    guard = Guard(_application, JobStore(tmp_path / "jobs"), hosts, most=1000)
    answer = TestClient(guard).post("/en/gradio_api/queue/join", headers=headers)
    assert answer.status_code == status, answer.text


def test_files_for_which_there_is_no_room_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JobStore, "free_bytes", lambda _: LEAST_ROOM + 1000)
    guard = Guard(_application, JobStore(tmp_path / "jobs"), (), most=1001)
    client = TestClient(guard, base_url="http://127.0.0.1")
    upload = functools.partial(client.post, "/zh/gradio_api/upload")
    assert upload(content=bytes(1000)).status_code == 200
    refused = upload(content=bytes(1001))
    assert (refused.status_code, refused.text) == (507, Texts("zh")["no_room_for_file"])
    assert int(refused.headers["retry-after"]) > 0
    assert upload(content=iter([b"of a length that is not said"])).status_code == 507
    assert client.post("/zh/gradio_api/queue/join", content=bytes(2000)).status_code == 200
    assert upload(content=b"...", headers={"content-length": "9" * 5000}).status_code == 413
    assert guard.arriving._bytes == 0
    for unused in ("component_server", "process_recording", "deep_link"):
        assert client.post(f"/en/gradio_api/{unused}", content=b"...").status_code == 404


def test_few_files_of_a_browser_are_sent_at_a_time(tmp_path: Path) -> None:
    guard = Guard(_application, JobStore(tmp_path / "jobs"), (), most=1000)
    names = ["first", "second"]
    clients = [
        TestClient(guard, base_url="http://127.0.0.1", headers={"cookie": f"{COOKIE}={it}"}) for it in names
    ]
    address = "/en/gradio_api/upload"
    guard._sending[owner_of({COOKIE: "first"})] = _MOST_ARRIVING_EACH
    refused, taken = (client.post(address, content=b"...") for client in clients)
    assert (refused.status_code, refused.text) == (429, Texts("en")["many_arrive"])
    assert taken.status_code == 200
    guard._sending["somebody"] = _MOST_ARRIVING - _MOST_ARRIVING_EACH
    assert clients[1].post(address, content=b"...").status_code == 429
    guard._sending.clear()
    assert clients[0].post(address, content=b"...").status_code == 200
    assert not guard._sending


def test_what_nobody_foresaw_is_a_sentence() -> None:
    asyncio.run(_fail())


async def _fail() -> None:
    guard = guarded(Texts("en"))

    @guard
    def plain(fails: type[Exception]) -> None:
        raise fails("[Errno 28] No space left on device: '/data/jobs.sqlite'")

    @guard
    async def waiting(fails: type[Exception]) -> None:
        plain(fails)

    @guard
    async def streaming(fails: type[Exception]) -> AsyncIterator[int]:
        yield 1
        plain(fails)

    for fails, words in ((OSError, "a fault of its own"), (gr.Error, "No space")):
        with pytest.raises(gr.Error, match=words):
            plain(fails)
        with pytest.raises(gr.Error, match=words):
            await waiting(fails)
        shown = streaming(fails)
        assert await anext(shown) == 1
        with pytest.raises(gr.Error, match=words):
            await anext(shown)


def slow(folder: Path, name: str, *, progress: Any) -> Path:
    """A download that waits until it is killed, or told to go on."""
    progress(1, 2)
    while not (folder / name).exists():
        threading.Event().wait(0.05)
    if (folder / name).read_text():
        raise InputError("the hub is not there")
    progress(2, 2)
    return folder


def test_there_is_one_download_at_a_time_which_all_see_and_may_stop(tmp_path: Path) -> None:
    downloads = Downloads(tmp_path)
    assert downloads.going is None
    assert not downloads.stop()
    assert downloads.begin(slow, ["first"])
    assert not downloads.begin(slow, ["second"])
    until(lambda: downloads.going is not None and downloads.going.done == 1)
    assert downloads.stop()
    assert not downloads.stop()
    assert downloads.going is not None
    assert (downloads.going.ended, downloads.going.stopped) == (True, True)
    for name, says in (("good", ""), ("bad", "broken")):
        assert downloads.begin(slow, [name])
        (tmp_path / name).write_text(says)
        until(lambda: downloads.going is not None and downloads.going.ended)
        assert downloads.going.error == (None if name == "good" else "the hub is not there")
    assert downloads.begin(slow, ["lost"])
    assert downloads._process is not None
    downloads._process.kill()  # as by a system that is short of memory
    until(lambda: downloads.going is not None and downloads.going.ended)
    assert downloads.going.error == ""
    downloads.close()
