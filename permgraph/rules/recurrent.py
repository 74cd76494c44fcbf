"""Fused recurrent cells and layers."""

from __future__ import annotations

from permgraph.rules.call import Call
from permgraph.rules.registry import rule


@rule("aten._thnn_fused_lstm_cell", values="derived")
def lstm_cell(call: Call) -> None:
    """Gates (b, 4·h) from input and state, with optional biases (4·h); the gates' order is fixed."""
    _gates(call, 4)


@rule("aten._thnn_fused_gru_cell", values="derived")
def gru_cell(call: Call) -> None:
    """Gates (b, 3·h) from input and state, with optional biases (3·h)."""
    _gates(call, 3)


def _gates(call: Call, count: int) -> None:
    """Every gate numbers the hidden units alike; `count` of them stand one after the other."""
    hidden = call.get("cx", call.get("hx"))
    width = hidden.shape[-1]
    gates = [(call["input_gates"], "b (g! h)"), (call["hidden_gates"], "b (g! h)")]
    biases = [(call.get(name), "(g! h)") for name in ("input_bias", "hidden_bias")]
    states = [(hidden, "b h"), *((out, "b h") for out in call.results if out.shape[-1] == width)]
    for out in call.results:
        if out.shape[-1] != width:  # what is kept for the gradient: gates and states, one after the other
            call.link((hidden, "b h"), (out, "b (w! h)"), why="the order of the gates", w=out.shape[-1] // width)
    call.link(*gates, *biases, *states, why="the order of the gates", g=count)


@rule("aten._pack_padded_sequence", values="derived", zeros="all")
def pack(call: Call) -> None:
    """Padded sequences (b, t, features), or (t, b, features), as rows: at each time those that have not ended yet."""
    why = "sequences in the order of their lengths"
    call.link((call["input"], "b! t! ..."), (call.out, "n! ..."), why=why)
    call.pin_all([call["lengths"], *call.results[1:]], why)
