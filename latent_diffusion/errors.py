"""The one kind of error that is the user's to mend, and how a command reports it."""

import functools
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input: the message is one sentence that names the file, flag or value and says what to do."""


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps an entry point so that an `InputError` ends it with one line on stderr and exit status 1.

    Any other exception keeps its traceback: that is a bug.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)

    return run
