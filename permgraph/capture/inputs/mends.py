"""What a failed run says about its arguments: guesses that come closer, each with what it costs to believe it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from permgraph.capture.inputs.absent import asked_for, in_the_way, left_out
from permgraph.capture.inputs.guesses import (
    LENGTHS,
    RECORDS,
    WIDTHS,
    Guess,
    Guesses,
    Mend,
    annotations_of,
    beginnings,
    changed,
    parameters_of,
    shape_of_rank,
)
from permgraph.capture.inputs.sizes import SIZED, of_other_sizes
from permgraph.capture.inputs.trials import BATCH_RANKS, Failure, Operand

#: The rank that a function wants of its first tensor.
_RANKS = {**BATCH_RANKS, "lstm": 3, "gru": 3, "multi_head_attention_forward": 3}
_ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "__add__", "__radd__", "__mul__", "__rmul__", "where", "cat"})


def mends(model: nn.Module, guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """The guesses that a failure suggests, with what each costs; the order is that of plausibility."""
    yield from asked_for(model, guesses, failure)
    yield from left_out(model, guesses, failure)
    yield from in_the_way(model, guesses, failure)
    yield from _of_another_kind(model, guesses, failure)
    yield from _of_another_rank(model, guesses, failure)
    yield from _as_a_plane(guesses, failure)
    yield from _as_one_token(guesses, failure)
    yield from _of_another_count(guesses, failure)
    yield from of_other_sizes(guesses, failure)
    yield from _begun_otherwise(model, guesses, failure)


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
            yield 0.8, changed(guesses, name, Guess("number"))
    if _WANTS_INTEGERS.search(message) or failure.function in ("one_hot", "gather", "index_select", "scatter"):
        yield from ((cost + 0.5, mended) for cost, mended in _as_ids(guesses, frozenset(blamed), 2))
    if _WANTS_LIST.search(message):
        for name in blamed:
            for shape in ((2, *LENGTHS[:1], *WIDTHS[:1]), *shape_of_rank(model, 4, LENGTHS[0], WIDTHS[0])):
                yield 0.8, changed(guesses, name, Guess("list", shape))
    if "Float" in message or "floating" in message or "Half" in message or "implemented for 'Long'" in message:
        for name in blamed:
            if guesses[name].kind != "real" and guesses[name].shape:
                yield 0.7, changed(guesses, name, guesses[name].with_(kind="real"))


def _as_ids(guesses: Guesses, names: frozenset[str], bound: int) -> Iterator[Mend]:
    for name in sorted(names & guesses.keys()):
        guess = guesses[name]
        if guess.kind != "real":
            continue
        shapes = dict.fromkeys((guess.shape[:2], guess.shape[:1], guess.shape))
        for at, shape in enumerate(shapes if len(guess.shape) < 4 else (guess.shape[:1], (2, LENGTHS[0]))):
            yield 0.3 + 0.5 * at, changed(guesses, name, Guess("ids", shape, bound))


def _of_another_rank(model: nn.Module, guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """The argument with more or fewer dimensions, as the function or the unpacking wants."""
    for operand, wanted in _wrong_ranks(failure):
        for name in sorted(operand.origins):
            guess = guesses.get(name)
            if guess is None or guess.kind not in SIZED:
                continue
            rank = len(guess.shape) + wanted - len(operand.shape)
            place = list(guesses).index(name)
            length, width = LENGTHS[place % len(LENGTHS)], WIDTHS[place % len(WIDTHS)]
            shapes = list(shape_of_rank(model, rank, length, width)) if 0 < rank < 7 else []
            if failure.function in _ELEMENTWISE and guess.kind in ("mask", "real"):  # of each place of what it meets
                met = max((other.shape for other in failure.operands), key=len)
                flat = (*met[:1], 1, *met[2:])
                if len(met) > 3 and len(guess.shape) < len(met):
                    yield 0.3, changed(guesses, name, guess.with_(shape=flat))
            if rank in (2, 3) and len(guess.shape) in (2, 3):  # as wide as before
                shapes = [(guess.shape[0], *(length,) * (rank - 2), guess.shape[-1])]
            if rank == 4 and len(guess.shape) == 3:  # several sequences for each sample
                shapes = [(guess.shape[0], 3, *guess.shape[1:]), *shapes]
            if guess.kind in ("ids", "mask"):
                planes = [(guess.shape[0], 1, *shape[-2:]) for shape in shapes if rank == 4]
                shapes = [*planes, (*guess.shape, *LENGTHS[-2:])[:rank]] if rank > 0 else [()]
            elif rank == 5 and "conv3d" not in failure.function and failure.function in _RANKS:
                # Several images for each sample, of which the batch and the instances were made one.
                images = next(shape_of_rank(model, 4, length, width))
                shapes = [(images[0], 3, *images[1:]), *shapes]
            elif rank == 3 and failure.function in _RANKS and failure.function.startswith("conv"):
                shapes = [(2, width, 64), *shapes]
            for at, shape in enumerate(shapes):
                yield 0.4 + 0.4 * at, changed(guesses, name, guess.with_(shape=shape))


def _as_a_plane(guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """Masks as an image of one channel, of each sample or of all, where images or videos were being put together."""
    highest = max((operand.shape for operand in failure.operands), key=len, default=())
    for name in _blamed(failure, guesses) if len(highest) > 3 else ():
        guess = guesses[name]
        if guess.kind == "mask" and len(guess.shape) < 4:
            for at, samples in enumerate((1, guess.shape[0])):
                yield 0.25 + 0.1 * at, changed(guesses, name, guess.with_(shape=(samples, 1, *highest[-2:])))


def _as_one_token(guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """Vectors as sequences of one vector, where there were too few numbers for a shape."""
    if "is invalid for input of size" in str(failure.error):
        for name in _blamed(failure, guesses):
            guess = guesses[name]
            if guess.kind == "real" and len(guess.shape) == 2:
                yield 0.7, changed(guesses, name, guess.with_(shape=(guess.shape[0], 1, guess.shape[1])))


def _wrong_ranks(failure: Failure) -> Iterator[tuple[Operand, int]]:
    """Tensors that have another number of dimensions than was wanted, and that number."""
    message = str(failure.error)
    found = re.search(r"Expected (\d)-D tensors, but got \d-D for tensor number (\d+) in the list", message)
    if found and int(found[2]) < len(failure.operands):
        yield failure.operands[int(found[2])], int(found[1])
        if sum(len(operand.shape) == int(found[1]) for operand in failure.operands) > 1:
            return  # it is the odd one out
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
    spaces = re.search(r"spatial dimensions of \[(.*?)\] and output size of \[(.*?)\]", message)
    if spaces:
        yield last, rank + spaces[2].count(",") - spaces[1].count(",")
    if isinstance(failure.error, IndexError) or "imension out of range" in message or "subscripts" in message:
        yield last, rank + 1
        yield last, rank + 2
    if "too many values to unpack" in message or "number of dimensions" in message or "subscripts" in message:
        yield from ((last, other) for other in (rank - 1, rank + 1, rank + 2) if other > 0)


def _of_another_count(guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """Lists of more tensors, where one was asked for that was not there."""
    if not isinstance(failure.error, IndexError) or "list index" not in str(failure.error):
        return
    for name, guess in guesses.items():
        if guess.kind == "list" and guess.shape[0] < 100:
            for at, more in enumerate((2, 8)):
                yield 0.4 + at, changed(guesses, name, guess.with_(shape=(more * guess.shape[0], *guess.shape[1:])))


def _begun_otherwise(model: nn.Module, guesses: Guesses, failure: Failure) -> Iterator[Mend]:
    """Other beginnings for the arguments that an error is about, and at last for any."""
    blamed = _blamed(failure, guesses)
    order = list(parameters_of(model))
    hints = annotations_of(model)
    for name in (*blamed, *(other for other in guesses if other not in blamed)):
        own = name.rpartition(".")[2]
        place = order.index(name) if name in order else list(guesses).index(name)
        for at, guess in enumerate(beginnings(model, own, place, hints.get(name))):
            if guess != guesses[name] and not ("." in name and guess.kind in RECORDS):
                yield 2 + 0.5 * at + (0 if name in blamed else 2), changed(guesses, name, guess)
