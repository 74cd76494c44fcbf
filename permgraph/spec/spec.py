"""`PermutationSpec`: every permutation symmetry of a model, as data.

A spec does not hold the model. It says which groups there are, how each is fibred over others, and where along each
dimension of each parameter they act; and, where inference made it, why.
"""

from __future__ import annotations

import json
import os
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from permgraph.display import display
from permgraph.errors import SpecError
from permgraph.io.files import write_atomically
from permgraph.spec.data import SpecData
from permgraph.spec.explain import Explanation, explain, slot_graph
from permgraph.spec.json import from_json, to_json, write_json
from permgraph.spec.permutation import Permutation
from permgraph.spec.text import read_spec, write_spec
from permgraph.spec.transformation import Transformation

if TYPE_CHECKING:
    import networkx as nx
    import numpy as np
    import torch
    from matplotlib.axes import Axes


class PermutationSpec(SpecData):
    """Every permutation symmetry of a model: its groups, and where they act on its parameters.

    The axes are put into their normal form, and everything is checked, when the spec is made. A spec is never changed
    afterwards.

    Args:
        groups: name to `Group`, those that move and those that only name an axis.
        axes: for the canonical name of each parameter and each persistent floating-point buffer, one expression per
            dimension.
        shapes: the same names to shapes; a name left out has the shape that its axes give.
        aliases: the other names of tied tensors, each to the canonical one.
        pins: what stays put, and why.
        unknown_ops: operators without a rule.
        unused: parameters and buffers that the forward pass never read.
        model_class: the class of the model from which the spec was inferred.
        notes: what a reader should know about how the spec came to be.
        unread: axes of which no pass read all, with the groups to which they may belong.
        outputs: for the name of each tensor that forward returns the expression of each dimension, as for a parameter;
            sizes that stay put are those of the first pass. Outputs of which that is not known are left out.
        by_products: the outputs that do not count as the result; see `outputs=` of `auto_spec`.
        constraints: what tied the axes to each other, for `explain` and `to_networkx`.
        stacks: where modules change places as wholes, for the name of each stack of their tensors the names of these: a
            tuple, or for modules within modules a tuple of tuples, outermost first. The stack has axes, and its first
            dimensions are the groups of modules.
        refusals: parameters that stand in like places, but whose modules do not change places, and why.

    Raises:
        SpecError: something contradicts itself; the message names the group, or the parameter and dimension.

    Example:
        >>> spec = PermutationSpec.parse('''
        ... fc1.weight  8x4  hidden .
        ... fc1.bias    8    hidden
        ... fc2.weight  3x8  . hidden
        ... groups: hidden 8
        ... ''')
        >>> round(spec.log_order(), 3)  # log 8!
        10.605
    """

    # --- permutations -------------------------------------------------------------------------------------------------

    def identity(self) -> Any:
        """The permutation that moves nothing; the `Transformation` if the spec has general symmetries."""
        return Permutation(self, {}) if self.general is None else Transformation.identity(self)

    def random(self, seed: int | np.random.Generator | torch.Generator, *, every_group: bool = False) -> Any:
        """A uniformly random permutation; see `Permutation.random`.

        Of a spec with general symmetries it is a `Transformation`; see `Transformation.random`.
        """
        kind = Permutation if self.general is None else Transformation
        return kind.random(self, seed, every_group=every_group)

    # --- provenance ---------------------------------------------------------------------------------------------------

    def explain(self, name: str, dim: int) -> Explanation:
        """Why dimension ``dim`` of the parameter ``name`` is tied to others, or stays put.

        Of a tensor whose module changes places with others, under its own name, or of their stack.

        Raises SpecError if there is no such parameter or dimension.
        """
        return explain(self, name, dim)

    def to_networkx(self) -> nx.MultiGraph:
        """The axes as a graph: nodes are slots such as ``"fc1.weight[0]"``, edges are what tied them.

        A node that is an axis of a parameter has ``parameter``, ``dim``, ``size`` and ``axis`` (its expression as
        text); one that was pinned has ``pinned`` (the reasons). An edge has ``operator``, ``module`` and ``source``. A
        spec without constraints gives the parameters' axes only, joined where they share a group, which the edge has
        as ``group``; so are, of any spec, the axes of modules that change places, ``"experts.*.weight[0]"``, beside
        those of the tensors in such a stack, ``"experts.0.weight[0]"``.
        """
        return slot_graph(self)

    # --- pictures -----------------------------------------------------------------------------------------------------

    def plot(self, *, rows: int = 80, collapse: bool = True, within: str = "", ax: Axes | None = None) -> Axes:
        """Draw the groups as lanes that run through the modules, top to bottom, and return the axes.

        A square marks a module in which the group stands in the first dimension of some parameter, a circle one in
        which it stands in a later dimension. Groups that do not share a row may share a column, and a colour.

        Args:
            rows: about how many modules there is room for; with more, inner ones are folded into those around them.
            collapse: draw the third and later of neighbouring blocks that are alike as one row.
            within: the path of a module, to draw only what is inside it.
            ax: where to draw; its limits are set to inches. By default a new figure of the size that is needed.

        Raises:
            MissingExtraError: matplotlib is not installed.
            SpecError: no module `within` holds a parameter.
        """
        axes: Axes = display("spec", self, rows=rows, collapse=collapse, within=within, ax=ax)
        return axes

    def _repr_html_(self) -> str:
        return str(display("spec table", self))

    # --- text and files -----------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return write_spec(self)

    @classmethod
    def parse(cls, text: str) -> PermutationSpec:
        """Read a spec from its text form: groups, axes, shapes and aliases; what else the text says is for people.

        Raises SpecError with the line at fault.
        """
        return cls(**read_spec(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole spec to ``path`` as JSON; the file is replaced in one step."""
        write_atomically(path, write_json(to_json(self)).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PermutationSpec:
        """Read a spec that `save` wrote, or one in text form.

        Raises SpecError, naming the file and the place in it, if it is of another version or malformed.
        """
        content = FilePath(path).read_bytes()
        try:
            text = content.decode("utf-8")
            if not text.lstrip().startswith("{"):
                return cls.parse(text)
            return cls(**from_json(json.loads(text)))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise SpecError(f"{os.fspath(path)}: not a spec: {error}") from None
        except SpecError as error:
            raise SpecError(f"{os.fspath(path)}: {error}") from None
