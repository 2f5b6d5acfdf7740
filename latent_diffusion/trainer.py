"""PaddleNLP's Trainer for latent diffusion: what the trainers of all systems share."""

import contextlib
import sys
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
from paddlenlp.trainer import PrinterCallback, Trainer, set_seed
from paddlenlp.trainer import ProgressCallback as PaddleNLPProgressCallback
from paddlenlp.trainer.integrations import VisualDLCallback
from paddlenlp.trainer.trainer_callback import TrainerState
from paddlenlp.trainer.trainer_utils import ShardingOption

from . import checkpoint, precision
from .callbacks import (
    EvaluationCallback,
    ImageLoggingCallback,
    ProfilingCallback,
    ProgressCallback,
    StartCallback,
    StepCallback,
)
from .ema import EMA
from .errors import InputError
from .evaluation.training import SampleMaker, TrainingEvaluation, open_evaluation
from .features import FeatureStore, TrainingStream
from .files import locked_folder
from .loader import StreamBatchSampler, TrainingLoader
from .meter import Meter
from .objectives import Denoiser, Objective
from .progress import write_line
from .reading import read_json
from .step_guard import AGREEMENT_STEPS, StepGuard
from .stopping import StopRequest
from .training_arguments import SuiteArguments, SuiteTrainingArguments, settle_steps
from .weights import write_paddle

# Bytes of what PaddleNLP keeps of a run: all it has logged.
_MAX_STATE = 1 << 30


class LatentDiffusionTrainer(Trainer):
    """Trains a backbone on feature files.

    A subclass says how a batch conditions the backbone (`denoiser`). Order of data and all noise come from
    `TrainingStream`, so that a run of 2 N steps and one of N steps that is resumed for N more are bitwise equal.

    Args:
        model: the backbone; its `config` has `save`, `from_json` and `to_dict` as `DiTConfig`.
        objective: makes the loss.
        store: the features.
        ema: average of the weights to keep, or None.
        args: PaddleNLP's training arguments, with those of `SuiteTrainingArguments`.
        stop: asks for an end before the last step.
    """

    def __init__(
        self, model, objective: Objective, store: FeatureStore, ema: EMA | None, args, stop: StopRequest | None = None
    ):
        settle_steps(args, len(store))
        super().__init__(model=model, args=args, train_dataset=TrainingStream(store, objective, args.seed))
        self.objective, self.store, self.ema = objective, store, ema
        self._stop = stop or StopRequest()
        self._evaluation: TrainingEvaluation | None = None
        self._resumed_step = self._saved_step = 0
        self._meter = Meter(args.samples_per_step, args.gradient_accumulation_steps)
        for callback in (PrinterCallback, PaddleNLPProgressCallback):
            self.remove_callback(callback)
        self._guard = StepGuard(
            self.model,
            self.train_dataset,
            self._sampler(),
            self.args.on_nonfinite,
            self._stop,
            self._say,
            lambda: f"checkpoints in {self.args.output_dir} are intact; {self.advice()}",
            # No process has whole weights between the steps of stage3.
            None if ShardingOption.FULL_SHARD in args.sharding else AGREEMENT_STEPS,
        )
        self._step = StepCallback(self._guard, self._meter, self.ema)
        self.add_callback(self._step)
        self.add_callback(ProgressCallback())

    def advice(self) -> str:
        """What a message about a run that has diverged ends with."""
        return "try a lower --learning_rate or --max_grad_norm 1"

    def log_images(self, draw: Callable[[paddle.nn.Layer], dict[str, np.ndarray]], every: int) -> None:
        """Sends what `draw` returns for the averaged weights to VisualDL, at every so many steps and at the end.

        `draw(model)` returns a dict of names and images uint8 [H, W, 3]. Without VisualDL in `--report_to` there is
        nowhere to send them, and nothing is drawn.
        """
        if ShardingOption.FULL_SHARD in self.args.sharding:
            # Its forward pass gathers weights from all ranks; only one would run it.
            print("note: no images are logged with --sharding stage3", file=sys.stderr)
            return
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, VisualDLCallback):
                due = self._unless_stopping(lambda step, last: step % every == 0 or step == last)
                self.add_callback(ImageLoggingCallback(self._meter.paused()(draw), due, self.ema, callback))
                return

    def profile_steps(self) -> None:
        """Profiles a few steps; the files are in the output folder."""
        self.add_callback(ProfilingCallback(self._meter))

    def evaluate_with(self, evaluation: TrainingEvaluation, after: int) -> None:
        """Runs `evaluation` whenever it is due; it keeps the best weights in the output folder.

        Args:
            evaluation: of samples.
            after: best weights of later steps do not count.

        Raises:
            InputError: the best weights there cannot be compared with those of this run.
        """
        if self.is_world_process_zero():
            evaluation.keep_best_in(Path(self.args.output_dir), after)
            for note in evaluation.notes:
                print(f"note: {note}", file=sys.stderr)
        self._evaluation = evaluation
        self.add_callback(EvaluationCallback(self._unless_stopping(evaluation.due)))

    def _unless_stopping(self, due: Callable[[int, int], bool]) -> Callable[[int, int], bool]:
        """`due(step, last_step)`, but never at a step after which the run ends on request: it is to end soon."""
        return lambda step, last: not self._guard.should_stop and due(step, last)

    def evaluate(self, *args, **kwargs) -> None:
        """What PaddleNLP calls where a callback asks for it: its own loop over a dataset makes no images.

        It does so before it saves a checkpoint of the same step: what an interruption loses is made again.
        """
        with self._meter.paused():
            found = self._evaluation.run(
                self.state.global_step, self.model, self.ema, lambda: self._stop.reason is not None
            )
        self.control.should_evaluate = False  # it would be asked for again at the end of an epoch
        if found is None:
            return
        write_line(found.line)
        if found.distance is not None:
            self.log({"eval_fid": found.distance})

    @abstractmethod
    def denoiser(self, model, inputs: dict[str, paddle.Tensor]) -> Denoiser:
        """The backbone `model` with the condition of the batch `inputs` filled in."""

    def latents(self, inputs: dict[str, paddle.Tensor]) -> paddle.Tensor:
        """The clean scaled latents of a batch, float32 [B, C, H, W]."""
        return inputs["latents"]

    def train(
        self, resume_from_checkpoint: str | Path | None = None, before_first_step: Callable[[], None] = lambda: None
    ):
        """Trains to `args.max_steps`, from the given checkpoint folder on if there is one, and saves the end.

        It ends earlier where the stop request asks for that; the end is saved then, too.

        Args:
            resume_from_checkpoint: the folder.
            before_first_step: called when all has been loaded.
        """
        if resume_from_checkpoint is not None:
            self._check_resumed(Path(resume_from_checkpoint))
        if self.is_world_process_zero():
            self._print_plan(resume_from_checkpoint)
        if self._resumed_step >= self.args.max_steps:
            return None
        self._guard.begin(self._sampler())
        self.add_callback(StartCallback(before_first_step))
        self._meter.start()
        result = super().train(resume_from_checkpoint=resume_from_checkpoint and str(resume_from_checkpoint))
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(self.model)
        if self._guard.should_stop and self.state.global_step < self.args.max_steps:
            self._say(
                f"stopped by {self._stop.reason or 'another process'} after step {self.state.global_step} of "
                f"{self.args.max_steps}, saved in {self.args.output_dir}; {self._how_to_go_on()}"
            )
        return result

    def _how_to_go_on(self) -> str:
        flags = [f for f in ("overwrite_output_dir", "resume_from_checkpoint") if getattr(self.args, f)]
        without = f" without --{' and --'.join(flags)}" if flags else ""
        return f"the same command{without} goes on from there"

    def _say(self, text: str) -> None:
        if self.is_world_process_zero():
            write_line(text)

    def _check_resumed(self, folder: Path) -> None:
        """Takes over the step of a checkpoint, if it is of the same model."""
        checkpoint.check_config(folder, self.model.config)
        if self.ema is not None:
            check_average(folder)
        checkpoint.check_has(folder, self._optimizer_file(), "it was saved with another --sharding; give that")
        progress = checkpoint.read_progress(folder)
        for note in progress.changes(self._meter.samples_per_step, self.args.seed):
            if self.is_world_process_zero():
                print(f"note: {note}", file=sys.stderr)
        check_state(folder / checkpoint.TRAINER_STATE, progress.step)
        self._resumed_step = self._saved_step = progress.step

    def _print_plan(self, resume_from_checkpoint: str | Path | None) -> None:
        args = self.args
        parameters = sum(p.size for p in self.model.parameters() if not p.stop_gradient)
        start = f"resuming from {resume_from_checkpoint}" if resume_from_checkpoint else "from step 0"
        if self._resumed_step >= args.max_steps:
            start += f", which is at step {self._resumed_step}: nothing is left to train"
        millions = f"{parameters / 1e6:.{1 if parameters >= 1e6 else 3}f}"
        print(
            f"{millions} M parameters, {len(self.store)} images, {args.max_steps} steps of "
            f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x {args.dataset_world_size} "
            f"samples on {args.device}, {start}" + (f"; logs in {args.logging_dir}" if args.report_to else ""),
            flush=True,
        )

    def _sampler(self) -> StreamBatchSampler:
        args = self.args
        return StreamBatchSampler(
            args.per_device_train_batch_size,
            first=self._resumed_step * args.gradient_accumulation_steps,
            last=args.max_steps * args.gradient_accumulation_steps,
            rank=args.dataset_rank,
            world_size=args.dataset_world_size,
        )

    def get_train_dataloader(self) -> paddle.io.DataLoader:
        return TrainingLoader(self.train_dataset, self._sampler(), self.args.dataloader_num_workers)

    def compute_loss(self, model, inputs, return_outputs=False):
        with precision.autocast(self.args.cpu_dtype):
            losses = self.objective.losses(
                self.denoiser(model, inputs), self.latents(inputs), t=inputs["t"], noise=inputs["noise"]
            )
        terms = {name: value.mean() for name, value in losses.items()}
        self._meter.add(terms)
        self._guard.add(losses["loss"])
        return terms["loss"]

    def _check_loss_valid(self, loss):
        """The guard does that, when gradients have been added up."""

    def log(self, logs: dict[str, float], **kwargs) -> None:
        if "loss" in logs:
            logs = self._training_logs()
        super().log(logs, **kwargs)

    def _training_logs(self) -> dict[str, float]:
        """Means over the steps since the last log and over all ranks, and rates."""
        norm = {} if self._step.norm is None else {"grad_norm": self._step.norm}
        progress = {
            "learning_rate": float(self._get_learning_rate()),
            "epoch": self.state.global_step * self._meter.samples_per_step / len(self.store),
            "global_step": self.state.global_step,
        }
        return self._meter.read() | norm | progress

    def _save_checkpoint(self, model, metrics=None):
        """Writes a checkpoint, on all ranks together; where that fails the run goes on without it, but for the last."""
        if ShardingOption.FULL_SHARD in self.args.sharding:
            self.model_wrapped.get_all_parameters(convert2cpu=True)
        step = self.state.global_step
        self._guard.check_weights(step)
        final = Path(self.args.output_dir) / f"checkpoint-{step}"
        progress = checkpoint.Progress(step, step * self._meter.samples_per_step, self.args.seed)
        with checkpoint.going_on(self._say, is_last=step == self.args.max_steps or self._guard.should_stop):
            checkpoint.save(final, self._write_checkpoint, progress, self._checkpoint_size, self.args.save_total_limit)
            self._saved_step = step

    def _write_checkpoint(self, folder: Path) -> None:
        args = self.args
        if args.should_save:
            checkpoint.write_state(folder, self.model, self.ema, self.lr_scheduler, self._loss_scaler())
            self.state.save_to_json(str(folder / checkpoint.TRAINER_STATE))
            paddle.save(args, str(folder / checkpoint.TRAINING_ARGUMENTS))
        if self._writes_optimizer():
            checkpoint.save_optimizer(folder / self._optimizer_file(), self.optimizer, self.model)
        write_paddle(folder / self._rng_file(), checkpoint.rng_state())

    def _checkpoint_size(self) -> int:
        """Bytes of the tensors that this rank writes."""
        states = [self.model.state_dict(), self.ema.state_dict() if self.ema else {}] if self.args.should_save else []
        if self._writes_optimizer():
            states.append(self.optimizer.state_dict())
        return sum(map(checkpoint.size_of, states))

    def _writes_optimizer(self) -> bool:
        return self.args.data_parallel_rank == 0 if self.args.use_hybrid_parallel else self.args.should_save

    def _loss_scaler(self):
        return self.scaler if self.do_grad_scaling else None

    def _optimizer_file(self) -> str:
        # Under sharding each rank keeps the state of its own parameters: optimizer.shard00.pdopt and so on.
        suffix = self.args.optimizer_name_suffix
        return f"optimizer.{suffix}.pdopt" if suffix else checkpoint.OPTIMIZER

    def _rng_file(self) -> str:
        return f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"

    def _load_from_checkpoint(self, resume_from_checkpoint=None):
        if resume_from_checkpoint is None:
            return
        checkpoint.read_averaged_weights(Path(resume_from_checkpoint), self.model, self.ema)

    def _load_optimizer_and_scheduler(self, checkpoint_folder):
        if checkpoint_folder is None:
            return
        folder = Path(checkpoint_folder)
        checkpoint.load_optimizer(folder / self._optimizer_file(), self.optimizer, self.model)
        checkpoint.read_schedule(folder, self.lr_scheduler, self._loss_scaler())
        # Training draws from generators of its own; this is for what a subclass may draw from the global ones.
        rng_file = folder / self._rng_file()
        if rng_file.is_file():
            checkpoint.read_rng_state(rng_file)


def check_average(folder: Path) -> None:
    """Raises `InputError` unless a checkpoint has averaged weights."""
    checkpoint.check_has(folder, checkpoint.EMA_MODEL, "it was saved without an average; give --use_ema False")


def check_state(path: Path, step: int) -> None:
    """What PaddleNLP reads of a checkpoint itself; it takes over whatever the file says.

    Raises:
        InputError: the file cannot be read, is no state of a `Trainer`, or one of another step.
    """
    try:
        state = TrainerState(**read_json(path, _MAX_STATE))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is not the state of a Trainer ({error}); resume another checkpoint") from None
    if state.global_step != step or not isinstance(state.log_history, list):
        raise InputError(
            f"{path} is not the state after step {step}, which the manifest beside it says; resume another checkpoint"
        )


def run_training(
    trainer_class: type[LatentDiffusionTrainer],
    objective: Objective,
    make_store: Callable[[Path | None], FeatureStore],
    build_model: Callable[[Path | None], tuple[paddle.nn.Layer, list[str]]],
    make_drawer: Callable[[], Callable[[paddle.nn.Layer], dict[str, np.ndarray]] | None],
    make_maker: Callable[[], SampleMaker],
    suite_args: SuiteArguments,
    args: SuiteTrainingArguments,
) -> None:
    """Trains as the flags say; resumes from the newest checkpoint of the output folder if there is one.

    SIGTERM, SIGINT and `--max_run_hours` end it early, see `StopRequest`.

    Args:
        trainer_class: the system's.
        objective: makes the loss.
        make_store: gives the features, for the checkpoint folder that is resumed or None; it may take hours to make
            them, so it is called when flags and output folder have been checked.
        build_model: gives the network to begin with, and sentences about it, for that folder or None.
        make_drawer: gives what `log_images` takes, or None where no images can be drawn.
        make_maker: gives what makes the samples that `--eval_steps` asks for.
        suite_args: flags of this suite.
        args: flags of PaddleNLP.

    Raises:
        InputError: whatever is wrong with the output folder, a checkpoint or the flags, before training starts.
    """
    if "visualdl" in args.report_to:
        from .curves import outlive_failing_disk  # it takes a second to import

        outlive_failing_disk()
    if suite_args.use_ema and ShardingOption.FULL_SHARD in args.sharding:
        raise InputError(
            "--sharding stage3 keeps no whole weights to average; use stage1 or stage2, or --use_ema False"
        )
    eval_flags = suite_args.evaluation(args.eval_steps)
    stop = StopRequest(args.max_run_hours)
    output_dir = Path(args.output_dir)
    with locked_folder(output_dir) if args.process_index == 0 else contextlib.nullcontext():
        checkpoint.check_shared(output_dir)
        resume = choose_checkpoint(args)
        if resume is not None and suite_args.use_ema:
            check_average(resume)
        after = steps_kept(output_dir, resume)
        evaluation = open_evaluation(eval_flags, make_maker, output_dir)
        logs_images = suite_args.image_logging_steps > 0 and args.should_save and "visualdl" in args.report_to
        draw = make_drawer() if logs_images else None
        store = make_store(resume)

        set_seed(args.seed)
        # Under sharding that seeds each process differently. Weights become those of the first when they are wrapped,
        # but averages begin with what a process has made, and all processes draw samples with theirs.
        paddle.seed(args.seed)
        model, notes = build_model(resume)
        if args.should_save:
            for note in notes:
                print(f"note: {note}", file=sys.stderr)
        if suite_args.enable_xformers_memory_efficient_attention:
            model.enable_xformers_memory_efficient_attention()
        ema = EMA(model, suite_args.ema_decay, suite_args.ema_warmup) if suite_args.use_ema else None
        trainer = trainer_class(model, objective, store, ema, args, stop)
        if suite_args.profile:
            trainer.profile_steps()
        if draw:
            trainer.log_images(draw, suite_args.image_logging_steps)
        if evaluation:
            trainer.evaluate_with(evaluation, after)
        with stop:
            trainer.train(resume, lambda: _set_aside(args, after))


def choose_checkpoint(args) -> Path | None:
    """The checkpoint to resume from: the given one, else the newest complete one of the output folder.

    All processes call it, and get what the first has found.

    Raises:
        InputError: the given folder is no complete checkpoint, or none of those in the output folder is; a process does
            not see what the first does.
    """
    return checkpoint.agreed(_choose_checkpoint(args) if args.process_index == 0 else None)


def _choose_checkpoint(args) -> Path | None:
    checkpoint.remove_partial(Path(args.output_dir))
    if args.resume_from_checkpoint:
        checkpoint.verify(Path(args.resume_from_checkpoint))
        return Path(args.resume_from_checkpoint)
    return None if args.overwrite_output_dir else checkpoint.newest_checkpoint(Path(args.output_dir), checkpoint.verify)


def steps_kept(output_dir: Path, resume: Path | None) -> int:
    """The step up to which what is in the output folder is of the run that is resumed; -1 where nothing is."""
    if resume is None or resume.resolve().parent != output_dir.resolve():
        return -1
    return checkpoint.read_progress(resume).step


def _set_aside(args, after: int) -> None:
    """Moves what the run would mix with aside, and says where to."""
    if args.process_index == 0 and (note := checkpoint.set_aside(Path(args.output_dir), after)):
        print(f"note: {note}", file=sys.stderr)
