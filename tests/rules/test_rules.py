"""Each rule, both ways: what it allows preserves the operator (the law), and it denies nothing that would."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch._ops import OpOverload

from permgraph.rules import registered, rule_name
from permgraph.verification.example import Example
from permgraph.verification.examples import ELSEWHERE, EXAMPLES


def _name(case: Example) -> str:
    return case.name.replace(" ", "-")


@pytest.mark.parametrize("case", EXAMPLES, ids=_name)
def test_axes_and_law(case: Example) -> None:
    report = case.check()
    assert case.problem(report) is None, str(report)


def test_every_rule_has_a_case() -> None:
    covered: Counter[str | None] = Counter()
    for case in EXAMPLES:
        ran = [str(case.op)] if isinstance(case.op, OpOverload) else case.operators()
        covered.update(rule_name(operator) for operator in ran)
    existing = {key for key in registered() if key.startswith("aten.") and _exists(key)}
    assert sorted(existing - set(covered) - set(ELSEWHERE)) == []
    assert [key for key in ELSEWHERE if key in covered] == [], "these have a case by now"
    assert all(registered()[key] is registered()[other] for key, other in ELSEWHERE.items())
    assert set(ELSEWHERE.values()) <= set(covered)


def _exists(key: str) -> bool:
    """Whether this build of torch has the operator."""
    found = torch.ops
    for part in key.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def test_no_rule_for_an_operator_that_was_never_there() -> None:
    if torch.__version__ < "2.13":
        pytest.skip("an older torch lacks some operators")
    unknown = [key for key in registered() if key.startswith("aten.") and not _exists(key)]
    assert unknown == []
