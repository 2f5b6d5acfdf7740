#!/bin/sh
# Fine-tunes Stable Diffusion XL with LoRA on one device; flags are handed on and override all else:
#   sh scripts/train_1p_text_to_image_sdxl_lora.sh --max_train_steps=200
# At the end it prints the final loss and the FPS. See train_text_to_image_sdxl_lora.sh for the variables.
exec sh "$(dirname "$0")/train_text_to_image_sdxl_lora.sh" 1 "$@"
