"""The README does what it says: commands and examples run, options and files that it names exist.

A block below a comment `<!-- needs: ... -->` needs what a test has not (weights, a network): its commands
are only parsed.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from command_line import run
from documents import COMMANDS, blocks, commands, parse, reader
from stableavatar.apps import cli
from stableavatar.media.reading import probe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Commands of the system, which have nothing to do with what is tested here.
FOREIGN = ("python3", "avatar/bin/pip", "source", "arecord")


# Options of torchrun that the README names.
TORCHRUN = {"--standalone", "--nproc-per-node", "--shutdown-timeout"}


BLOCKS = blocks(README)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader would be: a portrait and a recording there, and a model `tiny`."""
    return reader(tmp_path, monkeypatch)


def test_blocks_are_found() -> None:
    assert README.count("```") == 2 * len(BLOCKS)
    assert {block.language for block in BLOCKS} == {"bash", "python"}
    assert any(block.runs for block in BLOCKS if block.language == "bash")


def test_commands(folder: Path) -> None:
    for block in (block for block in BLOCKS if block.language == "bash"):
        for words in commands(block.text):
            if words[0] == "stableavatar" and block.runs:
                result = run(*words[1:])
                assert result.exit_code == 0, (words, result.output)
            elif words[0] == "stableavatar":
                parse(words)
            elif words[0] == "make":
                make_knows(words)
            else:
                assert not block.runs, words
                assert words[0] in FOREIGN, words
    assert probe(folder / "talk.mp4").frames == 25


def make_knows(words: list[str]) -> None:
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    done = dry_make(words[1:])
    assert done.returncode == 0, done.stderr


def dry_make(targets: list[str]) -> subprocess.CompletedProcess[str]:
    """What make would do, also where the tests themselves run under a make."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", "-n", "--no-print-directory", *targets],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("text", [block.text for block in BLOCKS if block.language == "python"])
def test_python_examples(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})
    assert re.search(r"\d+", capsys.readouterr().out)


def test_options_that_are_named_exist() -> None:
    known = {option for command in COMMANDS.values() for p in command.params for option in p.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    assert len(named) > 10
    assert named <= known | {"--help", *TORCHRUN}


def test_files_that_are_named_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).is_file(), link


def test_examples_of_the_help_are_commands() -> None:
    lines = [line for line in cli.EXAMPLES.splitlines() if line.startswith("  ")]
    assert len(lines) > 3
    for words in commands("\n".join(lines)):
        assert words[0] == "stableavatar"
        parse(words)


def test_the_demo_is_what_the_readme_says() -> None:
    """`make demo` runs the command line on the files that ship, and says where the video is."""
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    done = dry_make(["demo"])
    lines = [shlex.split(line) for line in done.stdout.splitlines() if "generate" in line.split()[1:2]]
    [words] = lines
    arguments = words[words.index("generate") + 1 :]
    parsed = parse(["stableavatar", "generate", *arguments]).params
    assert (parsed["model"], str(parsed["output"])) == ("tiny", "out/demo.mp4")
    assert (ROOT / parsed["portrait"]).is_file()
    assert (ROOT / parsed["speech"]).is_file()
    assert "out/demo.mp4" in done.stdout.splitlines()[-1]
