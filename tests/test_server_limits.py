"""What a server does not take: too much at a time, what its model or its disk cannot hold, and anything at its end."""

import asyncio
import errno
import gc
import resource
import sqlite3
import time
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from served import QUICK, ask, asked, files_to_send, served, store_of
from serving import until
from stableavatar.apps import arriving
from stableavatar.apps.arriving import counted
from stableavatar.apps.running import _open_many_files
from stableavatar.apps.server import videos
from stableavatar.apps.server.access import Gate, Keys
from stableavatar.apps.server.app import Service, create_app
from stableavatar.apps.server.schemas import Video
from stableavatar.apps.watching import ManyWatchError, Viewers
from stableavatar.errors import InputError
from stableavatar.jobs.intake import EndingError, FileChecker, Found, Limits
from stableavatar.jobs.job import Job
from stableavatar.jobs.quotas import LEAST_ROOM, Quotas
from stableavatar.jobs.sessions import SessionLine
from stableavatar.jobs.store import JobStore
from stableavatar.options import GenerateOptions, SamplingDefaults
from stored_jobs import add


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_to_send(tmp_path_factory.mktemp("files"))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with served(tmp_path / "jobs") as client:
        yield client


def test_as_many_files_of_an_owner_arrive_at_a_time_as_may_wait(tmp_path: Path) -> None:
    """The next ones are refused before they are read; other requests of his are not, nor anybody's later."""
    asyncio.run(_arrive(JobStore(tmp_path / "jobs")))


async def _arrive(store: JobStore) -> None:
    goes_on = asyncio.Event()
    application = create_app(Service(store.folder), store)
    headers = [(b"host", b"127.0.0.1")]

    async def slow(_scope: Scope, _receive: Receive, send: Send) -> None:
        await goes_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    gate = Gate(slow, Keys(), Limits(quotas=Quotas(waiting_each=2)), store)

    async def request(method: str, path: str) -> int:
        statuses: list[int] = []

        async def receive() -> Message:
            raise AssertionError("it was read")

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {"type": "http", "app": application, "method": method, "path": path, "headers": headers}
        await gate(scope, receive, send)
        return statuses[0]

    arriving = [asyncio.create_task(request("POST", "/v1/videos")) for _ in range(2)]
    await asyncio.sleep(0)
    assert await request("POST", "/v1/videos") == 429
    others = [("POST", "/v1/videos/video_1/cancel"), ("GET", "/v1/videos")]
    arriving += [asyncio.create_task(request(*other)) for other in others]
    await asyncio.sleep(0)
    goes_on.set()
    assert await asyncio.gather(*arriving) == [200] * 4
    assert await request("POST", "/v1/videos") == 200


def test_while_the_disk_is_full_nothing_is_read(
    client: TestClient, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    video = asked(client, files)
    monkeypatch.setattr(JobStore, "free_bytes", lambda _: 10)
    answer = ask(client, files)
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "no_room")
    assert client.post(f"/v1/videos/{video}/cancel").status_code == 200


def test_room_is_kept_for_what_arrives_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what each says that it has, or of all that it may have."""
    monkeypatch.setattr(JobStore, "free_bytes", lambda _: LEAST_ROOM + 1000)
    store = JobStore(tmp_path / "jobs")
    gate = Gate(_nothing, Keys(), Limits(upload_bytes=600), store)
    asyncio.run(_announce(gate, create_app(Service(store.folder), store)))


async def _announce(gate: Gate, application: FastAPI) -> None:
    goes_on = asyncio.Event()

    async def request(length: str | None) -> int:
        statuses: list[int] = []

        async def slow(_scope: Scope, _receive: Receive, send: Send) -> None:
            await goes_on.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def receive() -> Message:
            raise AssertionError("it was read")

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        gate.app = slow
        headers = [(b"host", b"127.0.0.1")] + (
            [] if length is None else [(b"content-length", length.encode())]
        )
        scope = {
            "type": "http",
            "app": application,
            "method": "POST",
            "path": "/v1/videos",
            "headers": headers,
        }
        await gate(scope, receive, send)
        return statuses[0]

    arriving = [asyncio.create_task(request("500"))]
    await asyncio.sleep(0)
    for length in ("501", None):
        assert await asyncio.wait_for(request(length), 20) == 507
    arriving.append(asyncio.create_task(request("500")))
    await asyncio.sleep(0)
    goes_on.set()
    assert await asyncio.gather(*arriving) == [200, 200]
    assert await request(None) == 200


async def _nothing(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """No application."""


def test_few_watch_a_video_in_the_making_at_a_time(tmp_path: Path) -> None:
    asyncio.run(_watch(JobStore(tmp_path / "jobs")))


async def _watch(store: JobStore) -> None:
    viewers, gone = Viewers(most=2, most_each=1), Response(status_code=404)
    of_ann, of_bob, of_eve = (add(store, owner) for owner in ("ann", "bob", "eve"))

    async def watch(job: Job) -> None:
        await viewers.live_response(store, job, gone)({"type": "http"}, _until_the_end, _take)

    watching = [asyncio.create_task(watch(of_ann))]
    await asyncio.sleep(0)
    with pytest.raises(ManyWatchError):
        viewers.live_response(store, of_ann, gone)
    asked = viewers.live_response(store, of_eve, gone)  # of which nothing was sent yet
    with pytest.raises(ManyWatchError):
        viewers.live_response(store, of_eve, gone)
    with pytest.raises(ManyWatchError):
        viewers.live_response(store, of_bob, gone)
    del asked  # nor ever is
    gc.collect()
    watching.append(asyncio.create_task(watch(of_bob)))
    await asyncio.sleep(0)
    with pytest.raises(ManyWatchError):
        viewers.live_response(store, of_eve, gone)
    watching[0].cancel()
    await asyncio.wait(watching[:1])
    watching.append(asyncio.create_task(watch(of_ann)))
    await asyncio.sleep(0)
    for it in watching:
        it.cancel()
    await asyncio.wait(watching)
    assert not viewers._watching


async def _until_the_end() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def _take(_message: Message) -> None:
    """Who watches."""


def test_few_listen_to_videos_at_a_time(
    client: TestClient, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    video = asked(client, files)
    client.post(f"/v1/videos/{video}/cancel")
    listeners = client.app.state.listeners  # type: ignore[attr-defined]
    answered, counts = videos._answer, list[int]()

    def answer_and_count(request: Request, job: Job) -> Video:
        counts.append(len(listeners._watching))
        return answered(request, job)

    monkeypatch.setattr(videos, "_answer", answer_and_count)
    for _ in range(20):  # one after the other
        answer = client.get(f"/v1/videos/{video}/events")
        assert "event: cancelled" in answer.text
    assert counts == [1] * 20
    assert not listeners._watching
    # So that all that wait can be listened to.
    most = 2 * client.app.state.limits.quotas.waiting_each  # type: ignore[attr-defined]
    for _ in range(most):
        listeners.come("ann")
    answer = client.get(f"/v1/videos/{video}/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "busy")
    assert int(answer.headers["retry-after"]) > 0
    assert len(listeners._watching) == most


def test_a_request_of_which_nothing_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that has come, and waits for its answer."""
    monkeypatch.setattr(arriving, "_SILENT_SECONDS", 0.1)
    asyncio.run(_stall())


async def _stall() -> None:
    pieces = [{"type": "http.request", "body": b"ab", "more_body": True}]

    async def receive() -> Message:
        if not pieces:
            await asyncio.sleep(0.5)
            return {"type": "http.disconnect"}
        return pieces.pop(0)

    stalled = counted(receive, 10, AssertionError)
    assert (await stalled())["body"] == b"ab"
    with pytest.raises(HTTPException) as given_up:
        await stalled()
    assert given_up.value.status_code == 408
    pieces.append({"type": "http.request", "body": b"ab", "more_body": False})
    complete = counted(receive, 10, AssertionError)
    await complete()
    assert (await complete())["type"] == "http.disconnect"


def test_a_table_that_cannot_be_used_is_a_fault_of_the_server(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(JobStore, "list", full)
    answer = client.get("/v1/videos")
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (503, "server_error", "no_table")
    assert int(answer.headers["retry-after"]) > 0
    described = client.get("/openapi.json").json()["paths"]["/v1/videos"]["post"]["responses"]
    waits = {it for it in described if "Retry-After" in described[it].get("headers", {})}
    assert waits == {"429", "503", "507"}
    assert "retry-after" not in client.get("/v1/videos/video_").headers


def test_a_server_may_have_as_many_files_open_as_its_system_lets_it() -> None:
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        _open_many_files()
        most = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_where_no_more_files_can_be_open_sessions_are_waited_for_in_peace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []

    def full() -> Connection:
        tried.append(time.monotonic())
        raise OSError(errno.EMFILE, "Too many open files")

    line = SessionLine(JobStore(tmp_path / "jobs"))
    with monkeypatch.context() as patch:
        patch.setattr(line._listener, "accept", full)
        Client(line._listener.address, authkey=line._key).close()  # ends the waiting for the last one
        until(lambda: len(tried) >= 3)
    assert tried[2] - tried[0] >= 0.2
    line.close()


def test_at_its_end_a_server_says_that_it_ends(client: TestClient, files: dict[str, bytes]) -> None:
    client.app.state.checker.close()  # type: ignore[attr-defined]
    answer = client.post("/v1/videos", files=files, data=QUICK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ending")
    assert list((store_of(client).folder / "incoming").iterdir()) == []


def test_a_model_whose_own_size_is_above_the_limit_needs_a_smaller_one() -> None:
    checker, found = FileChecker(Limits(video_pixels=65_536), SamplingDefaults()), Found(1.0, 512, 512)
    with pytest.raises(InputError, match="512x512, this model's size, are 262144 pixels: 65536 at most"):
        checker.check_options(GenerateOptions(), found)
    checker.check_options(GenerateOptions(width=256, height=256), found)


def test_a_checker_that_was_closed_takes_nothing(tmp_path: Path) -> None:
    checker = FileChecker(Limits())
    checker.close()
    with pytest.raises(EndingError):
        checker.check("ann", tmp_path / "portrait", None, GenerateOptions(duration=1.0))


def test_what_was_temporary_goes_with_the_next_server(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs")
    store.own().close()
    (store.temporary / "left").write_text("of a server that was killed")
    store.own().close()
    assert list(store.temporary.iterdir()) == []
