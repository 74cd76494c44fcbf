"""One process of a straight-through run that may have several; run by a test, with the file to write to."""

from __future__ import annotations

from permgraph.matching import StraightThrough, align
from tests.matching.processes import share
from tests.matching.test_straight_through import data, sgd, trained


def match(loader, engine):
    # In float64, so that the order in which gradients are summed decides nothing.
    how = StraightThrough(loader, epochs=3, optimizer=sgd, project_every=3, accelerator=engine)
    return align(trained(0).double(), trained(1).double(), how, seed=2)


if __name__ == "__main__":
    x, y = data()
    share((x.double(), y), match)
