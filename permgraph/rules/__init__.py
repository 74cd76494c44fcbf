"""What each operator ties together: one file for each family of operators."""

from permgraph.rules import (  # noqa: F401  (importing a family registers its rules)
    attention,
    convolution,
    create,
    factorisation,
    foreach,
    gradient,
    index,
    linear,
    loss,
    normalisation,
    pointwise,
    pooling,
    quantisation,
    recurrent,
    reduction,
    shape,
    sparse,
    vision,
)
from permgraph.rules.call import Call
from permgraph.rules.registry import RegisteredRule, find_rule, list_rules, registered, rule, rule_name
from permgraph.rules.typed_tensor import TypedTensor

__all__ = ["Call", "RegisteredRule", "TypedTensor", "find_rule", "list_rules", "registered", "rule", "rule_name"]
