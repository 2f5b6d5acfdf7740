"""A tiny Stable Diffusion XL with LoRA, and a batch: the same numbers in any framework. Needs NumPy only.

Arrays are in PyTorch's layout; names are diffusers'.
"""

import zlib

import numpy as np

RANK = 2
BATCH, LENGTH, VOCABULARY, WIDTH, TIME_WIDTH = 2, 16, 100, 32, 8

# All keys of the published one (stabilityai/stable-diffusion-xl-base-1.0, unet/config.json), with smaller numbers.
UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": TIME_WIDTH,
    "attention_head_dim": [2, 4],
    "block_out_channels": [32, 64],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2 * WIDTH,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 8,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 6 * TIME_WIDTH + WIDTH,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 8,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}


def _text_encoder(architecture: str, activation: str) -> dict:
    return {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        # What the published ones say of special tokens is not what they are: the end of a text is the largest number.
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": activation,
        "hidden_size": WIDTH,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 2 * WIDTH,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": LENGTH,
        "model_type": "clip_text_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 1,
        "projection_dim": WIDTH,
        "torch_dtype": "float16",
        "transformers_version": "4.32.0.dev0",
        "vocab_size": VOCABULARY,
    }


TEXT_ENCODERS = {
    "text_encoder": _text_encoder("CLIPTextModel", "quick_gelu"),
    "text_encoder_2": _text_encoder("CLIPTextModelWithProjection", "gelu"),
}

SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the weight of that name, float32: a function of the name and the shape."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    is_vector = len(shape) == 1  # of a norm, or a bias
    value = 0.1 * normal + name.endswith(".weight") if is_vector else normal / np.prod(shape[1:]) ** 0.5
    return value.astype(np.float32)


def batch() -> dict[str, np.ndarray]:
    """What a step trains on: latents, noise, timesteps, sizes and tokens."""
    random = np.random.RandomState(0)
    latents, noise = random.standard_normal((2, BATCH, 4, 8, 8)).astype(np.float32)
    tokens = random.randint(0, VOCABULARY - 2, (BATCH, LENGTH))
    tokens[:, 0] = VOCABULARY - 2
    lengths = np.array([5, 11])[:, None]
    ends, after = np.arange(LENGTH) == lengths, np.arange(LENGTH) > lengths
    end = VOCABULARY - 1
    return {
        "latents": latents,
        "noise": noise,
        "t": np.array([37, 912]),
        "time_ids": np.array([[480, 640, 0, 12, 64, 64], [64, 100, 7, 0, 64, 64]], np.float32),
        # The first tokenizer pads with the end, the second with "!", which is 0.
        "tokens": np.where(ends | after, end, tokens),
        "tokens_2": np.where(ends, end, np.where(after, 0, tokens)),
    }
