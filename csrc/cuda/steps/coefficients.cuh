// SPDX-License-Identifier: BSD-3-Clause
//
// What is known of a channel before and after its statistics are finalized: records that lie in
// shared memory, one in the place of another. After, they are Affine and GradAffine of
// core/finalize.h.
#pragma once

#include "../../core/finalize.h"
#include "../primitives/channel_values.cuh"

namespace fastbn::cuda {

// Forward: the value that means are counted from, and the parameters.
template <typename acc_t>
struct ForwardInputs {
  acc_t pivot, weight, bias;
};

// Backward: what forward saved, and invstd * weight. The mean and scale stay where GradAffine has
// them.
template <typename acc_t>
struct GradInputs {
  acc_t mean, scale, invstd;
};

// The number of each lane of a thread, from an array of the channel tile's channels.
template <typename Mapping>
FASTBN_DEVICE void load_lanes(const Mapping& mapping, const typename Mapping::acc_t* array,
                              typename Mapping::acc_t (&lanes)[Mapping::kLanes]) {
  mapping.for_each_lane(
      [&](int lane, int channel) { lanes[lane] = mapping.active() ? array[channel] : 0; });
}

}  // namespace fastbn::cuda
