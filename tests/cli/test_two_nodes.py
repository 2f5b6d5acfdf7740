"""Training on two machines, which are network namespaces here: the same weights as on one, and a node that dies."""

import numpy as np
import pytest

from .two_nodes import KINDS, Host, NoNamespacesError, last_checkpoint, on_one_node, on_two_nodes, survivor, training
from .two_nodes import two_hosts as make_two_hosts


@pytest.fixture(scope="module")
def two_hosts():
    try:
        with make_two_hosts() as hosts:
            yield hosts
    except NoNamespacesError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def one_node(two_hosts, tmp_path_factory):
    """Runs of two processes on one node, by kind. They ask for the hosts so as not to run where those cannot be."""
    commands = {kind: training(tmp_path_factory.mktemp("one"), *flags) for kind, flags in KINDS.items()}
    for command in commands.values():
        on_one_node(command).ok()
    return commands


@pytest.mark.parametrize("kind", KINDS)
def test_two_nodes_give_the_weights_of_one(two_hosts, one_node, tmp_path, kind):
    command = training(tmp_path, *KINDS[kind])
    first, second = (result.ok() for result in on_two_nodes(two_hosts, command))
    assert first.logged("loss") and not second.logged("loss")
    np.testing.assert_equal(last_checkpoint(command), last_checkpoint(one_node[kind]))


def test_when_the_master_dies_the_other_node_ends_and_a_restart_goes_on(two_hosts, one_node, tmp_path):
    kind = "sharding stage1"
    command = training(tmp_path, *KINDS[kind])
    other, _ = survivor(two_hosts, command, Host.kill)
    assert other.code != 0
    first, _ = (result.ok() for result in on_two_nodes(two_hosts, command))
    assert "resuming from out/checkpoint-" in first.out
    np.testing.assert_equal(last_checkpoint(command), last_checkpoint(one_node[kind]))
