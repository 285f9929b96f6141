"""What rounding may do to the sums over samples, and whether it did no more."""

from contextlib import contextmanager

import torch

from normkern import ops, reference

from .memory import same_bits

WITHOUT_FMA = ("v2", "portable")
WITH_FMA = [name for name in ops.supported_isas() if name not in WITHOUT_FMA]


@contextmanager
def one_thread():
    """For oracles made of many small operations, where waking a pool that others use too takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def real_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def allowed_errors(c, size_of_c, steps, dtype, backend):
    """What rounding may do to total, centred and sq_norms of contributions c (B, ...), sums of terms of size_of_c.

    Every rounding is half a unit of what is rounded; without FMA hardware a multiply-add has two.
    """
    u = torch.finfo(real_of(dtype)).eps / 2 * (2 if backend in WITHOUT_FMA else 1)
    if dtype == torch.float64:
        u *= 2  # the oracle's own
    of_c = (steps + 1) * u * size_of_c
    total_size = c.abs().cumsum(0)
    of_total = of_c.cumsum(0) + u * total_size.cumsum(0)
    sums, centred = c.cumsum(0), torch.zeros_like(c[0])
    of_centred = torch.zeros_like(centred)
    for i in range(1, len(c)):
        n = i + 1
        deviation, share = (n * c[i] - sums[i]).abs(), 1 / (n * (n - 1))
        off = n * of_c[i] + of_total[i] + 2 * u * (deviation + n * c[i].abs())
        centred = centred + share * (deviation + off) ** 2
        of_centred = of_centred + share * (2 * deviation * off + off**2) + 4 * u * centred
    of_norms = (2 * c.abs() * of_c + of_c**2).flatten(1).sum(1) + 60 * u * c.square().flatten(1).sum(1)
    return of_total[-1], of_centred, of_norms


def assert_right(got, c, size_of_c, steps, dtype, backend, what):
    with one_thread():
        exact = reference.contribution_sums(c, squares=True)
        budget = allowed_errors(c, size_of_c, steps, dtype, backend)
    for name, x, y, allowed in zip(("total", "centred", "sq_norms"), got, exact, budget, strict=True):
        if x is None:
            continue
        assert x.shape == y.shape, f"{what} {name}"
        assert x.dtype == (torch.float64 if name == "sq_norms" else real_of(dtype)), f"{what} {name}"
        over = (x.double() - y).abs() - allowed
        assert not over.isnan().any(), f"{what} {name}: NaN"
        assert over.numel() == 0 or over.max() <= 0, f"{what} {name}: over its budget by {over.max():.3e}"


def assert_all_same(results):
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def on_all_levels(compute):
    """What `compute()` returns on each level with FMA hardware."""
    chosen, results = ops.isa(), []
    try:
        for name in WITH_FMA:
            ops.select_isa(name)
            results.append(compute())
    finally:
        ops.select_isa(chosen)
    return results


def on_thread_counts(compute):
    """What `compute()` returns on one thread, on two and on more than there are."""
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(compute())
    return results
