"""The table of methods, and trials of it without a sweep."""

from __future__ import annotations

import pytest

from air_core.methods import METHODS
from air_core.settings.normal import normalised


def test_a_trial_has_the_pins_of_its_method_and_the_settings_given():
    trial = METHODS["cpl_real"].trial({"train.steps": 7, "seed": 3})
    assert (trial.train.steps, trial.seed) == (7, 3)
    assert (trial.auxiliary.source, trial.auxiliary.refresh) == ("real", True)
    assert trial == normalised(trial)
    assert not METHODS["cpl_real"].trial({"auxiliary.refresh": False}).auxiliary.refresh


def test_a_pinned_key_with_another_value_is_an_error():
    with pytest.raises(ValueError, match="the method pins iterations to 1"):
        METHODS["fpl"].trial({"iterations": 2})
    assert METHODS["fpl"].trial({"iterations": 1}) == METHODS["fpl"].trial()
