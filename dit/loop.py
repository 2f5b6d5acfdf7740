"""The plain training loop of `train.py`; it reads from top to bottom.

It shares network, objective, data stream, EMA and checkpoints with the Trainer: the same seed and batches give the
same losses, and a checkpoint of either can be exported, sampled and resumed.
"""

import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import paddle
from tqdm import tqdm

from latent_diffusion import checkpoint, device, distributed, precision
from latent_diffusion.ema import EMA
from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.flags import evaluation_flags
from latent_diffusion.evaluation.training import SampleMaker, open_evaluation
from latent_diffusion.experiment import Log, find_checkpoint, new_experiment
from latent_diffusion.features import FeatureStore, StreamBatchSampler, TrainingLoader, TrainingStream
from latent_diffusion.meter import Meter
from latent_diffusion.optimizers import adamw, constant_with_warmup
from latent_diffusion.profiling import StepProfiler
from latent_diffusion.vae import encode_latents, load_fitting_vae

from .configuration import DiTConfig
from .evaluation import make_sample_maker
from .features import open_features
from .images import ImageStore
from .modeling import DiT
from .objective import make_objective
from .pretrained import build_model

# What the loss is multiplied by at first in fp16; the scaler then adapts it. The Trainer's default.
INITIAL_LOSS_SCALE = 2.0**15

# What `--amp` says.
AMP_DTYPES = {"off": None, "fp16": "float16", "bf16": "bfloat16"}

# DDIM steps of the samples that are evaluated: as many as the Trainer takes by default.
EVALUATION_SAMPLING_STEPS = 25


def train(args: Namespace) -> None:
    """Trains as the flags of `train.py` say.

    Raises:
        InputError: whatever is wrong with flags, data or a checkpoint, before training starts; a loss or a weight that
            is not finite.
    """
    place = device.select(args.device)
    rank, world_size = distributed.start()
    check(args, world_size)
    eval_flags = evaluation_flags(args)
    dtype, precision_note = precision.choose(AMP_DTYPES[args.amp], place)

    # The model: new, or from pretrained weights.
    config = DiTConfig.from_name_or_file(args.model, args.image_size, args.num_classes)
    name = Path(args.model).stem if args.model.endswith(".json") else args.model.replace("/", "-")
    resumed = find_checkpoint(args.results_dir, name, args.resume) if args.resume else None
    paddle.seed(args.global_seed)
    model, notes = build_model(config, args.init_from, resumed)
    model.enable_recompute = args.recompute
    if precision_note:
        notes.append(precision_note)

    # The data: features, or images and the VAE that encodes them.
    store, vae = open_data(args, model.config)
    objective = make_objective()
    steps = args.max_steps or math.ceil(len(store) * args.epochs / args.global_batch_size)

    # What is compared with a reference now and then, and keeps the best weights.
    def make_maker() -> SampleMaker:
        decoder = vae or load_fitting_vae(args.vae, model.config.in_channels)
        return make_sample_maker(model.config, decoder, EVALUATION_SAMPLING_STEPS)

    evaluation = open_evaluation(eval_flags, make_maker, args.results_dir)
    notes += evaluation.notes if evaluation else []

    # What moves during training, and where it was.
    ema = EMA(model, args.ema_decay)
    schedule = constant_with_warmup(args.lr, args.warmup_steps)
    optimizer = adamw(model, schedule, args.weight_decay)
    scaler = paddle.amp.GradScaler(enable=dtype == "float16", init_loss_scaling=INITIAL_LOSS_SCALE)
    first = 0
    if resumed:
        first, samples = load(resumed, model, ema, optimizer, schedule, scaler)
        if samples != first * args.global_batch_size:
            notes.append(checkpoint.OTHER_BATCHES)
        if first >= steps:
            notes.append(f"{resumed} is at step {first}: nothing is left to train")
    parallel = paddle.DataParallel(model) if world_size > 1 else model
    model.train()

    folder = open_folder(args, name, resumed, first) if rank == 0 else None
    folder = Path(distributed.from_first(str(folder)))
    if evaluation and rank == 0:
        evaluation.keep_best_in(folder)
    log = Log(folder, vars(args), first) if rank == 0 else None
    if log:
        parameters = sum(p.size for p in model.parameters() if not p.stop_gradient)
        log.line(
            f"{folder}: {name}, {parameters / 1e6:.1f} M parameters, {len(store)} images, {steps} steps of "
            f"{args.global_batch_size} samples on {world_size} x {place}, "
            + (f"resuming from {resumed}" if resumed else f"from {args.init_from or 'scratch'}")
        )
        for note in notes:
            log.line(f"note: {note}")

    sampler = StreamBatchSampler(args.global_batch_size // world_size, first, steps, rank, world_size)
    loader = TrainingLoader(TrainingStream(store, objective, args.global_seed), sampler, args.num_workers)
    meter = Meter(args.global_batch_size)
    profiler = StepProfiler(folder, first, steps, meter, log.line) if args.profile and log else None
    bar = tqdm(total=steps, initial=first, desc="train", unit="step", disable=rank > 0 or not sys.stderr.isatty())
    for step, batch in enumerate(loader, start=first + 1):
        labels = batch["labels"]
        latents = batch["latents"] if vae is None else encode_latents(vae, batch["images"], batch["posterior_noise"])
        with distributed.averaging_gradients(parallel, args.recompute):
            with precision.autocast(dtype):
                losses = objective.losses(lambda x, t, y=labels: parallel(x, t, y), latents, batch["t"], batch["noise"])
            terms = {term: value.mean() for term, value in losses.items()}
            scaler.scale(terms["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        # Zeroed gradients would take their memory all the time, and a pass to add to.
        optimizer.clear_grad(set_to_zero=False)
        schedule.step()
        ema.update(step)
        meter.add(terms)
        bar.update()
        if profiler:
            profiler.after_step(step)

        if step % args.log_every == 0 or step == steps:
            values = meter.read() | {"learning_rate": schedule.last_lr, "peak_memory_gib": device.peak_memory() / 2**30}
            if not math.isfinite(values["loss"]):
                raise not_finite("the loss", step, folder)
            if log:
                log.step(step, steps, values)
        # Before the checkpoint of the same step: what an interruption loses is made again.
        if evaluation and evaluation.due(step, steps):
            with meter.paused():
                found = evaluation.run(step, model, ema)
            if log:
                log.evaluation(step, found)
        if step % args.ckpt_every == 0 or step == steps:
            if not checkpoint.all_finite(model):
                raise not_finite("a weight", step, folder)
            state = {"global_step": step, "max_steps": steps, "consumed_samples": step * args.global_batch_size}

            def write(target: Path, state: dict = state) -> None:
                if rank == 0:
                    save(target, model, ema, optimizer, schedule, scaler, state)

            checkpoint.save(folder / f"checkpoint-{step}", write)
            if log:
                log.line(f"wrote {folder / f'checkpoint-{step}'}")
    bar.close()
    if log:
        log.close()


def check(args: Namespace, world_size: int) -> None:
    """Raises `InputError` for values that cannot be."""
    if args.global_batch_size < 1 or args.global_batch_size % world_size:
        raise InputError(
            f"--global-batch-size {args.global_batch_size} is not a positive multiple of the {world_size} processes"
        )
    if args.use_parallel and world_size == 1:
        raise InputError("--use_parallel needs several processes; start with python -m paddle.distributed.launch")
    for name in ("epochs", "max_steps", "log_every", "ckpt_every"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    for name in ("global_seed", "num_workers", "warmup_steps", "lr", "weight_decay"):
        if not 0 <= (value := getattr(args, name)) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must not be negative or infinite, but is {value}")


def open_data(args: Namespace, config: DiTConfig) -> tuple[FeatureStore, paddle.nn.Layer | None]:
    """The samples, and the VAE that encodes them where they are images."""
    if args.data_path is None:
        return open_features(args.feature_path, config, args.use_flip), None
    return ImageStore(args.data_path, config), load_fitting_vae(args.vae, config.in_channels)


def open_folder(args: Namespace, name: str, resumed: Path | None, first: int) -> Path:
    """The experiment folder to write: a new one, or the one of the resumed checkpoint."""
    if resumed is None:
        return new_experiment(args.results_dir, name)
    folder = resumed.parent if resumed.name not in ("", "..") else resumed.resolve().parent
    checkpoint.remove_partial(folder)
    if note := checkpoint.set_aside(folder, after=first):
        print(f"note: {note}", file=sys.stderr)
    return folder


def save(folder: Path, model: DiT, ema: EMA, optimizer, schedule, scaler, state: dict) -> None:
    """Writes the files of a checkpoint."""
    checkpoint.write_state(folder, model, ema, schedule, scaler if scaler.is_enable() else None)
    checkpoint.save_optimizer(folder / checkpoint.OPTIMIZER, optimizer, model)
    (folder / checkpoint.TRAINER_STATE).write_text(json.dumps(state, indent=2) + "\n")


def load(folder: Path, model: DiT, ema: EMA, optimizer, schedule, scaler) -> tuple[int, int]:
    """Restores what `save` wrote; returns the step, and how many samples had been consumed by then."""
    checkpoint.check_config(folder, model.config)
    checkpoint.read_averaged_weights(folder, model, ema)
    checkpoint.load_optimizer(folder / checkpoint.OPTIMIZER, optimizer, model)
    checkpoint.read_schedule(folder, schedule, scaler if scaler.is_enable() else None)
    return checkpoint.read_progress(folder)


def not_finite(what: str, step: int, folder: Path) -> InputError:
    """The error that ends a run that has diverged."""
    return InputError(
        f"{what} is not finite at step {step}; training stops and saves nothing, checkpoints in {folder} are intact; "
        "try a lower --lr or more --warmup-steps"
    )
