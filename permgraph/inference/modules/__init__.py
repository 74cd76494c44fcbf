"""Whole modules that can change places: automorphisms of the captured graph that carry parameters to other parameters.

Experts in a `ModuleList`, heads that are modules, parallel branches and ensembles are stretches of the graph that
compute alike and meet where their order does not count. Four steps find them:

| step | file | does |
| --- | --- | --- |
| reading | `reading.py` | what each call does to which operands, sums flattened, places left open |
| colours | `colours.py` | parameters that stand in places which look alike: candidates |
| exchange | `exchange.py` | from two such parameters, which nodes change places, and which indices with them |
| proof | `proof.py` | whether every call computes the same after the exchange |
| families | `families.py` | exchanges that share a member, as a list of modules any two of which change places |

What the proof refuses is no symmetry here, whatever the other steps guessed. `fold.py` writes what was found into the
spec: k modules become one, whose tensors have k as their first dimension (`permgraph.spec.stacks`). Then a group of
modules is a group like another, inner groups are fibred over it, and whatever knows groups knows these.
Lim et al. (2312.04501, section 3) define these symmetries, as automorphisms of a network's graph.
"""

from permgraph.inference.modules.families import find_families
from permgraph.inference.modules.fold import fold
from permgraph.inference.solution import Solution
from permgraph.spec.spec import PermutationSpec

__all__ = ["with_modules"]


def with_modules(spec: PermutationSpec, solution: Solution) -> PermutationSpec:
    """The spec of a solved graph with a group for each family of modules that can change places."""
    found = find_families(solution)
    return fold(spec, found) if found.families or found.refused else spec
