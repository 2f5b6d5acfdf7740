from pathlib import Path

from . import soak


def test_a_short_soak_grows_nothing_and_draws_its_course(tmp_path: Path):
    figures = soak.run(tmp_path, 0.05)
    assert figures["steps"] == 1000 and figures["saves"] == 10
    assert (tmp_path / "soak.png").stat().st_size > 10_000
