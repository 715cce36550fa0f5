"""A video to watch while it is made: what is finished of it as fragmented MP4, and the rest as it comes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path

from stableavatar.errors import InputError
from stableavatar.media.audio import Sound
from stableavatar.media.encoding import open_mp4
from stableavatar.media.segments import Joint, segment_name


def follow(
    segments: Path,
    complete: Callable[[], Path | None],
    ended: Callable[[], bool],
    *,
    fps: Fraction,
    sound: Sound | None,
) -> Iterator[bytes]:
    """Fragmented MP4 of a video that `SegmentWriter` writes, as far as it is there, in pieces.

    Nothing is encoded again but the sound, and any number of people may follow one video, from its beginning
    on, at any time.

    Args:
        segments: the folder of the segments, which may come later, and is removed when the video is complete.
        complete: the file that they became, None before; asked when there is no next segment.
        ended: whether nothing comes any more.

    Yields:
        Bytes of the file in order; empty where there is nothing new: ask again a little later. Ends with the
        video.

    Raises:
        InputError: the sound cannot be read.
    """
    sink = _Sink()
    with ExitStack() as stack:
        container = stack.enter_context(open_mp4(sink, sound=sound, live=True))
        joint = Joint(container, fps, sound)
        stack.callback(joint.close)
        number = 0
        while True:
            over = ended()  # asked first: what has come until then is given out
            segment = segments / segment_name(number)
            whole = not segment.exists()
            path = complete() if whole else segment
            if path is None:
                if over:
                    break
                yield b""
                continue
            # It may be removed before it is opened; then it lies, with the others, in the complete one.
            with suppress(FileNotFoundError):
                for _ in joint.add(path, from_start=whole):
                    if sink.parts:
                        yield sink.take()
                if whole:
                    break
                number += 1
        if not joint.frames:
            raise InputError("there is no frame of this video")
        joint.finish()
        stack.close()
        yield sink.take()


class _Sink:
    """Takes the bytes of a file until they are asked for."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, data: bytes, /) -> int:
        """Take a piece."""
        self.parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        """What was written since it was last asked for."""
        taken, self.parts = b"".join(self.parts), []
        return taken
