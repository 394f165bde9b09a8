// SPDX-License-Identifier: BSD-3-Clause
//
// Stacks that take turns on one host thread.
#pragma once

#include <cstddef>
#include <vector>

namespace fastbn::cudasim {

struct Stack {
  const void* low = nullptr;
  size_t bytes = 0;
};

// A place where execution can go on. One without a stack of its own stands for the context that
// first switches away from it.
struct Fiber {
  void* context = nullptr;
  Stack stack;
  void* fake_stack = nullptr;  // the address sanitizer's
};

// Makes a fiber begin at `entry`, which must call fiber_entered() first and never return.
void start_fiber(Fiber& fiber, Stack stack, void (*entry)());
void fiber_entered(Fiber& fiber);

// Leaves `from` until someone switches back to it, or for good.
void switch_fiber(Fiber& from, Fiber& to);
void switch_fiber_for_good(Fiber& from, Fiber& to);

// Stacks are handed out again last in, first out: threads that never wait share one warm stack.
class StackPool {
 public:
  Stack take();
  void give(Stack stack) { free_.push_back(stack); }

 private:
  void grow();

  std::vector<Stack> free_;
  size_t made_ = 0;
};

}  // namespace fastbn::cudasim
