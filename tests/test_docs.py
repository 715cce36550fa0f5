"""The documentation and the Makefile name what is there: their commands are parsed, recipes and settings read, files
exist. What the commands do is tested where they are."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import reference_tables
import stableavatar
from command_line import run
from documents import COMMANDS, Block, blocks, commands, parse, reader
from method_figures import FIGURES
from method_figures import FOLDER as METHOD
from reference_tables import of_commands, of_recipes
from stableavatar.evaluation import cases
from stableavatar.training.recipes import load_recipe
from stableavatar.training.tiny import autoencoder, made_latents

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [
    *PAGES, *sorted((ROOT / "docs" / "decisions").glob("*.md")), ROOT / "README.md", ROOT / "integrations" / "comfyui" / "README.md",
]  # fmt: skip


# The commands of a section ask a server: test_server_processes.py runs them.
ASKING = "## Asking for a video"
# Options of other programs that pages name: torchrun, accelerate, Docker, this project's modules, published scripts.
THEIRS = {
    "--nproc-per-node", "--shutdown-timeout", "--standalone", "--config_file", "--quick", "--development", "--portrait", "--freeze-encoder",
    "--out", "--help", "--gpus", "--recipes",
}  # fmt: skip


def blocks_of(page: Path, *, without: str = "") -> list[Block]:
    """Of a page, or of what comes before a section and after it."""
    text = page.read_text(encoding="utf-8")
    before, heading, rest = text.partition(without) if without else (text, "", "")
    return blocks(before + "\n## " + rest.partition("\n## ")[2] if heading else before)


def named(page: Path) -> list[list[str]]:
    """The commands of this project in a page's blocks."""
    shells = [block.text for block in blocks_of(page) if block.language == "bash"]
    return [words for text in shells for words in commands(text) if words[0] == "stableavatar"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_not_marked_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader(tmp_path, monkeypatch)
    for block in (block for block in blocks_of(page, without=ASKING) if block.runs):
        if block.language == "python":
            exec(compile(block.text, page.name, "exec"), {"__name__": "__main__"})
        elif block.language == "bash":
            for words in commands(block.text):
                assert words[0] == "stableavatar", words
                result = run(*words[1:])
                assert result.exit_code == 0, (words, result.output)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_known(page: Path) -> None:
    for words in named(page):
        context = parse(words)
        if "recipe" in context.params:
            load_recipe(ROOT / context.params["recipe"], context.params["settings"] or ())


@pytest.mark.parametrize(
    "page",
    [it for it in TEXTS if it.parent.name != "decisions"],
    ids=lambda page: f"{page.parent.name}-{page.stem}",
)
def test_options_that_sentences_name_are_known(page: Path) -> None:
    """And the commands that stand in them."""
    known = {flag for command in COMMANDS.values() for option in command.params for flag in option.opts}
    sentences = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    inline = re.findall(r"`([^`]+)`", sentences)
    named = {flag for text in inline for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    assert named <= known | THEIRS, named - known - THEIRS
    for words in (text.split() for text in inline if text.startswith("stableavatar ")):
        assert words[1] in COMMANDS or words[1] == "COMMAND", words


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_files_that_are_linked_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize(
    ("page", "table"),
    [(reference_tables.OF_COMMANDS, of_commands), (reference_tables.OF_RECIPES, of_recipes)],
    ids=["commands", "recipes"],
)
def test_tables_are_of_what_is_there(page: Path, table: Callable[[], str]) -> None:
    """`python tests/reference_tables.py` writes them."""
    _, start, rest = page.read_text(encoding="utf-8").partition(reference_tables.START)
    assert start
    assert rest.partition(reference_tables.END)[0].strip() == table()


def test_the_package_has_what_it_says_it_has() -> None:
    assert set(stableavatar.__all__) == {*stableavatar._MODULES, "__version__"}
    for name in stableavatar.__all__:
        assert getattr(stableavatar, name) is not None


def test_every_option_and_key_says_what_it_is() -> None:
    rows = [line for line in (of_commands() + of_recipes()).splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert not [row for row in rows if row.endswith("|  |") or row.count(" | ") != 3]


def test_there_are_commands() -> None:
    assert sum(len(named(page)) for page in PAGES) > 5
    assert {words[1] for words in named(ROOT / "docs" / "training.md")} >= {"prepare", "train", "convert"}


def made(*arguments: str, **environment: str) -> str:
    """What `make` would run."""
    run = subprocess.run(
        ["make", "--dry-run", "--assume-old", ".venv/.installed", *arguments],
        cwd=ROOT, check=True, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    return run.stdout


@pytest.mark.parametrize("arguments", [(), ("QUICK=1",), ("START=tiny",)])
def test_make_tiny_runs_its_recipe_in_its_folder(arguments: tuple[str, ...]) -> None:
    lines = made("tiny", *arguments).replace("\\\n", " ").splitlines()
    for command in ("cache-latents", "train"):
        (line,) = [line for line in lines if f"stableavatar {command} " in line]
        context = parse(["stableavatar", *shlex.split(line[line.index(f" {command} ") :])])
        recipe = load_recipe(ROOT / context.params["recipe"], context.params["settings"])
        plain = load_recipe(ROOT / "recipes" / "tiny.yaml")
        if not arguments:
            assert recipe == plain
        elif arguments == ("QUICK=1",):
            assert str(recipe.output) == "runs/tiny-quick"
            assert recipe.trainer.steps < 10 < plain.trainer.steps
        else:
            assert recipe.model.embedded is not None
            assert recipe.model.embedded.start == Path("tiny")


@pytest.mark.parametrize("arguments", [(), ("QUICK=1",)])
def test_make_tiny_makes_every_store_of_its_recipe_of_other_people(arguments: tuple[str, ...]) -> None:
    lines = made("tiny", *arguments).replace("\\\n", " ").splitlines()
    stores = [shlex.split(summed(line)) for line in lines if "data.puppets store " in line]
    folders = [words[words.index("--folder") + 1] for words in stores]
    (line,) = [line for line in lines if "stableavatar train " in line]
    context = parse(["stableavatar", *shlex.split(line[line.index(" train ") :])])
    recipe = load_recipe(ROOT / context.params["recipe"], context.params["settings"])
    assert folders == [str(folder) for folder in recipe.data.puppets]
    people: list[int] = []
    for words in stores:
        first = int(words[words.index("--seed") + 1]) if "--seed" in words else 0
        people += range(first, first + int(words[words.index("--clips") + 1]))
    assert len(people) == len(set(people))
    assert max(people) < cases.DEVELOPMENT.seed


@pytest.mark.parametrize("arguments", [(), ("QUICK=1",)])
def test_make_tiny_trains_the_decoder_for_the_model_it_has_made(arguments: tuple[str, ...]) -> None:
    lines = made("tiny", *arguments).replace("\\\n", " ").splitlines()

    def options_of(module: str, parser: argparse.ArgumentParser) -> list[argparse.Namespace]:
        found = [line.split(f"-m {module} ")[1] for line in lines if f"-m {module} " in line]
        return [parser.parse_args(shlex.split(line.split("&&")[0])) for line in found]

    whole, decoder = options_of("stableavatar.training.tiny.autoencoder", autoencoder.command_parser())
    (latents,) = options_of("stableavatar.training.tiny.made_latents", made_latents.command_parser())
    (line,) = [line for line in lines if "stableavatar train " in line]
    context = parse(["stableavatar", *shlex.split(line[line.index(" train ") :])])
    recipe = load_recipe(ROOT / context.params["recipe"], context.params["settings"])
    assert decoder.freeze_encoder
    assert decoder.into == Path(latents.model) == recipe.output / "model"
    assert decoder.made == latents.out
    assert decoder.start_from == recipe.model.source / "vae"
    assert decoder.puppets == latents.puppets == whole.puppets
    assert decoder.out != whole.out
    assert decoder.critic_share > 0


def summed(line: str) -> str:
    """With `$((1 + 2))` as the shell works it out."""
    return re.sub(r"\$\(\(([\d +]+)\)\)", lambda match: str(sum(map(int, match[1].split("+")))), line)


def test_a_quick_pass_leaves_the_package_as_it_is() -> None:
    assert "rm -rf src/stableavatar/assets/tiny" in made("tiny")
    quick = made("tiny", "QUICK=1")
    assert "rm -rf src" not in quick
    assert "cp -R runs/tiny-quick/model" not in quick


def test_make_takes_numbers_of_the_environment_too() -> None:
    assert re.search(r"--clips 77$", made("tiny", CLIPS="77"), re.MULTILINE)


def test_the_site_is_built_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    """Strictly: a link within that leads nowhere, or a docstring that cannot be read, is an error."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("AvatarPipeline", "GenerateOptions", "audio_scale", "LiveRecording", "StoppedError"):
        assert name in page, name


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_the_method_are_those_of_the_code(name: str) -> None:
    """Else: python tests/method_figures.py"""
    assert (METHOD / f"{name}.svg").read_text(encoding="utf-8") == FIGURES[name]()
    assert f"(method/{name}.svg)" in (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
