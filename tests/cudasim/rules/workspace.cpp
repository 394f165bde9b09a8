// SPDX-License-Identifier: BSD-3-Clause
//
// Calls that take memory and launch nothing: a program that returns 1 and says which rule was
// broken.
//   g++ -std=c++17 -pthread -I tests/cudasim tests/cudasim/rules/workspace.cpp
//       tests/cudasim/cudasim/*.cpp -ldl -o rules
#include "../../../csrc/cuda/workspace.h"

#include <cstdio>
#include <set>
#include <thread>

#include "../stream_memory.h"

namespace fastbn::cudasim {
namespace {

void require(bool kept, const char* rule) {
  if (!kept) throw Error(rule);
}

bool is_clear(const cuda::Counters& counters) {
  const cuda::Counters zero = {};
  return std::memcmp(&counters, &zero, sizeof(zero)) == 0;
}

// The counters of a call on a stream, which are there as long as the call.
const cuda::Counters* call(CurrentStream stream, bool needs_counters = true, int64_t bytes = 4096) {
  StreamMemory::current() = stream;
  cuda::Plan plan;
  plan.needs_counters = needs_counters;
  plan.workspace_bytes = bytes;
  plan.coefficients_offset = bytes / 2;
  StreamMemory memory;
  const cuda::Counters* counters = nullptr;
  {
    const cuda::CallWorkspace workspace(memory, plan);
    counters = (*workspace).counters;
    require((counters != nullptr) == needs_counters, "counters are where they are needed");
    require(counters == nullptr || is_clear(*counters), "counters are zero");
    if (bytes > 0) {
      auto* partials = static_cast<char*>((*workspace).partials);
      require((*workspace).coefficients == partials + bytes / 2,
              "coefficients lie behind partials");
      std::memset(partials, 1, static_cast<size_t>(bytes));
    }
    require(counters == nullptr || is_clear(*counters), "results do not lie on counters");
  }
  memory.check_end_of_call();
  return counters;
}

int64_t blocks_of_last_calls() {
  const auto blocks = static_cast<int64_t>(StreamMemory::report().allocations.size());
  StreamMemory::report() = {};
  return blocks;
}

void check_calls() {
  for (const bool capturing : {false, true}) {
    for (const bool needs_counters : {false, true}) {
      for (const int64_t bytes : {0, 4096, 64 << 20}) {
        call({0, capturing}, needs_counters, bytes);
        const bool needs_block = bytes > 0 || (needs_counters && capturing);
        require(blocks_of_last_calls() == (needs_block ? 1 : 0), "a call takes a block at most");
      }
    }
  }
}

// More of them than there are slots, in turns.
void check_streams() {
  constexpr int64_t kStreams = cuda::kCounterSlots + 8;
  const cuda::Counters* counters[kStreams];
  std::set<const cuda::Counters*> different;
  StreamMemory::report() = {};
  for (int64_t id = 0; id < kStreams; ++id) {
    counters[id] = call({id, false});
    if (StreamMemory::report().cleared_bytes == 0) different.insert(counters[id]);
  }
  require(different.size() == cuda::kCounterSlots, "streams share no counters");
  require(StreamMemory::report().cleared_bytes == 8 * sizeof(cuda::Counters),
          "those that have none clear their own");
  StreamMemory::report() = {};
  for (int64_t id = 0; id < int64_t{cuda::kCounterSlots}; ++id) {
    require(call({id, false}) == counters[id], "a stream keeps its counters");
  }
  require(StreamMemory::report().cleared_bytes == 0, "and need not clear them");
}

// The first calls on streams, by several host threads at once.
void check_threads() {
  constexpr int kThreads = 8;
  constexpr int kStreams = cuda::kCounterSlots;
  static cuda::Counters module[kStreams];
  cuda::CounterSlots slots;
  cuda::Counters* given[kThreads][kStreams];
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < kStreams; ++i) {
        const int stream = (i + 4 * thread) % kStreams;
        given[thread][stream] = slots.of(0, stream, [] { return module; });
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const std::set<cuda::Counters*> different(given[0], given[0] + kStreams);
  require(different.size() == kStreams, "threads do not make streams share counters");
  for (const auto& of_thread : given) {
    require(std::equal(given[0], given[0] + kStreams, of_thread),
            "all threads get the counters of a stream");
  }
}

// Each device has the module's counters in another place.
void check_devices() {
  static cuda::Counters modules[2][cuda::kCounterSlots];
  cuda::CounterSlots slots;
  for (const int device : {0, 1}) {
    require(slots.of(device, 7, [&] { return modules[device]; }) == modules[device],
            "counters are those of the device");
  }
}

// A module that cannot be loaded now may be loaded later.
void check_failures() {
  static cuda::Counters module[cuda::kCounterSlots];
  cuda::CounterSlots slots;
  for (int attempt = 0; attempt < 2; ++attempt) {
    try {
      slots.of(0, 3, []() -> cuda::Counters* { throw std::runtime_error("out of memory"); });
      throw Error("a module that does not load is reported");
    } catch (const Error&) {
      throw;
    } catch (const std::runtime_error&) {
    }
  }
  require(slots.of(0, 3, [] { return module; }) == module, "failures are forgotten");
}

}  // namespace
}  // namespace fastbn::cudasim

int main() {
  using namespace fastbn::cudasim;
  try {
    check_calls();
    check_streams();
    check_threads();
    check_devices();
    check_failures();
  } catch (const Error& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return 0;
}
