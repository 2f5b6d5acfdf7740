import json
import random
from pathlib import Path

import numpy as np
import paddle
import pytest

from latent_diffusion import checkpoint
from latent_diffusion.errors import InputError
from latent_diffusion.weights import read_paddle, write_paddle


def make_checkpoints(output_dir: Path, *steps: int) -> list[Path]:
    folders = [output_dir / f"checkpoint-{step}" for step in steps]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / checkpoint.TRAINER_STATE).write_text("{}")
    return folders


def test_checkpoints_are_ordered_by_step(tmp_path):
    ninety, hundred, five = make_checkpoints(tmp_path, 90, 100, 5)
    assert checkpoint.checkpoints(tmp_path) == [five, ninety, hundred]
    assert checkpoint.newest_checkpoint(tmp_path) == hundred


def test_what_is_no_complete_checkpoint_is_ignored(tmp_path):
    (complete,) = make_checkpoints(tmp_path, 10)
    for name in (".checkpoint-20.partial", "checkpoint-30-old", "checkpoint-x", "runs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / checkpoint.TRAINER_STATE).write_text("{}")
    (tmp_path / "checkpoint-40").mkdir()
    (tmp_path / "checkpoint-50").write_text("a file")
    assert checkpoint.checkpoints(tmp_path) == [complete]


def test_a_folder_without_checkpoints_has_no_newest(tmp_path):
    assert checkpoint.newest_checkpoint(tmp_path) is None
    assert checkpoint.newest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (2, [2, 3]), (5, [1, 2, 3]), (0, [1, 2, 3]), (None, [1, 2, 3])])
def test_the_oldest_are_removed(tmp_path, keep, left):
    make_checkpoints(tmp_path, 1, 2, 3)
    checkpoint.remove_oldest(tmp_path, keep)
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
    with pytest.raises(InputError, match=r"optimizer\.pdopt has state for .*1\.bias"):
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
    make_checkpoints(tmp_path, 2, 4)
    checkpoint.remove_oldest(tmp_path, 1)
    assert best.is_dir() and checkpoint.newest_checkpoint(tmp_path).name == "checkpoint-4"


def test_what_is_known_of_the_best_weights(tmp_path):
    assert checkpoint.read_best(tmp_path) is None
    best = write_best(tmp_path, 6)
    assert checkpoint.read_best(tmp_path) == {"step": 6, "fid": 1.5}
    (best / checkpoint.EVALUATION).write_text('{"step": 6}')
    with pytest.raises(InputError, match=r"best/evaluation\.json does not say how good .*; move the folder away"):
        checkpoint.read_best(tmp_path)
