import pytest

from air_core.methods import EMBEDDED, METHODS
from air_core.settings import Ref
from air_core.settings.flat import from_flat, to_flat, trial_keys
from orchestrator.spec import presets

REFS = {key: Ref(name=name, digest=key) for key, name in EMBEDDED.items()}
OTHER_WORLD = {"backbone": "ViT-B-32/openai", "generator": "sd15"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("names", [{}, OTHER_WORLD], ids=["tiny", "large"])
def test_the_defaults_of_every_method_are_a_trial_with_its_pins(method, names):
    flat = presets.defaults(method, names)
    spec = from_flat(flat, REFS)
    assert METHODS[method].pins.items() <= to_flat(spec).items()


@pytest.mark.parametrize("name", [*METHODS])
def test_every_host_and_control_is_a_method(name):
    method = METHODS[name]
    assert {method.host, method.control} - {None} <= METHODS.keys()
    assert name not in (method.host, method.control)


def test_every_key_of_the_tables_is_a_trial_key():
    keys = trial_keys()
    for method in METHODS.values():
        assert method.pins.keys() | method.sets.keys() <= keys.keys()
        assert not method.pins.keys() & method.sets.keys()
    for (key, _), settings in presets.WORLDS.items():
        assert key in EMBEDDED
        assert settings.keys() <= keys.keys()


def test_a_method_with_images_differs_from_its_host_only_in_images():
    for name in ("air", "air_fpl", "air_grip"):
        method = METHODS[name]
        host = METHODS[method.host]
        without = {"images_per_class", "auxiliary.source", "fusion_weight", "synthetic_weight"}
        shared = host.pins.keys() - without
        assert method.pins == {key: host.pins[key] for key in shared}
