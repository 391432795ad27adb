// The leaves for AVX-512 F, BW, DQ and VL (x86-64-v4).
#include "cpu/leaves.h"

#if defined(BNFUSED_X86_DISPATCH)
#include <immintrin.h>

#define BNFUSED_AVX512 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
// gcc's own intrinsics start from a variable that is initialised with itself.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
namespace bnfused::cpu::avx512 {
#include "cpu/leaves_impl.h"
}  // namespace bnfused::cpu::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
