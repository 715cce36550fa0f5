"""What the evaluation writes: its part of a document, plots of logs, contact sheets."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from puppet_frames import still
from stableavatar.data.puppets import PuppetClip
from stableavatar.errors import InputError
from stableavatar.evaluation import tiny
from stableavatar.evaluation.embedded import Part
from stableavatar.evaluation.report import END, START, Exhibit, Exhibits, write_report
from stableavatar.evaluation.scores import Scores
from stableavatar.evaluation.sheets import (
    contact_sheet,
    line_plot,
    read_columns,
    read_log,
    telling_moments,
    thin,
)


def test_report_replaces_its_own_part_of_a_document(tmp_path: Path) -> None:
    document = tmp_path / "tiny.md"
    document.write_text("# Tiny\n\nKept before.\n", encoding="utf-8")
    logs = tmp_path / "logs" / "autoencoder"
    logs.mkdir(parents=True)
    lines = [{"step": k, "seconds": 2.0 * k, "loss": 1 / (k + 1), "psnr": 10.0 + k} for k in range(900)]
    (logs / "curve.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    rows = {"truth": np.zeros((20, 16, 16, 3), np.uint8)}
    exhibits = Exhibits(puppet=Exhibit(rows, np.linspace(0, 1, 20, dtype=np.float32), None))
    write_report(document, Scores(), exhibits, "first", tmp_path / "logs")
    document.write_text(document.read_text(encoding="utf-8") + "\nKept after.\n", encoding="utf-8")
    write_report(document, Scores(), exhibits, "second")
    text = document.read_text(encoding="utf-8")
    assert "Kept before." in text
    assert "Kept after." in text
    assert "Measured: second." in text
    assert "first" not in text
    assert "tiny/curve_autoencoder.png" in text
    columns = read_columns(tmp_path / "tiny" / "curve_autoencoder.csv")
    assert len(columns["loss"]) == 300
    assert columns["psnr"][0] == pytest.approx(11)
    for picture in ("puppet.png", "curve_autoencoder.png"):
        assert np.asarray(Image.open(tmp_path / "tiny" / picture)).std() > 5
    with pytest.raises(InputError, match="no training log"):
        write_report(document, Scores(), exhibits, "third", tmp_path / "nowhere")
    document.write_text(text.replace("<!-- end of figures -->", ""), encoding="utf-8")
    with pytest.raises(InputError, match="only one of the two markers"):
        write_report(document, Scores(), exhibits, "fourth")


@pytest.mark.parametrize("text", [f"# Tiny\n\n{END}\n\n{START}\n", f"# Tiny\n\n{START}\n"])
def test_markers_that_are_no_pair_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    document = tmp_path / "tiny.md"
    document.write_text(text, encoding="utf-8")
    monkeypatch.setattr(tiny, "measure", lambda *_: pytest.fail("it was measured"))
    assert tiny.main(["--quick", "--out", str(document)]) == 2
    assert "put both back" in capsys.readouterr().err
    assert document.read_text(encoding="utf-8") == text


def test_a_document_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "tiny.md"
    document.write_text("# Tiny\n", encoding="utf-8")

    def full(_: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("stableavatar.media.files.to_disk", full)
    with pytest.raises(OSError, match="no space"):
        write_report(document, Scores(), Exhibits(), "first")
    assert document.read_text(encoding="utf-8") == "# Tiny\n"


def test_logs_and_plots_take_gaps(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "note": "x", "loss": null}\n{"step": 3, "loss": 1.0}\n'
    )
    columns = read_log(log)
    assert list(columns) == ["step", "loss"]
    assert np.isnan(columns["loss"][1])
    assert list(thin(columns, 1)["loss"]) == [1.5]
    plot = line_plot("loss", {"loss": (columns["step"], columns["loss"])}, "steps")
    assert (np.asarray(plot) == (31, 119, 180)).all(axis=-1).sum() > 50
    with pytest.raises(ValueError, match="no points"):
        line_plot("none", {"loss": (np.array([np.nan]), np.array([1.0]))}, "steps")


def test_a_line_that_a_kill_cut_off_costs_no_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n[1]\n{"step": 2, "lo')
    assert list(read_log(log)["loss"]) == [2.0]
    assert [record.args for record in caplog.records] == [(log, 2), (log, 3)]


def test_a_folder_without_logs_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.main(["--out", str(tmp_path / "tiny.md"), "--curves", str(tmp_path)]) == 2
    assert "no training log" in capsys.readouterr().err


def test_contact_sheet_shows_wide_and_shut_mouths(clip: PuppetClip) -> None:
    called = clip.articulation.opening
    moments = telling_moments(called, 6)
    assert called[moments[::2]].mean() > called[moments[1::2]].mean() + 0.2
    sheet = contact_sheet({"truth": clip.frames, "still": still(clip)}, moments, scale=2)
    assert sheet.size == (96 + 6 * 256, 2 * 256)


@pytest.mark.parametrize("option", ["--steps", "--text-scale", "--audio-scale"])
def test_settings_of_a_model_are_none_of_an_autoencoders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, option: str
) -> None:
    assert tiny.main(["--gate", str(tmp_path), option, "0"]) == 2
    assert "leave --model" in caplog.text


def test_settings_given_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    setups: list[tiny.Setup] = []
    calls: list[dict[str, Any]] = []

    class Pipeline:
        vae = None

        def stream(
            self, portrait: np.ndarray, samples: np.ndarray, **options: object
        ) -> Iterator[np.ndarray]:
            calls.append(options)
            yield portrait

    def loaded(model: str, **options: object) -> Pipeline:
        calls.append({"model": model, **options})
        return Pipeline()

    monkeypatch.setattr(tiny, "measure", lambda setup, _: setups.append(setup) or Part())
    monkeypatch.setattr(tiny, "load", loaded)
    given = [
        "--model",
        "folder",
        "--dtype",
        "bfloat16",
        "--steps",
        "3",
        "--text-scale",
        "0",
        "--audio-scale",
        "4.5",
    ]
    assert tiny.main(["--quick", *given]) == 0
    assert tiny.main(["--quick"]) == 0
    for setup in setups:
        speaker = setup.evaluation().speaker
        assert speaker is not None
        speaker(np.zeros((128, 128, 3), np.uint8), np.zeros(640, np.float32), "x", 7)
    usual = {"prompt": "x", "seed": 7, "width": 128, "height": 128, "fps": 25}
    assert calls == [
        {"model": "folder", "dtype": "bfloat16"},
        {**usual, "steps": 3, "text_scale": 0.0, "audio_scale": 4.5},
        {"model": "tiny", "dtype": "auto"},
        usual,
    ]


def test_controls_without_a_result_are_shown() -> None:
    """As of --gate, which has bars for them."""
    scores = Scores({("puppets", "lip_correlation", "decoded"): [0.8]})
    ((title, result, true, decoded, *_, verdict),) = scores.rows()
    assert (title, result, true, decoded, verdict) == ("lip correlation [r]", "-", "-", "0.80", "MISS")


@pytest.mark.parametrize(
    "failing", ["stableavatar download", "python -m stableavatar.evaluation.faces", "nothing"]
)
def test_without_the_networks_for_faces_no_page_is_made(tmp_path: Path, failing: str) -> None:
    """Its rows of photographs would be missing."""
    called = tmp_path / "called"
    (tmp_path / "bin").mkdir()
    for name in ("stableavatar", "python"):
        tool = tmp_path / "bin" / name
        tool.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {called}\ncase "{name} $*" in "{failing}"*) exit 1; esac\n'
        )
        tool.chmod(0o755)
    (tmp_path / ".installed").touch()
    root = Path(__file__).parents[1]
    done = subprocess.run(
        ["make", "evaluate-tiny", f"VENV={tmp_path}"], cwd=root, capture_output=True, check=False
    )
    assert (done.returncode == 0) == (failing == "nothing")
    assert ("evaluation.tiny" in called.read_text()) == (failing == "nothing")
