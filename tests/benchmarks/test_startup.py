import re
import time

import pytest

from benchmarks import startup
from latent_diffusion.errors import InputError


def test_the_clock_stops_at_the_line_and_the_command_is_ended(tmp_path):
    code = "import time; print('runtime: x'); print('3 M parameters'); time.sleep(60)"
    begin = time.monotonic()
    assert 0 < startup.seconds_until(startup.WORK, ["-c", code], tmp_path) < 30
    assert time.monotonic() - begin < 30


def test_a_command_that_fails_is_named_with_its_reason(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("print('starting'); raise SystemExit('error: no features')")
    with pytest.raises(InputError, match=r"^broken\.py ended without .*: error: no features$"):
        startup.seconds_until(re.compile("M parameters"), [script], tmp_path)
