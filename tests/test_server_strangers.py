"""Who may ask a server, and what strangers may send it."""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from command_line import toy_model
from media_files import tone, write_sound
from served import ANN, BOB, LIMITS, MODEL, QUICK, as_bob, ask, asked, files_to_send, served, store_of, work
from stableavatar import load
from stableavatar.apps.origins import is_local
from stableavatar.apps.server.access import LOCAL, Keys, check_host
from stableavatar.apps.server.app import Service, create_app
from stableavatar.errors import InputError
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


def test_little_that_becomes_much_is_refused_or_harmless(
    client: TestClient, files: dict[str, bytes], tmp_path: Path
) -> None:
    """Within the limits of what is sent, and of the picture."""
    image = Image.open(io.BytesIO(files["portrait"]))
    text, canvas = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text("comment", "x" * 50_000_000, zip=True)
    image.convert("P").save(canvas, "GIF")
    wide = bytearray(canvas.getvalue())
    wide[6:10] = struct.pack("<HH", 60_000, 60_000)
    minutes = write_sound(
        tmp_path / "minutes.flac", np.zeros(8000 * 1200, np.float32), 8000, "flac"
    ).read_bytes()
    assert len(minutes) < LIMITS.upload_bytes
    for name, (field, content) in {
        "text": ("portrait", saved(image, "PNG", pnginfo=text)),
        "colour profile": ("portrait", saved(image, "PNG", icc_profile=bytes(50_000_000))),
        "canvas": ("portrait", bytes(wide)),
        "minutes of silence": ("speech", minutes),
    }.items():
        answer = ask(client, {**files, field: content})
        assert answer.status_code in (200, 400), (name, answer.text)
        if name in ("canvas", "minutes of silence"):
            assert answer.status_code == 400, name
        if answer.status_code == 200:
            client.delete(f"/v1/videos/{answer.json()['id']}")
        refused_cleanly(client)


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    """A picture's file."""
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


@pytest.fixture(scope="module")
def of_every_kind(
    files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[bytes, ...]]:
    """The same picture and sound in the files that people have."""
    folder = tmp_path_factory.mktemp("kinds")
    image = Image.open(io.BytesIO(files["portrait"])).convert("RGB")
    sounds = {"mp3": "libmp3lame", "m4a": "aac", "ogg": "libopus", "flac": "flac", "webm": "libopus"}
    made = [
        write_sound(folder / f"a.{ending}", tone(0.6, 48_000), 48_000, codec)
        for ending, codec in sounds.items()
    ]
    return {
        "portrait": tuple(saved(image, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")),
        "speech": (files["speech"], *(path.read_bytes() for path in made)),
    }


def test_files_of_every_kind_are_taken(
    client: TestClient, files: dict[str, bytes], of_every_kind: dict[str, tuple[bytes, ...]]
) -> None:
    for field, kinds in of_every_kind.items():
        for content in kinds:
            video = asked(client, {**files, field: content})
            assert client.delete(f"/v1/videos/{video}").status_code == 200


@settings(
    max_examples=250, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_files_with_damage_anywhere_break_nothing(
    client: TestClient,
    files: dict[str, bytes],
    of_every_kind: dict[str, tuple[bytes, ...]],
    pipeline: AvatarPipeline,
    data: st.DataObject,
) -> None:
    """Cut, with bytes changed, with parts twice or left out, one within the other: refused, or made into a
    video like any other, or into a sentence of why not."""
    field = data.draw(st.sampled_from(("portrait", "speech")))
    content = bytearray(data.draw(st.sampled_from(of_every_kind[field])))
    for _ in range(data.draw(st.integers(1, 4))):
        place, length = data.draw(st.integers(0, max(len(content) - 1, 0))), data.draw(st.integers(1, 400))
        how = data.draw(st.sampled_from(("cut", "change", "twice", "out", "other", "zeros")))
        if how == "cut":
            del content[place:]
        elif how == "change":
            content[place : place + length] = data.draw(st.binary(min_size=1, max_size=24))
        elif how == "twice":
            content[place:place] = content[place : place + length]
        elif how == "out":
            del content[place : place + length]
        elif how == "other":
            content[place:place] = files["speech" if field == "portrait" else "portrait"][:length]
        else:
            content[place : place + length] = bytes(length)
    name = data.draw(st.sampled_from(("a.png", "a.wav", "a.m3u8", "../a", "")))
    kind = data.draw(st.sampled_from(("image/png", "audio/wav", "text/html", "application/x-sh")))
    answer = client.post("/v1/videos", files={**files, field: (name, bytes(content), kind)}, data=QUICK)
    if answer.status_code == 200:
        work(client, pipeline)
        path = f"/v1/videos/{answer.json()['id']}"
        made = client.get(path).json()
        assert made["status"] == "completed" or "damaged" in made["error"]["message"], made
        assert client.delete(path).status_code == 200
    else:
        assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
        assert str(store_of(client).folder) not in answer.text
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
