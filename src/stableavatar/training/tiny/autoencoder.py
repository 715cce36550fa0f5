"""Trains the video autoencoder of the embedded model.

    python -m stableavatar.training.tiny.autoencoder --out FOLDER --minutes 75 --puppets STORE [--resume]

8x in space, 4x in time, 32 latent channels, 2.8M parameters. Puppets and free pictures as clips of mixed
length; long clips run in chunks with the causal feature memory carried over. A checkpoint is written every
few minutes and `--resume` goes on from it. `--start-from FOLDER` begins with the weights of a trained one;
`--freeze-encoder` trains the decoder alone, so that latents made before stay valid: with a critic beside it
(`--critic-share`), on latents that a transformer made (`--made FOLDER`), and at last into the folder of that
transformer's model (`--into MODEL`). The result is
`FOLDER/model` in diffusers' layout: averaged weights, float32, with the latents' mean and standard deviation
in its config (spec/6-embedded-model.md).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import spawn

from stableavatar.data.puppets import ClipStore
from stableavatar.errors import InputError, with_status
from stableavatar.media.files import to_disk
from stableavatar.training.muon import Muon
from stableavatar.training.tiny.arguments import add_settings, chosen_settings
from stableavatar.training.tiny.assemble import check_model, replace_autoencoder
from stableavatar.training.tiny.autoencoder_batches import Batches
from stableavatar.training.tiny.autoencoder_model import build_autoencoder, measure_latents, start_from
from stableavatar.training.tiny.autoencoder_settings import AutoencoderSettings, rate_factor
from stableavatar.training.tiny.critic import Critic, adversarial_loss, critic_loss
from stableavatar.training.tiny.detail import detail
from stableavatar.training.tiny.feature_memory import (
    FeatureMemory,
    chunk_lengths,
    decode_chunk,
    encode_chunk,
    use_training_kernels,
)
from stableavatar.training.tiny.made_latents import MadeLatents
from stableavatar.training.tiny.pictures import PictureClips, find_pictures, load_pictures
from stableavatar.training.tiny.puppet_clips import PuppetClips

logger = logging.getLogger(__name__)


def reconstruction_loss(
    settings: AutoencoderSettings, made: torch.Tensor, true: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Absolute, squared, edge, coarse colour and detail error of clips [B, 3, F, H, W].

    Sides as :func:`detail` takes them. The weights of pixels are [B, 1, F, H, W].
    """
    difference = made - true
    per_pixel = difference.abs() + settings.squared_weight * difference.square()
    loss = (per_pixel * weight).sum() / (weight.sum() * 3)
    edges = difference.diff(dim=3).abs().mean() + difference.diff(dim=4).abs().mean()
    if difference.shape[2] > 1:
        edges = edges + difference.diff(dim=2).abs().mean()
    # Brightness and two colour differences of 8x8 cells: colour is a small part of the other errors and would
    # be learned last.
    cells = F.avg_pool3d(difference, (1, 8, 8))
    red, green, blue = cells.unbind(dim=1)
    coarse = (cells.mean(dim=1).abs() + (red - green).abs() + (blue - green).abs()).mean()
    loss = loss + settings.edge_weight * edges + settings.coarse_weight * coarse
    return loss + settings.detail_weight * (detail(made) - detail(true)).square().mean()


class AutoencoderTrainer:
    """The model, its moving average, the optimisers, steps and minutes; saved whole, resumed whole."""

    def __init__(
        self,
        settings: AutoencoderSettings,
        batches: Batches,
        out: Path,
        rank: int = 0,
        start: Path | None = None,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.batches = batches
        self.out = out
        self.rank = rank
        sizes = (settings.base_channels, settings.residual_blocks, settings.latent_channels)
        self.vae = build_autoencoder(*sizes).train()
        # Of a trained one whose encoder stays as it is, the latents' mean and deviation stay too.
        self.statistics: tuple[list[float], list[float]] | None = None
        if start is not None:
            self.statistics = start_from(self.vae, start)
        self.average = build_autoencoder(*sizes).requires_grad_(False).eval()
        self.average.load_state_dict(self.vae.state_dict())
        use_training_kernels(self.vae)
        kernels: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for parameter in self.vae.parameters():
            # Muon on the first and last layers too: pixels differ mostly in brightness, and under AdamW these
            # layers learn little else, so that colour never reaches the latents.
            (others if parameter.ndim < 2 or parameter[0].numel() <= 1 else kernels).append(parameter)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(kernels, lr=settings.kernel_learning_rate, weight_decay=settings.weight_decay),
            "adamw": torch.optim.AdamW(
                others, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
            ),
        }
        self.critic: Critic | None = None
        if settings.critic_share:
            self.critic = Critic()
            self.optimizers["critic"] = torch.optim.AdamW(
                self.critic.parameters(),
                lr=settings.critic_learning_rate,
                betas=(0.5, 0.99),
                weight_decay=0.0,
            )
        self.critic_steps = 0
        self.step = 0
        self.seconds = 0.0
        self.encoder_frozen = False
        self.stopping = self.stopped = self.ended = False

    def freeze_encoder(self) -> None:
        """From now on the averaged encoder stays as it is, and with it all latents; the decoder learns."""
        if not self.encoder_frozen:
            self.vae.encoder.load_state_dict(self.average.encoder.state_dict())
            self.vae.quant_conv.load_state_dict(self.average.quant_conv.state_dict())
            self.encoder_frozen = True
        self.vae.encoder.requires_grad_(False)
        self.vae.quant_conv.requires_grad_(False)

    def train_step(self) -> dict[str, float]:
        """One batch, one update.

        Returns: `loss` (without the critic's part), `squared` error, `kl` (0 where a transformer made the
        latents), the `critic`'s own loss, the gradient's `norm` before it is clipped, the kernels' learning
        `rate`, and the clips' `frames`, `batch` and `size` in pixels.
        """
        settings = self.settings
        if not self.encoder_frozen:
            self.statistics = None
        factor = rate_factor(settings, self.step, self.seconds / 60)
        rates = {
            "muon": settings.kernel_learning_rate * factor,
            "adamw": settings.learning_rate * factor,
            "critic": settings.critic_learning_rate * factor,
        }
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name]
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        batch = self.batches.draw(self.step, self.rank, ranks)
        clips, weight = batch.clips, batch.weights
        torch.manual_seed((settings.seed * 10_000_019 + self.step) * 64 + self.rank)
        memory = FeatureMemory(self.vae)
        frames = clips.shape[2]
        totals = {"loss": 0.0, "squared": 0.0, "kl": 0.0, "critic": 0.0}
        start = 0
        for length in chunk_lengths(frames, settings.longest_chunk):
            true = clips[:, :, start : start + length]
            chunk_weight = weight[:, :, start : start + length]
            with torch.autocast("cpu", torch.bfloat16):
                if batch.latents is None:
                    with torch.set_grad_enabled(not self.encoder_frozen):
                        mean, log_variance = encode_chunk(self.vae, true, memory)
                    mean, log_variance = mean.float(), log_variance.float()
                    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
                    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
                else:
                    latents = batch.latents[:, :, (start + 3) // 4 : (start + length + 3) // 4]
                    kl = torch.zeros(())
                made = decode_chunk(self.vae, latents, memory)
            made = made.float()
            loss = reconstruction_loss(settings, made, true, chunk_weight) + settings.kl_weight * kl
            share = length / frames
            pull = torch.zeros(())
            if self.critic is not None:
                judged = critic_loss(self.critic, made, true)
                (judged * share).backward()
                totals["critic"] += judged.item() * share
                if self.critic_steps >= settings.critic_start:
                    pull = adversarial_loss(self.critic, made, true, loss, settings.critic_share)
            ((loss + pull) * share).backward()
            memory.detach()
            totals["loss"] += loss.item() * share
            totals["squared"] += F.mse_loss(made.detach().clamp(-1, 1), true).item() * share
            totals["kl"] += kl.item() * share
            start += length
        self._share_gradients(ranks)
        norms = [
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip).item()
            for model in self._models()
        ]
        if all(map(math.isfinite, norms)):
            for optimizer in self.optimizers.values():
                optimizer.step()
            self.critic_steps += self.critic is not None
        else:
            logger.warning("step %d: the gradient is not finite and is dropped", self.step)
        for model in self._models():
            model.zero_grad(set_to_none=True)
        self._update_average()
        self.step += 1
        return {
            **totals,
            "norm": norms[0],
            "rate": rates["muon"],
            "frames": frames,
            "batch": clips.shape[0],
            "size": clips.shape[3],
        }

    def _models(self) -> list[torch.nn.Module]:
        return [self.vae] if self.critic is None else [self.vae, self.critic]

    def _share_gradients(self, ranks: int) -> None:
        """Averages the gradients over the processes, and settles with them whether this step was the last."""
        parameters = (value for model in self._models() for value in model.parameters())
        gradients = [value.grad for value in parameters if value.grad is not None]
        stopping = self.stopping
        if ranks > 1:
            # The clock and the wish to stop ride along: rate and end are the same in all processes.
            extra = torch.tensor([self.seconds, float(self.stopping)])
            flat = torch.cat([*(value.flatten() for value in gradients), extra])
            dist.all_reduce(flat)
            flat /= ranks
            self.seconds, stopping = float(flat[-2]), bool(flat[-1] > 0)
            shares = torch.split(flat[:-2], [value.numel() for value in gradients])
            for gradient, share in zip(gradients, shares, strict=True):
                gradient.copy_(share.view_as(gradient))
        # By what all know alike: one that goes on alone waits for the others' gradients for ever.
        self.stopped = stopping
        self.ended = stopping or self.seconds >= self.settings.minutes * 60

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.settings.average_decay, (1 + self.step) / (10 + self.step))
        averaged = list(self.average.parameters())
        torch._foreach_lerp_(averaged, [value.detach() for value in self.vae.parameters()], 1 - decay)

    def save(self) -> None:
        """Writes `checkpoint.pt` whole or not at all."""
        state = {
            "settings": asdict(self.settings),
            "model": self.vae.state_dict(),
            "average": self.average.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "critic_steps": self.critic_steps,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "step": self.step,
            "seconds": self.seconds,
            "encoder_frozen": self.encoder_frozen,
            "statistics": self.statistics,
        }
        partial = self.out / ".checkpoint.pt.partial"
        torch.save(state, partial)
        to_disk(partial)
        partial.replace(self.out / "checkpoint.pt")

    def load(self) -> None:
        """Goes on from `checkpoint.pt`.

        Raises FileNotFoundError, or InputError when the model's sizes differ.
        """
        state: dict[str, Any] = torch.load(self.out / "checkpoint.pt", weights_only=True)
        for name in ("base_channels", "residual_blocks", "latent_channels"):
            if state["settings"][name] != getattr(self.settings, name):
                raise InputError(
                    f"{self.out}/checkpoint.pt was trained with {name} {state['settings'][name]}"
                )
        self.vae.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        if self.critic is not None and state.get("critic"):
            self.critic.load_state_dict(state["critic"])
            self.critic_steps = state["critic_steps"]
        for name, optimizer in self.optimizers.items():
            # A critic may come to a training that had none.
            if name in state["optimizers"]:
                optimizer.load_state_dict(state["optimizers"][name])
        self.step, self.seconds = state["step"], state["seconds"]
        self.statistics = state.get("statistics")
        if state["encoder_frozen"]:
            self.encoder_frozen = True
            self.freeze_encoder()

    def export(self, folder: Path) -> None:
        """Writes the averaged model in diffusers' layout, float32, with the latents' mean and deviation.

        They are measured over clips as trained on, and stay once the encoder is frozen.
        """
        if self.statistics is None or not self.encoder_frozen:
            clips = (self.batches.measured_clip(index) for index in range(self.settings.measured_clips))
            self.statistics = measure_latents(self.average, clips)
        mean, deviation = self.statistics
        self.average.register_to_config(latents_mean=mean, latents_std=deviation)
        self.average.save_pretrained(folder)
        logger.info("written to %s; latents' deviation %.2f to %.2f", folder, min(deviation), max(deviation))

    def stop(self, *_: object) -> None:
        """Ends the run, checkpoint written, after the present step; a signal handler."""
        self.stopping = True

    def run(self, *, save_every: float = 180.0) -> None:
        """Trains until the settings' minutes are spent; appends a line to `curve.jsonl` every 20 steps."""
        last_save = clock = time.monotonic()
        recent: list[dict[str, float]] = []
        self.ended = self.seconds >= self.settings.minutes * 60
        while not self.ended:
            recent.append(self.train_step())
            now = time.monotonic()
            self.seconds += now - clock
            clock = now
            if self.rank == 0 and self.step % 20 == 0:
                self._log(recent)
                recent.clear()
            if self.rank == 0 and now - last_save > save_every:
                self.save()
                last_save = now
        if self.rank == 0:
            self.save()

    def _log(self, recent: Sequence[dict[str, float]]) -> None:
        names = ("loss", "squared", "kl", "critic", "norm", "rate")
        mean = {name: float(np.mean([entry[name] for entry in recent])) for name in names}
        mean["psnr"] = 10 * math.log10(4 / max(mean["squared"], 1e-12))
        line = {"step": self.step, "seconds": round(self.seconds, 1), **mean}
        with (self.out / "curve.jsonl").open("a", encoding="utf-8") as curve:
            curve.write(json.dumps(line) + "\n")
        if self.step % 100 == 0:
            logger.info(
                "step %d, %.1f min, loss %.4f, PSNR %.2f dB, KL %.2f",
                self.step,
                self.seconds / 60,
                mean["loss"],
                mean["psnr"],
                mean["kl"],
            )


@dataclass(frozen=True)
class Job:
    """What the processes of one run are told."""

    settings: AutoencoderSettings
    out: Path
    pictures: list[torch.Tensor]
    puppets: list[Path]
    made: Path | None
    resume: bool
    freeze_encoder: bool
    start_from: Path | None
    into: Path | None


def run_process(rank: int, job: Job, rendezvous: str) -> None:
    """One of a run's processes: builds its trainer and trains."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s"
    )
    torch.set_num_threads(1)
    ranks = job.settings.processes
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    puppets = PuppetClips(job.puppets) if job.puppets else None
    made = None if job.made is None else MadeLatents(job.made, [ClipStore(one) for one in job.puppets])
    batches = Batches(job.settings, PictureClips(job.pictures), puppets, made=made)
    trainer = AutoencoderTrainer(job.settings, batches, job.out, rank, job.start_from)
    if job.resume and (job.out / "checkpoint.pt").exists():
        trainer.load()
    if job.freeze_encoder:
        trainer.freeze_encoder()
    # The second is what a process gets when the command itself was ended.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, trainer.stop)
    trainer.run()
    if rank == 0 and not trainer.stopped:
        trainer.export(job.out / "model")
        trainer.save()
        if job.into is not None:
            replace_autoencoder(job.into, job.out / "model")
    if ranks > 1:
        dist.destroy_process_group()


def command_parser() -> argparse.ArgumentParser:
    """The options of :func:`main`."""
    parser = argparse.ArgumentParser(description="Trains the autoencoder of the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, curve and model")
    parser.add_argument(
        "--pictures",
        type=Path,
        action="append",
        default=[],
        help="a folder of free pictures (may be repeated)",
    )
    parser.add_argument(
        "--puppets", type=Path, action="append", default=[], help="a store of puppet clips (may be repeated)"
    )
    parser.add_argument(
        "--made", type=Path, help="a folder of latents that a transformer has made of puppets"
    )
    parser.add_argument(
        "--into", type=Path, help="a model folder to put the decoder into at the end (--freeze-encoder)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint, if any")
    parser.add_argument("--freeze-encoder", action="store_true", help="train the decoder alone from now on")
    parser.add_argument(
        "--start-from", type=Path, help="a trained autoencoder of no more channels to begin with"
    )
    add_settings(parser, AutoencoderSettings)
    return parser


@with_status
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's first lines."""
    parser = command_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = chosen_settings(AutoencoderSettings, options)
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / "checkpoint.pt").exists() and not options.resume:
        parser.error(f"{options.out} already holds a checkpoint: give --resume, or another folder")
    if not options.freeze_encoder and (options.into is not None or options.made is not None):
        parser.error("--made and --into are for a decoder whose latents stay: give --freeze-encoder too")
    # What is missing is said here: of processes one gets tracebacks.
    if options.puppets:
        PuppetClips(options.puppets)
    if options.made is not None:
        made = MadeLatents(options.made, [ClipStore(folder) for folder in options.puppets])
        Batches(settings, PictureClips([]), None, made=made)
    if options.into is not None:
        check_model(options.into)
    if options.start_from is not None and not options.start_from.is_dir():
        raise InputError(f"{options.start_from}: there is no such autoencoder")
    job = Job(
        settings=settings,
        out=options.out,
        pictures=load_pictures(find_pictures(options.pictures)),
        puppets=options.puppets,
        made=options.made,
        resume=options.resume,
        freeze_encoder=options.freeze_encoder,
        start_from=options.start_from,
        into=options.into,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments_of_all = (job, f"{folder}/rendezvous")
        spawn(run_process, args=arguments_of_all, nprocs=settings.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
