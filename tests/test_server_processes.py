"""A real server and its workers: killed in the middle of its jobs, told to end, asked by many at a time."""

import contextlib
import json
import select
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from command_line import portrait, speech, toy_model
from serving import QUICK, Server, files_to_send, servers_of, states, until
from stableavatar import load
from stableavatar.apps.running import listen
from stableavatar.errors import InputError
from stableavatar.media.reading import probe, read_frames

KEY = "a-key-of-the-test"


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with servers_of(tmp_path / "jobs") as start:
        yield start


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    return files_to_send(tmp_path)


def test_a_kill_in_the_middle_of_five_jobs_loses_none(
    servers: Callable[..., Server], files: dict[str, bytes], tmp_path: Path
) -> None:
    server = servers().wait_ready()
    ids = []
    for seed in range(5):
        answer = httpx.post(
            f"{server.url}/v1/videos", files=files, data={**QUICK, "seed": str(seed)}, timeout=60
        )
        assert answer.status_code == 200, answer.text
        ids.append(answer.json()["id"])
    killed, saved, counted_on = 0, dict[Path, int](), 0
    for _ in range(3):  # killed three times, each time in the middle of a video

        def under_way(server: Server = server) -> bool:
            return any(
                it["status"] == "in_progress" and (it["step"] or {}).get("frame")
                for it in states(server).values()
            ) or all(it["status"] == "completed" for it in states(server).values())

        until(under_way)
        assert as_they_were(saved)
        killed += any(it["status"] == "in_progress" for it in states(server).values())
        server.kill()
        saved = saved_segments(server.folder)
        counted_on += len(saved)  # nothing where a quick machine has made them all
        server = servers().wait_ready()
        assert set(states(server)) == set(ids)
    assert killed > 0
    assert counted_on > 0

    def over() -> bool:
        assert as_they_were(saved)  # what was saved is gone on from, and not made again
        return all(it["status"] == "completed" for it in states(server).values())

    until(over, 120)
    pipeline = load(toy_model(), device="cpu")
    (tmp_path / "portrait").write_bytes(files["portrait"])
    (tmp_path / "speech").write_bytes(files["speech"])
    for seed in (0, 2):
        pipeline.generate(
            tmp_path / "portrait", tmp_path / "speech", tmp_path / "alone.mp4", seed=seed, steps=2, text_scale=1.0,
            audio_scale=1.0, width=48, height=48, resume=False,
        )  # fmt: skip
        (tmp_path / "made.mp4").write_bytes(httpx.get(f"{server.url}/v1/videos/{ids[seed]}/content").content)
        pairs = zip_longest(read_frames(tmp_path / "made.mp4"), read_frames(tmp_path / "alone.mp4"))
        assert all(
            one is not None and other is not None and np.array_equal(one, other) for one, other in pairs
        )
    assert server.end() in (0, 143)


def saved_segments(folder: Path) -> dict[Path, int]:
    """Segments that a saved state counts on, and when each was written."""
    found = {}
    for journal in folder.glob("jobs/*/.video.journal/journal.json"):
        count = (json.loads(journal.read_text())["rest"] or {}).get("segments", 0)
        for number in range(count):
            path = journal.parent / f"segment-{number:06d}.mp4"
            found[path] = path.stat().st_mtime_ns
    return found


def as_they_were(segments: dict[Path, int]) -> bool:
    """Whether those that are there still were not written again."""
    for path, written in segments.items():
        with contextlib.suppress(FileNotFoundError):  # its video is complete
            if path.stat().st_mtime_ns != written:
                return False
    return True


def test_two_cannot_have_one_port() -> None:
    listener, url = listen("127.0.0.1", 0)
    assert listener.proto == socket.IPPROTO_TCP  # else asyncio lets answers wait for acknowledgements
    with contextlib.closing(listener), pytest.raises(InputError, match="Choose another --port"):
        listen("127.0.0.1", int(url.rpartition(":")[2]))


def test_a_server_that_is_told_to_end_saves_what_it_makes(
    servers: Callable[..., Server], files: dict[str, bytes]
) -> None:
    server = servers("--checkpoint-every", "1000").wait_ready()
    data = {**QUICK, "steps": "12"}
    video = httpx.post(f"{server.url}/v1/videos", files=files, data=data, timeout=60).json()["id"]
    until(lambda: bool((states(server)[video]["step"] or {}).get("frame")))
    family = server.family()
    assert server.end() in (0, 143)
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert not [line for line in server.said if "Traceback" in line], server.said
    journal = server.folder / "jobs" / video / ".video.journal" / "journal.json"
    assert json.loads(journal.read_text())["count"] > 0
    again = servers().wait_ready()
    until(lambda: states(again)[video]["status"] == "completed")


def test_a_lost_worker_is_replaced_and_its_job_gone_on_with(
    servers: Callable[..., Server], files: dict[str, bytes]
) -> None:
    server = servers().wait_ready()
    video = httpx.post(f"{server.url}/v1/videos", files=files, data=QUICK, timeout=60).json()["id"]
    until(lambda: states(server)[video]["status"] == "in_progress")
    workers = [it for it in server.family() if it.nice() > psutil.Process(server.process.pid).nice()]
    assert len(workers) == 1
    workers[0].kill()
    until(lambda: states(server)[video]["status"] == "completed")
    assert any("was lost" in line for line in server.said)


def test_a_worker_that_hangs_is_replaced_and_its_job_gone_on_with(
    servers: Callable[..., Server], files: dict[str, bytes]
) -> None:
    server = servers("--hung-seconds", "15").wait_ready()
    data = {**QUICK, "steps": "30"}
    video = httpx.post(f"{server.url}/v1/videos", files=files, data=data, timeout=60).json()["id"]
    until(lambda: states(server)[video]["status"] == "in_progress")
    (worker,) = [it for it in server.family() if it.nice() > psutil.Process(server.process.pid).nice()]
    worker.suspend()  # as in a driver that never returns: SIGTERM does not end it
    until(lambda: states(server)[video]["status"] == "completed", 180)
    assert any("has not moved for 15 s" in line for line in server.said)
    assert not worker.is_running()


def test_stopping_keeps_what_is_there(
    servers: Callable[..., Server], files: dict[str, bytes], tmp_path: Path
) -> None:
    server = servers().wait_ready()
    data = {**QUICK, "order": "causal", "steps": "8"}
    video = httpx.post(f"{server.url}/v1/videos", files=files, data=data, timeout=60).json()["id"]
    with httpx.stream("GET", f"{server.url}/v1/videos/{video}/live", timeout=60) as live:
        seen = b""
        for piece in live.iter_bytes():
            if not seen:  # its first frames are there: stop
                httpx.post(f"{server.url}/v1/videos/{video}/cancel")
            seen += piece
    until(lambda: states(server)[video]["status"] == "cancelled")
    (tmp_path / "live.mp4").write_bytes(seen)
    (tmp_path / "kept.mp4").write_bytes(httpx.get(f"{server.url}/v1/videos/{video}/content").content)
    kept = list(read_frames(tmp_path / "kept.mp4"))
    assert 0 < len(kept) < 75
    pairs = zip_longest(read_frames(tmp_path / "live.mp4"), kept)
    assert all(one is not None and other is not None and np.array_equal(one, other) for one, other in pairs)


def test_many_ask_at_a_time_and_health_is_answered(
    servers: Callable[..., Server], files: dict[str, bytes]
) -> None:
    """50 clients on loopback, some of which watch, while videos are made: no job lost, health within 100 ms for 99 of
    100 on connections of their own."""
    limits = ("--most-waiting", "60", "--most-waiting-each", "60")
    server = servers(*limits).wait_ready()
    ids: list[str] = []
    wrong: list[str] = []

    def client(number: int) -> None:
        with httpx.Client(timeout=600) as own:
            data = {**QUICK, "steps": "1", "seconds": "0.5", "seed": str(number)}
            answer = own.post(f"{server.url}/v1/videos", files=files, data=data)
            if answer.status_code != 200:
                wrong.append(answer.text)
                return
            video = answer.json()["id"]
            ids.append(video)
            if number % 8 == 0:
                with own.stream("GET", f"{server.url}/v1/videos/{video}/live") as live:
                    if not sum(map(len, live.iter_bytes())):
                        wrong.append("nothing to watch")
            with own.stream("GET", f"{server.url}/v1/videos/{video}/events") as events:
                last = [line for line in events.iter_lines() if line.startswith("event: ")][-1]
            if last != "event: completed":
                wrong.append(last)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(50)]
    for thread in clients:
        thread.start()
    took: list[float] = []
    lists: list[float] = []
    making: list[bool] = []
    trust = httpx.create_ssl_context()  # once: it takes as long as many answers
    while any(thread.is_alive() for thread in clients):
        if len(took) % 20 == 0:
            began = time.perf_counter()
            answer = httpx.get(f"{server.url}/v1/videos?limit=100", timeout=30, verify=trust)
            assert answer.status_code == 200
            lists.append(time.perf_counter() - began)
            making.append(any(it["status"] == "in_progress" for it in answer.json()["data"]))
        with httpx.Client(verify=trust) as own:
            began = time.perf_counter()
            assert own.get(f"{server.url}/health", timeout=10).status_code == 200
            took.append(time.perf_counter() - began)
        time.sleep(0.02)
    for thread in clients:
        thread.join()
    assert not wrong
    assert len(set(ids)) == 50
    assert all(states(server)[video]["status"] == "completed" for video in ids)
    percentile = statistics.quantiles(took, n=100)[98]
    print(
        f"health: {len(took)} answers, median {1000 * statistics.median(took):.1f} ms, 99th {1000 * percentile:.1f} ms"
    )
    assert percentile < 0.1, (percentile, len(took))
    assert len(took) >= 100
    assert sum(making) > len(making) / 2
    assert max(lists) < 5, "other requests are answered too"


def test_nothing_is_read_of_who_has_no_key_nor_more_than_is_taken(
    servers: Callable[..., Server], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"ann {KEY}\n", encoding="utf-8")
    server = servers("--api-keys", str(keys), "--most-megabytes", "1").wait_ready()
    for authorization, status in (("", b"401"), (f"Authorization: Bearer {KEY}\r\n", b"413")):
        answer, sent = send_without_end(server.port, authorization)
        assert answer.split()[1] == status
        assert sent < 8_000_000, (status, sent)


def send_without_end(port: int, headers: str) -> tuple[bytes, int]:
    """A form that does not end, sent until there is an answer: that, and how many bytes were sent."""
    begin = b'--x\r\nContent-Disposition: form-data; name="speech"; filename="s"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        head = (
            f"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}Transfer-Encoding: chunked\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        )
        line.sendall(head.encode() + b"%x\r\n%s\r\n" % (len(begin), begin))
        sent = 0
        piece = b"%x\r\n%s\r\n" % (10_000, bytes(10_000))
        while sent < 100_000_000 and not select.select([line], [], [], 0)[0]:
            try:
                line.sendall(piece)
            except OSError:
                break
            sent += 10_000
        return line.recv(1000), sent


def test_what_cannot_be_served_is_said_with_status_2(tmp_path: Path, servers: Callable[..., Server]) -> None:
    def fails(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "stableavatar", "serve", "--folder", str(tmp_path / "other"),
             "--port", "0", *arguments],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "--api-keys" in fails("--host", "0.0.0.0")
    assert "no-such-folder" in fails("--model", str(tmp_path / "no-such-folder"))
    assert "cannot be read" in fails("--api-keys", str(tmp_path / "none"))
    assert "seconds 0.0: give a number above 0" in fails("--most-seconds", "0")
    assert "--keep-days inf: give at most" in fails("--keep-days", "inf")
    assert "overlap of 3 latent frames does not fit a window of 9" in fails("--window", "9")
    assert "a window of 10 frames is not 4n+1" in fails("--window", "10")
    assert "batch windows 0 is too small" in fails("--batch-windows", "0")
    server = servers().wait_ready()
    assert "Choose another --port" in fails("--port", str(server.port))
    (tmp_path / "other").rename(tmp_path / "unused")
    done = subprocess.run(
        [sys.executable, "-m", "stableavatar", "serve", "--folder", str(server.folder), "--port", "0"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "another server uses this folder" in done.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_commands_of_the_documentation(servers: Callable[..., Server], tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "server.md").read_text(encoding="utf-8")
    section = text.split("## Asking for a video")[1]
    commands = section.split("```bash\n")[1].split("```")[0]
    server = servers().wait_ready()
    portrait(tmp_path / "portrait.png")
    speech(tmp_path / "speech.wav")
    script = commands.replace("http://127.0.0.1:8000", server.url)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stdout.replace('"error":null', "")
    assert "event: completed" in done.stdout
    assert probe(tmp_path / "live.mp4").frames == probe(tmp_path / "talk.mp4").frames == 15
    assert (tmp_path / "talk.jpg").read_bytes()[:2] == b"\xff\xd8"
    assert '"deleted":true' in done.stdout
