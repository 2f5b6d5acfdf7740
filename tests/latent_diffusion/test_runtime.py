import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
SETTINGS += ("GLIBC_TUNABLES",)
AMD = "AuthenticAMD fpu avx2 avx512f"


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


def test_the_users_environment_wins_when_paddle_is_imported():
    found = report(OMP_NUM_THREADS="1", FLAGS_use_stride_kernel="1", MALLOC_ARENA_MAX="2", MKL_DEBUG_CPU_TYPE="3")
    assert found["threads"] == "1" and found["stride"] is True
    assert "OMP_NUM_THREADS=1" in found["line"] and "FLAGS_use_stride_kernel=1" in found["line"]
    assert "memory" not in found["line"]


def test_all_of_it_can_be_turned_off():
    found = report(LATENT_DIFFUSION_TUNING="off")
    assert (
        found["line"].startswith("runtime: nothing tuned, LATENT_DIFFUSION_TUNING is off, ") and found["stride"] is True
    )


@pytest.fixture
def untuned(monkeypatch):
    """As before the import of Paddle, on an AMD processor with eight cores; `mallopt` is not called."""
    for name in list(os.environ):
        if name in SETTINGS or "PADDLE" in name or name.startswith("MALLOC_"):
            monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "paddle")
    monkeypatch.setattr(runtime.library, "cpu_info", lambda: AMD)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda parameter, value: 1))
    monkeypatch.setattr(runtime, "CPU_QUOTA", Path("/nowhere"))
    return monkeypatch


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "FLAGS_use_stride_kernel", "MKL_DEBUG_CPU_TYPE"])
def test_a_variable_that_the_user_has_set_stays(untuned, name):
    untuned.setenv(name, "6")
    line = runtime._tune()
    assert os.environ[name] == "6" and f"{name}=6" in line
    assert all(setting in line for setting in ("OMP_NUM_", "FLAGS_use_stride", "MKL_DEBUG", "freed memory"))


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")]
)
def test_an_allocator_that_the_user_has_set_up_stays(untuned, name, value):
    untuned.setenv(name, value)
    assert "memory" not in runtime._tune()


def test_a_gpu_build_is_left_as_it_is(untuned):
    untuned.setattr(runtime.importlib.metadata, "distribution", lambda name: None)
    before = dict(os.environ)
    assert runtime._tune() == "runtime: nothing tuned, Paddle is a GPU build"
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 8),
        ({"PADDLE_TRAINER_ID": "1", "PADDLE_LOCAL_SIZE": "2"}, 4),
        ({"PADDLE_TRAINER_ID": "0", "PADDLE_LOCAL_SIZE": "16"}, 1),
        ({"PADDLE_TRAINER_ID": "0"}, 1),
    ],
)
def test_the_processes_of_a_launched_run_share_the_cores(untuned, variables, threads):
    for name, value in variables.items():
        untuned.setenv(name, value)
    runtime._tune()
    assert os.environ["OMP_NUM_THREADS"] == str(threads)


@pytest.mark.parametrize(("quota", "threads"), [("max 100000", 8), ("350000 100000", 3), ("50000 100000", 1)])
def test_no_more_threads_than_a_containers_quota(untuned, tmp_path, quota, threads):
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    untuned.setattr(runtime, "CPU_QUOTA", tmp_path / "cpu.max")
    assert runtime._threads() == threads


# What Paddle's launcher does for its processes, without the seconds that it takes.
LAUNCHER = """
import os, subprocess, sys
os.environ.setdefault("OMP_NUM_THREADS", "1")
code = "import os; from latent_diffusion import runtime; runtime._tune(); print(os.environ['OMP_NUM_THREADS'])"
subprocess.run([sys.executable, "-c", code], env=os.environ | {"PADDLE_LOCAL_SIZE": "1"}, check=True)
"""


@pytest.mark.parametrize(("users", "threads"), [({}, len(os.sched_getaffinity(0))), ({"OMP_NUM_THREADS": "1"}, 1)])
def test_one_thread_is_the_launchers_choice_unless_it_is_the_users(users, threads):
    done = start(LAUNCHER, **users)
    assert done.stdout == f"{threads}\n", done.stderr


def test_paddles_launcher_leaves_the_number_of_threads_to_us(tmp_path):
    script = tmp_path / "threads.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nfrom latent_diffusion import runtime\n"
        "runtime._tune()\nprint('threads:', os.environ['OMP_NUM_THREADS'])\n"
    )
    arguments = ["launch", "--nnodes=1", "--nproc_per_node=1", "--log_dir", str(tmp_path), str(script)]
    code = f"import sys; sys.argv = {arguments}; from paddle.distributed.launch.main import launch; launch()"
    done = start(code)
    assert f"threads: {len(os.sched_getaffinity(0))}" in done.stdout, done.stderr


@pytest.mark.parametrize("folder", [".", "scripts", "demo"])
def test_every_command_says_what_was_tuned(folder):
    silent = {"check_install.py", "captions.py", "colors.py"}  # one says what is wrong, the others need no Paddle
    commands = [path for path in (REPOSITORY / folder).glob("*.py") if "__main__" in path.read_text()]
    assert {path.name for path in commands if "runtime.announce(" not in path.read_text()} - silent == set()
    assert len(commands) > 2


def test_the_line_is_printed_by_the_first_process_only(monkeypatch, capsys):
    for rank in "01":
        monkeypatch.setenv("PADDLE_TRAINER_ID", rank)
        runtime.announce(f"line of {rank}")
    assert capsys.readouterr().out == "line of 0\n"


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
    monkeypatch.setattr(runtime.library, "cpu_info", lambda: cpu)
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
