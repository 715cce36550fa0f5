"""What a server does not take: too much at a time, what its model or its disk cannot hold, and anything at its end."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from fastapi.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from served import QUICK, ask, asked, files_to_send, served, store_of
from stableavatar.apps.server.access import Gate, Keys
from stableavatar.apps.server.app import Service, create_app
from stableavatar.apps.watching import ManyWatchError, Viewers
from stableavatar.errors import InputError
from stableavatar.jobs.intake import EndingError, FileChecker, Found, Limits
from stableavatar.jobs.job import Job
from stableavatar.jobs.quotas import LEAST_ROOM, Quotas
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
        answer = viewers.live_response(store, job, gone)
        assert isinstance(answer, StreamingResponse)
        async for _ in answer.body_iterator:
            pass

    watching = [asyncio.create_task(watch(of_ann))]
    await asyncio.sleep(0)
    with pytest.raises(ManyWatchError):
        viewers.live_response(store, of_ann, gone)
    viewers.live_response(store, of_eve, gone)
    watching.append(asyncio.create_task(watch(of_bob)))
    await asyncio.sleep(0)
    with pytest.raises(ManyWatchError):
        viewers.live_response(store, of_eve, gone)
    watching[0].cancel()
    await asyncio.wait(watching[:1])
    viewers.live_response(store, of_ann, gone)
    watching[1].cancel()


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
