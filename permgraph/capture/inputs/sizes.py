"""Sizes that a failed run found wanting, and the arguments with sizes that would have done.

A complaint is read in this order: the function that raised it and the tensors that it was called on, then the numbers
in its message. A size that is found wanting is traced to the argument that has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from permgraph.capture.inputs.failing_source import compared
from permgraph.capture.inputs.guesses import Guess, Guesses, Mend, changed
from permgraph.capture.inputs.trials import Failure, Operand

Mismatch = tuple[int, int, frozenset[str]]

#: Kinds of guesses that have sizes.
SIZED = frozenset({"real", "ids", "mask", "list"})


def of_other_sizes(guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """Arguments of other sizes, the likeliest cheapest."""
    yield from _as_told(guesses, failure)
    yield from _masks_of_other_lengths(guesses, failure)
    yield from _in_a_row(guesses, failure)
    yield from _without_what_was_folded(guesses, failure)
    yield from _resized_alike(guesses, failure)
    for at, (given, wanted, origins) in enumerate(dict.fromkeys(_mismatches(failure))):
        for cost, mended in _resized(guesses, given, wanted, origins):
            yield cost + 0.5 * min(at, 8), mended


def _origins(failure: Failure) -> frozenset[str]:
    """The arguments that a failure is about: what the function was called on, else what was looked at last."""
    found: frozenset[str] = frozenset().union(*(operand.origins for operand in failure.operands))
    return found or (failure.last.origins if failure.last is not None else frozenset())


_SHAPE = r"[\(\[]([\w\s,*]+)[\)\]]"


def _as_told(guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """The shape that a message names, where it names that of an argument as well: `(B, L, 3)`, and `(2, 31)`."""
    found = [text.replace(" ", "").strip(",").split(",") for text in re.findall(_SHAPE, str(failure.error))]
    given = {tuple(int(size) for size in sizes) for sizes in found if all(size.isdigit() for size in sizes)}
    for wanted in found:
        if len(wanted) < 2 or all(size.isdigit() for size in wanted):
            continue
        for name, guess in guesses.items():
            if guess.kind in SIZED and guess.shape in given:
                kept = (*guess.shape, *(1,) * len(wanted))
                shape = tuple(int(size) if size.isdigit() else kept[at] for at, size in enumerate(wanted))
                if shape != guess.shape:
                    yield 0.2, changed(guesses, name, guess.with_(shape=shape))


def _masks_of_other_lengths(guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """Masks as long as another argument, for what they were made part of may say nothing of their own lengths."""
    blamed = _origins(failure) | (failure.last.origins if failure.last is not None else frozenset())
    lengths = {guess.shape[1] for guess in guesses.values() if guess.kind in ("real", "ids") and len(guess.shape) > 1}
    for name, guess in guesses.items():
        if name in blamed and guess.kind == "mask" and len(guess.shape) == 2:
            for at, length in enumerate(sorted(lengths - {guess.shape[1]})):
                yield 0.6 + 0.2 * at, changed(guesses, name, guess.with_(shape=(guess.shape[0], length)))


def _in_a_row(guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """An argument whose numbers all go into one row, of which a multiple of so many was wanted."""
    found = re.search(r"shape '\[-1, (\d+)\]' is invalid for input of size (\d+)", str(failure.error))
    for name in sorted(_origins(failure) & guesses.keys()) if found else ():
        guess, (wanted, given) = guesses[name], map(int, found.groups()) if found else (0, 0)
        times = given // max(math.prod(guess.shape), 1)
        if guess.kind == "real" and times and wanted % times == 0:
            yield 0.5, changed(guesses, name, guess.with_(shape=(guess.shape[0], wanted // times)))


def _resized_alike(guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """Sequences and masks that are as long as each other, where what they are parts of met a parameter."""
    parameters = {size for operand in failure.operands if not operand.origins for size in operand.shape[:-1]}
    lengths = {operand.shape[1] for operand in failure.operands if operand.origins and len(operand.shape) > 2}
    if len(lengths) != 1:
        return
    (given,) = lengths
    alike: dict[int, list[str]] = {}
    for name in sorted(_origins(failure) & guesses.keys()):
        if guesses[name].kind in ("real", "ids", "mask") and len(guesses[name].shape) in (2, 3):
            alike.setdefault(guesses[name].shape[1], []).append(name)
    for wanted in sorted(parameters - {1, given}):
        for length, names in alike.items():
            if len(names) > 1 and length + wanted - given > 0:
                sizes = dict.fromkeys(names, length + wanted - given)
                yield 0.4, {name: _with_size(guess, 1, sizes.get(name)) for name, guess in guesses.items()}


def _without_what_was_folded(guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """An argument without the dimensions that were made one with the samples before it met others."""
    samples = {operand.shape[0] for operand in failure.operands if operand.shape}
    for name in sorted(_origins(failure) & guesses.keys()):
        shape = guesses[name].shape
        if guesses[name].kind == "real" and len(samples) > 1 and shape[:1] and shape[0] in samples:
            for upto in range(2, len(shape)):
                if shape[0] != math.prod(shape[:upto]) in samples:
                    yield 0.25, changed(guesses, name, guesses[name].with_(shape=(shape[0], *shape[upto:])))


#: Numbers in messages that count dimensions or tensors, and are no sizes.
_NO_SIZES = re.compile(r"\b\d-?D\b|(tensor number|dimension|dim|argument|position|index) #?-?\d+")


def _mismatches(failure: Failure) -> Iterator[Mismatch]:
    """Sizes that were found, those that were wanted, and the arguments that they may come from; the surest first."""
    yield from _by_function(failure)
    everyone = _origins(failure)
    yield from _by_place(failure)
    if "umber of dimensions" not in str(failure.error):
        yield from _by_operands(failure.operands)
    told = [*compared(failure.error), *_totals(str(failure.error))]
    yield from ((given, wanted, everyone) for given, wanted in told)
    yield from ((given, wanted, frozenset()) for given, wanted in told)
    numbers = [int(found) for found in re.findall(r"\d+", _NO_SIZES.sub("", str(failure.error)))][:16]
    pairs = [(given, wanted) for given in reversed(numbers) for wanted in numbers if given != wanted and wanted > 0]
    yield from ((given, wanted, everyone) for given, wanted in pairs)
    yield from ((given, wanted, frozenset()) for given, wanted in pairs)


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


def _by_place(failure: Failure) -> Iterator[Mismatch]:
    """The tensor of a list, by its number, that disagrees with the first in a dimension in which they were to agree."""
    found = re.search(r"Expected (\d+) in dimension \d+ but got (\d+) for tensor number (\d+)", str(failure.error))
    if found:
        wanted, given, number = map(int, found.groups())
        if number < len(failure.operands):
            yield given, wanted, failure.operands[number].origins
            yield wanted, given, failure.operands[0].origins


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


def _resized(guesses: Guesses, given: int, wanted: int, origins: frozenset[str]) -> Iterator[Mend]:
    """Arguments with a size changed so that what was `given` will be `wanted`."""
    for name, guess in guesses.items():
        if guess.kind not in SIZED or (origins and name not in origins):
            continue
        for cost, shape in _shapes(guess.shape, given, wanted):
            if max(shape) < 5000 and math.prod(shape) < 4_000_000:
                yield cost, changed(guesses, name, guess.with_(shape=shape))
        if name in origins and len(origins) > 1 and len(guess.shape) > 1:  # one of those that were concatenated
            for cost, at in ((1.1, 1), (1.6, len(guess.shape) - 1)):
                size = guess.shape[at] + wanted - given
                if size > 0 and size < 5000:
                    yield cost, changed(guesses, name, _with_size(guess, at, size))
    yield from _resized_together(guesses, given, wanted, origins)


def _resized_together(guesses: Guesses, given: int, wanted: int, origins: frozenset[str]) -> Iterator[Mend]:
    """Arguments that were concatenated, each with its part of what is wanted: in equal parts, or one with the rest."""
    names = [name for name in guesses if name in origins and guesses[name].kind in ("real", "mask", "ids")]
    if len(names) < 2:
        return
    for axis in (1, -1):
        sizes = {name: guesses[name].shape[axis] for name in names if len(guesses[name].shape) > 1}
        times = given // max(sum(sizes.values()), 1)  # each size was multiplied by as much after that
        if len(sizes) < 2 or times < 1 or sum(sizes.values()) * times != given or wanted % times:
            continue
        whole, more = wanted // times, wanted // times - sum(sizes.values())
        kinds = {guesses[name].kind for name in sizes}  # what is an image and what is its mask are not in equal parts
        parts = [dict.fromkeys(sizes, whole // len(sizes))] if whole % len(sizes) == 0 and len(kinds) == 1 else []
        parts += [{**sizes, name: more + size} for name, size in sizes.items() if more + size > 0]
        for at, part in enumerate(parts):
            yield 0.5 + at, {name: _with_size(guess, axis, part.get(name)) for name, guess in guesses.items()}
    counts = [math.prod(guesses[name].shape[1:]) for name in names]
    times = given // sum(counts)
    if times and sum(counts) * times == given and wanted % (times * len(names)) == 0:  # all numbers of each, in a row
        width = wanted // (times * len(names))
        flat = {name: guesses[name].with_(shape=(guesses[name].shape[0], width)) for name in names if width}
        yield 0.7, {**guesses, **flat}


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
        for at in range(len(shape) - 1, -1, -1):
            size = shape[at] * ratio
            if size.is_integer() and size > 0 and ratio != 1 and (at > 0 or more == 0):
                yield (1.0 if at else 2.2) + more, (*shape[:at], int(size), *shape[at + 1 :])
