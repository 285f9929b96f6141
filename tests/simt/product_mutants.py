"""The kernels that own dW, broken on purpose: see mutants.py. Name, file, what is there, what takes its place, what is
said of it, and whether there is always time for it."""

UNWRITTEN = "read of unwritten memory: read of "

EDITS = [
    (
        "steps are read before they are there", "tile.cuh",
        "  __syncthreads();\n  int now = 0;", "  int now = 0;",
        UNWRITTEN,
        True,
    ),
    (
        "steps are overwritten while they are read", "tile.cuh",
        "operands.put(at.rows[now ^ 1], at.cols[now ^ 1]);", "operands.put(at.rows[now], at.cols[now]);",
        "race with another",
    ),
    (
        "no barrier between stretches of steps", "tile.cuh",
        "    __syncthreads();\n    if ((int)threadIdx.x < n - before) {", "    if ((int)threadIdx.x < n - before) {",
        "race with another",
    ),
    (
        "squares of every lane", "tile.cuh",
        "if (lane == 0) at.squares[now]", "at.squares[now]",
        "write-write race with another lane of the warp",
    ),
    (
        "squares of one stretch alone", "tile.cuh",
        "at.squares[now][n - 1 - before][warp]", "at.squares[0][n - 1 - before][warp]",
        "",
    ),
    (
        "the last step of a sample lost", "tile.cuh",
        "at.cols[now], k, upto);", "at.cols[now], k, left == upto - k ? upto - 1 : upto);",
        "differs from the CPU's",
    ),
    (
        "shares of the first samples alone", "tile.cuh",
        "if (n % kWarp == 0) {", "if (n == 0) {",
        "centred differs from the CPU's",
    ),
    (
        "the last sample of a part lost", "tile.cuh",
        "(p.first_sample(t.part + 1) - t.first_sample);", "(p.first_sample(t.part + 1) - t.first_sample - (t.part > 0));",
        UNWRITTEN,
    ),
    (
        "squares of two tiles in one place", "tile.cuh",
        "* p.tiles + task.tile] = square;", "* p.tiles + task.tile / 2] = square;",
        "race with another block",
        True,
    ),
    (
        "parts in one place", "tile.cuh",
        "((task.part * p.groups + task.group) * p.rows", "((task.part / 2 * p.groups + task.group) * p.rows",
        "race with another block",
    ),
    (
        "a row past the output", "tile.cuh",
        "row_of(i) < rows_left_", "row_of(i) <= rows_left_",
        "",
    ),
    (
        "results out of alignment", "tile.cuh",
        "is_aligned(out) && cols % N == 0;", "is_aligned(out);",
        "misaligned access: write of 16 bytes",
    ),
    (
        "no packs of operands", "outer.cuh",
        "is_packed_ = is_aligned(", "is_packed_ = kWidth < 0 && is_aligned(",
        "bytes in packs of 16",
    ),
    (
        "packs of operands out of alignment", "outer.cuh",
        "&& m.sample % N == 0 && m.step % N == 0;", "&& m.sample % N == 0;",
        "misaligned access: read of 16 bytes",
    ),
    (
        "one column of a tile too many", "outer.cuh",
        "if (e < left) values[e]", "if (e <= left) values[e]",
        "access past the end",
    ),
    (
        "a pack past the row", "outer.cuh",
        "is_packed_ && j * kApart + N <= left_", "is_packed_ && j * kApart < left_",
        "access past the end",
    ),
    (
        "a tail that nobody writes", "outer.cuh",
        "      R x[N];\n      held_[j].unpack(x);", "      if (j * kApart >= left_) continue;\n      R x[N];\n      held_[j].unpack(x);",
        UNWRITTEN + "16 bytes",
    ),
    (
        "steps of the next sample", "outer.cuh",
        "if (wraps) t_ -= outer_.product.steps;", "if (wraps) t_ = 0;",
        "",
    ),
    (
        "columns that nobody writes", "conv.cuh",
        "    for (int j = 0; j < kCols; j++) put(", "    for (int j = 0; j + 1 < kCols; j++) put(",
        UNWRITTEN + "16 bytes at cols",
    ),
    (
        "taps are read before they are there", "conv.cuh",
        "task.col + threadIdx.x);\n  __syncthreads();", "task.col + threadIdx.x);",
        UNWRITTEN,
    ),
    (
        "a border that is not looked for", "conv.cuh",
        "for (int d = 0; d < 3; d++) inside =", "for (int d = 0; d < 2; d++) inside =",
        "",
    ),
    (
        "a row of positions too far", "conv.cuh",
        "at_[d] += p_.next[d] + carry;", "at_[d] += p_.next[d];",
        "differs from the CPU's",
    ),
    (
        "g read twice", "conv.cuh",
        "rows_[j] = g[row * p_.g_channel];", "rows_[j] = g[row * p_.g_channel], (void)*(const volatile uint16_t*)(g + row * p_.g_channel);",
        "bytes read",
    ),
    (
        "the last part forgotten in a join", "product.cu",
        "for (int part = 1; part < (int)p.parts; part++)", "for (int part = 1; part < (int)p.parts - 1; part++)",
        "is not near the CPU's",
    ),
    (
        "parts are joined before their shares are there", "product.cu",
        "  __syncthreads();\n  const int64_t size", "  const int64_t size",
        UNWRITTEN + "8 bytes at b",
    ),
    (
        "a coordinate past the parts", "product.cu",
        "if (i >= size) return;", "if (i > size) return;",
        "",
    ),
    (
        "the last tile's squares forgotten", "product.cu",
        "tile < p.tiles; tile += kThreads", "tile + 1 < p.tiles; tile += kThreads",
        "sq_norms is not near the CPU's",
    ),
]  # fmt: skip
