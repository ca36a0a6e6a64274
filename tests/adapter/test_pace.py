"""The adapter's pace: how much of the time it leaves to others."""

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tta.adapter.pace import Pace


class Time:
    """A clock that moves when told, or when slept."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def clock(self) -> float:
        """Seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Note it, and be later."""
        self.slept.append(seconds)
        self.now += seconds


def test_pauses_leave_the_rest_of_the_time() -> None:
    """With a share of a quarter a step is followed by a pause three times as long; waiting for work is none."""
    time = Time()
    pace = Pace(0.25, clock=time.clock, sleep=time.sleep)
    time.now += 3600.0
    pace.begin()
    for worked in (2.0, 0.5):
        time.now += worked
        pace.step()

    assert time.slept == pytest.approx([6.0, 1.5])


def test_the_whole_time_is_never_paused() -> None:
    """A share of 1 neither sleeps nor waits for the device."""
    time = Time()
    finished: list[bool] = []
    pace = Pace(1.0, lambda: finished.append(True), time.clock, time.sleep)
    time.now += 5.0
    pace.step()

    assert time.slept == []
    assert finished == []


def test_every_optimiser_step_is_followed_by_a_pause() -> None:
    """Hooked as in the worker, it is called for each step of whatever optimiser, and waits for the device."""
    time = Time()
    finished: list[bool] = []
    pace = Pace(0.5, lambda: finished.append(True), time.clock, time.sleep)
    weight = torch.nn.Parameter(torch.ones(2))
    handle = register_optimizer_step_post_hook(pace.step)
    try:
        for optimiser in (torch.optim.Adam([weight]), torch.optim.SGD([weight], 0.1)):
            weight.grad = torch.ones(2)
            time.now += 1.0
            optimiser.step()
    finally:
        handle.remove()

    assert time.slept == [1.0, 1.0]
    assert len(finished) == 2
