"""The process around a capture: its flags are as they were, whoever else captures, and however a pass ends."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.capture import environment
from permgraph.capture.environment import reference_kernels

CPU = torch.device("cpu")


def flags() -> tuple[Any, ...]:
    """What a capture changes in the whole process, and in this thread."""
    return (
        torch._C._get_mkldnn_enabled(),
        torch._C._get_cudnn_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        gc.isenabled(),
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002
        torch.get_rng_state().tolist(),
        vars(torch.Tensor).get("apply_"),
    )


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = flags()
    yield
    assert flags() == before


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_contexts_may_end_in_any_order(order: tuple[int, ...]) -> None:
    before = flags()
    contexts = [reference_kernels(CPU) for _ in order]
    for context in contexts:
        context.__enter__()
        assert not torch._C._get_mkldnn_enabled()
        torch.rand(1), random.random()
    for at in order[:-1]:
        contexts[at].__exit__(None, None, None)
        assert not torch._C._get_mkldnn_enabled()
        assert not torch.backends.mha.get_fastpath_enabled()
    contexts[order[-1]].__exit__(None, None, None)
    assert flags() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_nothing(error: type[BaseException]) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error("on purpose")

    with pytest.raises((pg.errors.CaptureError, KeyboardInterrupt)):
        pg.auto_spec(Fails(), (torch.zeros(1),))


def test_a_failure_half_way_in_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    before = flags()
    with monkeypatch.context() as patch:
        patch.setattr(environment, "sdpa_kernel", fail)
        with pytest.raises(KeyboardInterrupt), reference_kernels(CPU):
            pass
    assert flags() == before
    with reference_kernels(CPU):  # and the next one works
        assert not torch._C._get_mkldnn_enabled()


def test_a_model_that_captures_another_inside() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with reference_kernels(CPU):
                assert not torch._C._get_mkldnn_enabled()
            assert not torch._C._get_mkldnn_enabled()
            return self.layer(x)

    with torch.random.fork_rng():
        model = Outer()
    pg.auto_spec(model, (torch.zeros(1, 4),))


def test_captures_in_many_threads_at_once() -> None:
    def network(width: int) -> nn.Module:
        attention = nn.TransformerEncoderLayer(width, 2, 3 * width, batch_first=True)
        return nn.Sequential(nn.Linear(5, width), attention, nn.Linear(width, 3)).eval()

    with torch.random.fork_rng():
        networks = [network(2 * (at + 2)) for at in range(4)]
    inputs = (torch.zeros(2, 3, 5),)
    expected = [str(pg.auto_spec(model, inputs)) for model in networks]
    found: dict[tuple[int, int], str] = {}
    start = threading.Barrier(len(networks))

    def work(at: int) -> None:
        start.wait()
        for turn in range(5):
            found[at, turn] = str(pg.auto_spec(networks[at], inputs))

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(networks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(at, turn): expected[at] for at in range(4) for turn in range(5)}


def test_waiting_for_another_thread_costs_a_capture_no_time() -> None:
    entered, errors = threading.Event(), []

    def other() -> None:
        entered.set()
        try:
            pg.capture(nn.ReLU(), (torch.zeros(2, 3),), max_seconds=1.0)
        except pg.errors.CaptureError as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    with reference_kernels(CPU):
        thread.start()
        entered.wait()
        time.sleep(1.1)
    thread.join()
    assert not errors


def test_another_thread_waits_until_the_pass_ends() -> None:
    entered, seen = threading.Event(), []

    def other() -> None:
        entered.set()
        with reference_kernels(CPU):
            seen.append("inside")

    thread = threading.Thread(target=other)
    with reference_kernels(CPU):
        thread.start()
        entered.wait()
        thread.join(0.1)
        assert not seen
    thread.join()
    assert seen == ["inside"]


def test_a_config_that_refuses_a_value_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Config:
        def __init__(self) -> None:
            vars(self)["use_cache"] = True

        def __setattr__(self, name: str, value: object) -> None:
            raise TypeError("this configuration is final")

    class Model(nn.ReLU):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()

    with caplog.at_level("INFO", "permgraph.capture.environment"):
        pg.auto_spec(Model(), (torch.zeros(2),))
    assert "Config keeps its use_cache: TypeError: this configuration is final" in caplog.text
