"""Where the files of an unfinished video lie, beside its output: for those who look, and do not make it."""

from pathlib import Path

from stableavatar.media.files import hidden_name, shortened


def journal_folder(output: Path) -> Path:
    """The journal of a video: what an interrupted run goes on from (`journal.Journal`)."""
    return output.with_name(hidden_name(output.stem, "journal"))


def journal_index(output: Path) -> Path:
    """The file in it that is there as soon as there is something to go on from."""
    return journal_folder(output) / "journal.json"


def unfinished_video(output: Path) -> Path:
    """Where an interrupted run puts the frames that are finished."""
    return output.with_name(shortened(output.stem, ".unfinished.mp4"))
