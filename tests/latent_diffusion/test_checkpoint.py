import contextlib
import errno
import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from latent_diffusion import checkpoint
from latent_diffusion.checkpoint import Progress
from latent_diffusion.errors import InputError
from latent_diffusion.weights import read_paddle, write_paddle


def make_checkpoints(output_dir: Path, *steps: int) -> list[Path]:
    folders = [output_dir / f"checkpoint-{step}" for step in steps]
    for step, folder in zip(steps, folders, strict=True):
        folder.mkdir(parents=True)
        (folder / checkpoint.TRAINER_STATE).write_text("{}")
        checkpoint.write_manifest(folder, Progress(step, 8 * step, 23))
    return folders


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    ninety, hundred, five = make_checkpoints(tmp_path, 90, 100, 5)
    assert checkpoint.checkpoints(tmp_path) == [five, ninety, hundred]
    assert checkpoint.newest_checkpoint(tmp_path) == hundred


def test_other_names_are_no_checkpoints(tmp_path):
    (complete,) = make_checkpoints(tmp_path, 10)
    for name in (".checkpoint-20.partial", "checkpoint-30-old", "checkpoint-x", "runs"):
        shutil.copytree(complete, tmp_path / name)
    (tmp_path / "checkpoint-50").write_text("a file")
    assert checkpoint.checkpoints(tmp_path) == [complete]


def test_a_folder_without_checkpoints_has_no_newest(tmp_path):
    assert checkpoint.newest_checkpoint(tmp_path) is None
    assert checkpoint.newest_checkpoint(tmp_path / "nowhere") is None


def truncate(folder: Path) -> None:
    (folder / checkpoint.TRAINER_STATE).write_text("{")


def flip(folder: Path) -> None:
    (folder / checkpoint.TRAINER_STATE).write_text("[]")


def spoil_manifest(text: str):
    return lambda folder: (folder / checkpoint.MANIFEST).write_text(text)


ENTRY = '{"version": 1, "step": 1, "samples": 8, "seed": 0, "files": %s}'
DAMAGE = {
    "no manifest": (lambda folder: (folder / checkpoint.MANIFEST).unlink(), "checkpoint-4 has no manifest.json"),
    "no file": (lambda folder: (folder / checkpoint.TRAINER_STATE).unlink(), "trainer_state.json cannot be read"),
    "size": (truncate, "trainer_state.json has 1 bytes, not 2"),
    "content": (flip, "trainer_state.json is not what was written"),
    "half a manifest": (spoil_manifest('{"version": 1, "st'), "cannot read .*manifest.json"),
    "other manifest": (spoil_manifest('{"layout": "packed"}'), "is not the manifest of a checkpoint"),
    "path": (spoil_manifest(ENTRY % '{"../x": {"bytes": 1}}'), "manifest.json is damaged"),
    "type": (spoil_manifest(ENTRY % '{"x": {"bytes": "1"}}'), "manifest.json is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, capsys, kind):
    good, bad = make_checkpoints(tmp_path, 3, 4)
    damage, message = DAMAGE[kind]
    damage(bad)
    assert checkpoint.newest_checkpoint(tmp_path, checkpoint.verify) == good
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: skipped a checkpoint: ") and re.search(message, line)
    with pytest.raises(InputError, match=message):
        checkpoint.verify(bad)


def test_a_run_does_not_begin_anew_where_all_checkpoints_are_damaged(tmp_path):
    for folder in make_checkpoints(tmp_path, 3, 4):
        truncate(folder)
    with pytest.raises(InputError, match="none of the 2 checkpoints in .* is complete .*-4/trainer_state.json"):
        checkpoint.newest_checkpoint(tmp_path)


def test_damaged_checkpoints_do_not_count_when_the_oldest_are_removed(tmp_path):
    _, _, three, four = make_checkpoints(tmp_path, 1, 2, 3, 4)
    truncate(three)
    checkpoint.remove_older(four, 2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_checkpoints_of_later_steps_are_not_removed_and_do_not_count(tmp_path):
    one, two, *_ = make_checkpoints(tmp_path, 1, 2, 8, 9)
    checkpoint.remove_older(two, 1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-8", "checkpoint-9"]
    assert not one.exists()


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(tmp_path, capsys):
    (good,) = make_checkpoints(tmp_path, 4)
    shutil.copytree(good, tmp_path / "checkpoint-900")
    assert checkpoint.newest_checkpoint(tmp_path) == good
    assert "checkpoint-900 is of step 4: name it checkpoint-4, or move it away" in capsys.readouterr().err


PROGRESS = Progress(step=7, samples=56, seed=23)


def write_text(folder: Path) -> None:
    (folder / "state").write_text("state")


def test_a_checkpoint_is_saved_whole(tmp_path):
    make_checkpoints(tmp_path, 5, 6)
    checkpoint.save(tmp_path / "checkpoint-7", write_text, PROGRESS, lambda: 0, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-6", "checkpoint-7"]
    checkpoint.verify(tmp_path / "checkpoint-7")
    assert checkpoint.read_progress(tmp_path / "checkpoint-7") == PROGRESS


@pytest.mark.parametrize("at", ["write", "manifest", "publish"])
def test_a_failed_save_leaves_what_was_and_says_what_it_needs(tmp_path, monkeypatch, at):
    make_checkpoints(tmp_path, 5, 6)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "some/file")

    if at != "write":
        monkeypatch.setattr(checkpoint, {"manifest": "write_manifest", "publish": "publish_folder"}[at], fail)
    with pytest.raises(
        checkpoint.SaveFailed,
        match=r"cannot save .*checkpoint-7 \(No space left on device: file\); it needs 3.0 MB, .* MB are free",
    ):
        checkpoint.save(
            tmp_path / "checkpoint-7", fail if at == "write" else write_text, PROGRESS, lambda: 3_000_000, keep=1
        )
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-5", "checkpoint-6"]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_fail_the_save(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(errno.EBUSY, "Device or resource busy", "checkpoint-5")

    monkeypatch.setattr(checkpoint, "remove_older", fail)
    checkpoint.save(tmp_path / "checkpoint-7", write_text, PROGRESS, lambda: 0, keep=1)
    assert "warning: cannot delete an old checkpoint (Device or resource busy: checkpoint-5)" in capsys.readouterr().err


@pytest.fixture
def two_processes(monkeypatch):
    """Sets what process 1 says whenever texts are gathered."""

    def set_other(*texts: str) -> None:
        answers = iter(texts)
        monkeypatch.setattr(checkpoint.distributed, "gather", lambda text: [text, next(answers)])
        monkeypatch.setattr(checkpoint.distributed, "from_first", lambda text: text)

    return set_other


def test_all_processes_resume_the_checkpoint_that_the_first_has_chosen(tmp_path, two_processes):
    (folder,) = make_checkpoints(tmp_path, 4)
    assert checkpoint.agreed(folder) == folder and checkpoint.agreed(None) is None
    two_processes((folder / checkpoint.MANIFEST).read_text())
    assert checkpoint.agreed(folder) == folder


@pytest.mark.parametrize("other", ["", "{}"])
def test_a_process_that_finds_another_checkpoint_there_is_named(tmp_path, two_processes, other):
    (folder,) = make_checkpoints(tmp_path, 4)
    two_processes(other)
    with pytest.raises(InputError, match=f"process 1 does not find the checkpoint {folder} as process 0 does"):
        checkpoint.agreed(folder)


@pytest.mark.parametrize("is_shared", [True, False])
def test_processes_that_write_into_different_folders_are_told(tmp_path, monkeypatch, two_processes, is_shared):
    monkeypatch.setattr(checkpoint.paddle.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(checkpoint.uuid, "uuid4", lambda: SimpleNamespace(hex="token"))
    two_processes("")

    def barrier() -> None:
        if is_shared:
            (tmp_path / ".process-1").write_text("token")

    monkeypatch.setattr(checkpoint.distributed, "barrier", barrier)
    expected = (
        contextlib.nullcontext() if is_shared else pytest.raises(InputError, match="process 1 does not write into")
    )
    with expected:
        checkpoint.check_shared(tmp_path)
    assert not (tmp_path / ".process-0").exists()


def test_no_process_has_saved_what_another_could_not(tmp_path, two_processes):
    two_processes("No space left on device: rng_state_1.pth", "2000000")
    with pytest.raises(checkpoint.SaveFailed, match=r"\(No space left on device: rng_state_1.pth\); it needs 5.0 MB"):
        checkpoint.save(tmp_path / "checkpoint-7", write_text, PROGRESS, lambda: 3_000_000)
    assert list(tmp_path.iterdir()) == []


def test_what_a_changed_run_changes_is_said():
    assert PROGRESS.changes(samples_per_step=8, seed=23) == []
    (batches,) = PROGRESS.changes(samples_per_step=4, seed=23)
    (seed,) = PROGRESS.changes(samples_per_step=8, seed=1)
    assert batches.startswith("other samples a step") and seed.startswith("seed 1, before it was 23")


def test_the_size_of_nested_tensors_is_counted():
    state = {"a": paddle.zeros([3, 4]), "b": {"c": paddle.zeros([2], "float16"), "d": 1}, "LR": 0.1}
    assert checkpoint.size_of(state) == 3 * 4 * 4 + 2 * 2


@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (2, [2, 3]), (5, [1, 2, 3]), (0, [1, 2, 3]), (None, [1, 2, 3])])
def test_the_oldest_are_removed(tmp_path, keep, left):
    checkpoint.remove_older(make_checkpoints(tmp_path, 1, 2, 3)[-1], keep)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_earlier_checkpoints_are_set_aside(tmp_path):
    assert checkpoint.set_aside(tmp_path) is None
    for number, steps in enumerate([(2, 4), (2,)], start=1):
        make_checkpoints(tmp_path, *steps)
        folder = tmp_path / f"overwritten-{number}"
        assert checkpoint.set_aside(tmp_path) == f"checkpoints of an earlier run were moved to {folder}"
        assert [path.name for path in checkpoint.checkpoints(folder)] == [f"checkpoint-{step}" for step in steps]
        assert checkpoint.checkpoints(tmp_path) == []


def model(outputs: int = 3, bias: bool = True) -> paddle.nn.Layer:
    return paddle.nn.Sequential(paddle.nn.Linear(2, 4), paddle.nn.Linear(4, outputs, bias_attr=None if bias else False))


def test_weights_are_loaded_bit_for_bit(tmp_path):
    source, target = model(), model()
    write_paddle(tmp_path / "weights.pdparams", source.state_dict())
    checkpoint.load_weights(tmp_path / "weights.pdparams", target)
    for name, tensor in source.state_dict().items():
        np.testing.assert_array_equal(target.state_dict()[name].numpy(), tensor.numpy())


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (model(outputs=5), r"1\.weight in .*weights\.pdparams has shape \[4, 5\], the model.s has \[4, 3\]"),
        (model(bias=False), r"weights\.pdparams lacks the weight 1\.bias"),
        (paddle.nn.Sequential(*model(), paddle.nn.Linear(3, 3)), r"weights\.pdparams has the weight 2\.bias"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, saved, message):
    write_paddle(tmp_path / "weights.pdparams", saved.state_dict())
    target = model()
    before = {name: tensor.numpy().copy() for name, tensor in target.state_dict().items()}
    with pytest.raises(InputError, match=message):
        checkpoint.load_weights(tmp_path / "weights.pdparams", target)
    for name, tensor in target.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name])


def trained(steps: int, rate: float = 0.1):
    net = model()
    optimizer = paddle.optimizer.AdamW(rate, parameters=net.parameters())
    for _ in range(steps):
        step(net, optimizer)
    return net, optimizer


def step(net, optimizer) -> None:
    net(paddle.to_tensor([[1.0, -2.0]])).square().sum().backward()
    optimizer.step()
    optimizer.clear_grad()


def test_optimizer_state_survives_other_parameter_names(tmp_path):
    """Parameter names count the layers of a process: one more before the model, and every name is another."""
    net, optimizer = trained(steps=3)
    checkpoint.save_optimizer(tmp_path / "optimizer.pdopt", optimizer, net)
    write_paddle(tmp_path / "weights.pdparams", net.state_dict())
    step(net, optimizer)

    paddle.nn.Linear(1, 1)
    other, other_optimizer = trained(steps=0)
    assert {p.name for p in net.parameters()}.isdisjoint(p.name for p in other.parameters())
    checkpoint.load_weights(tmp_path / "weights.pdparams", other)
    checkpoint.load_optimizer(tmp_path / "optimizer.pdopt", other_optimizer, other)
    step(other, other_optimizer)
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)


def test_optimizer_state_is_keyed_by_weight_names(tmp_path):
    net, optimizer = trained(steps=1)
    checkpoint.save_optimizer(tmp_path / "optimizer.pdopt", optimizer, net)
    keys = {key for key in read_paddle(tmp_path / "optimizer.pdopt") if key != "LR_Scheduler"}
    assert {f"{name}_moment1_0" for name in net.state_dict()} <= keys
    assert all(key.startswith(("0.weight", "0.bias", "1.weight", "1.bias")) for key in keys)


def test_optimizer_state_of_another_model_is_refused(tmp_path):
    net, optimizer = trained(steps=1)
    checkpoint.save_optimizer(tmp_path / "optimizer.pdopt", optimizer, net)
    other = model(bias=False)
    with pytest.raises(InputError, match=r"optimizer\.pdopt: it has state for .*1\.bias"):
        checkpoint.load_optimizer(
            tmp_path / "optimizer.pdopt", paddle.optimizer.AdamW(parameters=other.parameters()), other
        )


def draw() -> tuple:
    return random.random(), float(np.random.rand()), float(np.random.randn()), paddle.rand([3]).tolist()


def test_generators_continue_where_they_were(tmp_path):
    before = checkpoint.rng_state()
    try:
        np.random.randn()  # leaves a second number cached in the state
        write_paddle(tmp_path / "rng_state.pth", checkpoint.rng_state())
        expected = draw()
        assert draw() != expected
        checkpoint.set_rng_state(read_paddle(tmp_path / "rng_state.pth"))
        assert draw() == expected
    finally:
        checkpoint.set_rng_state(before)


def test_later_checkpoints_are_set_aside_under_a_new_number(tmp_path):
    (tmp_path / "overwritten-2").mkdir()
    make_checkpoints(tmp_path, 2, 4, 6)
    assert checkpoint.set_aside(tmp_path, after=2).endswith(f" were moved to {tmp_path / 'overwritten-3'}")
    aside = checkpoint.checkpoints(tmp_path / "overwritten-3")
    assert [path.name for path in aside] == ["checkpoint-4", "checkpoint-6"]
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2"]


def test_what_an_interrupted_save_left_is_removed(tmp_path):
    (kept,) = make_checkpoints(tmp_path, 2)
    partial = tmp_path / ".checkpoint-4.partial"
    partial.mkdir()
    (partial / checkpoint.MODEL).touch()
    checkpoint.remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def write_best(output_dir: Path, step: int) -> Path:
    folder = output_dir / checkpoint.BEST
    folder.mkdir(parents=True)
    (folder / checkpoint.EVALUATION).write_text(json.dumps({"step": step, "fid": 1.5}))
    return folder


def test_the_best_weights_of_a_later_step_are_set_aside_and_others_are_not(tmp_path):
    make_checkpoints(tmp_path, 2, 4)
    best = write_best(tmp_path, 2)
    assert checkpoint.set_aside(tmp_path, after=2).startswith("checkpoints of an earlier run were moved")
    assert [path.name for path in (tmp_path / "overwritten-1").iterdir()] == ["checkpoint-4"] and best.is_dir()
    note = checkpoint.set_aside(tmp_path, after=1)
    assert note.startswith("checkpoints and the best weights (best) of an earlier run were moved")
    assert {path.name for path in (tmp_path / "overwritten-2").iterdir()} == {"checkpoint-2", "best"}
    assert not best.exists()
    write_best(tmp_path, 5)
    assert checkpoint.set_aside(tmp_path, after=1).startswith("the best weights (best) of an earlier run were moved")


def test_the_best_weights_are_no_checkpoint(tmp_path):
    best = write_best(tmp_path, 6)
    (best / checkpoint.TRAINER_STATE).write_text("{}")
    checkpoint.remove_older(make_checkpoints(tmp_path, 2, 4)[-1], 1)
    assert best.is_dir() and checkpoint.newest_checkpoint(tmp_path).name == "checkpoint-4"


def test_what_is_known_of_the_best_weights(tmp_path):
    assert checkpoint.read_best(tmp_path) is None
    best = write_best(tmp_path, 6)
    assert checkpoint.read_best(tmp_path) == {"step": 6, "fid": 1.5}
    (best / checkpoint.EVALUATION).write_text('{"step": 6}')
    with pytest.raises(InputError, match=r"best/evaluation\.json does not say how good .*; move the folder away"):
        checkpoint.read_best(tmp_path)
