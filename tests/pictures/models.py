"""Specs to draw: small ones written by hand, and one with names that are out to do harm."""

from __future__ import annotations

from permgraph.spec import Constraints, Group, PermutationSpec, Pin, SlotPin, Tie, UnknownOp
from permgraph.spec.expressions import Fixed, Ref

HOSTILE = "<img src=x onerror=alert(1)>"
ENDING = '</script><script>window.harmed="script"</script>'


def stack(layers: int = 5, inner: int = 6) -> PermutationSpec:
    """A residual stream through blocks that are alike, each with a group of its own."""
    lines = ["embed.weight 10x4 . embed"]
    for layer in range(layers):
        lines += [
            f"layers.{layer}.up.weight {inner}x4 layers.{layer}.up embed",
            f"layers.{layer}.down.weight 4x{inner} embed layers.{layer}.up",
        ]
    lines += ["head.weight 3x4 . embed", "groups: embed 4"]
    lines += [f"    · layers.{layer}.up {inner}" for layer in range(layers)]
    return PermutationSpec.parse("\n".join(lines))


def attention() -> PermutationSpec:
    """Heads with channels in each, in a fused projection."""
    return PermutationSpec.parse(
        """
        qkv.weight  24x8  [(h qk) + (h qk) + (h v)] stream
        out.weight  8x8   stream (h v)
        norm.weight 8     stream
        groups: stream 8 · h 2 · qk 4 per h · v 4 per h
        """
    )


def hostile() -> PermutationSpec:
    """Names, reasons and operators that would be markup if they were not escaped."""
    group = "<b>&amp;"
    return PermutationSpec(
        groups={group: Group(group, 3)},
        axes={
            f"{HOSTILE}.weight": (Ref(group), Fixed(2)),
            f"{ENDING}.a..b.weight": (Fixed(2), Ref(group)),
            "." * 5000: (Fixed(1),),
        },
        pins=(Pin(f"{HOSTILE}.weight", 1, 2, ENDING, HOSTILE, ENDING, HOSTILE),),
        unknown_ops=(UnknownOp(ENDING, 2, HOSTILE, ENDING),),
        unused=(HOSTILE,),
        model_class=ENDING,
        notes=(ENDING,),
    )


def chain(layers: int = 4) -> PermutationSpec:
    """A perceptron, in which each group ends where the next one begins."""
    lines = [
        f"{at}.weight 5x5 {f'h{at}' if at < layers - 1 else '.'} {f'h{at - 1}' if at else '.'}" for at in range(layers)
    ]
    return PermutationSpec.parse("\n".join([*lines, "groups: " + " · ".join(f"h{at} 5" for at in range(layers - 1))]))


def detours() -> PermutationSpec:
    """The short way between two axes is by another group's, and the nearest pin is not the one that counts."""

    def tie(a: str, b: str, operator: str) -> Tie:
        return Tie(a, b, f"aten.{operator}.default", "module", "file.py:1")

    return PermutationSpec(
        groups={"a": Group("a", 3), "b": Group("b", 3)},
        axes={"p.weight": (Ref("a"),), "q.weight": (Ref("a"),), "r.weight": (Ref("b"),), "s.weight": (Fixed(4),)},
        pins=(Pin("s.weight", 0, 4, "the second"),),
        constraints=Constraints(
            ties=(
                tie("p.weight[0]", "r.weight[0]", "short"),
                tie("r.weight[0]", "q.weight[0]", "short"),
                tie("p.weight[0]", "one[0]", "long"),
                tie("one[0]", "two[0]", "longer"),
                tie("two[0]", "q.weight[0]", "longest"),
                tie("s.weight[0]", "three[0]", "near"),
                tie("three[0]", "four[1]", "far"),
            ),
            pins=(
                SlotPin("three[0]", "the first", "aten.first", "here", None),
                SlotPin("four[1]", "the second", "aten.second", "there", "file.py:2"),
            ),
        ),
    )
