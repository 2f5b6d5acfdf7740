import dataclasses
import inspect

import numpy as np
import paddle
import pytest
from paddle import nn

from latent_diffusion.attention import Attention
from latent_diffusion.errors import InputError
from latent_diffusion.token_merging import MergesTokens, TokenMerging, apply_tome, merged_calls, remove_tome

WIDTH, EXTRAS, SIDE = 8, 3, 4


class Block(nn.Layer):
    merging = None

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(WIDTH, 2), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        attend, feed = merged_calls(self.merging, x, EXTRAS, SIDE)
        x = x + attend(self.attn, x)
        return x + feed(self.mlp, x)


class Backbone(MergesTokens, nn.Layer):
    def __init__(self):
        super().__init__()
        self.blocks = nn.LayerList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def _merging_blocks(self):
        return self.blocks


@pytest.fixture(autouse=True)
def seeded():
    paddle.seed(0)


@pytest.fixture
def tokens():
    return paddle.randn([2, EXTRAS + SIDE**2, WIDTH])


@pytest.fixture
def backbone():
    return Backbone()


@pytest.fixture
def transformer():
    """The stock class that DiT is exported with, as small as it can be."""
    from ppdiffusers.models.transformer_2d import Transformer2DModel

    return Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
    ).eval()


def pipeline_of(unet, other=None):
    from ppdiffusers import DiffusionPipeline

    class Pipeline(DiffusionPipeline):
        def __init__(self, unet, other):
            super().__init__()
            self.register_modules(unet=unet, other=other)

    return Pipeline(unet, other)


def denoise(transformer) -> np.ndarray:
    paddle.seed(3)
    latents, zeros = paddle.randn([2, 4, 8, 8]), paddle.zeros([2], "int64")
    with paddle.no_grad():
        return transformer(latents, timestep=zeros, class_labels=zeros).sample.numpy()


def stock_merging(x, side: int, merging: TokenMerging):
    """(merge, unmerge) of ppdiffusers."""
    from ppdiffusers.patches.tomesd_patch_utils import bipartite_soft_matching_random2d

    merged = int(side**2 * merging.ratio)
    return bipartite_soft_matching_random2d(x, side, side, merging.sx, merging.sy, merged, not merging.use_rand)


# Sides that the cells divide, sides that they do not, a single cell, and a token of each cell that is drawn.
CASES = [
    (8, TokenMerging(0.25, use_rand=False)),
    (8, TokenMerging(0.5, use_rand=False)),
    (9, TokenMerging(0.7, use_rand=False)),
    (8, TokenMerging(0.8, sx=3, sy=4, use_rand=False)),
    (8, TokenMerging(0.8, sx=4, sy=3, use_rand=False)),
    (5, TokenMerging(0.74, sx=4, sy=1, use_rand=False)),
    (2, TokenMerging(0.5, use_rand=False)),
    (8, TokenMerging(0.5)),
    (7, TokenMerging(0.8, sx=3, sy=2)),
]


@pytest.mark.parametrize(("side", "merging"), CASES)
def test_tokens_are_merged_as_by_ppdiffusers(side, merging):
    x, h = paddle.randn([2, 2, side**2, WIDTH])
    attention = Attention(WIDTH, 2)
    paddle.seed(1)
    merge, unmerge = stock_merging(x, side, merging)
    paddle.seed(1)
    call, _ = merged_calls(merging, x, 0, side)
    for layer in (lambda h: h, paddle.tanh, attention):
        np.testing.assert_allclose(call(layer, h).numpy(), unmerge(layer(merge(h))).numpy(), rtol=0, atol=1e-6)


def test_image_tokens_are_matched_and_leading_tokens_kept():
    side, merging = 8, TokenMerging(0.5, use_rand=False)
    x, attention = paddle.randn([2, EXTRAS + side**2, WIDTH]), Attention(WIDTH, 2)
    merge, unmerge = stock_merging(x[:, EXTRAS:], side, merging)
    expected = attention(paddle.concat([x[:, :EXTRAS], merge(x[:, EXTRAS:])], axis=1))
    expected = paddle.concat([expected[:, :EXTRAS], unmerge(expected[:, EXTRAS:])], axis=1)
    call, _ = merged_calls(merging, x, EXTRAS, side)
    np.testing.assert_allclose(call(attention, x).numpy(), expected.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(call(lambda h: h, x)[:, :EXTRAS].numpy(), x[:, :EXTRAS].numpy())


def test_the_ratio_is_the_share_of_image_tokens_that_layers_do_not_see(tokens):
    seen = []
    call, _ = merged_calls(TokenMerging(0.3), tokens, EXTRAS, SIDE)
    call(lambda h: seen.append(h.shape) or h, tokens)
    assert seen == [[2, EXTRAS + 16 - 4, WIDTH]]


def test_tokens_are_drawn_for_even_batches_only():
    x = paddle.randn([3, SIDE**2, WIDTH])

    def merged(batch: int, seed: int) -> np.ndarray:
        paddle.seed(seed)
        return merged_calls(TokenMerging(0.5), x[:batch], 0, SIDE)[0](lambda h: h, x[:batch]).numpy()

    assert (merged(2, 0) != merged(2, 1)).any()
    np.testing.assert_array_equal(merged(3, 0), merged(3, 1))


@pytest.mark.parametrize("merging", [None, TokenMerging(0), TokenMerging(0.01), TokenMerging(0.5, merge_attn=False)])
def test_without_tokens_to_merge_layers_are_given_what_there_is(merging, tokens):
    for call in merged_calls(merging, tokens, EXTRAS, SIDE):
        assert call(lambda h: h, tokens) is tokens


@pytest.mark.parametrize("around_attention", [True, False])
@pytest.mark.parametrize("around_mlp", [True, False])
def test_attention_and_mlp_are_chosen_separately(around_attention, around_mlp, tokens):
    merging = TokenMerging(0.5, merge_attn=around_attention, merge_mlp=around_mlp)
    calls = merged_calls(merging, tokens, EXTRAS, SIDE)
    assert [call(lambda h: h, tokens) is not tokens for call in calls] == [around_attention, around_mlp]


@pytest.mark.parametrize("place", [0, 1])
def test_a_token_of_zeros_is_like_no_other(place, tokens):
    """Whether others are merged into it or it could be merged itself."""
    x = paddle.ones([2, SIDE**2, WIDTH])
    x[:, place] = 0
    h = tokens[:, EXTRAS:]
    call, _ = merged_calls(TokenMerging(0.5, use_rand=False), x, 0, SIDE)
    merged = call(lambda h: h, h)
    np.testing.assert_array_equal(merged[:, place].numpy(), h[:, place].numpy())
    assert (merged != h).any()


def test_gradients_reach_every_token(tokens):
    tokens.stop_gradient = False
    call, _ = merged_calls(TokenMerging(0.5), tokens, EXTRAS, SIDE)
    call(lambda h: h, tokens).sum().backward()
    # Mean and copies: the sum over a group stays what it is.
    np.testing.assert_allclose(tokens.grad.numpy(), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"ratio": 0.75}, r"0\.75.*sx 2 and sy 2"),
        ({"ratio": -0.1}, r"-0\.1"),
        ({"ratio": float("nan")}, "nan"),
        ({"ratio": 0.5, "sx": 2, "sy": 1}, r"0\.5.*sx 2 and sy 1"),
        ({"sx": 0}, "sx"),
        ({"sy": -1}, "sy"),
        ({"max_downsample": 0}, "max_downsample"),
    ],
)
def test_values_out_of_range_are_named(arguments, named):
    with pytest.raises(InputError, match=named):
        TokenMerging(**arguments)


def test_an_image_smaller_than_a_cell_is_named(tokens):
    with pytest.raises(InputError, match="5 x 2 tokens; these have 4 x 4"):
        merged_calls(TokenMerging(0.5, sx=5), tokens, EXTRAS, SIDE)
    merged_calls(TokenMerging(0, sx=5), tokens, EXTRAS, SIDE)  # nothing to merge


def test_arguments_and_defaults_are_those_of_ppdiffusers():
    from ppdiffusers import DiffusionPipeline

    stock = list(inspect.signature(DiffusionPipeline.apply_tome).parameters.values())[1:]
    assert [(field.name, field.default) for field in dataclasses.fields(TokenMerging)] == [
        (parameter.name, parameter.default) for parameter in stock
    ]


def test_a_backbone_merges_until_told_otherwise(backbone, tokens):
    import ppdiffusers  # noqa: F401  gives every layer an `apply_tome` of its own

    before = backbone(tokens).numpy()
    assert backbone.apply_tome(0.5, use_rand=False) is backbone
    assert [block.merging for block in backbone.blocks] == [TokenMerging(0.5, use_rand=False)] * 2
    assert (backbone(tokens).numpy() != before).any()
    assert backbone.remove_tome() is backbone
    np.testing.assert_array_equal(backbone(tokens).numpy(), before)


def test_a_ratio_of_zero_gives_the_same_bits(backbone, tokens):
    before = backbone(tokens).numpy()
    np.testing.assert_array_equal(backbone.apply_tome(ratio=0)(tokens).numpy(), before)


def test_the_pipelines_own_apply_tome_reaches_a_backbone(backbone, tokens):
    pipe, before = pipeline_of(backbone, nn.Linear(2, 2)), backbone(tokens).numpy()
    pipe.apply_tome(ratio=0.25, merge_mlp=True)
    assert [block.merging for block in backbone.blocks] == [TokenMerging(0.25, merge_mlp=True)] * 2
    pipe.apply_tome(ratio=0.5)
    assert [block.merging for block in backbone.blocks] == [TokenMerging(0.5)] * 2
    pipe.remove_tome()
    np.testing.assert_array_equal(backbone(tokens).numpy(), before)


@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: nn.Sequential(b), lambda b: pipeline_of(b)])
def test_apply_tome_finds_a_backbone_wherever_it_is(wrap, backbone):
    holder = wrap(backbone)
    assert apply_tome(holder, ratio=0.25) is holder
    assert [block.merging for block in backbone.blocks] == [TokenMerging(0.25)] * 2
    assert remove_tome(holder) is holder
    assert [block.merging for block in backbone.blocks] == [None] * 2


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: pipeline_of(t)])
def test_apply_tome_merges_in_a_stock_dit(wrap, transformer):
    before, holder = denoise(transformer), wrap(transformer)
    assert apply_tome(holder, ratio=0.5) is holder
    assert (denoise(transformer) != before).any()
    remove_tome(holder)
    np.testing.assert_array_equal(denoise(transformer), before)


def test_where_nothing_can_merge_the_class_is_named():
    with pytest.raises(InputError, match="Linear has no blocks that can merge tokens"):
        apply_tome(nn.Linear(2, 2))
    with pytest.raises(InputError, match="Pipeline has no blocks"):
        apply_tome(pipeline_of(nn.Linear(2, 2)))


def test_applying_again_replaces_and_removing_again_does_nothing(transformer):
    before = denoise(transformer)
    apply_tome(transformer, ratio=0.25)
    once = denoise(transformer)
    apply_tome(transformer, ratio=0.5)
    apply_tome(transformer, ratio=0.25)
    np.testing.assert_array_equal(denoise(transformer), once)
    remove_tome(transformer)
    remove_tome(transformer)
    np.testing.assert_array_equal(denoise(transformer), before)


def test_a_stock_dit_in_training_mode_merges_nothing(transformer):
    for block in transformer.transformer_blocks:
        block.train()
    before = denoise(transformer)
    apply_tome(transformer, ratio=0.5)
    np.testing.assert_array_equal(denoise(transformer), before)
