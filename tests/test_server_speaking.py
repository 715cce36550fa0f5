"""Somebody speaks to a real server, and it answers with video."""

import base64
import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest
from multiprocessing import Pipe
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import WebSocketDisconnect
from fastapi.testclient import TestClient
from websockets.sync.client import connect

import stableavatar
from media_files import write_wav
from serving import QUICK, Server, files_to_send, servers_of, states, until
from spoken import StalledSession, spoken
from stableavatar.apps.server import speaking
from stableavatar.apps.server.access import Keys
from stableavatar.apps.server.app import Service, create_app
from stableavatar.apps.server.speaking import _MOST_BEGINNING, _MOST_UNKNOWN
from stableavatar.jobs.sessions import END, SPEECH, Session, SessionLine
from stableavatar.jobs.store import JobStore
from stableavatar.jobs.worker import ModelChoice
from stableavatar.media.audio import Speech
from stableavatar.media.reading import probe, read_frames


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with servers_of(tmp_path / "jobs") as start:
        yield start


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    return files_to_send(tmp_path)


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_what_is_spoken_comes_back_as_video_in_step(
    servers: Callable[..., Server], files: dict[str, bytes], tmp_path: Path, rate: int
) -> None:
    """By `tiny`, in pieces of 100 ms, one every 100 ms: the first frames come after the speech of one window, the
    sound of the video is what was said, and the frames are those of a file with the same speech."""
    samples = articulated_speech(seconds=4.0, rate=rate)
    server = servers(model="tiny").wait_ready()
    count = rate // 10
    pieces = [samples[start : start + count].tobytes() for start in range(0, len(samples), count)]
    with connect(f"ws://127.0.0.1:{server.port}/v1/sessions", max_size=None) as line:
        start = {
            "type": "start",
            "portrait": base64.b64encode(files["portrait"]).decode(),
            "sample_rate": rate,
            "options": {"seed": 1, "steps": 4},
        }
        line.send(json.dumps(start))
        assert json.loads(line.recv(60)) == {"type": "ready"}
        for piece in pieces[:14]:  # 1.4 s; a window has 33 frames, 1.32 s
            time.sleep(0.1)
            line.send(piece)
        video = b""
        while b"mdat" not in video:
            message = line.recv(60)
            video += message if isinstance(message, bytes) else b""
        for piece in pieces[14:]:
            time.sleep(0.1)
            line.send(piece)
        line.send(json.dumps({"type": "end"}))
        for message in line:
            if isinstance(message, bytes):
                video += message
            else:
                last = json.loads(message)
    assert last == {"type": "done", "frames": 100}
    (tmp_path / "spoken.mp4").write_bytes(video)
    info = probe(tmp_path / "spoken.mp4")
    assert (info.frames, info.width) == (100, 128)
    assert list((server.folder / "incoming").iterdir()) == []

    heard = Speech.open(tmp_path / "spoken.mp4")
    said = articulated_speech(seconds=4.0).astype(np.float32) / 32768
    got = heard.samples(0, len(said))
    lags = {
        lag: float(np.dot(said[1600:-1600], got[1600 + lag : len(got) - 1600 + lag]))
        for lag in range(-800, 801, 8)
    }
    assert abs(max(lags, key=lambda lag: lags[lag])) <= 16  # samples: a millisecond

    (tmp_path / "portrait").write_bytes(files["portrait"])
    write_wav(tmp_path / "said.wav", samples / 32767, rate)
    stableavatar.load("tiny", device="cpu").generate(
        tmp_path / "portrait", tmp_path / "said.wav", tmp_path / "alone.mp4", seed=1, steps=4, order="causal",
        output_options=stableavatar.OutputOptions(preset="veryfast", live=True),
    )  # fmt: skip
    pairs = zip_longest(read_frames(tmp_path / "spoken.mp4"), read_frames(tmp_path / "alone.mp4"))
    assert all(one is not None and other is not None and np.array_equal(one, other) for one, other in pairs)


def test_who_speaks_goes_before_videos_and_those_go_on_after(
    servers: Callable[..., Server], files: dict[str, bytes]
) -> None:
    server = servers().wait_ready()
    video = httpx.post(
        f"{server.url}/v1/videos", files=files, data={**QUICK, "steps": "30"}, timeout=60
    ).json()["id"]
    until(lambda: bool((states(server)[video]["step"] or {}).get("step")))
    with connect(f"ws://127.0.0.1:{server.port}/v1/sessions", max_size=None) as line:
        line.send(json.dumps(spoken(files)))
        assert json.loads(line.recv(60)) == {"type": "ready"}
        assert states(server)[video]["status"] == "queued"
        with connect(f"ws://127.0.0.1:{server.port}/v1/sessions") as other:
            assert json.loads(other.recv(60))["error"]["code"] == "one_session"  # before it says anything
        line.send(bytes(32_000))
        # The client goes away in the middle.
    until(lambda: states(server)[video]["status"] == "completed", 120)
    with connect(f"ws://127.0.0.1:{server.port}/v1/sessions", max_size=None) as line:
        line.send(json.dumps(spoken(files)))
        assert json.loads(line.recv(60)) == {"type": "ready"}
    assert not [text for text in server.said if "Traceback" in text], server.said


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ("not JSON", "Invalid JSON"),
        ({"type": "begin"}, "type"),
        ({"type": "start"}, "give either portrait"),
        ({"type": "start", "portrait": "%%%"}, "no base64"),
        ({"type": "start", "portrait": "aGVsbG8="}, "not a picture"),
        ({"type": "start", "portrait_from": "../../etc/passwd"}, "portrait_from"),
        ({"type": "start", "portrait_from": "video_" + "0" * 24}, "no such video"),
        ({"type": "start", "sample_rate": 10**9, "portrait": "aGVsbG8="}, "sample_rate"),
        (
            {"type": "start", "portrait": "aGVsbG8=", "options": {"order": "wavefront"}},
            "order",
        ),
        ({"type": "start", "portrait": "aGVsbG8=", "options": {"steps": 10**6}}, "100 at most"),
        ({"type": "start", "portrait": "aGVsbG8=", "options": {"steps": "many"}}, "steps"),
        ({"type": "start", "portrait": "aGVsbG8=", "options": {"device": "cuda"}}, "device"),
        ({"type": "start", "portrait": "aGVsbG8=", "options": {"quality": 99}}, "quality"),
        ({"type": "start", "portrait": "aGVsbG8=", "options": {"size": "9x"}}, "size"),
        ({"type": "start", "portrait": "aGVsbG8=", "options": {"size": "9" * 5000 + "x16"}}, "size"),
        ({"type": "start", "portrait": "aGVsbG8=", "options": {"fps": None}}, "fps"),
        (
            {"type": "start", "portrait": "aGVsbG8=", "options": {"speech_normalisation": "recording"}},
            "speech_normalisation",
        ),
        ({"type": "start", "portrait": "aGVsbG8=", "options": {"seed": 2**70}}, "seed"),
    ],
)
def test_a_session_that_cannot_be_is_refused(tmp_path: Path, first: Any, words: str) -> None:
    service = Service(tmp_path / "jobs", [ModelChoice("toy")])
    with TestClient(create_app(service, service.store()), base_url="http://127.0.0.1") as client:
        with client.websocket_connect("ws://127.0.0.1/v1/sessions") as line:
            line.send_text(first if isinstance(first, str) else json.dumps(first))
            answer = line.receive_json()
        assert answer["type"] == "error"
        assert words in answer["error"]["message"]
        with client.websocket_connect(
            "ws://127.0.0.1/v1/sessions", headers={"Origin": "https://evil.example"}
        ) as line:
            assert line.receive_json()["error"]["code"] == "wrong_origin"
    assert list((tmp_path / "jobs" / "incoming").iterdir()) == []


def articulated_speech(seconds: float, rate: int = 16_000) -> Any:
    """The demo's sentence, 16-bit samples."""
    demo = Path(stableavatar.__file__).parent / "assets" / "demo" / "speech.flac"
    samples = Speech.open(demo).samples(0, round(seconds * 16_000))
    places = np.arange(round(seconds * rate)) * 16_000 / rate
    return (np.clip(np.interp(places, np.arange(len(samples)), samples), -1, 1) * 32767).astype("<i2")


def test_a_session_that_lasts_too_long_is_told_so(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(tmp_path / "jobs", [ModelChoice("toy")])
    monkeypatch.setattr(speaking, "_LONGER_SECONDS", 1.0 - service.limits.seconds)
    app = create_app(service, service.store())
    monkeypatch.setattr(app.state.line, "open", lambda *_: StalledSession())
    with (
        TestClient(app, base_url="http://127.0.0.1") as client,
        client.websocket_connect("ws://127.0.0.1/v1/sessions") as line,
    ):
        line.send_json(spoken(files))
        assert line.receive_json()["type"] == "ready"
        answer = line.receive_json()
        assert answer["type"] == "error"
        assert "too long" in answer["error"]["message"]
        with pytest.raises(WebSocketDisconnect):
            line.receive_json()


ANN = "a-key-of-ann-that-is-long"


@pytest.fixture
def of_ann(tmp_path: Path) -> Iterator[TestClient]:
    service = Service(tmp_path / "jobs", [ModelChoice("toy")], keys=Keys({ANN: "ann"}))
    with TestClient(create_app(service, service.store()), base_url="http://127.0.0.1") as client:
        yield client


@pytest.mark.parametrize(
    "known",
    [{"headers": {"Authorization": f"Bearer {ANN}"}}, {"subprotocols": ["stableavatar", f"key.{ANN}"]}],
)
def test_whom_nobody_knows_keeps_out_nobody_who_is_known(
    of_ann: TestClient, monkeypatch: pytest.MonkeyPatch, known: dict[str, Any]
) -> None:
    """Of them few may begin, and have little time: what they send first is read before their key is."""
    with contextlib.ExitStack() as stack:
        for _ in range(_MOST_UNKNOWN):
            stack.enter_context(of_ann.websocket_connect("ws://127.0.0.1/v1/sessions"))
        with of_ann.websocket_connect("ws://127.0.0.1/v1/sessions") as line:
            assert line.receive_json()["error"]["code"] == "busy"
        with of_ann.websocket_connect("ws://127.0.0.1/v1/sessions", **known) as line:
            assert line.accepted_subprotocol == ("stableavatar" if "subprotocols" in known else None)
            line.send_text("{}")
            assert line.receive_json()["error"]["code"] == "bad_start"
    monkeypatch.setattr(speaking, "_UNKNOWN_SECONDS", 0.1)
    with of_ann.websocket_connect("ws://127.0.0.1/v1/sessions") as line:
        assert "not sent in time" in line.receive_json()["error"]["message"]


def test_an_owner_begins_few_sessions_at_a_time_and_none_while_speaking(of_ann: TestClient) -> None:
    known = {"Authorization": f"Bearer {ANN}"}
    with contextlib.ExitStack() as stack:
        for _ in range(_MOST_BEGINNING):
            stack.enter_context(of_ann.websocket_connect("ws://127.0.0.1/v1/sessions", headers=known))
        with of_ann.websocket_connect("ws://127.0.0.1/v1/sessions", headers=known) as line:
            assert line.receive_json()["error"]["code"] == "busy"
    state = of_ann.app.state  # type: ignore[attr-defined]
    until(lambda: not state.beginning)
    state.speaking.add("ann")
    with of_ann.websocket_connect("ws://127.0.0.1/v1/sessions", headers=known) as line:
        assert line.receive_json()["error"]["code"] == "one_session"  # before anything is read


def test_messages_without_samples_are_no_word(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody keeps a worker with them."""
    service = Service(tmp_path / "jobs", [ModelChoice("toy")])
    app = create_app(service, service.store())
    ended = threading.Event()
    session = StalledSession()
    monkeypatch.setattr(session, "end_speech", ended.set)
    monkeypatch.setattr(app.state.line, "open", lambda *_: session)
    monkeypatch.setattr(speaking, "_SILENT_SECONDS", 1.0)
    with (
        TestClient(app, base_url="http://127.0.0.1") as client,
        client.websocket_connect("ws://127.0.0.1/v1/sessions") as line,
    ):
        line.send_json(spoken(files))
        assert line.receive_json()["type"] == "ready"
        for _ in range(15):
            line.send_bytes(bytes(320))
            assert not ended.wait(0.1)  # as long as somebody speaks
        for _ in range(30):
            line.send_bytes(b"")
            if ended.wait(0.1):
                break
        assert ended.is_set()


def test_speech_waits_for_a_worker_that_is_behind(tmp_path: Path) -> None:
    """In messages of any length, of an odd number of bytes too."""
    here, worker = Pipe()
    said = np.random.default_rng(0).bytes(3_000_001)
    session = Session(lambda: None, (tmp_path / "said").open("w+b"), most=2_000_000)
    session.answer(here)
    for start in range(0, len(said), 4097):  # more than a line between two processes holds
        session.say(said[start : start + 4097])
    session.end_speech()
    messages = iter(worker.recv_bytes, END)
    pieces = [message.removeprefix(SPEECH) for message in messages]
    assert b"".join(pieces) == said[:2_000_000]
    assert not any(len(piece) % 2 for piece in pieces)
    session.close()


def test_what_is_said_before_a_worker_is_there_waits_for_it(tmp_path: Path) -> None:
    here, worker = Pipe()
    session = Session(lambda: None, (tmp_path / "said").open("w+b"), most=100)
    session.say(b"abcd")
    assert not session.wait(0.01)
    session.end_speech()
    threading.Timer(0.1, session.answer, [here]).start()
    assert session.wait(20)
    assert (worker.recv_bytes(), worker.recv_bytes()) == (SPEECH + b"abcd", END)
    session.close()


def test_who_leaves_while_no_worker_is_free_may_come_again(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(tmp_path / "jobs", [ModelChoice("toy")])
    app = create_app(service, service.store())
    with TestClient(app, base_url="http://127.0.0.1") as client:
        with client.websocket_connect("ws://127.0.0.1/v1/sessions") as line:
            line.send_json(spoken(files))
            line.send_bytes(bytes(3200))
            until(lambda: bool(app.state.speaking))
        until(lambda: not app.state.speaking)  # long before a worker is no longer waited for
        monkeypatch.setattr("stableavatar.apps.server.speaking._PATIENCE_SECONDS", 0.2)
        with client.websocket_connect("ws://127.0.0.1/v1/sessions") as line:
            line.send_json(spoken(files))
            assert line.receive_json()["error"]["code"] == "busy"
            until(lambda: 'sessions_total{outcome="failed"} 1.0' in client.get("/metrics").text)
        figures = client.get("/metrics").text
        assert 'stableavatar_sessions_total{outcome="left"} 1.0' in figures
        assert "stableavatar_sessions_open 0.0" in figures
    assert not list((tmp_path / "jobs").rglob("portrait"))


def test_a_session_ends_also_where_the_table_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or its worker would wait for speech for ever."""
    store = JobStore(tmp_path / "jobs")
    line = SessionLine(store)
    folder = store.new_folder()
    session = line.open(folder, {}, 16_000, 1.0)
    call = store.calls.answer("worker-0")
    assert call is not None

    def full(_: str) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store.calls, "hang_up", full)
    worker = Client(call["address"], authkey=bytes.fromhex(call["key"]))
    worker.send_bytes(call["id"].encode())
    assert session.wait(20)
    session.close()
    with pytest.raises(EOFError):
        list(iter(worker.recv_bytes, b"more"))
    assert not folder.exists()
    line.close()


def test_a_lone_byte_at_the_end_is_no_sample(tmp_path: Path) -> None:
    here, worker = Pipe()
    session = Session(lambda: None, (tmp_path / "said").open("w+b"), most=100)
    session.answer(here)
    session.say(b"abc")
    session.end_speech()
    assert (worker.recv_bytes(), worker.recv_bytes()) == (SPEECH + b"ab", END)
    session.close()


def test_speech_that_the_disk_has_no_room_for_is_told() -> None:
    here, _worker = Pipe()
    full = Path("/dev/full").open("r+b")  # noqa: SIM115 (the session closes it)
    session = Session(lambda: None, full, most=100)
    session.answer(here)
    with pytest.raises(OSError, match="No space left"):
        session.say(b"ab")
    session.close()
    full = Path("/dev/full").open("r+b")  # noqa: SIM115 (as before)
    waiting = Session(lambda: None, full, most=100)  # for a worker
    with pytest.raises(OSError, match="No space left"):
        waiting.say(b"ab")
    waiting.close()


def test_speech_after_the_worker_has_gone_is_passed_over(tmp_path: Path) -> None:
    """What the worker said before is shown still."""
    here, worker = Pipe()
    spool = (tmp_path / "said").open("w+b")
    session = Session(lambda: None, spool, most=100)
    session.answer(here)
    worker.send_bytes(b"p{}")
    worker.close()
    session.say(b"ab")
    until(lambda: spool.closed)
    session.say(b"cd")
    assert session.receive() == (b"p", b"{}")
    assert session.receive() is None
    session.close()
