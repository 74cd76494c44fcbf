"""One process of a straight-through run that may have several; run by a test, with the file to write to."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

from permgraph.matching import StraightThrough, align
from tests.matching.test_straight_through import data, sgd, trained


def main(path):
    torch.set_num_threads(1)
    # The loader's batch is that of all processes together, so each step sees the same samples.
    engine = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    # In float64, so that the order in which gradients are summed decides nothing.
    x, y = data()
    loader = DataLoader(
        TensorDataset(x.double(), y), batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(5)
    )
    how = StraightThrough(loader, epochs=3, optimizer=sgd, project_every=3, accelerator=engine)
    fit = align(trained(0).double(), trained(1).double(), how, seed=2)
    torch.save(
        {
            "arrays": {name: torch.tensor(array) for name, array in fit.permutation.arrays.items()},
            "objective": fit.objective,
            "history": [sweep.objective for sweep in fit.history],
            "world": engine.num_processes,
        },
        path,
    )
    engine.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
