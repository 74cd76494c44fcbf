"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from permgraph import __version__
from permgraph.cli.align import align
from permgraph.cli.barrier import barrier
from permgraph.cli.doctor import doctor
from permgraph.cli.merge import merge
from permgraph.cli.mergekit import mergekit
from permgraph.cli.options import spread
from permgraph.cli.plan import plan
from permgraph.cli.rules import rules
from permgraph.cli.structure import diff, explain, spec, verify
from permgraph.cli.study import study
from permgraph.cli.transport import transport

app = typer.Typer(
    name="permgraph",
    help="Every permutation symmetry of a PyTorch model, and the alignment of trained networks over it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"permgraph {__version__}")
        raise typer.Exit


@app.callback()
def permgraph(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Every permutation symmetry of a PyTorch model, and the alignment of trained networks over it.

    A MODEL is timm:NAME, torchvision:NAME, hf:FOLDER or the FOLDER, package.module:factory or file.py:Class. Exit
    codes: 0 success, 1 the answer is no, 2 bad input, 70 a bug.
    """


for command in (spec, explain, diff, verify, align, merge, mergekit, transport, barrier, study, plan, doctor):
    app.command()(spread(command))
app.add_typer(rules, name="rules")
