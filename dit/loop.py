"""The plain training loop of `train.py`; it reads from top to bottom.

It shares network, objective, data stream, EMA and checkpoints with the Trainer: the same seed and batches give the
same losses, and a checkpoint of either can be exported, sampled and resumed.
"""

import contextlib
import json
import math
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import paddle
from tqdm import tqdm

from latent_diffusion import checkpoint, device, distributed, precision
from latent_diffusion.command_line import MOST_SAMPLES, MOST_STEPS, MOST_WORKERS, check_hours, check_number
from latent_diffusion.ema import EMA
from latent_diffusion.errors import InputError
from latent_diffusion.evaluation.flags import evaluation_flags
from latent_diffusion.evaluation.training import SampleMaker, TrainingEvaluation, open_evaluation
from latent_diffusion.experiment import Log, find_checkpoint, folder_of, new_experiment
from latent_diffusion.features import FeatureStore, TrainingStream
from latent_diffusion.files import locked_folder
from latent_diffusion.loader import StreamBatchSampler, TrainingLoader
from latent_diffusion.meter import Meter
from latent_diffusion.optimizers import adamw, constant_with_warmup
from latent_diffusion.profiling import StepProfiler
from latent_diffusion.step_guard import StepGuard, squared_gradient_norm
from latent_diffusion.stopping import StopRequest
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

# What a message about a run that has diverged ends with.
ADVICE = "try a lower --lr or more --warmup-steps"

# DDIM steps of the samples that are evaluated: as many as the Trainer takes by default.
EVALUATION_SAMPLING_STEPS = 25


@dataclass(frozen=True)
class TrainingState:
    """What moves during training."""

    model: DiT
    ema: EMA
    optimizer: paddle.optimizer.Optimizer
    schedule: paddle.optimizer.lr.LRScheduler
    scaler: paddle.amp.GradScaler

    def save(self, folder: Path, progress: dict) -> None:
        """Writes the files of a checkpoint."""
        checkpoint.write_state(folder, self.model, self.ema, self.schedule, self._loss_scaler())
        checkpoint.save_optimizer(folder / checkpoint.OPTIMIZER, self.optimizer, self.model)
        (folder / checkpoint.TRAINER_STATE).write_text(json.dumps(progress, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        checkpoint.check_config(folder, self.model.config)
        checkpoint.check_has(folder, checkpoint.OPTIMIZER, "it was saved with --sharding; resume it with the Trainer")
        checkpoint.check_has(folder, checkpoint.EMA_MODEL, "it was saved without an average of the weights")
        checkpoint.read_averaged_weights(folder, self.model, self.ema)
        checkpoint.load_optimizer(folder / checkpoint.OPTIMIZER, self.optimizer, self.model)
        checkpoint.read_schedule(folder, self.schedule, self._loss_scaler())

    def size(self) -> int:
        """Bytes of the tensors in a checkpoint."""
        states = (self.model.state_dict(), self.ema.state_dict(), self.optimizer.state_dict())
        return sum(map(checkpoint.size_of, states))

    def _loss_scaler(self) -> paddle.amp.GradScaler | None:
        return self.scaler if self.scaler.is_enable() else None


def train(args: Namespace) -> None:
    """Trains as the flags of `train.py` say.

    SIGTERM, SIGINT and `--max-run-hours` end it early, see `StopRequest`.

    Raises:
        InputError: whatever is wrong with flags, data or a checkpoint, before training starts; a loss, gradient or
            weight that is not finite; the last checkpoint cannot be saved.
    """
    with contextlib.ExitStack() as lock:
        _train(args, lock)


def _train(args: Namespace, lock: contextlib.ExitStack) -> None:
    """Trains; in the first process the experiment folder is locked as long as `lock` holds."""
    place = device.select(args.device)
    rank, world_size = distributed.start()
    check(args, world_size)
    stop = StopRequest(args.max_run_hours)
    eval_flags = evaluation_flags(args)
    dtype, precision_note = precision.choose(AMP_DTYPES[args.amp], place)

    # The model: new, or from pretrained weights.
    config = DiTConfig.from_name_or_file(args.model, args.image_size, args.num_classes)
    name = Path(args.model).stem if args.model.endswith(".json") else args.model.replace("/", "-")
    resumed = find_resumed(args, name, rank, lock) if args.resume else None
    paddle.seed(args.global_seed)
    model, notes = build_model(config, args.init_from, resumed)
    model.enable_recompute = args.recompute
    if precision_note:
        notes.append(precision_note)

    # The data: features, or images and the VAE that encodes them.
    store, vae = open_data(args, model.config)
    steps = args.max_steps or math.ceil(len(store) * args.epochs / args.global_batch_size)

    # What is compared with a reference now and then, and keeps the best weights.
    def make_maker() -> SampleMaker:
        decoder = vae or load_fitting_vae(args.vae, model.config.in_channels)
        return make_sample_maker(model.config, decoder, EVALUATION_SAMPLING_STEPS)

    evaluation = open_evaluation(eval_flags, make_maker, args.results_dir)
    notes += evaluation.notes if evaluation else []

    # What moves during training, and where it was.
    schedule = constant_with_warmup(args.lr, args.warmup_steps)
    scaler = paddle.amp.GradScaler(enable=dtype == "float16", init_loss_scaling=INITIAL_LOSS_SCALE)
    state = TrainingState(
        model, EMA(model, args.ema_decay), adamw(model, schedule, args.weight_decay), schedule, scaler
    )
    first = 0
    if resumed:
        state.load(resumed)
        progress = checkpoint.read_progress(resumed)
        first = progress.step
        notes += progress.changes(args.global_batch_size, args.global_seed)
        if first >= steps:
            notes.append(f"{resumed} is at step {first}: nothing is left to train")

    folder = folder_of(resumed) if resumed else open_experiment(args, name, rank, lock)
    checkpoint.check_shared(folder)
    if rank == 0 and evaluation:
        evaluation.keep_best_in(folder, first)
    if rank == 0 and resumed:
        tidy(folder, first)
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
    with stop:
        run_steps(args, state, store, vae, dtype, evaluation, stop, folder, log, range(first + 1, steps + 1))
    if log:
        log.close()


def run_steps(
    args: Namespace,
    state: TrainingState,
    store: FeatureStore,
    vae: paddle.nn.Layer | None,
    dtype: str | None,
    evaluation: TrainingEvaluation | None,
    stop: StopRequest,
    folder: Path,
    log: Log | None,
    numbers: range,
) -> None:
    """Makes the steps of these numbers, logging, evaluating and saving on the way.

    Raises:
        InputError: see `train`.
    """
    rank, world_size = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
    model, first, steps = state.model, numbers.start - 1, numbers.stop - 1
    parallel = paddle.DataParallel(model) if world_size > 1 else model
    model.train()
    objective = make_objective()
    say = log.line if log else lambda text: None
    stream = TrainingStream(store, objective, args.global_seed)
    sampler = StreamBatchSampler(args.global_batch_size // world_size, first, steps, rank, world_size)
    loader = TrainingLoader(stream, sampler, args.num_workers)
    advice = f"checkpoints in {folder} are intact; {ADVICE}"
    guard = StepGuard(model, stream, sampler, args.on_nonfinite, stop, say, lambda: advice)
    meter = Meter(args.global_batch_size)
    profiler = StepProfiler(folder, first, steps, meter, log.line) if args.profile and log else None
    bar = tqdm(total=steps, initial=first, desc="train", unit="step", disable=rank > 0 or not sys.stderr.isatty())
    for step, batch in zip(numbers, loader, strict=True):
        labels = batch["labels"]
        latents = batch["latents"] if vae is None else encode_latents(vae, batch["images"], batch["posterior_noise"])
        with distributed.averaging_gradients(parallel, args.recompute):
            with precision.autocast(dtype):
                losses = objective.losses(lambda x, t, y=labels: parallel(x, t, y), latents, batch["t"], batch["noise"])
            terms = {term: value.mean() for term, value in losses.items()}
            state.scaler.scale(terms["loss"]).backward()
        meter.add(terms)
        guard.add(losses["loss"])
        # A scaler leaves out steps of its own, and looks for a scale at which gradients are finite.
        made = guard.allows(step, None if state.scaler.is_enable() else squared_gradient_norm(model.parameters()))
        meter.end_step(made)
        if made:
            state.scaler.step(state.optimizer)
            state.scaler.update()
        # Zeroed gradients would take their memory all the time, and a pass to add to.
        state.optimizer.clear_grad(set_to_zero=False)
        state.schedule.step()
        if made:
            state.ema.update(step)
        bar.update()
        if profiler:
            profiler.after_step(step)

        is_last = step == steps or guard.should_stop
        if step % args.log_every == 0 or is_last:
            values = meter.read() | {"learning_rate": state.schedule.last_lr}
            values |= {"peak_memory_gib": device.peak_memory() / 2**30}
            values |= {} if guard.norm is None else {"grad_norm": guard.norm}
            if log:
                log.step(step, steps, values)
        # Before the checkpoint of the same step: what an interruption loses is made again.
        if evaluation and not guard.should_stop and evaluation.due(step, steps):
            with meter.paused():
                found = evaluation.run(step, model, state.ema, lambda: stop.reason is not None)
            if log:
                log.evaluation(step, found)
        if step % args.ckpt_every == 0 or is_last:
            guard.check_weights(step)
            save(args, state, folder, step, steps, is_last, say)
        if guard.should_stop and step < steps:
            say(
                f"stopped by {stop.reason or 'another process'} after step {step} of {steps}; the same command with "
                f"--resume {folder} goes on from there"
            )
            break
    bar.close()


def save(args: Namespace, state: TrainingState, folder: Path, step: int, steps: int, is_last: bool, say) -> None:
    """Writes a checkpoint, on all processes together; where that fails the run goes on without it, but for the last."""
    progress = checkpoint.Progress(step, step * args.global_batch_size, args.global_seed)
    is_first_process = paddle.distributed.get_rank() == 0

    def write(target: Path) -> None:
        if is_first_process:
            state.save(target, {"global_step": step, "max_steps": steps, "consumed_samples": progress.samples})

    final = folder / f"checkpoint-{step}"
    with checkpoint.going_on(say, is_last):
        checkpoint.save(final, write, progress, lambda: state.size() if is_first_process else 0)
        say(f"wrote {final}")


def check(args: Namespace, world_size: int) -> None:
    """Raises `InputError` for values that cannot be."""
    if args.global_batch_size < 1 or args.global_batch_size % world_size:
        raise InputError(
            f"--global-batch-size {args.global_batch_size} is not a positive multiple of the {world_size} processes"
        )
    check_number("--global-batch-size", args.global_batch_size, 1, MOST_SAMPLES * world_size + 1)
    if args.use_parallel and world_size == 1:
        raise InputError("--use_parallel needs several processes; start with python -m paddle.distributed.launch")
    check_hours(args.max_run_hours)
    for name in ("epochs", "max_steps", "log_every", "ckpt_every"):
        if (value := getattr(args, name)) is not None:
            check_number(f"--{name.replace('_', '-')}", value, 1, MOST_STEPS)
    for name in ("global_seed", "warmup_steps", "lr", "weight_decay"):
        check_number(f"--{name.replace('_', '-')}", getattr(args, name), 0)
    check_number("--num-workers", args.num_workers, 0, MOST_WORKERS + 1)
    check_number("--ema-decay", args.ema_decay, 0, 1)


def open_data(args: Namespace, config: DiTConfig) -> tuple[FeatureStore, paddle.nn.Layer | None]:
    """The samples, and the VAE that encodes them where they are images."""
    if args.data_path is None:
        return open_features(args.feature_path, config, args.use_flip), None
    return ImageStore(args.data_path, config), load_fitting_vae(args.vae, config.in_channels)


def find_resumed(args: Namespace, name: str, rank: int, lock: contextlib.ExitStack) -> Path:
    """The checkpoint to resume from, the same for all processes; the first one locks its experiment folder."""
    if rank > 0:
        return checkpoint.agreed(None)

    def lock_folder(folder: Path) -> None:
        lock.enter_context(locked_folder(folder))

    return checkpoint.agreed(find_checkpoint(args.results_dir, name, args.resume, lock_folder))


def open_experiment(args: Namespace, name: str, rank: int, lock: contextlib.ExitStack) -> Path:
    """A new experiment folder, the same for all processes; the first one locks it."""
    if rank > 0:
        return Path(distributed.from_first(""))
    folder = new_experiment(args.results_dir, name)
    lock.enter_context(locked_folder(folder))
    return Path(distributed.from_first(str(folder)))


def tidy(folder: Path, step: int) -> None:
    """Removes what interrupted saves left in an experiment folder; moves aside what is of steps beyond this one."""
    checkpoint.remove_partial(folder)
    if note := checkpoint.set_aside(folder, after=step):
        print(f"note: {note}", file=sys.stderr)
