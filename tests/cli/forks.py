"""Runs scripts in forks of one process that has imported the stack, since imports take most of a tiny command's time.

The READMEs' commands, and those that train at length, run in processes of their own: see commands.py.
"""

from tests.faults.runs import Server

from . import commands
from .commands import Command, Result


def run(command: Command) -> Result:
    """As `commands.run`, in a fork where the command is a script to which no variable is given."""
    is_script = command.arguments[0].endswith(".py") and command.program == commands.Command.program
    return Server().run(command) if is_script and not command.variables else commands.run(command)


def run_all(some: dict[str, Command]) -> dict[str, Result]:
    """As `commands.run_all`."""
    return commands.run_all(some, run)
