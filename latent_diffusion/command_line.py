"""Command lines: flags in either spelling, defaults from a YAML file, and errors of one line."""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .errors import InputError
from .reading import read_bytes

# More steps than any run can do, and few enough to be counted in samples.
MOST_STEPS = 10**12

# Of one process: more samples at a time than any memory holds, and more processes that read them than any machine has
# cores. Beyond them the system ends a run without a word.
MOST_SAMPLES, MOST_WORKERS = 2**16, 1024

# Bytes of a file of flags; parsing takes hundreds of times as much.
_MAX_YAML = 1 << 16

# From these on, integers fit into no counter and numbers into no float32.
_TOO_LARGE = {int: 2**63, float: 2.0**128}


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser for this suite's commands.

    - A bad command line is an `InputError` in place of usage text and exit status 2.
    - Empty values, and numbers that are not finite or huge, are refused.
    - `--image-size` and `--image_size` are the same flag, and flags are not abbreviated.
    - With `add_config()`, a YAML file gives values of flags, and the command line overrides them.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the flags")

    def add_config(self) -> None:
        """Adds `-c/--config`, a YAML file of flags without their dashes."""
        self.add_argument(
            "-c", "--config", type=Path, metavar="YAML", help="file of flags; those on the command line override it"
        )

    def add_switch(self, *names: str, default: bool = False, **kwargs) -> None:
        """Adds a flag that is on when given alone and also takes true or false, as `--switch False`."""
        self.add_argument(*names, type=boolean, nargs="?", const=True, default=default, **kwargs)

    def add_aliases(self, aliases: Mapping[str, Sequence[str]]) -> None:
        """Gives flags further names, by the name of the attribute that they set."""
        by_attribute = {action.dest: action for action in reversed(self._actions)}
        for attribute, names in aliases.items():
            action = by_attribute[attribute]
            action.option_strings += [f"--{name}" for name in names]
            self._option_string_actions |= {f"--{name}": action for name in names}

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        args = [self._known_spelling(arg) for arg in (sys.argv[1:] if args is None else args)]
        if "--config" in self._option_string_actions:
            finder = ArgumentParser(add_help=False)
            finder.add_config()
            path = argparse.ArgumentParser.parse_known_args(finder, args)[0].config
            args = (self._flags_in(path) if path else []) + args
        return super().parse_known_args(args, namespace)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # A variable of the shell that is not set; taken as a path it would be the current folder.
        if arg_string == "" != action.default:
            raise argparse.ArgumentError(action, "must not be empty; leave the flag out")
        value = super()._get_value(action, arg_string)
        if type(value) in _TOO_LARGE and not abs(value) < (limit := _TOO_LARGE[type(value)]):
            raise argparse.ArgumentError(action, f"must be finite and below {limit:.0e}, not {arg_string}")
        return value

    def _known_spelling(self, arg: str) -> str:
        name, equals, value = arg.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return arg
        for spelling in (name[2:].replace("_", "-"), name[2:].replace("-", "_")):
            if f"--{spelling}" in self._option_string_actions:
                return f"--{spelling}{equals}{value}"
        return arg

    def _flags_in(self, path: Path) -> list[str]:
        """The command line that a YAML file stands for."""
        flags = []
        for key, value in _read_yaml(path).items():
            flag = self._known_spelling(f"--{key}")
            if flag not in self._option_string_actions or flag == "--config":
                raise InputError(f"{path} has the unknown key {key!r}; keys are the flags that --help lists")
            if isinstance(value, dict) or isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
                raise InputError(f"the key {key!r} in {path} must hold one value or a list of values")
            if isinstance(value, list):
                flags += [flag, *map(str, value)]
            elif value not in (None, ""):
                flags.append(f"{flag}={value}")
        return flags


def boolean(text: str) -> bool:
    """The value of a flag that takes true or false."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")


def at_least(least: float, number: type[int] | type[float] = int, at_most: float = math.inf) -> Callable[[str], float]:
    """For argparse's `type`: takes finite numbers from `least` to `at_most`."""

    def parse(text: str):
        value = number(text)
        if value == math.inf:
            raise argparse.ArgumentTypeError(f"must be finite, not {text}")
        if not value >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        if value > at_most:
            raise argparse.ArgumentTypeError(f"must be at most {at_most}, not {text}")
        return value

    parse.__name__ = number.__name__  # argparse names it where the text is no number
    return parse


def check_number(flag: str, value: float, least: float, too_large: float = math.inf) -> None:
    """Raises `InputError` unless `least <= value < too_large`."""
    if not least <= value < too_large:
        limit = "" if too_large == math.inf else f" and less than {too_large}"
        raise InputError(f"{flag} must be at least {least}{limit}, not {value}")


def check_hours(hours: float | None) -> None:
    """Raises `InputError` for a `--max_run_hours` that cannot be."""
    if hours is not None and not hours > 0:
        raise InputError(f"--max_run_hours must be positive, not {hours}")


class _Loader(yaml.SafeLoader):
    """Makes plain values only, and refuses aliases: a few lines of them stand for more than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it has the alias *{self.peek_event().anchor}; write out what it stands for")
        return super().compose_node(parent, index)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(read_bytes(path, _MAX_YAML), _Loader)
    except OSError as error:
        raise InputError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"the configuration file {path} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # numbers and dates that cannot be are a ValueError
        raise InputError(f"the configuration file {path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"the configuration file {path} must hold keys and values")
    return values
