"""What the programs of a LoRA step share: the rank, and one batch of random inputs. NumPy only."""

import numpy as np

RANK = 4

# Of a prompt, as both text encoders of Stable Diffusion XL take it.
TOKENS = 77

TIME_IDS = 6
TIMESTEPS = 1000


def random_batch(config, count):
    """Latents, noise, timesteps, sizes, contexts and pooled text, as arrays, for a UNet of this configuration."""
    rng = np.random.default_rng(0)
    side, pooled_width = config["sample_size"], config["projection_class_embeddings_input_dim"]
    pooled_width -= TIME_IDS * config["addition_time_embed_dim"]
    latents, noise = rng.standard_normal((2, count, config["in_channels"], side, side), dtype=np.float32)
    return {
        "latents": latents,
        "noise": noise,
        "t": rng.integers(TIMESTEPS, size=count),
        "time_ids": np.tile(np.float32([8 * side, 8 * side, 0, 0, 8 * side, 8 * side]), (count, 1)),
        "contexts": rng.standard_normal((count, TOKENS, config["cross_attention_dim"]), dtype=np.float32),
        "pooled": rng.standard_normal((count, pooled_width), dtype=np.float32),
    }
