"""A finder for networks on graphs: features of the nodes, edges as pairs of nodes, and what goes with either."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from permgraph.capture.inputs.forms import Arguments, keyword_finder
from permgraph.capture.inputs.layers import BATCH, floats, integer, integers, required

#: Nodes and edges of the graph, where the model does not say how many nodes there are.
NODES, EDGES = 19, 47
_EDGE_WORDS = ("edge", "bond", "link", "message")


def _named(model: nn.Module, *names: str) -> list[int]:
    """What a model, or the first of its parts that does, says of its own sizes under these names."""
    owners = (vars(module) for module in model.modules())
    found = (integer(held.get(name)) for held in owners for name in names)
    return list(itertools.islice((size for size in found if size), 2))


def _widths(model: nn.Module, of_edges: bool) -> list[int]:
    """What the first linear maps take that stand under a name of edges, or under none."""
    named = (
        _named(model, "edge_dim", "edge_in_channels")
        if of_edges
        else _named(model, "in_channels", "in_dim", "in_features", "node_dim")
    )
    for path, module in model.named_modules():
        width = integer(vars(module).get("in_features", vars(module).get("in_channels")))
        if width and any(word in path for word in _EDGE_WORDS) == of_edges:
            named.append(width)
    tables = () if of_edges else (parameter.shape for parameter in model.parameters() if parameter.ndim == 2)
    return list(dict.fromkeys([*named, *(size for shape in itertools.islice(tables, 2) for size in shape)]))[:4]


def edges(nodes: int, count: int) -> Tensor:
    """Pairs of nodes: a ring, so that every node has an edge, and others at random."""
    ring = torch.arange(nodes, device="cpu")
    return torch.cat([torch.stack([ring, ring.roll(1)]), integers(nodes, 2, max(count - nodes, 1))], 1)


@keyword_finder("graphs")
def graphs(model: nn.Module, names: frozenset[str]) -> Iterator[Arguments]:
    """Nodes with features and edges between them, with whatever else forward requires of a known name."""
    needed = set(required(model))
    nodes = next(iter(_named(model, "num_nodes")), NODES)
    links = edges(nodes, EDGES)
    members = torch.arange(nodes, device="cpu") * BATCH // nodes
    known: Arguments = {
        "edge_index": links,
        "batch": members,
        "batch_index": members,
        "edge_weight": floats(model, links.shape[1]).abs(),
        "edge_type": integers(2, links.shape[1]),
        "pos": floats(model, nodes, 3),
        "z": integers(5, nodes),
    }
    features = next((name for name in ("x", "node_features", "feat", "h") if name in names), None)
    attributes = next((name for name in ("edge_attr", "edge_features", "edge_feats") if name in names), None)
    if features is None or "edge_index" not in names or not needed <= {*known, features, attributes}:
        return
    fixed = {name: value for name, value in known.items() if name in needed | {"edge_index"}}
    wants_attributes = attributes in needed or bool(_named(model, "edge_dim"))
    for width, link_width in itertools.islice(
        itertools.product(_widths(model, False), _widths(model, True) or [1] if wants_attributes else [0]), 10
    ):
        given: Arguments = {features: floats(model, nodes, width), **fixed}
        if attributes is not None and link_width:
            given[attributes] = floats(model, links.shape[1], link_width)
        yield given
