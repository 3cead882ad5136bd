"""Reads a pattern expression from text, as `repr` writes it: names, numbers, lists and `& | ~`, nothing else."""

from __future__ import annotations

import ast
import difflib
import importlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from chronotope import patterns
from chronotope.errors import ChronotopeError
from chronotope.patterns import Pattern

PRIMITIVES = (
    "along", "blocks", "causal", "full", "graph", "nothing", "per_head", "segments", "sinks", "strided", "window",
)  # fmt: skip
WORDS: dict[str, Callable[..., Pattern]] = {name: getattr(patterns, name) for name in PRIMITIVES}
Word = TypeVar("Word", bound=Callable[..., Pattern])


def word(make: Word) -> Word:
    """Makes a page's pattern readable: its `repr` must be a call of `make` by name, with what text can say."""
    if make.__name__ in WORDS:
        raise ChronotopeError(f"the pattern {make.__name__!r} is known already: give it another name.")
    WORDS[make.__name__] = make
    return make


def known_words() -> dict[str, Callable[..., Pattern]]:
    """Every word, those of the pages too."""
    # The one import upwards: a file names a pattern of a page, and whoever reads it need not know which page.
    importlib.import_module("chronotope.papers").papers()
    return WORDS


def parse_pattern(text: str) -> Pattern:
    """The pattern that an expression such as `window(t=5, h=9) & causal("t")` names.

    Raises ChronotopeError for anything else; an unknown name is answered with the near ones.
    """
    if not isinstance(text, str):
        raise ChronotopeError(f"{text!r} is not a pattern expression; expected text such as window(t=5) & causal('t').")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ChronotopeError(
            f"{text!r} is not a pattern expression ({getattr(error, 'msg', error)}); write window(t=5) & causal('t')."
        ) from None
    value = _read(tree.body, text)
    if not isinstance(value, Pattern):
        raise ChronotopeError(f"{text!r} is not a pattern; write for example window(t=5, h=9) & causal('t').")
    return value


def unknown_name(kind: str, name: str, known: list[str]) -> ChronotopeError:
    """The error for a name that is not there, with the near ones, or all."""
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(sorted(known))}."
    return ChronotopeError(f"unknown {kind} {name!r}: {hint}")


def named(kind: str, names: Iterable[str] | None, known: Iterable[str]) -> list[str]:
    """The names asked for; None or none: all that are known. Raises ChronotopeError on one that is not."""
    known = list(known)
    names = list(names or known)
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)
    return names


def _read(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.List(elts=items):
            return [_read(item, text) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_read(item, text) for item in items)
        case ast.Dict(keys=keys, values=values) if all(key is not None for key in keys):
            return {_read(k, text): _read(v, text) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_pattern(operand, text)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return _pattern(left, text) & _pattern(right, text)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _pattern(left, text) | _pattern(right, text)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _list(left, text) + _list(right, text)
        case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int() as times)):
            return _list(left, text) * times
        case ast.Call(func=ast.Attribute(value=ast.Name(id="route") | ast.Attribute(attr="route"), attr=name)):
            return _route(name, node, text)
        case ast.Call(
            func=ast.Name(id=name) | ast.Attribute(value=ast.Name(id="ct"), attr=name), args=args, keywords=keywords
        ):
            if name not in WORDS and name not in known_words():
                raise unknown_name("pattern", name, list(WORDS))
            named = {keyword.arg: _read(keyword.value, text) for keyword in keywords if keyword.arg}
            try:
                return WORDS[name](*(_read(arg, text) for arg in args), **named)
            except TypeError as error:
                raise ChronotopeError(f"{ast.unparse(node)}: {error}") from None
    raise ChronotopeError(f"{ast.unparse(node)!r} in {text!r} is not part of a pattern expression.")


def _route(name: str, node: ast.Call, text: str) -> Pattern:
    """What a function of `ct.route` makes of numbers."""
    known = importlib.import_module("chronotope.routing").route
    if name not in known.__all__:
        raise unknown_name("route", name, known.__all__)
    try:
        named = {keyword.arg: _read(keyword.value, text) for keyword in node.keywords if keyword.arg}
        return getattr(known, name)(*(_read(arg, text) for arg in node.args), **named)
    except TypeError as error:
        raise ChronotopeError(f"{ast.unparse(node)}: {error}") from None


def _pattern(node: ast.expr, text: str) -> Pattern:
    value = _read(node, text)
    if not isinstance(value, Pattern):
        raise ChronotopeError(f"{ast.unparse(node)!r} in {text!r} is not a pattern; `& | ~` join patterns.")
    return value


def _list(node: ast.expr, text: str) -> list[Any]:
    value = _read(node, text)
    if not isinstance(value, list):
        raise ChronotopeError(f"{ast.unparse(node)!r} in {text!r} is not a list; `+ *` join lists of ids.")
    return value
