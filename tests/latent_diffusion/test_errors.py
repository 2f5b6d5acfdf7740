import pytest

from latent_diffusion.errors import InputError, command


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
