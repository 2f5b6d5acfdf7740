"""ppdiffusers' transformer with the timestep frequencies of the official DiT, for folders exported with `--exact`."""

import functools

# ppdiffusers loads a component only if its module also names the base class it derives from.
from ppdiffusers.models.modeling_utils import ModelMixin  # noqa: F401
from ppdiffusers.models.transformer_2d import Transformer2DModel


class OfficialDiTTransformer2DModel(Transformer2DModel):
    """`Transformer2DModel` whose frequencies are exp(-ln(10000) i / 128), as published checkpoints were trained.

    The stock class divides by 127, which cannot be configured and cannot be folded into the weights.
    """

    # Wrapped, so that the loader sees which configuration keys the class takes.
    @functools.wraps(Transformer2DModel.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
