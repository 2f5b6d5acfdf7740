import json
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest

from benchmarks import loading
from benchmarks.contest import PEERS, Result
from benchmarks.measure import feature_contents, write_random
from benchmarks.peak import Peak
from dit.configuration import DiTConfig
from dit.feature_files import FeatureFilesWriter
from dit.features import open_features
from latent_diffusion.packed import PackedWriter

RIVAL = "fast-DiT's way, 0 workers"


def figures(*command: object) -> dict:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_fast_dit_reads_pairs_without_pytorch(tmp_path):
    write_random(FeatureFilesWriter(tmp_path, feature_contents(64, 48)["files"]))
    found = figures(PEERS / "fast_dit_loading.py", "numpy", tmp_path, 64)
    assert found["cold"] > 0 and len(found["seconds"]) == 1
    (tmp_path / "imagenet64_labels/7.npy").unlink()
    assert figures(PEERS / "fast_dit_loading.py", "open", tmp_path, 64)["again"] > 0


@pytest.mark.parametrize("what", ["reading", "training"])
def test_packed_features_are_read(tmp_path, what):
    contents = feature_contents(64, 48)["packed"]
    write_random(PackedWriter(tmp_path, contents))
    found = figures(PEERS / "ours_loading.py", what, tmp_path, 64)
    assert found["cold"] > 0 and found["seconds"][0] > 0


def test_few_files_stand_for_many_images(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "LINKS_PER_FILE", 10)
    loading.write_linked(tmp_path, 35)
    assert len(open_features(tmp_path, DiTConfig.from_name("DiT-S/2", loading.SMALL))) == 35
    inodes = {path.stat().st_ino for path in (tmp_path / "imagenet64_features").iterdir()}
    assert len(inodes) == 4


def result(name: str, cold: float, warm: float) -> Result:
    return Result(name, [{"seconds": [1 / warm], "cold": 1 / cold}])


@pytest.mark.parametrize(("warm", "outcome"), [(400, "20.0, at least 20: met"), (380, "19.0, at least 20: missed")])
def test_rates_are_compared_with_fast_dit(capsys, warm, outcome):
    results = [result(loading.READING, 60, warm), result(RIVAL, 10, 20), Result("other", failure="no memory")]
    arguments = Namespace(image_size=256, features=64)
    peak = Peak("cpu", {"Paddle": 1e12})
    table = loading.tabulate_reading({one.name: one for one in results}, arguments, peak)
    assert table.columns[3:] == [f"cold, over {RIVAL}", f"warm, over {RIVAL}"]
    np.testing.assert_allclose(np.array(table.rows[0][1:], float), [60, warm, 6, warm / 20])
    assert table.rows[2][1] == "failed: no memory"
    assert outcome in capsys.readouterr().out
