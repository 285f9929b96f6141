// strided.h - coordinates that lie anywhere, to and from a block that is dense and stays in L1. Included by loops.cpp.
//
// Not a template of the rule, and not inlined: these loops are the same for all rules, and most of a step on strided
// memory is spent waiting for it.
#pragma once
#include "../core/backend.h"

namespace nk::cpu::NK_ISA {
namespace {

constexpr int kStridedBlock = 512;

// A coordinate, counted in row-major order of the shape.
struct Position {
  const Strided& t;
  int64_t index[64];  // torch's own limit on dimensions

  Position(const Strided& strided, int64_t i) : t(strided) {
    for (int d = t.ndim - 1; d >= 0; i /= t.shape[d--]) index[d] = i % t.shape[d];
  }
};

// Calls row(offset, k, n) for each run of n coordinates along the last dimension, the k-th of `count` first; `offset`
// is that of its first coordinate, in elements.
template <class Row> NK_HD void each_row(const Position& from, const int64_t* strides, int64_t count, const Row& row) {
  const Strided& t = from.t;
  const int last = t.ndim - 1;
  if (last < 0) return row(0, 0, count);  // one number
  int64_t index[64], offset = 0;
  for (int d = 0; d <= last; d++) index[d] = from.index[d], offset += index[d] * strides[d];
  for (int64_t k = 0;;) {
    const int64_t to_end = t.shape[last] - index[last], n = to_end < count - k ? to_end : count - k;
    row(offset, k, n);
    k += n;
    if (k == count) return;
    offset -= index[last] * strides[last];
    index[last] = 0;
    for (int d = last - 1; d >= 0; d--) {
      if (++index[d] < t.shape[d]) {
        offset += strides[d];
        break;
      }
      offset -= (t.shape[d] - 1) * strides[d];
      index[d] = 0;
    }
  }
}

template <class Item>
void gather(const Position& from, const int64_t* strides, int64_t n, const Item* memory, Item* block) {
  const int64_t step = from.t.ndim ? strides[from.t.ndim - 1] : 0;
  each_row(from, strides, n, [&](int64_t offset, int64_t k, int64_t size) {
    for (int64_t i = 0; i < size; i++) block[k + i] = memory[offset + i * step];
  });
}
template <class Item>
void scatter(const Position& to, const int64_t* strides, int64_t n, Item* memory, const Item* block) {
  const int64_t step = to.t.ndim ? strides[to.t.ndim - 1] : 0;
  each_row(to, strides, n, [&](int64_t offset, int64_t k, int64_t size) {
    for (int64_t i = 0; i < size; i++) memory[offset + i * step] = block[k + i];
  });
}

// Of coordinates of so many bytes.
[[gnu::noinline]] void gather(int item, const Position& from, const int64_t* strides, int64_t n, const void* memory,
                              void* block) {
  if (item == 8) return gather(from, strides, n, (const uint64_t*)memory, (uint64_t*)block);
  if (item == 4) return gather(from, strides, n, (const uint32_t*)memory, (uint32_t*)block);
  gather(from, strides, n, (const uint16_t*)memory, (uint16_t*)block);
}
[[gnu::noinline]] void scatter(int item, const Position& to, const int64_t* strides, int64_t n, void* memory,
                               const void* block) {
  if (item == 8) return scatter(to, strides, n, (uint64_t*)memory, (const uint64_t*)block);
  if (item == 4) return scatter(to, strides, n, (uint32_t*)memory, (const uint32_t*)block);
  scatter(to, strides, n, (uint16_t*)memory, (const uint16_t*)block);
}

// A block of each of a chunk's streams.
struct StridedBlock {
  alignas(64) char room[3 + kMostBuffers][kStridedBlock * sizeof(double)];
  alignas(64) float master[kStridedBlock];

  void* w() { return room[0]; }
  void* g() { return room[1]; }
  void* h() { return room[2]; }
  void* v(int k) { return room[3 + k]; }
};

[[gnu::noinline]] void gather(const Chunk& c, const Traits& traits, const Position& at, int64_t n,
                              StridedBlock& block) {
  const Strided& t = *c.strided;
  const int item = item_size(c.dtype);
  gather(item, at, t.w, n, c.w, block.w());
  gather(item, at, t.g, n, c.g, block.g());
  if (c.h) gather(item, at, t.h, n, c.h, block.h());
  if (c.master) gather(sizeof(float), at, t.master, n, c.master, block.master);
  if (traits.reads_buffers)
    for (int k = 0; k < traits.buffers; k++) gather(item_size(c.v_dtype[k]), at, t.v[k], n, c.v[k], block.v(k));
}
[[gnu::noinline]] void scatter(const Chunk& c, const Traits& traits, const Position& at, int64_t n,
                               StridedBlock& block) {
  const Strided& t = *c.strided;
  if (traits.writes_w) scatter(item_size(c.dtype), at, t.w, n, c.w, block.w());
  if (c.master) scatter(sizeof(float), at, t.master, n, c.master, block.master);
  if (traits.writes_buffers)
    for (int k = 0; k < traits.buffers; k++) scatter(item_size(c.v_dtype[k]), at, t.v[k], n, c.v[k], block.v(k));
}

}  // namespace
}  // namespace nk::cpu::NK_ISA
