"""`--profile`: what the operators of a few training steps take, as a table and as a trace.

Paddle's own forms of both are not used: its summary goes to the terminal only, with columns for a GPU everywhere, and
its trace has the duration in every name, so that no viewer can add up the events of an operator.
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_file

if TYPE_CHECKING:  # flags are parsed before Paddle is imported
    from .meter import Meter

WARM_UP_STEPS, PROFILED_STEPS = 2, 3
FOLDER, TABLE, TRACE = "profile", "operators.txt", "trace.json"

HELP = (
    f"profile {PROFILED_STEPS} steps after {WARM_UP_STEPS} to warm up: {FOLDER}/{TABLE} is a table of operators, "
    f"{FOLDER}/{TRACE} opens in ui.perfetto.dev and chrome://tracing"
)


class StepProfiler:
    """Profiles steps near the beginning of a run, with what happens between them, such as waiting for data.

    The clock of the meter is paused meanwhile; losses and weights are the same as without.

    Args:
        folder: of the run; the files are written to `profile/` in it.
        first: the step that the run goes on from.
        last: the last step of the run; where it comes early, fewer steps are profiled.
        meter: what measures the rates of the run.
        say: prints a line.
    """

    def __init__(self, folder: Path, first: int, last: int, meter: "Meter", say: Callable[[str], None]):
        self.folder, self.meter, self.say = folder / FOLDER, meter, say
        begin = first + WARM_UP_STEPS + 1
        self.steps = range(begin, min(begin + PROFILED_STEPS - 1, last) + 1)
        if first < last < begin:
            say(f"note: --profile needs more than {WARM_UP_STEPS} steps; nothing is profiled")
        self._profiler = None
        self._pause = contextlib.ExitStack()

    def after_step(self, step: int) -> None:
        """To be called after every step, with its number.

        Raises:
            InputError: the files cannot be written.
        """
        if step + 1 in self.steps:
            self._begin_next()
        elif step in self.steps:
            self._finish()

    def _begin_next(self) -> None:
        if self._profiler:
            self._profiler.step()
            return
        from paddle.profiler import Profiler

        self._pause.enter_context(self.meter.paused())
        self._profiler = Profiler(on_trace_ready=lambda profiler: None)  # else it writes files of its own
        self._profiler.start()

    def _finish(self) -> None:
        import paddle

        with self._pause:
            if paddle.device.get_device().startswith("gpu"):
                paddle.device.synchronize()
            self._profiler.stop()
            roots = self._profiler.profiler_result.get_data().values()
            table, trace = operator_table(roots), json.dumps({"traceEvents": list(trace_events(roots))})
            write_file(self.folder / TABLE, lambda path: path.write_text(table))
            write_file(self.folder / TRACE, lambda path: path.write_text(trace))
        self._profiler = None
        steps = f"steps {self.steps[0]} to {self.steps[-1]}"
        self.say(f"wrote the profile of {steps} into {self.folder}: {TABLE}, and {TRACE} for ui.perfetto.dev")


@dataclass
class _Total:
    """Of one operator; nanoseconds without those of operators that it calls."""

    calls: int = 0
    host: int = 0
    device: int = 0


def operator_table(roots: Iterable[Any]) -> str:
    """The time of each operator over all steps, the longest first.

    Operators are timed on the device where there is one, else on the CPU, each without the operators that it calls. Of
    the backward pass they have the names of Paddle's gradient nodes, as MatmulGradNode.

    Args:
        roots: what the profiler recorded, a tree of host events a thread (`core.HostPythonNode`).
    """
    totals: Mapping[str, _Total] = defaultdict(_Total)
    steps = [_length(node) for root in roots for node in root.children_node if _kind(node) == "ProfileStep"]
    for root in roots:
        _add(root, None, totals)
    on_device = any(total.device for total in totals.values())
    times = {name: total.device if on_device else total.host for name, total in totals.items()}
    wall, everything = sum(steps), sum(times.values())
    lines = [
        f"profiled steps: {len(steps)}, together {wall / 1e6:.1f} ms, of which operators on the "
        f"{'device' if on_device else 'CPU'} take {everything / wall:.1%}",
        "",
        f"{'operator':40} {'calls':>7} {'total ms':>10} {'ms a call':>10} {'share':>7}",
    ]
    for name in sorted(times, key=times.get, reverse=True):
        calls, milliseconds = totals[name].calls, times[name] / 1e6
        lines.append(f"{name:40} {calls:7} {milliseconds:10.2f} {milliseconds / calls:10.3f} {times[name] / wall:7.1%}")
    return "\n".join(lines) + "\n"


def trace_events(roots: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The events of a trace, in Chrome's Trace Event Format: complete events, microseconds from the first one on.

    The format: "Trace Event Format", Google, 2016. Events of a device are in a process of its own, a thread a stream.

    Args:
        roots: as `operator_table` takes.
    """
    # A root is no event: it stands for a thread.
    nodes = [node for root in roots for child in root.children_node for node in _within(child)]
    origin = min(node.start_ns for node in nodes)
    for node in nodes:
        yield _event(node, origin, node.process_id, node.thread_id)
        for call in node.runtime_node:
            yield _event(call, origin, call.process_id, call.thread_id)
            for kernel in call.device_node:
                yield _event(kernel, origin, kernel.device_id, kernel.stream_id)


def _event(node: Any, origin: int, process: int, thread: int) -> dict[str, Any]:
    return {
        "name": node.name,
        "cat": _kind(node),
        "ph": "X",
        "ts": (node.start_ns - origin) / 1e3,
        "dur": _length(node) / 1e3,
        "pid": process,
        "tid": thread,
    }


def _add(node: Any, caller: _Total | None, totals: Mapping[str, _Total]) -> None:
    if _kind(node) == "Operator":
        own = totals[node.name.removesuffix(" dygraph").removeprefix("Global_")]
        own.calls += 1
        own.host += _length(node)
        if caller:
            caller.host -= _length(node)
        caller = own
    if caller:
        caller.device += sum(_length(kernel) for call in node.runtime_node for kernel in call.device_node)
    for child in node.children_node:
        _add(child, caller, totals)


def _within(node: Any) -> Iterator[Any]:
    yield node
    for child in node.children_node:
        yield from _within(child)


def _length(node: Any) -> int:
    return node.end_ns - node.start_ns


def _kind(node: Any) -> str:
    return node.type.name
