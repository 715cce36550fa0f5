"""``stableavatar serve`` and ``stableavatar app``; see `stableavatar.apps.cli`."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from stableavatar.choices import Dtype, ModelSize, Offload, Variant
from stableavatar.errors import InputError, extra_missing
from stableavatar.options import GenerateOptions

_MOST_DAYS = 36500
_MODEL, _LIMITS, _PEOPLE = "The model", "What is taken at most", "Who may use it"

ModelOption = Annotated[
    str,
    typer.Option(help="tiny, a folder of weights, or a hub id, as for generate.", rich_help_panel=_MODEL),
]
VariantOption = Annotated[Variant | None, typer.Option(help="Of published weights.", rich_help_panel=_MODEL)]
SizeOption = Annotated[ModelSize | None, typer.Option(help="Of published weights.", rich_help_panel=_MODEL)]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE[:SCALE]", help="A LoRA, as for generate.", rich_help_panel=_MODEL),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Of the weights.", rich_help_panel=_MODEL)]
OffloadOption = Annotated[
    Offload, typer.Option(help="For little GPU memory, as for generate.", rich_help_panel=_MODEL)
]


def _as_of_generate(name: str) -> Any:
    """The option that `generate` has, for every video of a server."""
    known = next(field for field in fields(GenerateOptions) if field.name == name)
    return typer.Option(help=known.metadata["help"], rich_help_panel=_MODEL)


WindowOption = Annotated[int | None, _as_of_generate("window")]
BatchWindowsOption = Annotated[int, _as_of_generate("batch_windows")]
DecoderDeviceOption = Annotated[str | None, _as_of_generate("decoder_device")]
DecoderTilingOption = Annotated[bool, _as_of_generate("decoder_tiling")]
KeepDaysOption = Annotated[
    float, typer.Option(min=0, help="Finished videos are removed after so long; 0: never.")
]
HungOption = Annotated[
    float,
    typer.Option(
        "--hung-seconds",
        min=0,
        help="A worker whose step takes longer is taken to hang, ended and started again; 0: never.",
    ),
]
VerboseOption = Annotated[
    int,
    typer.Option("--verbose", "-v", count=True, show_default=False, help="Say what is being done."),
]


def serve(
    folder: Annotated[
        Path,
        typer.Option("--folder", help="Where jobs and videos are kept; a server started anew goes on."),
    ] = Path("stableavatar-jobs"),
    host: Annotated[
        str, typer.Option(help="The address to listen at; others than this machine's need --api-keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen at.")] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Who may use it: a name and a key a line.", rich_help_panel=_PEOPLE
        ),
    ] = None,
    model: ModelOption = "tiny",
    name: Annotated[
        str | None,
        typer.Option(help="What the model is called in requests.", rich_help_panel=_MODEL),
    ] = None,
    variant: VariantOption = None,
    model_size: SizeOption = None,
    lora: LoraOption = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a worker; given several times, so many workers, such as cuda:0 and cuda:1.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    offload: OffloadOption = "none",
    window: WindowOption = None,
    batch_windows: BatchWindowsOption = 1,
    decoder_device: DecoderDeviceOption = None,
    decoder_tiling: DecoderTilingOption = False,
    most_megabytes: Annotated[
        float, typer.Option(help="Of a request with its files.", rich_help_panel=_LIMITS)
    ] = 200.0,
    most_seconds: Annotated[float, typer.Option(help="Of a video.", rich_help_panel=_LIMITS)] = 600.0,
    most_megapixels: Annotated[float, typer.Option(help="Of a portrait.", rich_help_panel=_LIMITS)] = 40.0,
    most_video_pixels: Annotated[
        int, typer.Option(help="Width x height of a video.", rich_help_panel=_LIMITS)
    ] = 832 * 480,
    most_steps: Annotated[int, typer.Option(help="Of denoising.", rich_help_panel=_LIMITS)] = 100,
    most_waiting: Annotated[int, typer.Option(help="Videos that wait.", rich_help_panel=_LIMITS)] = 100,
    most_waiting_each: Annotated[
        int, typer.Option(help="Videos of one owner that wait.", rich_help_panel=_LIMITS)
    ] = 20,
    most_kept_each: Annotated[
        int, typer.Option(help="Videos of one owner that are there.", rich_help_panel=_LIMITS)
    ] = 500,
    most_gigabytes_each: Annotated[
        float,
        typer.Option(help="Of one owner's videos and what was sent for them.", rich_help_panel=_LIMITS),
    ] = 20.0,
    keep_days: KeepDaysOption = 7.0,
    checkpoint_every: Annotated[
        float, typer.Option(min=0, help="Seconds after which the state of a video is saved.")
    ] = 10.0,
    hung_seconds: HungOption = 3600.0,
    verbose: VerboseOption = 0,
) -> None:
    """Make videos for other programs, by HTTP.

    In the form of OpenAI's videos API; /docs describes it. What was asked for survives a restart and a kill.
    """
    try:
        from stableavatar.apps.server import app as server
        from stableavatar.apps.server.access import Keys
    except ImportError as error:
        raise extra_missing(f"serve needs packages that are not installed ({error.name})", "serve") from error
    from stableavatar.checkpoints.defaults import read_defaults
    from stableavatar.jobs.intake import Limits
    from stableavatar.jobs.quotas import Quotas, check_limit
    from stableavatar.jobs.worker import ModelChoice
    from stableavatar.logs import log_to_stderr

    for option, value in (
        ("--most-megabytes", most_megabytes),
        ("--most-megapixels", most_megapixels),
        ("--most-gigabytes-each", most_gigabytes_each),
    ):
        check_limit(option, value)
    log_to_stderr(verbose)
    sampling = _sampling(window, batch_windows, decoder_device, decoder_tiling)
    limits = Limits(
        upload_bytes=int(most_megabytes * 1e6),
        seconds=most_seconds,
        portrait_pixels=int(most_megapixels * 1e6),
        video_pixels=most_video_pixels,
        steps=most_steps,
        quotas=Quotas(most_waiting, most_waiting_each, most_kept_each, int(most_gigabytes_each * 1e9)),
    )
    models = [
        ModelChoice(
            model,
            device=it,
            dtype=dtype,
            offload=offload,
            variant=variant,
            size=model_size,
            lora=tuple(lora or ()),
            name=name or "",
            checkpoint_every=checkpoint_every,
            sampling=sampling,
        )
        for it in device or ["auto"]
    ]
    service = server.Service(
        folder,
        models,
        keys=Keys() if api_keys is None else Keys.read(api_keys),
        limits=limits,
        defaults=models[0].with_sampling(read_defaults(model, variant=variant, size=model_size)),
        keep_seconds=_keep_seconds(keep_days),
        hung_seconds=hung_seconds or None,
        verbosity=verbose,
    )
    server.serve(service, host, port, lambda url: _say(f"{url}/docs describes the server; Ctrl-C ends it."))


def app(
    folder: Annotated[
        Path, typer.Option("--folder", help="Where videos are kept; a page started anew has them.")
    ] = Path("stableavatar-videos"),
    host: Annotated[
        str,
        typer.Option(help="The address to listen at; 0.0.0.0 lets everybody in the network use the page."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen at.")] = 7860,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name by which a proxy before the page is asked for it."),
    ] = None,
    model: ModelOption = "tiny",
    variant: VariantOption = None,
    model_size: SizeOption = None,
    lora: LoraOption = None,
    device: Annotated[str, typer.Option(help="As for generate.", rich_help_panel=_MODEL)] = "auto",
    dtype: DtypeOption = "auto",
    offload: OffloadOption = "none",
    window: WindowOption = None,
    batch_windows: BatchWindowsOption = 1,
    decoder_device: DecoderDeviceOption = None,
    decoder_tiling: DecoderTilingOption = False,
    checkpoints: Annotated[
        Path, typer.Option(help="Where the page puts published weights that it downloads.")
    ] = Path("checkpoints"),
    downloads: Annotated[
        bool,
        typer.Option(
            "--downloads",
            help="With another --host, or --allow-host, too: visitors may have it download weights.",
        ),
    ] = False,
    vocals: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The network that separates voices; by default among those weights."
        ),
    ] = None,
    most_seconds: Annotated[float, typer.Option(help="Of a video.", rich_help_panel=_LIMITS)] = 3600.0,
    most_gigabytes_each: Annotated[
        float,
        typer.Option(help="Of one browser's videos and what was sent for them.", rich_help_panel=_LIMITS),
    ] = 200.0,
    keep_days: KeepDaysOption = 0.0,
    hung_seconds: HungOption = 3600.0,
    verbose: VerboseOption = 0,
) -> None:
    """Show a web page that makes videos, in English and Chinese.

    A browser sees its own videos alone; several take turns.
    """
    try:
        from stableavatar.apps.web import app as web
    except ImportError as error:
        raise extra_missing(f"app needs packages that are not installed ({error.name})", "web") from error
    from stableavatar.jobs.intake import Limits
    from stableavatar.jobs.quotas import Quotas, check_limit
    from stableavatar.jobs.worker import ModelChoice
    from stableavatar.logs import log_to_stderr

    check_limit("--most-gigabytes-each", most_gigabytes_each)
    log_to_stderr(verbose)
    service = web.PageService(
        folder,
        ModelChoice(
            model,
            device=device,
            dtype=dtype,
            offload=offload,
            variant=variant,
            size=model_size,
            lora=tuple(lora or ()),
            sampling=_sampling(window, batch_windows, decoder_device, decoder_tiling),
        ),
        limits=Limits(
            upload_bytes=2_000_000_000,
            seconds=most_seconds,
            quotas=Quotas(bytes_each=int(most_gigabytes_each * 1e9)),
            check_seconds=300.0,
        ),
        hosts=tuple(_host_name(it) for it in allow_host or ()),
        vocals=vocals or checkpoints / "Kim_Vocal_2.onnx",
        checkpoints=checkpoints,
        downloads=downloads,
        keep_seconds=_keep_seconds(keep_days),
        hung_seconds=hung_seconds or None,
        verbosity=verbose,
    )
    web.run_page(service, host, port, lambda url: _say(f"Open {url}/ in a browser. Ctrl-C ends the page."))


def _host_name(name: str) -> str:
    """As requests have it. Raises InputError: it is more than a name."""
    if not name or any(it in name for it in ":/ "):
        raise InputError(f"--allow-host {name}: give the name alone, such as avatar.example.org")
    return name.lower()


def _sampling(
    window: int | None, batch_windows: int, decoder_device: str | None, decoder_tiling: bool
) -> dict[str, Any]:
    """What every video is made with. Raises InputError: a value that cannot be."""
    chosen = GenerateOptions(
        window=window,
        batch_windows=batch_windows,
        decoder_device=decoder_device,
        decoder_tiling=decoder_tiling,
    )
    names = ("window", "batch_windows", "decoder_device", "decoder_tiling")
    return {name: getattr(chosen, name) for name in names if getattr(chosen, name) is not None}


def _keep_seconds(days: float) -> float | None:
    if not days <= _MOST_DAYS:
        raise InputError(f"--keep-days {days}: give at most {_MOST_DAYS}; 0 keeps videos for ever")
    return days * 86400 or None


def _say(sentence: str) -> None:
    typer.echo(sentence, err=True)
