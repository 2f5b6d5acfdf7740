import math

import pytest

from latent_diffusion.errors import InputError
from latent_diffusion.guidance import ALL_STEPS, check_interval, scale_at


@pytest.mark.parametrize(("t", "expected"), [(99, 1.0), (100, 4.0), (500, 4.0), (800, 4.0), (800.5, 1.0), (999, 1.0)])
def test_guidance_acts_inside_the_interval_and_at_its_ends(t, expected):
    assert scale_at(t, 1000, 4.0, (0.1, 0.8)) == expected


@pytest.mark.parametrize("t", [0, 0.3, 1, 999, 1000])
def test_by_default_guidance_acts_everywhere(t):
    assert scale_at(t, 1000, 4.0, ALL_STEPS) == 4.0


@pytest.mark.parametrize("interval", [(0.8, 0.1), (0.5, 0.5), (-0.1, 1), (0, 1.1), (math.nan, 1), (0, math.inf)])
def test_an_interval_that_cannot_be_is_refused(interval):
    with pytest.raises(InputError, match=f"guidance interval {interval[0]:g} to {interval[1]:g} must have 0 <= low"):
        check_interval(interval)


@pytest.mark.parametrize("interval", [(0, 1), (0.1, 0.8), (0, 0.001)])
def test_other_intervals_are_taken(interval):
    check_interval(interval)
