// Tells sanitizers about stacks, memory and order, which they cannot see by themselves. The emulator itself is compiled
// without sanitizers, because they would report the scheduler. Through weak symbols it finds their runtimes, if the
// program has one. The signatures are those of sanitizer/{asan,common,tsan}_interface.h.
#pragma once
#include <cstddef>

extern "C" {
#define BNFUSED_WEAK __attribute__((weak))
void __asan_poison_memory_region(const volatile void*, size_t) BNFUSED_WEAK;
void __asan_unpoison_memory_region(const volatile void*, size_t) BNFUSED_WEAK;
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes) BNFUSED_WEAK;
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_bytes) BNFUSED_WEAK;
void* __tsan_get_current_fiber() BNFUSED_WEAK;
void* __tsan_create_fiber(unsigned flags) BNFUSED_WEAK;
void __tsan_destroy_fiber(void*) BNFUSED_WEAK;
void __tsan_switch_to_fiber(void*, unsigned flags) BNFUSED_WEAK;
void __tsan_acquire(void*) BNFUSED_WEAK;
void __tsan_release(void*) BNFUSED_WEAK;
#undef BNFUSED_WEAK
}

namespace bnfused::emulator {

inline bool under_asan() { return __asan_poison_memory_region != nullptr; }
inline bool under_tsan() { return __tsan_create_fiber != nullptr; }

inline void asan_forbid(const void* p, size_t bytes) {
  if (under_asan()) __asan_poison_memory_region(p, bytes);
}
inline void asan_allow(const void* p, size_t bytes) {
  if (under_asan()) __asan_unpoison_memory_region(p, bytes);
}

// ThreadSanitizer orders what the running thread has done so far before every later acquire of `object`.
inline void tsan_release(void* object) {
  if (under_tsan()) __tsan_release(object);
}
inline void tsan_acquire(void* object) {
  if (under_tsan()) __tsan_acquire(object);
}

// For ThreadSanitizer the code from here on runs in thread `fiber`. The switch itself orders nothing.
inline void tsan_become(void* fiber) {
  constexpr unsigned kNoSync = 1;
  if (under_tsan()) __tsan_switch_to_fiber(fiber, kNoSync);
}

}  // namespace bnfused::emulator
