// The leaves for AVX2, FMA and F16C (x86-64-v3).
#include "cpu/leaves.h"

#if defined(BNFUSED_X86_DISPATCH)
#include <immintrin.h>

#define BNFUSED_AVX2 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace bnfused::cpu::avx2 {
#include "cpu/leaves_impl.h"
}  // namespace bnfused::cpu::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
