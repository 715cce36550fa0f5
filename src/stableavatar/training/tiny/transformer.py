"""Trains the transformer of `tiny`, its prompt encoder and its portrait encoder from a latent cache.

    python -m stableavatar.training.tiny.transformer --cache FOLDER --out FOLDER --minutes 60 [--resume]
    torchrun --nproc-per-node 2 -m stableavatar.training.tiny.transformer --threads 1 --batch 8 ...

`--out` gets checkpoints, `log.jsonl` (the loss), `preview/` (losses on unseen puppets and sheets of frames)
and, when the run ends, `export/`: the averaged weights in diffusers' layout. Stopped by SIGTERM or Ctrl-C it
saves and exports too. `--export-only` writes `export/` from the newest checkpoint while a training goes on.
"""

import argparse
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import Wav2Vec2Model

from stableavatar.data.cache import CachedWindows, LatentCache
from stableavatar.data.encoding import EncodedSample, stack_samples
from stableavatar.evaluation.meter import read_meter
from stableavatar.training.checkpoints import list_checkpoints
from stableavatar.training.objective import ObjectiveSettings
from stableavatar.training.optimizers import ClipSettings, OptimizerSettings
from stableavatar.training.tiny.avatar import TinyAvatar
from stableavatar.training.tiny.preview import Preview
from stableavatar.training.trainer import Trainer, TrainerSettings

logger = logging.getLogger(__name__)

# Half of the dropped speech is dropped at the adapter's output, half at its input: guidance may use either.
OBJECTIVE = ObjectiveSettings(
    shift=3.0,
    mask_loss="expected",
    audio_dropping=0.05,
    audio_output_dropping=0.1,
    clip_level_audio=0.1,
    prompt_dropping=0.1,
)
LEARNING_RATE = 2e-3


def trainer_settings(options: argparse.Namespace) -> TrainerSettings:
    """The loop's settings: batches in pieces small enough for the processor's cache."""
    return TrainerSettings(
        steps=options.steps,
        seed=options.seed,
        batch_size=options.piece,
        accumulation=options.batch // options.piece,
        optimizer=OptimizerSettings(
            kind="muon",
            learning_rate=LEARNING_RATE,
            betas=(0.9, 0.98),
            epsilon=1e-8,
            weight_decay=0.01,
            warmup_steps=60,
            schedule="linear" if options.decay_steps else "constant",
            decay_steps=options.decay_steps or None,
            clip=ClipSettings(norm=1.0, start_ratio=1.0, start_steps=0, abnormal_ratio=None),
        ),
        ema_decay=0.99,
        precision="bf16",
        minutes=options.minutes,
        checkpoint_every=50,
        log_every=10,
        callback_every=options.preview_every,
    )


def build(options: argparse.Namespace) -> tuple[TinyAvatar, Trainer[EncodedSample]]:
    """Model and trainer, resumed if asked for."""
    torch.manual_seed(options.seed)
    cache = CachedWindows(LatentCache(options.cache), options.seed)
    audio_dim = cache[0, 0].speech.shape[-1]
    avatar = TinyAvatar(OBJECTIVE, heads=options.heads, layers=options.layers, audio_dim=audio_dim)
    avatar.use_explicit_attention()
    if options.compile:
        avatar.compile_blocks()
    callbacks = []
    first = int(os.environ.get("RANK", 0)) == 0
    if options.autoencoder is not None and not options.export_only and first:
        callbacks.append(
            Preview(
                avatar,
                AutoencoderKLWan.from_pretrained(options.autoencoder).eval(),
                Wav2Vec2Model.from_pretrained(options.speech_encoder).eval(),
                options.out / "preview",
                clips=options.preview_clips,
                meter=read_meter(options.meter) if options.meter else None,
                shift=OBJECTIVE.shift,
            )
        )
    trainer = Trainer(
        avatar,
        cache,
        stack_samples,
        trainer_settings(options),
        options.out,
        callbacks=callbacks,
    )
    if options.export_only or (options.resume and list_checkpoints(options.out)):
        trainer.resume("latest", new_data=options.new_data or options.export_only)
    return avatar, trainer


def export(avatar: TinyAvatar, trainer: Trainer[EncodedSample], folder: Path) -> None:
    """Write the averaged weights."""
    if trainer.ema is None:
        raise ValueError("tiny is trained with averaged weights")
    with trainer.ema.applied():
        avatar.export(folder)
    logger.info("step %d exported to %s", trainer.step, folder)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m stableavatar.training.tiny.transformer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cache", type=Path, required=True, help="made by `training.tiny.latents`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, help="frozen autoencoder, to look at frames on the way")
    parser.add_argument(
        "--speech-encoder", type=Path, help="frozen speech encoder, needed with --autoencoder"
    )
    parser.add_argument("--meter", type=Path, help="mouth meter, to read the frames with")
    parser.add_argument(
        "--minutes", type=float, default=None, help="stop after so long (default: at --steps)"
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument(
        "--decay-steps", type=int, default=0, help="let the rate fall over the last so many steps"
    )
    parser.add_argument("--preview-every", type=int, default=100, help="steps")
    parser.add_argument("--preview-clips", type=int, default=8, help="unseen puppets to look at")
    parser.add_argument("--heads", type=int, default=3, help="of 64 channels each")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16, help="clips a step")
    parser.add_argument("--piece", type=int, default=4, help="clips at once, a divisor of the batch")
    parser.add_argument("--compile", action="store_true", help="compile the blocks; needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out, if any"
    )
    parser.add_argument("--new-data", action="store_true", help="resume although the cache has grown")
    parser.add_argument("--export-only", action="store_true", help="write export/ from the newest checkpoint")
    options = parser.parse_args(arguments)
    if (options.autoencoder is None) != (options.speech_encoder is None):
        parser.error("--autoencoder and --speech-encoder go together")
    if options.piece < 1 or options.batch % options.piece:
        parser.error(f"--piece {options.piece} does not divide --batch {options.batch}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    avatar, trainer = build(options)
    if not options.export_only:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: trainer.request_stop())
        result = trainer.train()
        logger.info("step %d, %d skipped, %s", result.step, result.skipped_steps, result.checkpoint)
    if trainer.accelerator.is_main_process:
        export(avatar, trainer, options.out / "export")
    trainer.close()


if __name__ == "__main__":
    main()
