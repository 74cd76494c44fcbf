"""One process of a learned matching that may have several; run by a test, with the file to write to."""

from __future__ import annotations

from permgraph.inference import auto_spec
from permgraph.matching import LearnedMatching, align
from tests.matching.learnable import Reader, texts, trained
from tests.matching.processes import share


def match(loader, engine):
    # In float64, so that the order in which gradients are summed decides nothing.
    a, b = (trained(Reader, texts(), seed).double() for seed in (0, 1))
    spec = auto_spec(a, symmetry="general", example_inputs=(texts()[0][:3],))
    return align(a, b, LearnedMatching(loader, steps=20, measure_every=5, accelerator=engine), spec=spec, seed=2)


if __name__ == "__main__":
    share(texts(), match)
