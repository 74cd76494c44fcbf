"""The constants of matching that were tuned by measurement, in one table.

They were chosen by processor time of one thread, on the networks that the benchmark named with each group draws or
trains; `docs/matching-benchmarks.md` has the tables. None decides what is a right answer: only how often something is
tried, how much is in memory at a time, and from where on that pays.
"""

# --- memory, in elements unless said otherwise: benchmarks/matching.py memory, benchmarks/scale.py --------------------

PORTION = 1 << 20
"""Of a model, copied at a time."""

STREAMED_PORTION = 1 << 22
"""Of a streamed model, in working precision at a time."""

STREAMED_DEPTH = 1024
"""Products that are summed at a time, at least: with fewer, adding them to a large Gram matrix takes over."""

RETURNED = 1 << 25
"""Bytes that are read between two times that free memory is given back to the system."""

ROOM = 1 << 25
"""Bytes that a run may keep between steps, however small the models are."""

# --- restarts: benchmarks/matching.py, on its small networks ----------------------------------------------------------

WORTH = 0.15
"""Seconds that `explore` may take by what a sweep can be expected to take."""

WIDTH = 16
"""The most ascents that go side by side."""

RELAXING = 2.0
"""Seconds that a relaxation may take, likewise."""

LONG = 5
"""Sweeps of an ascent that had optima to choose from: on wide networks of random weights it takes two or three."""

RELAXATION_SWEEPS = 27
"""Sweeps of one ascent in the time of a relaxation, on average."""

EXPLORING_SWEEPS = 14
"""Sweeps of one ascent in two rounds, on average."""

CALL_SECONDS, CUBE_SECONDS, PRODUCT_SECONDS = 2e-4, 1e-10, 4e-11
"""For what is called in a step; by entry of a group's cube for its assignment, and by product for its Gram matrix."""

# --- steps: benchmarks/matching.py, benchmarks/assignment.py ----------------------------------------------------------

QUADRATIC_TRIALS = 8
"""How often a quadratic move is tried, each time with twice the damping."""

PAIRED_ROUNDS = 4
"""Rounds over the groups inside a pair, at most."""

ORDER_PASSES = 20
"""Passes of the search for the order of the groups, at most."""

PRICED = 128
"""The width of an assignment from which on making prices costs less than it saves the next time."""

# --- straight-through matching: benchmarks/straight_through.py --------------------------------------------------------

LEAST_INTERVAL = 16
"""Steps between two projections, at least."""

PROJECTION_SHARE = 0.25
"""Of training, that projections may take."""

SOLVING_OPERATIONS = 120.0
"""Operations of matrix products in the time of one assignment of n rows, over n^2.5."""

UPDATING_OPERATIONS = 240.0
"""The same for one weight's gradient to be copied and its optimizer's step, which wait for memory."""

FEW_PRODUCTS = 3
"""In each cost between experts before the axes around are in order: one for each of their matrices."""

# --- many experts: benchmarks/experts.py ------------------------------------------------------------------------------

ALL_PAIRS = 64
"""Experts, heads or other modules of which all pairs are looked at, however large they are."""

ALL_PRODUCTS = 10**11
"""Operations of matrix products up to which all pairs are looked at, however many there are."""

CANDIDATES = 4
"""Of each expert, the others that look likeliest and are looked at."""

CLEARLY = 5.0
"""Standard deviations by which the likeliest must stand out from all; else all are looked at."""

DIRECTIONS = 32
"""Random directions to which the weights of a unit are projected, for each of its matrices."""
