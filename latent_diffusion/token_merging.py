"""Token merging: blocks that work on fewer tokens, by averaging image tokens that are alike and copying back.

D. Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461; for diffusion D. Bolya, J. Hoffman, "Token
Merging for Fast Stable Diffusion", arXiv 2303.17604. ppdiffusers has the latter in `patches/tomesd_patch_utils.py` for
its `BasicTransformerBlock` alone; arguments, defaults and results are the same here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import paddle
from paddle import nn

from .errors import InputError

TokenFunction = Callable[[paddle.Tensor], paddle.Tensor]
# `call(layer, h)` is the layer applied to tokens h [B, N, D], all of them or merged.
Call = Callable[[TokenFunction, paddle.Tensor], paddle.Tensor]

# Below every cosine: sorts the tokens that are never merged behind the others.
NEVER = -2.0


@dataclasses.dataclass(frozen=True)
class TokenMerging:
    """What is merged; arguments and defaults of ppdiffusers' `apply_tome`.

    Args:
        ratio: share of the image tokens that is merged into others, in [0, 1 - 1 / (sx * sy)); 0 changes nothing.
        max_downsample: merges in layers of at most this downsampling. Transformers have one resolution, that of no
            downsampling: any value has the same effect.
        sx, sy: columns and rows of the cells of which one token each is merged into, and is never merged itself.
        use_rand: draws that token from Paddle's generator, alike for a whole batch; without it, and for a batch of
            odd size, it is the top left one. Guidance that computes its halves apart would draw differently for each.
        merge_attn: merges around self-attention.
        merge_crossattn: no effect, as there is no cross-attention.
        merge_mlp: merges around the MLP.

    Raises:
        InputError: a value is out of range.
    """

    ratio: float = 0.5
    max_downsample: int = 1
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False

    def __post_init__(self):
        for name in ("max_downsample", "sx", "sy"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of token merging must be at least 1; it is {getattr(self, name)}")
        limit = 1 - 1 / (self.sx * self.sy)
        if not 0 <= self.ratio < limit:
            raise InputError(
                f"the ratio of token merging must be at least 0 and less than 1 - 1 / (sx * sy) = {limit:g}; "
                f"it is {self.ratio:g} with sx {self.sx} and sy {self.sy}"
            )


def merged_calls(merging: TokenMerging | None, x: paddle.Tensor, extras: int, side: int) -> tuple[Call, Call]:
    """How a transformer block calls its attention and its MLP.

    Args:
        merging: None for no merging.
        x: what the block is given, [B, extras + side * side, D]; its image tokens, row by row, decide what is merged.
        extras: leading tokens (time, text) that are never merged.
        side: tokens in a row of the square image.

    Returns:
        (around attention, around the MLP): each is `call(layer, h)` for h [B, N, D], which is
        `unmerge(layer(merge(h)))`, or `layer(h)` itself where nothing is merged.

    Raises:
        InputError: the image is smaller than a cell.
    """
    merged = _merged_count(merging, side) if merging else 0
    if not merged:
        return _call, _call
    groups = _group_tokens(merging, x, extras, side, merged)
    call = _merged_call(groups, x.shape[1] - merged)
    return call if merging.merge_attn else _call, call if merging.merge_mlp else _call


def _call(layer: TokenFunction, h: paddle.Tensor) -> paddle.Tensor:
    return layer(h)


def _merged_count(merging: TokenMerging, side: int) -> int:
    """How many tokens of each image go into others."""
    merged = int(side**2 * merging.ratio)
    if merged and side < max(merging.sx, merging.sy):
        raise InputError(
            f"token merging needs images of at least sx x sy = {merging.sx} x {merging.sy} tokens; "
            f"these have {side} x {side}: take smaller sx and sy"
        )
    return merged


@paddle.no_grad()
def _group_tokens(merging: TokenMerging, x: paddle.Tensor, extras: int, side: int, merged: int) -> paddle.Tensor:
    """Which of the remaining tokens each token becomes: int64 [B, N] in [0, N - merged)."""
    draw = merging.use_rand and x.shape[0] % 2 == 0
    targets = extras + _targets(side, merging.sx, merging.sy, draw)
    x = x.astype("float32")
    # Products in place of `norm`, whose kernel takes longer than all the rest on a CPU.
    squares = paddle.matmul(x * x, paddle.ones([x.shape[-1], 1]))
    unit = x * paddle.rsqrt(squares + 1e-12)
    similarity = paddle.matmul(unit, unit.gather(targets, axis=1), transpose_y=True)
    kept = paddle.concat([paddle.arange(extras), targets])
    best = paddle.index_fill(similarity.max(axis=-1), kept, 1, NEVER)
    # Place of each token when the most similar ones, those to merge, come first: the others remain.
    place = best.argsort(axis=1, descending=True).argsort(axis=1)
    target = paddle.take_along_axis(place.gather(targets, axis=1), similarity.argmax(axis=-1), axis=1)
    return paddle.where(place < merged, target, place) - merged


def _targets(side: int, sx: int, sy: int, draw: bool) -> paddle.Tensor:
    """One token of each whole cell of sy x sx tokens, drawn or the top left one: int64 [cells]."""
    cells = [side // sy, side // sx]
    offsets = paddle.randint(sy * sx, shape=cells) if draw else paddle.zeros(cells, "int64")
    rows = sy * paddle.arange(cells[0]).unsqueeze(1) + offsets // sx
    columns = sx * paddle.arange(cells[1]) + offsets % sx
    return (rows * side + columns).flatten()


def _merged_call(groups: paddle.Tensor, remaining: int) -> Call:
    """`call(layer, h)`: the layer on the mean of each group; every member is given what comes of it.

    On a CPU, adding and copying whole rows takes less than half the time of products with a one-hot matrix.
    """
    batch, tokens = groups.shape
    rows = (groups + remaining * paddle.arange(batch).unsqueeze(1)).flatten()
    sizes = _sum_rows(paddle.ones([batch * tokens, 1]), rows, batch * remaining)

    def call(layer: TokenFunction, h: paddle.Tensor) -> paddle.Tensor:
        sums = _sum_rows(h.reshape([batch * tokens, -1]), rows, batch * remaining)
        means = sums / sizes.astype(h.dtype).expand(sums.shape)
        out = layer(means.reshape([batch, remaining, -1]))
        return out.reshape([batch * remaining, -1]).gather(rows).reshape([batch, tokens, -1])

    return call


def _sum_rows(values: paddle.Tensor, rows: paddle.Tensor, count: int) -> paddle.Tensor:
    """Adds row i of `values` [M, D] to row `rows[i]` of the result [count, D]."""
    return paddle.index_add(paddle.zeros([count, values.shape[1]], values.dtype), rows, 0, values)


class MergesTokens:
    """Mixin for backbones whose blocks have an attribute `merging`; to be named before `nn.Layer`.

    ppdiffusers gives every layer and pipeline an `apply_tome` of its own, which knows nothing but its own blocks. A
    backbone's is this one; the pipeline's finds it through `_tome_info`.
    """

    def _merging_blocks(self) -> Iterable[nn.Layer]:
        """The blocks that call `merged_calls(self.merging, ...)`."""
        raise NotImplementedError

    def apply_tome(self, *args: Any, **kwargs: Any) -> "MergesTokens":
        """Merges tokens from now on; the arguments are those of `TokenMerging`. Returns the backbone itself.

        Raises:
            InputError: a value is out of range.
        """
        self._set_merging(TokenMerging(*args, **kwargs))
        return self

    def remove_tome(self) -> "MergesTokens":
        """Merges tokens no longer. Returns the backbone itself."""
        self._set_merging(None)
        return self

    def _set_merging(self, merging: TokenMerging | None) -> None:
        for block in self._merging_blocks():
            block.merging = merging

    @property
    def _tome_info(self) -> dict[str, Any]:
        """What the `apply_tome` of a ppdiffusers pipeline sets on each component and its `remove_tome` undoes."""
        return {"hooks": [SimpleNamespace(remove=self.remove_tome)]}

    @_tome_info.setter
    def _tome_info(self, info: dict[str, Any]) -> None:
        self.apply_tome(**info["args"])


def apply_tome(model_or_pipe, *args: Any, **kwargs: Any):
    """Merges tokens in a backbone, in ppdiffusers' transformers and U-Nets, or in a pipeline with any of them.

    `pipe.apply_tome()` of ppdiffusers leaves its own DiT as it is: it counts patches of 2 as a downsampling of 2, and
    `max_downsample` is 1 by default. Here its DiT (square images) merges as our backbones do, which on a CPU takes a
    seventh of the time of ppdiffusers' scattering. Others merge as in ppdiffusers; their `max_downsample` is counted
    from the resolution of the tokens.

    Args:
        model_or_pipe: an `nn.Layer` or a ppdiffusers pipeline.
        args, kwargs: those of `TokenMerging`.

    Returns:
        `model_or_pipe`.

    Raises:
        InputError: a value is out of range, or nothing in it can merge tokens.
    """
    from ppdiffusers.models.attention import BasicTransformerBlock

    merging = TokenMerging(*args, **kwargs)
    parts = [model_or_pipe] if isinstance(model_or_pipe, nn.Layer) else model_or_pipe.components.values()
    layers = [part for part in parts if isinstance(part, nn.Layer)]
    backbones = [
        part for layer in layers for part in layer.sublayers(include_self=True) if isinstance(part, MergesTokens)
    ]
    stock = [layer for layer in layers if any(isinstance(part, BasicTransformerBlock) for part in layer.sublayers())]
    if not backbones and not stock:
        raise InputError(
            f"{type(model_or_pipe).__name__} has no blocks that can merge tokens; apply_tome needs a DiT, a U-ViT of "
            "this project, or a network of ppdiffusers' BasicTransformerBlock"
        )
    for backbone in backbones:
        backbone.apply_tome(*args, **kwargs)
    for layer in stock:
        blocks = [part for part in layer.sublayers() if isinstance(part, BasicTransformerBlock)]
        if layer.config.get("patch_size") and all(block.attn2 is None for block in blocks):
            layer.remove_tome()  # ppdiffusers', which calls `remove` of these
            layer._tome_info = {"hooks": [_MergingBlock(block, merging) for block in blocks]}
        else:
            downsample = merging.max_downsample * (layer.config.get("patch_size") or 1)
            layer.apply_tome(**dataclasses.asdict(merging) | {"max_downsample": downsample})
    return model_or_pipe


class _MergingBlock:
    """Merging around the layers of a `BasicTransformerBlock` without cross-attention, until `remove`."""

    def __init__(self, block: nn.Layer, merging: TokenMerging):
        self.block, self.merging = block, merging
        self.hook = block.register_forward_pre_hook(self._begin)
        for number, layer in enumerate(self._layers()):
            layer.forward = functools.partial(self._forward, number, layer.forward)

    def remove(self) -> None:
        """Gives the block its own layers back."""
        self.hook.remove()
        for layer in self._layers():
            del layer.forward

    def _layers(self) -> tuple[nn.Layer, nn.Layer]:
        return self.block.attn1, self.block.ff

    def _begin(self, block: nn.Layer, inputs: tuple[paddle.Tensor, ...]) -> None:
        x = inputs[0]
        merging = None if block.training else self.merging
        self.calls = merged_calls(merging, x, extras=0, side=math.isqrt(x.shape[1]))

    def _forward(self, number: int, forward: TokenFunction, h: paddle.Tensor, *args: Any, **kwargs: Any):
        return self.calls[number](lambda tokens: forward(tokens, *args, **kwargs), h)


def remove_tome(model_or_pipe):
    """Undoes `apply_tome`. Returns `model_or_pipe`."""
    return model_or_pipe.remove_tome()
