"""How large everything is that is measured."""

from dataclasses import dataclass

from stableavatar.errors import InputError


@dataclass(frozen=True)
class Sizes:
    """Every field is an option of the command line.

    Attributes:
        rounds: of calls that take turns, after a round that is not counted.
        latent_frames, latent_size: window of the transformer, and height and width of its latents.
        blocks: of the transformers that are measured, a smaller and a larger number; from the two the time of
            the released 30, all alike, is reckoned.
        decoded: lengths to decode, in latent frames.
        speech: lengths to generate, in seconds. steps: of a generation; tiny's own are 10.
        followed: lengths whose first frame is waited for, in seconds.
        training_steps: of the trainer, and of the bare loop beside it.
        short_speech, long_speech, process_steps: seconds and steps, for the comparison of processes. With few
            steps most of the work is decoding, which is the first process's alone; in the first
            seconds of video windows are still dealt as if there were none (docs/decisions/0007).
    """

    rounds: int = 5
    latent_frames: int = 21
    latent_size: int = 32
    blocks: tuple[int, ...] = (1, 3)
    decoded: tuple[int, ...] = (21, 81, 321)
    speech: tuple[int, ...] = (10, 60, 600)
    steps: int = 4
    followed: tuple[int, ...] = (10, 60, 600, 3600)
    training_steps: int = 15
    short_speech: int = 30
    long_speech: int = 90
    process_steps: int = 10

    def __post_init__(self) -> None:
        if len(self.blocks) != 2 or not 0 < self.blocks[0] < self.blocks[1]:
            raise InputError(f"blocks {self.blocks}: give a smaller and a larger number, such as 1 3")


FULL = Sizes()
QUICK = Sizes(
    rounds=2,
    latent_frames=3,
    latent_size=16,
    blocks=(1, 2),
    decoded=(3, 9),
    speech=(5, 10),
    steps=2,
    followed=(5, 10),
    training_steps=2,
    short_speech=2,
    long_speech=6,
    process_steps=4,
)
