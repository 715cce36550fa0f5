"""Our numbers against recorded ones of the published code: `python -m stableavatar.evaluation.parity FOLDER`.

Every folder below FOLDER with a `config.json` that names its `kind` is a set of cases; sizes, weights and
files are taken from there. Tensors go through the checkpoint loaders, so names and arithmetic are tested
together. A line a case is printed, with the largest difference; the exit status is 1 if a case is beyond its
tolerance, or a folder held nothing to run.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file

from stableavatar.checkpoints.loading import (
    load_image_encoder,
    load_speech_encoder,
    load_text_encoder,
    load_transformer,
    load_vae,
)
from stableavatar.conditioning.image import (
    picture_tensor,
    portrait_embeddings,
    portrait_pixels,
    reference_condition,
)
from stableavatar.conditioning.speech import WindowSpeech
from stableavatar.conditioning.text import encode_tokens
from stableavatar.errors import StableAvatarError
from stableavatar.media.audio import Speech
from stableavatar.media.image import read_picture
from stableavatar.models.latents import normalise_latents
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.sampling.decoding import stream_decode
from stableavatar.sampling.denoiser import Conditions, Denoiser, Schedule
from stableavatar.sampling.engine import Denoise, one_by_one, sample_all
from stableavatar.sampling.guidance import Branch, Guidance, Predictions
from stableavatar.sampling.noise import GivenNoise
from stableavatar.sampling.orders import Cell
from stableavatar.sampling.windows import Window, plan_windows

Tensors = dict[str, torch.Tensor]

BFLOAT16_STEP = 2.0**-7  # of a number between 1 and 2


@dataclass(frozen=True)
class Result:
    """One comparison: the largest absolute difference (or the share of values that differ), and what is
    allowed."""

    name: str
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Within the tolerance; a difference that is not a number is not."""
        return self.difference <= self.tolerance


def _compare(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> Result:
    if ours.shape != theirs.shape:
        raise ValueError(f"{name}: our shape is {tuple(ours.shape)}, the recorded one {tuple(theirs.shape)}")
    return Result(name, (ours.float() - theirs.float()).abs().max().item(), tolerance)


def _largest(results: Iterable[Result]) -> Result:
    """The one with the largest difference; a difference that is not a number is the largest."""
    return max(results, key=lambda r: float("inf") if r.difference != r.difference else r.difference)


@dataclass(frozen=True)
class _Folder:
    """A folder of cases, and its `config.json`."""

    path: Path
    config: dict[str, Any]

    def weights(self, part: str) -> Path:
        return (self.path / self.config["weights"][part]).resolve()

    def cases(self) -> Iterator[tuple[str, Tensors]]:
        """Name and tensors of every file that is not a weight."""
        weights = {self.weights(part) for part in self.config["weights"]}
        for file in sorted(self.path.glob("*.safetensors")):
            tensors = {} if file.resolve() in weights else load_file(file)
            if any(name.startswith("in.") for name in tensors):
                yield f"{self.path.name}/{file.stem}", tensors

    def transformer(self) -> StableAvatarTransformer3DModel:
        published = {k: v for k, v in self.config["transformer"].items() if k != "speech_projection_layers"}
        return load_transformer(self.weights("transformer"), config=published)


def _prompts(tensors: Tensors, prefix: str, length: int) -> torch.Tensor:
    """Recorded prompt embeddings, a tensor a row, zero-padded to `[rows, length, text_dim]`."""
    rows = [tensors[name] for name in sorted(tensors) if name.startswith(prefix)]
    return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])


def _keep_output(seen: Tensors, name: str, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
    seen[name] = output


def run_transformer(folder: _Folder) -> Iterator[Result]:
    """One call of the transformer, and results of its parts."""
    model = folder.transformer()
    parts = {
        "audio_adapter": model.vocal_projector,
        "img_emb": model.condition_embedder.image_embedder,
        "text_embedding": model.condition_embedder.text_embedder,
        "time_embedding": model.condition_embedder.time_embedder,
        "time_projection": model.condition_embedder.time_proj,
        "patch_embedding": model.patch_embedding,
        "head": model.proj_out,
        **{f"block{index}": block for index, block in enumerate(model.blocks)},
    }
    for case, tensors in folder.cases():
        batch = tensors["in.x"].shape[0]
        prompts = _prompts(tensors, "in.context.", model.config.text_length)
        rows: list[int | None] = [0] * batch
        if batch == 3:
            rows[0] = None
        seen: Tensors = {}
        hooks = [
            part.register_forward_hook(partial(_keep_output, seen, name)) for name, part in parts.items()
        ]
        arguments = (
            tensors["in.x"],
            tensors["in.y"],
            tensors["in.t"],
            prompts,
            tensors["in.portrait_embeddings"],
            tensors["in.speech_features"][-1:],
            rows,
        )
        with torch.no_grad():
            out = model(*arguments).sample
        for hook in hooks:
            hook.remove()
        yield _compare(case, out, tensors["out"], 2e-5)
        for name in sorted(tensors):
            if name.startswith("mid."):
                recorded = tensors[name]
                if name.removeprefix("mid.") not in seen:
                    raise ValueError(f"{case}: this runner knows no part of the transformer called {name}")
                part = seen[name.removeprefix("mid.")]
                yield _compare(f"{case} {name}", part.expand_as(recorded), recorded, 2e-5)
        if "out.clip_level" in tensors:
            with torch.no_grad():
                out = model(*arguments, clip_level_audio=True).sample
            yield _compare(f"{case} clip level", out, tensors["out.clip_level"], 2e-5)


@torch.no_grad()
def run_vae(folder: _Folder) -> Iterator[Result]:
    """Encoding a clip and a picture, decoding latents."""
    vae = load_vae(folder.weights("vae"), folder.config["vae"])
    for case, tensors in folder.cases():
        for what, wanted in (("video", "out.latents"), ("picture", "out.picture_latents")):
            if f"in.{what}" in tensors:
                latents = normalise_latents(vae, vae.encode(tensors[f"in.{what}"]).latent_dist.mode())
                yield _compare(f"{case} encode {what}", latents, tensors[wanted], 1e-5)
        if "in.latents" in tensors:
            frames = [
                torch.stack(list(stream_decode(vae, z.unbind(1))), dim=1) for z in tensors["in.latents"]
            ]
            yield _compare(f"{case} decode", torch.stack(frames), tensors["out.video"], 1e-5)


def run_text_encoder(folder: _Folder) -> Iterator[Result]:
    """Embeddings of the valid tokens of prompts."""
    encoder = load_text_encoder(folder.weights("text_encoder"), folder.config["text_encoder"])
    for case, tensors in folder.cases():
        ids, mask = tensors["in.ids"], tensors["in.mask"]
        ours = encode_tokens(encoder, ids, mask, ids.shape[1])
        valid = mask.bool()
        yield _compare(case, ours[valid], tensors["out.embeddings"][valid], 2e-5)


def run_image_encoder(folder: _Folder) -> Iterator[Result]:
    """Pixels that the portrait encoder sees, and embeddings."""
    encoder = load_image_encoder(folder.weights("image_encoder"), folder.config["image_encoder"])
    for case, tensors in folder.cases():
        picture = tensors["in.picture"]
        pixels = portrait_pixels(picture, encoder.config.image_size)
        yield _compare(f"{case} pixels", pixels, tensors["mid.pixels"], 1e-5)
        with torch.no_grad():
            embeddings = portrait_embeddings(encoder, picture)
        yield _compare(case, embeddings, tensors["out.embeddings"], 1e-5)


def _published_rule(text_scale: float, audio_scale: float) -> Guidance:
    """The three-branch rule with all its branches, whatever the scales: the published code drops none."""

    def combine(v: Predictions) -> torch.Tensor:
        u, a, f = (v[branch] for branch in (Branch.NEITHER, Branch.AUDIO, Branch.BOTH))
        return u + audio_scale * (a - u) + text_scale * (f - a)

    return Guidance((Branch.NEITHER, Branch.AUDIO, Branch.BOTH), combine)


class _Loop:
    """A recorded run of the whole sampling loop, and ours on the same input."""

    def __init__(self, folder: _Folder, case: str, tensors: Tensors) -> None:
        sampling = folder.config["sampling"]
        self.case, self.tensors = case, tensors
        self.steps, self.weights = sampling["steps"], sampling["weights"]
        self.window_latents = (sampling["window_frames"] - 1) // 4 + 1
        self.plan = plan_windows(
            sampling["video_latent_frames"], self.window_latents, sampling["overlap"], compat="upstream"
        )
        self.guidance = _published_rule(sampling["text_scale"], sampling["audio_scale"])
        self.schedule = Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=5), self.steps)
        self.transformer = folder.transformer()
        self.vae = load_vae(folder.weights("vae"), folder.config["vae"])
        self.speech = WindowSpeech(
            load_speech_encoder(folder.weights("speech_encoder"), folder.config["speech_encoder"]),
            Speech.from_array(tensors["in.audio"].numpy(), 16000),
            self.plan,
            Fraction(25),
        )
        picture = picture_tensor(read_picture(folder.path / "portrait.png"))
        negative, _, prompt = _prompts(tensors, "in.ctx", self.transformer.config.text_length)
        self.conditions = Conditions(
            prompt=prompt[None],
            negative_prompt=negative[None],
            portrait=tensors["clip"],
            reference=reference_condition(self.vae, picture, sampling["window_frames"]),
        )
        self.denoiser = Denoiser(
            self.transformer,
            self.schedule,
            self.guidance,
            self.conditions,
            self.recorded_speech,
            window_latents=self.window_latents,
        )

    def recorded_speech(self, window: Window) -> torch.Tensor:
        return self.tensors[f"window{window.index:02d}.speech_features"]

    def call(self, cell: Cell) -> str:
        return f"call{cell.step * len(self.plan) + cell.window.index:03d}"

    def sample(self, denoise: Denoise) -> torch.Tensor:
        noise = GivenNoise(self.tensors["in.noise"][0])
        return sample_all(self.plan, self.steps, noise, denoise, weights=self.weights)

    def compare(self) -> Iterator[Result]:
        """Every part of the loop on what was recorded before it, then the loop run freely."""
        tensors = self.tensors
        yield _compare(f"{self.case} sigmas", self.schedule.sigmas, tensors["sigmas"], 0)
        yield _compare(f"{self.case} timesteps", self.schedule.timesteps, tensors["timesteps"], 0)
        short = self.conditions.reference[:, :, : tensors["y"].shape[2]]
        yield _compare(f"{self.case} condition", short, tensors["y"], 1e-5)
        yield _largest(
            _compare(f"{self.case} speech features", self.speech(window), self.recorded_speech(window), 1e-5)
            for window in self.plan.windows
        )
        yield from self._replayed()
        free = self.sample(self.denoiser)
        recorded = tensors["latents"][0]
        difference = (free - recorded).abs()
        share = (difference > 0).float().mean().item()
        yield Result(f"{self.case} run freely: share of latents that differ", share, 0.002)
        step = BFLOAT16_STEP * 2.0 ** recorded.abs().clamp(min=2.0**-126).log2().floor()
        yield Result(f"{self.case} run freely: bfloat16 steps", (difference / step).max().item(), 2)
        frames = tensors["video"].shape[2]
        decoded = list(stream_decode(self.vae, recorded[:, : (frames - 1) // 4 + 1].unbind(1)))
        video = torch.stack(decoded, dim=1) * 0.5 + 0.5
        yield _compare(f"{self.case} video", video, tensors["video"][0], 2e-3)

    def _replayed(self) -> Iterator[Result]:
        """Run the loop with the recorded predictions: what goes into every call must be what was recorded,
        exactly."""
        inputs: list[Result] = []
        calls: list[Result] = []

        def replay(cell: Cell, latents: torch.Tensor) -> torch.Tensor:
            name = self.call(cell)
            recorded_x, recorded_out = self.tensors[f"{name}.x"], self.tensors[f"{name}.out"]
            inputs.append(_compare(f"{self.case} what goes into each call", latents, recorded_x[0], 0))
            with torch.no_grad():
                (ours,) = self.denoiser.predict_branches([cell], [recorded_x[0]])
            calls.append(_compare(f"{self.case} each call", ours, recorded_out, 2e-5))
            guided = self.guidance.combine(dict(zip(self.guidance.branches, recorded_out, strict=True)))
            return self.schedule.euler_step(recorded_x[0], guided, cell.step)

        latents = self.sample(one_by_one(replay))
        yield _largest(calls)
        yield _largest(inputs)
        yield _compare(f"{self.case} last latents", latents, self.tensors["latents"][0], 0)


def run_loop(folder: _Folder) -> Iterator[Result]:
    """The whole sampling loop with the published window policy."""
    for case, tensors in folder.cases():
        yield from _Loop(folder, case, tensors).compare()


KINDS: dict[str, Callable[[_Folder], Iterator[Result]]] = {
    "transformer": run_transformer,
    "vae": run_vae,
    "text_encoder": run_text_encoder,
    "image_encoder": run_image_encoder,
    "loop": run_loop,
}


def run(root: Path) -> Iterator[Result | str]:
    """Every result below `root`; a text for a folder in which nothing could be run, and why.

    A folder of cases is `root` itself, or one directly in it.
    """
    folders = [root] if (root / "config.json").is_file() else sorted(f for f in root.iterdir() if f.is_dir())
    for folder in folders:
        found = False
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            kind = config.get("kind")
            if kind not in KINDS:
                raise ValueError(f"its kind is {kind!r}, not one of {', '.join(KINDS)}")
            for result in KINDS[kind](_Folder(folder, config)):
                found = True
                yield result
        except (StableAvatarError, SafetensorError, ValueError, KeyError, OSError) as error:
            found = True
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            yield f"{folder.name}: cannot be run: {reason}"
        if not found:
            yield f"{folder.name}: held nothing that can be run"


def main(arguments: list[str]) -> int:
    """Print a line a result; 0 if there are some, and all hold."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        sys.stderr.write(
            "usage: python -m stableavatar.evaluation.parity FOLDER (a folder of parity cases)\n"
        )
        return 2
    passed = failed = 0
    for result in run(Path(arguments[0])):
        holds = isinstance(result, Result) and result.holds
        passed, failed = passed + holds, failed + (not holds)
        text = _line(result) if isinstance(result, Result) else result
        sys.stdout.write(f"{'ok  ' if holds else 'FAIL'} {text}\n")
        sys.stdout.flush()
    if passed + failed == 0:
        sys.stdout.write(f"FAIL {arguments[0]} holds no folder of parity cases\n")
        failed = 1
    sys.stdout.write(f"{passed} passed, {failed} failed\n")
    return 1 if failed else 0


def _line(result: Result) -> str:
    return f"{result.name}: {result.difference:.2e} (at most {result.tolerance:.0e})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
