"""A signal that asks for a stop may come at any moment, also while a model is built of fake tensors."""

import os
import signal

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen_moe.training import loop


def test_a_signal_while_fake_tensors_are_made_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.dist, "all_reduce", lambda tensor, op: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        stop = loop.StopRequest(torch.device("cpu"), more=[signal.SIGUSR1])
        assert not stop.agreed()
        with FakeTensorMode():
            os.kill(os.getpid(), signal.SIGUSR1)
            torch.empty(3)
        assert stop.agreed() and stop.agreed()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
