import pytest

from dit.configuration import DiTConfig
from dit.export import find_config, load_network
from latent_diffusion.errors import InputError

from ..conftest import DATA


@pytest.fixture
def config_file(dit, tmp_path):
    """A configuration that does not say which timestep convention the file has."""
    values = dit.config.to_dict() | {"timestep_convention": "ppdiffusers"}
    DiTConfig.from_dict(values).save(tmp_path / "config.json")
    return tmp_path / "config.json"


def test_an_official_file_gives_the_official_network(dit, config_file):
    path = DATA / "official.pt"
    config = find_config(path, config_file)
    assert config.timestep_convention == "official"
    network, expected = load_network(path, config), dit.state_dict()
    for name, tensor in network.state_dict().items():
        assert bool((tensor == expected[name]).all()), name


def test_an_official_file_of_another_model_is_refused(config_file):
    config = DiTConfig.from_dict(DiTConfig.from_json(config_file).to_dict() | {"num_layers": 4})
    with pytest.raises(InputError, match=r"official\.pt lacks the weight blocks\.3\."):
        load_network(DATA / "official.pt", config)
