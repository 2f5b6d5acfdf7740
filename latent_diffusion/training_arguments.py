"""Command-line arguments that the trainers share."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import paddle
from paddlenlp.trainer import PdArgumentParser, TrainingArguments
from paddlenlp.trainer.trainer_utils import IntervalStrategy
from paddlenlp.utils.log import logger

from . import precision, profiling
from .command_line import ArgumentParser
from .errors import InputError
from .evaluation import flags
from .evaluation.extractors import EXTRACTORS


@dataclass
class SuiteArguments:
    """Flags of this suite, beside those of PaddleNLP's `TrainingArguments`."""

    _argument_group_name = "this suite's own flags"

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
    image_logging_steps: int = field(
        default=1000, metadata={"help": "log a grid of EMA samples every so many steps, 0 for never"}
    )
    num_inference_steps: int = field(default=25, metadata={"help": "sampling steps of logged and evaluated images"})
    eval_samples: int = field(default=flags.SAMPLES, metadata={"help": flags.HELP["samples"]})
    eval_reference: Optional[str] = field(default=None, metadata={"help": flags.HELP["reference"]})
    eval_extractor: str = field(default=EXTRACTORS[0], metadata={"help": flags.HELP["extractor"]})
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
        if not 0.0 <= self.ema_decay < 1.0:
            raise InputError(f"--ema_decay must be in [0, 1), not {self.ema_decay}")
        if self.image_logging_steps < 0:
            raise InputError(f"--image_logging_steps must not be negative, but is {self.image_logging_steps}")
        if self.num_inference_steps < 1:
            raise InputError(f"--num_inference_steps must be at least 1, not {self.num_inference_steps}")


@dataclass
class SuiteTrainingArguments(TrainingArguments):
    """PaddleNLP's training arguments with the defaults of diffusion training and of the machine at hand."""

    _argument_group_name = "PaddleNLP's TrainingArguments"

    learning_rate: float = field(default=1e-4, metadata={"help": "learning rate of AdamW"})
    max_grad_norm: float = field(default=-1.0, metadata={"help": "clip the gradient to this norm; -1 for no clipping"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "constant, constant_with_warmup, linear, ..."})
    report_to: str = field(default="visualdl", metadata={"help": "where metrics go: visualdl, tensorboard, none, ..."})
    eval_steps: Optional[int] = field(default=None, metadata={"help": flags.HELP["steps"]})
    device: str = field(default="", metadata={"help": "cpu, gpu, xpu, npu; empty for the GPU where there is one"})
    disable_tqdm: Optional[bool] = field(
        default=None, metadata={"help": "print plain lines, not a progress bar (default: off on a terminal)"}
    )
    ddp_find_unused_parameters: Optional[bool] = field(
        default=False, metadata={"help": "search for parameters without gradient at every step (slow)"}
    )

    def __post_init__(self):
        if not self.device:
            self.device = (
                "gpu" if paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() else "cpu"
            )
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        self._check()
        # PaddleNLP logs two hundred lines of arguments at start.
        logger.set_level("WARNING")
        super().__post_init__()
        if not self.sharding:
            # Zeroed gradients would take their memory all the time, and a pass to add to. Sharding has its own.
            self.release_grads = True
        # The sampler starts at the step a run resumes from, so that no data is read only to be skipped.
        self.ignore_data_skip = True

    def _check(self) -> None:
        if not self.do_train:
            raise InputError("nothing to do: give --do_train")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("save_strategy", "logging_strategy"):
            if IntervalStrategy(getattr(self, name)) is IntervalStrategy.EPOCH:
                raise InputError(f"--{name} epoch is not supported, the stream of samples has no epochs; give steps")
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
        if self.seed < 0:
            raise InputError(f"--seed must be at least 0, not {self.seed}")
        if self.fp16 and self.bf16:
            raise InputError("--fp16 and --bf16 exclude each other")
        self.cpu_dtype = None
        if self.device == "cpu":
            # PaddleNLP's mixed precision is for a GPU.
            wanted = "float16" if self.fp16 else "bfloat16" if self.bf16 else None
            self.cpu_dtype, note = precision.choose(wanted, "cpu")
            self.fp16 = self.bf16 = False
            if note:
                print(f"note: {note}", file=sys.stderr)
        if self.sharding and paddle.distributed.get_world_size() == 1:
            raise InputError("--sharding needs several processes; start with python -m paddle.distributed.launch")
        if self.unified_checkpoint:
            raise InputError("--unified_checkpoint is for PaddleNLP's pretrained language models; leave it out")


class _Parser(ArgumentParser, PdArgumentParser):
    pass


def parse(*types: type, description: str) -> tuple:
    """Parses the command line into one instance of each dataclass, listed in this order by `--help`.

    Raises:
        InputError: a value that cannot be, or flags that contradict each other.
    """
    parser = _Parser(types, description=description)
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
