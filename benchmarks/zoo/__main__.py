"""The command: ``python -m benchmarks.zoo sweep ZOO [NAMES...]`` and ``python -m benchmarks.zoo report``."""

from __future__ import annotations

import argparse

from benchmarks.zoo import compare, final, modules, report, sizes
from benchmarks.zoo.names import ZOOS
from benchmarks.zoo.sweep import sweep


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("sweep", help="measure the models that have no record yet")
    run.add_argument("zoo", choices=list(ZOOS), nargs="?", help="all of them, one after the other, if none is named")
    run.add_argument("names", nargs="*", help="only these models")
    again = "measure those of this status once more, or those measured with other code: stale"
    run.add_argument("--again", nargs="*", default=[], metavar="STATUS", help=again)
    run.add_argument("--controls", choices=("one", "all", "none"), default="one")
    run.add_argument("--seconds", type=float, default=600, help="for one model")
    run.add_argument("--gib", type=float, default=8, help="for one model")
    run.add_argument("--control-seconds", type=float, help="begin no further control of a model after this long")
    run.add_argument("--permutations-only", action="store_true", help="leave general symmetries out")
    commands.add_parser("sizes", help="time the models that are too large to hold, and the deep ones")
    commands.add_parser("compare", help="measure torch-pruning and rebasin on the same models")
    commands.add_parser("report", help="write docs/coverage.md")
    outputs = commands.add_parser("final", help="compare groups with the whole result and with the final outputs alone")
    outputs.add_argument("names", nargs="*", help="only these models")
    outputs.add_argument("--zoo", choices=list(ZOOS), default="heads")
    outputs.add_argument("--seconds", type=float, default=60, help="for one model")
    outputs.add_argument("--total", type=float, default=900, help="begin no further model after so long")
    whole = commands.add_parser("modules", help="list the models with modules that change places, and verify them")
    whole.add_argument("zoo", choices=list(ZOOS))
    whole.add_argument("names", nargs="*", help="only these models")
    whole.add_argument("--seconds", type=float, default=90, help="for one model")
    whole.add_argument("--total", type=float, default=900, help="begin no further model after so long")
    given = parser.parse_args()
    if given.command in ("final", "modules"):
        run_over = final.sweep if given.command == "final" else modules.sweep
        run_over(given.names or None, zoo=given.zoo, seconds=given.seconds, total=given.total)
        return
    if given.command == "sweep":
        for zoo in [given.zoo] if given.zoo else ZOOS:
            options = {"again": given.again, "controls": given.controls, "seconds": given.seconds, "gib": given.gib}
            options |= {"control_seconds": given.control_seconds, "general": not given.permutations_only}
            try:
                sweep(zoo, given.names or None, **options)
            except ImportError as absent:
                if given.zoo:
                    run.error(str(absent))
                print(f"left out: {absent}", flush=True)
    if given.command == "sizes":
        sizes.sweep()
    if given.command == "compare":
        compare.sweep()
    report.write()


if __name__ == "__main__":
    main()
