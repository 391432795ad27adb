// The leaves for whatever the compiler targets by default: SSE2 on x86-64, NEON on arm64.
#include <c10/util/Half.h>

#include "cpu/leaves.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bnfused::cpu::baseline {
#include "cpu/leaves_impl.h"
}  // namespace bnfused::cpu::baseline
