"""Portrait, speech and prompt into a stream of frames, and into a file.

    pipeline = AvatarPipeline.from_pretrained("tiny")
    pipeline.generate("portrait.png", "speech.wav", "out.mp4")

The way of the data: portrait and speech -> conditions -> plan of windows -> cells -> latents -> frames ->
file.
"""

import contextlib
import inspect
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel, Wav2Vec2Model

from stableavatar.checkpoints import hub
from stableavatar.checkpoints.arguments import HUB_ARGUMENTS, check_arguments, chosen_dtype, unusable
from stableavatar.checkpoints.layout import OWN_PARTS, find_published, is_own, model_folder
from stableavatar.checkpoints.lora import LoraChoice, chosen_loras
from stableavatar.checkpoints.lora_loading import AvatarLoraLoaderMixin
from stableavatar.checkpoints.own import check_own
from stableavatar.checkpoints.published import load_published
from stableavatar.choices import Offload
from stableavatar.conditioning.image import picture_tensor
from stableavatar.config import is_published_size
from stableavatar.errors import CheckpointError, InputError
from stableavatar.generation import ProgressCallback, Run, finite_pixels
from stableavatar.inputs import (
    Portrait,
    SpeechInput,
    as_live,
    check_sharing,
    open_sound,
    open_speech,
    plan_video,
    read_portrait,
    refuse_inputs,
)
from stableavatar.journal import Journal, refuse_unfinished
from stableavatar.media.audio import Speech
from stableavatar.media.encoding import Writable
from stableavatar.media.files import check_frames_folder, check_output
from stableavatar.media.image import fit_picture
from stableavatar.media.live import LiveRecording, LiveSound, LiveSpeech
from stableavatar.media.reading import Frame
from stableavatar.media.video import STANDARD_OUTPUT
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.options import GenerateOptions, OutputOptions, SamplingDefaults, Settings, generate_options
from stableavatar.placement.autoencoder import bring_autoencoder, decoder_device
from stableavatar.placement.device import choose_device, choose_dtype
from stableavatar.placement.offload import check_placement, put_on
from stableavatar.placement.precision import keeping_float32
from stableavatar.placement.processes import Processes
from stableavatar.placement.slow_kernels import avoid_slow_kernels
from stableavatar.sampling.decoding import StreamDecoder
from stableavatar.sampling.denoiser import Schedule
from stableavatar.sampling.noise import GivenNoise, Noise, PositionalNoise
from stableavatar.sampling.windows import WindowPlan
from stableavatar.streams import AvatarLatents, AvatarStream, AvatarVideo
from stableavatar.writing import GeneratedVideo, write_live, write_video

logger = logging.getLogger(__name__)


class AvatarPipeline(DiffusionPipeline, AvatarLoraLoaderMixin):
    """Makes a portrait say a recording.

    A diffusers pipeline: `from_pretrained`, `save_pretrained`, `to`, `enable_model_cpu_offload`,
    `load_lora_weights`, `set_adapters` and the like work as there.

    Args:
        sampling_defaults: the model's own settings (`SamplingDefaults`), the published models' if None.
    """

    _lora_loadable_modules: ClassVar = ["transformer"]
    model_cpu_offload_seq = "text_encoder->image_encoder->speech_encoder->transformer->vae"

    transformer: StableAvatarTransformer3DModel
    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    image_encoder: CLIPVisionModel
    speech_encoder: Wav2Vec2Model
    scheduler: FlowMatchEulerDiscreteScheduler

    def __init__(
        self,
        transformer: StableAvatarTransformer3DModel,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        image_encoder: CLIPVisionModel,
        speech_encoder: Wav2Vec2Model,
        scheduler: FlowMatchEulerDiscreteScheduler,
        sampling_defaults: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_encoder=image_encoder,
            speech_encoder=speech_encoder,
            scheduler=scheduler,
        )
        if self.vae is not None:  # diffusers lets parts be left out
            avoid_slow_kernels(self.vae)
        self.origin: dict[str, Any] = {}  # what it was loaded from, for the metadata of videos
        if sampling_defaults is None and self.transformer and not is_published_size(transformer.config):
            logger.warning(
                "no sampling_defaults are given with a transformer of no published size: windows, sizes and "
                "scales are taken to be the published models'"
            )
        self.defaults = SamplingDefaults(**(sampling_defaults or {}))
        self.register_to_config(sampling_defaults=asdict(self.defaults))

    @property
    def device(self) -> torch.device:
        """Where the transformer lies; a video may have put the autoencoder elsewhere."""
        return self.transformer.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """To a device, a dtype, or both, as in diffusers; what loading leaves in float32 (the speech encoder,
        norms and timesteps of the transformer) stays in it."""
        dtype = next((it for it in (*args, kwargs.get("dtype")) if isinstance(it, torch.dtype)), None)
        if dtype is None:
            return super().to(*args, **kwargs)
        with keeping_float32(self.components, dtype):
            return super().to(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        variant: str | None = None,
        size: str | None = None,
        dtype: torch.dtype | None = None,
        lora: LoraChoice | Sequence[LoraChoice] = (),
        **kwargs: Any,
    ) -> "AvatarPipeline":
        """Load a model.

        Args:
            source: "tiny" (ships with the package), a folder (this project's own, or the published
                checkpoints as they lie on disk), or a hub id such as "FrancisRing/StableAvatar".
            variant: which of the published transformers, "square" (the default) or "rec-vec".
            size: of the published checkpoints, "1.3b" (the default) or "14b".
            dtype: of the weights, float32 by default; diffusers' former name for it, `torch_dtype`, will do.
            lora: LoRA files to merge into the transformer, each "FILE", "FILE:0.8", or a file and its scale.
            kwargs: `revision`, `token`, `cache_dir` and `local_files_only` for a hub id; for an own folder,
                as in diffusers.

        Raises:
            CheckpointError: files are missing, damaged, or of another model.
            InputError: there is no such folder, or no such argument; a variant or a size is asked of a folder
                that holds one model.
        """
        check_arguments(kwargs)
        loras = chosen_loras(lora)  # what is missing should be said before a large model is read
        dtype = chosen_dtype(dtype, kwargs.pop("torch_dtype", None))
        published: dict[str, Any] = {"variant": variant or "square", "size": size or "1.3b"}
        origin: dict[str, Any] = {"model": str(source)}  # for the metadata of videos
        folder = model_folder(source)
        if str(source) == "tiny" and not folder.is_dir():
            raise CheckpointError(
                "this copy of the package came without the weights of tiny; train them (make tiny), or name "
                "another model"
            )
        if not folder.is_dir():
            places = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
            if kwargs and hub.is_published(str(source), **places):
                raise unusable(kwargs, source)
            folder = hub.resolve(str(source), **published, **places)
            if places.get("revision"):
                origin["revision"] = places["revision"]
        if is_own(folder):
            if variant is not None or size is not None:
                raise InputError(
                    f"{source} is one model: variant and model size choose among the published checkpoints"
                )
            check_own(folder, [part for part in OWN_PARTS if part not in kwargs])
            kwargs.setdefault("local_files_only", True)
            # The features of speech feed every window, and what makes them is small.
            dtypes = {"speech_encoder": torch.float32, "default": dtype}
            pipeline = super().from_pretrained(folder, dtype=dtypes, **kwargs)
        elif kwargs:
            raise unusable(kwargs, folder)
        else:
            pipeline = cls(**load_published(find_published(folder), dtype=dtype, **published))
            origin |= {"variant": published["variant"], "model_size": published["size"]}
        pipeline.origin = origin
        pipeline._merge(loras)
        return pipeline

    def stream(
        self,
        portrait: Portrait,
        speech: SpeechInput | None,
        *,
        latents: torch.Tensor | None = None,
        progress: ProgressCallback | None = None,
        processes: Processes | None = None,
        **options: Any,
    ) -> AvatarStream:
        """Frames of the portrait saying the speech.

        Args:
            portrait: a picture file, a Pillow image, or uint8 `[H, W, 3]`.
            speech: an audio file, a video with sound, mono samples at 16 kHz (floats in [-1, 1], `[n]`, of
                numpy or torch), or None for a silent video of `duration` seconds. Speech that is still
                arriving: an iterator of such samples, or a `media.live.LiveRecording` (whose `sound` is kept
                until it is taken); it is asked for more when a window needs it.
            latents: the starting noise `[C, L, H/8, W/8]`, in place of the seed's; L is that of the plan: a
                latent frame for the first frame and one for every four after it, at least a window's.
            progress: called after every cell and every frame.
            processes: several that share the work; this is the first, the others call `assist`.
            options: fields of `GenerateOptions`.

        Returns:
            An iterator of uint8 `[height, width, 3]`. The conditions are checked now, the work is done as
            frames are asked for; `order` says how much of it comes before the first.

        Raises:
            InputError: a file or an option that cannot be used; while iterating: of speech that is followed
                (causal order, or live), sound that turns out damaged.
            SamplingError: while iterating: latents or a frame became NaN or infinite.
            ProcessError: while iterating: another process was lost, or has ended.
        """
        given = generate_options(options)
        live = as_live(speech, given)
        if isinstance(live, LiveRecording) and live is not speech:
            live.sound.wanted = False  # frames alone are asked for
        return AvatarStream(self._open(portrait, live, given, latents, progress, processes, follow=True))

    def __call__(self, portrait: Portrait, speech: SpeechInput | None, **options: Any) -> AvatarVideo:
        """All frames at once, as diffusers' pipelines give them: for short videos, since they stay in memory,
        3 bytes a pixel (20 MB a second of 512x512). `stream` and `generate` are for any length.

        Args:
            portrait, speech, options: see `stream`.

        Raises:
            InputError, SamplingError, ProcessError: see `stream`.
        """
        stream = self.stream(portrait, speech, **options)
        frames = [Image.fromarray(frame) for frame in stream]
        return AvatarVideo([frames], stream.frame_rate, stream.options)

    def sample_latents(
        self,
        portrait: Portrait,
        speech: SpeechInput | None,
        *,
        latents: torch.Tensor | None = None,
        progress: ProgressCallback | None = None,
        **options: Any,
    ) -> AvatarLatents:
        """The latents of a whole video, for programs that decode apart from sampling; they grow with its
        length, which `stream` and `generate` do not.

        Args:
            speech: a recording that is there as a whole. portrait, latents, progress, options: see `stream`.

        Raises:
            InputError, SamplingError: see `stream`; or speech that is still arriving."""
        given = generate_options(options)
        speech = as_live(speech, given)
        if isinstance(speech, LiveRecording):
            raise InputError("latents of a whole video need speech that is there as a whole: use stream")
        run = self._open(portrait, speech, given, latents, progress, None)
        assert run.frame_count is not None
        made = torch.cat(list(run.latents()), dim=1)
        return AvatarLatents(made, run.frame_count, run.frame_rate, run.options)

    def decode_latents(self, made: AvatarLatents) -> Iterator[Frame]:
        """The frames of latents that `sample_latents` has made, uint8 `[height, width, 3]`, one after the
        other: those that `stream` gives.

        Raises:
            SamplingError: frames came out NaN or infinite.
        """
        device = decoder_device(self.vae, made.options.decoder_device) or self._execution_device
        bring_autoencoder(self.vae, device)
        tiling = made.options.decoder_tiling or self.vae.use_tiling
        decoder = StreamDecoder(self.vae, device, tiling=tiling)
        frames = (frame for latent in made.latents.unbind(1) for frame in decoder.decode(latent))
        try:
            for number, frame in enumerate(islice(frames, made.frame_count), 1):
                yield finite_pixels(frame, number)
        finally:
            self.maybe_free_model_hooks()

    def assist(self, portrait: Portrait, speech: SpeechInput | None, processes: Processes) -> None:
        """Share the windows of a video that the first of several processes makes, by `generate` or `stream`
        with the same portrait and speech; options and seed are the first's. Returns at the end of the work.

        Raises:
            InputError: files are not the same.
            ProcessError: another process was lost, or has ended; the group cannot be used any more.
            StoppedError: the first process was asked to stop.
        """
        told: tuple[GenerateOptions, torch.Tensor | None] = processes.broadcast()
        given, latents = told
        for _ in self._open(portrait, as_live(speech, given), given, latents, None, processes).frames():
            raise AssertionError("only the first process has frames")

    def _open(
        self,
        portrait: Portrait,
        speech: SpeechInput | None,
        given: GenerateOptions,
        latents: torch.Tensor | None,
        progress: ProgressCallback | None,
        processes: Processes | None,
        *,
        follow: bool = False,
    ) -> Run:
        picture = read_portrait(portrait)
        follow = follow and latents is None and processes is None
        recording = open_speech(speech, given, follow=follow)
        try:
            return self._run(given, picture, recording, latents, progress, processes)
        except BaseException:
            if recording is not None:
                recording.close()
            raise

    def _run(
        self,
        given: GenerateOptions,
        picture: Frame,
        recording: Speech | LiveSpeech | None,
        latents: torch.Tensor | None,
        progress: ProgressCallback | None,
        processes: Processes | None,
    ) -> Run:
        height, width = picture.shape[:2]
        seed = secrets.randbelow(2**32)
        options = Settings.resolve(given, self.defaults, picture=(width, height), seed=seed)
        if self.vae.use_tiling:  # set in diffusers' way
            options = replace(options, decoder_tiling=True)
        decoder_device(self.vae, options.decoder_device)  # refused now, not after the sampling
        Schedule.from_scheduler(self.scheduler, options.steps)
        if processes is not None:
            check_sharing(recording, options, processes.size)
            if processes.leads:
                processes.broadcast((replace(given, seed=options.seed), latents))
        fps = options.frame_rate
        frames, plan = plan_video(recording, options)
        ratio = self.vae.config.scale_factor_spatial
        shape = (self.vae.config.z_dim, options.height // ratio, options.width // ratio)
        if latents is None:
            noise: Noise = PositionalNoise(options.seed, *shape)
        elif not isinstance(plan, WindowPlan):
            raise InputError("latents cannot be given for speech that is still arriving: give a seed")
        elif latents.shape == (wanted := (shape[0], plan.latent_frames, *shape[1:])):
            noise = GivenNoise(latents)
        else:
            raise InputError(f"latents of shape {tuple(latents.shape)} do not fit: {wanted} is needed")
        values = picture_tensor(fit_picture(picture, options.width, options.height, options.fit))
        return Run(self, options, plan, frames, fps, values, recording, noise, progress, processes)

    def generate(
        self,
        portrait: Portrait,
        speech: SpeechInput | None,
        output: str | Path | Writable,
        *,
        output_options: OutputOptions | None = None,
        resume: bool | None = None,
        stop: Callable[[], bool] | None = None,
        latents: torch.Tensor | None = None,
        progress: ProgressCallback | None = None,
        processes: Processes | None = None,
        **options: Any,
    ) -> GeneratedVideo:
        """Write the portrait saying the speech as an MP4 with sound.

        The file appears under its name when it is complete. In its metadata are the model, the version, and
        every option and the seed, so that it can be made again. While it is made, a hidden folder beside it
        (`.NAME.journal`) keeps what is finished, from which a run that was interrupted or killed goes on.

        Args:
            output: the MP4; or what has `write`, for the bytes of a fragmented one while it is made.
            output_options: quality, preset, a folder for PNG frames, how often the state is saved, and
                whether the file is to play while it grows. What does keeps no journal.
            resume: True goes on with what was begun there (a seed that is not given is that run's), False
                begins anew; None refuses where something was begun. Live output and live speech begin anew.
            stop: asked between cells; when it says so, the state is saved and what is finished is put beside
                the output as `NAME.unfinished.mp4`.

        Everything else is as for `stream`.

        Raises:
            InputError: a file or an option that cannot be used, an output that cannot be written, another
                process that makes this video, or a journal of other inputs, settings or weights.
            ProcessError: another process was lost, or has ended.
            SamplingError: latents or a frame became NaN or infinite.
            StoppedError: `stop` said so.
        """
        encoding = output_options or OutputOptions()
        given = generate_options(options)
        if encoding.frames is not None:  # before an earlier run's state gives way
            check_frames_folder(encoding.frames)
        speech = as_live(speech, given)
        path = None
        if isinstance(output, str | Path) and str(output) != STANDARD_OUTPUT:
            path = check_output(output)
            refuse_inputs(path, portrait, speech)
        if path is None or encoding.live or isinstance(speech, LiveRecording):
            if resume:
                raise InputError("what is written or spoken live cannot be resumed: leave out --resume")
            with contextlib.ExitStack() as stack:
                journal = None
                if path is not None:
                    if resume is None:
                        refuse_unfinished(path)
                    journal = stack.enter_context(contextlib.closing(Journal(path, anew=True)))
                run = self._open(portrait, speech, given, latents, progress, processes, follow=True)
                made = write_live(run, open_sound(speech, given), output, encoding, stop)
                if journal is not None:  # of a run before, which this video has replaced
                    journal.finish()
                return made
        if resume is None:
            refuse_unfinished(path)
        with contextlib.closing(Journal(path, anew=resume is False)) as journal:
            if resume and not journal.has_state and path.exists():
                anew = "Add --overwrite to make it anew (from Python: resume=False)."
                raise InputError(f"output {output}: is there, and no unfinished run of it. {anew}")
            if resume and given.seed is None and "seed" in journal.settings:
                given = replace(given, seed=journal.settings["seed"])
            sound = open_sound(speech, given)  # before it is listened to: it may change meanwhile
            assert not isinstance(sound, LiveSound)
            run = self._open(portrait, speech, given, latents, progress, processes)
            return write_video(run, sound, journal, encoding, resume=bool(resume), stop=stop)


def load(
    source: str | Path = "tiny",
    *,
    device: str = "auto",
    dtype: str = "auto",
    offload: Offload = "none",
    **kwargs: Any,
) -> AvatarPipeline:
    """Load a model and put it on a device.

    Args:
        source: "tiny", a folder, or a hub id; see `AvatarPipeline.from_pretrained`, which also takes
            `kwargs`.
        device: "auto" (CUDA, then Apple's MPS, then the CPU) or a torch device.
        dtype: "auto" (bfloat16 on CUDA, float32 elsewhere), "float32", "bfloat16" or "float16".
        offload: what stays in main memory and comes to the device a layer at a time: "none", the "encoders"
            of prompt and portrait, which act once a video, or all "layers", which is slower.

    Raises:
        InputError: an unknown argument, device, dtype or way of offloading, or a device that is not there.
        CheckpointError: see `from_pretrained`.
    """
    check_placement(offload)
    chosen = choose_device(device)
    if dtype != "auto" or "torch_dtype" not in kwargs:
        kwargs["dtype"] = choose_dtype(dtype, chosen)
    return put_on(AvatarPipeline.from_pretrained(source, **kwargs), chosen, offload)


def generate(
    portrait: Portrait,
    speech: SpeechInput | None,
    output: str | Path | Writable,
    *,
    model: str | Path = "tiny",
    device: str = "auto",
    dtype: str = "auto",
    offload: Offload = "none",
    variant: str | None = None,
    size: str | None = None,
    lora: LoraChoice | Sequence[LoraChoice] = (),
    **options: Any,
) -> GeneratedVideo:
    """Write the portrait saying the speech as an MP4 with sound: `load`, whose are model, device, dtype,
    offload, variant, size and lora, then `AvatarPipeline.generate`. For several videos load once: each call
    here loads the model."""
    others = inspect.signature(AvatarPipeline.generate).parameters
    generate_options({name: value for name, value in options.items() if name not in others})
    pipeline = load(model, device=device, dtype=dtype, offload=offload, variant=variant, size=size, lora=lora)
    return pipeline.generate(portrait, speech, output, **options)
