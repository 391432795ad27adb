// A fiber is a stack that runs until it switches to another one. Every emulated thread is a fiber.
#pragma once
#include <cstddef>

#if defined(__x86_64__) && defined(__linux__)
#define BNFUSED_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace bnfused::emulator {

struct Fiber {
#ifdef BNFUSED_OWN_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;  // its lowest address; nullptr for the stack of the process
  size_t stack_bytes = 0;
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
};

// The next switch to `fiber` calls `entry`, which first calls entered() and never returns.
void prepare(Fiber& fiber, void (*entry)());
void entered(Fiber& main);

// Saves the running stack in `from` and continues with `to`. It returns when somebody switches back to `from`.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace bnfused::emulator
