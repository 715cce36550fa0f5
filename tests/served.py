"""A server to ask in this process, with two users and a model that takes a moment."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

from command_line import portrait, speech
from stableavatar.apps.server.access import Keys
from stableavatar.apps.server.app import Service, create_app
from stableavatar.jobs.intake import Limits
from stableavatar.jobs.quotas import Quotas
from stableavatar.jobs.store import JobStore
from stableavatar.jobs.worker import ModelChoice, make
from stableavatar.pipeline import AvatarPipeline

ANN, BOB = "ann-has-a-long-key", "bob-has-another-one"
MODEL = ModelChoice("toy", name="toy", checkpoint_every=0)
QUICK = {"steps": "1", "text_scale": "1", "audio_scale": "1", "size": "32x32"}
LIMITS = Limits(upload_bytes=300_000, seconds=2.0, portrait_pixels=1_000_000, quotas=Quotas(6, 4))


def files_to_send(folder: Path) -> dict[str, bytes]:
    """A portrait and a recording."""
    return {
        "portrait": portrait(folder / "portrait.png").read_bytes(),
        "speech": speech(folder / "speech.wav", 0.6).read_bytes(),
    }


@contextmanager
def served(folder: Path) -> Iterator[TestClient]:
    """Ann's client."""
    service = Service(folder, [MODEL], keys=Keys({ANN: "ann", BOB: "bob"}), limits=LIMITS)
    with TestClient(create_app(service, service.store()), base_url="http://127.0.0.1") as client:
        client.headers["Authorization"] = f"Bearer {ANN}"
        yield client


def store_of(client: TestClient) -> JobStore:
    assert isinstance(client.app, FastAPI)
    store: JobStore = client.app.state.store
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
