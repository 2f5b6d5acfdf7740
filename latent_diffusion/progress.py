"""Progress of long work: a bar on a terminal, plain lines elsewhere, both with rate and remaining time."""

import sys

from tqdm import tqdm

# Seconds between the lines of a log file.
LINE_INTERVAL = 10.0


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
