"""The containers' files: linted, and what they name is there. No engine builds them here."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from documents import parse

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "containers").glob("Dockerfile*"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_linter_finds_nothing(file: Path) -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert linter is not None
    done = subprocess.run([linter, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert not done.stdout.strip()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_copied_is_there_and_what_is_run_is_a_command(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert source in kept, f"{source} is left out by .dockerignore"
    command = re.search(r"^CMD (\[.+\])$", text, re.MULTILINE)
    assert command is not None
    parse(["stableavatar", *yaml.safe_load(command[1])])


def test_the_service_names_what_is_there() -> None:
    composed = yaml.safe_load((ROOT / "containers" / "compose.yaml").read_text(encoding="utf-8"))
    server = composed["services"]["server"]
    context = (ROOT / "containers" / server["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / server["build"]["dockerfile"]).exists()
    for volume in server["volumes"]:
        name = volume.split(":")[0]
        assert name.startswith("./") or name in composed["volumes"]
    assert int(server["stop_grace_period"].removesuffix("s")) > 60  # what workers have to save
