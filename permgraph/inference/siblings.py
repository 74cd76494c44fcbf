"""Parts of a model that no pass reached, put where their siblings stand: experts without tokens, languages not spoken.

What a part ties is seen only where it runs. A part is a whole module, or a parameter, of which nothing was read. Its
*siblings* are the parts of the same classes, with weights of the same names and shapes, in the same container: other
entries of a list or dictionary, or attributes that differ in their number. Where it has none there, those in the same
place of an entry of an outer container are its siblings.

On another run the part does what one of its siblings did. So what each of them ran is run once more with the part's
weights in place of its own, on the same tensors and with results of the same axes: the part is tied to all that any of
its siblings is tied to, and what lies inside it, such as an expert's hidden units, is its own. Where siblings disagree,
as consecutive layers do, the axes on which they disagree become one. Of a single sibling nothing shows whether the part
would stand beside it or before or after it, so that results of the same shape as what it took become one with that;
unless another pass ran both, which ties them as they stand.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from permgraph.inference.facts import GraphFacts
from permgraph.inference.operators import is_real
from permgraph.inference.solution import StandIn, is_weight

Path = tuple[str, ...]

_NUMBER = re.compile(r"\d+")
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


def with_siblings(
    facts: GraphFacts, unread_elsewhere: Sequence[Collection[str]] = ()
) -> tuple[GraphFacts, tuple[StandIn, ...]]:
    """The facts of a graph in which parts that were not reached stand in their siblings' places, and which they are.

    Of the passes with which the graph is solved, `unread_elsewhere` has the weights that each did not read. The nodes
    of the graph keep their numbers; what is run once more comes after them.
    """
    weights = _Weights(facts.nodes)
    found = {part: siblings for part in weights.unread_parts() if (siblings := weights.siblings(part))}
    if not found:
        return facts, ()
    rerun = _Rerun(facts)
    placed: dict[Path, list[Path]] = {}
    met: set[tuple[Path, ...]] = set()
    for part, siblings in found.items():
        # The first of several parts with the same siblings is tied to all of these, and so are then the others.
        forms = siblings if siblings not in met else _one_of_each_form(rerun, weights, siblings)
        met.add(siblings)
        alone = len(siblings) == 1 and not any(weights.both_read(part, siblings[0], un) for un in unread_elsewhere)
        ran = [sibling for sibling in forms if rerun.put(part, sibling, weights, alone=alone)]
        if ran:
            placed[part] = list(siblings)
    if not placed:
        return facts, ()
    said = tuple(StandIn(".".join(part), tuple(map(".".join, siblings))) for part, siblings in placed.items())
    return GraphFacts(list(rerun.graph.nodes), [*rerun.results, *rerun.ties]), said


def _one_of_each_form(rerun: _Rerun, weights: _Weights, siblings: Sequence[Path]) -> list[Path]:
    return list({rerun.form(sibling, weights): sibling for sibling in reversed(siblings)}.values())


# -- which parts are alike ---------------------------------------------------------------------------------------------


class _Weights:
    """The parameters and persistent buffers by their paths."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.nodes = {tuple(node.meta["names"][0].split(".")): node for node in nodes if is_weight(node)}
        self._within: dict[Path, dict[Path, fx.Node]] = {}
        self._children: dict[Path, dict[str, None]] = {}
        self._classes: dict[Path, type | None] = {}
        for path, node in self.nodes.items():
            classes = (*(None,) * len(path), *node.meta.get("classes", ()))[-len(path) :]
            for depth in range(len(path) + 1):
                self._within.setdefault(path[:depth], {})[path[depth:]] = node
                if depth < len(path):
                    self._children.setdefault(path[:depth], {})[path[depth]] = None
                    self._classes.setdefault(path[:depth], classes[depth])

    def within(self, path: Path) -> Mapping[Path, fx.Node]:
        """The weights of a part, by their paths inside it."""
        return self._within[path]

    def unread_parts(self) -> list[Path]:
        """The largest parts of which nothing was read."""
        read = {path[:depth] for path, node in self.nodes.items() if node.users for depth in range(len(path) + 1)}
        parts: dict[Path, None] = {}
        for path in self.nodes:
            if path not in read:
                depth = next(d for d in range(len(path) + 1) if path[:d] not in read)
                if depth:
                    parts[path[:depth]] = None
        return [part for part in parts if any(is_real(node) for node in self.within(part).values())]

    def both_read(self, part: Path, sibling: Path, unread: Collection[str]) -> bool:
        """Whether a pass with these weights unread read of both parts all that was read here of the sibling."""
        read = [inner for inner, node in self.within(sibling).items() if node.users]
        return all(".".join((*path, *inner)) not in unread for path in (part, sibling) for inner in read)

    def siblings(self, part: Path) -> tuple[Path, ...]:
        """The parts that were read and are like this one: in the innermost container that has any."""
        for depth in reversed(range(len(part))):
            others = list(self._others(part[:depth], part[depth]))
            paths = [(*part[:depth], other) for other in others]
            for inner in range(depth + 1, len(part)):
                paths = [
                    (*path, key)
                    for path in paths
                    if path in self._children
                    for key in (part[inner], *self._others(path, part[inner]))
                    if key in self._children[path]
                ]
            found = [path for path in paths if path in self._within and self._alike(path, part)]
            if found:
                return tuple(found)
        return ()

    def _others(self, path: Path, key: str) -> Iterator[str]:
        """The other entries of a container; of another module the attributes that differ in a number alone."""
        cls = self._classes.get(path)
        listed = cls is not None and issubclass(cls, CONTAINERS)
        for other in self._children.get(path, ()):
            if other != key and (listed or _NUMBER.sub("", other) == _NUMBER.sub("", key)):
                yield other

    def _alike(self, path: Path, part: Path) -> bool:
        """Whether a part was read, and has the classes and shapes of another."""
        own, its = self.within(part), self.within(path)
        return (
            own.keys() == its.keys()
            and any(node.users for node in its.values())
            and all(_kind(own[inner]) == _kind(its[inner]) for inner in own)
            and all(
                self._classes.get((*part, *inner[:depth])) is self._classes.get((*path, *inner[:depth]))
                for inner in own
                for depth in range(len(inner))
            )
        )


def _kind(node: fx.Node) -> tuple[object, ...]:
    val = node.meta["val"]
    return node.meta["kind"], tuple(val.shape), val.dtype


# -- running once more what a part ran ---------------------------------------------------------------------------------


class _Rerun:
    """A copy of a graph, to whose end is added what a part ran, with the weights of another."""

    def __init__(self, facts: GraphFacts) -> None:
        self.facts = facts
        self.graph = fx.Graph()
        self.ties: list[fx.Node] = []
        self._copies: dict[fx.Node, fx.Node] = {}
        for node in facts.nodes:
            self._copies[node] = made = self.graph.node_copy(node, lambda source: self._copies[source])
            if "left" in node.meta:
                made.meta["left"] = {self._copies[left]: name for left, name in node.meta["left"].items()}
        self.results = [self._copies[node] for node in facts.results]
        self._ran: dict[Path, list[fx.Node]] = {}
        self._either: fx.Node | None = None

    def put(self, part: Path, sibling: Path, weights: _Weights, *, alone: bool) -> bool:
        """Run what a sibling ran with the weights of a part; False where no output depends on it."""
        ran = self.ran(sibling, weights)
        inside = set(ran)
        ends = [node for node in ran if any(user not in inside for user in node.users) and _is_tensor(node)]
        if not any(end in self.facts.live for end in ends):
            return False
        own, its = weights.within(part), weights.within(sibling)
        stands_for = {its[inner]: self._copies[own[inner]] for inner in own}
        given = {n: None for node in ran for n in node.all_input_nodes if n not in inside and n not in stands_for}
        for node in ran:
            made = self.graph.node_copy(node, lambda source: stands_for.get(source) or self._copies[source])
            made.meta["module"] = _moved(node.meta.get("module"), ".".join(sibling), ".".join(part))
            stands_for[node] = made
        for end in ends:
            self._tie(self._copies[end], stands_for[end])
            for source in given if alone else ():
                if is_real(source) and is_real(end) and not is_weight(source) and _shape(source) == _shape(end):
                    self._tie(self._copies[source], stands_for[end])
        return True

    def ran(self, part: Path, weights: _Weights) -> list[fx.Node]:
        """What a part ran: the calls inside it, those on its weights, and what lies between any two of these."""
        if part not in self._ran:
            own = set(weights.within(part).values())
            module = ".".join(part)
            alone = set(own)  # what is computed from its weights, and nothing else
            core: set[fx.Node] = set()
            for node in self.facts.nodes:
                if node.op != "call_function":
                    continue
                path = node.meta.get("module") or ""
                if path == module or path.startswith(f"{module}.") or not alone.isdisjoint(node.all_input_nodes):
                    core.add(node)
                    if node.all_input_nodes and alone.issuperset(node.all_input_nodes):
                        alone.add(node)
            after = _closure(self.facts.nodes, core, forwards=True)
            before = _closure(self.facts.nodes, core, forwards=False)
            self._ran[part] = [n for n in self.facts.nodes if n in after and n in before and n.op == "call_function"]
        return self._ran[part]

    def form(self, part: Path, weights: _Weights) -> tuple[object, ...]:
        """What a part ran, but for the tensors that it ran on."""
        return tuple(
            (str(node.target), fx.node.map_arg((node.args, node.kwargs), lambda source: None).__repr__())
            for node in self.ran(part, weights)
        )

    def _tie(self, a: fx.Node, b: fx.Node) -> None:
        """Say that two tensors stand in one another's place, by choosing between them."""
        if self._either is None:
            self._either = self.graph.call_function(torch.ops.aten.full.default, ([], True))
            self._either.meta.update(val=torch.empty((), dtype=torch.bool, device="meta"), module="", source=None)
        tie = self.graph.call_function(torch.ops.aten.where.self, (self._either, a, b))
        tie.meta.update(val=a.meta["val"], module=b.meta["module"], source=b.meta["source"], seen=True)
        self.ties.append(tie)


def _closure(nodes: Sequence[fx.Node], core: Collection[fx.Node], *, forwards: bool) -> set[fx.Node]:
    """These nodes and all that follow from them, or all that they follow from, of several results all parts."""
    found = set(core)
    if forwards:
        for node in nodes:
            if not found.isdisjoint(node.all_input_nodes):
                found.add(node)
    else:
        for node in reversed(nodes):
            if node in found:
                found.update(node.all_input_nodes)
        found |= {node for node in nodes if node.target is operator.getitem and node.args[0] in found}
    return found


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _shape(node: fx.Node) -> Any:
    val = node.meta.get("val")
    return tuple(val.shape) if isinstance(val, torch.Tensor) else None


def _moved(path: str | None, old: str, new: str) -> str | None:
    if path == old or (path or "").startswith(f"{old}."):
        assert path is not None
        return new + path[len(old) :]
    return path
