"""Selections: one expression over the columns of the key, or a list of sites.

    kind == "head" and layer in (3, 4) and not index == 7
    part == "W_in" and 2 <= layer < 5
    L3H7, L5N120, L3K2, embed

An expression is Python's syntax for names, literals, comparisons, ``in``, ``and``, ``or``, ``not``
and nothing else; it is read with ``ast`` and walked here, never evaluated by Python. A missing
value (the ``layer`` of an embedding) equals only ``None`` and is neither smaller nor larger than
any number. A list names sites or components as tables print them; it is looked up, not parsed.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, NoReturn

from .components import KINDS
from .errors import SelectionError

ColumnType = Literal["number", "text", "flag"]
KEY_TYPES: Mapping[str, ColumnType] = {
    "component": "text",
    "site": "text",
    "kind": "text",
    "layer": "number",
    "index": "number",
    "kv_index": "number",
    "expert": "number",
    "rank": "number",
    "part": "text",
    "base": "text",
    "tuned": "text",
    "tied": "flag",
}
"""The columns of the key and what their values are."""
MOST_CHARACTERS = 100_000
"""A list of a few thousand sites fits."""
DEEPEST = 100
"""Far beyond what people write; deeper nesting would exhaust Python's stack."""
_LIST = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*,?\Z")
_ORDER: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_SAME = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot)
_WITHIN = (ast.In, ast.NotIn)
_GRAMMAR = "It may hold column names, literals, comparisons, in, and, or, not and parentheses."


@dataclass(frozen=True)
class Selection:
    """A selection that has been read and checked.

    Attributes:
        text: As it was written.
        names: The sites or components of a list, empty for an expression.
        tree: The checked expression, None for a list.
    """

    text: str
    names: tuple[str, ...]
    tree: ast.expr | None

    @property
    def columns(self) -> frozenset[str]:
        """The columns that the expression reads; ``site`` and ``component`` for a list."""
        if self.tree is None:
            return frozenset({"site", "component"})
        return frozenset(n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name))

    def literals(self, column: str) -> frozenset[object]:
        """The literals that ``column`` is compared with anywhere in the expression."""
        found: set[object] = set()
        for node in ast.walk(self.tree) if self.tree is not None else ():
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                if any(isinstance(side, ast.Name) and side.id == column for side in sides):
                    found.update(value for side in sides for value in _literals(side))
        return frozenset(found)

    def accepts(self, row: Mapping[str, object]) -> bool:
        """Whether a row, given as its values by column, is selected."""
        if self.tree is None:
            return row["site"] in self.names or row["component"] in self.names
        return _truth(self.tree, row)


def parse_selection(text: str, columns: Mapping[str, ColumnType] = KEY_TYPES) -> Selection:
    """Read a selection.

    Args:
        text: An expression or a list of sites.
        columns: The columns that an expression may name, with the type of their values.

    Raises:
        SelectionError: It cannot be read, names an unknown column, or compares a column with a
            value that it never has; the message gives the position, counted from 1.
    """
    text = " ".join(text.split())
    if not text or len(text) > MOST_CHARACTERS:
        raise SelectionError(
            f"a selection must have 1 to {MOST_CHARACTERS} characters, got {len(text)}.",
            hint='Write for example kind == "head" and layer == 3, or L3H7,L5N120.',
        )
    if _LIST.match(text) and columns.get(text) != "flag":
        names = tuple(name for name in re.split(r"[\s,]+", text) if name)
        return Selection(text, names, None)
    tree = _parsed(text)
    _Checker(text, columns).condition(tree)
    return Selection(text, (), tree)


def _parsed(text: str) -> ast.expr:
    try:
        tree = ast.parse(text, mode="eval").body
        if _depth(tree) > DEEPEST:
            raise RecursionError
        return tree
    except SyntaxError as error:
        at = f" at position {error.offset}" if error.offset else ""
        raise SelectionError(
            f"the selection {text!r} cannot be read: {error.msg}{at}.", hint=_GRAMMAR
        ) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise SelectionError("the selection is too deeply nested.", hint=_GRAMMAR) from error


def _depth(tree: ast.expr) -> int:
    level, depth = [*ast.iter_child_nodes(tree)], 1
    while level:
        level, depth = [child for node in level for child in ast.iter_child_nodes(node)], depth + 1
    return depth


@dataclass(frozen=True)
class _Checker:
    """Walks an expression and refuses what has no meaning for the given columns."""

    text: str
    columns: Mapping[str, ColumnType]

    def condition(self, node: ast.expr) -> None:
        """Check a node that must be true or false."""
        match node:
            case ast.BoolOp():
                for value in node.values:
                    self.condition(value)
            case ast.UnaryOp(op=ast.Not()):
                self.condition(node.operand)
            case ast.Compare():
                sides = [node.left, *node.comparators]
                for first, op, second in zip(sides, node.ops, sides[1:], strict=False):
                    self.comparison(first, op, second)
            case ast.Name():
                if self.column(node) != "flag":
                    self.refuse(node, f"{node.id} alone is neither true nor false")
            case _:
                self.refuse(node, f"{ast.unparse(node)!r} is no condition")

    def comparison(self, first: ast.expr, op: ast.cmpop, second: ast.expr) -> None:
        """Check one comparison of a column with a literal or another column."""
        named = [side for side in (first, second) if isinstance(side, ast.Name)]
        for value in _literals(first, otherwise=self.refuse_literal) if not named else ():
            self.refuse(first, f"{value!r} is compared with no column")
        if not named:
            self.refuse(first, "a comparison needs a column")
        kind = self.column(named[0])
        if isinstance(op, _WITHIN):
            if not isinstance(first, ast.Name) or not _is_list(second):
                self.refuse(second, "in needs a column on its left and a list on its right")
        elif not isinstance(op, (*_SAME, *_ORDER)) or _is_list(first) or _is_list(second):
            self.refuse(second, "a list can only stand after in")
        ordered = isinstance(op, tuple(_ORDER))
        if ordered and kind != "number":
            self.refuse(named[0], f"{named[0].id} has no order")
        for side in (first, second):
            self.operand(side, named[0], kind, ordered=ordered)

    def operand(self, side: ast.expr, column: ast.Name, kind: ColumnType, *, ordered: bool) -> None:
        """Check that one side of a comparison can equal ``column``."""
        if isinstance(side, ast.Name):
            if self.column(side) != kind:
                self.refuse(side, f"{side.id} and {column.id} hold values of different types")
            return
        for value in _literals(side, otherwise=self.refuse_literal):
            if not (_type_of(value) == kind or (value is None and not ordered)):
                self.refuse(side, f"{column.id} holds {_EXAMPLE[kind]}, got {value!r}")
            if column.id == "kind" and value is not None and value not in KINDS:
                self.refuse(side, f"there is no kind {value!r}; kinds are {', '.join(KINDS)}")

    def column(self, node: ast.Name) -> ColumnType:
        """The type of the column that a name stands for."""
        if node.id not in self.columns:
            near = get_close_matches(node.id, self.columns, n=1)
            meant = (
                f"; did you mean {near[0]}?" if near else f"; there are {', '.join(self.columns)}"
            )
            self.refuse(node, f"there is no column {node.id!r}{meant}")
        return self.columns[node.id]

    def refuse_literal(self, node: ast.expr) -> NoReturn:
        """Refuse what is neither a name nor a literal."""
        self.refuse(node, f"{ast.unparse(node)!r} is neither a column nor a literal")

    def refuse(self, node: ast.expr, reason: str) -> NoReturn:
        """Raise the error that gives the position of ``node``."""
        before = self.text.encode("utf-8")[: node.col_offset].decode("utf-8")
        raise SelectionError(
            f"selection {self.text!r}, position {len(before) + 1}: {reason}.", hint=_GRAMMAR
        )


_EXAMPLE = {"number": "numbers", "text": "text in quotes", "flag": "True or False"}


def _type_of(value: object) -> ColumnType | None:
    if isinstance(value, bool):
        return "flag"
    if isinstance(value, (int, float)):
        return "number"
    return "text" if isinstance(value, str) else None


def _is_list(node: ast.expr) -> bool:
    return isinstance(node, (ast.Tuple, ast.List, ast.Set))


def _nothing(node: ast.expr) -> None:
    del node


def _literals(node: ast.expr, otherwise: Callable[[ast.expr], None] = _nothing) -> Iterator[object]:
    """The literals of one side of a comparison; ``otherwise`` is called with anything else."""
    match node:
        case ast.Constant():
            yield node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            yield -value
        case ast.Tuple() | ast.List() | ast.Set():
            for item in node.elts:
                if _is_list(item) or isinstance(item, ast.Name):
                    otherwise(item)
                yield from _literals(item, otherwise)
        case ast.Name():
            return
        case _:
            otherwise(node)


def _truth(node: ast.expr, row: Mapping[str, object]) -> bool:
    match node:
        case ast.BoolOp(op=ast.And()):
            return all(_truth(value, row) for value in node.values)
        case ast.BoolOp():
            return any(_truth(value, row) for value in node.values)
        case ast.UnaryOp():
            return not _truth(node.operand, row)
        case ast.Compare():
            sides = [node.left, *node.comparators]
            pairs = zip(sides, node.ops, sides[1:], strict=False)
            return all(_holds(_side(a, row), op, _side(b, row)) for a, op, b in pairs)
        case ast.Name():
            return bool(row[node.id])
        case _:
            raise TypeError(f"{ast.dump(node)} passed the check")


def _side(node: ast.expr, row: Mapping[str, object]) -> object:
    if isinstance(node, ast.Name):
        return row[node.id]
    found = list(_literals(node))
    return found if _is_list(node) else found[0]


def _holds(first: object, op: ast.cmpop, second: object) -> bool:
    if isinstance(op, _WITHIN):
        return (first in second) == isinstance(op, ast.In)  # type: ignore[operator]
    if isinstance(op, _SAME):
        return (first == second) == isinstance(op, (ast.Eq, ast.Is))
    return first is not None and second is not None and _ORDER[type(op)](first, second)
