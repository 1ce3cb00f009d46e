"""What the code that called a module does with the result at once: read off its source, as it stands at the call.

A layer may do the work of those behind it only if nobody else sees what lies between. That is so where the result
goes straight into the next call, ``norm(conv(x))``, where a name is given away at once, ``x = conv(x); x = norm(x)``,
where a value that is known is added to it, ``out += x``, between two neighbours in `nn.Sequential`, and where such code
returns the result to code that does one of these. Who the next one is, is looked up where the calling code finds it, in
this very call. Whatever cannot be told this way, and code whose source is not at hand, is told as None.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from torch import nn

from afd.python_state import codes_in

Position = tuple[int | None, ...]
INDEXED = (nn.ModuleList, nn.ModuleDict, nn.Sequential, list, tuple, dict)
CALL, WRAPPED = nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__
SEQUENTIAL = nn.Sequential.forward.__code__
LOOKED_THROUGH: set[CodeType] = set()  # what only calls a module's own forward
PEEKS = {"locals", "eval", "exec", "_getframe", "currentframe"}  # what may see all names of a function
UNKNOWN = object()


@dataclass(frozen=True, eq=False)
class Sum:
    """The addition of another value, one that is there when the first layer is called.

    Attributes:
        other: the value; or a module, whose latest result it is.
    """

    other: Any


Consumer = nn.Module | Callable[..., Any] | Sum


def consumers(frame: FrameType | None, called: nn.Module) -> Iterator[Consumer]:
    """What the result of a module's forward is handed to next, and what the result of that; each to nobody else.

    Args:
        frame: of the forward.
        called: the module.
    """
    known: nn.Module | None = called
    while frame is not None:
        site, layer = _called_from(frame, known)
        known = None
        if site is None:
            return
        if layer is not None and site.f_code is SEQUENTIAL:
            behind = _behind(site.f_locals["self"], layer)
            if behind is None:
                return
            frame = site  # the last one's result is the sequence's; nor may the first frame hold itself by this one
            yield from behind
            continue
        code, instruction = site.f_code, site.f_lasti
        if layer is None and not _is_call_of(frame.f_code, code, instruction, site):
            return
        frame = None
        for use in _find(code, instruction)[1]:
            if any(_truth(test, site) is not False for test in use.unless):
                return
            if isinstance(use.node, ast.Return):
                frame = site
                break
            found = _consumer(use, site)
            if found is None:
                return
            yield found


def hooked(layer: nn.Module) -> bool:
    """Whether somebody looks at what goes into a layer or comes out of it."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _called_from(frame: FrameType, known: nn.Module | None) -> tuple[FrameType | None, nn.Module | None]:
    """Where the function of a frame was called, and the module whose forward it is, if it is one without hooks.

    `known` is that module where it need not be looked up in the frame, which takes longest.
    """
    call = frame.f_back
    if call is not None and call.f_code in LOOKED_THROUGH:
        call = call.f_back
    if call is None or call.f_code is not CALL:
        return (call, None) if known is None else (None, None)
    wrapped = call.f_back
    if wrapped is None or wrapped.f_code is not WRAPPED:
        return None, None  # not called as modules are
    layer = wrapped.f_locals["self"] if known is None else known
    return (None, None) if hooked(layer) else (wrapped.f_back, layer)


def _is_call_of(function: CodeType, code: CodeType, instruction: int, site: FrameType) -> bool:
    """Whether this is Python calling that very function, with nothing in between."""
    call = _find(code, instruction)[0]
    if call is None:
        return False
    if isinstance(call.func, ast.Attribute):
        owner = _value(call.func.value, site)
        found = getattr(type(owner), call.func.attr, None) if isinstance(owner, nn.Module) else None
    else:
        found = _value(call.func, site)
    return isinstance(found, FunctionType) and found.__code__ is function


def _behind(sequence: nn.Sequential, layer: nn.Module) -> list[nn.Module] | None:
    """The layers behind another, if it has one place."""
    layers = list(sequence._modules.values())
    places = [place for place, one in enumerate(layers) if one is layer]
    if type(sequence).__iter__ is not nn.Sequential.__iter__ or len(places) != 1:
        return None
    return layers[places[0] + 1 :]


def _consumer(use: Use, frame: FrameType) -> Consumer | None:
    """Who a result is used by; None where that cannot be told."""
    if isinstance(use.node, ast.Call):
        found = _value(use.node.func, frame)
        return found if isinstance(found, nn.Module | FunctionType | BuiltinFunctionType) else None
    other = use.added
    if isinstance(other, ast.Call):
        layer = _value(other.func, frame)
        if not _passes_on(layer):
            done = isinstance(use.node, ast.BinOp) and use.node.left is other
            return Sum(layer) if done and isinstance(layer, nn.Module) else None
        other = other.args[0]
    value = UNKNOWN if other is None else _value(other, frame)
    return None if value is UNKNOWN else Sum(value)


def _passes_on(layer: Any) -> bool:
    """Whether a module returns what it is given: a shortcut that has nothing to do."""
    return type(layer) in (nn.Sequential, nn.Identity) and not (
        layer._modules or "forward" in vars(layer) or hooked(layer)
    )


def _truth(test: ast.expr, frame: FrameType) -> bool | None:
    """What a condition is now, ``self.downsample is not None``, say; None where that cannot be told."""
    if isinstance(test, ast.Compare):
        if len(test.ops) != 1 or not isinstance(test.ops[0], ast.Is | ast.IsNot):
            return None
        if not (isinstance(test.comparators[0], ast.Constant) and test.comparators[0].value is None):
            return None
        value = _value(test.left, frame)
        return None if value is UNKNOWN else (value is None) == isinstance(test.ops[0], ast.Is)
    value = _value(test, frame)
    return bool(value) if value is None or isinstance(value, bool) else None


def _value(node: ast.expr, frame: FrameType) -> Any:
    """What an expression of names, attributes of modules and indices stands for; UNKNOWN for any other."""
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id, frame.f_globals.get(node.id, UNKNOWN))
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, frame)
        if isinstance(owner, ModuleType):
            return vars(owner).get(node.attr, UNKNOWN)
        return _attribute(owner, node.attr) if isinstance(owner, nn.Module) else UNKNOWN
    if isinstance(node, ast.Subscript):
        owner, index = _value(node.value, frame), _value(node.slice, frame)
        if not isinstance(owner, INDEXED) or type(index) not in (int, str):
            return UNKNOWN
        try:
            return owner[index]
        except (LookupError, TypeError):
            return UNKNOWN
    return UNKNOWN


def _attribute(owner: nn.Module, name: str) -> Any:
    """An attribute that a module holds, found as Python does, without running anybody's code."""
    if not _held_by_instances(type(owner), name):  # type: ignore[arg-type]
        return UNKNOWN
    own = vars(owner)
    return own[name] if name in own else owner._modules.get(name, UNKNOWN)


@functools.cache
def _held_by_instances(kind: Any, name: str) -> bool:
    """Whether modules of this class are asked for such an attribute as modules are, and have none by their class."""
    usual = kind.__getattribute__ is object.__getattribute__ and kind.__getattr__ is nn.Module.__getattr__
    return usual and not hasattr(kind, name)


# --- Reading source -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """Where a result is used, and nowhere else.

    Attributes:
        node: a call that it is the only argument of, an addition, or its return.
        added: what an addition adds to it.
        unless: conditions of what stands between, which is skipped where they are false.
    """

    node: ast.Call | ast.BinOp | ast.AugAssign | ast.Return
    added: ast.expr | None = None
    unless: tuple[ast.expr, ...] = ()


_known: dict[int, tuple[CodeType, dict[int, tuple[ast.Call | None, tuple[Use, ...]]]]] = {}  # by id
_read: dict[str, _Source | None] = {}


def _find(code: CodeType, instruction: int) -> tuple[ast.Call | None, tuple[Use, ...]]:
    """The call at this instruction, and what becomes of its result, and of the result of that, and so on."""
    known = _known.setdefault(id(code), (code, {}))
    found = known[1].get(instruction)
    if found is None:
        found = known[1][instruction] = _look_up(code, instruction)
    return found


def _look_up(code: CodeType, instruction: int) -> tuple[ast.Call | None, tuple[Use, ...]]:
    if code.co_filename not in _read:
        _read[code.co_filename] = _Source.of(code.co_filename)
    source = _read[code.co_filename]
    if source is None or code not in source.codes or not PEEKS.isdisjoint(code.co_names):
        return None, ()  # there is no source, it is not what runs, or not all that the code looks at
    call = source.calls.get(list(code.co_positions())[instruction // 2])
    return call, () if call is None else tuple(source.uses_of(call, code))


class _Source:
    """A file's syntax tree.

    Attributes:
        codes: of all that it defines.
        calls: by where they stand.
        parents: of each node.
    """

    def __init__(self, text: str, filename: str) -> None:
        tree = ast.parse(text)
        self.codes = set(codes_in(compile(text, filename, "exec", dont_inherit=True)))
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

    def uses_of(self, call: ast.Call, code: CodeType) -> Iterator[Use]:
        """What becomes of the result of a call, as long as it goes to one place only."""
        use = self._use_of(call, code)
        while use is not None:
            yield use
            use = None if isinstance(use.node, ast.Return) else self._use_of(use.node, code)

    def _use_of(self, node: ast.Call | ast.BinOp | ast.AugAssign, code: CodeType) -> Use | None:
        name: ast.expr
        statement: ast.stmt
        if isinstance(node, ast.AugAssign):
            name, statement = node.target, node
        else:
            parent = self.parents[node]
            if not isinstance(parent, ast.Assign):
                return _use_by(parent, node)
            if len(parent.targets) != 1:
                return None
            name, statement = parent.targets[0], parent
        if not isinstance(name, ast.Name) or name.id not in code.co_varnames or name.id in code.co_cellvars:
            return None
        return self._use_of_name(name.id, statement)

    def _use_of_name(self, name: str, statement: ast.stmt) -> Use | None:
        """What becomes of the value that a statement gives a name."""
        following, unless = self._following(statement), []
        while isinstance(following, ast.If) and not following.orelse and not _mentions(following, name):
            unless.append(following.test)
            following = self._following(following)
        if following is None:
            return None
        if isinstance(following, ast.AugAssign):
            target, value = following.target, following.value
            named = isinstance(target, ast.Name) and target.id == name and not _mentions(value, name)
            adds = isinstance(following.op, ast.Add) and _known_before(value)
            return Use(following, value, tuple(unless)) if named and adds else None
        loads = [node for node in ast.walk(following) if _loads(node, name)]
        finally_ = any(isinstance(one, ast.Try) and one.finalbody for one in self._around(following))
        ends = _assigns(following, name) or (isinstance(following, ast.Return) and not finally_)
        if len(loads) != 1 or not (ends or self._loaded_once(name, statement)):
            return None
        user = self.parents[loads[0]]
        use = _use_by(user, loads[0])
        if use is None or not (isinstance(user, ast.Return) or self._comes_first(user, following)):
            return None
        return Use(use.node, use.added, tuple(unless))

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

    def _around(self, node: ast.AST) -> Iterator[ast.AST]:
        """What a statement stands in, up to its function."""
        while not isinstance(node, ast.FunctionDef | ast.Module):
            node = self.parents[node]
            yield node

    def _in_loop(self, node: ast.AST) -> bool:
        loops = ast.For | ast.While | ast.AsyncFor | ast.Try | ast.With | ast.Lambda
        return any(isinstance(one, loops) for one in self._around(node))

    def _loaded_once(self, name: str, statement: ast.stmt) -> bool:
        """Whether a name is looked at in one place of the whole function, which is in no loop and defines no other."""
        *_, function = self._around(statement)
        once = isinstance(function, ast.FunctionDef) and sum(_loads(one, name) for one in ast.walk(function)) == 1
        return once and not self._in_loop(statement)

    def _comes_first(self, user: ast.AST, statement: ast.stmt) -> bool:
        """Whether a call or sum is the first thing that a statement does, apart from looking up names."""
        node = user
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


def _use_by(user: ast.AST, node: ast.AST) -> Use | None:
    """A return, a call or an addition of a value."""
    if isinstance(user, ast.Return):
        return Use(user)
    if isinstance(user, ast.Call) and user.args == [node] and _plain(user.func):
        in_place = all(word.arg == "inplace" and isinstance(word.value, ast.Constant) for word in user.keywords)
        return Use(user) if in_place else None
    if isinstance(user, ast.BinOp) and isinstance(user.op, ast.Add):
        other, is_left = (user.right, False) if user.left is node else (user.left, True)
        return Use(user, other) if _known_before(other, is_left) else None
    return None


def _known_before(node: ast.expr, done: bool = False) -> bool:
    """Whether an expression may be told: a name, or a layer of one, which may do nothing, or is `done` already."""
    if not isinstance(node, ast.Call):
        return isinstance(node, ast.Name)
    return (
        len(node.args) == 1 and not node.keywords and _plain(node.func) and (done or isinstance(node.args[0], ast.Name))
    )


def _plain(node: ast.expr) -> bool:
    """Whether an expression only looks things up."""
    if isinstance(node, ast.Subscript):
        return _plain(node.value) and isinstance(node.slice, ast.Name | ast.Constant)
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _plain(node.value))


def _loads(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)


def _mentions(node: ast.AST, name: str) -> bool:
    return any(isinstance(one, ast.Name) and one.id == name for one in ast.walk(node))


def _assigns(statement: ast.stmt, name: str) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)
