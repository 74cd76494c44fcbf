"""``permgraph rules``: the table of rules, and whether an operator's rule is right."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permgraph.cli.options import Shown, spread
from permgraph.cli.screen import SAYS_NO, Screen, table

if TYPE_CHECKING:
    from permgraph.rules.registry import RegisteredRule
    from permgraph.verification.example import Example

rules = typer.Typer(help="The rules that say what operators tie together.", no_args_is_help=True)


@dataclass(frozen=True)
class Own:
    """Rules and calls of the user's own."""

    load: Annotated[
        list[Path] | None,
        typer.Option(help="A Python file to run first, which defines operators and registers rules; may be repeated."),
    ] = None


def list_(
    shown: Shown,
    own: Own,
    pattern: Annotated[str | None, typer.Argument(help="A name with * for anything, or a part of it.")] = None,
) -> None:
    """List the operators that have a rule, what their registration declares, and where the rule stands.

    [bold]Example[/bold]

        permgraph rules list "aten.*pool*"
    """
    with Screen(shown) as screen:
        _load(own)
        from permgraph.rules import list_rules

        found = list_rules(pattern)
        declared = [_declared(entry) for entry in found]
        data = [
            {"name": entry.name, "place": entry.place, "declared": properties}
            for entry, properties in zip(found, declared, strict=True)
        ]
        rows = [
            (entry.name, " ".join(f"{name}={value!r}" for name, value in properties.items()), entry.place)
            for entry, properties in zip(found, declared, strict=True)
        ]
        screen.result({"rules": data}, table(rows, ("operator", "declared", "rule")) if rows else "no such rule")
        if not rows:
            raise typer.Exit(SAYS_NO)


def check(
    shown: Shown,
    own: Own,
    operator: Annotated[str | None, typer.Argument(help="An operator such as aten.addmm or mylib.gate.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every operator that has an example.")] = False,
    shapes: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", help="A tensor for the operator, by its shape: 2,3,5, or int:2,16; in order."),
    ] = None,
    arguments: Annotated[
        list[str] | None, typer.Option("--argument", help="Another argument by its name: dim=1; may be repeated.")
    ] = None,
) -> None:
    """Test an operator's rule in both directions: it allows only symmetries, and it denies none.

    Torch's own operators come with examples; for another one give the shapes of its tensors, different primes where
    the sizes have nothing to do with each other. Exit code 1 if a rule is wrong.

    [bold]Examples[/bold]

        permgraph rules check aten.addmm

        permgraph rules check mylib.gate --load my_rules.py --input 2,3,5 --input 3 --input 3
    """
    with Screen(shown) as screen:
        from permgraph.errors import PermgraphError

        _load(own)
        if (operator is None) != everything:
            raise PermgraphError("give one operator, such as aten.addmm, or --all")
        if operator is not None and (shapes or arguments):
            checked = [_own_call(operator, shapes or [], arguments or [])]
        else:
            with screen.stage("checking") as stage:
                examples = _examples(operator)
                checked = []
                for number, example in enumerate(examples):
                    stage.step(number, len(examples), example.name)
                    checked.append(_outcome(example))
        wrong = [row for row in checked if row["problem"] is not None]
        lines = [
            f"{row['call']}: {row['axes']}: {row['problem'] or 'ok'}" for row in (wrong if everything else checked)
        ]
        lines.append(f"{len(checked)} calls, {len(wrong)} wrong")
        screen.result({"calls": checked, "wrong": len(wrong)}, "\n".join(lines))
        if wrong:
            raise typer.Exit(SAYS_NO)


def _load(own: Own) -> None:
    """Run the user's files."""
    from permgraph.errors import PermgraphError

    for path in own.load or ():
        found = importlib.util.spec_from_file_location(path.stem, path)
        if found is None or found.loader is None or not path.is_file():
            raise PermgraphError(f"{path}: no such Python file")
        module = importlib.util.module_from_spec(found)
        try:
            found.loader.exec_module(module)
        except Exception as error:
            raise PermgraphError(f"{path} cannot be run: {type(error).__name__}: {error}") from error


def _declared(entry: RegisteredRule) -> dict[str, Any]:
    """The properties of a rule that were declared, those that are not the strictest answer."""
    given = {field: getattr(entry.properties, field.name) for field in fields(entry.properties)}
    return {field.name: value for field, value in given.items() if value != field.default}


def _examples(operator: str | None) -> list[Example]:
    """The examples that run an operator; all of them for None."""
    from permgraph.errors import PermgraphError
    from permgraph.rules import rule_name
    from permgraph.verification.examples import ELSEWHERE, EXAMPLES

    if operator is None:
        return EXAMPLES
    name = rule_name(operator) or rule_name(f"{operator}.default")
    if name is None:
        raise PermgraphError(f"{operator} has no rule; permgraph rules list shows those that have one")
    if name in ELSEWHERE:
        raise PermgraphError(f"{name} runs on a GPU only; its rule is that of {ELSEWHERE[name]}: check that one")
    found = [example for example in EXAMPLES if example.calls(name)]
    if not found:
        raise PermgraphError(
            f"there is no example of {name}: give its tensors by their shapes, {_wanted(operator)}, and other "
            "arguments as --argument name=value; or call permgraph.check_rule in Python"
        )
    return found


def _outcome(example: Example) -> dict[str, Any]:
    report = example.check()
    return {"call": example.name, "axes": report.axes, "problem": example.problem(report)}


def _overload(operator: str) -> Any:
    """An operator overload of torch by its name."""
    import torch

    from permgraph.errors import PermgraphError

    namespace, _, rest = operator.partition(".")
    name, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), name, None) if name else None
    found = getattr(packet, overload or (packet.overloads()[0] if packet is not None else ""), None)
    if found is None:
        raise PermgraphError(f"there is no operator {operator}: import what defines it with --load FILE.py")
    return found


def _wanted(operator: str) -> str:
    """The options that give an operator its tensors."""
    names = [a.name for a in _overload(operator)._schema.arguments if "Tensor" in str(a.type)]
    return " ".join(f"--input SHAPE ({name})" for name in names)


def _own_call(operator: str, shapes: list[str], arguments: list[str]) -> dict[str, Any]:
    """One call with tensors of the shapes that were given, in the order of the schema."""
    import torch

    from permgraph.cli.models import parse_inputs
    from permgraph.errors import PermgraphError
    from permgraph.verification import check_rule

    overload = _overload(operator)
    tensors, named = parse_inputs(shapes)
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        random = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return random if tensor.is_floating_point() else tensor

    keywords: dict[str, Any] = {name: drawn(tensor) for name, tensor in named.items()}
    for text in arguments:
        name, _, value = text.partition("=")
        try:
            keywords[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise PermgraphError(f"--argument {text}: give name=value with a Python literal") from None
    slots = [a.name for a in overload._schema.arguments if "Tensor" in str(a.type) and a.name not in keywords]
    if len(tensors) > len(slots):
        raise PermgraphError(f"{operator} takes {len(slots)} tensors beside those named, not {len(tensors)}")
    keywords |= {name: drawn(tensor) for name, tensor in zip(slots, tensors, strict=False)}
    ordered = {a.name: keywords.pop(a.name) for a in overload._schema.arguments if a.name in keywords}
    if keywords:
        raise PermgraphError(f"{operator} has no argument {next(iter(keywords))}; it is {overload._schema}")
    try:
        report = check_rule(overload, **ordered)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        if isinstance(error, PermgraphError):
            raise
        raise PermgraphError(f"{operator} does not run on these: {error}; it is {overload._schema}") from error
    problem = None if report.passed else f"{report.verdict}: {'; '.join(report.problems)}"
    return {"call": str(overload), "axes": report.axes, "problem": problem}


rules.command("list")(spread(list_))
rules.command("check")(spread(check))
