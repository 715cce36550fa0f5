"""What the benchmarks reckon, that they compare the same work, and what they keep; never how fast anything is."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import decode, long, processes, run, transformer, wan
from benchmarks.inputs import PORTRAIT, write_wav
from benchmarks.measuring import BenchmarkError, Times
from benchmarks.sizes import QUICK, Sizes
from stableavatar.config import SIZES
from toy import toy_transformer


def test_a_part_is_measured_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rounds", "1", "--followed", "1", "2", "--steps", "1"]
    assert run.main(["first-frame", "--quick", *sizes, "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "with tiny at 1 steps; median of 1 rounds" in said
    assert [line.split()[1] for line in said.splitlines() if line.startswith("|")][2:] == ["1", "2"]
    assert "threads: 1, processor" in said


def test_a_ratio_is_the_middle_one_of_the_rounds() -> None:
    """A round in which all was slow does not count, which it would in a ratio of medians or of sums."""
    ours, peer = Times((2.0, 30.0, 3.0)), Times((1.0, 20.0, 2.0))
    assert ours.ratio(peer) == 1.5
    assert Times((1.0, 10.0, 10.0)).ratio(Times((2.0, 5.0, 40.0))) == 0.5
    assert ours.median == 3.0


def test_the_released_blocks_are_reckoned_from_fewer() -> None:
    """A second, and half a second a block, in one round; the double in the other."""
    reckoned = transformer._reckoned(Times((1.5, 3.0)), Times((2.5, 5.0)), (1, 3), 30)
    assert reckoned.seconds == (16.0, 32.0)


def test_transformers_that_do_not_compute_the_same_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    released = SIZES["1.3b"]
    toy = {**toy_transformer().config, "text_length": 512}  # the only one that diffusers' knows
    small = replace(released, transformer={name: toy[name] for name in released.transformer})
    monkeypatch.setattr(wan, "SIZES", {"1.3b": small})
    pair = wan.Pair.of(1, torch.float32)
    calls = wan.calls(pair, QUICK, torch.float32)
    assert wan.check_agreement(calls, "float32") <= 1e-4
    with torch.no_grad():
        pair.peer.blocks[0].ffn.net[2].weight *= 1.1
    with pytest.raises(BenchmarkError, match="do not compute the same"):
        wan.check_agreement(calls, "float32")


def test_autoencoders_that_do_not_compute_the_same_are_not_compared() -> None:
    models = {own: decode.autoencoder(own) for own in (False, True)}
    assert decode._difference(models, 2) <= 1e-4
    with torch.no_grad():
        models[True].decoder.conv_in.weight *= 1.1
    with pytest.raises(BenchmarkError, match="not the same work"):
        decode._difference(models, 2)


def test_a_long_video_is_kept_while_it_would_be_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speech, output = tmp_path / "speech.wav", tmp_path / "video.mp4"
    write_wav(speech, np.zeros(8000, np.float32))
    assert long.kept(output, threads=1) is None
    long.make(PORTRAIT, speech, output, "causal", steps=1, threads=1)
    figures = long.kept(output, threads=1)
    assert figures is not None
    assert figures.keys() >= {"date", "peak", "first_frame"}
    assert long.kept(output, threads=2) is None
    with monkeypatch.context() as patch:
        patch.setattr("stableavatar.__version__", "0.0.0")
        assert long.kept(output, threads=1) is None
    monkeypatch.setattr(long, "WEIGHTS", tmp_path)
    assert long.kept(output, threads=1) is None


def test_a_long_video_of_before_is_made_anew(tmp_path: Path) -> None:
    output = tmp_path / "video.mp4"
    output.touch()
    output.with_suffix(".json").write_text(json.dumps({"peak": 1.0, "took": 1.0, "first_frame": 1.0}))
    assert long.kept(output, threads=1) is None


def test_threads_are_those_of_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(sizes: Sizes, threads: int) -> str:
        return f"{threads} asked for"

    document = tmp_path / "performance.md"
    for name in ("processes", "generate"):
        monkeypatch.setitem(run.PARTS, name, (measure, "float32"))
    threads = torch.get_num_threads()
    try:
        assert run.main(["processes", "generate", "--threads", "2", "--out", str(document)]) == 0
    finally:
        torch.set_num_threads(threads)
    of_processes, of_generate = document.read_text(encoding="utf-8").split("<!-- end of processes -->")
    assert f"threads: {processes.THREADS}," in of_processes
    assert "threads: 2," in of_generate


def test_a_document_without_one_marker_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "performance.md"
    document.write_text("<!-- end of generate -->\n", encoding="utf-8")
    monkeypatch.setitem(run.PARTS, "decode", (lambda *_: pytest.fail("it was measured"), "float32"))
    with pytest.raises(SystemExit):
        run.main(["decode", "generate", "--out", str(document)])
    assert "put both back" in capsys.readouterr().err
