"""The one kind of error that is the user's to mend, and how a command reports it."""

import atexit
import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn

# Shared libraries that slim images lack, and the Debian/Ubuntu package of each.
SYSTEM_PACKAGES = {"libgomp.so.1": "libgomp1", "libGL.so.1": "libgl1", "libgthread-2.0.so.0": "libglib2.0-0"}


class InputError(ValueError):
    """Bad input: the message is one sentence that names the file, flag or value and says what to do."""


class NotFiniteError(InputError):
    """Samples that are not finite, which a network may draw early in training."""


@contextlib.contextmanager
def naming_missing_libraries():
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


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps an entry point so that an `InputError` ends it with one line on stderr and exit status 1.

    Any other exception keeps its traceback: that is a bug. A process of a launched run ends with what Python has to do
    at its exit: see `_leave`.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            with naming_missing_libraries():
                main(*args, **kwargs)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            sys.exit(130)
        if "PADDLE_TRAINER_ID" in os.environ:
            _leave()

    return run


def _leave() -> NoReturn:
    """Ends a process whose work is done without the destructors of the frameworks.

    Under the launcher they abort it now and then, about once in a hundred runs on a busy machine, while connections of
    the other processes close; the launcher would then report a failure of a run that is complete.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
