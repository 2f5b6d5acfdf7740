#!/bin/sh
# Trains U-ViT-S/2 (deep) on COCO features, on the devices there are: all GPUs, one, or the CPU.
#
# Variables override the settings (MAX_STEPS=1000 BATCH_SIZE=8 sh run_train_ldm_uvit_small_deep.sh), further flags are
# handed on and override all else (sh run_train_ldm_uvit_small_deep.sh --learning_rate 1e-4 --resume_from_checkpoint ...).
set -eu

PYTHON=${PYTHON:-python}
OUTPUT_DIR=${OUTPUT_DIR:-./output_dir/uvit_t2i_small_deep}
FEATURE_PATH=${FEATURE_PATH:-./data/coco256_features}
UNET_CONFIG_FILE=${UNET_CONFIG_FILE:-config/uvit_t2i_small_deep.json}
BATCH_SIZE=${BATCH_SIZE:-32}
MAX_STEPS=${MAX_STEPS:-1000000}
NUM_WORKERS=${NUM_WORKERS:-8}
# The devices to use, "0,1,2,3" say; empty for the CPU.
if [ -z "${GPUS+set}" ]; then
    # The launcher takes the numbers that CUDA_VISIBLE_DEVICES has, where it is set.
    GPUS=$("$PYTHON" -W ignore -c 'import os, paddle
count = paddle.device.cuda.device_count()
print((os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))) if count else "")')
fi

case $GPUS in
"")
    launch="-u"
    set -- --device cpu "$@"
    ;;
*,*) launch="-u -m paddle.distributed.launch --gpus $GPUS" ;;
*)
    launch="-u"
    export CUDA_VISIBLE_DEVICES="$GPUS"
    ;;
esac
echo "training on ${GPUS:+GPU }${GPUS:-the CPU}"

exec "$PYTHON" $launch train_txt2img_uvit_coco_trainer.py \
    --do_train \
    --output_dir "$OUTPUT_DIR" \
    --feature_path "$FEATURE_PATH" \
    --per_device_train_batch_size "$BATCH_SIZE" \
    --gradient_accumulation_steps 1 \
    --learning_rate 0.0002 \
    --weight_decay 0.03 \
    --adam_beta1 0.9 \
    --adam_beta2 0.9 \
    --max_steps "$MAX_STEPS" \
    --lr_scheduler_type constant_with_warmup \
    --warmup_steps "${WARMUP_STEPS:-5000}" \
    --image_logging_steps "${IMAGE_LOGGING_STEPS:-5000}" \
    --logging_steps "${LOGGING_STEPS:-100}" \
    --save_steps "${SAVE_STEPS:-10000}" \
    --seed "${SEED:-1234}" \
    --dataloader_num_workers "$NUM_WORKERS" \
    --max_grad_norm -1 \
    --unet_config_file "$UNET_CONFIG_FILE" \
    --num_inference_steps 50 \
    --use_ema True \
    --recompute "${RECOMPUTE:-True}" \
    --fp16 "${FP16:-False}" \
    --fp16_opt_level O1 \
    --enable_xformers_memory_efficient_attention True \
    "$@"
