import pytest

from air_core.methods import EMBEDDED, METHODS
from air_core.settings import Ref
from air_core.settings.flat import from_flat, to_flat, trial_keys
from orchestrator.spec import presets

REFS = {key: Ref(name=name, digest=key) for key, name in EMBEDDED.items()}
OTHER_WORLD = {"backbone": "ViT-B-32/openai", "generator": "sd15"}


@pytest.mark.parametrize("name", METHODS)
def test_the_defaults_of_every_method_are_a_trial_with_its_pins(name):
    method, keys = METHODS[name], trial_keys().keys()
    for world in ({}, OTHER_WORLD):
        spec = from_flat(presets.defaults(name, world), REFS)
        assert method.pins.items() <= to_flat(spec).items()
    assert {method.host, method.control} - {None} <= METHODS.keys() - {name}
    assert method.pins.keys() | method.sets.keys() <= keys
    assert not method.pins.keys() & method.sets.keys()


def test_a_method_with_images_differs_from_its_host_only_in_images():
    for name in ("air", "air_fpl", "air_grip"):
        method = METHODS[name]
        host = METHODS[method.host]
        without = {"images_per_class", "auxiliary.source", "fusion_weight", "synthetic_weight"}
        shared = host.pins.keys() - without
        assert method.pins == {key: host.pins[key] for key in shared}
