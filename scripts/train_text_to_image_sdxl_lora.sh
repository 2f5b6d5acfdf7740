#!/bin/sh
# What train_1p_ and train_8p_text_to_image_sdxl_lora.sh do: sh train_text_to_image_sdxl_lora.sh DEVICES [flags].
# Without network, set the first three variables to folders, or give them as flags. Paths are those of the folder that
# this is called from.
set -eu

model_name=${model_name:-stabilityai/stable-diffusion-xl-base-1.0}
dataset_name=${dataset_name:-lambdalabs/naruto-blip-captions}
vae_name=${vae_name:-madebyollin/sdxl-vae-fp16-fix}
output_dir=${output_dir:-output/sdxl_lora_${1}p}
PYTHON=${PYTHON:-python}

devices=$1
shift

# What the flags say of the variables.
previous=
for flag; do
    case $previous$flag in
    --output_dir=* | --output-dir=*) output_dir=${flag#*=} ;;
    "output folder "*) output_dir=$flag ;;
    --train_data_dir* | --train-data-dir*) dataset_name= ;;
    esac
    previous=
    case $flag in --output_dir | --output-dir) previous="output folder " ;; esac
done

gpus=$("$PYTHON" -W ignore -c 'import paddle; print(paddle.device.cuda.device_count())')
if [ "$gpus" -eq 0 ]; then
    echo "no GPU: training on the CPU in $devices process(es)"
    set -- --device cpu "$@"
elif [ "$gpus" -lt "$devices" ]; then
    echo "error: $devices devices are asked for, and there are $gpus GPUs" >&2
    exit 1
fi

set -- \
    "$(dirname "$0")/../train_text_to_image_lora_sdxl.py" \
    --pretrained_model_name_or_path "$model_name" \
    --vae_name "$vae_name" \
    ${dataset_name:+--dataset_name "$dataset_name"} \
    --caption_column text \
    --resolution 1024 \
    --random_flip \
    --train_batch_size 1 \
    --num_train_epochs 2 \
    --checkpointing_steps 500 \
    --learning_rate 1e-4 \
    --lr_scheduler constant \
    --seed 42 \
    --output_dir "$output_dir" \
    "$@"

if [ "$devices" -gt 1 ]; then
    processes="--nproc_per_node $devices"
    if [ "$gpus" -gt 0 ]; then
        # The launcher takes the numbers that CUDA_VISIBLE_DEVICES has, where it is set.
        numbers=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((devices - 1)))}
        processes="--gpus $(echo "$numbers" | cut -d, -f "1-$devices")"
    fi
    set -- -m paddle.distributed.launch $processes --log_dir "$output_dir/log" "$@"
fi
exec "$PYTHON" -u "$@"
