// The leaves of bfloat16 for AVX-512 F, BW, DQ and VL with BF16.
#include "cpu/leaves.h"

#if defined(BNFUSED_X86_DISPATCH)
#include <immintrin.h>

#define BNFUSED_AVX512 1
#define BNFUSED_AVX512_BF16 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
// gcc's own intrinsics start from a variable that is initialised with itself.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
namespace bnfused::cpu::avx512_bf16 {
#include "cpu/leaves_impl.h"
}  // namespace bnfused::cpu::avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
