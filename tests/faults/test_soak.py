from . import soak

# Four times as often, in a run that is shorter still.
OFTEN = {"--logging_steps": 20, "--save_steps": 25, "--image_logging_steps": 60, "--eval_steps": 120}


def test_a_short_soak_grows_nothing_and_draws_its_course(tmp_path, monkeypatch):
    for flag, steps in OFTEN.items():
        monkeypatch.setitem(soak.EVERY, flag, steps)
    figures = soak.run(tmp_path, 0.02)
    assert figures["steps"] == 400 and figures["saves"] == 16
    assert (tmp_path / "soak.png").stat().st_size > 10_000
