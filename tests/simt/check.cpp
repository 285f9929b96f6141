// check.cpp - every access of a kernel to memory, examined and counted.
//
// With -fsanitize=thread g++ calls __tsan_read4 and its like before each access that is not provably the thread's own.
// Here are these functions, in place of libtsan's, and with CUDA's order of events: see State. Found: races in shared
// and global memory, also between blocks; reads of unwritten memory; accesses outside every array;
// misaligned ones. Counted: bytes, widths, and the 32-byte sectors that each warp touches.
#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "state.h"

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;  // this library, from the linker

namespace simt {
namespace {

// The last access of a kind to a cell. Of several readers in one interval it remembers that they were several.
struct Access {
  uint64_t launch = 0, interval = 0;
  uint32_t block = 0, warp_epoch = 0;
  uint16_t thread = 0;
  bool is_atomic = false, many_threads = false, many_warps = false, many_blocks = false;
};
struct Cell {
  Access write, read;
  uint64_t written_in = 0;  // shared memory: the block_start of its last write
};

// Two bytes a cell: the narrowest number that kernels store.
constexpr size_t kCell = 2, kPage = 4096;
struct Page {
  Cell cells[kPage / kCell];
  bool is_blank[kPage / kCell] = {};  // allowed memory that is not written yet
};
struct Region {
  uintptr_t end;
  std::string name;
};

std::map<uintptr_t, Region> regions;  // by their first byte
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
Cell shared_cells[kSharedRoom], dynamic_cells[kDynamicShared];

uintptr_t last_number = 0;
Page* last_page = nullptr;

Page& page_of(uintptr_t address) {
  const uintptr_t number = address / kPage;
  if (!last_page || number != last_number) {
    std::unique_ptr<Page>& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    last_page = page.get();
    last_number = number;
  }
  return *last_page;
}

// Where there is no page nothing is blank: a page is fifty times as large as the memory it stands for.
void mark_blank(uintptr_t from, uintptr_t to, bool value) {
  for (uintptr_t a = from / kCell * kCell; a < to; a += kCell) {
    if (!value && !pages.count(a / kPage))
      a = (a / kPage + 1) * kPage - kCell;
    else
      page_of(a).is_blank[a % kPage / kCell] = value;
  }
}

// The region around or right before the address.
const std::pair<const uintptr_t, Region>* region_at(uintptr_t address) {
  const auto after = regions.upper_bound(address);
  return after == regions.begin() ? nullptr : &*std::prev(after);
}

// ---- Counting ------------------------------------------------------------------------------------------------------

struct Traffic {
  uint64_t read, written, sectors, accesses, wide;  // wide: 16 bytes at once
} traffic{};

struct Instruction {  // of one warp, the n-th time
  const void* pc;
  uint32_t warp, turn;
  bool operator==(const Instruction& o) const { return pc == o.pc && warp == o.warp && turn == o.turn; }
};
struct Hash {
  size_t operator()(const Instruction& i) const {
    return ((size_t)i.pc * 31 + i.warp) * 0x9E3779B97F4A7C15ull + i.turn * 0x85EBCA6Bull;
  }
};
std::unordered_map<Instruction, std::unordered_set<uintptr_t>, Hash> sectors;
std::unordered_map<Instruction, uint32_t, Hash> turns;
uint64_t counted_block = 0;

void count_sectors() {
  for (const auto& entry : sectors) traffic.sectors += entry.second.size();
  sectors.clear();
  turns.clear();
}

void count(uintptr_t address, size_t size, bool is_write, const void* pc) {
  if (counted_block != state.block_start) {
    count_sectors();
    counted_block = state.block_start;
  }
  (is_write ? traffic.written : traffic.read) += size;
  traffic.accesses++;
  traffic.wide += size == 16;
  const uint32_t turn = turns[{pc, state.thread, 0}]++;
  auto& touched = sectors[{pc, state.thread / 32, turn}];
  for (uintptr_t s = address / 32; s <= (address + size - 1) / 32; s++) touched.insert(s);
}

// ---- Order ---------------------------------------------------------------------------------------------------------

uint32_t epoch() { return state.warp_epoch[state.thread / 32]; }

// With whom an earlier access races with one of the running thread; nullptr: it does not.
const char* race(const Access& earlier, bool is_atomic, bool is_shared) {
  if (earlier.launch != state.launch || (earlier.is_atomic && is_atomic)) return nullptr;
  if (earlier.block != state.block || earlier.many_blocks) return is_shared ? nullptr : "another block";
  if (earlier.interval != state.interval) return nullptr;
  if (earlier.thread == state.thread && !earlier.many_threads) return nullptr;
  if (earlier.many_warps || earlier.thread / 32 != state.thread / 32) return "another warp";
  return earlier.warp_epoch == epoch() ? "another lane of the warp" : nullptr;
}

Access now(bool is_atomic) {
  Access a;
  a.launch = state.launch;
  a.interval = state.interval;
  a.block = state.block;
  a.warp_epoch = epoch();
  a.thread = (uint16_t)state.thread;
  a.is_atomic = is_atomic;
  return a;
}

void note_read(Access& last, bool is_atomic) {
  Access a = now(is_atomic);
  if (last.launch == a.launch) {
    a.many_blocks = last.many_blocks || last.block != a.block;
    if (last.block == a.block && last.interval == a.interval) {
      a.many_threads = last.many_threads || last.thread != a.thread;
      a.many_warps = last.many_warps || last.thread / 32 != a.thread / 32;
    }
    a.is_atomic = a.is_atomic && last.is_atomic;
  }
  last = a;
}

// ---- One access ----------------------------------------------------------------------------------------------------

struct Target {
  Cell* cells = nullptr;  // a page's, or a shared array's
  size_t count = 0;
  bool is_shared = false;
  std::string name;
  uintptr_t base = 0;
  const char* wrong = nullptr;
};

bool within(uintptr_t address, size_t size, const void* base, size_t room) {
  return address - (uintptr_t)base < room && address + size <= (uintptr_t)base + room;
}

Target find_shared(uintptr_t address, size_t size) {
  Target t;
  t.is_shared = true;
  const uintptr_t arena = (uintptr_t)state.shared;
  if (address - arena < kSharedRoom) {
    t.wrong = "access outside every shared array";
    for (const SharedArray* array : state.arrays) {
      const uintptr_t base = arena + array->offset;
      if (address + size <= base || (t.base && base > address)) continue;
      t.name = array->name;
      t.base = base;
      if (within(address, size, (void*)base, array->size)) t.wrong = nullptr;
    }
    t.cells = shared_cells + (address - arena);
  } else {
    t.name = "dynamic shared memory";
    t.base = (uintptr_t)state.dynamic.data();
    if (address + size > t.base + state.dynamic.size()) t.wrong = "access past the end";
    t.cells = dynamic_cells + (address - t.base);
  }
  t.count = size;
  return t;
}

constexpr uintptr_t kNear = 256;  // an access so close to a region is told as one that left it

Target find_global(uintptr_t address, size_t size) {
  Target t;
  const auto* region = region_at(address);
  if (region && address < region->second.end + kNear) {
    t.name = region->second.name;
    t.base = region->first;
    if (address + size > region->second.end) t.wrong = "access past the end";
  } else {
    t.wrong = "access outside every buffer";
    const auto next = regions.lower_bound(address);
    if (next != regions.end() && address + kNear >= next->first) {
      t.wrong = "access before the start";
      t.name = next->second.name;
      t.base = next->first;
    }
  }
  return t;
}

[[noreturn]] void report(const Target& t, const std::string& what, uintptr_t address, size_t size, bool is_write,
                         bool is_atomic) {
  const char* kind = is_atomic ? "atomic" : is_write ? "write" : "read";
  if (t.name.empty()) fail("%s: %s of %zu bytes", what.c_str(), kind, size);
  fail("%s: %s of %zu bytes at %s%+ld", what.c_str(), kind, size, t.name.c_str(), (long)(address - t.base));
}

void examine(uintptr_t address, size_t size, bool is_write, bool is_atomic, bool may_be_unaligned, const void* pc) {
  if (!state.in_kernel || within(address, size, state.stacks, state.stacks_size)) return;
  if (!is_write && (within(address, size, state.arguments, state.arguments_size) ||
                    within(address, size, &__ehdr_start, &_end - &__ehdr_start)))
    return;
  const bool is_shared =
      within(address, 1, state.shared, kSharedRoom) || within(address, 1, state.dynamic.data(), state.dynamic.size());
  Target t = is_shared ? find_shared(address, size) : find_global(address, size);
  if (t.wrong) report(t, t.wrong, address, size, is_write, is_atomic);
  if (!may_be_unaligned && address % size) report(t, "misaligned access", address, size, is_write, is_atomic);
  if (!is_shared) count(address, size, is_write, pc);

  const size_t step = is_shared ? 1 : kCell;
  for (uintptr_t a = address / step * step; a < address + size; a += step) {
    Page* page = is_shared ? nullptr : &page_of(a);
    Cell& cell = is_shared ? t.cells[a - address] : page->cells[a % kPage / kCell];
    const bool is_written = is_shared ? cell.written_in == state.block_start : !page->is_blank[a % kPage / kCell];
    if ((!is_write || is_atomic) && !is_written)
      report(t, "read of unwritten memory", address, size, is_write, is_atomic);
    if (const char* with = race(cell.write, is_atomic, is_shared))
      report(t, std::string(is_write ? "write-write" : "read-after-write") + " race with " + with, address, size,
             is_write, is_atomic);
    if (is_write) {
      if (const char* with = race(cell.read, is_atomic, is_shared))
        report(t, std::string("write-after-read race with ") + with, address, size, is_write, is_atomic);
      cell.write = now(is_atomic);
      cell.written_in = state.block_start;
      if (page) page->is_blank[a % kPage / kCell] = false;
    } else {
      note_read(cell.read, is_atomic);
    }
  }
}

}  // namespace

void atomic_access(const void* p, size_t size, const void* pc) { examine((uintptr_t)p, size, true, true, false, pc); }

void allow(const void* p, size_t size, const char* name) {
  if (!size) return;
  uintptr_t from = (uintptr_t)p, to = from + size;
  const auto* around = region_at(from);
  if (around && around->second.end >= to) return;
  mark_blank(from, to, false);
  auto at = around && around->second.end > from ? regions.find(around->first) : regions.lower_bound(from);
  std::string text = name;
  while (at != regions.end() && at->first < to) {
    from = std::min(from, at->first);
    to = std::max(to, at->second.end);
    text = at->second.name;
    at = regions.erase(at);
  }
  regions[from] = {to, text};
}

void blank(const void* p, size_t size) { mark_blank((uintptr_t)p, (uintptr_t)p + size, true); }

int allowed(uint64_t (*stretches)[2], int room) {
  int n = 0;
  for (const auto& [begin, region] : regions) {
    if (n < room) stretches[n][0] = begin, stretches[n][1] = region.end - begin;
    n++;
  }
  return n;
}

void forget_all() {
  regions.clear();
  pages.clear();
  last_page = nullptr;
  count_sectors();
  traffic = {};
}

}  // namespace simt

extern "C" {

__attribute__((visibility("default"))) void simt_traffic(uint64_t* out) {
  simt::count_sectors();
  const simt::Traffic& t = simt::traffic;
  const uint64_t all[] = {t.read, t.written, t.sectors, t.accesses, t.wide};
  std::copy(std::begin(all), std::end(all), out);
  simt::traffic = {};
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
#define SIMT_ACCESS(name, size, is_write, may_be_unaligned)                                            \
  void name(void* p) {                                                                                 \
    simt::examine((uintptr_t)p, size, is_write, false, may_be_unaligned, __builtin_return_address(0)); \
  }
#define SIMT_ACCESSES(size)                                   \
  SIMT_ACCESS(__tsan_read##size, size, false, false)          \
  SIMT_ACCESS(__tsan_write##size, size, true, false)          \
  SIMT_ACCESS(__tsan_unaligned_read##size, size, false, true) \
  SIMT_ACCESS(__tsan_unaligned_write##size, size, true, true)
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)
void __tsan_read_range(void* p, size_t size) {
  simt::examine((uintptr_t)p, size, false, false, true, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t size) {
  simt::examine((uintptr_t)p, size, true, false, true, __builtin_return_address(0));
}
}
