"""``stableavatar train``, ``cache-latents`` and ``export``; see `stableavatar.apps.cli`."""

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from stableavatar.apps.console import memory_advice
from stableavatar.choices import StoredDtype
from stableavatar.errors import InputError, extra_missing
from stableavatar.logs import log_to_stderr, quieten_libraries

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML file, such as those in the folder recipes.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="A setting in the recipe's place: --set trainer.batch_size=2."
    ),
]


@memory_advice(
    "Give --set trainer.gradient_checkpointing=true or --set model.offload_encoders=true. A run that begins "
    "anew can have a data.cache, trainer.batch_size=1 with more trainer.accumulation, "
    "trainer.optimizer.kind=adamw-8bit, and on several GPUs trainer.sharding=fsdp2; see docs/scaling.md"
)
def train(
    recipe: RecipeArgument,
    settings: SetOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="latest|FOLDER",
            help="Go on from the newest checkpoint of the output, where there is one, or, into another "
            "output, from a given one.",
        ),
    ] = None,
    new_data: Annotated[
        bool,
        typer.Option(
            "--new-data",
            help="With --resume: data, batch or number of processes (the last not with DeepSpeed) may be "
            "others than before.",
        ),
    ] = False,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Say more.")
    ] = 0,
) -> None:
    """Train a transformer, or a LoRA for one, by a RECIPE.

    Several processes share the work where torchrun or accelerate launch starts them. Ctrl-C ends it with a
    checkpoint, from which --resume latest goes on as if it had not been stopped.
    """
    log_to_stderr(max(verbose, 1))
    quieten_libraries(verbose)
    training = _import("stableavatar.training.run")
    chosen = _import("stableavatar.training.recipes").load_recipe(recipe, settings or ())
    if new_data and resume is None:
        raise InputError("--new-data says how to resume: add --resume latest")
    checkpoint = resume if resume in (None, "latest") else Path(resume)
    ready = training.prepare_training(chosen, resume=checkpoint, new_data=new_data)
    leads = ready.trainer.accelerator.is_main_process
    result, made = ready.run()
    if leads:
        skipped = f", {result.skipped_steps} steps skipped" if result.skipped_steps else ""
        typer.echo(f"{made}: after {result.step} of {chosen.trainer.steps} steps{skipped}")


@memory_advice("Give --set model.offload_encoders=true, fewer data.clips.frames, or clips of fewer pixels")
def cache_latents(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder, made if need be.")],
    passes: Annotated[
        int,
        typer.Option(min=1, help="Passes over the data, each with starts and references of its own."),
    ] = 1,
    dtype: Annotated[StoredDtype, typer.Option(help="Of what is kept.")] = "bfloat16",
    settings: SetOption = None,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Say more.")
    ] = 0,
) -> None:
    """Encode the clips of a RECIPE ahead of its training, which then needs no encoder.

    An interrupted run goes on where it stopped. Started by torchrun, several processes share the work. Train
    with --set data.cache=FOLDER.
    """
    log_to_stderr(max(verbose, 1))
    quieten_libraries(verbose)
    from stableavatar.placement.device import DTYPES

    training = _import("stableavatar.training.run")
    chosen = _import("stableavatar.training.recipes").load_recipe(recipe, settings or ())
    count = training.cache_latents(chosen, output, passes=passes, dtype=DTYPES[dtype])
    if count is not None:
        typer.echo(f"{output}: {count} samples; train with --set data.cache={output}")


@memory_advice("It needs main memory for the whole model")
def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A transformer: the folder of that name, or a file. Or a checkpoint of a training: a folder "
            "such as step-00001000.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET",
            help="The file to write: .pt or .safetensors. Of a checkpoint also a folder, for what the "
            "training would write at its end.",
        ),
    ],
    dtype: Annotated[
        StoredDtype | None, typer.Option(help="Of a file's weights; by default as they are stored.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Say more.")
    ] = 0,
) -> None:
    """Write a transformer under the published names, for the published code; or what a checkpoint of a
    training holds."""
    log_to_stderr(verbose)
    quieten_libraries(verbose)
    from stableavatar.checkpoints.convert import export_transformer
    from stableavatar.placement.device import DTYPES

    write = export_transformer
    if (source / "state.json").is_file():
        write = _import("stableavatar.training.result").export_checkpoint
    made = write(source, target, dtype=None if dtype is None else DTYPES[dtype], overwrite=overwrite)
    typer.echo(f"{made}: complete")


def _import(name: str) -> Any:
    """A module that needs the extra `train`, which help does not."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("pydantic", "yaml"):
            raise
        raise extra_missing(f"training needs the package {error.name}", "train") from error
