"""`copy.deepcopy`, but that it follows what Python's own takes as it is: closures, weak references, bound built-ins.

A hook is mostly a function that closes over the module, over a list beside it, or over an object that holds either. A
deep copy of the module keeps that function, and so the copy's hook writes to the original. Here the function is copied
with what it closes over, and all of that goes by one memo: whatever reaches a part of the model reaches the copy's.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

_CONTAINERS = (dict, list, set, collections.deque)
_PLAIN = (int, float, complex, str, bytes, bool, type(None), type, types.ModuleType)
#: So many objects that refuse to be copied are shared with the original before the copy is given up.
_MAX_REFUSALS = 8


class Memo(dict[int, Any]):
    """What `copy.deepcopy` made of each object, by its `id`; one of this class makes it follow functions.

    `functions` and `classes` are those that were met and may hold state of Python's own; `cells` are the copies of the
    variables that functions close over, with the originals by whose `id` they are found. Those in `outer` are variables
    of functions that are not copied as well, such as a class's own: they stay the same variables.
    """

    def __init__(self, known: dict[int, Any] | None = None, outer: Iterable[types.CellType] = ()) -> None:
        known = known or {}
        super().__init__({key: made for key, made in known.items() if key != id(known)})
        self.outer = {id(cell): cell for cell in outer}
        self.functions: dict[int, types.FunctionType] = {}
        self.classes: dict[int, type] = {}
        self.cells: dict[int, tuple[types.CellType, types.CellType]] = {}

    def originals(self) -> list[Any]:
        """The objects that were copied; the memo keeps them alive, so that no `id` is used twice."""
        found: list[Any] = self.setdefault(id(self), [])  # where `copy.deepcopy` keeps them
        return found

    def take(self, other: Memo, originals: Iterable[Any]) -> None:
        """Add what another memo has of some objects, and the functions that it has met."""
        for original in list(originals):
            self.setdefault(id(original), other.get(id(original), original))
            self.originals().append(original)
        self.functions.update(other.functions)
        self.classes.update(other.classes)
        self.cells.update(other.cells)


def copy_following(
    value: Any, known: dict[int, Any], outer: Iterable[types.CellType] = (), *, patient: bool = True
) -> tuple[Any, Memo]:
    """A deep copy, and the memo of it, which begins with what is `known`; `outer` is the memo's.

    An object that refuses to be copied, such as a lock, is shared with the original, unless not `patient`. Raises what
    a module or a tensor raises that refuses, or the last of too many others.
    """
    shared: list[Any] = []
    while True:
        memo = Memo(known, outer)
        memo.update({id(refused): refused for refused in shared})
        try:
            with _functions_followed():
                return copy.deepcopy(value, memo), memo
        except Exception as error:
            refused = _refused(error)
            if not patient or isinstance(refused, (nn.Module, Tensor, type(None))) or len(shared) == _MAX_REFUSALS:
                raise
            shared.append(refused)


def _refused(error: BaseException) -> Any:
    """The object that was being copied when a deep copy failed; None if there is none."""
    found = None
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code is copy.deepcopy.__code__:
            found = step.tb_frame.f_locals.get("x")
        step = step.tb_next
    return found


def is_global(function: Any) -> bool:
    """Whether a function is what its Python module holds by its name: there is one of it, for all who use it."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    return vars(module).get(function.__name__) is function if module is not None else False


# -- what each kind is copied as -----------------------------------------------------------------------------------


def _function(function: types.FunctionType, memo: Memo) -> Any:
    memo.functions[id(function)] = function
    changeable = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]
    if is_global(function) or not (function.__closure__ or any(not isinstance(v, _PLAIN) for v in changeable)):
        return function
    cells, empty = [], []
    for cell in function.__closure__ or ():
        if id(cell) not in memo.cells:
            memo.cells[id(cell)] = (cell, cell if id(cell) in memo.outer else types.CellType())
            empty.append(cell)
        cells.append(memo.cells[id(cell)][1])
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, tuple(cells))
    memo[id(function)] = made  # before what it closes over, which may hold it
    for cell in empty:
        with contextlib.suppress(ValueError):  # raised where nothing is in it yet
            content = cell.cell_contents
            if isinstance(content, type):
                memo.classes[id(content)] = content
            made_of_it = copy.deepcopy(content, memo)
            if id(cell) not in memo.outer:
                memo.cells[id(cell)][1].cell_contents = made_of_it
    made.__defaults__ = copy.deepcopy(function.__defaults__, memo)
    made.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
    made.__annotations__ = function.__annotations__
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    vars(made).update(copy.deepcopy(vars(function), memo))
    return made


def _method(method: types.MethodType, memo: Memo) -> Any:
    function, owner = method.__func__, method.__self__
    name = getattr(function, "__name__", "")
    if any(vars(kind).get(name) is function for kind in type(owner).__mro__):  # the class's own, which is not copied
        return types.MethodType(function, copy.deepcopy(owner, memo))
    return types.MethodType(copy.deepcopy(function, memo), copy.deepcopy(owner, memo))


def _builtin(function: types.BuiltinFunctionType, memo: Memo) -> Any:
    """`items.append` and the like, which hold what they are a method of."""
    owner = function.__self__
    return getattr(copy.deepcopy(owner, memo), function.__name__) if isinstance(owner, _CONTAINERS) else function


def _cached(function: Any, memo: Memo) -> Any:
    """What `functools.lru_cache` made of a function: the copy has an empty cache."""
    inner = copy.deepcopy(function.__wrapped__, memo)
    if inner is function.__wrapped__:
        return function
    given = function.cache_parameters()
    return functools.lru_cache(maxsize=given["maxsize"], typed=given["typed"])(inner)


def _weak(reference: weakref.ref[Any], memo: Memo) -> Any:
    target = reference()
    made = _target(target, memo)
    return reference if made is target else weakref.ref(made)


def _proxy(proxy: Any, memo: Memo) -> Any:
    target = proxy.__repr__.__self__  # a bound method of what the proxy stands for
    made = _target(target, memo)
    return proxy if made is target else weakref.proxy(made)


def _target(target: Any, memo: Memo) -> Any:
    """The copy of what is referred to weakly: of a module always, of other objects where it is there already."""
    return copy.deepcopy(target, memo) if isinstance(target, nn.Module) else memo.get(id(target), target)


def _weak_keys(mapping: Any, memo: Memo) -> Any:
    made = type(mapping)()
    memo[id(mapping)] = made
    for key, value in list(mapping.items()):
        made[_target(key, memo)] = copy.deepcopy(value, memo)
    return made


def _weak_values(mapping: Any, memo: Memo) -> Any:
    made = type(mapping)()
    memo[id(mapping)] = made
    for key, value in list(mapping.items()):
        made[copy.deepcopy(key, memo)] = _target(value, memo)
    return made


def _weak_set(members: Any, memo: Memo) -> Any:
    memo[id(members)] = made = type(members)()
    for member in list(members):
        made.add(_target(member, memo))
    return made


def _itself(value: Any, memo: Memo) -> Any:
    return value


_COPIERS: dict[type, Callable[[Any, Memo], Any]] = {
    types.FunctionType: _function, types.MethodType: _method, types.BuiltinFunctionType: _builtin,
    functools._lru_cache_wrapper: _cached, weakref.ref: _weak, weakref.ProxyType: _proxy,
    weakref.CallableProxyType: _proxy, weakref.WeakKeyDictionary: _weak_keys, weakref.WeakValueDictionary: _weak_values,
    weakref.WeakSet: _weak_set, types.ModuleType: _itself,
}  # fmt: skip


# -- how deepcopy comes to ask them --------------------------------------------------------------------------------

_following = threading.RLock()


@contextlib.contextmanager
def _functions_followed() -> Iterator[None]:
    """While this is active, `copy.deepcopy` with a `Memo` asks the functions above; with any other it is as it was.

    Python's table of copiers is the only place of which also the `__deepcopy__` of a model's own class makes use.
    """
    table: dict[Any, Any] = copy._deepcopy_dispatch  # type: ignore[attr-defined]
    atomic: Any = getattr(copy, "_atomic_types", set())  # from Python 3.14 on these are not looked up in the table
    with _following:
        before, hidden = {kind: table.get(kind) for kind in _COPIERS}, atomic & _COPIERS.keys()
        table.update({kind: _or_else(copier, before[kind], kind in hidden) for kind, copier in _COPIERS.items()})
        atomic -= hidden
        try:
            yield
        finally:
            atomic |= hidden
            for kind, copier in before.items():
                if copier is None:
                    del table[kind]
                else:
                    table[kind] = copier


def _or_else(copier: Callable[[Any, Memo], Any], before: Any, atomic: bool) -> Callable[[Any, Any], Any]:
    def chosen(value: Any, memo: Any) -> Any:
        if isinstance(memo, Memo):
            return copier(value, memo)
        if before is not None:
            return before(value, memo)
        if atomic:
            return value
        own = getattr(value, "__deepcopy__", None)
        return own(memo) if own else copy._reconstruct(value, memo, *value.__reduce_ex__(4))  # type: ignore[attr-defined]

    return chosen
