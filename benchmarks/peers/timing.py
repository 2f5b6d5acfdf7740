"""What all contestants share: time and memory, and the line they print. Standard library only.

Where the work is done on a GPU `cuda` is `torch.cuda` or `paddle.device.cuda`, which name alike what is used here; that
path has not been run.
"""

import ctypes
import json
import time


def seconds(work, cuda=None):
    """Seconds that `work()` takes."""
    if cuda is None:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    first, last = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    first.record()
    work()
    last.record()
    cuda.synchronize()
    return first.elapsed_time(last) / 1000


def peak_memory(cuda=None):
    """The most memory this process has used, in bytes. `ru_maxrss` would be a parent's where that is larger."""
    return cuda.max_memory_allocated() if cuda else _status("VmHWM")


def reset_peak_memory(cuda=None):
    """Lets `peak_memory` forget what was before."""
    if cuda:
        cuda.reset_max_memory_allocated()
        return
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123
        file.write("5")  # proc(5)


def memory_in_use(cuda=None):
    """The memory of this process in bytes, after the C library has given back what it kept for later."""
    if cuda:
        return cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(name):
    with open("/proc/self/status") as file:  # noqa: PTH123
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def print_figures(**figures):
    """The contestant's last line."""
    print(json.dumps(figures), flush=True)
