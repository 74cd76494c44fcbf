"""Linear layers and convolutions as one product: rows of inputs, (positions, inputs), times a matrix."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from permgraph.networks.repair import is_transposed_linear

#: Rows of at most so many bytes are made at once.
_BYTES = 2**26


def has_patches(layer: nn.Module) -> bool:
    """Whether a layer can be seen so: a linear layer, or a convolution that is neither transposed nor grouped."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return not layer.transposed and layer.groups == 1
    return isinstance(layer, nn.Linear) or is_transposed_linear(layer)


def input_size(layer: nn.Module) -> int:
    """The length of a row, without the one for the bias."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0] if is_transposed_linear(layer) else weight[0].numel()


def patches(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The rows of inputs in float64, in portions, in the order of the output's positions; a one last for a bias."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        yield _with_one(layer, x.flatten(0, -2) if x.ndim > 1 else x[None])
        return
    spatial = len(layer.kernel_size)
    x = x if x.ndim == spatial + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    positions = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
        )
    ]
    one = 8 * input_size(layer) * int(torch.tensor(positions).prod())
    for part in torch.split(x, max(1, _BYTES // max(one, 1))):
        shifted = []
        for offset in itertools.product(*map(range, layer.kernel_size)):
            cut = [slice(None), slice(None)]
            for at, stride, dilation, many in zip(offset, layer.stride, layer.dilation, positions, strict=True):
                cut.append(slice(at * dilation, at * dilation + stride * (many - 1) + 1, stride))
            shifted.append(part[tuple(cut)])
        rows = torch.stack(shifted, 2).flatten(1, 2)  # (batch, channels times kernel, *positions)
        yield _with_one(layer, rows.movedim(1, -1).flatten(0, -2))


def _with_one(layer: nn.Module, rows: Tensor) -> Tensor:
    rows = rows.to(torch.float64)
    return rows if layer.bias is None else torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


def weight_as_matrix(layer: nn.Module) -> Tensor:
    """The matrix in float64, (inputs and one for a bias, outputs)."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    matrix = weight if is_transposed_linear(layer) else weight.flatten(1).T
    parts = [matrix] if bias is None else [matrix, bias[None]]  # type: ignore[index]
    return torch.cat([part.detach().to(torch.float64) for part in parts])


def write_matrix(layer: nn.Module, matrix: Tensor) -> None:
    """Put a matrix in the place of the layer's weight and bias."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        own = matrix[: input_size(layer)]
        weight.copy_(own if is_transposed_linear(layer) else own.T.reshape(weight.shape))
        if isinstance(bias, Tensor):
            bias.copy_(matrix[-1])
