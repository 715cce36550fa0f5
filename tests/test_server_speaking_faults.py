"""What a session refuses, and what it says where something goes wrong that nobody foresaw."""

import asyncio
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from fastapi import WebSocketDisconnect
from fastapi.testclient import TestClient

from serving import files_to_send, until
from spoken import StalledSession, spoken
from stableavatar.apps.server import speaking
from stableavatar.apps.server.app import Service, create_app
from stableavatar.apps.server.speaking import _MOST_FAULTS, _MOST_PARTS
from stableavatar.jobs.worker import ModelChoice
from stored_jobs import add

SESSIONS = "ws://127.0.0.1/v1/sessions"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    return files_to_send(tmp_path)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    service = Service(tmp_path / "jobs", [ModelChoice("toy")])
    with TestClient(create_app(service, service.store()), base_url="http://127.0.0.1") as client:
        yield client


def state_of(client: TestClient) -> Any:
    return client.app.state  # type: ignore[attr-defined]


@pytest.mark.parametrize("between", [":", ","])
def test_a_start_with_more_parts_than_any_is_refused_before_it_is_looked_at(
    client: TestClient, between: str
) -> None:
    """To say what is wrong with each would keep all others waiting, and anybody can send it."""
    with client.websocket_connect(SESSIONS) as line:
        line.send_text(between * (_MOST_PARTS + 1))  # no JSON, which is not said
        assert "more parts" in line.receive_json()["error"]["message"]
    with client.websocket_connect(SESSIONS) as line:
        line.send_text(between * _MOST_PARTS)
        assert "JSON" in line.receive_json()["error"]["message"]


def test_of_many_faults_of_a_start_none_is_named(client: TestClient) -> None:
    start = {"type": "start", "portrait": "aGVsbG8="}
    for count, words in ((_MOST_FAULTS, "field_0"), (_MOST_FAULTS + 1, "21 fields")):
        with client.websocket_connect(SESSIONS) as line:
            line.send_json({**start, **{f"field_{number}": 1 for number in range(count)}})
            error = line.receive_json()["error"]
        assert error["code"] == "bad_start"
        assert words in error["message"]


@pytest.mark.parametrize(
    "text",
    ["", "no JSON", '{"type": "ping"}', '["end"]', '{"type": "end"}'.ljust(300), "[" * 200_000],
    ids=["empty", "no-json", "ping", "list", "long", "deep"],
)
def test_texts_other_than_the_end_are_refused(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    service = Service(tmp_path / "jobs", [ModelChoice("toy")])
    app = create_app(service, service.store())
    monkeypatch.setattr(app.state.line, "open", lambda *_: StalledSession())
    with (
        TestClient(app, base_url="http://127.0.0.1") as client,
        client.websocket_connect("ws://127.0.0.1/v1/sessions") as line,
    ):
        line.send_json(spoken(files))
        assert line.receive_json()["type"] == "ready"
        line.send_text(text)
        error = line.receive_json()["error"]
        assert (error["code"], error["type"]) == ("bad_message", "invalid_request_error")
        with pytest.raises(WebSocketDisconnect) as ended:
            line.receive_json()
        assert ended.value.code == 1008


@pytest.mark.parametrize(
    ("fault", "code", "closed"),
    [
        (sqlite3.OperationalError("database is locked"), "no_table", 1013),
        (ZeroDivisionError("a fault"), "fault", 1011),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_what_nobody_foresaw_is_said_and_logged(
    client: TestClient,
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Exception,
    code: str,
    closed: int,
    begun: bool,
) -> None:
    def fail(*_: Any) -> None:
        raise fault

    session = StalledSession()
    monkeypatch.setattr(session, "receive", fail)
    monkeypatch.setattr(state_of(client).line, "open", (lambda *_: session) if begun else fail)
    with client.websocket_connect(SESSIONS) as line:
        line.send_json(spoken(files))
        if begun:
            assert line.receive_json()["type"] == "ready"
        error = line.receive_json()["error"]
        assert (error["code"], error["type"]) == (code, "server_error")
        with pytest.raises(WebSocketDisconnect) as ended:
            line.receive_json()
    assert ended.value.code == closed
    assert "Traceback" in caplog.text
    assert str(fault) in caplog.text
    assert 'stableavatar_sessions_total{outcome="failed"} 1.0' in client.get("/metrics").text
    assert not state_of(client).speaking
    assert not list((state_of(client).store.folder / "incoming").iterdir()) or begun


def test_few_speak_at_a_time_in_threads_of_their_own(
    client: TestClient, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or who waits for a worker would take them from all other requests."""
    state, session = state_of(client), StalledSession()
    waits = threading.Event()
    monkeypatch.setattr(session, "receive", lambda: waits.set() or session.closed.wait(60))
    monkeypatch.setattr(state.line, "open", lambda *_: session)
    monkeypatch.setattr(speaking, "MOST_SESSIONS", 2)

    async def borrowed() -> tuple[int, int]:
        threads = anyio.to_thread.current_default_thread_limiter()
        return threads.borrowed_tokens, state.session_threads.borrowed_tokens

    with client.websocket_connect(SESSIONS) as line:
        line.send_json(spoken(files))
        assert line.receive_json()["type"] == "ready"
        assert waits.wait(20)
        assert client.portal is not None
        assert client.portal.call(borrowed) == (0, 1)
        state.speaking.clear()
        state.speaking.update({"bob", "eve"})
        with client.websocket_connect(SESSIONS) as other:
            error = other.receive_json()["error"]
        assert (error["code"], error["type"]) == ("busy", "rate_limit_error")


def test_the_portrait_of_a_video_that_was_just_removed_is_not_found(client: TestClient) -> None:
    store = state_of(client).store
    job = add(store, "local")
    job.portrait.unlink()
    with client.websocket_connect(SESSIONS) as line:
        line.send_text(json.dumps({"type": "start", "portrait_from": job.id}))
        error = line.receive_json()["error"]
    assert (error["code"], error["param"]) == ("not_found", "portrait_from")
    until(lambda: not list((store.folder / "incoming").iterdir()))


def test_a_connection_that_is_known_to_be_lost_is_no_fault() -> None:
    """Servers say so in their own way between that and its end."""

    async def sending() -> None:
        raise RuntimeError("Unexpected ASGI message 'websocket.send', after sending 'websocket.close'")

    async def say() -> None:
        with pytest.raises(WebSocketDisconnect):
            await speaking._say(sending())

    asyncio.run(say())
