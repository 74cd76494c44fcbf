"""The demo: what it prints is true, and the barrier falls."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import permgraph as pg

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_the_barrier_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert found is not None
    assert found.loader is not None
    demo = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "demo", demo)
    found.loader.exec_module(demo)

    random = torch.get_rng_state()
    mlp, resnet = demo.main(["--only", "MLP", "ResNet", "--points", "5", "--out", str(tmp_path)])
    assert torch.equal(torch.get_rng_state(), random)

    for row, loss, aligned in ((mlp, 0.5, 0.02), (resnet, 0.3, 0.2)):
        assert row.proof.passed
        assert row.fit.objective > row.fit.objective_before
        assert row.lines["naive"].barrier > loss
        assert row.lines["aligned"].barrier < aligned * row.lines["naive"].barrier
        assert row.lines["aligned"].barriers["accuracy"] < row.lines["naive"].barriers["accuracy"]
        assert (
            max(row.lines["naive"].curves["accuracy"][0], row.lines["naive"].curves["accuracy"][-1]) > 0.95
        )  # trained networks
        spec = pg.PermutationSpec.parse((tmp_path / f"{row.name.lower()}.spec.txt").read_text())
        assert spec.axes == row.spec.axes
    vit, whole = demo.main(["--only", "ViT", "--points", "5", "--out", str(tmp_path)])
    heights = [line.barrier for line in (vit.lines["aligned"], *whole.lines.values())]
    assert heights[0] > 0.5 > heights[2] > heights[3] and heights[0] > heights[1], heights
    assert heights[3] < 0.05 and whole.proof.passed
    assert (tmp_path / "vit-whole.spec.txt").exists()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "MLP" in printed
    assert f"{resnet.lines['naive'].barrier:.3f} → {resnet.lines['aligned'].barrier:.3f}" in printed
