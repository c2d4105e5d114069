// Fibers: stacks to switch between. On x86-64 a switch saves six registers and the stack pointer;
// elsewhere it uses ucontext.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#ifndef __x86_64__
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dense_ext::emulator {

struct Fiber {
  std::unique_ptr<unsigned char[]> stack;
#ifdef __x86_64__
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif

  // Makes the next switch to this fiber run `main`, which must never return.
  void start(size_t bytes, void (*main)());
};

#ifdef __x86_64__
// Pushes the callee-saved registers, stores the stack pointer in *from and continues with `to`. It
// jumps there: the processor would predict that a return goes back to where the call came from.
extern "C" void dense_ext_switch_stack(void** from, void* to);
asm(R"(
.text
.globl dense_ext_switch_stack
.hidden dense_ext_switch_stack
.type dense_ext_switch_stack, @function
dense_ext_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size dense_ext_switch_stack, .-dense_ext_switch_stack
)");
#endif

inline void Fiber::start(size_t bytes, void (*main)()) {
  if (!stack) stack.reset(new unsigned char[bytes]);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack.get(), bytes);  // clears frames that an error left behind
#endif
#ifdef __x86_64__
  auto top = (reinterpret_cast<uintptr_t>(stack.get()) + bytes) & ~uintptr_t{15};
  auto** slots = reinterpret_cast<void**>(top) - 8;  // six registers, main, and its absent caller
  for (int i = 0; i < 8; i++) slots[i] = nullptr;
  slots[6] = reinterpret_cast<void*>(main);
  pointer = slots;
#else
  getcontext(&context);
  context.uc_stack.ss_sp = stack.get();
  context.uc_stack.ss_size = bytes;
  makecontext(&context, main, 0);
#endif
}

// Leaves `from` until another fiber switches back to it.
inline void switch_fiber(Fiber& from, Fiber& to) {
#ifdef __x86_64__
  dense_ext_switch_stack(&from.pointer, to.pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
}

}  // namespace dense_ext::emulator
