import pytest

from benchmarks import checkpoints
from benchmarks.checkpoints import OURS, PYTORCH
from benchmarks.contest import Result


def result(name: str, **more: object) -> Result:
    return Result(
        name, [{"parameters": 50_000_000, "bytes": 2e8, "seconds": [0.5], "load": [0.25], "ema": [0.1], **more}]
    )


def test_rates_are_of_the_file_and_the_ema_of_100_million():
    results = {name: result(name, **more) for name, more in ((OURS, {}), (PYTORCH, {"ema_loop": [0.2]}))}
    files, ema = checkpoints.tabulate_files(results, "DiT-B/4"), checkpoints.tabulate_ema(results)
    assert files.rows[0] == [OURS, 200, 0.5, 400, 0.25, 800]
    assert [row[1] for row in ema.rows] == pytest.approx([0.2, 0.2, 0.4])
    assert ema.rows[0][2] == pytest.approx(6)


def test_without_pytorch_its_rows_are_left_out():
    results = {OURS: result(OURS)}
    assert [row[0] for row in checkpoints.tabulate_ema(results).rows] == [OURS]
