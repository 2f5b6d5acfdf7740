"""The whole chain on real digits: images, VAE, features, training, export, samples, and figures. `make demo` runs it.

Every step is a command that works the same on ImageNet with other paths and a larger model.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from latent_diffusion import runtime
from latent_diffusion.command_line import ArgumentParser
from latent_diffusion.errors import InputError, command

from .digits import write_digit_folders

ROOT = Path(__file__).resolve().parent.parent
DATA, OUTPUT = Path("data/demo"), Path("output/demo")
CONFIG = Path("config/DiT_digits.json")
VAE, TRAINING, PIPELINE, LABELS = OUTPUT / "vae", OUTPUT / "training", OUTPUT / "DiT_digits", OUTPUT / "labels.json"

COMMANDS = {
    "train a small autoencoder on the images": f"""-m demo.train_autoencoder
        --data-path {DATA}/images/train --output-dir {VAE}""",
    "encode the images": f"""extract_features.py
        --data-path {DATA}/images/train --features-path {DATA} --image-size 64 --vae {VAE} --batch-size 32""",
    "train the DiT": f"""train_image_generation_dit_trainer.py
        --do_train --config_file {CONFIG} --feature_path {DATA} --output_dir {TRAINING}
        --per_device_train_batch_size 32 --max_steps 3000 --learning_rate 2e-3 --lr_scheduler_type cosine
        --ema_decay 0.995 --ema_warmup --logging_steps 50 --save_steps 1500 --dataloader_num_workers 1
        --vae_name_or_path {VAE} --image_logging_steps 600 --num_inference_steps 25 --seed 23""",
    "export the pipeline": f"""scripts/convert_dit_to_ppdiffusers.py
        --model_file {TRAINING} --vae_name_or_path {VAE} --output_path {PIPELINE} --id2label {LABELS}""",
}


# What the demo promises; it fails where a figure falls short.
LEAST_CLASS_ACCURACY, LEAST_REAL_ACCURACY = 0.90, 0.97


@command
def main() -> None:
    ArgumentParser(description=__doc__).parse_args()
    begin = time.monotonic()
    os.chdir(ROOT)
    runtime.start()
    _clean()
    steps = len(COMMANDS) + 2
    print(f"[1/{steps}] draw the digits", flush=True)
    write_digit_folders(DATA / "images")
    LABELS.write_text(json.dumps({str(digit): f"digit {digit}" for digit in range(10)}) + "\n")
    for number, (title, words) in enumerate(COMMANDS.items(), start=2):
        print(f"\n[{number}/{steps}] {title}", flush=True)
        _run(words.split())
    print(f"\n[{steps}/{steps}] draw and judge samples of the exported pipeline", flush=True)
    figures, judged = _report()
    figures["total minutes"] = f"{(time.monotonic() - begin) / 60:.1f}"
    _print_table(figures)
    _check(judged)
    print(f"look at {OUTPUT}/samples.png and {OUTPUT}/loss.png")


def _clean() -> None:
    """Removes what an earlier demo made: features of one autoencoder must not meet another."""
    for folder in (DATA, OUTPUT):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def _run(words: list[str]) -> None:
    print("$ python " + " ".join(words), flush=True)
    status = subprocess.run([sys.executable, *words]).returncode
    if status:
        raise InputError(f"the demo stops: {words[0]} ended with exit status {status}")


def _report() -> tuple[dict[str, str], dict[str, float]]:
    """The table's rows, and the figures of `judge_samples`."""
    from . import report

    images, labels = report.draw_samples(PIPELINE)
    report.sample_grid(images, labels).save(OUTPUT / "samples.png")
    scalars = report.read_scalars(TRAINING)
    report.loss_plot(scalars, OUTPUT / "loss.png")
    judged = report.judge_samples(images, labels, DATA / "images")
    (OUTPUT / "report.json").write_text(json.dumps(judged, indent=2) + "\n")
    figures = {
        "parameters": f"{report.count_parameters(TRAINING) / 1e6:.2f} M",
        "training steps/s": f"{scalars['steps_per_second'].mean:.2f}",
        "final loss": f"{scalars['loss'].values[-1]:.4f}",
        "class accuracy of 500 samples": f"{judged['class_accuracy']:.1%}",
        "accuracy on held-out real digits": f"{judged['real_accuracy']:.1%}",
        "distance to nearest training image": f"{judged['sample_distance']:.3f}",
        "the same for held-out real digits": f"{judged['real_distance']:.3f}",
    }
    return figures, judged


def _check(judged: dict[str, float]) -> None:
    if judged["real_accuracy"] < LEAST_REAL_ACCURACY:
        raise InputError(f"the classifier reads only {judged['real_accuracy']:.1%} of the real digits")
    if judged["class_accuracy"] < LEAST_CLASS_ACCURACY:
        raise InputError(f"only {judged['class_accuracy']:.1%} of the samples show the digit that was asked for")


def _print_table(figures: dict[str, str]) -> None:
    width = max(map(len, figures))
    print()
    for name, value in figures.items():
        print(f"  {name:<{width}}  {value:>8}")
    print()


if __name__ == "__main__":
    main()
