import pytest

from air_core.components import STRATEGIES
from air_core.methods import EMBEDDED, METHODS
from air_core.specs import Ref
from air_core.specs.conditions import uses_images
from air_core.specs.flat import from_flat, to_flat, trial_keys
from orchestrator.spec import presets

REFS = {key: Ref(name=name, digest=key) for key, name in EMBEDDED.items()}
OTHER_WORLD = {"backbone": "ViT-B-32/openai", "generator": "sd15"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("names", [{}, OTHER_WORLD], ids=["tiny", "large"])
def test_the_defaults_of_every_method_are_a_trial_with_its_pins(method, names):
    flat = presets.defaults(method, names)
    spec = from_flat(flat, REFS)
    assert METHODS[method].pins.items() <= to_flat(spec).items()


@pytest.mark.parametrize(("names", "precision"), [({}, "fp32"), (OTHER_WORLD, "tf32")])
def test_real_models_use_tf32_and_the_embedded_one_fp32(names, precision):
    assert from_flat(presets.defaults("cpl", names), REFS).precision == precision


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


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_method_that_learns_without_images_can_use_every_pseudo_label_strategy(kind):
    trial = METHODS["pseudo"].trial({"pseudo_labels.kind": kind, "iterations": 3})
    assert (trial.pseudo_labels.kind, trial.iterations) == (kind, 3)
    assert not uses_images(trial)


def test_a_method_with_zero_images_per_class_uses_no_images():
    for name, method in METHODS.items():
        spec = from_flat(presets.defaults(name, {}), REFS)
        other = method.pins["images_from"] in ("lora_images", "true_labels")
        assert uses_images(spec) == (method.pins.get("images_per_class") != 0 and not other), name


def test_a_method_with_images_differs_from_its_host_only_in_images():
    for name in ("air", "air_fpl", "air_grip"):
        method = METHODS[name]
        host = METHODS[method.host]
        without = {"images_per_class", "auxiliary.source", "fusion_weight", "synthetic_weight"}
        shared = host.pins.keys() - without
        assert method.pins == {key: host.pins[key] for key in shared}


def test_defaults_depend_on_the_selected_weights():
    assert presets.defaults("cpl_real", {})["auxiliary.kind"] == "lda"
    assert "auxiliary.kind" not in presets.defaults("cpl_real", OTHER_WORLD)


def test_air_has_one_structure_in_every_world():
    structure = METHODS["air"].sets
    assert structure.items() <= presets.defaults("air", {}).items()
    assert structure.items() <= presets.defaults("air", OTHER_WORLD).items()
