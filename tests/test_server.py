"""The server's answers: asking for videos and fetching them, who may, and what strangers may send."""

import io
import json
import os
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from command_line import portrait, speech, toy_model
from stableavatar import load
from stableavatar.apps.server.access import LOCAL, Keys, check_host, is_local
from stableavatar.apps.server.app import Service, create_app
from stableavatar.errors import InputError
from stableavatar.jobs.intake import Limits
from stableavatar.jobs.store import JobStore
from stableavatar.jobs.worker import ModelChoice, make
from stableavatar.media.video import probe, read_frames, read_metadata
from stableavatar.pipeline import AvatarPipeline

ANN, BOB = "ann-has-a-long-key", "bob-has-another-one"
MODEL = ModelChoice("toy", name="toy", checkpoint_every=0)
QUICK = {"steps": "1", "text_scale": "1", "audio_scale": "1", "size": "32x32"}
LIMITS = Limits(upload_bytes=300_000, seconds=2.0, portrait_pixels=1_000_000, waiting=6, waiting_each=4)


@pytest.fixture(scope="module")
def pipeline() -> AvatarPipeline:
    return load(toy_model(), device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    return {
        "portrait": portrait(folder / "portrait.png").read_bytes(),
        "speech": speech(folder / "speech.wav", 0.6).read_bytes(),
    }


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    service = Service(tmp_path / "jobs", [MODEL], keys=Keys({ANN: "ann", BOB: "bob"}), limits=LIMITS)
    with TestClient(create_app(service, service.store()), base_url="http://127.0.0.1") as client:
        client.headers["Authorization"] = f"Bearer {ANN}"
        yield client


def store_of(client: TestClient) -> JobStore:
    store: JobStore = client.app.state.store  # type: ignore[attr-defined]
    return store


def ask(client: TestClient, files: dict[str, bytes], **fields: str) -> Any:
    """POST /v1/videos with these files."""
    return client.post("/v1/videos", files=files, data={**QUICK, **fields})


def asked(client: TestClient, files: dict[str, bytes], **fields: str) -> str:
    answer = ask(client, files, **fields)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def work(client: TestClient, pipeline: AvatarPipeline) -> None:
    """What a worker does, for one job."""
    store = store_of(client)
    job = store.take("worker-0")
    assert job is not None
    make(store, job, pipeline, MODEL)


def as_bob(client: TestClient) -> dict[str, str]:
    return {"Authorization": f"Bearer {BOB}"}


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


def test_the_same_seed_makes_the_same_video_and_none_is_told(
    client: TestClient, files: dict[str, bytes]
) -> None:
    first = ask(client, files).json()["options"]["seed"]
    second = ask(client, files).json()["options"]["seed"]
    assert first != second


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
    working.join()


def test_what_is_cancelled_before_its_first_frame_has_nothing_to_fetch(
    client: TestClient, files: dict[str, bytes]
) -> None:
    video = asked(client, files)
    assert client.post(f"/v1/videos/{video}/cancel").json()["status"] == "cancelled"
    assert client.get(f"/v1/videos/{video}/content").status_code == 409
    assert client.get(f"/v1/videos/{video}/live").status_code == 409
    assert client.post(f"/v1/videos/{video}/cancel").json()["status"] == "cancelled"


# Who may.


def test_without_a_key_nothing_is_told(client: TestClient, files: dict[str, bytes]) -> None:
    video = asked(client, files)
    for headers in (
        {"Authorization": ""},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {ANN}"},
    ):
        for method, path in (
            ("GET", "/v1/videos"), ("GET", f"/v1/videos/{video}"), ("GET", f"/v1/videos/{video}/content"),
            ("GET", f"/v1/videos/{video}/live"), ("GET", f"/v1/videos/{video}/events"),
            ("POST", f"/v1/videos/{video}/cancel"), ("DELETE", f"/v1/videos/{video}"), ("POST", "/v1/videos"),
            ("GET", "/v1/models"),
        ):  # fmt: skip
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 401, (method, path, answer.text)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"


def test_nobody_sees_or_touches_anothers_videos(
    client: TestClient, files: dict[str, bytes], pipeline: AvatarPipeline
) -> None:
    video = asked(client, files)
    work(client, pipeline)
    for method, path in (
        ("GET", ""), ("GET", "/content"), ("GET", "/live"), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")
    ):  # fmt: skip
        answer = client.request(method, f"/v1/videos/{video}{path}", headers=as_bob(client))
        assert answer.status_code == 404, (method, path)
    assert client.get("/v1/videos", headers=as_bob(client)).json()["data"] == []
    assert client.get("/v1/videos", headers=as_bob(client), params={"after": video}).status_code == 404
    for name in ("portrait_from", "speech_from"):
        sent = {"speech": files["speech"]} if name == "portrait_from" else {"portrait": files["portrait"]}
        answer = client.post("/v1/videos", files=sent, data={**QUICK, name: video}, headers=as_bob(client))
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, name)
    assert client.get(f"/v1/videos/{video}/content").status_code == 200


def test_keys_are_read_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(
        f"# people\nann {ANN}  # since May\n\nann ann-has-a-second-key\nbob {BOB}\n", encoding="utf-8"
    )
    keys = Keys.read(file)
    assert [keys.owner(key) for key in (ANN, "ann-has-a-second-key", BOB)] == ["ann", "ann", "bob"]
    assert keys.owner("nobody-has-this-key") is None
    assert keys.owner(None) is None
    assert Keys().owner(None) == Keys().owner("whatever") == LOCAL
    for text, words in (
        ("ann short", "too short"), ("ann", "line 1: give a name and a key"), ("# nobody", "holds none"),
        (f"ann {ANN}\nbob {ANN}", "line 2: the key of ann again"),
    ):  # fmt: skip
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=words):
            Keys.read(file)
    with pytest.raises(InputError, match="cannot be read"):
        Keys.read(tmp_path / "none")


def test_without_keys_a_server_is_for_its_own_machine(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "::1", "[::1]", "localhost", "127.9.9.9"):
        assert is_local(host)
        check_host(host, Keys())
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", "localhost.example.org", ""):
        with pytest.raises(InputError, match="--api-keys"):
            check_host(host, Keys())
        check_host(host, Keys({ANN: "ann"}))
    service = Service(tmp_path / "jobs", [MODEL])
    with TestClient(create_app(service, service.store()), base_url="http://127.0.0.1:8000") as client:
        assert client.get("/v1/videos").status_code == 200
        assert client.get("/v1/videos", headers={"Origin": "http://localhost:3000"}).status_code == 200
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Host": "evil.example:8000"},
        ):
            assert client.get("/v1/videos", headers=headers).status_code == 403
            assert client.post("/v1/videos", headers=headers).status_code == 403
            assert client.get("/metrics", headers=headers).status_code == 403


# What strangers send.


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"steps": "1000"}, 400, "100"),
        ({"steps": "many"}, 400, "steps"),
        ({"steps": "9" * 400}, 400, "steps"),
        ({"order": "lockstep"}, 400, "order"),
        ({"size": "640x640"}, 400, "409600 pixels"),
        ({"size": "33x32"}, 400, "multiple of 16"),
        ({"size": "32x32x32"}, 400, "size"),
        ({"seconds": "2.5"}, 400, "2 at most"),
        ({"seconds": "nan"}, 400, "seconds"),
        ({"fps": "1e300"}, 400, "fps"),
        ({"fps": "120"}, 400, "60 at most"),
        ({"seed": "-1"}, 400, "seed"),
        ({"start": "1"}, 400, "lies after its end"),
        ({"model": "../../etc/passwd"}, 404, "this server has toy"),
        ({"model": "https://example.org/model"}, 404, "this server has toy"),
        ({"decoder_device": "cuda"}, 400, "decoder_device"),
        ({"lora": "/etc/passwd"}, 400, "lora"),
        ({"speech_from": "../../x"}, 400, "speech_from"),
        ({"prompt": "x" * 5000}, 400, "4000 characters"),
        ({"prompt": "x" * 200_000}, 400, "exceeded maximum size"),
    ],
)
def test_what_cannot_be_asked_for_is_said(
    client: TestClient, files: dict[str, bytes], fields: dict[str, str], status: int, words: str
) -> None:
    sent = {"portrait": files["portrait"]} if "speech_from" in fields else files
    answer = ask(client, sent, **fields)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]
    refused_cleanly(client)


def test_files_have_to_be_given_once(client: TestClient, files: dict[str, bytes]) -> None:
    picture, sound = files["portrait"], files["speech"]
    for sent, fields, words in (
        ({"speech": sound}, {}, "give either portrait"),
        ({"portrait": picture, "input_reference": picture, "speech": sound}, {}, "not both"),
        (
            {"portrait": picture, "speech": sound},
            {"portrait_from": "video_" + "0" * 24},
            "give either portrait",
        ),
        ({"portrait": picture, "speech": sound}, {"speech_from": "video_" + "0" * 24}, "not both"),
        ({"portrait": picture}, {}, "needs a duration"),
        ({}, {}, "give either portrait"),
    ):
        answer = ask(client, sent, **fields)
        assert answer.status_code == 400, answer.text
        assert words in answer.json()["error"]["message"]
    answer = ask(client, {"portrait": picture}, speech_from="video_" + "0" * 24)
    assert answer.status_code == 404
    refused_cleanly(client)


def hostile_files(picture: bytes, sound: bytes) -> dict[str, tuple[str, bytes]]:
    """Files that no one should be able to do harm with: a field, and what is sent in it."""
    bomb = png_of_size(30_000, 30_000)
    return {
        "empty picture": ("portrait", b""),
        "empty sound": ("speech", b""),
        "cut picture": ("portrait", picture[: len(picture) // 2]),
        "cut picture's header": ("portrait", picture[:20]),
        "cut sound": ("speech", sound[: len(sound) // 2]),
        "cut sound's header": ("speech", sound[:20]),
        "text for a picture": ("portrait", b"GET / HTTP/1.1\r\n" * 100),
        "text for sound": ("speech", b"hello " * 100),
        "picture for sound": ("speech", picture),
        "sound for a picture": ("portrait", sound),
        "noise for a picture": ("portrait", os.urandom(5000)),
        "noise for sound": ("speech", os.urandom(5000)),
        "bomb": ("portrait", bomb),
        "one pixel": ("portrait", png_of_size(1, 1)),
        "playlist": ("speech", b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n/etc/passwd\n#EXT-X-ENDLIST\n"),
        "list": ("speech", b"ffconcat version 1.0\nfile /etc/passwd\n"),
        "svg": ("portrait", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
        "postscript": ("portrait", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n"),
    }  # fmt: skip


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of one colour, small, however large the picture."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_hostile_files_are_refused_and_leave_nothing(client: TestClient, files: dict[str, bytes]) -> None:
    for name, (field, content) in hostile_files(files["portrait"], files["speech"]).items():
        answer = ask(client, {**files, field: content})
        assert answer.status_code == 400, (name, answer.status_code, answer.text)
        message = answer.json()["error"]["message"]
        assert str(store_of(client).folder) not in message, name
        assert "Traceback" not in message
        refused_cleanly(client)


@pytest.mark.parametrize(
    "name",
    ["../../../../tmp/evil.png", "/etc/passwd", "C:\\evil.exe", "a\x00b.png", "x" * 5000, "", "..", "%2e%2e"],
)
def test_names_of_files_mean_nothing(client: TestClient, files: dict[str, bytes], name: str) -> None:
    answer = client.post(
        "/v1/videos",
        files={"portrait": (name, files["portrait"]), "speech": (name, files["speech"])},
        data=QUICK,
    )
    if answer.status_code == 200:
        job = store_of(client).get("ann", answer.json()["id"])
        assert job is not None
        assert sorted(path.name for path in job.folder.iterdir()) == ["portrait", "speech"]
    else:
        assert answer.status_code == 400
        refused_cleanly(client)
    assert not Path("/tmp/evil.png").exists()


def test_more_bytes_than_are_taken_are_refused(client: TestClient, files: dict[str, bytes]) -> None:
    answer = ask(client, {**files, "speech": bytes(400_000)})
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"
    refused_cleanly(client)


def test_a_full_queue_is_said(client: TestClient, files: dict[str, bytes]) -> None:
    for _ in range(4):
        asked(client, files)
    answer = ask(client, files)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    for _ in range(2):
        assert client.post("/v1/videos", files=files, data=QUICK, headers=as_bob(client)).status_code == 200
    answer = client.post("/v1/videos", files=files, data=QUICK, headers=as_bob(client))
    assert (answer.status_code, answer.json()["error"]["message"][:8]) == (429, "Too many")
    assert list((store_of(client).folder / "incoming").iterdir()) == []


@pytest.mark.parametrize(
    "path", ["/v1/videos/..%2f..%2fetc%2fpasswd", "/v1/videos/video_", "/v1/videos/x/content"]
)
def test_ids_are_ids(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (400, 404)


def test_every_fault_has_the_same_form(client: TestClient) -> None:
    for answer in (client.get("/nowhere"), client.put("/v1/videos"), client.get("/v1/videos?limit=x")):
        assert 400 <= answer.status_code < 500
        assert answer.json()["error"]["message"]


def refused_cleanly(client: TestClient) -> None:
    """Nothing is left of a request."""
    store = store_of(client)
    assert list((store.folder / "incoming").iterdir()) == []
    assert list((store.folder / "jobs").iterdir()) == []
    assert sum(store.counts().values()) == 0


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
    ):
        assert form[name]["description"], name
    assert not {"decoder_device", "window", "batch_windows", "compat", "lora"} & set(form)
    for path, operations in described["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path
            assert "422" not in operation["responses"]
