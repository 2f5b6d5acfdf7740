import json
from types import SimpleNamespace

import paddle
import pytest

from latent_diffusion.callbacks import ProfilingCallback
from latent_diffusion.meter import Meter
from latent_diffusion.profiling import StepProfiler, operator_table, trace_events


def node(kind, name, start, end, children=(), kernels=()):
    """An event as the profiler records it; times in milliseconds. Kernels are (start, end) on the device."""
    calls = []
    if kernels:
        devices = [SimpleNamespace(**event("Kernel", "gemm", *span), device_id=0, stream_id=7) for span in kernels]
        call = event("CudaRuntime", "cudaLaunchKernel", start, end)
        calls = [SimpleNamespace(**call, process_id=1, thread_id=2, device_node=devices)]
    own = event(kind, name, start, end)
    return SimpleNamespace(**own, process_id=1, thread_id=2, children_node=list(children), runtime_node=calls)


def event(kind, name, start, end):
    return {
        "type": SimpleNamespace(name=kind),
        "name": name,
        "start_ns": int(start * 1e6),
        "end_ns": int(end * 1e6),
    }


def root(*steps):
    return node("UserDefined", "root node", -5, 1e9, steps)


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()[3:]]


def test_operators_are_listed_by_their_own_time():
    inner = node("Operator", "matmul dygraph", 15, 45)
    other = node("OperatorInner", "add infer_meta", 51, 52)
    step = node(
        "ProfileStep",
        "ProfileStep#0",
        0,
        100,
        [
            node("Forward", "Linear", 0, 12, [node("Operator", "matmul dygraph", 0, 10)]),
            node("Operator", "Global_LinearGradNode", 10, 50, [node("OperatorInner", "Local", 11, 49, [inner])]),
            node("Operator", "add dygraph", 50, 55, [other]),
        ],
    )
    table = operator_table([root(step)])
    assert table.startswith("profiled steps: 1, together 100.0 ms, of which operators on the CPU take 55.0%\n")
    assert rows(table) == [
        ["matmul", "2", "40.00", "20.000", "40.0%"],
        ["LinearGradNode", "1", "10.00", "10.000", "10.0%"],
        ["add", "1", "5.00", "5.000", "5.0%"],
    ]


def test_operators_are_timed_on_the_device_where_there_is_one():
    launch = node("DygraphKernelLaunch", "matmul kernel launch", 1, 2, kernels=[(10, 40), (50, 60)])
    slow_to_launch = node("Operator", "add dygraph", 2, 9, kernels=[(60, 61)])
    step = node("ProfileStep", "s", 0, 100, [node("Operator", "matmul dygraph", 0, 2, [launch]), slow_to_launch])
    table = operator_table([root(step)])
    assert "operators on the device take 41.0%" in table
    assert [row[:3] for row in rows(table)] == [["matmul", "1", "40.00"], ["add", "1", "1.00"]]
    found = {(found["name"], found["pid"], found["tid"]): found for found in trace_events([root(step)])}
    assert ("cudaLaunchKernel", 1, 2) in found and found["gemm", 0, 7]["cat"] == "Kernel"


def test_a_trace_counts_microseconds_from_its_first_event():
    step = node("ProfileStep", "s", 3, 5, [node("Operator", "add dygraph", 4, 4.5)])
    first, second = trace_events([root(step)])
    assert first == {"name": "s", "cat": "ProfileStep", "ph": "X", "ts": 0.0, "dur": 2000.0, "pid": 1, "tid": 2}
    assert (second["ts"], second["dur"]) == (1000.0, 500.0)


@pytest.fixture
def train(tmp_path):
    """`train(first, last)`: profiles steps of a small layer; returns what is said, and the weights."""

    def run(first: int, last: int, profiles: bool = True):
        paddle.seed(0)
        layer, meter, said = paddle.nn.Linear(8, 8), Meter(1), []
        optimizer = paddle.optimizer.AdamW(0.1, parameters=layer.parameters())
        profiler = StepProfiler(tmp_path, first, last, meter, said.append) if profiles else None
        rated = []
        for step in range(first + 1, last + 1):
            loss = layer(paddle.randn([4, 8])).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
            meter.add({"loss": loss})
            if profiler:
                profiler.after_step(step)
            rated.append("steps_per_second" in meter.read())
        return SimpleNamespace(said=said, rated=rated, weights=layer.weight.numpy().tobytes())

    return run


@pytest.mark.parametrize(("first", "last", "steps"), [(0, 7, "3 to 5"), (10, 17, "13 to 15"), (0, 4, "3 to 4")])
def test_steps_after_the_first_ones_are_profiled(train, tmp_path, capfd, first, last, steps):
    done = train(first, last)
    count = int(steps[-1]) - int(steps.split()[0][-1]) + 1
    assert done.said == [
        f"wrote the profile of steps {steps} into {tmp_path}/profile: operators.txt, and trace.json for ui.perfetto.dev"
    ]
    assert done.rated == [True, True] + [False] * count + [True] * (last - first - 2 - count)
    folder = tmp_path / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["operators.txt", "trace.json"]
    table = (folder / "operators.txt").read_text()
    assert table.startswith(f"profiled steps: {count}, together ")
    calls = {row[0]: int(row[1]) for row in rows(table)}
    assert calls["matmul"] == calls["MatmulGradNode"] == count and calls["adamw_"] == 2 * count
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert sum(found["cat"] == "ProfileStep" for found in events) == count
    operators = [found for found in events if found["name"] == "matmul dygraph"]
    assert len(operators) == count and all(found["dur"] > 0 and found["ph"] == "X" for found in operators)
    assert capfd.readouterr() == ("", "")


def test_a_run_that_is_too_short_is_not_profiled(train, tmp_path):
    assert train(4, 6).said == ["note: --profile needs more than 2 steps; nothing is profiled"]
    assert train(6, 6).said == [] and not (tmp_path / "profile").exists()


def test_a_profiled_run_has_the_weights_of_another(train):
    assert train(0, 7).weights == train(0, 7, profiles=False).weights


def test_only_the_first_process_profiles(tmp_path):
    made = []
    for is_first in (True, False):
        callback = ProfilingCallback(Meter(1))
        state = SimpleNamespace(global_step=0, max_steps=9, is_world_process_zero=is_first)
        callback.on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), state, None)
        callback.on_step_end(None, state, None)
        made.append(callback.profiler is not None)
    assert made == [True, False]
