"""The language of `when:`: comparisons of trial keys with constants, joined by and, or, not.

It is a small subset of Python's grammar, parsed with `ast` and never executed.
"""

from __future__ import annotations

import ast
import operator
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

ALLOWED = "trial keys, constants, lists, == != < <= > >= in, and, or, not"
MAX_LENGTH = 500
MAX_DEPTH = 20

Values = dict[str, Any]
Term = Callable[[Values], Any]

# YAML's names of the constants; no trial key has these names.
_CONSTANTS = {"true": True, "false": False, "null": None}


def compile_when(text: str) -> Callable[[Values], bool]:
    """Compile a condition to a function of a trial's flat settings.

    A key without a value is null, and `<`, `<=`, `>` and `>=` are false for null. A section that
    can be off, such as `lora`, is true when it is on. The function raises TypeError if it compares
    values without an order, such as text with a number.

    Raises:
        ValueError: the text is not a valid condition.

    >>> compile_when("images_per_class > 0 and lora.rank in [4, 8]")({"images_per_class": 9})
    False
    """
    term = _term(_parse(text))
    return lambda values: bool(term(values))


def names_of(text: str) -> tuple[str, ...]:
    """The keys in a condition, without repeats, in the order of their first use.

    >>> names_of("0 < fusion_weight < 1 or lora.rank == 4")
    ('fusion_weight', 'lora.rank')
    """
    return tuple(dict.fromkeys(_names(_parse(text))))


def constants_of(text: str) -> tuple[tuple[str, Any], ...]:
    """Pairs of a key and a constant that `==`, `!=`, `in` or `not in` compares it with.

    >>> constants_of("auxiliary.kind in ['lda'] and iterations > 3")
    (('auxiliary.kind', 'lda'),)
    """
    return tuple(_constants(_parse(text)))


def numbers_of(text: str) -> tuple[float, ...]:
    """The numbers in a condition, each with both signs; without those that no float can hold.

    >>> numbers_of("0.5 < fusion_weight and iterations in [1, 2]")
    (0.5, -0.5, 1, -1, 2, -2)
    """
    constants = [node.value for node in ast.walk(_parse(text)) if isinstance(node, ast.Constant)]
    numbers = [value for value in constants if isinstance(value, int | float)]
    numbers = [value for value in numbers if abs(value) <= sys.float_info.max]
    return tuple(signed for number in numbers for signed in (number, -number))


@cache
def _parse(text: str) -> ast.expr:
    text = text.replace("\n", " ").strip()
    if len(text) > MAX_LENGTH:
        raise ValueError(f"the condition is too long; allowed: up to {MAX_LENGTH} characters")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is not a valid condition; allowed: {ALLOWED}") from None
    if _depth(tree) > MAX_DEPTH:  # before `_term`, which is recursive
        raise ValueError(f"the condition is nested too deeply; allowed: up to {MAX_DEPTH} levels")
    _term(tree)
    return tree


def _depth(tree: ast.AST) -> int:
    depth, level = 0, [tree]
    while level:
        depth += 1
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


def _term(node: ast.expr) -> Term:
    match node:
        case ast.BoolOp(op=joiner, values=parts):
            terms = [_term(part) for part in parts]
            fold = all if isinstance(joiner, ast.And) else any
            # Evaluate every part, so that an invalid comparison always raises.
            return lambda values: fold([term(values) for term in terms])
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            term = _term(inner)
            return lambda values: not term(values)
        case ast.Compare(left=left, ops=ops, comparators=rights):
            return _comparison([_term(part) for part in (left, *rights)], ops, rights)
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            terms = [_term(part) for part in parts]
            return lambda values: [term(values) for term in terms]
        case ast.Name() | ast.Attribute() if _constant(node) is None:
            name = _name(node)
            return lambda values: lookup(values, name)
    constant = _constant(node)
    if constant is None:
        raise ValueError(f"{ast.unparse(node)!r} is not allowed in a condition; allowed: {ALLOWED}")
    return lambda _: constant[0]


def _comparison(terms: list[Term], ops: list[ast.cmpop], rights: list[ast.expr]) -> Term:
    tests = []
    for op, right in zip(ops, rights, strict=True):
        membership = isinstance(op, ast.In | ast.NotIn)
        if type(op) not in _TESTS or membership != isinstance(right, ast.Tuple | ast.List):
            raise ValueError(
                f"this operator does not accept {ast.unparse(right)!r}: `in` needs a list, "
                f"other operators need a single value; allowed: {ALLOWED}"
            )
        tests.append(_TESTS[type(op)])

    def holds(values: Values) -> bool:
        operands = [term(values) for term in terms]
        results = [test(operands[i], operands[i + 1]) for i, test in enumerate(tests)]
        return all(results)

    return holds


def _ordered(test: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda a, b: a is not None and b is not None and test(a, b)


_TESTS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: _ordered(operator.lt),
    ast.LtE: _ordered(operator.le),
    ast.Gt: _ordered(operator.gt),
    ast.GtE: _ordered(operator.ge),
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def lookup(values: Values, name: str) -> Any:
    """The value of a key; True for a section that is on; None if the key has no value."""
    if name in values:
        return values[name]
    return True if any(key.startswith(f"{name}.") for key in values) else None


def _name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=owner, attr=name):
            return f"{_name(owner)}.{name}"
    raise ValueError(f"{ast.unparse(node)!r} is not a trial key; allowed: {ALLOWED}")


def _constant(node: ast.expr) -> tuple[Any] | None:
    """The constant in a 1-tuple, since a constant can be None; None if the node is not constant."""
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return (value,)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return (-value,)
        case ast.Name(id=name) if name in _CONSTANTS:
            return (_CONSTANTS[name],)
    return None


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name | ast.Attribute):
        if _constant(node) is None:
            yield _name(node)
        return
    for child in ast.iter_child_nodes(node):
        yield from _names(child)


def _constants(tree: ast.expr) -> Iterator[tuple[str, Any]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        for op, left, right in zip(node.ops, sides, sides[1:], strict=False):
            if not isinstance(op, ast.Eq | ast.NotEq | ast.In | ast.NotIn):
                continue
            for member in right.elts if isinstance(right, ast.Tuple | ast.List) else [right]:
                for key, other in ((left, member), (member, left)):
                    constant = _constant(other)
                    if (
                        constant
                        and not _constant(key)
                        and isinstance(key, ast.Name | ast.Attribute)
                    ):
                        yield _name(key), constant[0]
