"""The errors that are the user's to mend, and how a command reports them."""

import atexit
import contextlib
import errno
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

# Shared libraries that slim images lack, and the Debian/Ubuntu package of each.
SYSTEM_PACKAGES = {"libgomp.so.1": "libgomp1", "libGL.so.1": "libgl1", "libgthread-2.0.so.0": "libglib2.0-0"}

# What the system says of a disk or a mount that fails, and what to do then.
DISK_ADVICE = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there or raise the quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "make the file system writable or choose another folder",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the file system again",
    errno.ENOTCONN: "mount the file system again",
}

SECONDS_TO_SAY_THE_SAME = 1.0


class InputError(ValueError):
    """Bad input: the message is one sentence that names the file, flag or value and says what to do.

    Names of files may hold line breaks, or bytes that are no text: these are shown as escapes.
    """

    def __init__(self, message: object):
        super().__init__("".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(message)))


class NotFiniteError(InputError):
    """Samples that are not finite, which a network may draw early in training."""


@contextlib.contextmanager
def naming_missing_libraries() -> Iterator[None]:
    """Turns the import error of a missing shared library into an `InputError` that names its package."""
    try:
        yield
    except ImportError as error:
        for library, package in SYSTEM_PACKAGES.items():
            if library in str(error):
                raise InputError(
                    f"the system library {library} is missing; install the package that brings it "
                    f"(Debian, Ubuntu: apt-get install {package})"
                ) from error
        raise


@contextlib.contextmanager
def naming_file(path: Path | str) -> Iterator[None]:
    """Around what writes a file or folder: an `OSError` gets its name, which the system does not say of a write."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps an entry point so that an `InputError` ends it with one line on stderr and exit status 1.

    So does an `OSError` of a full or failing disk. Any other exception keeps its traceback: that is a bug. A process of
    a launched run ends with what Python has to do at its exit: see `_leave`.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            with naming_missing_libraries():
                main(*args, **kwargs)
            with naming_file("the standard output"):
                sys.stdout.flush()
        except InputError as error:
            _end(f"error: {error}", 1)
        except OSError as error:
            if error.errno not in DISK_ADVICE:
                raise
            _end(f"error: {_disk_sentence(error)}", 1)
        except KeyboardInterrupt:
            _end("interrupted", 130)
        if "PADDLE_TRAINER_ID" in os.environ:
            _leave()

    return run


def _disk_sentence(error: OSError) -> str:
    where = f" at {error.filename}" if error.filename else ""
    return (
        f"the system says {error.strerror!r}{where}; {DISK_ADVICE[error.errno]}, then run the same command again: "
        "files that are complete stay"
    )


def _end(line: str, status: int) -> NoReturn:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
        _tell_first_process(line)
    for stream in (sys.stdout, sys.stderr):
        _drop_unwritten(stream)
    sys.exit(status)


def _tell_first_process(line: str) -> None:
    """Puts what ends another process into the log of a machine's first one, which alone Paddle's launcher shows.

    The first process would only say that a connection is lost. Where it ends for the same reason, it says so itself.
    """
    log = Path(f"/proc/self/fd/{sys.stderr.fileno()}").resolve()
    if not re.fullmatch(r"workerlog\.[1-9]\d*", log.name):
        return
    time.sleep(SECONDS_TO_SAY_THE_SAME)  # it notices nothing until this process has ended
    first = log.with_name("workerlog.0")
    if line not in first.read_text(errors="replace"):
        with first.open("a") as file:
            file.write(f"{line} (in the process of {log.name})\n")


def _drop_unwritten(stream: TextIO) -> None:
    """Lets go of what cannot be written: Python would try again at its end and exit with a status of its own."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _leave() -> NoReturn:
    """Ends a process whose work is done without the destructors of the frameworks.

    Under the launcher they abort it now and then, about once in a hundred runs on a busy machine, while connections of
    the other processes close; the launcher would then report a failure of a run that is complete.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
