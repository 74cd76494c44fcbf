"""What used to end in an error from inside: resized results, pieces that are not read, devices, sparse tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg

SIX = math.lgamma(7)


class Net(nn.Module):
    """Six hidden units; `use` computes the outputs from them."""

    def __init__(self, use: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.use = use

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.first(x).relu())

    @property
    def weight(self) -> Tensor:
        return self.head.weight.t()


def proven(model: nn.Module, expected: float, x: Tensor | None = None, *, vary: bool = True) -> pg.PermutationSpec:
    """The spec of a model, with the order that it must have, proven on random weights."""
    inputs = (torch.randn(4, 3) if x is None else x,)
    spec = pg.auto_spec(model, inputs, vary=vary)
    assert spec.log_order() == pytest.approx(expected)
    assert pg.verify(model, spec, inputs, further=2.0 if vary else 0).passed
    return spec


def product(m: Net, h: Tensor) -> Tensor:
    out = h.new_empty(0)
    torch.mm(h, m.weight, out=out)
    return out


def product_into_numbers(m: Net, h: Tensor) -> Tensor:
    out = torch.empty(0, dtype=h.dtype)
    return torch.matmul(h, m.weight, out=out) + out


def hidden_itself(m: Net, h: Tensor) -> Tensor:
    out = h.new_empty(0)
    torch.add(h, 1, out=out)
    return m.head(out) + torch.mm(out, m.weight)


def another_size(m: Net, h: Tensor) -> Tensor:
    out = h.new_empty(3)
    out.resize_(0)
    torch.cat([h.tanh(), h], out=out)
    return m.head(out)


def two_results(m: Net, h: Tensor) -> Tensor:
    values, places = h.new_empty(0), torch.empty(0, dtype=torch.long)
    torch.max(m.head(h), 0, out=(values, places))
    return values


def batched(m: Net, h: Tensor) -> Tensor:
    out = h.new_empty(0)
    torch.matmul(h.expand(2, *h.shape), m.weight, out=out)
    return out


def resized_first(m: Net, h: Tensor) -> Tensor:
    out = h.new_empty(0)
    out.resize_(4, 6)
    out.copy_(h)
    return m.head(out)


def given_its_size(m: Net, h: Tensor) -> Tensor:
    out = h.new_empty(4, 2)
    torch.mm(h, m.weight, out=out)
    return out


def units_are_the_result(m: Net, h: Tensor) -> Tensor:
    out = h.new_empty(0)
    torch.exp(h, out=out)
    return out


RESULTS = [
    product,
    product_into_numbers,
    hidden_itself,
    another_size,
    two_results,
    batched,
    resized_first,
    given_its_size,
]


@pytest.mark.filterwarnings("ignore:An output with one or more elements")
@pytest.mark.parametrize("use", RESULTS)
def test_results_written_to_tensors_that_are_resized(use: Callable[[Net, Tensor], Tensor]) -> None:
    proven(Net(use), SIX)


def test_a_resized_result_that_is_returned_stays_put() -> None:
    proven(Net(units_are_the_result), 0.0)


class Stack(nn.Module):
    """A stack of square weights, of which as many are read as the input has rows."""

    def __init__(self, layers: int, size: int = 6) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, size), nn.Linear(size, 2)
        self.w = nn.Parameter(torch.randn(layers, size, size))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for w in self.w[: len(x)]:
            h = torch.tanh(h @ w)
        return self.head(h)


@pytest.mark.parametrize("layers", [3, 4, 5, 9])
def test_a_stack_of_which_the_first_two_are_read(layers: int) -> None:
    """6! before, between and behind the two; what is not read stays put."""
    spec = proven(Stack(layers), 3 * SIX, torch.randn(2, 3), vary=False)
    state = Stack(layers).state_dict()
    assert torch.equal(spec.random(seed=0).apply(state)["w"][2:], state["w"][2:])


def moved_to_its_input(m: Net, h: Tensor) -> Tensor:
    m.to(h.device)
    return m.head(h)


def layer_moved_to_its_input(m: Net, h: Tensor) -> Tensor:
    return m.head.to(device=h.device)(h)


def moved_in_two_steps(m: Net, h: Tensor) -> Tensor:
    m.cpu()
    return m.head.to(h.dtype)(h.to(next(m.parameters()).device))


def in_another_type(m: Net, h: Tensor) -> Tensor:
    m.head.double()
    return m.head(h.double()).float()


@pytest.mark.parametrize("use", [moved_to_its_input, layer_moved_to_its_input, moved_in_two_steps, in_another_type])
def test_modules_that_move_themselves(use: Callable[[Net, Tensor], Tensor]) -> None:
    model = Net(use)
    parameter = model.head.weight
    proven(model, SIX)
    assert model.head.weight is parameter
    assert parameter.dtype == torch.float32
    assert "_apply" not in vars(model)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("where", ["attribute", "list", "buffer"])
def test_sparse_tensors_that_are_held_multiply_samples(where: str, layout: str) -> None:
    """Samples are mixed, and units are left alone."""

    def use(m: Net, h: Tensor) -> Tensor:
        held = m.adjacency[0] if where == "list" else m.adjacency  # type: ignore[index]
        return m.head(torch.sparse.mm(held.to(h.dtype), h))  # type: ignore[union-attr]

    model = Net(use)
    matrix = getattr(torch.eye(4), layout)()
    if where == "buffer":
        model.register_buffer("adjacency", matrix)
    else:
        model.adjacency = [matrix] if where == "list" else matrix
    spec = proven(model, SIX)
    assert not spec.unknown_ops


NESTED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "rows": lambda m, h: m.head(torch.nested.nested_tensor([h[:1], h[1:]])).to_padded_tensor(0.0),
    "jagged": lambda m, h: m.head(torch.nested.nested_tensor([h[:1], h[1:]], layout=torch.jagged)).values(),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", NESTED)
def test_nested_tensors_are_refused_with_the_next_step(name: str) -> None:
    with pytest.raises(pg.errors.CaptureError, match="pass padded sequences and a mask instead"):
        pg.auto_spec(Net(NESTED[name]), (torch.randn(4, 3),))
    rows = torch.nested.nested_tensor([torch.randn(1, 3), torch.randn(2, 3)], layout=torch.jagged)
    with pytest.raises(pg.errors.CaptureError, match="pass padded sequences and a mask instead"):
        pg.auto_spec(Net(lambda m, h: m.head(h)), (rows,))


SLOPE = 0.25


def slope(value: float) -> float:
    return value if value > 0 else SLOPE * value


def counting() -> Callable[[float], float]:
    """A function that tells the elements apart by their order."""
    seen: list[float] = []

    def number(value: float) -> float:
        seen.append(value)
        return value * len(seen)

    return number


def stepping(start: float = 0.0) -> Callable[[float], float]:
    count = start

    def number(value: float) -> float:
        nonlocal count
        count += 1
        return value * count

    return number


def taking() -> Callable[[float], float]:
    numbers = iter(range(10**6))
    return lambda v: v * next(numbers)


PER_ELEMENT: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "product": (lambda h: h.apply_(lambda v: 2 * v), SIX),
    "global function": (lambda h: h.apply_(slope), SIX),
    "of math": (lambda h: h.apply_(math.tanh), SIX),
    "math inside": (lambda h: h.apply_(lambda v: max(0.0, math.sin(v)) ** 2), SIX),
    "closure over a number": (lambda h: (lambda scale: h.apply_(lambda v: scale * v))(3.0), SIX),
    "two tensors": (lambda h: h.map_(h.tanh(), lambda a, b: a * b), SIX),
    "three tensors": (lambda h: h.map2_(h.tanh(), h.sin(), lambda a, b, c: a * b + c), SIX),
    "unbound": (lambda h: Tensor.apply_(h, lambda v: v - 1), SIX),
    "read through a view": (lambda h: (h.view(-1).apply_(lambda v: v + 1), h)[1], SIX),
    "counts": (lambda h: h.apply_(counting()), 0.0),
    "counts in a variable": (lambda h: h.apply_(stepping()), 0.0),
    "takes from an iterator": (lambda h: h.apply_(taking()), 0.0),
}


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("name", PER_ELEMENT)
def test_functions_of_each_element(name: str, real: bool) -> None:
    """One that computes a number from numbers moves with the units; one that may tell them apart pins them."""
    function, expected = PER_ELEMENT[name]

    def use(m: Net, h: Tensor) -> Tensor:
        if real and h.sum().item() > 1e9:
            return h
        return m.head(function(h.clone()) + 0)

    model = Net(use)
    spec = pg.auto_spec(model, (torch.randn(4, 3),))
    assert spec.log_order() == pytest.approx(expected)
    assert pg.verify(model, spec, (torch.randn(4, 3),)).passed
