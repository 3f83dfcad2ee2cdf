"""Where a source can be made wrong, one small change at a time, without knowing what it means.

What only people or type checkers read stays as it is: strings, annotations, decorators, ``__all__``, ``__repr__``,
assertions (``strict=`` among them), what ``raise`` is given, and blocks under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
import builtins
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
PAIRS = (
    ("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("argmin", "argmax"), ("any", "all"), ("zeros", "ones"),
    ("zeros_like", "ones_like"), ("new_zeros", "new_ones"), ("sin", "cos"), ("floor", "ceil"), ("real", "imag"),
    ("num_queries", "num_keys"), ("value_class", "key_class"), ("query_index", "key_index"), ("strides", "key_strides"),
    ("value_row", "key_row"),
)  # fmt: skip
OTHERS = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}


@dataclass(frozen=True, slots=True)
class Mutation:
    """One change: ``text`` is the line where it stands, ``ordinal`` counts equal changes of equal lines."""

    module: str
    function: str
    text: str
    change: str
    ordinal: int = 0

    def __str__(self) -> str:
        number = f" ({self.ordinal + 1})" if self.ordinal else ""
        return f"{self.module.rpartition('.')[2]}.{self.function}: {self.change}{number}    in: {self.text}"


@dataclass(frozen=True, slots=True)
class Point:
    """A change that can be made to the tree that it was found in."""

    function: str
    line: int
    change: str
    apply: Callable[[], None]


Parent = tuple[ast.AST, str, int | None]


def _put(parent: Parent, new: ast.AST | None) -> Callable[[], None]:
    """What replaces a node under its parent."""

    def apply() -> None:
        holder, name, index = parent
        if index is None:
            setattr(holder, name, new)
        else:
            getattr(holder, name)[index] = new

    return apply


def _set(node: ast.AST, name: str, new: object) -> Callable[[], None]:
    return lambda: setattr(node, name, new)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))


def _reads_alone(node: ast.AST) -> bool:
    """Whether a node is there for readers and type checkers only."""
    match node:
        case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return True
        case ast.FunctionDef(name="__repr__" | "__str__"):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.keyword(arg="strict"):  # what zip promises of its arguments
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Call(func=ast.Name(id="TypeVar" | "cast")):
            return True
    return False


HIDDEN = frozenset({"annotation", "returns", "decorator_list", "type_params", "type_comment", "bases"})


class _Finder:
    def __init__(self) -> None:
        self.names: list[str] = []
        self.line = 0
        self.unknown_sizes: set[int] = set()

    def walk(self, node: ast.AST, parent: Parent | None) -> Iterator[Point]:
        if _reads_alone(node):
            return
        self.line = getattr(node, "lineno", self.line)
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named:
            self.names.append(node.name)  # type: ignore[attr-defined]
        at = self.line
        for change, apply in self.changes(node, parent):
            yield Point(".".join(self.names) or "<module>", at, change, apply)
        for name, value in ast.iter_fields(node):
            if name in HIDDEN or (name == "value" and self._is_alias(node)):
                continue
            if isinstance(value, ast.AST):
                yield from self.walk(value, (node, name, None))
            elif isinstance(value, list):
                for index, part in enumerate(value):
                    if isinstance(part, ast.AST):
                        yield from self.walk(part, (node, name, index))
        if named:
            self.names.pop()

    def _is_alias(self, node: ast.AST) -> bool:
        """A name for a type: ``Array = npt.NDArray[Any]``, at the top of a module."""
        if self.names or not isinstance(node, ast.Assign):
            return False
        return isinstance(node.value, ast.Subscript | ast.BinOp) and all(
            isinstance(t, ast.Name) and t.id.lstrip("_")[:1].isupper() and not t.id.isupper() for t in node.targets
        )

    def changes(self, node: ast.AST, parent: Parent | None) -> Iterator[tuple[str, Callable[[], None]]]:
        """Every change of this node itself."""
        match node:
            case ast.Call(func=ast.Attribute(attr="reshape")):
                # NumPy takes any negative size for the one that is unknown.
                self.unknown_sizes |= {id(a.operand) for a in node.args if isinstance(a, ast.UnaryOp)}
            case ast.BinOp() if not (_is_text(node.left) or _is_text(node.right)):
                if (other := OPERATORS.get(type(node.op))) is not None:
                    new = ast.BinOp(node.left, other(), node.right)
                    yield _shown(node, new), _set(node, "op", other())
            case ast.AugAssign():
                yield from self._augmented(node, parent)
            case ast.UnaryOp() if isinstance(node.op, ast.Not | ast.USub | ast.Invert) and parent is not None:
                yield _shown(node, node.operand), _put(parent, node.operand)
            case ast.Compare():
                yield from _comparisons(node)
            case ast.BoolOp():
                other_op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
                yield _shown(node, ast.BoolOp(other_op, node.values)), _set(node, "op", other_op)
            case ast.Constant() if parent is not None and id(node) not in self.unknown_sizes:
                for value in _other_values(node.value):
                    yield f"{node.value!r} -> {value!r}", _set(node, "value", value)
            case ast.Attribute(attr=attr) if attr in OTHERS:
                new_attribute = ast.Attribute(node.value, OTHERS[attr], node.ctx)
                yield _shown(node, new_attribute), _set(node, "attr", OTHERS[attr])
            case ast.Name(id=name, ctx=ast.Load()) if name in OTHERS and hasattr(builtins, OTHERS[name]):
                yield f"{name} -> {OTHERS[name]}", _set(node, "id", OTHERS[name])
            case ast.Slice():
                if node.lower is not None and not (isinstance(node.lower, ast.Constant) and node.lower.value == 0):
                    yield _shown(node, ast.Slice(None, node.upper, node.step)), _set(node, "lower", None)
                if node.upper is not None:
                    yield _shown(node, ast.Slice(node.lower, None, node.step)), _set(node, "upper", None)
            case ast.If() | ast.IfExp():
                yield from _guards(node)
            case ast.comprehension():
                for index, test in enumerate(node.ifs):
                    yield f"if {ast.unparse(test)} -> if True", _put((node, "ifs", index), ast.Constant(True))
            case ast.While():
                yield f"while {ast.unparse(node.test)} -> while False", _set(node, "test", ast.Constant(False))
            case ast.Expr(value=ast.Call()) if parent is not None:
                yield f"{ast.unparse(node)} -> pass", _put(parent, ast.Pass())
            case ast.Continue() | ast.Break() if parent is not None:
                new_jump = ast.Break() if isinstance(node, ast.Continue) else ast.Continue()
                yield _shown(node, new_jump), _put(parent, new_jump)

    def _augmented(self, node: ast.AugAssign, parent: Parent | None) -> Iterator[tuple[str, Callable[[], None]]]:
        if _is_text(node.value):
            return
        if (other := OPERATORS.get(type(node.op))) is not None:
            yield _shown(node, ast.AugAssign(node.target, other(), node.value)), _set(node, "op", other())
        if parent is not None:
            plain = ast.Assign([node.target], node.value)
            yield _shown(node, plain), _put(parent, plain)


def _shown(before: ast.AST, after: ast.AST) -> str:
    return f"{ast.unparse(before)} -> {ast.unparse(ast.fix_missing_locations(after))}"


def _comparisons(node: ast.Compare) -> Iterator[tuple[str, Callable[[], None]]]:
    for index, operator in enumerate(node.ops):
        if (other := COMPARISONS.get(type(operator))) is not None:
            changed = [other() if n == index else own for n, own in enumerate(node.ops)]
            yield _shown(node, ast.Compare(node.left, changed, node.comparators)), _set(node, "ops", changed)


def _guards(node: ast.If | ast.IfExp) -> Iterator[tuple[str, Callable[[], None]]]:
    word = "if" if isinstance(node, ast.If) else "... if"
    for outcome in (True, False):
        yield f"{word} {ast.unparse(node.test)} -> {word} {outcome}", _set(node, "test", ast.Constant(outcome))


def _other_values(value: object) -> list[object]:
    match value:
        case bool():
            return [not value]
        case int():
            return [1] if value == 0 else [value + 1, value - 1]
        case float():
            return [1.0] if value == 0 else [value + 1, value - 1]
    return []


def points(tree: ast.Module) -> list[Point]:
    """Every change of a tree, in a fixed order. Applying one leaves the others meaningless: parse again."""
    return list(_Finder().walk(tree, None))


def mutations(source: str, module: str) -> list[Mutation]:
    """The changes of a module's source, in the order of :func:`points`."""
    lines, seen = source.splitlines(), Counter[Mutation]()
    found = []
    for point in points(ast.parse(source)):
        first = Mutation(module, point.function, lines[point.line - 1].strip(), point.change)
        found.append(Mutation(module, point.function, first.text, first.change, seen[first]))
        seen[first] += 1
    return found


def mutated(source: str, number: int) -> ast.Module:
    """The tree of a source with change ``number`` made."""
    tree = ast.parse(source)
    points(tree)[number].apply()
    return ast.fix_missing_locations(tree)
