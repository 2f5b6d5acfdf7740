"""Command-line arguments that the trainers share."""

import math
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Optional

import paddle
from paddlenlp.trainer import PdArgumentParser, TrainingArguments
from paddlenlp.trainer.integrations import get_available_reporting_integrations
from paddlenlp.trainer.trainer_utils import IntervalStrategy, SchedulerType
from paddlenlp.utils.log import logger

from . import device, precision, profiling
from .command_line import MOST_SAMPLES, MOST_STEPS, MOST_WORKERS, ArgumentParser, check_hours, check_number
from .errors import InputError
from .evaluation import flags
from .evaluation.extractors import EXTRACTORS

# Flags of PaddleNLP that change nothing here or cannot work, by the reason.
UNSUPPORTED = {
    "is of PaddleNLP's evaluation, which makes no images; see --eval_steps": (
        "prediction_loss_only",
        "per_device_eval_batch_size",
        "eval_accumulation_steps",
        "bf16_full_eval",
        "fp16_full_eval",
        "minimum_eval_times",
        "max_evaluate_steps",
        "metric_for_best_model",
        "greater_is_better",
    ),
    "is not supported: a network is whole on every device; --sharding divides the optimizer's state": (
        "tensor_parallel_degree",
        "tensor_parallel_config",
        "pipeline_parallel_degree",
        "pipeline_parallel_config",
        "sep_parallel_degree",
        "context_parallel_degree",
        "sequence_parallel",
        "sequence_parallel_config",
        "fuse_sequence_parallel_allreduce",
        "split_inputs_sequence_dim",
        "expert_parallel_degree",
        "expert_tensor_parallel_degree",
        "use_expert_parallel",
        "expert_max_capacity",
        "expert_min_capacity",
        "hybrid_parallel_topo_order",
        "force_reshard_pp",
        "distributed_dataloader",
    ),
    "is of PaddleNLP's automatic parallelism, which is not supported": (
        "enable_auto_parallel",
        "auto_parallel_resume_form_hybrid_parallel",
        "data_parallel_config",
        "sharding_parallel_mesh_dimension",
        "to_static",
    ),
    "is of PaddleNLP's checkpoints; those of this suite are whole, see --save_steps": (
        "unified_checkpoint",
        "unified_checkpoint_config",
        "save_sharded_model",
        "load_sharded_model",
        "save_sharding_stage1_model_include_freeze_params",
        "sharding_parallel_config",
        "use_async_save",
        "output_signal_dir",
        "ordered_save_group_size",
        "ckpt_quant_stage",
        "ignore_save_lr_and_optim",
        "ignore_load_lr_and_optim",
        "offload_optim",
        "pdc_download_ckpt",
        "pdc_download_timeout",
    ),
    "is not supported: the nodes share one output folder, to which the first writes": (
        "save_on_each_node",
        "log_on_each_node",
    ),
    "is for language models": (
        "past_index",
        "remove_unused_columns",
        "label_names",
        "lazy_data_processing",
        "count_trained_tokens",
        "pad_token_id",
        "refined_recompute",
    ),
    "has no effect on the endless stream of samples, which a resumed run continues where it was": (
        "dataloader_drop_last",
        "ignore_data_skip",
        "skip_data_intervals",
    ),
    "has no effect; the log shows rate and memory, and --profile more": (
        "metrics_output_path",
        "skip_profile_timer",
        "skip_memory_metrics",
    ),
    "has no effect; memory of gradients is released where that is possible": ("release_grads",),
    "is only for NPUs": ("flatten_param_grads",),
    "is given by the launcher": ("local_rank",),
    "is not supported; give --device cpu": ("no_cuda",),
    "is not supported; give --sharding_parallel_degree": ("sharding_degree",),
    "is not supported; export with scripts/convert_dit_to_ppdiffusers.py, generate_pipelines.py or "
    "scripts/merge_sdxl_lora.py": ("do_export",),
}

# Of a number the least value, and one that is too large.
_RANGES = {
    "per_device_train_batch_size": (1, MOST_SAMPLES + 1),
    "gradient_accumulation_steps": (1, MOST_SAMPLES + 1),
    "logging_steps": (1, MOST_STEPS),
    "save_steps": (1, MOST_STEPS),
    "dataloader_num_workers": (0, MOST_WORKERS + 1),
    "warmup_steps": (0, MOST_STEPS),
    "num_train_epochs": (0, 1e9),
    # NumPy's generator takes no greater one.
    "seed": (0, 2**32),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "num_cycles": (0, 1e6),
    "lr_end": (0, math.inf),
    "power": (0, 1e6),
}

# These say how half precision on a GPU is done.
_OF_HALF_PRECISION = ("amp_master_grad", "amp_custom_black_list", "amp_custom_white_list", "scale_loss")

# The schedules of the learning rate for which a flag means something.
_WITH_WARMUP = tuple(name for name in SchedulerType if name is not SchedulerType.CONSTANT)
_SCHEDULES_WITH = {
    "warmup_steps": _WITH_WARMUP,
    "warmup_ratio": _WITH_WARMUP,
    "num_cycles": (SchedulerType.COSINE,),
    "lr_end": (SchedulerType.POLYNOMIAL,),
    "power": (SchedulerType.POLYNOMIAL,),
}


@dataclass
class SuiteArguments:
    """Flags of this suite, beside those of PaddleNLP's `TrainingArguments`."""

    _argument_group_name = "this suite's own flags"
    # Further names of flags, by their own.
    _aliases: ClassVar[dict[str, tuple[str, ...]]] = {}

    pretrained_model_name_or_path: Optional[str] = field(
        default=None,
        metadata={
            "help": "start from these weights: a checkpoint folder, a weight file of the official code, or a pipeline "
            "folder"
        },
    )
    use_ema: bool = field(default=True, metadata={"help": "keep an exponential moving average of the weights"})
    ema_decay: float = field(default=0.9999, metadata={"help": "decay of that average"})
    ema_warmup: bool = field(
        default=False, metadata={"help": "raise the decay as (1 + n) / (10 + n) at update n, for short runs"}
    )
    vae_name_or_path: str = field(
        default="stabilityai/sd-vae-ft-mse",
        metadata={"help": "VAE that decodes logged and evaluated images: a ppdiffusers folder or a name on the hub"},
    )
    image_logging_steps: Optional[int] = field(
        default=1000, metadata={"help": "log a grid of EMA samples every so many steps, 0 for never"}
    )
    num_inference_steps: int = field(default=25, metadata={"help": "sampling steps of logged and evaluated images"})
    eval_samples: int = field(default=flags.SAMPLES, metadata={"help": flags.HELP["samples"]})
    eval_reference: Optional[str] = field(default=None, metadata={"help": flags.HELP["reference"]})
    eval_extractor: str = field(
        default=EXTRACTORS[0], metadata={"help": flags.HELP["extractor"], "choices": EXTRACTORS}
    )
    eval_weights: Optional[str] = field(default=None, metadata={"help": flags.HELP["weights"]})
    profile: bool = field(default=False, metadata={"help": profiling.HELP})
    enable_xformers_memory_efficient_attention: bool = field(
        default=False, metadata={"help": "use Paddle's flash / memory-efficient attention (GPU)"}
    )

    def evaluation(self, steps: int | None) -> flags.EvaluationFlags:
        """The flags `--eval_*`.

        Args:
            steps: `--eval_steps`, which PaddleNLP's arguments have.

        Raises:
            InputError: see `EvaluationFlags`.
        """
        reference, weights = (path and Path(path) for path in (self.eval_reference, self.eval_weights))
        return flags.EvaluationFlags(steps, self.eval_samples, reference, self.eval_extractor, weights)

    @property
    def pretrained(self) -> Path | None:
        """The weights to start from."""
        return Path(self.pretrained_model_name_or_path) if self.pretrained_model_name_or_path else None

    def __post_init__(self):
        check_number("--ema_decay", self.ema_decay, 0, 1)
        if self.image_logging_steps is not None:
            check_number("--image_logging_steps", self.image_logging_steps, 0)
        check_number("--num_inference_steps", self.num_inference_steps, 1, 1001)


@dataclass
class SuiteTrainingArguments(TrainingArguments):
    """PaddleNLP's training arguments with the defaults of diffusion training and of the machine at hand."""

    _argument_group_name = "PaddleNLP's TrainingArguments"
    # Further names of flags, by their own; errors say the first of them.
    _aliases: ClassVar[dict[str, tuple[str, ...]]] = {}

    learning_rate: float = field(default=1e-4, metadata={"help": "learning rate of AdamW"})
    max_grad_norm: float = field(default=-1.0, metadata={"help": "clip the gradient to this norm; -1 for no clipping"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "constant, constant_with_warmup, linear, ..."})
    report_to: str = field(default="visualdl", metadata={"help": "where metrics go: visualdl, tensorboard, none, ..."})
    eval_steps: Optional[int] = field(default=None, metadata={"help": flags.HELP["steps"]})
    device: str = field(default="", metadata={"help": "cpu, gpu, xpu, npu; empty for the GPU where there is one"})
    disable_tqdm: Optional[bool] = field(
        default=None, metadata={"help": "print plain lines, not a progress bar (default: off on a terminal)"}
    )
    max_run_hours: Optional[float] = field(
        default=None, metadata={"help": "save and end after so many hours; the same command goes on from there"}
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "at a loss or gradient that is not finite: stop, or skip the step",
            "choices": ["stop", "skip"],
        },
    )
    ddp_find_unused_parameters: Optional[bool] = field(
        default=False, metadata={"help": "search for parameters without gradient at every step (slow)"}
    )

    def __post_init__(self):
        self._check()
        self._choose_device()
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        # PaddleNLP logs two hundred lines of arguments at start.
        logger.set_level("WARNING")
        super().__post_init__()
        if not self.sharding:
            # Zeroed gradients would take their memory all the time, and a pass to add to. Sharding has its own.
            self.release_grads = True
        # The sampler starts at the step a run resumes from, so that no data is read only to be skipped.
        self.ignore_data_skip = True

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.dataset_world_size

    def _check(self) -> None:
        if not self.do_train:
            raise InputError("nothing to do: give --do_train")
        self._check_evaluation()
        self._check_supported()
        self._check_numbers()
        self._check_schedule()
        self._check_reports()
        self._check_sharding()

    def _check_numbers(self) -> None:
        for name, (least, too_large) in _RANGES.items():
            check_number(self._flag(name), getattr(self, name), least, too_large)
        for name in ("adam_epsilon", "scale_loss"):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name} must be positive, not {getattr(self, name)}")
        if self.save_total_limit is not None:
            check_number(self._flag("save_total_limit"), self.save_total_limit, 1)
        if self.max_steps != -1:
            check_number(self._flag("max_steps"), self.max_steps, 1, MOST_STEPS)
        elif self.num_train_epochs == 0:
            raise InputError(
                f"--num_train_epochs 0 leaves nothing to train; give a positive number, or {self._flag('max_steps')}"
            )
        check_hours(self.max_run_hours)

    def _flag(self, name: str) -> str:
        """The flag of an attribute, as errors name it."""
        return f"--{self._aliases.get(name, (name,))[0]}"

    def _is_given(self, name: str) -> bool:
        """Whether a flag has another value than its default."""
        return getattr(self, name) != next(f.default for f in fields(self) if f.name == name)

    def _check_supported(self) -> None:
        for reason, names in UNSUPPORTED.items():
            for name in names:
                undivided = name.endswith("_parallel_degree") and getattr(self, name) == 1
                if self._is_given(name) and not undivided:
                    raise InputError(f"--{name} {reason}; leave it out")
        for name in ("save_strategy", "logging_strategy"):
            if IntervalStrategy(getattr(self, name)) is IntervalStrategy.EPOCH:
                raise InputError(f"--{name} epoch is not supported, the stream of samples has no epochs; give steps")
        for name, known in (("optim", ("adamw",)), ("fp16_opt_level", ("O1", "O2"))):
            if (value := getattr(self, name)) not in known:
                raise InputError(f"--{name} must be {' or '.join(known)}, not {value!r}")

    def _check_evaluation(self) -> None:
        evaluates = (
            self.do_eval or self.do_predict or IntervalStrategy(self.evaluation_strategy) is not IntervalStrategy.NO
        )
        if evaluates or self.load_best_model_at_end:
            raise InputError(
                "--do_eval, --do_predict, --evaluation_strategy and --load_best_model_at_end are not supported; "
                "--eval_steps with --eval_reference evaluates and keeps the best weights"
            )
        if self.eval_steps is not None and "stage3" in self.sharding:
            raise InputError(
                "--eval_steps needs whole weights, which --sharding stage3 does not keep; use stage1 or stage2"
            )

    def _check_schedule(self) -> None:
        names = [schedule.value for schedule in SchedulerType]
        if self.lr_scheduler_type not in names:
            raise InputError(f"{self._flag('lr_scheduler_type')} must be one of {', '.join(names)}")
        schedule = SchedulerType(self.lr_scheduler_type)
        for name, schedules in _SCHEDULES_WITH.items():
            if self._is_given(name) and schedule not in schedules:
                known = " or ".join(known.value for known in schedules)
                raise InputError(
                    f"{self._flag(name)} has no effect with {self._flag('lr_scheduler_type')} {schedule.value}; leave "
                    f"it out or take {known}"
                )
        if self.warmup_ratio and self.warmup_steps:
            raise InputError("--warmup_ratio and --warmup_steps exclude each other")
        if schedule is SchedulerType.POLYNOMIAL and self.lr_end >= self.learning_rate:
            raise InputError(f"--lr_end {self.lr_end} must be smaller than --learning_rate {self.learning_rate}")

    def _check_reports(self) -> None:
        available = get_available_reporting_integrations()
        known = [*available, "all", "none"]
        if self.report_to not in known:
            raise InputError(f"--report_to must be one of {', '.join(known)} on this machine, not {self.report_to!r}")
        reports = available if self.report_to == "all" else [self.report_to]
        for name in ("run_name", "wandb_api_key", "wandb_http_proxy"):
            if self._is_given(name) and "wandb" not in reports:
                raise InputError(f"--{name} has no effect without --report_to wandb; leave it out")

    def _check_sharding(self) -> None:
        processes = paddle.distributed.get_world_size()
        if self.sharding and processes == 1:
            raise InputError("--sharding needs several processes; start with python -m paddle.distributed.launch")
        for name in ("sharding_parallel_degree", "sharding_comm_buffer_size_MB"):
            if (value := getattr(self, name)) == -1:
                continue
            if not self.sharding:
                raise InputError(f"--{name} has no effect without --sharding; leave it out")
            check_number(f"--{name}", value, 1)
        if self.sharding_parallel_degree == 1:
            raise InputError("--sharding_parallel_degree 1 is no sharding; leave --sharding out, too")
        if self.sharding and processes % max(self.sharding_parallel_degree, 1):
            raise InputError(
                f"--sharding_parallel_degree {self.sharding_parallel_degree} does not divide the {processes} processes"
            )

    def _choose_device(self) -> None:
        """Selects `--device`, and the precision that it has."""
        if self.fp16 and self.bf16:
            raise InputError("--fp16 and --bf16 exclude each other")
        if self.device in ("", "cpu", "gpu"):
            self.device = device.select(self.device or None)
        else:
            try:
                paddle.set_device(self.device)
            except Exception as error:  # a device of another kind, for which Paddle has errors of many types
                raise InputError(f"--device {self.device} is none that this Paddle can use; give cpu or gpu") from error
        self._check_half_precision()
        self.cpu_dtype = None
        if self.device == "cpu":
            if any(stage in self.sharding for stage in ("stage2", "stage3")):
                raise InputError(f"--sharding {self.sharding} needs GPUs; on a CPU take stage1")
            # PaddleNLP's mixed precision is for a GPU.
            wanted = "float16" if self.fp16 else "bfloat16" if self.bf16 else None
            self.cpu_dtype, note = precision.choose(wanted, "cpu")
            self.fp16 = self.bf16 = False
            if note:
                print(f"note: {note}", file=sys.stderr)

    def _check_half_precision(self) -> None:
        if self.device != "cpu" and (self.fp16 or self.bf16):
            return
        for name in _OF_HALF_PRECISION:
            if self._is_given(name):
                raise InputError(f"--{name} has no effect without --fp16 or --bf16 on a GPU; leave it out")


def settle_steps(args: SuiteTrainingArguments, images: int) -> None:
    """Sets `args.max_steps`, where that is left to the epochs, for so many images.

    Raises:
        InputError: the warmup takes all of the steps, and the polynomial divides by what is left.
    """
    if args.max_steps <= 0:
        args.max_steps = math.ceil(images * args.num_train_epochs / args.samples_per_step)
    warmup = args.warmup_steps or int(args.warmup_ratio * args.max_steps)
    if args.lr_scheduler_type is SchedulerType.POLYNOMIAL and warmup >= args.max_steps:
        raise InputError(
            f"a warmup of {warmup} steps leaves none of {args.max_steps} for --lr_scheduler_type polynomial; make "
            "--warmup_steps or --warmup_ratio smaller"
        )


class _Parser(ArgumentParser, PdArgumentParser):
    pass


def parse(*types: type, description: str) -> tuple:
    """Parses the command line into one instance of each dataclass, listed in this order by `--help`.

    Raises:
        InputError: a value that cannot be, or flags that contradict each other.
    """
    parser = _Parser(types, description=description)
    for kind in types:
        parser.add_aliases(kind._aliases)
    try:
        *instances, unknown = parser.parse_args_into_dataclasses(
            return_remaining_strings=True, look_for_args_file=False
        )
    except InputError:
        raise
    except (ValueError, AssertionError) as error:  # how PaddleNLP refuses combinations of flags
        raise InputError(str(error)) from error
    if unknown:
        raise InputError(f"unknown argument {unknown[0]!r}; --help lists the flags")
    return tuple(instances)
