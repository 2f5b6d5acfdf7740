import re

from latent_diffusion import progress as progress_module
from latent_diffusion.progress import progress, training_line


def test_a_line_of_training_has_the_remaining_time_where_there_is_a_rate():
    assert training_line(4, 10, {"loss": 0.5, "steps_per_second": 0.1}).endswith(
        "steps_per_second 0.1, remaining 01:00"
    )
    assert training_line(4, 10, {"loss": 0.5}) == "step 4/10: loss 0.5"


def test_a_log_file_gets_plain_lines_with_rate_and_remaining_time(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "LINE_INTERVAL", 0.0)
    with progress(total=3, desc="extract", unit="image") as bar:
        for _ in range(3):
            bar.set_postfix_str("loss 0.5", refresh=False)
            bar.update()
    output = capsys.readouterr().err
    assert "\r" not in output
    lines = output.splitlines()
    assert lines[0].startswith("extract: 0/3, ") and lines[-1].startswith("extract: 3/3, ")
    assert all(re.fullmatch(r"extract: \d/3, .*image.*, (\d\d:\d\d|\?) left(, loss 0\.5)?", line) for line in lines)


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress_module.sys.stderr, "isatty", lambda: True)
    with progress(total=3, desc="extract", unit="image") as bar:
        bar.update(3)
    assert "\r" in capsys.readouterr().err
