import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.spec._expressions import MAX_LENGTH, compile_when, constants_of, names_of

FLAT = {
    "images_per_class": 25,
    "fusion_weight": 0.5,
    "lora.rank": 4,
    "auxiliary.kind": "lda",
    "auxiliary.center": True,
    "train.steps": None,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("images_per_class > 0", True),
        ("images_per_class >= 26", False),
        ("0 < fusion_weight < 1", True),
        ("0 < fusion_weight < 0.5", False),
        ("lora.rank == 4 and auxiliary.kind == 'lda'", True),
        ("lora.rank != 4 or auxiliary.kind != 'lda'", False),
        ("not (lora.rank in [8, 16])", True),
        ("lora.rank not in (4, 8)", False),
        ("auxiliary.center", True),
        ("auxiliary.center == false", False),
        ("fusion_weight > -1", True),
        ("images_per_class > 0\n  and lora.rank > 2", True),
    ],
)
def test_a_condition_reads_dotted_keys_like_python(text, expected):
    assert compile_when(text)(FLAT) is expected


def test_a_section_is_true_when_it_is_on():
    assert compile_when("lora")(FLAT)
    assert not compile_when("lora")({"lora": None})
    assert compile_when("lora == null")({"lora": None})
    assert not compile_when("lora == null")(FLAT)


@pytest.mark.parametrize("sign", ["<", "<=", ">", ">="])
def test_null_is_not_ordered(sign):
    assert not compile_when(f"train.steps {sign} 5")(FLAT)
    assert not compile_when(f"lora.rank {sign} 5")({"lora": None})


def test_an_invalid_comparison_raises_even_if_another_part_decides_the_result():
    with pytest.raises(TypeError):
        compile_when("images_per_class < 0 and auxiliary.kind > 3")(FLAT)


def test_names_are_unique_and_constants_have_their_key():
    text = "lora.rank == 4 or 8 == lora.rank or auxiliary.kind in ['lda'] or fusion_weight > 1"
    assert names_of(text) == ("lora.rank", "auxiliary.kind", "fusion_weight")
    assert constants_of(text) == (("lora.rank", 4), ("lora.rank", 8), ("auxiliary.kind", "lda"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "images_per_class >",
        "images_per_class = 3",
        "__import__('os').system('true')",
        "(lambda: 1)()",
        "[x for x in (1, 2)]",
        "fusion_weight + 1 > 1",
        "'a' * 9999999999 == 'a'",
        "lora['rank'] == 4",
        "f'{lora}' == ''",
        "lora.rank if lora else 1",
        "(x := 3) > 2",
        "lora.rank is 4",
        "lora.rank in 4",
        "'l' in auxiliary.kind",
        "lora.rank == [4]",
        "b'a' == lora",
        "1j == lora.rank",
        "... == lora.rank",
        "{1} == lora.rank",
        "-'a' == lora.rank",
        "'a'.upper == lora.rank",
        "a; b",
        "import os",
        "(" * 400 + ")" * 400,
        "not " * 200 + "lora",
        "-" * 450 + "1",
        "\0",
        "\ud800",
    ],
)
def test_any_other_expression_is_refused(text):
    with pytest.raises(ValueError, match=r"allowed: trial keys|allowed: up to"):
        compile_when(text)


def test_a_long_condition_is_refused():
    with pytest.raises(ValueError, match=f"too long; allowed: up to {MAX_LENGTH} characters"):
        compile_when("lora or " * 100 + "lora")


@given(st.text(max_size=40))
def test_any_text_is_a_condition_or_a_value_error(text):
    try:
        condition = compile_when(text)
    except ValueError:
        return
    assert set(names_of(text)) >= {name for name, _ in constants_of(text)}
    try:
        condition(FLAT)
    except TypeError:
        return
