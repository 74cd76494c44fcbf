"""One process of a learned matching that may have several; run by a test, with the file to write to."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

from permgraph.inference import auto_spec
from permgraph.matching import LearnedMatching, align
from tests.matching.learnable import Reader, texts, trained


def main(path):
    torch.set_num_threads(1)
    # The loader's batch is that of all processes together, so each step sees the same samples.
    engine = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    loader = DataLoader(
        TensorDataset(*texts()), batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(5)
    )
    # In float64, so that the order in which gradients are summed decides nothing.
    a, b = (trained(Reader, texts(), seed).double() for seed in (0, 1))
    spec = auto_spec(a, symmetry="general", example_inputs=(texts()[0][:3],))
    fit = align(a, b, LearnedMatching(loader, steps=20, measure_every=5, accelerator=engine), spec=spec, seed=2)
    torch.save(
        {
            "state": fit.state_dict,
            "history": [sweep.objective for sweep in fit.history],
            "world": engine.num_processes,
        },
        path,
    )
    engine.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
