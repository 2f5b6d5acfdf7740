import os
import tempfile

import numpy as np
import paddle
import pytest
from paddle import nn

from latent_diffusion.evaluation.compiled import compiled


class Network(nn.Layer):
    """Has what is another in training: batch normalization and dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2D(3, 8, 3)
        self.norm = nn.BatchNorm2D(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.drop(self.norm(self.conv(x)))
        return [nn.functional.relu(x), nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)]


@pytest.fixture(scope="module")
def network():
    paddle.seed(0)
    return Network().eval()


@pytest.fixture(scope="module")
def function(network):
    return compiled(network, [None, 3, 9, 9])


def images(count):
    return paddle.to_tensor(np.random.default_rng(count).standard_normal([count, 3, 9, 9], np.float32))


@pytest.mark.parametrize("count", [1, 5])
def test_it_computes_what_the_layer_does_in_eval_mode(network, function, count):
    x = images(count)
    network.train()
    found = function(x)
    network.eval()
    for array, expected in zip(found, network(x), strict=True):
        assert isinstance(array, np.ndarray) and array.dtype == np.float32
        assert np.abs(array - expected.numpy()).max() < 1e-5


def test_results_stay_as_they_are_when_it_is_called_again(function):
    first = function(images(2))
    copies = [array.copy() for array in first]
    function(images(3))
    for array, copy in zip(first, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_the_layer_stays_as_it_was_and_may_change():
    network = Network()
    function = compiled(network, [None, 3, 9, 9])
    before = function(images(2))
    assert network.training
    network.eval()
    assert np.abs(before[0] - network(images(2))[0].numpy()).max() < 1e-5
    network.norm.weight.set_value(paddle.zeros([8]))
    np.testing.assert_array_equal(function(images(2))[0], before[0])
    network(images(2))[1].sum().backward()
    assert network.norm.bias.grad is not None


@pytest.mark.filterwarnings("error")
def test_it_says_nothing_and_leaves_no_file(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    compiled(Network(), [None, 3, 9, 9])(images(1))
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("told", "expected"), [("1", 1), ("3", 3), (None, len(os.sched_getaffinity(0)))])
def test_it_takes_as_many_threads_as_openmp_is_told(network, monkeypatch, told, expected):
    taken = []
    monkeypatch.setattr(
        paddle.inference, "create_predictor", lambda config: taken.append(config.cpu_math_library_num_threads())
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    compiled(network, [None, 3, 9, 9])
    assert taken == [expected]


def test_on_a_gpu_it_is_the_layer_in_eval_mode(network, monkeypatch):
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.inference, "create_predictor", lambda config: pytest.fail("a program for the CPU"))
    network.train()
    found = compiled(network, [None, 3, 9, 9])(images(2))
    assert network.training
    for array, expected in zip(found, network.eval()(images(2)), strict=True):
        np.testing.assert_array_equal(array, expected.numpy())
