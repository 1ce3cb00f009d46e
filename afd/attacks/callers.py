"""What the code that called a module does with the result at once: read off its source, as it stands at the call.

A layer may do the work of the one behind it only if nobody else sees what lies between. That is so where the result
goes straight into the next call, ``norm(conv(x))``, where a name is given away at once, ``x = conv(x); x = norm(x)``,
between two neighbours in `nn.Sequential`, and where such code returns the result to code that does one of these. Which
module the next call is, is looked up where the calling code finds it, in this very call. Whatever cannot be told this
way, and code whose source is not at hand, is told as None.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import nn

Position = tuple[int | None, ...]
INDEXED = (nn.ModuleList, nn.ModuleDict, nn.Sequential, list, tuple, dict)
CALL, WRAPPED = nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__
SEQUENTIAL = nn.Sequential.forward.__code__


def next_module(frame: FrameType | None, called: nn.Module) -> nn.Module | None:
    """The module that the result of a module's forward is handed to next, and to nobody else.

    Args:
        frame: of the forward.
        called: the module.
    """
    known: nn.Module | None = called
    while frame is not None:
        site, layer = _called_from(frame, known)
        known = None
        if site is None:
            return None
        if layer is not None and site.f_code is SEQUENTIAL:
            sequence = site.f_locals["self"]
            following = _neighbour(sequence, layer)
            if following is not sequence:
                return following
            frame = site  # the last one's result is the sequence's
            continue
        code, instruction = site.f_code, site.f_lasti
        if layer is None and not _is_call_of(frame.f_code, code, instruction, site):
            return None
        use = _use(code, instruction)
        if isinstance(use, ast.Return):
            frame = site
            continue
        found = None if use is None else _value(use, site)
        return found if isinstance(found, nn.Module) else None
    return None


def hooked(layer: nn.Module) -> bool:
    """Whether somebody looks at what goes into a layer or comes out of it."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _called_from(frame: FrameType, known: nn.Module | None) -> tuple[FrameType | None, nn.Module | None]:
    """Where the function of a frame was called, and the module whose forward it is, if it is one without hooks.

    `known` is that module where it need not be looked up in the frame, which takes longest.
    """
    call = frame.f_back
    if call is None or call.f_code is not CALL:
        return (call, None) if known is None else (None, None)
    wrapped = call.f_back
    if wrapped is None or wrapped.f_code is not WRAPPED:
        return None, None  # not called as modules are
    layer = wrapped.f_locals["self"] if known is None else known
    return (None, None) if hooked(layer) else (wrapped.f_back, layer)


def _is_call_of(function: CodeType, code: CodeType, instruction: int, site: FrameType) -> bool:
    """Whether this is Python calling that very function, with nothing in between."""
    call = _call_at(code, instruction)
    if call is None:
        return False
    if isinstance(call.func, ast.Attribute):
        owner = _value(call.func.value, site)
        found = getattr(type(owner), call.func.attr, None) if isinstance(owner, nn.Module) else None
    else:
        found = _value(call.func, site)
    return isinstance(found, FunctionType) and found.__code__ is function


def _neighbour(sequence: nn.Sequential, layer: nn.Module) -> nn.Module | None:
    """The layer behind another; the sequence itself if there is none."""
    layers = list(sequence._modules.values())
    places = [place for place, one in enumerate(layers) if one is layer]
    if type(sequence).__iter__ is not nn.Sequential.__iter__ or len(places) != 1:
        return None
    return layers[places[0] + 1] if places[0] + 1 < len(layers) else sequence


def _value(node: ast.expr, frame: FrameType) -> Any:
    """What an expression of names, attributes of modules and indices stands for; None for any other."""
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id, frame.f_globals.get(node.id))
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, frame)
        return _attribute(owner, node.attr) if isinstance(owner, nn.Module) else None
    if isinstance(node, ast.Subscript):
        owner, index = _value(node.value, frame), _value(node.slice, frame)
        if not isinstance(owner, INDEXED) or type(index) not in (int, str):
            return None
        try:
            return owner[index]
        except (LookupError, TypeError):
            return None
    return None


def _attribute(owner: nn.Module, name: str) -> Any:
    """An attribute that a module holds, found as Python does, without running anybody's code."""
    if not _held_by_instances(type(owner), name):  # type: ignore[arg-type]
        return None
    own = vars(owner)
    return own[name] if name in own else owner._modules.get(name)


@functools.cache
def _held_by_instances(kind: Any, name: str) -> bool:
    """Whether modules of this class are asked for such an attribute as modules are, and have none by their class."""
    usual = kind.__getattribute__ is object.__getattribute__ and kind.__getattr__ is nn.Module.__getattr__
    return usual and not hasattr(kind, name)


# --- Reading source -------------------------------------------------------------------------------------------------

Use = ast.expr | ast.Return | None  # what is called with a result, or that it is returned
_known: dict[int, tuple[CodeType, dict[int, tuple[ast.Call | None, Use]]]] = {}  # by a code's id: it, what is known
_read: dict[str, _Source | None] = {}


def _use(code: CodeType, instruction: int) -> Use:
    """What becomes of the result of the call at this instruction."""
    return _find(code, instruction)[1]


def _call_at(code: CodeType, instruction: int) -> ast.Call | None:
    return _find(code, instruction)[0]


def _find(code: CodeType, instruction: int) -> tuple[ast.Call | None, Use]:
    known = _known.get(id(code))
    if known is None:
        known = _known[id(code)] = code, {}
    found = known[1].get(instruction)
    if found is None:
        found = known[1][instruction] = _look_up(code, instruction)
    return found


def _look_up(code: CodeType, instruction: int) -> tuple[ast.Call | None, Use]:
    if code.co_filename not in _read:
        _read[code.co_filename] = _Source.of(code.co_filename)
    source = _read[code.co_filename]
    if source is None or code not in source.codes:
        return None, None  # there is no source, or it is not what runs
    call = source.calls.get(list(code.co_positions())[instruction // 2])
    return call, None if call is None else source.use_of(call, code)


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

    def use_of(self, call: ast.Call, code: CodeType) -> Use:
        """What becomes of the result of a call, if it goes to one place only."""
        parent = self.parents[call]
        if isinstance(parent, ast.Return):
            return parent
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
        ends = _assigns(following, name) or isinstance(following, ast.Return)
        if len(loads) != 1 or not (ends or self._loaded_once(name, parent)):
            return None
        user = self.parents[loads[0]]
        if isinstance(user, ast.Return):
            return user
        if isinstance(user, ast.Call) and _only_argument(user, loads[0]) and self._comes_first(user, following):
            return user.func
        return None

    def _following(self, statement: ast.stmt) -> ast.stmt | None:
        """The statement that comes after another: the next in its block, or behind the ifs that it is the end of."""
        within = self.parents[statement]
        for _, block in ast.iter_fields(within):
            if isinstance(block, list) and statement in block:
                place = block.index(statement) + 1
                if place < len(block):
                    return block[place] if isinstance(block[place], ast.stmt) else None
                if isinstance(within, ast.If) and not self._in_loop(within):
                    return self._following(within)
        return None

    def _in_loop(self, node: ast.AST) -> bool:
        while not isinstance(node, ast.FunctionDef | ast.Module):
            if isinstance(node, ast.For | ast.While | ast.AsyncFor | ast.Try | ast.With | ast.Lambda):
                return True
            node = self.parents[node]
        return False

    def _loaded_once(self, name: str, statement: ast.stmt) -> bool:
        """Whether a name is looked at in one place of the whole function, which is in no loop and defines no other."""
        if self._in_loop(statement):
            return False
        node: ast.AST = statement
        while not isinstance(node, ast.FunctionDef | ast.Module):
            node = self.parents[node]
        return isinstance(node, ast.FunctionDef) and sum(_loads(one, name) for one in ast.walk(node)) == 1

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


def _only_argument(call: ast.Call, argument: ast.AST) -> bool:
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
