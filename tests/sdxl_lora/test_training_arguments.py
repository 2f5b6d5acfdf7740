import pytest
from paddlenlp.trainer.trainer_utils import SchedulerType

from latent_diffusion.errors import InputError
from latent_diffusion.training_arguments import parse
from sdxl_lora.training_arguments import LoRAArguments, LoRATrainingArguments

REQUIRED = ("--pretrained_model_name_or_path", "base", "--dataset_name", "images", "--device", "cpu")

# The command of diffusers' README for this script, and of ppdiffusers'.
PUBLISHED = """--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0
    --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --dataset_name=lambdalabs/naruto-blip-captions
    --caption_column=text --resolution=1024 --random_flip --train_batch_size=1 --num_train_epochs=2
    --checkpointing_steps=500 --learning_rate=1e-04 --lr_scheduler=constant --lr_warmup_steps=0
    --mixed_precision=fp16 --seed=42 --output_dir=sd-naruto-model-lora-sdxl --train_text_encoder
    --gradient_checkpointing --resume_from_checkpoint=latest --report_to=none"""


def parsed(monkeypatch, *flags: str) -> tuple[LoRAArguments, LoRATrainingArguments]:
    monkeypatch.setattr("sys.argv", ["train", *flags])
    return parse(LoRAArguments, LoRATrainingArguments, description="")


def refused(monkeypatch, *flags: str) -> str:
    with pytest.raises(InputError) as caught:
        parsed(monkeypatch, *REQUIRED, *flags)
    return str(caught.value)


def test_a_published_command_is_understood(monkeypatch, capsys):
    own, args = parsed(monkeypatch, *PUBLISHED.split(), "--validation_prompt", "cute dragon creature")
    assert own.vae_name_or_path == "madebyollin/sdxl-vae-fp16-fix" and own.validation_prompts == [
        "cute dragon creature"
    ]
    assert own.random_flip and own.train_text_encoder and not own.center_crop and own.resolution == 1024
    assert (args.per_device_train_batch_size, args.save_steps, args.learning_rate) == (1, 500, 1e-4)
    assert args.recompute and args.resume_from_checkpoint is None and args.seed == 42
    assert args.lr_scheduler_type is SchedulerType.CONSTANT
    assert "float16 has no effect on a CPU" in capsys.readouterr().err
    assert not args.fp16 and args.weights_dtype == "float32"


def test_the_defaults_are_those_of_the_script_of_diffusers(monkeypatch):
    own, args = parsed(monkeypatch, *REQUIRED)
    assert (own.rank, own.resolution, own.image_column, own.caption_column) == (4, 1024, "image", "text")
    assert (own.snr_gamma, own.noise_offset, own.use_ema, own.num_validation_images) == (None, 0.0, False, 4)
    assert (args.per_device_train_batch_size, args.num_train_epochs, args.save_steps) == (16, 100, 500)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (1e-4, 1e-2, 1.0)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-8)


def test_bfloat16_on_a_cpu_is_said_to_have_no_effect(monkeypatch, capsys):
    _, args = parsed(monkeypatch, *REQUIRED, "--mixed_precision", "bf16")
    assert args.cpu_dtype is None and args.weights_dtype == "float32"
    assert "no effect on" in capsys.readouterr().err


def test_schedules_warm_up_for_500_steps_unless_told_otherwise(monkeypatch):
    cosine = (*REQUIRED, "--lr_scheduler", "cosine")
    assert parsed(monkeypatch, *cosine)[1].warmup_steps == 500
    assert parsed(monkeypatch, *cosine, "--lr_warmup_steps", "0")[1].warmup_steps == 0
    args = parsed(monkeypatch, *cosine, "--warmup_ratio", "0.1")[1]
    assert (args.warmup_steps, args.warmup_ratio) == (0, 0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train_batch_size 0", "--train_batch_size must be at least 1"),
        ("--max_train_steps 0", "--max_train_steps must be at least 1"),
        ("--checkpoints_total_limit 0", "--checkpoints_total_limit must be at least 1"),
        ("--lr_warmup_steps 3", "--lr_warmup_steps has no effect with --lr_scheduler constant"),
        ("--rank 0", "--rank must be at least 1"),
        ("--rank 100000", "--rank must be at least 1 and less than 4097"),
        ("--snr_gamma 0", "--snr_gamma must be positive"),
        ("--noise_offset -1", "--noise_offset must be at least 0"),
        ("--max_train_samples 0", "--max_train_samples must be at least 1"),
        ("--prediction_type sample", "--prediction_type"),
        ("--ema_decay 0.5", "--ema_decay has no effect without --use_ema"),
        ("--num_validation_images 2", "--num_validation_images has no effect without --validation_prompts"),
        (
            "--validation_epochs 2 --validation_prompts cat --image_logging_steps 5",
            "--validation_epochs has no effect with --image_logging_steps",
        ),
        ("--mixed_precision fp8", "--mixed_precision"),
        ("--mixed_precision fp16 --bf16", "--mixed_precision fp16 contradicts --fp16 or --bf16"),
        ("--train_data_dir other", "--dataset_name or with --train_data_dir, one of them"),
        ("--resume_from_checkpoint latest --overwrite_output_dir", "exclude each other"),
        ("--lr_scheduler cosine_with_restarts", "--lr_scheduler must be one of linear, cosine"),
        ("--allow_tf32", "unknown argument '--allow_tf32'"),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_that_was_given(monkeypatch, flags, message):
    assert message in refused(monkeypatch, *flags.split())


@pytest.mark.parametrize("missing", ["--pretrained_model_name_or_path", "--dataset_name"])
def test_base_and_images_are_required(monkeypatch, missing):
    at = REQUIRED.index(missing)
    with pytest.raises(InputError, match=missing):
        parsed(monkeypatch, *REQUIRED[:at], *REQUIRED[at + 2 :])


def test_a_checkpoint_is_found_by_its_name_in_the_output_folder_too(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ("out/checkpoint-4", "other/checkpoint-4"):
        (tmp_path / folder).mkdir(parents=True)
    for asked, found in {
        "checkpoint-4": "out/checkpoint-4",
        "gone/checkpoint-4": "out/checkpoint-4",
        "other/checkpoint-4": "other/checkpoint-4",
    }.items():
        _, args = parsed(monkeypatch, *REQUIRED, "--output_dir", "out", "--resume_from_checkpoint", asked)
        assert args.resume_from_checkpoint == found
    message = refused(monkeypatch, "--output_dir", "out", "--resume_from_checkpoint", "checkpoint-5")
    assert "--resume_from_checkpoint checkpoint-5 is no folder, and neither is out/checkpoint-5" in message
