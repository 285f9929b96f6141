// update.cu - the kernels of update.cuh and their launches, for the storage type NK_TYPE; without it, for all of them.
#include "update.cuh"

namespace nk::cuda {
namespace {

template <class T> using Launch = void (*)(uint32_t, cudaStream_t, const Table&, const Hyper&);

template <class Rule, Measure kMeasure, class T>
void launch_update(uint32_t blocks, cudaStream_t stream, const Table& table, const Hyper& hyper) {
  if constexpr (has_op<Rule, kMeasure>)
    NK_LAUNCH((update<Rule, kMeasure, T>), dim3(blocks), dim3(kThreads), 0, stream, table, hyper);
}
template <Measure kMeasure, class T, class... All>
void launch_any(List<All...>, RuleId rule, uint32_t blocks, cudaStream_t stream, const Table& table,
                const Hyper& hyper) {
  static constexpr Launch<T> all[] = {launch_update<All, kMeasure, T>...};
  all[(int)rule](blocks, stream, table, hyper);
}

}  // namespace

template <class T>
void Updates<T>::dense(RuleId rule, Measure measure, uint32_t blocks, cudaStream_t stream, const Table& table,
                       const Hyper& hyper) {
  if (measure == Measure::nothing) launch_any<Measure::nothing, T>(Rules{}, rule, blocks, stream, table, hyper);
  if (measure == Measure::step) launch_any<Measure::step, T>(Rules{}, rule, blocks, stream, table, hyper);
  if (measure == Measure::pair) launch_any<Measure::pair, T>(Rules{}, rule, blocks, stream, table, hyper);
}

template <class T>
void Updates<T>::strided(Measure measure, uint32_t blocks, cudaStream_t stream, const StridedTensor& t,
                         const Hyper& hyper) {
  const dim3 grid(blocks), block(kThreads);
  if (measure == Measure::nothing) NK_LAUNCH((update_strided<Measure::nothing, T>), grid, block, 0, stream, t, hyper);
  if (measure == Measure::step) NK_LAUNCH((update_strided<Measure::step, T>), grid, block, 0, stream, t, hyper);
  if (measure == Measure::pair) NK_LAUNCH((update_strided<Measure::pair, T>), grid, block, 0, stream, t, hyper);
}

namespace {

// The types of this object file.
#ifdef NK_TYPE
using Types = List<NK_TYPE>;
#else
using Types = StorageTypes;
#endif
template <class List> struct Functions;
template <class... All> struct Functions<List<All...>> {
  decltype(&Updates<float>::dense) dense[sizeof...(All)] = {Updates<All>::dense...};
  decltype(&Updates<float>::strided) strided[sizeof...(All)] = {Updates<All>::strided...};
};
[[maybe_unused, gnu::used]] const Functions<Types> functions;  // instantiates them

}  // namespace

}  // namespace nk::cuda
