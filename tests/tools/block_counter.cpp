// Counts the basic blocks of the extension that any call has reached so far, for tests/tools/fuzz.py. g++ calls the
// function below at every basic block under -fsanitize-coverage=trace-pc.
#include <cstddef>
#include <cstdint>

// The beginning of the loaded extension, from the linker.
extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));

namespace {
constexpr size_t kCodeBytes = size_t{1} << 26;  // more than the extension has; untouched pages take no memory
bool reached[kCodeBytes];                       // index: the distance of a block from the beginning
size_t count;
}  // namespace

extern "C" {

// Uses builtins. A function of the standard library would be counted, and so would call this function.
__attribute__((no_sanitize_coverage)) void __sanitizer_cov_trace_pc() {
  const auto at = reinterpret_cast<uintptr_t>(__builtin_return_address(0)) - reinterpret_cast<uintptr_t>(__ehdr_start);
  if (at >= kCodeBytes || __atomic_load_n(&reached[at], __ATOMIC_RELAXED)) return;
  if (!__atomic_exchange_n(&reached[at], true, __ATOMIC_RELAXED)) __atomic_fetch_add(&count, 1, __ATOMIC_RELAXED);
}

__attribute__((visibility("default"), no_sanitize_coverage)) size_t bnfused_blocks_reached() { return count; }
}
