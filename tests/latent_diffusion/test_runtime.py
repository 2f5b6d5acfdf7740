import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latent_diffusion import runtime
from latent_diffusion.errors import InputError, naming_missing_libraries

REPOSITORY = Path(__file__).parents[2]
REPORT = """
import json, os, sys
from latent_diffusion import runtime
line = runtime.start()
import paddle
print(json.dumps({
    "line": line,
    "threads": os.environ.get("OMP_NUM_THREADS"),
    "stride": paddle.get_flags("FLAGS_use_stride_kernel")["FLAGS_use_stride_kernel"],
    "paddlenlp": "paddlenlp" in sys.modules,
}))
"""
SETTINGS = ("OMP_NUM_THREADS", "FLAGS_use_stride_kernel", "MKL_DEBUG_CPU_TYPE", "LATENT_DIFFUSION_TUNING")


def start(code: str = REPORT, **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` in a fresh process with none of the settings but the given ones."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS and "PADDLE" not in name}
    kept = {name: value for name, value in kept.items() if not name.startswith("MALLOC_")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=kept | environment, capture_output=True, text=True, timeout=60
    )


def report(**environment: str) -> dict:
    done = start(**environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout.splitlines()[-1])


def test_the_settings_are_applied_and_named():
    found = report()
    threads = len(os.sched_getaffinity(0))
    assert found["threads"] == str(threads) and found["stride"] is False and not found["paddlenlp"]
    assert found["line"].startswith("runtime: FLAGS_use_stride_kernel=0")
    assert f"OMP_NUM_THREADS={threads}" in found["line"]


def test_the_users_environment_wins():
    found = report(OMP_NUM_THREADS="1", FLAGS_use_stride_kernel="1", MALLOC_ARENA_MAX="2", MKL_DEBUG_CPU_TYPE="3")
    assert found["threads"] == "1" and found["stride"] is True
    assert "OMP_NUM_THREADS=1" in found["line"] and "FLAGS_use_stride_kernel=1" in found["line"]
    assert "memory" not in found["line"]


def test_all_of_it_can_be_turned_off():
    found = report(LATENT_DIFFUSION_TUNING="off")
    assert found["line"] == "runtime: nothing tuned" and found["stride"] is True


def test_a_process_of_the_launcher_takes_one_thread(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ID", "0")
    assert runtime._environment()["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("AuthenticAMD fpu avx2 avx512f", "7"),
        ("AuthenticAMD fpu avx2", "5"),
        ("GenuineIntel avx512f", None),
        ("", None),
    ],
)
def test_the_math_library_is_told_of_an_amd_processor(monkeypatch, cpu, expected):
    monkeypatch.setattr(runtime, "_cpu_info", lambda: cpu)
    assert runtime._environment().get("MKL_DEBUG_CPU_TYPE") == expected


@pytest.mark.parametrize(("library", "package"), [("libgomp.so.1", "libgomp1"), ("libGL.so.1", "libgl1")])
def test_a_missing_library_is_named_with_its_package(library, package):
    message = f"{library} is missing.*apt-get install {package}"
    with pytest.raises(InputError, match=message), naming_missing_libraries():
        raise ImportError(f"{library}: cannot open shared object file: No such file or directory")


def test_another_import_error_stays_what_it_is():
    with pytest.raises(ImportError, match="no module"), naming_missing_libraries():
        raise ImportError("no module named so")


def test_a_command_without_libgomp_says_which_package_to_install(tmp_path):
    """Paddle's import fails as it does in a slim image; the command ends with one line."""
    (tmp_path / "paddle.py").write_text(
        "raise ImportError('libgomp.so.1: cannot open shared object file: No such file or directory')"
    )
    code = "from latent_diffusion import errors, runtime\nerrors.command(runtime.start)()"
    done = start(code, PYTHONPATH=str(tmp_path) + os.pathsep + str(REPOSITORY))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the system library libgomp.so.1 is missing") and "libgomp1" in done.stderr
