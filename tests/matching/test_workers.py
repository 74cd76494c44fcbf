"""Several processes at one match."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import permgraph as pg
from permgraph.errors import NonFiniteError, PermgraphError
from permgraph.matching.ascent import paired
from permgraph.matching.streamed import StreamedWeightMatching
from permgraph.matching.workers import Workers
from tests.matching.processes import run_two

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


class Model(nn.Module):
    """Heads, a residual stream, and a hidden layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x)[0]
        return self.head(x + self.down(self.up(x).relu()))


def grouped() -> tuple[pg.PermutationSpec, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two networks in which the inputs and the outputs of a convolution's groups are chosen pair by pair."""
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 20, 1), nn.ReLU(), nn.Conv2d(20, 15, 3, groups=5), nn.ReLU(), nn.Conv2d(15, 2, 1)
        )
        states.append(net.state_dict())
    return pg.auto_spec(net, torch.randn(1, 3, 6, 6)), states[0], states[1]


# Settings of accelerate's loaders, how many samples they deal out, and whether each is shown once.
ACCELERATE = [
    ({"even_batches": False}, 20, True),
    ({"dispatch_batches": True}, 20, True),
    ({}, 20, False),
    ({"dispatch_batches": True}, 19, False),
]


class Counting(Mapping[str, torch.Tensor]):
    """A state dict that notes which tensors are read."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self.state = state
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return self.state[name]

    def __contains__(self, name: object) -> bool:
        return name in self.state

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def pair() -> tuple[pg.PermutationSpec, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(Model().state_dict())
    return pg.auto_spec(Model(), torch.randn(2, 7, 5)), states[0], states[1]


def models() -> tuple[Model, Model]:
    _, a, b = pair()
    made = Model().eval(), Model().eval()
    for model, state in zip(made, (a, b), strict=True):
        model.load_state_dict(state)
    return made


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 7, 5, generator=generator) + 3 * batch for batch in range(5)]


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    spec, a, b = pair()
    counting = Counting(a)
    found = StreamedWeightMatching(workers=Workers()).match(counting, b, spec, seed=3)
    bad = {**b, "down.weight": b["down.weight"] * torch.nan}
    with pytest.raises(NonFiniteError, match=r"down\.weight"):  # on both, though one of them has read it
        StreamedWeightMatching(workers=Workers()).match(a, bad, spec)
    dealt_out_pairs(rank)
    seen = pg.align(*models(), pg.ActivationMatching(data()[rank::2], workers=Workers()), spec=spec)
    assert seen.permutation == pg.align(*models(), pg.ActivationMatching(data()), spec=spec).permutation
    alone = pg.align(*models(), pg.ActivationMatching(data() if rank else [], workers=Workers()), spec=spec)
    assert alone.permutation == seen.permutation
    assert alone.objective == pytest.approx(seen.objective, rel=1e-5)
    dealt_out(seen, rank, port)
    arrays = {name: torch.from_numpy(array.copy()) for name, array in found.permutation.arrays.items()}
    content = {"arrays": arrays, "objective": found.objective, "sweeps": found.sweeps, "read": sorted(counting.read)}
    torch.save(content, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def dealt_out_pairs(rank: int) -> None:
    """Each process values the pairs of every other index, and both come to what one would."""
    dealt: list[int] = []
    ascend = paired._ascend
    paired._ascend = lambda scene, spots, order, i: dealt.append(i) or ascend(scene, spots, order, i)
    spec, a, b = grouped()
    both = StreamedWeightMatching(workers=Workers()).match(a, b, spec, seed=3)
    assert dealt and {i % 2 for i in dealt} == {rank}
    alone = StreamedWeightMatching().match(a, b, spec, seed=3)
    assert {i % 2 for i in dealt} == {0, 1}
    assert alone.permutation == both.permutation and not alone.permutation.is_identity
    assert alone.objective == pytest.approx(both.objective, rel=1e-6)


def dealt_out(expected: pg.Alignment, rank: int, port: int) -> None:
    """The same data through accelerate, which may show no sample twice."""
    accelerate = pytest.importorskip("accelerate")
    # As a launcher would have set them.
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in known.items()})
    for settings, samples, once in ACCELERATE:
        whole = DataLoader(torch.cat(data())[:samples], batch_size=4)  # five batches: three for one process
        config = accelerate.DataLoaderConfiguration(**settings)
        engine = accelerate.Accelerator(cpu=True, dataloader_config=config)
        assert engine.num_processes == 2
        mine = engine.prepare_data_loader(whole)
        if once:
            found = pg.align(*models(), pg.ActivationMatching(mine, workers=Workers()), spec=pair()[0])
            assert found.permutation == expected.permutation
            assert found.objective == pytest.approx(expected.objective, rel=1e-5)
        else:
            with pytest.raises(PermgraphError, match="showing some samples twice"):
                pg.ActivationMatching(mine, workers=Workers())


@pytest.mark.slow
def test_two_processes_find_what_one_does_and_share_the_reading(tmp_path: Path) -> None:
    run_two(work, tmp_path)
    spec, a, b = pair()
    expected = StreamedWeightMatching().match(a, b, spec, seed=3)
    assert expected.objective > expected.objective_before
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for one in found:
        for name, array in expected.permutation.arrays.items():
            assert one["arrays"][name].tolist() == array.tolist()
        assert one["objective"] == pytest.approx(expected.objective, rel=1e-6)
        assert one["sweeps"] == expected.sweeps
    read = [set(one["read"]) for one in found]
    assert read[0] | read[1] == {name for name in spec.axes if name not in ("head.bias",)}
    assert len(read[0] & read[1]) <= 1  # the smallest tensor of all stands for the dtype
    share = [sum(a[name].numel() for name in one) for one in read]
    assert max(share) < 0.6 * sum(share)


def test_workers_need_processes() -> None:
    with pytest.raises(PermgraphError, match="init_process_group"):
        Workers()


def test_a_device_for_the_products() -> None:
    spec, a, b = pair()
    here, there = (StreamedWeightMatching(device=device).match(a, b, spec) for device in (None, "cpu"))
    assert here.permutation == there.permutation
