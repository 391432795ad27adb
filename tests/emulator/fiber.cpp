#include "fiber.h"

#include "sanitizers.h"

#ifdef BNFUSED_OWN_SWITCH
// Saves the registers that a call preserves, exchanges the stacks, and restores the registers of the other stack. A
// switch takes 26 to 38 ns; swapcontext takes 260 to 340 ns, because it makes a system call for the signal mask.
extern "C" void bnfused_exchange_stacks(void** save, void* load) __attribute__((visibility("hidden")));
asm(R"(
  .text
  .hidden bnfused_exchange_stacks
  .type bnfused_exchange_stacks, @function
bnfused_exchange_stacks:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size bnfused_exchange_stacks, . - bnfused_exchange_stacks
)");
#endif

namespace bnfused::emulator {

void prepare(Fiber& fiber, void (*entry)()) {
#ifdef BNFUSED_OWN_SWITCH
  constexpr int kSavedRegisters = 6;
  auto* top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes);
  *--top = nullptr;  // in the place of a return address, so that entry finds the stack as after a call: 8 mod 16
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void entered(Fiber& main) {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (main.stack) return;
  main.stack = static_cast<char*>(const_cast<void*>(bottom));  // main entered the first fiber
  main.stack_bytes = bytes;
}

void switch_fiber(Fiber& from, Fiber& to) {
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&from.asan_stack, to.stack, to.stack_bytes);
  tsan_become(to.tsan_fiber);
#ifdef BNFUSED_OWN_SWITCH
  bnfused_exchange_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.asan_stack, nullptr, nullptr);
}

}  // namespace bnfused::emulator
