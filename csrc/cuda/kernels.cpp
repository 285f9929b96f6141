// kernels.cpp - hands the binding the functions of this back end.
#include "kernels.h"

namespace nk {
namespace {

constexpr cuda::Kernels kernels{
    cuda::run,
    cuda::sq_norms,
    cuda::clip_coef,
    cuda::count_steps,
    cuda::add_parts,
    cuda::fill_nan,
    cuda::outer_scratch,
    cuda::outer_moments,
    cuda::conv_scratch,
    cuda::conv_moments,
    cuda::moments_scratch,
    cuda::moments,
    cuda::row_sums_scratch,
    cuda::row_sums,
    cuda::norm_sums,
    cuda::embedding_scratch,
    cuda::embedding_moments,
    cuda::architectures,
};
[[maybe_unused]] const bool is_set = (cuda_kernels = &kernels, true);

}  // namespace
}  // namespace nk
