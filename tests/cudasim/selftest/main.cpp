// SPDX-License-Identifier: BSD-3-Clause
#include <cstdio>
#include <numeric>

#include "selftest.h"

namespace fastbn::selftest {
namespace {

int failures = 0;

}  // namespace

void check(const std::string& what, bool passed) {
  std::printf("%s %s\n", passed ? "ok    " : "FAILED", what.c_str());
  failures += passed ? 0 : 1;
}

void check_text(const std::string& what, const std::string& text,
                std::initializer_list<const char*> parts) {
  bool passed = true;
  for (const char* part : parts) passed &= text.find(part) != std::string::npos;
  check(what, passed);
  if (!passed) std::printf("       %s\n", text.empty() ? "(no error)" : text.c_str());
}

std::vector<float> count_to(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  std::iota(values.begin(), values.end(), 0.0f);
  return values;
}

float sum(const std::vector<float>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0f);
}

}  // namespace fastbn::selftest

int main() {
  using namespace fastbn;
  const auto tests = {
      selftest::test_numbers,     selftest::test_memory,      selftest::test_launches,
      selftest::test_barriers,    selftest::test_blocks,      selftest::test_clusters,
      selftest::test_grids,       selftest::test_copies,      selftest::test_pipelines,
      selftest::test_bulk_stores, selftest::test_peer_stores, selftest::test_tensor_maps,
  };
  for (const auto& test : tests) {
    test();
    cudasim::clear_buffers();
    cudasim::device() = {};
    cudasim::take_report();
  }
  return selftest::failures == 0 ? 0 : 1;
}
