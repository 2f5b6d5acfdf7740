"""What can go wrong, at length: `python -m tests.faults [part ...] [--scale S] [--seed N] [--output DIR]`.

Each part is a module with `run(folder, scale)`, which may take a seed, too: it returns figures, and raises
AssertionError at the first case that is not as it should be. The tests of the same names run a bounded form.
"""

import argparse
import importlib
import inspect
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from latent_diffusion.files import write_file, write_json

PARTS = ("crash_points", "kills", "stops", "disk", "hostile", "data", "flags", "folder", "soak")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full numbers of cases (default: 1)")
    parser.add_argument("--seed", type=int, help="of random choices (default: another one each time)")
    parser.add_argument("--output", type=Path, default=Path("output/faults"), help="folder for summary.json")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    return arguments


def run_part(name: str, scale: float, seed: int, output: Path) -> dict[str, int | float | str]:
    """The figures of a part, whose pictures go to `output`; where a case fails they say so, and its files are kept."""
    folder = Path(tempfile.mkdtemp(prefix=f"faults-{name}-"))
    run = importlib.import_module(f"tests.faults.{name}").run
    seeded = {"seed": seed} if "seed" in inspect.signature(run).parameters else {}
    began = time.monotonic()
    try:
        figures = run(folder, scale, **seeded)
    except Exception as error:  # the other parts are run all the same
        traceback.print_exc()
        return {"failed": str(error).partition("\n")[0] or type(error).__name__, "files": str(folder)}
    for picture in folder.glob("*.png"):
        shutil.copy(picture, output)
    shutil.rmtree(folder)
    return {**figures, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    arguments = parse_arguments()
    seed = random.randrange(2**31) if arguments.seed is None else arguments.seed
    arguments.output.mkdir(parents=True, exist_ok=True)
    summary = {"scale": arguments.scale, "seed": seed, "parts": {}}
    for name in arguments.parts or PARTS:
        print(f"{name}, seed {seed}", flush=True)
        summary["parts"][name] = run_part(name, arguments.scale, seed, arguments.output)
        write_file(arguments.output / "summary.json", lambda path: write_json(path, summary))
    for name, figures in summary["parts"].items():
        print(f"{name:14}" + ", ".join(f"{key} {value}" for key, value in figures.items()))
    sys.exit(any("failed" in figures for figures in summary["parts"].values()))


if __name__ == "__main__":
    main()
