"""What is declared of operators' values: counted among 4,000 normal numbers, and held against the declaration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from permgraph.rules.properties import Properties
from permgraph.rules.registry import list_rules, properties_of, rule

COUNT = 4000
#: Of an operator's own numbers, those that a plain draw of its schema does not give.
NUMBERS: dict[str, list[Any]] = {
    "negative_slope": [0.01, 0.0], "alpha": [1.0, 0.0], "exponent": [3.0, 0.0], "min": [-0.5], "max": [0.5],
    "min_val": [-0.5], "max_val": [0.5], "threshold": [0.1], "value": [0.7], "lambd": [0.5], "eps": [0.2],
    "scale": [1.5], "input_scale": [1.0], "zero_point": [0], "axis": [0], "quant_min": [-8], "quant_max": [7],
    "n": [1], "weight": [0.3], "negcoef": [1.0], "poscoef": [1.0], "beta": [1.0], "lower": [0.1, 0.0],
    "upper": [0.1, 0.0], "is_result": [False], "self_is_result": [False], "training": [False],
}  # fmt: skip
#: Operators that repeat values on arguments that are no normal numbers.
REPEAT_ELSEWHERE = {
    "nan_to_num": "infinities become one number",
    "complex": "two parts, of which one may repeat", "polar": "an angle of any size", "real": "a part that may repeat",
    "imag": "a part that may repeat", "dequantize": "rounded numbers",
}  # fmt: skip


def elementwise(*values: str) -> list[str]:
    """The names of torch's elementwise operators that declare one of these."""
    names = [entry.name for entry in list_rules("aten.*") if entry.properties.values in values]
    return [name.removeprefix("aten.") for name in names if "__" not in name and "bitwise" not in name]


def _normal(seed: int) -> Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _calls(name: str, *, mixed: bool, wide: float = 1.0) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
    """The overloads of an operator on normal numbers; `mixed`: one of several tensors may be one number throughout.

    Gives the numbers among the arguments, and the floating-point results.
    """
    base, _, only = name.partition(".")
    packet = getattr(torch.ops.aten, base)
    for overload in [only] if only else packet.overloads():
        operator = getattr(packet, overload)
        if any(a.alias_info is not None and a.alias_info.is_write for a in operator._schema.arguments):
            continue
        tensors, numbers = [], {}
        for argument in operator._schema.arguments:
            kind = str(argument.type)
            if argument.has_default_value() and argument.name not in NUMBERS:
                continue
            if "Tensor" in kind:
                tensors.append(argument)
            elif argument.name in NUMBERS:
                numbers[argument.name] = NUMBERS[argument.name]
            else:
                numbers[argument.name] = [0.7, 0.0] if "float" in kind or "number" in kind else [2]
        for drawn in itertools.product(*numbers.values()):
            given = dict(zip(numbers, drawn, strict=True))
            fills: list[list[Tensor | None]] = [[None] * len(tensors)]
            if mixed and len(tensors) > 1:
                fills += [
                    [torch.full((COUNT,), one, dtype=torch.float64) if i == at else None for i in range(len(tensors))]
                    for at in range(len(tensors)) for one in (0.0, 1.0)
                ]  # fmt: skip
            for fill in fills:
                made = {a.name: wide * _normal(i) if fill[i] is None else fill[i] for i, a in enumerate(tensors)}
                try:
                    results = tree_leaves(operator(**made, **given))
                except (RuntimeError, TypeError, ValueError, NotImplementedError):
                    continue  # not for these types: an overload for integers, for complex numbers, for quantised ones
                real = [r for r in results if isinstance(r, Tensor) and r.numel() and r.is_floating_point()]
                if real:
                    yield given, real


def _duplicates(result: Tensor) -> int:
    finite = result[result.isfinite()]
    return finite.numel() - finite.unique().numel()


@pytest.mark.parametrize("name", elementwise("distinct", "product"))
def test_distinct_numbers_stay_distinct(name: str) -> None:
    properties = properties_of(f"aten.{name}")
    ran = 0
    for given, results in _calls(name, mixed=False):
        if any(given.get(argument) == 0 for argument in properties.repeats_if_zero):
            continue
        assert [_duplicates(result) for result in results] == [0] * len(results), given
        ran += 1
    assert ran or name in ("conj", "_conj", *REPEAT_ELSEWHERE)


@pytest.mark.parametrize("name", elementwise("distinct"))
def test_an_operand_that_does_not_vary_leaves_the_other_distinct(name: str) -> None:
    properties = properties_of(f"aten.{name}")
    for given, results in _calls(name, mixed=True):
        if not any(given.get(argument) == 0 for argument in properties.repeats_if_zero):
            assert [_duplicates(result) for result in results] == [0] * len(results), given


@pytest.mark.parametrize(
    "name", [name for name in elementwise("distinct", "product") if properties_of(f"aten.{name}").repeats_if_zero]
)
def test_a_number_that_is_zero_flattens_it(name: str) -> None:
    properties = properties_of(f"aten.{name}")
    flat = [
        max(map(_duplicates, results))
        for given, results in _calls(name, mixed=True)
        if any(given.get(argument) == 0 for argument in properties.repeats_if_zero)
    ]
    assert not flat or max(flat) > COUNT // 4


@pytest.mark.parametrize("name", elementwise("repeat"))
def test_what_is_declared_to_repeat_does(name: str) -> None:
    counts = [_duplicates(result) for _, results in _calls(name, mixed=True, wide=3.0) for result in results]
    assert (max(counts, default=COUNT) > COUNT // 10) != (name in REPEAT_ELSEWHERE and bool(counts))


@pytest.mark.parametrize("name", ["angle", "copysign", "threshold_backward", "hardtanh_backward", "round", "relu"])
def test_operators_that_repeat(name: str) -> None:
    assert properties_of(f"aten.{name}.default").values == "repeat"


def test_a_product_with_zeros_is_one_though_its_arguments_are_not_named_so() -> None:
    zeros = _normal(0).relu()
    assert _duplicates(torch.xlogy(zeros, _normal(1).exp())) > COUNT // 3
    assert properties_of("aten.xlogy.Tensor").values == "product"


@pytest.mark.parametrize("name", elementwise("distinct", "product", "repeat", "limit", "choice", "same"))
def test_zeros_stay_zero_where_it_says_so(name: str) -> None:
    properties = properties_of(f"aten.{name}")
    packet = getattr(torch.ops.aten, name.partition(".")[0])
    for overload in packet.overloads() if properties.zeros == "all" and "." not in name else ():
        operator = getattr(packet, overload)
        arguments = operator._schema.arguments
        if overload.endswith("out") or any(a.name != "self" and not a.has_default_value() for a in arguments):
            continue
        try:
            results = [r for r in tree_leaves(operator(torch.zeros(3))) if isinstance(r, Tensor)]
        except (RuntimeError, TypeError):
            continue
        assert all(bool((result == 0).all()) for result in results), overload


def test_an_operator_that_declares_nothing_may_repeat() -> None:
    assert properties_of("mylib.unheard_of.default") == Properties()
    assert Properties().values == "unknown"


def test_words_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="'dinstinct' is none of 'unknown', 'repeat', 'distinct'"):
        rule("mylib.op", values="dinstinct")  # type: ignore[arg-type]


def test_the_other_properties_name_arguments_that_are_there() -> None:
    for entry in list_rules("aten.*"):
        properties, base = entry.properties, entry.name.split(".")[1]
        wanted = {name for name, _ in properties.factors or ()}
        wanted |= {properties.bias[0]} if properties.bias else set()
        packet = getattr(torch.ops.aten, base, None)
        if packet is None:
            continue
        schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
        for schema in schemas:
            if not schema.name.endswith("_out") and "out" not in schema.overload_name:
                assert wanted <= {a.name for a in schema.arguments}, (entry.name, schema)
        flat = set(properties.repeats_if_zero)
        assert not flat or any(flat & {a.name for a in schema.arguments} for schema in schemas), entry.name
