// SPDX-License-Identifier: BSD-3-Clause
//
// The simulator's own test: small kernels written on gpu.h alone, right ones and ones with a fault
// that must be noticed. A program, which prints a line for each check and returns 1 if one failed:
//   g++ -std=c++17 -O1 -rdynamic -I tests/cudasim tests/cudasim/*/*.cpp -ldl -o selftest
#pragma once

#include <cudasim/cudasim.h>
#include <cudasim/gpu.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace fastbn::selftest {

void check(const std::string& what, bool passed);

// Passes if the text contains all parts, and prints it otherwise.
void check_text(const std::string& what, const std::string& text,
                std::initializer_list<const char*> parts);

// What goes wrong in `run`, which returns what launch() does: its message, or that of the error it
// throws; empty if nothing does.
template <typename Run>
std::string fault_of(const Run& run) {
  try {
    const char* message = run();
    return message == nullptr ? "" : message;
  } catch (const cudasim::Error& error) {
    return error.what();
  }
}

// Registers a vector for kernels.
template <typename T>
void show(const std::vector<T>& values, const char* name,
          cudasim::Kind kind = cudasim::Kind::kActivation) {
  cudasim::register_buffer(values.data(), static_cast<int64_t>(values.size() * sizeof(T)), name,
                           kind, /*writable=*/false);
}
template <typename T>
void lend(std::vector<T>& values, const char* name,
          cudasim::Kind kind = cudasim::Kind::kActivation) {
  cudasim::register_buffer(values.data(), static_cast<int64_t>(values.size() * sizeof(T)), name,
                           kind, /*writable=*/true);
}

// 0, 1, 2, ...: sums of them are exact in any order.
std::vector<float> count_to(int64_t count);
float sum(const std::vector<float>& values);

constexpr int kSeeds = 12;

// Numbers of seeds under which `run` leaves `expected` in `out`, which is NaN before.
template <typename Run>
int seeds_right(const std::vector<float>& expected, std::vector<float>& out, const Run& run) {
  int right = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    cudasim::seed(static_cast<uint64_t>(seed));
    out.assign(out.size(), NAN);
    right += fault_of(run).empty() && out == expected ? 1 : 0;
  }
  return right;
}

// All that goes wrong in `run` under some seed.
template <typename Run>
std::string faults_of_seeds(const Run& run) {
  std::string faults;
  for (int seed = 0; seed < kSeeds; ++seed) {
    cudasim::seed(static_cast<uint64_t>(seed));
    faults += fault_of(run) + "\n";
  }
  return faults;
}

void test_numbers();
void test_memory();
void test_launches();
void test_barriers();
void test_blocks();
void test_clusters();
void test_grids();
void test_copies();
void test_pipelines();
void test_bulk_stores();
void test_peer_stores();
void test_tensor_maps();

}  // namespace fastbn::selftest
