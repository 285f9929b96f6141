// aliasing.cpp - see aliasing.h.
#include "aliasing.h"

#include <algorithm>
#include <stdexcept>

namespace nk {
namespace {

// The tensors of one parameter; state buffer k is kState + k.
enum Operand : int { kW, kG, kH, kMaster, kState };

struct Extent {
  uintptr_t begin, end;  // bytes
  int tensor, operand;
};

const View& operand(const Operands& t, int which) {
  return which == kW ? t.w : which == kG ? t.g : which == kH ? t.h : which == kMaster ? *t.master : t.v[which - kState];
}
bool is_read_only(int which) { return which == kG || which == kH; }

std::string name(const Operands& t, int which) {
  const Op& op = *t.op;
  const char* list = which == kW        ? op.w
                     : which == kG      ? op.g
                     : which == kH      ? op.held
                     : which == kMaster ? op.masters
                                        : op.buffers[which - kState];
  return std::string(list) + "[" + std::to_string(t.index) + "]" +
         (t.group < 0 ? "" : " of param_groups[" + std::to_string(t.group) + "]");
}

uintptr_t begin_of(const View& v) { return reinterpret_cast<uintptr_t>(v.data); }
uintptr_t end_of(const View& v) {
  int64_t last = 0;
  for (int d = 0; d < v.ndim; d++) last += (v.shape[d] - 1) * v.strides[d];
  return begin_of(v) + (last + 1) * v.item();
}

std::vector<uintptr_t> sorted_addresses(const View& v) {
  std::vector<uintptr_t> all;
  all.reserve(v.numel);
  for (int64_t i = 0; i < v.numel; i++) {
    int64_t rest = i, offset = 0;
    for (int d = v.ndim - 1; d >= 0; rest /= v.shape[d--]) offset += rest % v.shape[d] * v.strides[d];
    all.push_back(begin_of(v) + offset * v.item());
  }
  std::sort(all.begin(), all.end());
  return all;
}

// Their extents overlap; do coordinates? (Interleaved slices of one tensor do not.)
bool share_coordinates(const View& a, const View& b) {
  if (a.dense && b.dense) return true;
  const auto of_a = sorted_addresses(a), of_b = sorted_addresses(b);
  for (size_t i = 0, j = 0; i < of_a.size() && j < of_b.size();) {
    if (of_a[i] + a.item() <= of_b[j])
      i++;
    else if (of_b[j] + b.item() <= of_a[i])
      j++;
    else
      return true;
  }
  return false;
}

bool same_memory(const View& a, const View& b) {
  return a.dense && b.dense && begin_of(a) == begin_of(b) && end_of(a) == end_of(b);
}

[[noreturn]] void refuse(const Operands& a, int of_a, const Operands& b, int of_b) {
  const bool same = same_memory(operand(a, of_a), operand(b, of_b));
  throw py::value_error(where(*a.op, a.group) + ": " + name(b, of_b) +
                        (same ? " is the same memory as " : " partially overlaps ") + name(a, of_a) +
                        "; expected separate memory" + (same ? "" : ", or exactly the same"));
}

// The second gradient has been written over the first.
[[noreturn]] void refuse_pair(const Operands& t) { throw std::runtime_error(shared_pair(*t.op, t.group, t.index)); }

}  // namespace

std::string where(const Op& op, int group) {
  return group < 0 ? op.name : std::string(op.optimizer) + ".step: param_groups[" + std::to_string(group) + "]";
}

std::string shared_pair(const Op& op, int group, int index) {
  return where(op, group) + ": the held gradient of " + op.w + "[" + std::to_string(index) +
         "] and its new one share memory, so the new one was written over it (as DDP's gradient_as_bucket_view=True "
         "does); expected separate memory: hold(copy=True)";
}

void check_no_self_overlap(const View& v, const Op& op, const char* list, int index, int group) {
  if (v.dense) return;
  // Dimensions taken from the smallest stride up: if each steps over all that lies below it, nothing can be hit twice.
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int d = 0; d < v.ndim; d++)
    if (v.shape[d] != 1) dims.emplace_back(v.strides[d], v.shape[d]);
  std::sort(dims.begin(), dims.end());
  int64_t span = 1;
  bool nested = true;
  for (const auto& [stride, size] : dims) {
    nested = nested && stride >= span;
    span += (size - 1) * stride;
  }
  if (nested) return;
  bool expanded = !dims.empty() && dims[0].first == 0;
  if (!expanded) {
    const auto all = sorted_addresses(v);
    if (std::adjacent_find(all.begin(), all.end()) == all.end()) return;
  }
  throw py::value_error(
      where(op, group) + ": " + list + "[" + std::to_string(index) + "] of shape " + shape_text(v) +
      (expanded ? " is expanded: " : " overlaps itself: ") +
      "expected a tensor whose coordinates have their own memory, got several that share it (clone it first)");
}

std::vector<int> rounds(std::vector<Operands>& tensors) {
  std::vector<Extent> extents;
  for (size_t i = 0; i < tensors.size(); i++) {
    const Operands& t = tensors[i];
    if (t.w.numel == 0) continue;
    const auto add = [&](int which) {
      const View& v = operand(t, which);
      extents.push_back({begin_of(v), end_of(v), (int)i, which});
    };
    add(kW), add(kG);
    for (int k = 0; k < t.buffers; k++) add(kState + k);
    if (t.has_h) add(kH);
    if (t.master) add(kMaster);
  }
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });

  std::vector<std::pair<int, int>> order;  // (earlier, later): list positions
  std::vector<uintptr_t> reach(extents.size() + 1, 0);
  for (size_t k = 0; k < extents.size(); k++) {
    reach[k + 1] = std::max(reach[k], extents[k].end);
    for (size_t j = k; j > 0 && reach[j] > extents[k].begin; j--) {
      const Extent &x = extents[j - 1], &y = extents[k];
      const bool both_read = is_read_only(x.operand) && is_read_only(y.operand);
      if (x.end <= y.begin || (both_read && x.tensor != y.tensor)) continue;
      const Extent &a = x.tensor <= y.tensor ? x : y, &b = x.tensor <= y.tensor ? y : x;
      const View &of_a = operand(tensors[a.tensor], a.operand), &of_b = operand(tensors[b.tensor], b.operand);
      if (!share_coordinates(of_a, of_b)) continue;
      const bool same = same_memory(of_a, of_b);
      if (both_read) refuse_pair(tensors[a.tensor]);
      if (a.tensor == b.tensor) {
        // The gradient may be the very tensor that is stepped; anything else within one parameter has no meaning.
        const auto is_kept = [](const Extent& x) { return x.operand >= kMaster; };
        if (!same || is_kept(a) || is_kept(b)) refuse(tensors[a.tensor], a.operand, tensors[b.tensor], b.operand);
        tensors[a.tensor].copies_first = true;
        continue;
      }
      const bool both_written = !is_read_only(a.operand) && !is_read_only(b.operand);
      if (both_written && (!same || a.operand != b.operand))
        refuse(tensors[a.tensor], a.operand, tensors[b.tensor], b.operand);
      order.emplace_back(a.tensor, b.tensor);
    }
  }
  std::vector<int> round;
  if (order.empty()) return round;
  round.assign(tensors.size(), 0);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  for (const auto& [earlier, later] : order) round[later] = std::max(round[later], round[earlier] + 1);
  return round;
}

}  // namespace nk
