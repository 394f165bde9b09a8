// SPDX-License-Identifier: BSD-3-Clause
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// swapcontext() calls the kernel at every switch to save the signal mask, which no simulated thread
// changes. So the switch is written out where the machine is known: it saves what a called function
// must preserve on the stack that it leaves, and takes it from the one that it enters.
#if defined(__x86_64__)

extern "C" void fastbn_cudasim_switch(void** left, void* entered);

asm(R"(
.text
.hidden fastbn_cudasim_switch
.globl fastbn_cudasim_switch
.type fastbn_cudasim_switch, @function
fastbn_cudasim_switch:
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
  ret
.size fastbn_cudasim_switch, .-fastbn_cudasim_switch
)");

namespace {

void* make_context(unsigned char* top, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  auto* frame = reinterpret_cast<uintptr_t*>(top);
  *--frame = 0;  // where `entry` would return to: 8 below a multiple of 16, as after a call
  *--frame = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--frame = 0;
  return frame;
}

}  // namespace

#elif defined(__aarch64__)

extern "C" void fastbn_cudasim_switch(void** left, void* entered);

asm(R"(
.text
.hidden fastbn_cudasim_switch
.globl fastbn_cudasim_switch
.type fastbn_cudasim_switch, @function
fastbn_cudasim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fastbn_cudasim_switch, .-fastbn_cudasim_switch
)");

namespace {

void* make_context(unsigned char* top, void (*entry)()) {
  constexpr int kFrameWords = 20;
  constexpr int kLinkRegister = 11;
  auto* frame = reinterpret_cast<uintptr_t*>(top) - kFrameWords;
  std::memset(frame, 0, kFrameWords * sizeof(uintptr_t));
  frame[kLinkRegister] = reinterpret_cast<uintptr_t>(entry);
  return frame;
}

}  // namespace

#else

#include <ucontext.h>

namespace {

// A context left lies in the frame of the call that left it, a new one at the top of its stack.
void fastbn_cudasim_switch(void** left, void* entered) {
  ucontext_t here;
  *left = &here;
  swapcontext(&here, static_cast<ucontext_t*>(entered));
}

void* make_context(unsigned char* top, void (*entry)()) {
  constexpr size_t kStackBytes = 32 * 1024;
  auto* context = new (top - (sizeof(ucontext_t) + 63) / 64 * 64) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = reinterpret_cast<unsigned char*>(context) - kStackBytes;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

}  // namespace

#endif

namespace fastbn::cudasim {
namespace {

constexpr size_t kPage = 4096;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackPages = 65;
#else
constexpr size_t kStackPages = 17;
#endif
constexpr size_t kStacksPerGrowth = 256;

// A guard page splits the mapping, and the system allows some 65000 of them: grids that live whole
// may need more stacks than that, so only the first ones have one.
constexpr size_t kGuardedStacks = 8192;

// The stacks of a block would begin at the same place in their page and fight over a few cache
// lines. The odd number of pages spreads them over the large caches, this over the small one.
constexpr size_t kColours = 8;
constexpr size_t kColourBytes = kPage / kColours;

#ifdef __SANITIZE_ADDRESS__
Fiber* left_fiber;
#endif

}  // namespace

void start_fiber(Fiber& fiber, Stack stack, void (*entry)()) {
  fiber.stack = stack;
  fiber.fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
  // Frames that were abandoned have left their red zones.
  __asan_unpoison_memory_region(stack.low, stack.bytes);
#endif
  auto* top = static_cast<unsigned char*>(const_cast<void*>(stack.low)) + stack.bytes;
  fiber.context = make_context(top, entry);
}

void fiber_entered([[maybe_unused]] Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &left_fiber->stack.low,
                                  &left_fiber->stack.bytes);
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  left_fiber = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack.low, to.stack.bytes);
#endif
  fastbn_cudasim_switch(&from.context, to.context);
  fiber_entered(from);
}

void switch_fiber_for_good(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  left_fiber = &from;
  __sanitizer_start_switch_fiber(nullptr, to.stack.low, to.stack.bytes);
#endif
  fastbn_cudasim_switch(&from.context, to.context);
}

Stack StackPool::take() {
  if (free_.empty()) grow();
  const Stack stack = free_.back();
  free_.pop_back();
  return stack;
}

void StackPool::grow() {
  constexpr size_t kStride = kStackPages * kPage;
  // The system gives memory only to pages that are touched: commonly one of a stack.
  void* memory = mmap(nullptr, kStacksPerGrowth * kStride, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  for (size_t i = 0; i < kStacksPerGrowth; ++i, ++made_) {
    unsigned char* low = static_cast<unsigned char*>(memory) + i * kStride;
    if (made_ < kGuardedStacks) mprotect(low, kPage, PROT_NONE);  // does no harm where it fails
    free_.push_back({low + kPage, kStride - kPage - made_ % kColours * kColourBytes});
  }
}

}  // namespace fastbn::cudasim
