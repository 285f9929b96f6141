"""The shipped kernels, broken on purpose, one at a time.

python -m simt.mutants NAME      prints what the emulator, or a comparison, has to say of that one (from tests/)
"""

import shutil
import sys
from dataclasses import dataclass

from support import fresh

from . import build
from .product_mutants import EDITS

#: Kernels of float and launchers of a family, and the files that are its own.
FAMILIES = {
    "samples": (
        ("samples.cu", "run_samples.cu"),
        ("columns", "moments", "norm_sums", "row_sums", "embedding", "samples", "run_samples"),
    ),
    "products": (("outer.cu", "conv.cu", "product.cu"), ("tile", "outer", "conv", "product")),
    "clipping": (("sq_norms.cu",), ("sq_norms",)),
    "mixed": (("mixed.cu", "run.cu"), ("mixed",)),
    "updates": (("update.cu", "run.cu"), ()),
}


#: What the judges find, by words of their complaints. Those that are left out are in planted.cu.
KINDS = (
    "read of unwritten memory", "race with another", "access past the end", "misaligned access", "__shfl_xor_sync",
    "bytes read, the formula reads", "differs from the CPU's",
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One edit of one file."""

    name: str
    file: str  # in csrc/cuda/
    old: str
    new: str
    says: str  # part of the complaint
    always: bool = False  # also in `make test`, which has each family and each of KINDS once

    @property
    def family(self) -> str:
        return next((name for name, (_, own) in FAMILIES.items() if self.file.split(".")[0] in own), "updates")

    def sources(self) -> list[build.Unit]:
        """Those of the family's kernels of float and its launchers that the edit changes, in a folder of their own.

        Raises:
            ValueError: the text to replace is not there exactly once.
        """
        shipped = (build.CSRC / "cuda" / self.file).read_text()
        if (count := shipped.count(self.old)) != 1:
            raise ValueError(f"mutant {self.name!r}: expected once in {self.file}, found {count} times: {self.old!r}")
        folder = build.BUILD / "mutants" / self.name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(build.CSRC, folder)
        (folder / "cuda" / self.file).write_text(shipped.replace(self.old, self.new))
        paths = [folder / "cuda" / name for name in FAMILIES[self.family][0]]
        units = build.units([path for path in paths if build.reads(path, self.file)])
        return [unit for unit in units if unit.storage in ("", "float")]

    def verdict(self) -> str:
        """Return the objections of the checks, from a process of its own; empty if it passes them all."""
        done = fresh.python("-m", "simt.mutants", self.name, cwd=build.HERE.parent, path=[build.ROOT], timeout=300)
        if done.returncode not in (0, 1) or (done.returncode and not done.stdout.strip()):
            raise RuntimeError(f"mutant {self.name!r}, exit code {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout.strip()


MUTANTS = [
    Mutant(
        "missing barrier", "block.cuh",
        "  __syncthreads();\n  if (warp != 0) return;", "  if (warp != 0) return;",
        "read of unwritten memory: read of 8 bytes at shared",
    ),
    Mutant(
        "barrier in a branch", "block.cuh",
        "  __syncthreads();\n  if (warp != 0) return;",
        "  if (warp == 0)\n    __syncthreads();\n  else\n    __syncthreads();\n  if (warp != 0) return;",
        "divergent __syncthreads",
    ),
    Mutant(
        "early return", "update.cuh",
        "    if (is_short) return;", "    if (is_short || (int)threadIdx.x >= left) return;",
        "return",
    ),
    Mutant(
        "partial shuffle", "block.cuh",
        "const double got = __shfl_xor_sync(", "double got = 0;\n        if (threadIdx.x % kWarp < 16 || kAway < 16) got = __shfl_xor_sync(",
        "__shfl_xor_sync",
        always=True,
    ),
    Mutant(
        "unwritten shared memory", "block.cuh",
        "    for (int k = 0; k < kWarps; k++) mine += from[lane][k];",
        "    for (int k = 0; k <= kWarps; k++) mine += from[lane][k];",
        "access outside every shared array",
    ),
    Mutant(
        "lost update in shared memory", "block.cuh",
        "from[j][warp] = s[0];", "from[j][0] += s[0];",
        "read of unwritten memory",
    ),
    Mutant(
        "misaligned packs", "update.cuh",
        "  const int packed = aligned ? n / N * N : 0;", "  const int packed = n / N * N;\n  (void)aligned;",
        "misaligned access: read of 16 bytes",
    ),
    Mutant(
        "no packs", "update.cuh",
        "  const int packed = aligned ? n / N * N : 0;", "  const int packed = aligned && n < 0;",
        "not all accesses are of 16 bytes",
    ),
    Mutant(
        "one pack too many", "update.cuh",
        "  const int packed = aligned ? n / N * N : 0;", "  const int packed = aligned ? (n + N - 1) / N * N : 0;",
        "access past the end",
    ),
    Mutant(
        "off by one in the tail", "update.cuh",
        "      if (at >= n) continue;\n      x.w[k] = real(t.w[at]);",
        "      if (at > n) continue;\n      x.w[k] = real(t.w[at]);",
        "access past the end",
    ),
    Mutant(
        "blocks overlap", "update.cuh",
        "(int)(left < kBlock ? left : kBlock),\n            is_short", "(int)(left < kBlock + 1 ? left : kBlock + 1),\n            is_short",
        "race with another block",
    ),
    Mutant(
        "parts added by atomics", "update.cuh",
        "  if (threadIdx.x == 0) write_sums(t.sums + block * columns, s, h, is_gauged);",
        "  in_user_units<N>(s, h, is_gauged);\n  if (threadIdx.x == 0)\n"
        "    for (int j = 0; j < N; j++) atomicAdd(t.sums + slot * each * columns + j, s[j]);",
        "read of unwritten memory: atomic of 8 bytes",
    ),
    Mutant(
        "a new buffer is read", "update.cuh",
        "for (int b = 0; b < kBuffers; b++) v[b][j].load(t.v[b] + at);",
        "for (int b = 0; b < kBuffers; b++) v[b][j].load(t.v[b] + at);\n      else if constexpr (kBuffers > 0)\n"
        "        (void)*(const volatile T*)(t.v[0] + at);",
        "read of unwritten memory: read of 4 bytes",
    ),
    Mutant(
        "the gradient read twice", "update.cuh",
        "g[j].load(t.g + at);", "g[j].load(t.g + at);\n      (void)*(const volatile uint32_t*)(t.g + at);",
        "bytes read, the formula reads",
        always=True,
    ),
    Mutant(
        "too few blocks of rows", "update.cuh",
        "(slots + slots_per_block(t) - 1) / slots_per_block(t)", "(slots + slots_per_block(t) - 2) / slots_per_block(t)",
        "differs from the CPU's",
    ),
    Mutant(
        "the wrong tensor", "table.cuh",
        "    if (table.first_block[middle] <= block)", "    if (table.first_block[middle] < block)",
        "access past the end",
    ),
    Mutant(
        "the last part forgotten", "run.cu",
        "part < slots.parts; part += kThreads", "part < slots.parts - 1; part += kThreads",
        "sums are not the CPU's",
    ),
    Mutant(
        "a count that stays", "run.cu",
        "*static_cast<float*>(c.at) += 1;", "*static_cast<float*>(c.at) += 0;",
        "differs from the CPU's",
    ),
    Mutant(
        "both averages in one", "update.cuh",
        "Pack<T>::store(t.v[b] + at, x.v[b]);", "Pack<T>::store(t.v[0] + at, x.v[b]);",
        "differs from the CPU's",
    ),
    Mutant(
        "strides of another stream", "update.cuh",
        "at[stream] += k * t.strides[stream][d]", "at[stream] += k * t.strides[stream == kV ? kW : stream][d]",
        "access ",
    ),
    Mutant(
        "sums are added before they are there", "columns.cuh",
        "    __syncthreads();\n    if (threadIdx.x < Columns::kTile)", "    if (threadIdx.x < Columns::kTile)",
        "read of unwritten memory: read of 4 bytes at sums",
    ),
    Mutant(
        "sums are overwritten before they are added", "columns.cuh",
        "          if (turn + w < all) own[j] = own[j] + shared[j][w][threadIdx.x];\n    __syncthreads();",
        "          if (turn + w < all) own[j] = own[j] + shared[j][w][threadIdx.x];",
        "race with another warp",
    ),
    Mutant(
        "a shift that is not there yet",
        "moments.cuh",
        "share, R(0));\n        }\n        __syncthreads();",
        "share, R(0));\n        }",
        "read of unwritten memory: read of 4 bytes at shifts",
    ),
    Mutant(
        "one column too many", "columns.cuh",
        "offsets_[k] = at < columns ? offset(at) : -1;", "offsets_[k] = at <= columns ? offset(at) : -1;",
        "access past the end",
    ),
    Mutant(
        "packs of rows out of alignment", "run_samples.cu",
        "  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride", "  return p && stride",
        "misaligned access: read of 16 bytes",
        always=True,
    ),
    Mutant(
        "packs of rows of any stride", "run_samples.cu",
        "% 16 == 0 && stride * item_size(dtype) % 16 == 0 &&", "% 16 == 0 && stride >= 0 &&",
        "misaligned access: read of 16 bytes",
    ),
    Mutant(
        "a row lost", "columns.cuh",
        "all = whole + rows % kTogether;", "all = whole + rows % kTogether - (rows % kTogether > 1);",
        "",
    ),
    Mutant(
        "lines of tiles overlap", "moments.cuh",
        "table.lines + blockIdx.x * (rows + 2)", "table.lines + blockIdx.x * (rows + 1)",
        "race with another block",
    ),
    Mutant(
        "one line too many", "run_samples.cu",
        "for (int64_t i = begin + warp; i < end; i += kWarps) sum += lines", "for (int64_t i = begin + warp; i <= end; i += kWarps) sum += lines",
        "access past the end",
    ),
    Mutant(
        "positions without a square", "embedding.cuh",
        "        if (lane == 0) squares[at[j]] = 0;\n", "",
        "read of unwritten memory: read of 8 bytes",
    ),
    Mutant(
        "the last sample forgotten", "embedding.cuh",
        "  if (sample >= 0) add_sample();\n\n", "",
        "",
    ),
    Mutant(
        "a row's position too many", "embedding.cuh",
        "      if (i + j >= end) continue;\n      at[j]", "      if (i + j > end) continue;\n      at[j]",
        "access past the end",
    ),
    Mutant(
        "a row too many", "norm_sums.cuh",
        "if (row >= n.samples * n.rows) return;", "if (row > n.samples * n.rows) return;",
        "access past the end",
    ),
    Mutant(
        "a part of a row that another has", "row_sums.cuh",
        "const int64_t begin = part * kChunk,", "const int64_t begin = part * (kChunk - 16),",
        "",
    ),
    Mutant(
        "parts of a row in one place", "row_sums.cuh",
        "out[part * r.rows + row] = sum[0];", "out[row] = sum[0];",
        "race with another block",
    ),
    Mutant(
        "a row of another sample", "norm_sums.cuh",
        "+ sample * n.x.sample_stride + at * n.x.row_stride;", "+ sample * n.x.sample_stride + sample * n.x.row_stride;",
        "is not the CPU's",
    ),
    Mutant(
        "a row's packs read twice", "norm_sums.cuh",
        "      of_g[j].load(g + at);", "      of_g[j].load(g + at);\n      (void)*(const volatile uint32_t*)(g + at);",
        "",
    ),
    Mutant(
        "a stretch of a gradient too long", "sq_norms.cuh",
        "const int n = (int)(left < kBlock ? left : kBlock);", "const int n = (int)(left < kBlock ? left + 1 : kBlock);",
        "access past the end",
        always=True,
    ),
    Mutant(
        "stretches in one place", "sq_norms.cuh",
        "write_sq_norm<kPair>(t.parts + part, sum,", "write_sq_norm<kPair>(t.parts, sum,",
        "race with another block",
    ),
    Mutant(
        "a square forgotten", "sq_norms.cuh",
        "for (int64_t i = threadIdx.x; i < count; i += kThreads) sum", "for (int64_t i = threadIdx.x; i < count - 1; i += kThreads) sum",
        "Tensor-likes are not close",
    ),
    Mutant(
        "the words of another counter", "mixed.cu",
        "random.words((uint64_t)counter, words);", "random.words((uint64_t)counter + thread % 2, words);",
        "differs from the CPU's",
        always=True,
    ),
    Mutant(
        "a copy that is never looked at", "mixed.cu",
        "rounded(copy, mixed.dtype) == w_old", "true",
        "differs from the CPU's",
    ),
    Mutant(
        "a coordinate past the slot", "mixed.cu",
        "if (i < begin || i >= end) continue;", "if (i < begin) continue;",
        "",
    ),
    *(Mutant(*edit) for edit in EDITS),
]  # fmt: skip


def main(name: str) -> int:
    import torch

    from . import check_product_results as product_judgement
    from . import check_results as judgement
    from . import check_sample_results as sample_judgement
    from .backend import Backend
    from .calls import Call, clipped
    from .mixed_calls import calls as mixed_calls
    from .product_calls import Outer, few_calls
    from .sample_calls import CALLS

    mutant = next(m for m in MUTANTS if m.name == name)
    judge, calls = {
        "samples": (sample_judgement, CALLS),
        "products": (product_judgement, few_calls()),
        "clipping": (judgement, []),
        "mixed": (judgement, list(mixed_calls())),
        "updates": (
            judgement,
            [
                Call("SgdMomentumFirst", "step"),
                Call("SgdMomentum", "step"),
                Call("SgdMomentum", "step", "row"),
                Call("Adam", "step"),
            ],
        ),
    }[mutant.family]
    backend = Backend(checked=True, kernels=mutant.sources())
    try:
        for call in calls:
            judge.same_as_cpu(
                backend, call, torch.bfloat16 if mutant.family == "mixed" else torch.float32, seeds=(1, 2)
            )
            if mutant.family != "mixed":  # one coordinate at a time
                judge.moves_what_it_must(backend, call, torch.float32)
        if mutant.family == "clipping":
            judgement.special_as_cpu(backend, clipped, torch.float32)
        if mutant.family == "products":
            product_judgement.moves_in_packs(backend, Outer((2, 16, 64, 64)), torch.float32)
    except (AssertionError, RuntimeError) as complaint:
        print(complaint)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
