"""What goes wrong in a run of the trainer, and what is said and kept then."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fitting import Fit, Points, assert_same_run, losses, make, settings
from stableavatar.errors import CheckpointError, InputError
from stableavatar.training.checkpoints import list_checkpoints
from stableavatar.training.loader import open_batches
from stableavatar.training.log import read_log, tracker_arguments
from stableavatar.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Unreadable(Points):
    """Of which clip 3 cannot be read."""

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        if key[0] == 3:
            raise InputError("clips/00003/audio.wav: there is no such file")
        return super().__getitem__(key)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_reader_cannot_read_is_a_sentence(tmp_path: Path, workers: int) -> None:
    trainer = Trainer(Fit(), Unreadable(), torch.stack, settings(workers=workers), tmp_path)
    with pytest.raises(InputError) as raised:
        trainer.train()
    assert str(raised.value) == "clips/00003/audio.wav: there is no such file"


class Killed(Points):
    """Whose reader is killed at clip 3."""

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        if key[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)


def test_a_reader_that_is_killed_is_a_sentence(tmp_path: Path) -> None:
    trainer = Trainer(Fit(), Killed(), torch.stack, settings(workers=1), tmp_path)
    with pytest.raises(
        InputError, match=r"was lost, .*\n.*trainer\.workers, now 1.*--shm-size.*--resume latest"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        # A container's 64 MB: said by a reader, whose traceback comes first, and by the kernel.
        (
            "Caught RuntimeError in DataLoader worker process 0.\nTraceback:\nRuntimeError: unable to allocate "
            "shared memory(shm) for file </torch_7>: No space left on device (28)",
            InputError,
        ),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. ", InputError),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nTraceback:\nRuntimeError: a fault",
            RuntimeError,
        ),
        ("a fault", RuntimeError),
    ],
)
def test_what_torch_says_of_lost_readers(said: str, kind: type[Exception], tmp_path: Path) -> None:
    sampler = make(tmp_path).sampler
    with (
        pytest.raises(kind) as raised,
        open_batches(Points(), torch.stack, sampler, step=0, seed=0, readers=0),
    ):
        raise RuntimeError(said)
    assert "Traceback" not in str(raised.value) or kind is RuntimeError


@pytest.mark.parametrize("where", ["weights", "average"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, where: str) -> None:
    trainer = make(tmp_path, keep_checkpoints=1)
    assert trainer.ema is not None
    taken = trainer.optimizer.step

    def step() -> None:
        taken()
        if trainer.step == 8:
            values = trainer.parameters if where == "weights" else trainer.ema.state
            with torch.no_grad():
                next(iter(values.values())).view(-1)[0] = torch.nan

    trainer.optimizer.step = step
    with pytest.raises(InputError, match=r"no longer finite at step \d+, which is not saved"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005"]
    assert not list(tmp_path.glob(".step*"))


def test_a_checkpoint_that_falls_on_a_bad_step_comes_after_the_next_good_one(tmp_path: Path) -> None:
    make(tmp_path, Fit(poison=(5, 6)), accumulation=1, steps=14, keep_checkpoints=9).train()
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-00000007", "step-00000010", "step-00000014"]


def test_a_resumed_run_saves_where_the_undisturbed_one_does(tmp_path: Path) -> None:
    make(tmp_path / "whole", keep_checkpoints=9).train()
    make(tmp_path / "parts", steps=7, keep_checkpoints=9).train()
    rest = make(tmp_path / "parts", keep_checkpoints=9)
    rest.resume("latest")
    rest.train()
    names = {name: [path.name for path in list_checkpoints(tmp_path / name)] for name in ("whole", "parts")}
    assert [name for name in names["parts"] if name != "step-00000007"] == names["whole"]


def test_the_limit_of_checkpoints_is_the_settings(tmp_path: Path) -> None:
    make(tmp_path, checkpoint_every=2, keep_checkpoints=2).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000012"]


def test_a_stop_before_the_first_step_is_no_failure(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.request_stop()
    assert trainer.train().step == 0


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    make(tmp_path, steps=5).train()
    (tmp_path / "step-00000005" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-00000005 .*says nothing of identity"):
        make(tmp_path).resume("latest")


@pytest.mark.parametrize("kind", ["muon", "adamw-8bit"])
def test_another_optimizer_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "adamw-8bit":
        pytest.importorskip("torchao", reason="in the extra large; see make test-large")
    for before, after in (("adamw", kind), (kind, "adamw")):
        make(tmp_path / before, kind=before, steps=1).train()
        for new_data in (False, True):
            with pytest.raises(
                InputError, match="step-00000001 was trained with another optimizer; it cannot"
            ):
                make(tmp_path / before, kind=after).resume("latest", new_data=new_data)


def test_another_optimizer_of_a_checkpoint_that_does_not_say_which_is_named(tmp_path: Path) -> None:
    make(tmp_path, steps=5).train()
    file = tmp_path / "step-00000005" / "state.json"
    state = json.loads(file.read_text())
    del state["identity"]["optimizer"]
    file.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="step-00000005 is of another optimizer"):
        make(tmp_path, kind="muon").resume("latest")
    again = make(tmp_path)
    again.resume("latest")
    assert again.step == 5


def test_a_log_that_a_power_cut_damaged_is_gone_on_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "whole").train()
    make(tmp_path / "parts", steps=10).train()
    log = tmp_path / "parts" / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + b"\0\0\0\0\xff\n" + b"".join(lines[1:]) + b'[1]\n{"step": 1')
    rest = make(tmp_path / "parts")
    rest.resume("latest")
    rest.train()
    assert "log.jsonl: line 2 cannot be read" in caplog.text
    assert [line["step"] for line in read_log(log)] == [3, 6, 9, 12]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_other_settings_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, steps=5).train()
    again = make(tmp_path, learning_rate=0.5, ema_decay=0.0)
    with caplog.at_level(logging.WARNING):
        again.resume("latest")
    assert "trainer.ema_decay 0.0 (was 0.9)" in caplog.text
    assert "trainer.optimizer.learning_rate 0.5 (was 0.01)" in caplog.text
    assert "seed" not in caplog.text


def test_nothing_is_told_of_where_nothing_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, steps=5, trackers=("tensorboard",)).train()
    with caplog.at_level(logging.WARNING):
        make(tmp_path, steps=5, trackers=("tensorboard",)).resume("latest")
    assert not caplog.text


def test_a_tracker_has_every_step_once_after_a_resume(tmp_path: Path) -> None:
    whole = make(tmp_path, steps=12, trackers=("tensorboard",))
    whole.train()
    whole.close()
    for late in list_checkpoints(tmp_path)[1:]:
        shutil.rmtree(late)
    rest = make(tmp_path, steps=12, trackers=("tensorboard",))
    rest.resume("latest")
    assert rest.step == 5
    rest.train()
    rest.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "trackers" / "stableavatar")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [line["step"] for line in losses(tmp_path)]


def test_trackers_go_on_with_the_run_that_they_began(tmp_path: Path) -> None:
    first, second = (tracker_arguments(tmp_path, step) for step in (0, 5))
    assert first["wandb"] == second["wandb"]
    assert second["tensorboard"] == {"purge_step": 6}
    assert tracker_arguments(tmp_path / "other", 0)["wandb"]["id"] != first["wandb"]["id"]


def test_what_accelerate_launch_says_of_precision_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(InputError, match="mixed_precision bf16"):
        make(tmp_path)


def test_accumulation_is_the_settings_whatever_accelerate_launch_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "plain").train()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    make(tmp_path / "launched").train()
    assert_same_run(tmp_path / "plain", tmp_path / "launched")


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"learning_rate": float("inf")}, "learning_rate must be above 0 and finite"),
        ({"betas": (2.0, 3.0)}, "betas must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"seed": 2**70}, r"seed must be below 2\*\*63"),
    ],
)
def test_values_that_cannot_be_are_refused(values: dict[str, object], what: str) -> None:
    with pytest.raises(InputError, match=what):
        settings(**values)


PAIR = """
import sys
sys.path.insert(0, {tests!r})
import logging
import os
from pathlib import Path
import torch
from fitting import Fit, Points, settings
from stableavatar.errors import InputError
from stableavatar.training.run import Training
from stableavatar.training.trainer import Trainer

def say(line):
    os.write(1, (line + "\\n").encode())  # at once: another process writes there too

class Other(Points):
    fingerprint = "six points" if os.environ["RANK"] == "1" and sys.argv[1] == "clips" else Points.fingerprint

    def fail(*_):
        raise InputError("no such clip")

trainer = None
try:
    trainer = Trainer(Fit(), Other(), torch.stack, settings(), Path(sys.argv[2]))
    if sys.argv[1] == "error":
        handler = logging.Handler()
        handler.emit = lambda record: say(f"{{os.environ['RANK']}} {{record.getMessage()}}")
        logging.getLogger("stableavatar.training.run").addHandler(handler)
        trainer.prepare = Other.fail
        close = trainer.close
        trainer.close = lambda: (say(os.environ["RANK"] + " closes"), close())
        Training(None, None, trainer).run()
    if sys.argv[1] == "random":
        rank, folder = int(os.environ["RANK"]), Path(sys.argv[2])
        for name, steps in (("whole", 12), ("parts", 7), ("parts", 12)):
            torch.manual_seed(rank if name == "whole" or steps == 7 else 999)
            trainer = Trainer(Fit(), Other(), torch.stack, settings(steps=steps), folder / name)
            if (name, steps) == ("parts", 12):
                trainer.resume("latest")
            trainer.train()
    if sys.argv[1] == "steps":
        trainer.train()
        if os.environ["RANK"] == "1":  # to which shared storage still shows an older state
            import stableavatar.training.trainer as module
            module.list_checkpoints = lambda folder: []
        trainer = Trainer(Fit(), Other(), torch.stack, settings(steps=14), Path(sys.argv[2]))
        trainer.resume("latest")
        assert trainer.step == 12, trainer.step
        trainer.train()
        say(f"went on to {{trainer.step}}")
except InputError as error:
    say(f"refused: {{error}}")
finally:  # a process that leaves its group to the interpreter's end is now and then ended by an abort
    if trainer is None:
        torch.distributed.destroy_process_group()
    else:
        trainer.close()
"""


def pair(tmp_path: Path, what: str) -> str:
    script = tmp_path / "pair.py"
    script.write_text(PAIR.format(tests=str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script), what,
         str(tmp_path / "run")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_processes_with_other_clips_are_refused(tmp_path: Path) -> None:
    assert pair(tmp_path, "clips").count("refused: process 1 has other clips than the first") == 2


def test_an_error_is_told_before_a_process_leaves_the_others(tmp_path: Path) -> None:
    said = pair(tmp_path, "error").splitlines()
    for rank in range(2):
        assert [line for line in said if line.startswith(f"{rank} ")] == [
            f"{rank} ends: no such clip", f"{rank} closes", f"{rank} closes",
        ]  # fmt: skip


def test_every_process_goes_on_with_its_own_random_numbers(tmp_path: Path) -> None:
    assert "refused" not in pair(tmp_path, "random")
    assert_same_run(tmp_path / "run" / "whole", tmp_path / "run" / "parts")


def test_the_first_process_says_which_checkpoint_is_the_latest(tmp_path: Path) -> None:
    assert pair(tmp_path, "steps").count("went on to 14") == 2


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stableavatar.training import checkpoints

    flushed: list[str] = []
    flush = checkpoints.to_disk

    def watched(path: Path) -> None:
        flushed.append(path.name)
        flush(path)

    monkeypatch.setattr(checkpoints, "to_disk", watched)
    make(tmp_path, steps=5).train()
    files = {path.name for path in (tmp_path / "step-00000005").iterdir()}
    assert files
    assert files < set(flushed)
    assert flushed[-1] == tmp_path.name  # the rename itself
    assert flushed[-2] == ".step-00000005.partial"


def test_a_state_says_all_settings_of_the_training(tmp_path: Path) -> None:
    record = {"objective": {"motion_ratio": 0.25}, "output": Path("runs/x")}
    Trainer(Fit(), Points(), torch.stack, settings(steps=5), tmp_path, record=record).train()
    state = json.loads((tmp_path / "step-00000005" / "state.json").read_text())
    assert state["record"] == {"objective": {"motion_ratio": 0.25}, "output": "runs/x"}
