"""Progress of long work: a bar on a terminal, plain lines elsewhere, both with rate and remaining time."""

import sys

from tqdm import tqdm

# Seconds between the lines of a log file.
LINE_INTERVAL = 10.0


# What a line of training shows of the logged values, in this order.
_SHOWN = ("loss", "mse", "vb", "grad_norm", "learning_rate")
_SHOWN += ("samples_per_second", "steps_per_second", "peak_memory_gib")


def training_line(step: int, steps: int, logs: dict[str, float]) -> str:
    """One line of the log of training: the step, what was logged and, where a rate was, the remaining time."""
    values = ", ".join(f"{name} {logs[name]:.4g}" for name in _SHOWN if name in logs)
    line = f"step {step}/{steps}: {values}"
    if rate := logs.get("steps_per_second"):
        line += f", remaining {tqdm.format_interval((steps - step) / rate)}"
    return line


def write_line(text: str) -> None:
    """Prints a line, above the bar where there is one."""
    tqdm.write(text)
    sys.stdout.flush()


def progress(total: int, desc: str, unit: str) -> tqdm:
    """A tqdm bar on stderr; where stderr is no terminal it writes lines, at most one every `LINE_INTERVAL` seconds."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit)
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        file=_Lines(),
        mininterval=LINE_INTERVAL,
        bar_format="{desc}: {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}",
    )


class _Lines:
    """Takes what tqdm draws over itself and writes it line by line."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()
