"""The zoos of further libraries: what is written here of them, without the libraries."""

from __future__ import annotations

import pytest
from torch import nn

import permgraph as pg
from benchmarks.zoo import libraries
from benchmarks.zoo.__main__ import main
from benchmarks.zoo.names import ZOOS, Zoo
from benchmarks.zoo.signatures import arguments, shrunk, small
from benchmarks.zoo.sweep import sweep


def test_a_library_that_is_absent_is_named_with_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Zoo("absent models", list, lambda name: iter(()), library="no_such_library", extra="zoos")
    with pytest.raises(ImportError, match=r"absent models needs no_such_library.*pip install permgraph\[zoos\]"):
        absent.require()
    monkeypatch.setitem(ZOOS, "absent", absent)
    with pytest.raises(ImportError, match=r"pip install permgraph\[zoos\]"):
        sweep("absent")


def test_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    absent = Zoo("absent models", list, lambda name: iter(()), library="no_such_library", extra="zoos")
    monkeypatch.setattr("benchmarks.zoo.__main__.ZOOS", {"absent": absent})
    monkeypatch.setitem(ZOOS, "absent", absent)
    monkeypatch.setattr("benchmarks.zoo.report.write", lambda: None)
    monkeypatch.setattr("sys.argv", ["zoo", "sweep", "absent"])
    with pytest.raises(SystemExit):
        main()
    assert "pip install permgraph[zoos]" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["zoo", "sweep"])
    main()  # all zoos: those that are absent are left out, and said to be
    assert "left out: the zoo of absent models" in capsys.readouterr().out


@pytest.mark.parametrize("name", libraries.both_sizes(libraries.own()))
def test_models_written_here_are_verified(name: str) -> None:
    model = next(ZOOS["own"].build(name)).eval()
    spec = pg.auto_spec(model)
    assert len(spec.moving) > 10
    assert pg.verify(model, spec).passed


def test_both_sizes_differ() -> None:
    for name in libraries.own():
        first, second = (next(ZOOS["own"].build(one)) for one in (name, name + libraries.LARGER))
        assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in second.parameters())


def test_heads_keep_their_size_and_widths_follow() -> None:
    config = {
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "inner_dim": 1536,
        "num_layers": 30,
        "sample_size": 128,
    }
    found = shrunk(config)
    assert found == {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "inner_dim": 128,
        "num_layers": 2,
        "sample_size": 128,
    }
    assert shrunk(config, 2)["inner_dim"] == 4 * 64


def test_numbers_of_a_list_are_divided_alike() -> None:
    assert shrunk({"block_out_channels": (320, 640, 1280)})["block_out_channels"] == (40, 80, 160)


class Wide(nn.Module):
    """A class whose constructor wants two arguments and has a width by default."""

    def __init__(self, in_channels: int, kind: str, hidden_dim: int = 4096) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.Sequential(nn.Linear(in_channels, hidden_dim), nn.Linear(hidden_dim, 2))


def test_what_is_given_stands_and_what_is_wanted_is_filled_in() -> None:
    assert arguments(Wide, 1, {"kind": "a"}) == {"in_channels": 3, "hidden_dim": 64, "kind": "a"}
    assert small(Wide, 2, {"kind": "a"}).layers[0].out_features == 128  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match="more than this sweep builds"):
        small(Wide, 1, {"kind": "a", "in_channels": 40_000, "hidden_dim": 40_000})
