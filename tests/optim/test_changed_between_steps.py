"""A tensor that was changed between two steps, while its object, its memory or its address stayed the same.

A step reads of a tensor that it has seen before only what tells whether it is still the same; both ways of reading it, by
torch's C shim and by the exchange API, must see every change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import normkern
from normkern.ops import _torch_library, binary
from normkern.ops._torch_library import tensor_offset, torch_shim, torch_symbol

SHAPE = (6, 6)


def connect(shim: dict[str, int], offset: int) -> None:
    api, parallel_for = torch.Tensor.__dlpack_c_exchange_api__, torch_symbol("torch_parallel_for")
    binary.connect(api, parallel_for, torch.Tensor, torch.nn.Parameter, shim, offset)


@pytest.fixture(params=["by torch's shim", "without a shim", "with a shim that lacks a function"])
def reading(request: pytest.FixtureRequest) -> Iterator[str]:
    shim, offset = torch_shim()
    assert shim, "this torch is one whose shim is known"
    if request.param == "without a shim":
        connect({}, 0)
    elif request.param == "with a shim that lacks a function":
        connect({name: at for name, at in shim.items() if name != "is_neg"}, offset)
    yield request.param
    connect(shim, offset)


def of_grad(change: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor, dict[str, Tensor]], None]:
    def apply(p: Tensor, state: dict[str, Tensor]) -> None:
        assert p.grad is not None
        new = change(p.grad)
        if new is not None:
            p.grad = new

    return apply


def of_state(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, dict[str, Tensor]], None]:
    def apply(p: Tensor, state: dict[str, Tensor]) -> None:
        state["momentum_buffer"] = change(state["momentum_buffer"])

    return apply


def set_data(t: Tensor, new: Tensor) -> None:
    t.data = new


@torch.no_grad()
def transpose(t: Tensor) -> None:
    t.t_()


CHANGES: dict[str, Callable[[Tensor, dict[str, Tensor]], None]] = {
    "other memory": lambda p, s: set_data(p, p.detach().clone()),
    "other strides of the same memory": lambda p, s: set_data(p, p.detach().t()),
    "transposed in place": lambda p, s: transpose(p),
    "a part of the same memory": of_grad(lambda g: g.as_strided(SHAPE, (0, 1))),
    "gradient: negative view of the same memory": of_grad(torch._neg_view),
    "gradient: its data is a negative view of the same memory": of_grad(lambda g: set_data(g, torch._neg_view(g))),
    "gradient: other memory": of_grad(lambda g: g.clone()),
    "gradient: transposed in place": of_grad(lambda g: g.t_()),
    "gradient: sparse": of_grad(lambda g: g.to_sparse()),
    "gradient: its data transposed": of_grad(lambda g: set_data(g, g.clone().t())),
    "buffer: other object": of_state(lambda v: v.clone()),
    "buffer: transposed": of_state(lambda v: v.t()),
    "buffer: of double precision and back": of_state(lambda v: v.double().float()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_between_two_steps_is_seen(reading: str, change: str) -> None:
    gradient = torch.randn(SHAPE)
    parts = []
    for make in (normkern.SGD, torch.optim.SGD):
        p = torch.nn.Parameter(torch.arange(36.0).reshape(SHAPE))
        others = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        optimizer = make([others[0], p, others[1]], lr=0.1, momentum=0.9)
        for step in range(4):
            if p.grad is None or step == 2:
                p.grad = gradient.clone()
            for other in others:
                other.grad = torch.ones(3)
            if step == 3:
                optimizer.step()  # the same objects again
                CHANGES[change](p, optimizer.state[p])
            optimizer.step()
        parts.append((p.detach(), optimizer.state[p]["momentum_buffer"]))
    for ours, torchs in zip(*parts, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-6)


def test_parameter_made_double_is_seen(reading: str) -> None:
    """Its buffer is then of another dtype, which no kernel takes: torch's loop refuses it, or steps it rightly."""
    p = torch.nn.Parameter(torch.ones(SHAPE))
    optimizer = normkern.SGD([p], lr=0.1)
    for _ in range(2):
        p.grad = torch.ones(SHAPE)
        optimizer.step()
    p.grad = None
    p.data = p.data.double()
    p.grad = torch.ones(SHAPE, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full(SHAPE, 0.7, dtype=torch.float64), rtol=1e-7, atol=0)


def test_other_object_at_the_address_of_a_gradient(reading: str) -> None:
    """New gradients at each step: the allocator gives their objects the addresses of those before."""
    ours, torchs = (torch.nn.Parameter(torch.ones(SHAPE)) for _ in range(2))
    optimizers = normkern.SGD([ours], lr=0.1), torch.optim.SGD([torchs], lr=0.1)
    for step in range(40):
        for p, optimizer in zip((ours, torchs), optimizers, strict=True):
            p.grad = None
            made = torch.full(SHAPE, 1.0 + step)
            kinds = [made, torch._neg_view(made), made.t(), made[:1].expand(SHAPE), torch.zeros(12, 12)[::2, ::2] + 1]
            p.grad = kinds[step % 5]
            del made, kinds
            optimizer.step()
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=0)


def test_offset_is_where_torch_keeps_the_tensor() -> None:
    assert tensor_offset() is not None


def test_without_the_offset_there_is_no_shim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch_library, "tensor_offset", lambda: None)
    assert torch_shim() == ({}, 0)


def test_without_a_function_there_is_no_shim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch_library, "_IS_NEG", "at_native_is_neg_by_another_name")
    assert torch_shim() == ({}, 0)
