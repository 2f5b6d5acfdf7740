"""`LoRAConfig` in JSON."""

import pytest

from latent_diffusion.errors import InputError
from sdxl_lora.configuration import LoRAConfig


def test_a_configuration_survives_its_file(tmp_path):
    config = LoRAConfig(rank=4, train_text_encoder=True)
    config.save(tmp_path / "config.json")
    assert LoRAConfig.from_json(tmp_path / "config.json") == config
    assert config.to_dict() == {"rank": 4, "train_text_encoder": True}
    assert LoRAConfig.from_dict({"rank": 4}) == LoRAConfig(4, False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "lacks the key 'rank'"),
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"rank": 2.5}, r"rank must be of type int, not 2\.5"),
        ({"rank": 4, "train_text_encoder": 1}, "train_text_encoder must be of type bool, not 1"),
        ({"rank": 4, "alpha": 8}, "unknown key 'alpha'; known are rank, train_text_encoder"),
    ],
)
def test_values_that_cannot_be_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        LoRAConfig.from_dict(values)
