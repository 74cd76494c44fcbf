"""The logarithm of the number of permutations, against what it is by hand, for modules made of modules."""

from __future__ import annotations

from collections.abc import Callable
from math import lgamma

import pytest
import torch
from torch import Tensor, nn

import permgraph as pg
from tests.modules import parts
from tests.modules.by_hand import worst_difference

D = parts.D


def L(n: int) -> float:
    """The logarithm of n!."""
    return lgamma(n + 1)


def vectors(batch: int = 6) -> tuple[Tensor, ...]:
    return (torch.randn(batch, D),)


def sequences(width: int = D) -> tuple[Tensor, ...]:
    return (torch.randn(2, 4, width),)


def images() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 6, 6),)


def waves() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 9),)


def with_targets() -> tuple[Tensor, ...]:
    return (torch.randn(6, D), torch.randn(6))


def heads_of(width: int, heads: int) -> float:
    """Of multi-head attention: heads change places, and in each the units of queries and keys, and those of values."""
    return L(heads) + 2 * heads * L(width // heads)


def parallel_blocks() -> nn.Module:
    """A small one of the class of `vit_small_patch16_18x2_224`."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    return timm.VisionTransformer(
        img_size=8, patch_size=4, num_classes=3, embed_dim=8, depth=2, num_heads=2, mlp_ratio=1.5, init_values=0.1,
        block_fn=timm.ParallelThingsBlock,
    )  # fmt: skip


def pictures() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 8, 8),)


EXPERTS = L(3) + 3 * L(4)

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], float]] = {
    "soft, slices": (parts.SoftSlices, vectors, EXPERTS),
    "soft, unbind": (parts.SoftUnbind, vectors, EXPERTS),
    "soft, einsum": (parts.SoftEinsum, vectors, EXPERTS),
    "soft, matmul": (parts.SoftMatmul, vectors, EXPERTS),
    "top k, where": (parts.TopKWhere, vectors, EXPERTS),
    "top k, equal": (parts.TopKEqual, vectors, EXPERTS),
    "top k, scatter": (parts.TopKScatter, vectors, EXPERTS),
    "top k, gather": (parts.TopKGather, vectors, EXPERTS),
    "top k, masked": (parts.TopKMasked, vectors, EXPERTS),
    "top one, where": (parts.TopOneWhere, vectors, EXPERTS),
    "top one, masks": (parts.TopOneMasks, vectors, EXPERTS),
    "capacity": (parts.Capacity, vectors, EXPERTS),
    "experts choose": (parts.ExpertChoice, vectors, EXPERTS),
    "regulated experts": (parts.RegulatedExperts, vectors, EXPERTS),
    "shared experts": (parts.SharedExperts, vectors, EXPERTS + L(2) + 2 * L(4)),
    "many gates": (parts.ManyGates, vectors, EXPERTS + L(D)),
    "hierarchical": (parts.Hierarchical, vectors, L(2) + 2 * EXPERTS),
    "summed": (parts.Summed, vectors, EXPERTS),
    "concatenated": (parts.Concatenated, vectors, EXPERTS),
    "ResNeXt": (parts.ResNeXtBlock, images, L(3) + 6 * L(4)),
    "Inception": (parts.InceptionBlock, images, 2 * L(2) + L(2) + 2 * (L(4) + L(5))),
    "equal kernels": (lambda: parts.Kernels([3, 3, 3]), waves, EXPERTS),
    "unlike kernels": (lambda: parts.Kernels([3, 5, 7]), waves, 3 * L(4)),
    "some kernels equal": (lambda: parts.Kernels([3, 5, 3]), waves, L(2) + 3 * L(4)),
    "selective kernels": (parts.SelectiveKernels, images, L(2) + L(4) + L(3)),
    "heads": (parts.Heads, sequences, L(3) + 6 * L(4)),
    "multi-query": (parts.MultiQuery, sequences, L(3) + 2 * L(4)),
    "parallel attention": (parts.ParallelAttention, lambda: sequences(6), L(2) + 2 * heads_of(6, 2)),
    "mean": (lambda: parts.Ensemble("mean"), vectors, EXPERTS),
    "mean and deviation": (lambda: parts.Ensemble("mean and deviation"), vectors, EXPERTS),
    "median": (lambda: parts.Ensemble("median"), vectors, EXPERTS),
    "sorted": (lambda: parts.Ensemble("sorted"), vectors, EXPERTS),
    "votes": (lambda: parts.Ensemble("votes"), vectors, EXPERTS),
    "probabilities": (lambda: parts.Ensemble("probabilities"), vectors, EXPERTS),
    "product": (lambda: parts.Ensemble("product"), vectors, EXPERTS),
    "mixture density": (parts.MixtureDensity, with_targets, EXPERTS),
    "capsules": (parts.Capsules, vectors, L(4) + 3 * L(2)),
    "LSTM ensemble": (parts.LSTMEnsemble, sequences, EXPERTS),
    "LSTM cells": (parts.CellEnsemble, sequences, L(3) + L(4)),
    "low-rank mixture": (parts.LowRankMixture, vectors, L(3) + 3 * L(2)),
    "searched cell": (parts.Cell, images, L(2) + 2 * L(2)),
    "towers, dot": (lambda: parts.Towers("dot"), vectors, L(2) + 2 * L(4) + L(D)),
    "towers, cosine": (lambda: parts.Towers("cosine"), vectors, L(2) + 2 * L(4) + L(D)),
    "towers, distance": (lambda: parts.Towers("distance"), vectors, L(2) + 2 * L(4) + L(D)),
    "towers, squares": (lambda: parts.Towers("squares"), vectors, L(2) + 2 * L(4) + L(D)),
    "towers, square": (lambda: parts.Towers("square"), vectors, L(2) + 2 * L(4) + L(D)),
    "towers, norm": (lambda: parts.Towers("norm"), vectors, L(2) + 2 * L(4) + L(D)),
    "nested": (parts.Nested, vectors, L(2) + 2 * EXPERTS + L(4)),
    "stacked state": (parts.StackedState, vectors, EXPERTS),
    "parallel blocks of timm": (parallel_blocks, pictures, L(8) + 2 * (L(2) + 2 * heads_of(8, 2) + L(2) + 2 * L(12))),
    "numbered parts": (parts.NumberedParts, vectors, EXPERTS),
    "one layer norm": (lambda: parts.NormedTogether(nn.LayerNorm(12)), vectors, EXPERTS),
    "one batch norm": (lambda: parts.NormedTogether(nn.BatchNorm1d(12)), vectors, EXPERTS),
    "a norm for each": (lambda: parts.NormedTogether(nn.GroupNorm(3, 12)), vectors, EXPERTS),
    "set of branches": (parts.SetOfBranches, vectors, EXPERTS + heads_of(6, 2) + L(6)),
}


@pytest.mark.parametrize("name", CASES)
def test_as_many_permutations_as_by_hand(name: str) -> None:
    make, inputs, expected = CASES[name]
    torch.manual_seed(0)
    model = make()
    spec = pg.auto_spec(model, inputs(), modules=True)
    assert spec.log_order() == pytest.approx(expected)
    proof = pg.verify(model, spec, inputs())
    assert proof.passed, str(proof)
    assert worst_difference(model, spec, [inputs(), inputs()], modes=(False, True), tries=2) < 1e-9
