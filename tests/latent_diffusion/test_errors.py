import errno
import os
import subprocess
import sys

import pytest

from latent_diffusion.errors import DISK_ADVICE, InputError, command, naming_file
from tests.cli.commands import REPOSITORY


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [(InputError("no such flag"), "error: no such flag\n", 1), (KeyboardInterrupt(), "interrupted\n", 130)],
)
def test_a_command_ends_with_one_line(error, line, status, capsys):
    @command
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == status and capsys.readouterr().err == line


def test_other_errors_keep_their_traceback():
    @command
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main()


@pytest.mark.parametrize("number", DISK_ADVICE)
def test_a_failing_disk_ends_a_command_with_one_line_that_names_the_file(number, capsys):
    @command
    def main():
        with naming_file("folder/file"):
            raise OSError(number, os.strerror(number))

    with pytest.raises(SystemExit) as end:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and line.startswith("error: ")
    assert os.strerror(number) in line and "folder/file" in line and DISK_ADVICE[number] in line


def test_other_errors_of_the_system_keep_their_traceback():
    @command
    def main():
        raise OSError(errno.EBADF, "a bug")

    with pytest.raises(OSError, match="a bug"):
        main()


FULL_OUTPUT = """
import sys
from latent_diffusion.errors import command
from latent_diffusion.progress import outlive_lost_lines
@command
def main():
    if sys.argv[1] == "training":
        outlive_lost_lines()
    for number in range(int(sys.argv[2])):
        print("line", number)
    print("at the end", file=sys.stderr)
main()
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")  # noqa: PTH110
@pytest.mark.parametrize("lines", [1, 10_000])
@pytest.mark.parametrize("kind", ["training", "other"])
def test_an_output_that_cannot_be_written_ends_other_commands_but_no_training(kind, lines):
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:  # noqa: PTH123
        words = [sys.executable, "-c", FULL_OUTPUT, kind, str(lines)]
        done = subprocess.run(
            words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=variables, timeout=60
        )
    if kind == "training":
        lost = "warning: lines of the standard output are being lost: No space left on device\n"
        assert done.returncode == 0 and done.stderr.count(lost) == 1 and "at the end" in done.stderr
    else:
        assert done.returncode == 1 and done.stderr.count("No space left on device") == 1
        assert done.stderr.splitlines()[-1].startswith("error: ")


FAIL = """
import sys
from latent_diffusion.errors import InputError, command

@command
def main():
    raise InputError("the image 7.png is cut off")

main()
"""


@pytest.mark.parametrize("said", ["", "error: the image 7.png is cut off\n"])
def test_the_first_process_of_a_machine_says_what_ends_another(tmp_path, said):
    """As under Paddle's launcher, which shows the log of the first one."""
    (tmp_path / "workerlog.0").write_text(f"step 1\n{said}")
    for rank in (1, 0):
        with (tmp_path / f"workerlog.{rank}").open("a") as log:
            done = subprocess.run([sys.executable, "-c", FAIL], cwd=REPOSITORY, stderr=log, check=False)
        assert done.returncode == 1
    own = "error: the image 7.png is cut off\n"
    told = "" if said else f"{own[:-1]} (in the process of workerlog.1)\n"
    assert (tmp_path / "workerlog.0").read_text() == f"step 1\n{said}{told}{own}"
    assert (tmp_path / "workerlog.1").read_text() == own
