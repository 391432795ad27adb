// The leaves for AVX2, FMA and F16C (x86-64-v3).
#include "cpu/leaves.h"

#if defined(BNFUSED_X86_DISPATCH)
#include <immintrin.h>

#define BNFUSED_AVX2 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace bnfused::cpu::avx2 {
#include "cpu/leaves_impl.h"
}  // namespace bnfused::cpu::avx2
#pragma GCC pop_options
#endif
