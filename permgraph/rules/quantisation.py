"""Fake quantisation, as training for quantised inference has it: rounding to steps whose width follows the values."""

from __future__ import annotations

from permgraph.rules.call import Call
from permgraph.rules.registry import rule


@rule("aten.fake_quantize_per_channel_affine_cachemask")
def fake_quantize_channels(call: Call) -> None:
    """Each element rounded by the step and the zero point of its channel."""
    _by_channel(call, call["axis"], "scale", "zero_point")


@rule("aten._fused_moving_avg_obs_fq_helper")
def observe_and_fake_quantize(call: Call) -> None:
    """The same by the least and greatest values seen so far: of each channel, or of the whole tensor."""
    if call["per_row_fake_quant"]:
        _by_channel(call, call["ch_axis"], "running_min", "running_max", "scale", "zero_point")
    else:
        call.pointwise(call["self"], *(out for out in call.results if out.shape == call["self"].shape))


def _by_channel(call: Call, axis: int, *names: str) -> None:
    x = call["self"]
    every, channel = call.names(x), f"d{axis % x.ndim}"
    call.link((x, every), *((call[name], channel) for name in names if call[name].shape == (x.shape[axis],)))
    call.link((x, every), *((out, every) for out in call.results if out.shape == x.shape))
