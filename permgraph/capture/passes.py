"""Further passes: the same module on inputs of other sizes, in training mode, called twice, with other arguments."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from permgraph.capture.arguments import other_arguments
from permgraph.capture.inputs.registry import ExampleInputs
from permgraph.capture.module_copy import copy_with


@dataclass(frozen=True)
class Sizes:
    """New sizes of batches and of places, by the old ones, and which dimensions of a tensor are places."""

    batch: Mapping[int, int]
    places: Mapping[int, int]
    which: Callable[[Tensor], range]

    def of(self, tensor: Tensor, dim: int) -> int:
        """The new size of a dimension."""
        size = tensor.shape[dim]
        if dim == 0:
            return self.batch.get(size, size)
        return self.places.get(size, size) if dim in self.which(tensor) else size


@dataclass(frozen=True)
class Variation:
    """How a further pass differs from the first.

    Attributes:
        name: in words, for people.
        shows: what of that which a user may vary it shows; a pass of which an earlier one showed all is not run.
        inputs: what the module is called on.
        training: in training mode, with dropout as identity.
        calls: how often it is called on them, one time after the other.
        ends_in_evaluation: the last of the calls is in evaluation mode, after others in training mode.
        flags: it differs in flags, which may make the module return what it computes on the way, see `by_products`.
        weights: a seed, for others than the module has.
        answers: which of the values that Python asks for it is told otherwise, by their number, and how.
    """

    name: str
    shows: frozenset[str]
    inputs: ExampleInputs
    training: bool = False
    calls: int = 1
    ends_in_evaluation: bool = False
    flags: bool = False
    weights: int | None = None
    answers: tuple[tuple[int, str], ...] = ()

    @property
    def on_other_values(self) -> bool:
        """Whether nothing but values differs from the first pass."""
        return bool(self.answers) or self.weights is not None


ASPECTS: Mapping[str, str] = {
    "sizes": "larger sizes",
    "batch": "a larger batch",
    "training": "training mode",
    "calls": "a second call",
    "rows": "longer rows",
    "sizes alone": "larger sizes in evaluation mode",
    "training alone": "training mode on these sizes",
    "calls in training": "several calls in training mode",
}
"""What a user may vary of any module's inputs, in words; the names of arguments come on top."""

IF_DIFFERENT = frozenset({"sizes alone", "training alone", "calls in training"})
"""What is looked at only where another pass was found to differ from the first, see `FurtherPasses`."""


def variations(
    model: nn.Module, inputs: ExampleInputs, unread: Collection[str] = (), shown: Set[str] = frozenset()
) -> Iterator[Variation]:
    """What to vary, the passes that show most first: sizes and training mode, a second call, then other arguments.

    Where parameters are `unread` when it comes to that, tensors are made up for arguments that default to None. No
    larger inputs are made, which takes time, for what is among `shown` by then.
    """
    larger = [(sizes, {"batch", "sizes"}, "larger sizes") for sizes in _larger_sizes(model, inputs, _GUESSES)]
    if not larger:
        larger = [(sizes, {"batch", "rows"}, "longer rows") for sizes in _larger_sizes(model, inputs, (_rows,))]
    larger += [(sizes, {"batch"}, "a larger batch") for sizes in _larger_sizes(model, inputs, (_no_places,))]
    for training, mode in ((True, "training"), (False, "sizes alone")):
        for sizes, of_sizes, name in larger:
            shows = frozenset({*of_sizes, mode})
            if not shows <= shown:
                made = _mapped(inputs, functools.partial(resized, sizes=sizes))
                yield Variation(f"{name} in training mode" if training else name, shows, made, training)
    yield Variation("training mode", frozenset({"training", "training alone"}), inputs, training=True)
    yield Variation("two calls", frozenset({"calls"}), inputs, calls=2)
    in_turn = frozenset({"calls in training"})
    yield Variation("two calls in training mode, one in evaluation", in_turn, inputs, True, 3, True)
    for name, named, other, flags in other_arguments(model, inputs, unread):
        yield Variation(name, named, other, flags=flags)


def _mapped(inputs: ExampleInputs, change: Callable[[Tensor], Tensor]) -> ExampleInputs:
    args, kwargs = copy_with((inputs.args, inputs.kwargs), change, {})
    return replace(inputs, args=args, kwargs=kwargs)


# -- sizes -------------------------------------------------------------------------------------------------------------


def _tensors(inputs: ExampleInputs) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    copy_with((inputs.args, inputs.kwargs), keep, {})
    return found


def _places_first(tensor: Tensor) -> range:
    """The dimensions, besides the batch, that are places of a text, steps of a sequence or rows of an image.

    A guess: of whole numbers all; of floats the second of three, the later of more, as in sequences of vectors, and in
    images whose channels come first. Where it is wrong, the pass fails, which is harmless.
    """
    if _whole(tensor):
        return range(1, tensor.ndim)
    return range(1, 2) if tensor.ndim == 3 else range(2, tensor.ndim)


def _places_last(tensor: Tensor) -> range:
    """The other guess: the last of three, as in signals with channels, the middle ones of images with channels last."""
    if _whole(tensor):
        return range(1, tensor.ndim)
    return range(2, 3) if tensor.ndim == 3 else range(1, tensor.ndim - 1)


def _all_places(tensor: Tensor) -> range:
    """The boldest guess, which all but images without channels refuse: all of three."""
    return range(1, 3) if tensor.ndim == 3 else _places_first(tensor)


def _rows(tensor: Tensor) -> range:
    """A bolder guess: rows of floats are waveforms. Mostly they are features, for which the model has weights."""
    return range(1, 2) if tensor.ndim == 2 else range(0)


def _no_places(tensor: Tensor) -> range:
    return range(0)


def _whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape; of a parameter that is not initialised yet, none."""
    return () if is_lazy(tensor) else tuple(tensor.shape)


_GUESSES = (_all_places, _places_first, _places_last)


def _larger_sizes(
    model: nn.Module, inputs: ExampleInputs, guesses: Sequence[Callable[[Tensor], range]]
) -> Iterator[Sizes]:
    """New sizes for those that a user may vary; no two become one, and none becomes one of the inputs or weights.

    Sizes that are equal stay equal, for a mask has the length of its text twice. But first it is tried as if a batch
    were as large as something else by chance.
    """
    tensors = _tensors(inputs)
    taken = {size for tensor in (*model.parameters(), *model.buffers()) for size in _shape(tensor)}
    taken.update(size for tensor in tensors for size in tensor.shape)
    seen: list[list[tuple[int, ...]]] = [[tuple(tensor.shape) for tensor in tensors]]
    for places in guesses:
        batches = dict.fromkeys(tensor.shape[0] for tensor in tensors if tensor.ndim)
        others = dict.fromkeys(tensor.shape[d] for tensor in tensors for d in places(tensor))
        if places is not _no_places and not others:
            continue
        used = set(taken)
        batch = {size: _next(size, used) for size in batches}
        apart = {size: _next(size, used) for size in others}
        odd = {size: _next_odd(new, used) for size, new in apart.items()}
        as_batch = {size: batch.get(size, apart[size]) for size in others}
        images = any(tensor.ndim > 3 for tensor in tensors)  # which are mostly halved several times
        for of_places in (apart, as_batch) if images else (odd, apart, as_batch):
            sizes = Sizes(batch, of_places, places)
            shapes = [tuple(map(sizes.of, [tensor] * tensor.ndim, range(tensor.ndim))) for tensor in tensors]
            if shapes not in seen:
                seen.append(shapes)
                yield sizes


def _next(size: int, taken: set[int]) -> int:
    """A larger size that is not taken, and is then."""
    found = next(n for n in _above(size) if n not in taken)
    taken.add(found)
    return found


def _next_odd(size: int, taken: set[int]) -> int:
    """An odd size that is not smaller, nor taken unless it is this one, and is then.

    What is done for even lengths alone, or where one is the multiple of another, was seen; what is cut or padded, not.
    """
    if size % 2:
        return size
    found = next(n for n in itertools.count(size + 1, 2) if n not in taken and _is_prime(n))
    taken.add(found)
    return found


def _is_prime(n: int) -> bool:
    return all(n % d for d in range(2, math.isqrt(n) + 1))


def _above(size: int) -> Iterator[int]:
    """Sizes above this one: larger primes times the same power of two, and twice these for one that is odd.

    Where a size of 64 became 128, and a map of 2 rows one of 4, a view could cut the one as it cut the other by
    accident, such as 16 channels into rows of 4 again. What is done for odd lengths alone is not done again.
    """
    step = (size & -size) if size > 4 else 1
    if step == 1 and size > 4:
        step = 2
    return (step * n for n in itertools.count(max(size // step + 1, 3)) if _is_prime(n))


def larger_by_one(inputs: ExampleInputs) -> ExampleInputs:
    """The inputs with every size but the batch's larger by one, where that makes no two equal."""
    varied = dict.fromkeys(size for tensor in _tensors(inputs) for size in tensor.shape[1:])
    sizes = Sizes({}, {size: size + 1 for size in varied if size + 1 not in varied}, _places_first)
    return _mapped(inputs, functools.partial(resized, sizes=sizes))


def resized(tensor: Tensor, sizes: Sizes) -> Tensor:
    """The tensor with other sizes: what it holds again from the start, and whole numbers that count go on counting."""
    if tensor.layout not in (torch.strided, torch.sparse_coo):
        return _compressed_again(resized(tensor.to_dense(), sizes), tensor)
    made = tensor.detach()
    for dim in range(tensor.ndim):
        size, new = tensor.shape[dim], sizes.of(tensor, dim)
        if size in (0, new):  # nothing can be made of no values
            continue
        at = torch.arange(new, device=made.device)
        counts = made.dtype in (torch.int64, torch.int32) and size > 1 and bool((made.diff(dim=dim) == 1).all())
        made = made.index_select(dim, at % size)
        if counts:
            shape = [1] * made.ndim
            shape[dim] = new
            made = made + (at // size * size).to(made.dtype).view(shape)
    return made


def _compressed_again(made: Tensor, tensor: Tensor) -> Tensor:
    """The one, which is dense, in the other's layout; if its blocks do not fit, the other."""
    if tensor.layout not in (torch.sparse_bsr, torch.sparse_bsc):
        return made.to_sparse(layout=tensor.layout)
    rows, columns = tensor.values().shape[-2:]
    if made.shape[-2] % rows or made.shape[-1] % columns:
        return tensor
    return made.to_sparse(layout=tensor.layout, blocksize=(rows, columns))
