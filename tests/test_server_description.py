"""Requests drawn from the OpenAPI description, of what it allows and of what it does not."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from command_line import portrait
from media_files import write_video
from serving import files_to_send
from stableavatar.apps.server.access import Keys
from stableavatar.apps.server.app import Service, create_app
from stableavatar.jobs.intake import Limits
from stableavatar.jobs.quotas import Quotas
from stableavatar.jobs.store import JobStore
from stableavatar.jobs.worker import ModelChoice
from stored_jobs import add

KEY = "a-key-of-the-test"


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_breaks_the_server(tmp_path: Path, mode: GenerationMode) -> None:
    """No answer is a 5xx, or another than is described, whatever state a video is in."""
    limits = Limits(quotas=Quotas(waiting=10_000, waiting_each=10_000, kept_each=10_000))
    service = Service(
        tmp_path / "jobs", [ModelChoice("toy", name="toy")], keys=Keys({KEY: "ann"}), limits=limits
    )
    store = service.store()
    store.worker_ready("worker-0")
    videos = [
        finished_video(store, tmp_path),
        *(of_state(store, it) for it in ("queued", "failed", "cancelled")),
    ]
    files = files_to_send(tmp_path)
    app = create_app(service, store)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    statuses: Counter[tuple[str, int]] = Counter()
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:
        if mode == GenerationMode.NEGATIVE and not operation_takes_anything(operation):
            continue

        @settings(
            max_examples=20, deadline=None, database=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(mode))
        def check(case: schemathesis.Case) -> None:
            turn = statuses.total()
            # Every other request of a video is of one that is there, and every other asks with files that can be used.
            live = case.path.endswith(("/live", "/events"))  # which wait for the end of what is not finished
            if turn % 2 and "video_id" in case.path_parameters and case.method != "DELETE":
                case.path_parameters["video_id"] = videos[0 if live else turn // 2 % len(videos)]
            if turn % 2 and isinstance(case.body, dict) and "multipart" in (case.media_type or ""):
                rest = ("portrait_from", "input_reference", "speech_from", "seconds", "model")
                kept = {name: value for name, value in case.body.items() if name not in rest}
                case.body = {**kept, **files}
            # That bytes are a picture, and one of two fields is needed, no description says; nor that forms and queries
            # are texts, which may mean what they are not.
            answer = case.call_and_validate(
                headers={"Authorization": f"Bearer {KEY}"},
                excluded_checks=[positive_data_acceptance, negative_data_rejection],
            )
            statuses[case.method, answer.status_code] += 1

        check()
    assert len(operations) == 12
    assert statuses.total() > 100
    assert max(status for _, status in statuses) < 500
    assert statuses["GET", 200] > 20
    if mode == GenerationMode.POSITIVE:
        assert statuses["POST", 200] > 5  # videos that were asked for
    else:
        assert sum(count for (_, status), count in statuses.items() if status >= 400) > 50


def operation_takes_anything(operation: schemathesis.APIOperation) -> bool:
    """Whether there is something that can be wrong in it."""
    return bool(operation.body or operation.query or operation.path_parameters)


def of_state(store: JobStore, state: str) -> str:
    """A job that is waiting, has failed or was stopped."""
    job = add(store)
    if state == "cancelled":
        store.cancel("ann", job.id)
    elif state == "failed":
        store.finish(job.id, "failed", error="no sound")
    return job.id


def finished_video(store: JobStore, folder: Path) -> str:
    """A job that is done, with files that can be read."""
    new = store.new_folder()
    portrait(folder / "portrait.png").rename(new / "portrait")
    shutil.copyfile(
        write_video(folder / "video.mp4", [np.zeros((32, 32, 3), np.uint8)] * 5, None), new / "video.mp4"
    )
    options = {"prompt": "", "fps": 25.0, "start": 0.0, "duration": 0.2, "width": 32, "height": 32}
    job = store.add("ann", new, options, {"seconds": 0.2})
    store.take("worker-0")
    store.finish(job.id, "completed", result={"width": 32, "height": 32, "frame_count": 5})
    return job.id
