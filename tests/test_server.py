"""The server's answers: asking for videos, watching them, and fetching them; and what operators ask."""

import io
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Response
from fastapi.testclient import TestClient
from PIL import Image

from command_line import toy_model
from served import ANN, MODEL, QUICK, ask, asked, files_to_send, served, store_of, work
from stableavatar import load
from stableavatar.apps import watching
from stableavatar.apps.server import videos
from stableavatar.apps.server.app import Service, create_app
from stableavatar.jobs.job import Job
from stableavatar.media.reading import probe, read_frames, read_metadata
from stableavatar.pipeline import AvatarPipeline


@pytest.fixture(scope="module")
def pipeline() -> AvatarPipeline:
    return load(toy_model(), device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_to_send(tmp_path_factory.mktemp("files"))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with served(tmp_path / "jobs") as client:
        yield client


# Asking, and fetching.


def test_a_video_is_asked_for_made_and_fetched(
    client: TestClient, files: dict[str, bytes], pipeline: AvatarPipeline, tmp_path: Path
) -> None:
    answer = ask(client, files, prompt="A man is talking", seed="7").json()
    assert (answer["object"], answer["status"], answer["progress"]) == ("video", "queued", 0)
    assert (answer["model"], answer["seconds"], answer["size"]) == ("toy", "0.60", "32x32")
    assert answer["queue_position"] == 0
    assert answer["options"]["seed"] == 7
    content = f"/v1/videos/{answer['id']}/content"
    assert client.get(content).status_code == 409
    work(client, pipeline)
    done = client.get(f"/v1/videos/{answer['id']}").json()
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    assert done["options"]["frame_count"] == 15
    assert done["options"]["prompt"] == "A man is talking"
    fetched = client.get(content)
    assert fetched.headers["content-type"] == "video/mp4"
    (tmp_path / "fetched.mp4").write_bytes(fetched.content)
    assert str(tmp_path) not in read_metadata(tmp_path / "fetched.mp4")["stableavatar"]
    info = probe(tmp_path / "fetched.mp4")
    assert (info.frames, info.width, info.sound_samples) == (15, 32, 9600)
    part = client.get(content, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, fetched.content[10:20])
    small = client.get(content, params={"variant": "thumbnail"})
    assert Image.open(io.BytesIO(small.content)).size == (32, 32)
    assert client.delete(f"/v1/videos/{answer['id']}").json()["deleted"] is True
    assert client.get(f"/v1/videos/{answer['id']}").status_code == 404
    assert list((store_of(client).folder / "jobs").iterdir()) == []


def test_a_seed_that_is_told_makes_the_same_video_again(
    client: TestClient, files: dict[str, bytes], pipeline: AvatarPipeline
) -> None:
    first = ask(client, files).json()
    second = ask(client, files).json()
    seed = first["options"]["seed"]
    assert seed != second["options"]["seed"]
    again = asked(client, files, seed=str(seed))
    for _ in range(3):
        work(client, pipeline)
    videos = [
        client.get(f"/v1/videos/{video}/content").content for video in (first["id"], second["id"], again)
    ]
    frames = [video[video.index(b"mdat") :] for video in videos]
    assert frames[0] == frames[2]
    assert frames[0] != frames[1]


def test_openai_names_are_understood(client: TestClient, files: dict[str, bytes]) -> None:
    answer = client.post(
        "/v1/videos",
        files={"input_reference": ("me.png", files["portrait"], "image/png")},
        data={"model": "toy", "prompt": "A man", "seconds": "1", "size": "32x32"},
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["seconds"] == "1.00"
    assert client.get("/v1/models").json()["data"][0]["id"] == "toy"
    listed = client.get("/v1/videos").json()
    assert [it["id"] for it in listed["data"]] == [answer.json()["id"]]
    assert (listed["object"], listed["has_more"]) == ("list", False)


def test_pages_of_the_list(client: TestClient, files: dict[str, bytes]) -> None:
    ids = [asked(client, files) for _ in range(3)]
    first = client.get("/v1/videos", params={"limit": 2}).json()
    assert ([it["id"] for it in first["data"]], first["has_more"]) == (ids[:0:-1], True)
    rest = client.get("/v1/videos", params={"limit": 2, "after": first["last_id"]}).json()
    assert ([it["id"] for it in rest["data"]], rest["has_more"]) == (ids[:1], False)
    assert client.get("/v1/videos", params={"after": "video_" + "0" * 24}).status_code == 404


def test_earlier_files_are_used_again(client: TestClient, files: dict[str, bytes]) -> None:
    first = asked(client, files)
    answer = client.post("/v1/videos", data={**QUICK, "portrait_from": first, "speech_from": first})
    # OpenAI's client sends JSON where there is no file.
    wanted = {"prompt": "A woman", "portrait_from": first, "seconds": 1.0, "steps": 2}
    of_json = client.post("/v1/videos", json=wanted)
    assert of_json.status_code == 200, of_json.text
    assert (of_json.json()["prompt"], of_json.json()["options"]["steps"]) == ("A woman", 2)
    for wrong, word in ((b"{", "JSON"), (b'{"portrait": "x"}', "portrait"), (b'{"steps": "many"}', "steps")):
        refused = client.post("/v1/videos", content=wrong, headers={"Content-Type": "application/json"})
        assert refused.status_code == 400
        assert word in refused.json()["error"]["message"]
    much = b'{"prompt": "' + bytes(200_000) + b'"}'
    refused = client.post("/v1/videos", content=much, headers={"Content-Type": "application/json"})
    assert refused.status_code == 413
    assert answer.status_code == 200, answer.text
    job = store_of(client).get("ann", answer.json()["id"])
    assert job is not None
    assert job.portrait.read_bytes() == files["portrait"]
    assert job.speech is not None
    assert job.speech.read_bytes() == files["speech"]
    store_of(client).delete("ann", first)
    assert job.portrait.exists()


def test_a_video_is_watched_and_its_progress_heard_while_it_is_made(
    client: TestClient, files: dict[str, bytes], pipeline: AvatarPipeline, tmp_path: Path
) -> None:
    import threading

    video = asked(client, files)
    working = threading.Timer(0.5, work, (client, pipeline))
    working.start()
    with client.stream("GET", f"/v1/videos/{video}/events") as events:
        lines = list(events.iter_lines())
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names[0] == "progress"
    assert names[-1] == "completed"
    states = [
        json.loads(line.removeprefix("data: "))["status"] for line in lines if line.startswith("data: ")
    ]
    assert (states[0], states[-1]) == ("queued", "completed")
    live = client.get(f"/v1/videos/{video}/live")
    (tmp_path / "live.mp4").write_bytes(live.content)
    content = client.get(f"/v1/videos/{video}/content").content
    (tmp_path / "content.mp4").write_bytes(content)
    watched, fetched = list(read_frames(tmp_path / "live.mp4")), list(read_frames(tmp_path / "content.mp4"))
    assert len(watched) == 15
    assert all((one == other).all() for one, other in zip(watched, fetched, strict=True))
    assert live.content == content  # what is complete is not made anew for every viewer
    working.join()


def test_what_is_cancelled_before_its_first_frame_has_nothing_to_fetch(
    client: TestClient, files: dict[str, bytes]
) -> None:
    video = asked(client, files)
    assert client.post(f"/v1/videos/{video}/cancel").json()["status"] == "cancelled"
    assert client.get(f"/v1/videos/{video}/content").status_code == 409
    assert client.get(f"/v1/videos/{video}/live").status_code == 409
    assert client.post(f"/v1/videos/{video}/cancel").json()["status"] == "cancelled"


# Operation.


def test_health_readiness_and_figures(
    client: TestClient, files: dict[str, bytes], pipeline: AvatarPipeline
) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    answer = client.get("/ready")
    assert (answer.status_code, answer.json()["workers"]) == (503, 0)
    store_of(client).worker_ready("worker-0")
    assert client.get("/ready").json()["status"] == "ready"
    asked(client, files)
    work(client, pipeline)
    asked(client, files)
    text = client.get("/metrics").text
    for line in (
        'stableavatar_videos{state="queued"} 1.0',
        'stableavatar_videos{state="completed"} 1.0',
        'stableavatar_videos_ended_total{state="completed"} 1.0',
        "stableavatar_video_seconds_total 0.6",
        "stableavatar_workers_ready 1.0",
        'stableavatar_requests_total{method="POST",route="/v1/videos",status="200"} 2.0',
    ):
        assert line in text, line
    client.get("/v1/videos/video_" + "0" * 24)
    client.get("/some/made/up/path")
    client.request("BREW", "/some/made/up/path")
    text = client.get("/metrics").text
    assert 'route="/v1/videos/{video_id}",status="404"' in text
    assert "made/up" not in text
    assert "BREW" not in text
    assert 'method="other"' in text


def test_a_fault_is_counted_and_has_the_form_of_other_errors(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    unshaken = TestClient(client.app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    unshaken.headers["Authorization"] = f"Bearer {ANN}"
    for error, status in ((ZeroDivisionError("a fault"), 500), (sqlite3.OperationalError("locked"), 503)):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(store_of(client), "list", fail)
        answer = unshaken.get("/v1/videos")
        assert answer.status_code == status
        assert answer.json()["error"]["message"].startswith("the server")
        assert f'route="/v1/videos",status="{status}"' in unshaken.get("/metrics").text


def test_finished_videos_say_when_they_expire(
    tmp_path: Path, files: dict[str, bytes], pipeline: AvatarPipeline
) -> None:
    service = Service(tmp_path / "jobs", [MODEL], keep_seconds=3600)
    with TestClient(create_app(service, service.store()), base_url="http://localhost") as client:
        video = asked(client, files)
        assert client.get(f"/v1/videos/{video}").json()["expires_at"] is None
        work(client, pipeline)
        done = client.get(f"/v1/videos/{video}").json()
        assert done["expires_at"] == pytest.approx(done["completed_at"] + 3600, abs=1)


def test_a_video_that_is_deleted_as_it_is_fetched_is_not_found(
    client: TestClient, files: dict[str, bytes], pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = asked(client, files)
    work(client, pipeline)
    response = watching.video_response

    def late(job: Job, path: Path, gone: Response) -> Response:
        answer = response(job, path, gone)
        assert store_of(client).delete("ann", job.id)
        return answer

    monkeypatch.setattr(videos, "video_response", late)
    answer = client.get(f"/v1/videos/{video}/content")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_the_description_is_whole(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    form = described["components"]["schemas"]["VideoRequest"]["properties"]
    for name in (
        "portrait",
        "speech",
        "prompt",
        "steps",
        "text_scale",
        "audio_scale",
        "order",
        "seed",
        "quality",
        "speech_normalisation",
    ):
        assert form[name]["description"], name
    assert not {"decoder_device", "window", "batch_windows", "compat", "lora"} & set(form)
    for path, operations in described["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path
            assert "422" not in operation["responses"]
