"""``python -m permgraph``: the command line."""

from permgraph.cli import main

main()
