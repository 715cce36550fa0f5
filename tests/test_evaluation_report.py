"""What the evaluation writes: its part of a document, plots of logs, contact sheets."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from puppet_frames import still
from stableavatar.data.puppets import PuppetClip
from stableavatar.errors import InputError
from stableavatar.evaluation import tiny
from stableavatar.evaluation.report import Exhibit, Exhibits, write_report
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
