"""What a failed run says about its arguments: guesses that come closer, each with what it costs to believe it.

A complaint is read in this order: the function that raised it and the tensors that it was called on, then the numbers
in its message, then what the model last looked at. A size that is found wanting is traced to the argument that has it.
"""

from __future__ import annotations

import ast
import linecache
import math
import re
import traceback
from collections.abc import Iterator
from typing import Any

from torch import nn

from permgraph.capture.inputs.guesses import (
    LENGTHS,
    WIDTHS,
    Guess,
    Guesses,
    beginnings,
    handed_on,
    parameters_of,
    shape_of_rank,
)
from permgraph.capture.inputs.trials import BATCH_RANKS, Failure, Operand

Mend = tuple[float, dict[str, Guess]]

_MENTIONS_NONE = re.compile(r"NoneType|\bNone\b|must be (given|provided|specified)|should be provided|required")
_SIZED = frozenset({"real", "ids", "mask", "list"})
#: The rank that a function wants of its first tensor.
_RANKS = {**BATCH_RANKS, "lstm": 3, "gru": 3, "multi_head_attention_forward": 3}
_ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "__add__", "__radd__", "__mul__", "__rmul__", "where", "cat"})


def mends(model: nn.Module, guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """The guesses that a failure suggests, with what each costs; the order is that of plausibility."""
    yield from _asked_for(model, guesses, failure)
    yield from _left_out(model, guesses, failure)
    yield from _of_another_kind(model, guesses, failure)
    yield from _of_another_rank(model, guesses, failure)
    for at, (given, wanted, origins) in enumerate(dict.fromkeys(_mismatches(failure))):
        for cost, mended in _resized(guesses, given, wanted, origins):
            yield cost + 0.5 * min(at, 8), mended
    yield from _begun_otherwise(model, guesses, failure)


def _changed(guesses: Guesses, name: str, guess: Guess) -> dict[str, Guess]:
    """The guesses with another for one argument; what it held before goes."""
    kept = {key: value for key, value in guesses.items() if not key.startswith(f"{name}.") or guess.kind in _RECORDS}
    return {**kept, name: guess}


_RECORDS = ("record", "mapping")


# -- arguments and attributes that are not there ----------------------------------------------------------------------


def _asked_for(model: nn.Module, guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """A tensor for the attribute or the key that the model looked for, and an owner that has such."""
    error, place = failure.error, len(guesses)
    owner: str | None = None
    if isinstance(error, AttributeError) and failure.asked in guesses and error.name:
        owner, key, kind = failure.asked, error.name, "record"
    elif isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        owner, key, kind = next((n for n, g in guesses.items() if g.kind == "mapping"), None), error.args[0], "mapping"
    else:
        key = _string_index(error)
        kind = "mapping"
        owner = next(iter(failure.last.origins), None) if key and failure.last is not None else None
    if owner is None or owner not in guesses or "." in owner or not key.isidentifier() or key.startswith("_"):
        return
    holder = guesses[owner] if guesses[owner].kind == kind else Guess(kind)  # type: ignore[arg-type]
    for at, guess in enumerate(beginnings(model, key, place)[:6]):
        yield 0.5 + at, {**_changed(guesses, owner, holder), f"{owner}.{key}": guess}


def _string_index(error: Exception) -> str:
    """The key by which a tensor was indexed, which it cannot be."""
    if not isinstance(error, (IndexError, TypeError, RuntimeError)) or "ind" not in str(error):
        return ""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        found = re.search(r"""\[['"](\w+)['"]\]""", linecache.getline(frame.f_code.co_filename, line))
        if found:
            return found[1]
    return ""


def _left_out(model: nn.Module, guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """An argument whose default is None, where the model does not do without; what the error names comes first."""
    parameters = parameters_of(model)
    absent = [name for name, p in parameters.items() if p.default is None and name not in guesses]
    lines = _failing_lines(failure.error)
    message = str(failure.error)
    told = " ".join((message, *lines))
    absent += [
        name for name in handed_on(model) if name not in parameters and name not in guesses and _mentions(told, name)
    ]
    if not absent:
        return
    named = [name for name in absent if _mentions(message, name)]
    read = [name for name in absent if name not in named and any(_mentions(line, name) for line in lines)]
    likely = named + read
    if (
        not likely
        and not _MENTIONS_NONE.search(message)
        and not isinstance(failure.error, (AssertionError, ValueError))
    ):
        return
    order = [*parameters, *(name for name in absent if name not in parameters)]
    for at, name in enumerate([*likely, *(n for n in absent if n not in likely)][:6]):
        for rank, guess in enumerate(beginnings(model, name, order.index(name))[:3]):
            given = {**guesses, name: guess}
            yield 0.3 + (0.5 if name in likely else 1.5) * at + rank, {n: given[n] for n in _in_order(given, order)}
    if len(absent) > 1:
        every = {name: beginnings(model, name, order.index(name))[0] for name in absent}
        yield 2.5, {name: {**every, **guesses}[name] for name in _in_order({**every, **guesses}, order)}


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None


def _in_order(guesses: Guesses, order: list[str]) -> list[str]:
    return [*(name for name in order if name in guesses), *(name for name in guesses if name not in order)]


def _failing_lines(error: Exception) -> list[str]:
    """The lines of source that were being run when an error was raised, the innermost three, and those just before."""
    lines = []
    for frame, line in list(traceback.walk_tb(error.__traceback__))[-3:]:
        lines += [linecache.getline(frame.f_code.co_filename, number) for number in (line, line - 1)]
    return lines


# -- kinds and ranks --------------------------------------------------------------------------------------------------

_WANTS_INTEGERS = re.compile(r"Long|Int\b|\bint|indices|index", re.IGNORECASE)
_WANTS_LIST = re.compile(r"must be (a )?(tuple|list|sequence)|expected a (list|tuple|sequence)|list of", re.IGNORECASE)
_WANTS_NUMBER = re.compile(r"single element|converted to an index|interpreted as an integer|converted to Scalar")


def _blamed(failure: Failure, guesses: Guesses) -> list[str]:
    """The arguments that an error is about: those the failing function was called on, else what was looked at last."""
    operands = failure.operands or ((failure.last,) if failure.last is not None else ())
    found = [name for operand in operands for name in sorted(operand.origins)]
    return [name for name in dict.fromkeys(found) if name in guesses]


def _of_another_kind(model: nn.Module, guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    message = str(failure.error)
    if failure.function == "embedding" and failure.operands:
        indices, *tables = failure.operands
        rows = next((table.shape[0] for table in tables if table.floating and not table.origins), 2)
        yield from _as_ids(guesses, indices.origins if indices.floating else frozenset(), rows)
    blamed = _blamed(failure, guesses)
    if _WANTS_NUMBER.search(message):
        for name in blamed:
            yield 0.8, _changed(guesses, name, Guess("number"))
    if _WANTS_INTEGERS.search(message) or failure.function in ("one_hot", "gather", "index_select", "scatter"):
        yield from ((cost + 0.5, mended) for cost, mended in _as_ids(guesses, frozenset(blamed), 2))
    if _WANTS_LIST.search(message):
        for name in blamed:
            for shape in ((2, *LENGTHS[:1], *WIDTHS[:1]), *shape_of_rank(model, 4, LENGTHS[0], WIDTHS[0])):
                yield 0.8, _changed(guesses, name, Guess("list", shape))
    if "Float" in message or "floating" in message or "Half" in message or "implemented for 'Long'" in message:
        for name in blamed:
            if guesses[name].kind != "real" and guesses[name].shape:
                yield 0.7, _changed(guesses, name, guesses[name].with_(kind="real"))


def _as_ids(guesses: Guesses, names: frozenset[str], bound: int) -> Iterator[Mend]:
    for name in sorted(names & guesses.keys()):
        guess = guesses[name]
        if guess.kind != "real":
            continue
        shapes = dict.fromkeys((guess.shape[:2], guess.shape[:1], guess.shape))
        for at, shape in enumerate(shapes if len(guess.shape) < 4 else (guess.shape[:1], (2, LENGTHS[0]))):
            yield 0.3 + 0.5 * at, _changed(guesses, name, Guess("ids", shape, bound))


def _of_another_rank(model: nn.Module, guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """The argument with more or fewer dimensions, as the function or the unpacking wants."""
    for operand, wanted in _wrong_ranks(failure):
        for name in sorted(operand.origins):
            guess = guesses.get(name)
            if guess is None or guess.kind not in _SIZED:
                continue
            rank = len(guess.shape) + wanted - len(operand.shape)
            place = list(guesses).index(name)
            length, width = LENGTHS[place % len(LENGTHS)], WIDTHS[place % len(WIDTHS)]
            shapes = list(shape_of_rank(model, rank, length, width)) if 0 < rank < 7 else []
            if failure.function in _ELEMENTWISE and guess.kind in ("mask", "real"):  # of each place of what it meets
                met = max((other.shape for other in failure.operands), key=len)
                flat = (*met[:1], 1, *met[2:])
                if len(met) > 3 and len(guess.shape) < len(met):
                    yield 0.3, _changed(guesses, name, guess.with_(shape=flat))
            if rank in (2, 3) and len(guess.shape) in (2, 3):  # as wide as before
                shapes = [(guess.shape[0], *(length,) * (rank - 2), guess.shape[-1])]
            if guess.kind in ("ids", "mask"):
                shapes = [(*guess.shape, *LENGTHS[-2:])[:rank]] if rank > 0 else [()]
            elif rank == 5 and "conv3d" not in failure.function and failure.function in _RANKS:
                # Several images for each sample, of which the batch and the instances were made one.
                images = next(shape_of_rank(model, 4, length, width))
                shapes = [(images[0], 3, *images[1:]), *shapes]
            elif rank == 3 and failure.function in _RANKS and failure.function.startswith("conv"):
                shapes = [(2, width, 64), *shapes]
            for at, shape in enumerate(shapes):
                yield 0.4 + 0.4 * at, _changed(guesses, name, guess.with_(shape=shape))


def _wrong_ranks(failure: Failure) -> Iterator[tuple[Operand, int]]:
    """Tensors that have another number of dimensions than was wanted, and that number."""
    message = str(failure.error)
    if failure.function in _RANKS and failure.operands:
        rank = _RANKS[failure.function]
        if len(failure.operands[0].shape) != rank:
            yield failure.operands[0], rank
            return
    if failure.function == "permute" and failure.operands:
        order = [v for a in failure.arguments for v in (a if isinstance(a, (list, tuple)) else (a,)) if type(v) is int]
        if len(order) != len(failure.operands[0].shape):
            yield failure.operands[0], len(order)
            return
    if failure.function in _ELEMENTWISE:
        highest = max(len(operand.shape) for operand in failure.operands)
        for operand in failure.operands:
            if operand.origins and 0 < len(operand.shape) < highest:
                yield operand, len(operand.shape) + 1
    last = failure.operands[0] if failure.operands else failure.last
    if last is None:
        return
    rank = len(last.shape)
    patterns = (r"to unpack \(expected (\d)", r"expected (\d) dim", r"len\(dims\) = (\d)", r"(\d)D", r"(\d)-?D\b")
    for pattern in (*patterns, r"(\d)[- ]dim"):
        for found in re.findall(pattern, message):
            if int(found) != rank:
                yield last, int(found)
    if isinstance(failure.error, IndexError) or "imension out of range" in message or "subscripts" in message:
        yield last, rank + 1
        yield last, rank + 2
    if "too many values to unpack" in message or "number of dimensions" in message or "subscripts" in message:
        yield from ((last, other) for other in (rank - 1, rank + 1, rank + 2) if other > 0)


# -- sizes ------------------------------------------------------------------------------------------------------------

Mismatch = tuple[int, int, frozenset[str]]


def _mismatches(failure: Failure) -> Iterator[Mismatch]:
    """Sizes that were found, those that were wanted, and the arguments that they may come from; the surest first."""
    yield from _by_function(failure)
    everyone = frozenset().union(*(operand.origins for operand in failure.operands))
    if not everyone and failure.last is not None:
        everyone = failure.last.origins
    yield from _by_operands(failure.operands)
    for given, wanted in (*_compared(failure.error), *_totals(str(failure.error))):
        yield given, wanted, frozenset()
    numbers = [int(found) for found in re.findall(r"\d+", str(failure.error))][:16]
    for given in reversed(numbers):
        for wanted in numbers:
            if given != wanted and wanted > 0:
                yield given, wanted, frozenset()


def _by_function(failure: Failure) -> Iterator[Mismatch]:
    """What is known of the functions that have weights."""
    name, operands = failure.function, failure.operands
    if not operands or not operands[0].shape:
        return
    data, *others = operands
    weight = next((o for o in others if not o.origins and len(o.shape) > 0), None)
    if name in ("layer_norm", "rms_norm"):
        wanted = next((v for v in failure.arguments if isinstance(v, (list, tuple)) and v), ())
        yield from ((g, w, data.origins) for g, w in zip(data.shape[::-1], list(wanted)[::-1], strict=False) if g != w)
    elif weight is None:
        return
    elif name == "linear" and len(weight.shape) == 2:
        yield data.shape[-1], weight.shape[1], data.origins
    elif name in ("matmul", "__matmul__", "mm", "bmm", "addmm") and len(weight.shape) > 1:
        yield data.shape[-1], weight.shape[-2], data.origins
    elif name.startswith("conv_transpose") and len(data.shape) > 1:
        yield data.shape[1], weight.shape[0], data.origins
    elif name.startswith("conv") and len(data.shape) > 1:
        groups = next((v for v in reversed(failure.arguments) if type(v) is int), 1)
        yield data.shape[1], weight.shape[1] * groups, data.origins
    elif name in ("group_norm", "batch_norm", "instance_norm") and len(data.shape) > 1:
        yield data.shape[1], weight.shape[0], data.origins


def _by_operands(operands: tuple[Operand, ...]) -> Iterator[Mismatch]:
    """Sizes in which two tensors disagree, dimension by dimension from the last."""
    for first in operands:
        for second in operands:
            if first is second or not first.origins:
                continue
            for given, wanted in zip(first.shape[::-1], second.shape[::-1], strict=False):
                if given != wanted and wanted != 1 and given > 0:
                    yield given, wanted, first.origins


def _totals(message: str) -> Iterator[tuple[int, int]]:
    """How many numbers a tensor has of which another shape was wanted."""
    found = re.search(r"shape '\[(.*?)\]' is invalid for input of size (\d+)", message)
    if found:
        wanted = math.prod(int(size) for size in found[1].split(","))
        if wanted > 0:
            yield int(found[2]), wanted
        elif wanted < 0:  # one size is whatever is left: the next multiple of the others
            yield int(found[2]), -wanted * -(-int(found[2]) // -wanted or 1)
    found = re.search(r"can't divide axis of length (\d+) in chunks of (\d+)", message)
    if found:
        yield int(found[1]), int(found[2]) * -(-int(found[1]) // int(found[2]))


def _compared(error: Exception) -> Iterator[tuple[int, int]]:
    """The two sides of the comparison that a failed assertion made, where they are names or attributes."""
    if not isinstance(error, AssertionError):
        return
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    source = linecache.getline(frame.f_code.co_filename, line).strip()
    try:
        statement = ast.parse(source).body[0]
    except (SyntaxError, IndexError):
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.Compare):
            sides = [_evaluated(side, frame.f_locals) for side in (node.left, *node.comparators)]
            numbers = [value for value in sides if type(value) is int]
            for given in numbers:
                yield from ((given, wanted) for wanted in numbers if wanted != given)


def _evaluated(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of a name, an attribute, a constant or an indexed shape; None for anything that would run code."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _evaluated(node.value, names)
        if node.attr == "shape" or isinstance(owner, nn.Module):
            return getattr(owner, node.attr, None)
    if isinstance(node, ast.Subscript):
        owner, at = _evaluated(node.value, names), _evaluated(node.slice, names)
        if isinstance(owner, tuple) and type(at) is int and -len(owner) <= at < len(owner):
            return owner[at]
    return None


def _resized(guesses: Guesses, given: int, wanted: int, origins: frozenset[str]) -> Iterator[Mend]:
    """Arguments with a size changed so that what was `given` will be `wanted`."""
    for name, guess in guesses.items():
        if guess.kind not in _SIZED or (origins and name not in origins):
            continue
        for cost, shape in _shapes(guess.shape, given, wanted):
            if max(shape) < 5000 and math.prod(shape) < 4_000_000:
                yield cost, _changed(guesses, name, guess.with_(shape=shape))
    yield from _resized_together(guesses, given, wanted, origins)


def _resized_together(guesses: Guesses, given: int, wanted: int, origins: frozenset[str]) -> Iterator[Mend]:
    """Arguments that were concatenated, each with its part of what is wanted: in equal parts, or one with the rest."""
    names = [name for name in guesses if name in origins and guesses[name].kind == "real"]
    for axis in (1, -1):
        sizes = {name: guesses[name].shape[axis] for name in names if len(guesses[name].shape) > 1}
        if len(sizes) < 2 or sum(sizes.values()) != given:
            continue
        parts = [dict.fromkeys(sizes, wanted // len(sizes))] if wanted % len(sizes) == 0 else []
        parts += [{**sizes, name: wanted - given + size} for name, size in sizes.items() if wanted - given + size > 0]
        for at, part in enumerate(parts):
            yield 0.5 + at, {name: _with_size(guess, axis, part.get(name)) for name, guess in guesses.items()}


def _with_size(guess: Guess, axis: int, size: int | None) -> Guess:
    if size is None:
        return guess
    at = axis % len(guess.shape)
    return guess.with_(shape=(*guess.shape[:at], size, *guess.shape[at + 1 :]))


def _shapes(shape: tuple[int, ...], given: int, wanted: int) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Shapes in which a size is another: the size itself, or one by which a token was added, or of which it is made."""
    for more in (0, 1, 2):
        if (given - more) in shape[1:] and wanted > more:
            yield 0.2 + more, tuple(shape[:1]) + tuple(wanted - more if s == given - more else s for s in shape[1:])
    if shape and shape[0] == given and len(shape) < 3:
        yield 2.5, (wanted, *shape[1:])
    for more in (0, 1, 2):
        if given <= more or wanted <= more:
            continue
        ratio = (wanted - more) / (given - more)
        if len(shape) > 3 and shape[-1] == shape[-2]:
            side = round(shape[-1] * math.sqrt(ratio))
            if side != shape[-1] and side > 0:
                yield 0.9 + more, (*shape[:-2], side, side)
        for at in range(len(shape) - 1, 0, -1):
            size = shape[at] * ratio
            if size.is_integer() and size > 0 and ratio != 1:
                yield 1.0 + more, (*shape[:at], int(size), *shape[at + 1 :])


def _begun_otherwise(model: nn.Module, guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """Other beginnings for the arguments that an error is about, and at last for any."""
    blamed = _blamed(failure, guesses)
    order = list(parameters_of(model))
    for name in (*blamed, *(other for other in guesses if other not in blamed)):
        own = name.rpartition(".")[2]
        place = order.index(name) if name in order else list(guesses).index(name)
        for at, guess in enumerate(beginnings(model, own, place)):
            if guess != guesses[name] and not ("." in name and guess.kind in _RECORDS):
                yield 2 + 0.5 * at + (0 if name in blamed else 2), _changed(guesses, name, guess)
