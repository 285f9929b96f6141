"""Contexts that are opened in one hook and closed in another, or never."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from normkern import GradientNoise

from .left_behind import snapshot


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def measured(model):
    noise = GradientNoise(model)
    x = torch.randn(8, 4)
    with noise:
        model(x).square().mean().backward()
    return noise.result()


def assert_nothing_is_open():
    measured(nn.Linear(4, 3))  # removes the mode of a context that was lost
    assert torch.overrides._len_torch_function_stack() == 0
    nn.BatchNorm1d(4)(torch.randn(8, 4, requires_grad=True))


def test_open_and_close_are_the_with_statement():
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    before = snapshot(model)
    noise = GradientNoise(model)
    noise.open()
    model(x).square().mean().backward()
    noise.close()
    assert snapshot(model) == before
    noise.close()  # once more, without effect
    opened = noise.result()
    model.zero_grad()
    with noise:
        model(x).square().mean().backward()
    assert opened.scalars() == noise.result().scalars()
    with noise:
        noise.close()
    assert_nothing_is_open()


def test_forgotten_context_is_closed_by_the_next_one_after_its_object_is_gone():
    model = net()
    noise = GradientNoise(model)
    noise.open()
    with pytest.raises(RuntimeError, match="normalises with the statistics of the batch"):
        model(torch.randn(8, 4))
    parameter = weakref.ref(model[0].weight)
    del noise, model
    nn.BatchNorm1d(4)(torch.randn(8, 4, requires_grad=True))  # not refused
    measured(nn.Linear(4, 3))
    assert_nothing_is_open()
    gc.collect()
    assert parameter() is None


@pytest.mark.parametrize("first", ["batch norm", "another context"])
def test_forgotten_context_in_a_cycle_is_found(first):
    class Module(nn.Module):  # as a LightningModule and its trainer
        def __init__(self):
            super().__init__()
            self.net = net()
            self.noise, self.itself = GradientNoise(self.net), [self]

    module = Module()
    module.noise.open()
    del module
    if first == "batch norm":
        nn.BatchNorm1d(4)(torch.randn(8, 4, requires_grad=True))
    assert_nothing_is_open()


def test_forgotten_context_does_not_hold_the_model_and_leaves_no_hooks():
    model = nn.Linear(4, 3)
    before = snapshot(model)
    noise = GradientNoise(model)
    noise.open()
    model(torch.randn(8, 4)).sum()
    del noise
    assert snapshot(model) == before
    model(torch.randn(8, 4)).sum().backward()
    assert_nothing_is_open()


def test_forward_in_a_lost_context_is_refused_in_the_backward():
    model = nn.Linear(4, 3)
    noise = GradientNoise(model)
    noise.open()
    value = model(torch.randn(8, 4)).sum()
    del noise
    with pytest.raises(
        RuntimeError, match=r"^GradientNoise: the backward of a forward inside the context runs outside"
    ):
        value.backward()
    assert_nothing_is_open()


def test_open_context_is_named_in_the_error_of_another_one():
    a, b = GradientNoise(net()), GradientNoise(nn.Linear(4, 3))
    a.open()
    with pytest.raises(
        RuntimeError, match=r"inside another one, of model Sequential; expected one at a time.*close\(\)"
    ):
        b.open()
    with pytest.raises(RuntimeError, match=r"^GradientNoise: this context \(model Sequential\) is already open"):
        a.open()
    a.close()
    with b:
        b.model(torch.randn(8, 4)).sum().backward()
    assert_nothing_is_open()


def test_modes_that_were_entered_later_stay_when_a_lost_context_is_removed():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    noise = GradientNoise(nn.Linear(4, 3))
    noise.open()
    with Mode():
        del noise
        measured(nn.Linear(4, 3))
        seen.clear()
        torch.ones(2).add(1)
        assert seen
    assert_nothing_is_open()


def test_context_closed_in_another_thread():
    model = nn.Linear(4, 3)
    noise = GradientNoise(model)
    noise.open()
    model(torch.randn(8, 4)).sum().backward()
    thread = threading.Thread(target=noise.close)
    thread.start()
    thread.join()
    assert noise.result().batch_size == 8
    nn.BatchNorm1d(4)(torch.randn(8, 4, requires_grad=True))
    measured(nn.Linear(4, 3))
    assert_nothing_is_open()


def test_context_of_one_thread_is_not_opened_in_another():
    noise = GradientNoise(nn.Linear(4, 3))
    noise.open()
    errors = []

    def again():
        try:
            noise.open()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=again)
    thread.start()
    thread.join()
    assert "is already open" in errors[0]
    noise.close()
    assert_nothing_is_open()


def test_swap_tensors_works_after_a_context():
    """Weak references on gradients would forbid it."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for _ in range(5):
            model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
            noise = GradientNoise(model, ("nsr", "norms"))
            with noise:
                model(torch.randn(8, 4)).square().mean().backward()
            result = noise.result()
            for p in model.parameters():
                assert not weakref.getweakrefs(p)
                assert not weakref.getweakrefs(p.grad)
            model.double()
            with pytest.raises(RuntimeError, match="has been changed or freed"):
                result.mean  # noqa: B018
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
