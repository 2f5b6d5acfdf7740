import pytest

from benchmarks.flops import forward_flops
from dit.configuration import DiTConfig
from uvit_ldm.configuration import UViTConfig


# Table 1 of the DiT paper counts multiply-adds.
@pytest.mark.parametrize(
    ("name", "gflops"), [("DiT-S/2", 6.06), ("DiT-B/4", 5.56), ("DiT-B/2", 23.01), ("DiT-XL/2", 118.64)]
)
def test_a_dit_has_the_published_flops(name, gflops):
    assert forward_flops(DiTConfig.from_name(name)) / 2e9 == pytest.approx(gflops, rel=1e-3)


def test_a_uvit_is_counted_by_hand():
    config = UViTConfig(4, 2, 1, 2, 1, 2, clip_dim=3, num_text_tokens=3)
    tokens, width = 8, 2  # time, 3 of text, 4 of image
    block = tokens * 4 * width**2 + 2 * tokens**2 * width + 2 * tokens * width * 8
    embeddings = 4 * 4 * width + 3 * 3 * width
    skip, decoder, convolution = tokens * 2 * width * width, tokens * width * 4, 16 * 9
    assert forward_flops(config) == 2 * (3 * block + embeddings + skip + decoder + convolution)
