// run_samples.cu - the launches of ops over samples, on the caller's stream. Includes no standard library.
#include "current.h"
#include "kernels.h"
#include "samples.cuh"

namespace nk::cuda {
namespace {

// ---- Sums of what blocks left behind --------------------------------------------------------------------------------

constexpr int64_t kLines = 1024;  // that one block adds up

// Line after line of `width` numbers, added up: a block takes a warp's width of them and kLines lines. What the last of
// a line's blocks leave has one line; its numbers from `split` on go elsewhere.
struct Lines {
  double* from;
  int64_t count, width;
  double* to;
  int64_t split;
  double* rest;
};

__global__ void __launch_bounds__(kThreads) add_lines(const Lines __grid_constant__ lines) {
  NK_SHARED(double, shared, [kWarps][kWarp]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t stretches = pieces(lines.width, kWarp), part = blockIdx.x / stretches;
  const int64_t at = (blockIdx.x - part * stretches) * kWarp + lane, begin = part * kLines;
  const int64_t end = begin + kLines < lines.count ? begin + kLines : lines.count;
  double sum = 0;
  if (at < lines.width)
    for (int64_t i = begin + warp; i < end; i += kWarps) sum += lines.from[i * lines.width + at];
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || at >= lines.width) return;
  sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; w++) sum += shared[w][lane];
  if (at < lines.split)
    lines.to[part * lines.split + at] = sum;
  else
    lines.rest[at - lines.split] = sum;
}

// Of every sample: the squares that the rows of the table left at its positions. A block each.
__global__ void __launch_bounds__(kThreads)
    add_positions(const EmbeddingBatch __grid_constant__ e, const double* squares, int64_t stretches) {
  NK_SHARED(double, shared, [1][kWarps]);
  const int64_t first = blockIdx.x * e.positions;
  double sum[1] = {};
  for (int64_t t = threadIdx.x; t < e.positions; t += kThreads) {
    const int64_t id = e.ids[first + t];
    if (id < 0 || id >= e.table_rows) sum[0] = __builtin_nan("");
    if (id < 0 || id >= e.table_rows || id == e.padding) continue;
    for (int64_t s = 0; s < stretches; s++) sum[0] += squares[s * e.samples * e.positions + first + t];
  }
  block_sum(sum, shared);
  if (threadIdx.x == 0) e.row_sq[blockIdx.x] = sum[0];
}

// ---- What the launches share ----------------------------------------------------------------------------------------

int64_t tile_of_packs(DType dtype) { return kWarp * 16 / item_size(dtype); }
constexpr int64_t kTileOfSingles = Singles<float>::kTile;

// Whether packs of all rows begin at a multiple of 16 bytes.
bool fits_packs(const void* p, DType dtype, int64_t stride, int64_t another = 0) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * item_size(dtype) % 16 == 0 &&
         another * item_size(dtype) % 16 == 0;
}

// Columns that go in packs, of whole tiles (one, two or four of singles), and how many tiles those and the others take.
struct Cut {
  int64_t packed, packs, singles;
};
Cut cut(int64_t columns, DType dtype, bool fits) {
  const int64_t tile = tile_of_packs(dtype), packs = fits ? columns / tile : 0, packed = packs * tile;
  return {packed, packs, pieces(columns - packed, kTileOfSingles)};
}

void* moved(void* p, int64_t bytes) { return p ? static_cast<char*>(p) + bytes : nullptr; }
const void* moved(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }

Cut cut(const Samples& s, const Moments& m) {
  const bool fits = s.ndim == 0 && fits_packs(s.x, m.dtype, m.rows > 1 ? s.row_stride : 0);
  return cut(s.columns, m.dtype, fits);
}

Walk walk_of(const Samples& s) {
  Walk walk;
  walk.ndim = s.ndim;
  for (int d = 0; d < s.ndim; d++) walk.shape[d] = s.shape[d], walk.strides[d] = s.strides[d];
  return walk;
}

int64_t tiles_of(const Moments& m) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < m.count; i++) {
    const Cut c = cut(m.samples[i], m);
    tiles += c.packs + c.singles;
  }
  return tiles;
}

const char* launch_lines(const Lines& lines, cudaStream_t stream) {
  const int64_t blocks = pieces(lines.count, kLines) * pieces(lines.width, kWarp);
  const int64_t least = pieces(lines.width, kWarp);  // of no lines the sum is zero
  if (blocks > kMostBlocks) return kTooLarge;
  NK_LAUNCH(add_lines, dim3((uint32_t)(blocks < least ? least : blocks)), dim3(kThreads), 0, stream, lines);
  return launched();
}

// Any number of lines. Behind them is room for what the blocks leave.
const char* add_up(Lines lines, cudaStream_t stream) {
  double* next = lines.from + lines.count * lines.width;
  while (lines.count > kLines) {
    const int64_t left = pieces(lines.count, kLines);
    if (const char* error = launch_lines({lines.from, lines.count, lines.width, next, lines.width, nullptr}, stream))
      return error;
    lines.from = next, lines.count = left;
    next += left * lines.width;
  }
  return launch_lines(lines, stream);
}

}  // namespace

int64_t moments_scratch(const Moments& m) {
  int64_t lines = 0;
  for (int64_t count = tiles_of(m);; count = pieces(count, kLines)) {
    lines += count;
    if (count <= kLines) return lines * (m.rows + 2);
  }
}

const char* moments(const Moments& m, const Queue& queue) {
  const Current current(queue.device);
  if (current.error()) return current.error();
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  MatrixTable table;
  table.count = 0, table.rows = m.rows, table.factor = m.factor, table.first_block[0] = 0;
  int64_t tiles = 0;  // launched so far
  const auto launch = [&](Reads reads, const Walk& walk) -> const char* {
    if (table.count == 0) return nullptr;
    const uint32_t blocks = table.first_block[table.count];
    table.lines = m.scratch + tiles * (m.rows + 2);
    dispatch(m.dtype,
             [&](auto type) { SampleKernels<decltype(type)>::moments(reads, m.squares, blocks, stream, table, walk); });
    tiles += blocks, table.count = 0;
    return launched();
  };
  Walk side_by_side;
  side_by_side.ndim = 0;
  constexpr Reads both[] = {Reads::packs, Reads::singles};
  for (const Reads reads : both) {
    for (int64_t i = 0; i < m.count; i++) {
      const Samples& s = m.samples[i];
      const Cut c = cut(s, m);
      const int64_t blocks = reads == Reads::packs ? c.packs : c.singles;
      if (blocks == 0) continue;
      if (blocks > kMostBlocks) return kTooLarge;
      if (s.ndim > 0 || table.count == kTensors || table.first_block[table.count] + blocks > kMostBlocks)
        if (const char* error = launch(reads, side_by_side)) return error;
      const int64_t first = reads == Reads::packs ? 0 : c.packed, at = first * real_size(m.dtype);
      table.matrices[table.count] = {moved(s.x, first * item_size(m.dtype)), s.row_stride, s.columns - first,
                                     moved(s.mean, at), moved(s.centred, at)};
      const uint32_t before = table.first_block[table.count++];
      table.first_block[table.count] = before + (uint32_t)blocks;
      if (s.ndim > 0)
        if (const char* error = launch(reads, walk_of(s))) return error;
    }
    if (const char* error = launch(reads, side_by_side)) return error;
  }
  if (const char* error = add_up({m.scratch, tiles, m.rows + 2, m.row_sq, m.rows, m.totals}, stream)) return error;
  return tiles == 0 && !m.squares ? fill_nan(m.totals + 1, 1, nullptr, queue) : nullptr;
}

int64_t row_sums_scratch(const RowSums& r) {
  int64_t lines = 0;
  for (int64_t count = parts(r); count > 1; count = pieces(count, kLines)) lines += count;
  return lines * r.rows;
}

const char* row_sums(const RowSums& r, const Queue& queue) {
  const Current current(queue.device);
  if (current.error()) return current.error();
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  const int64_t lines = parts(r), blocks = has_short_rows(r) ? pieces(r.rows, kWarps) : r.rows * lines;
  if (blocks == 0) return nullptr;
  if (blocks > kMostBlocks) return kTooLarge;
  dispatch(r.dtype, [&](auto type) {
    SampleKernels<decltype(type)>::row_sums((uint32_t)blocks, stream, r, lines > 1 ? r.scratch : r.out);
  });
  const char* error = launched();
  return error || lines == 1 ? error : add_up({r.scratch, lines, r.rows, r.out, r.rows, nullptr}, stream);
}

const char* norm_sums(const NormBatch& n, const Queue& queue) {
  const Current current(queue.device);
  if (current.error()) return current.error();
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  const int64_t rows = n.samples * n.rows;
  const auto launch = [&](int64_t blocks, auto kernel) -> const char* {
    if (blocks == 0) return nullptr;
    if (blocks > kMostBlocks) return kTooLarge;
    dispatch(n.dtype, kernel);
    return launched();
  };
  if (n.along_rows) {
    const int64_t blocks = has_short_rows(n) ? pieces(rows, kWarps) : rows;
    return launch(blocks, [&](auto type) { SampleKernels<decltype(type)>::norm_rows((uint32_t)blocks, stream, n); });
  }
  const Cut c = cut(n.columns, n.dtype,
                    fits_packs(n.g.x, n.dtype, n.g.sample_stride, n.g.row_stride) &&
                        fits_packs(n.x.x, n.dtype, n.x.sample_stride, n.x.row_stride));
  const int64_t blocks[] = {n.samples * c.packs, n.samples * c.singles};
  if (const char* error = launch(blocks[0], [&](auto type) {
        SampleKernels<decltype(type)>::norm_columns(Reads::packs, (uint32_t)blocks[0], stream, n, 0, c.packs);
      }))
    return error;
  return launch(blocks[1], [&](auto type) {
    SampleKernels<decltype(type)>::norm_columns(Reads::singles, (uint32_t)blocks[1], stream, n,
                                                c.packed / kTileOfSingles, c.singles);
  });
}

static Cut cut(const EmbeddingBatch& e) {
  return cut(e.columns, e.dtype, fits_packs(e.g, e.dtype, e.sample_stride, e.position_stride));
}

int64_t embedding_scratch(const EmbeddingBatch& e) {
  const Cut c = cut(e);
  return (c.packs + c.singles) * e.samples * e.positions;
}

const char* embedding_moments(const EmbeddingBatch& e, const Queue& queue) {
  const Current current(queue.device);
  if (current.error()) return current.error();
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  const Cut c = cut(e);
  const auto launch = [&](Reads reads, const Stretches& stretches) -> const char* {
    const int64_t blocks = pieces(e.table_rows * stretches.count, kWarps);
    if (blocks == 0) return nullptr;
    if (blocks > kMostBlocks) return kTooLarge;
    dispatch(e.dtype, [&](auto type) {
      SampleKernels<decltype(type)>::embedding(reads, e.squares, (uint32_t)blocks, stream, e, stretches);
    });
    return launched();
  };
  double* others = e.scratch + c.packs * e.samples * e.positions;
  if (const char* error = launch(Reads::packs, {0, c.packs, e.scratch})) return error;
  if (const char* error = launch(Reads::singles, {c.packed / kTileOfSingles, c.singles, others})) return error;
  if (e.samples == 0) return nullptr;
  if (e.samples > kMostBlocks) return kTooLarge;
  NK_LAUNCH(add_positions, dim3((uint32_t)e.samples), dim3(kThreads), 0, stream, e, e.scratch, c.packs + c.singles);
  return launched();
}

}  // namespace nk::cuda
