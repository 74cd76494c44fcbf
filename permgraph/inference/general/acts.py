"""What each way to act (`permgraph.rules.properties.Acts`) says of the unknowns of a call.

The labels of a rule say which axes of which tensors are one. A label of an operand that the result has too is passed
on; one that two operands have and the result lacks is summed over; and so on: a function for each way to act says what
follows for matrices, scales and signs along each label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise

from torch import fx

from permgraph.algebra import Axis, Kind
from permgraph.inference.facts import GraphFacts
from permgraph.inference.general.cases import cases, pairs
from permgraph.inference.general.equations import Acts
from permgraph.inference.general.gains import Gains
from permgraph.inference.general.leaves import UnreadableError
from permgraph.inference.general.patterns import Patterns
from permgraph.inference.general.statements import CENTRED, ORTHOGONAL, Statements
from permgraph.inference.general.turns import ORDERS, TURN
from permgraph.inference.operators import name_of
from permgraph.rules.call import Call
from permgraph.rules.ledger import Labelled, Relation
from permgraph.rules.properties import Properties
from permgraph.rules.typed_tensor import TypedTensor
from permgraph.spec.general import Gain

RESULT = "the result"
Unknowns = Sequence[int]

#: Degree and parity of the functions of one element.
FUNCTIONS: Mapping[str, tuple[Fraction | None, str]] = {
    "homogeneous": (Fraction(1), ""),
    "odd": (None, "odd"),
    "even": (None, "even"),
    "sign": (Fraction(0), "odd"),
    "absolute": (Fraction(1), "even"),
    "square": (Fraction(2), "even"),
    "root": (Fraction(1, 2), ""),
    "inverse root": (Fraction(-1, 2), ""),
    "reciprocal": (Fraction(-1), "odd"),
}


class Speaker:
    """Says what the calls of a graph say."""

    def __init__(self, statements: Statements, facts: GraphFacts, gains: Gains, patterns: Patterns) -> None:
        self.said = statements
        self.leaves = statements.leaves
        self.facts = facts
        self.gains = gains
        self.patterns = patterns

    def speak(self, call: Call, properties: Properties) -> None:
        """Say all that a call says; where it cannot be read, its atoms keep permutations."""
        tensors = [*call.tensors, *call.results]
        atoms = self.leaves.movable_in(*tensors)
        if not atoms:
            return
        why = str(call.node.target) + (f" in {call.node.meta['module']}" if call.node.meta.get("module") else "")
        try:
            acts = self._acts(call, properties)
            if acts in ("unknown", "constant"):
                self.nothing_passes(tensors if acts == "unknown" else call.results, why)
                return
            if acts == "zeros":
                return
            Statement(self, call, properties, acts, why).make()
            self._turn(call, why)
        except UnreadableError:
            self.said.keep_plain(atoms, f"{why}, whose tensors have too many parts")

    def _turn(self, call: Call, why: str) -> None:
        """Of what stands for pairs that are turned, what passes is a complex factor for each pair."""
        turn = call.node.meta.get(TURN)
        if turn is None:
            return
        before, _, after = turn.rpartition(">")
        for tensor, turn in ((call.tensors[0], before or after), (call.results[0], after)):
            if not self._holds_pairs(tensor.dims[-1], turn, whole=bool(before)):
                cut = set(self.leaves.axes.atoms(tensor.dims[-1]))
                self.said.keep_plain(cut, f"{why}, whose pairs another operator takes apart")
            for index in self.leaves.elements(tensor):
                for x in self.leaves.at(tensor, index).get(tensor.ndim - 1, ()):
                    self.said.within(x, turn, f"{why}, which turns pairs")

    def _holds_pairs(self, axis: Axis, turn: str, whole: bool = False) -> bool:
        """Whether the pairs of an axis are those of its atom, or of each of its parts where they are neighbours."""
        axis = self.leaves.axes.resolve(axis)
        if axis.kind is Kind.SUM and turn == "T2" and not whole:
            return all(self._holds_pairs(part, turn) for part in axis.children)
        return axis.kind is Kind.ATOM and axis.size % 2 == 0

    def nothing_passes(self, tensors: Sequence[TypedTensor], why: str) -> None:
        for tensor in tensors:
            for index in self.leaves.elements(tensor):
                for unknowns in self.leaves.at(tensor, index).values():
                    self.said.still(unknowns, why)

    @staticmethod
    def _acts(call: Call, properties: Properties) -> str:
        """How a call acts, its arguments considered."""
        acts = properties.acts
        given = call.arguments
        if any(t.dtype.is_complex for t in (*call.tensors, *call.results)):
            return "unknown"
        if acts == "clip":
            return _clips(call)
        if acts == "quotient" and given.get("rounding_mode") is not None:
            return "unknown"
        if acts == "power" and not isinstance(given.get("exponent"), (int, float)):
            return "unknown"
        if acts == "power" and not isinstance(given.get("self"), TypedTensor):
            return "unknown"
        if acts == "norm" and 0 in (given.get("p"), given.get("ord")):  # how many elements are not zero
            return "unknown"
        # Of what was a number and is a whole one now, nothing but its place is left.
        real = any(t.dtype.is_floating_point for t in call.tensors)
        if acts == "moved" and real and not all(t.dtype.is_floating_point for t in call.results):
            return "unknown"
        return acts


class Statement:
    """What one call says, in all its links and rearrangements."""

    def __init__(self, speaker: Speaker, call: Call, properties: Properties, acts: str, why: str) -> None:
        self.speaker, self.said, self.leaves = speaker, speaker.said, speaker.leaves
        self.call, self.properties, self.acts, self.why = call, properties, acts, why
        self.zeros = self._zero_arguments()

    def make(self) -> None:
        for tensor in (*self.call.tensors, *self.call.results):
            if not tensor.dtype.is_floating_point and self.leaves.concerns(tensor):
                for index in self.leaves.elements(tensor):
                    for unknowns in self.leaves.at(tensor, index).values():
                        self.said.still(unknowns, f"{self.why}, of whole numbers")
        for relation in self.call.ledger.relations:
            self._link(relation)
        if self.acts == "moved" and self.call.get("value", 0) != 0 and "pad" in self.call.arguments:
            self.speaker.nothing_passes([*self.call.tensors, *self.call.results], f"{self.why}, with a number")
        for number, moved in enumerate(self.call.ledger.rearrangements):
            for before, after in pairs(moved, self.leaves):
                self._pair(number, before, after)

    # -- rearrangements ------------------------------------------------------------------------------------------------

    def _pair(self, number: int, before: Mapping[int, Unknowns], after: Mapping[int, Unknowns]) -> None:
        left = [x for dim in sorted(before) for x in before[dim]]
        right = [x for dim in sorted(after) for x in after[dim]]
        atoms = [[self.leaves.atoms[x] for x in side] for side in (left, right)]
        if atoms[0] != atoms[1]:
            self.said.keep_plain([*atoms[0], *atoms[1]], f"{self.why}, where it does not stand alike")
        elif self.acts == "moved":
            for x, y in zip(left, right, strict=True):
                self.said.same(x, y, self.why)
        elif self.acts == "gate" and number == 0:
            for x, y in zip(left, right, strict=True):
                self.said.no_matrix((x, y), self.why)
                self.said.factors([(x, 1), (y, -1)])
        elif self.acts == "gate":
            self.said.still(left, f"{self.why}, as a gate")
        else:
            self.said.still([*left, *right], self.why)

    # -- links ---------------------------------------------------------------------------------------------------------

    def _link(self, relation: Relation) -> None:
        tensors = [labelled for labelled in relation.tensors if labelled.tensor is not None]
        roles = self._roles(tensors)
        say = WAYS[self.acts]
        for _, case in cases(relation, self.leaves):
            if case.unlike:
                self.said.keep_plain(case.unlike, f"{self.why}, where it does not stand alike")
            for x, y in case.alike:
                self.said.same(x, y, self.why)
            self.said.still(case.loose, f"{self.why}, along a dimension that it repeats or drops")
            for label in dict.fromkeys(label for unknowns in case.unknowns for label in unknowns):
                has = [i for i, unknowns in enumerate(case.unknowns) if label in tensors[i].axes]
                if label in case.numbered:
                    for i in has:
                        self.said.still(case.unknowns[i].get(label, ()), f"{self.why}, which looks it up")
                    continue
                several = [case.unknowns[i].get(label, ()) for i in has]
                if len({len(unknowns) for unknowns in several}) > 1:
                    continue  # unlike
                for at in range(len(several[0])):
                    by_role: dict[str, list[tuple[int, Labelled]]] = defaultdict(list)
                    for i, unknowns in zip(has, several, strict=True):
                        by_role[roles[i]].append((unknowns[at], tensors[i]))
                    say(self, Along(label, by_role, tensors, roles, self))

    def _roles(self, tensors: Sequence[Labelled]) -> list[str]:
        """For each tensor of a link the argument that it is; one that is written in place is a result at last."""
        waiting: dict[int, list[str]] = defaultdict(list)
        for name, value in self.call.arguments.items():
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, TypedTensor):
                    waiting[id(tensor)].append(name)
        results = {id(tensor) for tensor in self.call.results}
        last = {id(labelled.tensor): i for i, labelled in enumerate(tensors)}
        roles = []
        for i, labelled in enumerate(tensors):
            names, own = waiting[id(labelled.tensor)], id(labelled.tensor)
            roles.append(names.pop(0) if names and not (own in results and last[own] == i) else RESULT)
        return roles

    def _zero_arguments(self) -> frozenset[str]:
        """The arguments that are zero throughout."""
        names = list(self.call.arguments)
        given = {**dict(zip(names, self.call.node.args, strict=False)), **self.call.node.kwargs}
        zeros = self.speaker.facts.zeros
        return frozenset(name for name, node in given.items() if isinstance(node, fx.Node) and node in zeros)

    # -- ways to act ---------------------------------------------------------------------------------------------------

    def moved(self, along: Along) -> None:
        """The same everywhere; what only the result has is repeated along it."""
        operands, results = along.operands(), along.results()
        if not operands or not results:
            self.said.still([*operands, *results], f"{self.why}, along a dimension that it repeats or drops")
        order = ORDERS.get(self.call.node.meta.get(TURN, ""), 0)
        if order and along.is_last:
            for x, y in zip(operands, results, strict=True):
                self.said.frames.join(x, y, Acts(order=order), self.why)
            for system in (self.said.scales, self.said.signs, self.said.flips):
                for x in (*operands, *results):
                    system.add([(x, 1)])
            return
        for x, y in pairwise([*operands, *results]):
            self.said.same(x, y, self.why)

    def sum(self, along: Along) -> None:
        """Every operand as the result; along what an operand lacks, it adds the same to all indices."""
        self._product(along, factors=(), addends=along.arguments())

    def product(self, along: Along) -> None:
        """Operands are multiplied, summed over what the result lacks, and the bias is added."""
        bias = self.properties.bias[0] if self.properties.bias else None
        addends = tuple(name for name in along.arguments() if name == bias)
        self._product(along, tuple(name for name in along.arguments() if name != bias), addends)

    def _product(self, along: Along, factors: Sequence[str], addends: Sequence[str]) -> None:
        said, why, results = self.said, self.why, along.results()
        if self.zeros.intersection(factors):  # nothing is left of the other factors
            factors = ()
        within = [(x, labelled) for name in dict.fromkeys(factors) for x, labelled in along.of(name)]
        added = [x for name in dict.fromkeys(addends) for x in along.operands(name)]
        among = [name for name in addends if name not in self.zeros]
        xs = [x for x, _ in within]
        if not results:
            if len(xs) == 2:
                said.dual(xs[0], xs[1], why)
            elif len(xs) == 1 and along.is_square_sum:
                said.factors([(xs[0], 1)])  # what a matrix does is said of what is squared
            elif len(xs) == 1 and along.is_mean_taken_out:
                said.factors([(xs[0], 1)], flips=False)
            elif len(xs) == 1:
                said.still(xs, f"{why}, which sums over it")
            else:
                said.no_matrix(xs, why)
                said.factors([(x, 1) for x in xs])
            said.still(added, why)
            return
        for x, y in pairwise(results):
            said.same(x, y, why)
        out = results[0]
        if along.mean_taken_out:
            x = added[0]
            if along.is_alone:
                said.within(x, CENTRED, why)
                said.matrix(x, out, Acts(), why)
                said.flips.add([(x, 1), (out, 1)])
            else:
                said.no_matrix((x, out), why)
                said.flips.add([(x, 1)])
                said.flips.add([(out, 1)])
            said.factors([(x, 1)], flips=False)
            said.factors([(out, 1)], flips=False)
            return
        if factors:
            if not xs:
                said.still(results, f"{why}, which repeats along it")
            elif len(xs) == 1:
                said.same(xs[0], out, why)
            else:
                self._elementwise(within, out, along)
        if self._adds_a_number() or len(added) < len(among):
            said.still([*results, *added], f"{why}, which adds the same to all its indices")
        for x in added:
            said.same(x, out, why)

    def _adds_a_number(self) -> bool:
        numbers = [self.call.arguments.get(name, 0) for name in ("self", "other")]
        return self.acts == "sum" and any(isinstance(n, (int, float)) and n != 0 for n in numbers)

    def _elementwise(self, within: Sequence[tuple[int, Labelled]], out: int, along: Along) -> None:
        """A product for each index: scales multiply; a matrix passes if all factors but one are gains."""
        said, why = self.said, self.why
        if along.is_square_summed:
            for x, _ in within:
                said.within(x, ORTHOGONAL, f"{why}, whose squares are summed")
            said.factors([*((x, 1) for x, _ in within), (out, -1)])
            return
        gains = [(x, self._gain(labelled, along)) for x, labelled in within]
        others = [number for number, (_, gain) in enumerate(gains) if gain is None] or [0]
        if len(others) == 1:
            (x, _) = gains.pop(others[0])
            power: dict[Gain, int] = {}
            for y, gain in gains:  # one of them may be x itself, which is then a gain and does not move
                assert gain is not None
                said.frames.stop(y, f"{why}, as a gain")
                power[gain] = power.get(gain, 0) + 1
                said.absorb(gain, self.call.node, out)
            said.matrix(x, out, Acts(1, tuple(sorted(power.items()))), why)
        else:
            said.no_matrix([*(x for x, _ in within), out], f"{why}, element by element")
        said.factors([*((x, 1) for x, _ in within), (out, -1)])

    def _gain(self, labelled: Labelled, along: Along) -> Gain | None:
        """The gain that a factor is, where it is a vector along this label and the label is one whole axis."""
        axis = self.leaves.axes.resolve(labelled.axes[along.label])
        assert labelled.tensor is not None
        return self.speaker.gains.of(labelled.tensor) if axis.kind is Kind.ATOM else None

    def quotient(self, along: Along) -> None:
        """One operand over another."""
        said, why, results = self.said, self.why, along.results()
        over, under = along.operands("self"), along.operands("other")
        if not results:
            said.still([*over, *under], why)
            return
        out = results[0]
        if over and not under:
            said.same(over[0], out, why)
            return
        said.no_matrix([*over, *under, out], f"{why}, element by element")
        said.factors([*((x, 1) for x in over), *((x, -1) for x in under), (out, -1)])

    def choice(self, along: Along) -> None:
        """One operand or another; a mask that varies along the label lets monomial matrices pass."""
        said, why, results = self.said, self.why, along.results()
        masks = [name for name in ("condition", "mask") if name in self.call.arguments]
        values = [name for name in ("self", "other", "value") if name in self.call.arguments]
        operands = [x for name in values for x in along.operands(name)]
        needed = [name for name in values if not self._is_zero(name)]
        if not results or sum(len(along.operands(name)) for name in needed) < len(needed):
            said.still([*results, *operands], f"{why}, which sets the same at all its indices")
        for x, y in pairwise([*operands, *results]):
            said.same(x, y, why)
        if any(along.operands(name) for name in masks):
            said.no_matrix([*operands, *results], f"{why}, element by element")

    def _is_zero(self, name: str) -> bool:
        value = self.call.arguments[name]
        return name in self.zeros if isinstance(value, TypedTensor) else value == 0

    def gate(self, along: Along) -> None:
        """All is said of the two halves."""
        self.said.still(along.everything(), self.why)

    def function(self, along: Along) -> None:
        """A function of each element by itself, or of all along what the result lacks."""
        if self.acts == "power":
            k = self.call["exponent"]
            parity = "" if k != int(k) else ("even", "odd")[int(k) % 2]
            degree: Fraction | None = Fraction(k).limit_denominator(64)
            if degree is None or abs(float(degree) - k) > 1e-12:
                degree = None
        else:
            degree, parity = FUNCTIONS[self.acts]
        operands, results = along.operands(), along.results()
        self._function(along, operands, results, degree, parity)

    def _function(
        self, along: Along, operands: Unknowns, results: Unknowns, degree: Fraction | None, parity: str
    ) -> None:
        said, why = self.said, self.why
        if not results or len(operands) < len(along.arguments()):
            said.still([*operands, *results], f"{why}, which treats all its indices as one")
            return
        if along.is_square_summed:
            for x in operands:
                said.within(x, ORTHOGONAL, f"{why}, whose squares are summed")
        else:
            said.no_matrix([*operands, *results], why)
        for x in operands:
            for y in results:
                if degree is None:
                    said.scales.add([(x, 1)])
                    said.scales.add([(y, 1)])
                else:
                    said.scales.add([(x, degree), (y, -1)])
                for system in (said.signs, said.flips):
                    if parity == "odd":
                        system.add([(x, 1), (y, 1)])
                    else:
                        system.add([(y, 1)])
                    if parity == "":
                        system.add([(x, 1)])

    def slope(self, along: Along) -> None:
        """Homogeneous in the first operand; the slopes stay."""
        weight = along.operands("weight")
        self.said.still(weight, f"{self.why}, as a slope")
        operands, results = along.operands("self"), along.results()
        if not operands or not results:
            self.said.still([*operands, *results], self.why)
            return
        self.said.no_matrix([*operands, *results], self.why)
        for y in results:
            self.said.factors([(operands[0], 1), (y, -1)], signs=())
        for x in (*operands, *results):
            self.said.signs.add([(x, 1)])
            self.said.flips.add([(x, 1)])

    def norm(self, along: Along) -> None:
        """A norm: of what it sums over any orthogonal matrix passes, if squares are summed."""
        said, why = self.said, self.why
        operands, results = along.operands(), along.results()
        if results:
            self._function(along, operands, results, Fraction(1), "even")
            return
        order = next((self.call.get(name) for name in ("p", "ord") if self.call.get(name) is not None), 2)
        for x in operands:
            if order in (2, 2.0, "fro"):
                said.within(x, ORTHOGONAL, why)
            else:
                said.no_matrix([x], f"{why}, of another order")
            said.scales.add([(x, 1)])

    def spread(self, along: Along) -> None:
        """A variance or deviation: of what it is taken over, what leaves the mean in its place passes."""
        said, why = self.said, self.why
        operands, results = along.operands(), along.results()
        if results:
            degree = Fraction(1 if "std" in str(self.call.node.target) else 2)
            self._function(along, operands, results, degree, "even")
            return
        for x in operands:
            if along.is_alone:
                said.within(x, CENTRED, why)
            else:
                said.no_matrix([x], why)
                said.flips.add([(x, 1)])
            said.factors([(x, 1)], flips=False)

    # -- layers --------------------------------------------------------------------------------------------------------

    def rms_norm(self, along: Along) -> None:
        """x over its root mean square, times a gain."""
        self._norm_layer(along, ORTHOGONAL)

    def layer_norm(self, along: Along) -> None:
        """x less its mean, over its deviation, times a gain, plus a bias."""
        self._norm_layer(along, CENTRED)

    def group_norm(self, along: Along) -> None:
        """The same in groups, whose channels stand in two labels."""
        self._norm_layer(along, "")

    def _norm_layer(self, along: Along, structure: str) -> None:
        said, why = self.said, self.why
        x, weight, bias = (along.operands(name) for name in ("input", "weight", "bias"))
        out = [y for y, labelled in along.of(RESULT) if labelled.tensor is self.call.results[0]]
        means = [] if structure == ORTHOGONAL else self._of_results(along, 1)
        said.still([y for y in along.results() if y not in (*out, *means)], f"{why}, as a statistic")
        said.no_matrix(means, f"{why}, as a statistic")
        for m in means if x else ():
            said.factors([(m, 1), (x[0], -1)])
        has_weight, has_bias = (isinstance(self.call.get(name), TypedTensor) for name in ("weight", "bias"))
        normalised = along.label[0] == "n" if structure else bool(weight) or not (has_weight or has_bias)
        if not x or not out:
            said.still([*x, *weight, *bias, *out, *means], why)
            return
        if not normalised:
            # Each index along it has statistics of its own: a change of sign passes, a scale does not, for ε.
            said.no_matrix([x[0], out[0]], f"{why}, which treats its indices apart")
            said.scales.add([(x[0], 1)])
            said.scales.add([(out[0], 1)])
            for system in (said.signs, said.flips):
                system.add([(x[0], 1), (out[0], 1)])
                if has_bias or not structure:
                    system.add([(out[0], 1)])
            return
        centred = structure == CENTRED and along.is_alone
        if centred and any(r.read for r in self.call.results[1:2]):
            # The mean itself is read, of which a common change of sign changes the sign.
            said.flips.add([(x[0], 1)])
            said.no_matrix([x[0], *out], f"{why}, whose mean is read")
        if structure == ORTHOGONAL or centred:
            gains = [self._gain(labelled, along) for _, labelled in along.of("weight")]
            passes = None not in gains
            said.within(x[0], structure, why)
            if passes:
                named = tuple((gain, 1) for gain in gains if gain is not None)
                for gain, _ in named:
                    said.absorb(gain, self.call.node, out[0])
                said.matrix(x[0], out[0], Acts(1, named), why)
            else:
                said.no_matrix(out, f"{why}, whose gain cannot be moved into what reads it")
            said.no_matrix(weight, f"{why}, as a gain")
            for b in bias:
                said.matrix(b, out[0], Acts(), why)
        else:
            said.no_matrix([*x, *weight, *bias, *out], why)
        said.scales.add([(x[0], 1)])
        said.scales.add([*((w, 1) for w in weight), (out[0], -1)])
        signed = [*x, *weight, *out]
        said.flips.add([(y, 1) for y in signed])
        if structure == ORTHOGONAL:
            said.signs.add([(y, 1) for y in signed])
        else:
            said.signs.add([(x[0], 1)])
            said.signs.add([(y, 1) for y in (*weight, *out)])
            if not (structure == CENTRED and along.is_alone):
                said.flips.add([(x[0], 1)])
        for b in bias:
            said.factors([(b, 1), (out[0], -1)])

    def batch_norm(self, along: Along) -> None:
        """x less its mean, over its deviation, times a gain, plus a bias, for each channel.

        In evaluation mode the mean is a buffer that moves with x, and the gain takes up what scales x, so that the
        variance keeps its place: to scale it would have to reckon with ε.
        """
        said, why = self.said, self.why
        x, weight, bias, mean, var = (
            along.operands(name) for name in ("input", "weight", "bias", "running_mean", "running_var")
        )
        out = [y for y, labelled in along.of(RESULT) if labelled.tensor is self.call.results[0]]
        means = self._of_results(along, 1, 3)  # the batch's, and the running one after it
        statistics = [y for y in along.results() if y not in (*out, *means)]
        said.no_matrix([*x, *weight, *bias, *mean, *out, *means], why)
        said.still([*var, *statistics], f"{why}, as a statistic")
        if not x or not out:
            said.still(along.everything(), why)
            return
        if along.label != "c":
            said.still([*x, *out], why)
            return
        training = "no_training" not in str(self.call.node.target) and "no_update" not in str(self.call.node.target)
        training = bool(self.call.arguments.get("training", training))
        if training:
            said.scales.add([(x[0], 1)])
        said.factors([(x[0], 1), *((w, 1) for w in weight), (out[0], -1)])
        for b in bias:
            said.factors([(b, 1), (out[0], -1)])
        for m in (*mean, *means):
            said.factors([(m, 1), (x[0], -1)])

    def _of_results(self, along: Along, *numbers: int) -> list[int]:
        """The unknowns of the results with these numbers, where there are so many."""
        wanted = [result for n, result in enumerate(self.call.results) if n in numbers]
        return [y for y, labelled in along.of(RESULT) if any(labelled.tensor is result for result in wanted)]

    def attention(self, along: Along) -> None:
        """softmax(q kᵀ) v: queries and keys are dual, values pass; softmax lets nothing pass."""
        said, why = self.said, self.why
        q, k, v = (along.operands(name) for name in ("query", "key", "value"))
        out = [y for y, labelled in along.of(RESULT) if labelled.tensor is self.call.results[0]]
        others = [y for y in along.everything() if y not in (*q, *k, *v, *out)]
        said.still(others, why)
        if along.label == "d" and q and k and not (v or out):
            said.dual(q[0], k[0], why)
            return
        said.still([*q, *k], f"{why}, by its softmax")
        if v and out:
            said.same(v[0], out[0], why)
        else:
            said.still([*v, *out], f"{why}, by its softmax")


class Along:
    """What a statement says along one label, at one place of it."""

    def __init__(
        self,
        label: str,
        by_role: Mapping[str, Sequence[tuple[int, Labelled]]],
        tensors: Sequence[Labelled],
        roles: Sequence[str],
        statement: Statement,
    ) -> None:
        self.label = label
        self._by_role = by_role
        self._tensors = tensors
        self._roles = roles
        self._statement = statement

    def of(self, role: str) -> Sequence[tuple[int, Labelled]]:
        """The unknowns of an argument, or of the results, each with its tensor."""
        return self._by_role.get(role, ())

    def operands(self, name: str | None = None) -> list[int]:
        """The unknowns of one argument, or of all."""
        return [x for role, found in self._by_role.items() if role != RESULT and name in (None, role) for x, _ in found]

    def results(self) -> list[int]:
        """The unknowns of the results that are real numbers; positions of the largest, say, are told otherwise."""
        return [
            x for x, labelled in self.of(RESULT) if labelled.tensor is None or labelled.tensor.dtype.is_floating_point
        ]

    def everything(self) -> list[int]:
        """All unknowns."""
        return [*self.operands(), *self.results()]

    def arguments(self) -> list[str]:
        """The arguments among the tensors of the link, each as often as it is there."""
        return [role for role in self._roles if role != RESULT]

    def _dim(self) -> int | None:
        """Where the label stands in the first operand."""
        return next((found[0][1].where[self.label] for role, found in self._by_role.items() if role != RESULT), None)

    @property
    def is_last(self) -> bool:
        """Whether the label is the last dimension of the first operand."""
        first = next(labelled for role, found in self._by_role.items() if role != RESULT for _, labelled in found)
        assert first.tensor is not None
        return first.where[self.label] == first.tensor.ndim - 1

    @property
    def is_square_summed(self) -> bool:
        """Whether squares are taken of which nothing but the sum along this label is read."""
        return self._statement.speaker.patterns.squared(self._statement.call.node, self._dim())

    @property
    def is_square_sum(self) -> bool:
        """Whether such squares are summed here."""
        return self._statement.speaker.patterns.sums_squares(self._statement.call.node, self._dim())

    @property
    def is_mean_taken_out(self) -> bool:
        """Whether a mean is taken here along this label, for nothing but to be taken out."""
        return self._statement.speaker.patterns.is_mean(self._statement.call.node, self._dim())

    @property
    def mean_taken_out(self) -> bool:
        """Whether the mean along this label is taken out here."""
        return self._statement.speaker.patterns.takes_mean_out(self._statement.call.node, self._dim())

    @property
    def is_alone(self) -> bool:
        """Whether this label is one whole atom, and no other dimension is taken together with it.

        Over another one a sign could differ from index to index, and what is taken out would not be a mean of all.
        """
        leaves = self._statement.leaves
        first = next(labelled for role, found in self._by_role.items() if role != RESULT for _, labelled in found)
        if leaves.axes.resolve(first.axes[self.label]).kind is not Kind.ATOM or first.tensor is None:
            return False
        dims = self._statement.speaker.patterns.taken_together(self._statement.call, first.tensor)
        own = first.where[self.label]
        return list(first.where.values()).count(own) == 1 and all(
            dim == own or first.tensor.shape[dim] == 1 for dim in dims
        )


def _clips(call: Call) -> str:
    """How a function acts that sets what lies beyond bounds to them."""
    name = name_of(call.node)
    if name == "threshold":
        return "homogeneous" if call.get("threshold") == 0 and call.get("value") == 0 else "unknown"
    lower, upper = (call.get("min_val", -1), call.get("max_val", 1)) if name == "hardtanh" else (None, None)
    lower, upper = call.get("min", lower), call.get("max", upper)
    numbers = [bound for bound in (lower, upper) if isinstance(bound, (int, float))]
    if not any(numbers):  # zeros, and tensors, which are scaled with what they bound
        return "homogeneous"
    return "odd" if len(numbers) == 2 and numbers[0] == -numbers[1] else "unknown"


WAYS: Mapping[str, Callable[[Statement, Along], None]] = {
    "moved": Statement.moved,
    "sum": Statement.sum,
    "product": Statement.product,
    "quotient": Statement.quotient,
    "choice": Statement.choice,
    "gate": Statement.gate,
    "power": Statement.function,
    **dict.fromkeys(FUNCTIONS, Statement.function),
    "slope": Statement.slope,
    "norm": Statement.norm,
    "spread": Statement.spread,
    "rms norm": Statement.rms_norm,
    "layer norm": Statement.layer_norm,
    "group norm": Statement.group_norm,
    "batch norm": Statement.batch_norm,
    "attention": Statement.attention,
}
