"""What the code that called a module does with the result at once: read off its source, as it stands at the call.

A layer may do the work of the one behind it only if nobody else sees what lies between. That is so where the result
goes straight into the next call, ``norm(conv(x))``, where a name is rebound at once, ``x = conv(x); x = norm(x)``, or
between two neighbours in `nn.Sequential`. Which module the next call is, is looked up where the calling code finds it
in this very call. Whatever cannot be told this way, and code whose source is not at hand, is told as None.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from torch import nn

Position = tuple[int | None, ...]
INDEXED = (nn.ModuleList, nn.ModuleDict, nn.Sequential, list, tuple, dict)
CALL, WRAPPED = nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__
SEQUENTIAL = nn.Sequential.forward.__code__


def next_module(frame: FrameType, layer: nn.Module) -> nn.Module | None:
    """The module that the result of `layer` is handed to next, and to nobody else.

    Args:
        frame: of what stands in for the layer's forward.
        layer: that is being called.
    """
    call = frame.f_back
    wrapped = None if call is None else call.f_back
    caller = None if wrapped is None else wrapped.f_back
    if call is None or wrapped is None or caller is None or (call.f_code, wrapped.f_code) != (CALL, WRAPPED):
        return None  # not called as modules are
    if caller.f_code is SEQUENTIAL:
        return _neighbour(caller.f_locals["self"], layer)
    expression = _next_callee(caller.f_code, caller.f_lasti)
    found = None if expression is None else _value(expression, caller)
    return found if isinstance(found, nn.Module) else None


def _neighbour(sequence: nn.Sequential, layer: nn.Module) -> nn.Module | None:
    layers = list(sequence._modules.values())
    places = [place for place, one in enumerate(layers) if one is layer]
    own = type(sequence).__iter__ is nn.Sequential.__iter__
    return layers[places[0] + 1] if own and len(places) == 1 and places[0] + 1 < len(layers) else None


def _value(node: ast.expr, frame: FrameType) -> Any:
    """What an expression of names, attributes of modules and indices stands for; None for any other."""
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id, frame.f_globals.get(node.id))
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, frame)
        if not isinstance(owner, nn.Module):
            return None
        return owner._modules.get(node.attr, vars(owner).get(node.attr))
    if isinstance(node, ast.Subscript):
        owner, index = _value(node.value, frame), _value(node.slice, frame)
        if not isinstance(owner, INDEXED) or type(index) not in (int, str):
            return None
        try:
            return owner[index]  # type: ignore[index]
        except (LookupError, TypeError):
            return None
    return None


# --- Reading source -------------------------------------------------------------------------------------------------

_known: dict[int, tuple[CodeType, dict[int, ast.expr | None]]] = {}  # by a code's id: it, and what was found in it
_read: dict[str, _Source | None] = {}


def _next_callee(code: CodeType, instruction: int) -> ast.expr | None:
    """The expression that is called with the result of the call at this instruction."""
    _, found = _known.setdefault(id(code), (code, {}))
    if instruction not in found:
        found[instruction] = _find(code, instruction)
    return found[instruction]


def _find(code: CodeType, instruction: int) -> ast.expr | None:
    if code.co_filename not in _read:
        _read[code.co_filename] = _Source.of(code.co_filename)
    source = _read[code.co_filename]
    if source is None or code not in source.codes:
        return None  # there is no source, or it is not what runs
    position = list(code.co_positions())[instruction // 2]
    call = source.calls.get(position)
    return None if call is None else source.callee_of(call, code)


class _Source:
    """A file's syntax tree.

    Attributes:
        codes: of all that it defines.
        calls: by where they stand.
        parents: of each node.
    """

    def __init__(self, text: str, filename: str) -> None:
        tree = ast.parse(text)
        self.codes = set(_codes(compile(text, filename, "exec", dont_inherit=True)))
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.calls: dict[Position, ast.Call] = {
            (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset): node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
        }

    @classmethod
    def of(cls, filename: str) -> _Source | None:
        """The tree of a file, or None where it cannot be read."""
        text = "".join(linecache.getlines(filename))
        try:
            return cls(text, filename) if text else None
        except (SyntaxError, ValueError):
            return None

    def callee_of(self, call: ast.Call, code: CodeType) -> ast.expr | None:
        """What is called next with the result of a call, which goes nowhere else."""
        parent = self.parents[call]
        if isinstance(parent, ast.Call):
            return parent.func if _only_argument(parent, call) else None
        if not (
            isinstance(parent, ast.Assign) and len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name)
        ):
            return None
        name, following = parent.targets[0].id, self._following(parent)
        if following is None or name not in code.co_varnames or name in code.co_cellvars:
            return None
        loads = [node for node in ast.walk(following) if _loads(node, name)]
        if len(loads) != 1 or not (_assigns(following, name) or isinstance(following, ast.Return)):
            return None
        user = self.parents[loads[0]]
        if isinstance(user, ast.Call) and _only_argument(user, loads[0]) and self._comes_first(user, following):
            return user.func
        return None

    def _following(self, statement: ast.stmt) -> ast.stmt | None:
        """The statement right behind another, in the same block."""
        for _, block in ast.iter_fields(self.parents[statement]):
            if isinstance(block, list) and statement in block[:-1]:
                found = block[block.index(statement) + 1]
                return found if isinstance(found, ast.stmt) else None
        return None

    def _comes_first(self, call: ast.Call, statement: ast.stmt) -> bool:
        """Whether a call is the first thing that a statement does, apart from looking up names."""
        node: ast.AST = call
        while (parent := self.parents[node]) is not statement:
            leads = (
                (isinstance(parent, ast.Call) and parent.args[:1] == [node] and _plain(parent.func))
                or (isinstance(parent, ast.Call) and parent.func is node)
                or (isinstance(parent, ast.BinOp) and parent.left is node)
                or (isinstance(parent, ast.Attribute) and parent.value is node)
            )
            if not leads:
                return False
            node = parent
        return isinstance(statement, ast.Assign | ast.Return) and statement.value is node


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _only_argument(call: ast.Call, argument: ast.expr) -> bool:
    return call.args == [argument] and not call.keywords and _plain(call.func)


def _plain(node: ast.expr) -> bool:
    """Whether an expression only looks things up."""
    if isinstance(node, ast.Subscript):
        return _plain(node.value) and isinstance(node.slice, ast.Name | ast.Constant)
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _plain(node.value))


def _loads(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)


def _assigns(statement: ast.stmt, name: str) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)
