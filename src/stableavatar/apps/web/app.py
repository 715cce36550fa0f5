"""Running the page, with the workers that make its videos."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Before Gradio is imported: it would ask elsewhere for its latest version, and count its starts.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from stableavatar.apps.origins import is_local
from stableavatar.apps.running import keep_temporary_files, listen, run_with_workers
from stableavatar.apps.web.downloads import Downloads
from stableavatar.apps.web.page import create_page
from stableavatar.apps.web.studio import Scratch, Studio
from stableavatar.checkpoints.defaults import read_defaults
from stableavatar.jobs.intake import FileChecker, Limits
from stableavatar.jobs.store import JobStore
from stableavatar.jobs.worker import ModelChoice
from stableavatar.jobs.workers import HUNG_SECONDS, Workers

# What was asked for and has no video shows in no gallery: nobody can remove it.
_FORGET_SECONDS = 3600.0


@dataclass(frozen=True)
class PageService:
    """What the page is made of; see `apps.server.app.Service`.

    Attributes:
        hosts: names, beside this machine's, by which a proxy is asked for the page.
        vocals: the network that separates voices.
        checkpoints: where published weights are looked for, and downloaded to.
        downloads: visitors from other machines may see what is there, and download.
    """

    folder: Path
    model: ModelChoice
    limits: Limits = field(default_factory=Limits)
    hosts: tuple[str, ...] = ()
    vocals: Path = Path("checkpoints/Kim_Vocal_2.onnx")
    checkpoints: Path = Path("checkpoints")
    downloads: bool = False
    keep_seconds: float | None = None
    save_seconds: float = 60.0
    hung_seconds: float | None = HUNG_SECONDS
    verbosity: int = 0


def run_page(service: PageService, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Run the page until it is told to end.

    Args:
        announce: told its URL.

    Raises:
        InputError: the folder is another server's, or the port.
        CheckpointError: the model cannot be loaded.
    """
    limits = service.limits
    here = is_local(host)
    store = JobStore(service.folder, limits.quotas)
    model = service.model
    defaults = model.with_sampling(read_defaults(model.source, variant=model.variant, size=model.size))
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(store.own()))
        keep_temporary_files(store)  # before anybody asks where they are
        checker = stack.enter_context(contextlib.closing(FileChecker(limits, defaults)))
        downloads = stack.enter_context(contextlib.closing(Downloads(service.checkpoints)))
        scratch = stack.enter_context(contextlib.closing(Scratch()))
        studio = Studio(
            store,
            checker,
            limits,
            model.name or Path(model.source).name,
            defaults,
            service.vocals,
            downloads if (here and not service.hosts) or service.downloads else None,
            scratch,
        )
        listener, url = listen(host, port)
        announce(url)
        run_with_workers(
            create_page(studio, service.hosts if here or service.hosts else None),
            Workers(store, [model], hung_seconds=service.hung_seconds, verbosity=service.verbosity),
            listener=listener,
            save_seconds=service.save_seconds,
            keep_seconds=service.keep_seconds,
            forget_seconds=_FORGET_SECONDS,
            most_message=2**20,
        )
