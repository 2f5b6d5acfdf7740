"""PaddleNLP's Trainer for latent diffusion: what the trainers of all systems share."""

import math
import sys
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
from paddlenlp.trainer import PrinterCallback, Trainer, set_seed
from paddlenlp.trainer import ProgressCallback as PaddleNLPProgressCallback
from paddlenlp.trainer.integrations import VisualDLCallback
from paddlenlp.trainer.trainer_utils import ShardingOption

from . import checkpoint, precision
from .callbacks import (
    EMACallback,
    EvaluationCallback,
    GradientNormCallback,
    ImageLoggingCallback,
    ProfilingCallback,
    ProgressCallback,
)
from .ema import EMA
from .errors import InputError
from .evaluation.training import SampleMaker, TrainingEvaluation, open_evaluation
from .features import FeatureStore, StreamBatchSampler, TrainingLoader, TrainingStream
from .meter import Meter
from .objectives import Denoiser, Objective
from .progress import write_line
from .training_arguments import SuiteArguments, SuiteTrainingArguments
from .weights import read_paddle, write_paddle


class LatentDiffusionTrainer(Trainer):
    """Trains a backbone on feature files.

    A subclass says how a batch conditions the backbone (`denoiser`). Order of data and all noise come from
    `TrainingStream`, so that a run of 2 N steps and one of N steps that is resumed for N more are bitwise equal.

    Args:
        model: the backbone; its `config` has `save`, `from_json` and `to_dict` as `DiTConfig`.
        objective: makes the loss.
        store: the features.
        ema: average of the weights to keep, or None.
        args: PaddleNLP's training arguments.
    """

    def __init__(self, model, objective: Objective, store: FeatureStore, ema: EMA | None, args):
        if ema is not None and ShardingOption.FULL_SHARD in args.sharding:
            raise InputError(
                "--sharding stage3 keeps no whole weights to average; use stage1 or stage2, or --use_ema False"
            )
        samples_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.dataset_world_size
        if args.max_steps <= 0:
            args.max_steps = math.ceil(len(store) * args.num_train_epochs / samples_per_step)
        super().__init__(model=model, args=args, train_dataset=TrainingStream(store, objective, args.seed))
        self.objective, self.store, self.ema = objective, store, ema
        self._evaluation: TrainingEvaluation | None = None
        self._resumed_step = self._saved_step = 0
        self._meter = Meter(samples_per_step, args.gradient_accumulation_steps)
        self._gradient_norm = GradientNormCallback()
        for callback in (PrinterCallback, PaddleNLPProgressCallback):
            self.remove_callback(callback)
        for callback in (*([EMACallback(ema)] if ema else []), self._gradient_norm, ProgressCallback()):
            self.add_callback(callback)

    def log_images(self, draw: Callable[[paddle.nn.Layer], dict[str, np.ndarray]], every: int) -> None:
        """Sends what `draw` returns for the averaged weights to VisualDL, at every so many steps.

        `draw(model)` returns a dict of names and images uint8 [H, W, 3]. Without VisualDL in `--report_to` there is
        nowhere to send them, and nothing is drawn.
        """
        if ShardingOption.FULL_SHARD in self.args.sharding:
            # Its forward pass gathers weights from all ranks; only one would run it.
            print("note: no images are logged with --sharding stage3", file=sys.stderr)
            return
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, VisualDLCallback):
                self.add_callback(ImageLoggingCallback(self._meter.paused()(draw), every, self.ema, callback))
                return

    def profile_steps(self) -> None:
        """Profiles a few steps; the files are in the output folder."""
        self.add_callback(ProfilingCallback(self._meter))

    def evaluate_with(self, evaluation: TrainingEvaluation) -> None:
        """Runs `evaluation` whenever it is due; it keeps the best weights in the output folder.

        Raises:
            InputError: the best weights there cannot be compared with those of this run.
        """
        if self.is_world_process_zero():
            evaluation.keep_best_in(Path(self.args.output_dir))
            for note in evaluation.notes:
                print(f"note: {note}", file=sys.stderr)
        self._evaluation = evaluation
        self.add_callback(EvaluationCallback(evaluation.due))

    def evaluate(self, *args, **kwargs) -> None:
        """What PaddleNLP calls where a callback asks for it: its own loop over a dataset makes no images.

        It does so before it saves a checkpoint of the same step: what an interruption loses is made again.
        """
        with self._meter.paused():
            found = self._evaluation.run(self.state.global_step, self.model, self.ema)
        self.control.should_evaluate = False  # it would be asked for again at the end of an epoch
        if found is None:
            return
        write_line(found.line)
        if found.distance is not None:
            self.log({"eval_fid": found.distance})

    @abstractmethod
    def denoiser(self, model, inputs: dict[str, paddle.Tensor]) -> Denoiser:
        """The backbone `model` with the condition of the batch `inputs` filled in."""

    def train(self, resume_from_checkpoint: str | Path | None = None):
        """Trains to `args.max_steps`, from the given checkpoint folder on if there is one, and saves the end."""
        if resume_from_checkpoint is not None:
            self._check_resumed(Path(resume_from_checkpoint))
        if self.is_world_process_zero():
            self._print_plan(resume_from_checkpoint)
        if self._resumed_step >= self.args.max_steps:
            return None
        self._meter.start()
        result = super().train(resume_from_checkpoint=resume_from_checkpoint and str(resume_from_checkpoint))
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(self.model)
        return result

    def _check_resumed(self, folder: Path) -> None:
        """Takes over the step of a checkpoint, if it is of the same model."""
        checkpoint.check_config(folder, self.model.config)
        step, samples = checkpoint.read_progress(folder)
        if samples != step * self._meter.samples_per_step and self.is_world_process_zero():
            print(f"note: {checkpoint.OTHER_BATCHES}", file=sys.stderr)
        self._resumed_step = self._saved_step = step

    def _print_plan(self, resume_from_checkpoint: str | Path | None) -> None:
        args = self.args
        parameters = sum(p.size for p in self.model.parameters() if not p.stop_gradient)
        start = f"resuming from {resume_from_checkpoint}" if resume_from_checkpoint else "from step 0"
        if self._resumed_step >= args.max_steps:
            start += f", which is at step {self._resumed_step}: nothing is left to train"
        print(
            f"{parameters / 1e6:.1f} M parameters, {len(self.store)} images, {args.max_steps} steps of "
            f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x {args.dataset_world_size} "
            f"samples on {args.device}, {start}; logs in {args.logging_dir}",
            flush=True,
        )

    def get_train_dataloader(self) -> paddle.io.DataLoader:
        args = self.args
        sampler = StreamBatchSampler(
            args.per_device_train_batch_size,
            first=self._resumed_step * args.gradient_accumulation_steps,
            last=args.max_steps * args.gradient_accumulation_steps,
            rank=args.dataset_rank,
            world_size=args.dataset_world_size,
        )
        return TrainingLoader(self.train_dataset, sampler, args.dataloader_num_workers)

    def compute_loss(self, model, inputs, return_outputs=False):
        with precision.autocast(self.args.cpu_dtype):
            losses = self.objective.losses(
                self.denoiser(model, inputs), inputs["latents"], t=inputs["t"], noise=inputs["noise"]
            )
        terms = {name: value.mean() for name, value in losses.items()}
        self._meter.add(terms)
        return terms["loss"]

    def _check_loss_valid(self, loss):
        if not np.isfinite(loss.item()):
            raise self._not_finite("the loss", self.state.global_step + 1)

    def _not_finite(self, what: str, step: int) -> InputError:
        return InputError(
            f"{what} is not finite at step {step}; training stops and saves nothing, "
            f"checkpoints in {self.args.output_dir} are intact; try a lower --learning_rate or --max_grad_norm 1"
        )

    def log(self, logs: dict[str, float], **kwargs) -> None:
        if "loss" in logs:
            logs = self._training_logs()
        super().log(logs, **kwargs)

    def _training_logs(self) -> dict[str, float]:
        """Means over the steps since the last log and over all ranks, and rates."""
        norm = {} if self._gradient_norm.value is None else {"grad_norm": self._gradient_norm.value}
        progress = {
            "learning_rate": float(self._get_learning_rate()),
            "epoch": self.state.global_step * self._meter.samples_per_step / len(self.store),
            "global_step": self.state.global_step,
        }
        return self._meter.read() | norm | progress

    def _save_checkpoint(self, model, metrics=None):
        """Writes a checkpoint folder under a temporary name, on all ranks together, and then renames it."""
        if ShardingOption.FULL_SHARD in self.args.sharding:
            self.model_wrapped.get_all_parameters(convert2cpu=True)
        if not checkpoint.all_finite(self.model):
            raise self._not_finite("a weight", self.state.global_step)
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        checkpoint.save(final, self._write_checkpoint, self.args.save_total_limit)
        self._saved_step = self.state.global_step

    def _write_checkpoint(self, folder: Path) -> None:
        args = self.args
        if args.should_save:
            checkpoint.write_state(folder, self.model, self.ema, self.lr_scheduler, self._loss_scaler())
            self.state.save_to_json(str(folder / checkpoint.TRAINER_STATE))
            paddle.save(args, str(folder / checkpoint.TRAINING_ARGUMENTS))
        writes_optimizer = args.data_parallel_rank == 0 if args.use_hybrid_parallel else args.should_save
        if writes_optimizer:
            checkpoint.save_optimizer(folder / self._optimizer_file(), self.optimizer, self.model)
        write_paddle(folder / self._rng_file(), checkpoint.rng_state())

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
            checkpoint.set_rng_state(read_paddle(rng_file))


def run_training(
    trainer_class: type[LatentDiffusionTrainer],
    objective: Objective,
    store: FeatureStore,
    build_model: Callable[[Path | None], tuple[paddle.nn.Layer, list[str]]],
    make_drawer: Callable[[], Callable[[paddle.nn.Layer], dict[str, np.ndarray]] | None],
    make_maker: Callable[[], SampleMaker],
    suite_args: SuiteArguments,
    args: SuiteTrainingArguments,
) -> None:
    """Trains as the flags say; resumes from the newest checkpoint of the output folder if there is one.

    Args:
        trainer_class: the system's.
        objective: makes the loss.
        store: the features.
        build_model: gives the network to begin with, and sentences about it, for the checkpoint folder that is resumed
            or None.
        make_drawer: gives what `log_images` takes, or None where no images can be drawn.
        make_maker: gives what makes the samples that `--eval_steps` asks for.
        suite_args: flags of this suite.
        args: flags of PaddleNLP.

    Raises:
        InputError: whatever is wrong with the output folder, a checkpoint or the flags, before training starts.
    """
    eval_flags = suite_args.evaluation(args.eval_steps)
    resume = prepare_output(args)
    evaluation = open_evaluation(eval_flags, make_maker, Path(args.output_dir))
    logs_images = suite_args.image_logging_steps > 0 and args.should_save and "visualdl" in args.report_to
    draw = make_drawer() if logs_images else None

    set_seed(args.seed)
    # Under sharding that seeds each process differently. Weights become those of the first when they are wrapped, but
    # averages begin with what a process has made, and all processes draw samples with theirs.
    paddle.seed(args.seed)
    model, notes = build_model(resume)
    if args.should_save:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    if suite_args.enable_xformers_memory_efficient_attention:
        model.enable_xformers_memory_efficient_attention()
    ema = EMA(model, suite_args.ema_decay, suite_args.ema_warmup) if suite_args.use_ema else None
    trainer = trainer_class(model, objective, store, ema, args)
    if suite_args.profile:
        trainer.profile_steps()
    if draw:
        trainer.log_images(draw, suite_args.image_logging_steps)
    if evaluation:
        trainer.evaluate_with(evaluation)
    trainer.train(resume)


def prepare_output(args) -> Path | None:
    """Makes the output folder and says which checkpoint to resume from: the given one, else the newest there.

    Checkpoints that the run would mix with are moved aside, and it is said where to: all of them with
    `--overwrite_output_dir`, those of later steps when an earlier one of the same folder is resumed. So are the best
    weights.

    Raises:
        InputError: the output folder cannot be written, or the given folder is no complete checkpoint.
    """
    output_dir = Path(args.output_dir)
    given = args.resume_from_checkpoint
    if given and not (Path(given) / checkpoint.TRAINER_STATE).is_file():
        raise InputError(f"--resume_from_checkpoint {given} is not a complete checkpoint folder")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the output folder {output_dir}: {error.strerror}") from None
    if args.should_save:
        checkpoint.remove_partial(output_dir)
    if given:
        folder = Path(given)
        if folder.absolute().parent == output_dir.absolute():
            _set_aside(args, after=checkpoint.read_progress(folder)[0])
        return folder
    newest = None if args.overwrite_output_dir else checkpoint.newest_checkpoint(output_dir)
    _set_aside(args, after=checkpoint.read_progress(newest)[0] if newest else -1)
    return newest


def _set_aside(args, after: int) -> None:
    if args.should_save and (note := checkpoint.set_aside(Path(args.output_dir), after)):
        print(f"note: {note}", file=sys.stderr)
