// SPDX-License-Identifier: BSD-3-Clause
//
// Vectors of float and double as wide as the instruction set this is compiled for, and the loads
// and stores that convert from and to every activation type.
//
// Compiler vectors rather than intrinsics: the same source serves SSE2, AVX2, AVX-512 and NEON, and
// vectors of one lane. Included by targets/*.cpp, which set FASTBN_CAPABILITY, the target, and
// FASTBN_VECTOR_BYTES: the width of a vector, or 0 for a single lane.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <type_traits>

#include "convert.h"
#include "loops.h"

namespace fastbn::cpu::FASTBN_CAPABILITY {

template <typename acc_t>
constexpr int kLanes =
    FASTBN_VECTOR_BYTES == 0 ? 1 : FASTBN_VECTOR_BYTES / static_cast<int>(sizeof(acc_t));

template <typename T, int kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
template <typename T>
using Vector = typename VectorOf<T, kLanes<T>>::type;

template <typename acc_t>
constexpr int kVectorBytes = sizeof(Vector<acc_t>);

// The lanes' bits: integers of the width of acc_t.
template <typename acc_t>
struct BitsOf {
  using type = int32_t;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
};

template <typename V, typename T>
inline V load_bits(const T* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename T, typename V>
inline void store_bits(T* to, V vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

// Stores past the cache; `to` is aligned to the vector.
template <typename T, typename V>
inline void stream_bits(T* to, V vector) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast<__m512i>(vector));
  } else if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(vector));
  } else if constexpr (sizeof(V) == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), bit_cast<__m128i>(vector));
  } else {
    store_bits(to, vector);
  }
#else
  store_bits(to, vector);
#endif
}

inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

using Half = VectorOf<uint16_t, kLanes<float>>::type;
using Word = Vector<uint32_t>;

// Widens 16-bit words to 32 bits. Written out where the compiler's own conversion takes several
// shuffles.
inline Word widen(Half half) {
#if defined(__x86_64__) && FASTBN_VECTOR_BYTES == 64
  return bit_cast<Word>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(half)));
#elif defined(__x86_64__) && FASTBN_VECTOR_BYTES == 32
  return bit_cast<Word>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(half)));
#else
  return __builtin_convertvector(half, Word);
#endif
}

// Narrows 32-bit words below 2^16 to 16 bits.
inline Half narrow(Word word) {
#if defined(__x86_64__) && FASTBN_VECTOR_BYTES == 64
  return bit_cast<Half>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(word)));
#elif defined(__x86_64__) && FASTBN_VECTOR_BYTES == 32
  const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(word), bit_cast<__m256i>(word));
  return bit_cast<Half>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(word, Half);
#endif
}

inline Vector<float> to_float(Half half, BFloat16) {
  return bfloat16_to_float<Vector<float>>(widen(half));
}

inline Half from_float(Vector<float> value, BFloat16) {
  return narrow(float_to_bfloat16<Word>(value));
}

inline Vector<float> to_float(Half half, Float16) {
#if defined(__x86_64__) && FASTBN_VECTOR_BYTES == 64
  return bit_cast<Vector<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(half)));
#elif defined(__x86_64__) && FASTBN_VECTOR_BYTES == 32
  return bit_cast<Vector<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(half)));
#elif defined(__aarch64__) && FASTBN_VECTOR_BYTES == 16
  return bit_cast<Vector<float>>(vcvt_f32_f16(bit_cast<float16x4_t>(half)));
#else
  return float16_to_float<Vector<float>>(widen(half));
#endif
}

inline Half from_float(Vector<float> value, Float16) {
#if defined(__x86_64__) && FASTBN_VECTOR_BYTES == 64
  return bit_cast<Half>(_mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__x86_64__) && FASTBN_VECTOR_BYTES == 32
  return bit_cast<Half>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__) && FASTBN_VECTOR_BYTES == 16
  return bit_cast<Half>(vcvt_f16_f32(bit_cast<float32x4_t>(value)));
#else
  return narrow(float_to_float16<Word>(value));
#endif
}

template <typename scalar_t>
constexpr bool kIsHalf = sizeof(scalar_t) == 2;

// A vector of acc from adjacent elements at any address.
template <typename scalar_t>
inline Vector<acc_type<scalar_t>> load(const scalar_t* from) {
  if constexpr (kIsHalf<scalar_t>) {
    return to_float(load_bits<Half>(from), scalar_t{});
  } else {
    return load_bits<Vector<scalar_t>>(from);
  }
}

template <bool kStream, typename scalar_t>
inline void store(scalar_t* to, Vector<acc_type<scalar_t>> value) {
  if constexpr (kIsHalf<scalar_t>) {
    const Half half = from_float(value, scalar_t{});
    kStream ? stream_bits(to, half) : store_bits(to, half);
  } else {
    kStream ? stream_bits(to, value) : store_bits(to, value);
  }
}

template <typename acc_t>
inline Vector<acc_t> splat(acc_t value) {
  return value - Vector<acc_t>{};
}

// One element in every lane, and the first lane back into one element: the same conversions.
template <typename scalar_t>
inline Vector<acc_type<scalar_t>> load_one(const scalar_t* from) {
  if constexpr (kIsHalf<scalar_t>) {
    return to_float(from->bits - Half{}, scalar_t{});
  } else {
    return splat(*from);
  }
}

template <typename scalar_t>
inline void store_one(scalar_t* to, Vector<acc_type<scalar_t>> value) {
  if constexpr (kIsHalf<scalar_t>) {
    to->bits = from_float(value, scalar_t{})[0];
  } else {
    *to = value[0];
  }
}

// The last `count` lanes of `value`, and `fill` in the others.
template <typename acc_t>
inline Vector<acc_t> keep_last(int64_t count, Vector<acc_t> value, Vector<acc_t> fill) {
  using Bits = Vector<typename BitsOf<acc_t>::type>;
  Bits lane;
  for (int i = 0; i < kLanes<acc_t>; ++i) lane[i] = i;
  return lane >= static_cast<typename BitsOf<acc_t>::type>(kLanes<acc_t> - count) ? value : fill;
}

// What a comparison of vectors says of each lane: all bits set, or none.
template <typename acc_t>
using LaneMask = Vector<typename BitsOf<acc_t>::type>;

// The lanes as bits, the first the lowest.
template <typename acc_t>
inline uint32_t bits_of(LaneMask<acc_t> lanes) {
#if defined(__x86_64__) && FASTBN_VECTOR_BYTES == 64
  if constexpr (sizeof(acc_t) == 4) return _mm512_movepi32_mask(bit_cast<__m512i>(lanes));
#elif defined(__x86_64__) && FASTBN_VECTOR_BYTES == 32
  if constexpr (sizeof(acc_t) == 4) return _mm256_movemask_ps(bit_cast<__m256>(lanes));
#elif defined(__x86_64__) && FASTBN_VECTOR_BYTES == 16
  if constexpr (sizeof(acc_t) == 4) return _mm_movemask_ps(bit_cast<__m128>(lanes));
#endif
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<acc_t>; ++i) bits |= (lanes[i] & 1u) << i;
  return bits;
}

// The lanes of bits that are `step` apart, from `first` on.
template <typename acc_t>
inline LaneMask<acc_t> lanes_of(uint32_t bits, int step = 1, int first = 0) {
#if defined(__x86_64__) && FASTBN_VECTOR_BYTES == 64
  if constexpr (sizeof(acc_t) == 4) {
    if (step == 1) return bit_cast<LaneMask<acc_t>>(_mm512_movm_epi32(bits >> first));
  }
#endif
  using Unsigned = std::make_unsigned_t<typename BitsOf<acc_t>::type>;
  Vector<Unsigned> own;
  for (int i = 0; i < kLanes<acc_t>; ++i) own[i] = Unsigned{1} << (step * i + first);
  return ((bits - Vector<Unsigned>{}) & own) != 0;
}

// Elements that a byte of a mask is for.
template <typename scalar_t>
constexpr int kMasked = kMaskedBytes / static_cast<int>(sizeof(scalar_t));

// Adjacent bits of elements to bytes of a mask, up to four, and back.
template <typename scalar_t>
inline uint32_t to_mask(uint32_t bits) {
  if constexpr (kMasked<scalar_t> == 4) {
    bits = (bits | bits << 8) & 0x00ff00ffu;
    bits = (bits | bits << 4) & 0x0f0f0f0fu;
  } else if constexpr (kMasked<scalar_t> == 2) {
    bits = (bits | bits << 12) & 0x000f000fu;
    bits = (bits | bits << 6) & 0x03030303u;
  }
  return bits;
}
template <typename scalar_t>
inline uint32_t from_mask(uint32_t bytes) {
  if constexpr (kMasked<scalar_t> == 4) {
    bytes = (bytes | bytes >> 4) & 0x00ff00ffu;
    bytes = (bytes | bytes >> 8) & 0x0000ffffu;
  } else if constexpr (kMasked<scalar_t> == 2) {
    bytes = (bytes | bytes >> 6) & 0x000f000fu;
    bytes = (bytes | bytes >> 12) & 0x000000ffu;
  }
  return bytes;
}

// The bits of the vector of elements from the i-th on, below others: these begin with a byte, or a
// vector is less than that.
template <typename scalar_t>
inline uint32_t load_mask(const uint8_t* mask, int64_t i) {
  constexpr int kEach = kMasked<scalar_t>, kWidth = kLanes<acc_type<scalar_t>>;
  if constexpr (kWidth <= kEach) return mask[i / kEach] >> i % kEach;
  uint32_t bytes = 0;
  __builtin_memcpy(&bytes, mask + i / kEach, kWidth / kEach);
  return from_mask<scalar_t>(bytes);
}

// Stores those of the `kCount` elements from the i-th on, which lie likewise.
template <typename scalar_t, int kCount = kLanes<acc_type<scalar_t>>>
inline void store_mask(uint8_t* mask, int64_t i, uint32_t bits) {
  constexpr int kEach = kMasked<scalar_t>;
  if constexpr (kCount >= kEach) {
    const uint32_t bytes = to_mask<scalar_t>(bits);
    __builtin_memcpy(mask + i / kEach, &bytes, kCount / kEach);
  } else {
    constexpr uint32_t kAll = (1u << kEach) - 1;
    const int place = i % kEach;
    const uint32_t own = ((1u << kCount) - 1) << place;
    mask[i / kEach] = (mask[i / kEach] & kAll & ~own) | (bits << place & own);
  }
}

// Sum of the lanes, in order.
template <typename acc_t>
inline double total(Vector<acc_t> value) {
  double sum = 0;
  for (int i = 0; i < kLanes<acc_t>; ++i) sum += value[i];
  return sum;
}

// Two vectors computed with as one.
template <typename acc_t>
struct Pair {
  using V = Vector<acc_t>;
  V first, second;

  friend Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
  friend Pair operator-(Pair a, Pair b) { return {a.first - b.first, a.second - b.second}; }
  friend Pair operator*(Pair a, Pair b) { return {a.first * b.first, a.second * b.second}; }
  friend Pair operator+(Pair a, V b) { return {a.first + b, a.second + b}; }
  friend Pair operator-(Pair a, V b) { return {a.first - b, a.second - b}; }
  friend Pair operator*(Pair a, V b) { return {a.first * b, a.second * b}; }
};

// What a comparison of pairs says.
template <typename acc_t>
struct PairMask {
  LaneMask<acc_t> first, second;
};

// The lanes of a pair either follow one another in memory, or are in whatever order takes the
// fewest instructions: elements that all meet the same coefficients, or end in the same sum, do not
// care.
enum class LaneOrder { kMemory, kAny };

template <LaneOrder kOrder, typename scalar_t>
inline Pair<acc_type<scalar_t>> load_pair(const scalar_t* from) {
  if constexpr (kOrder == LaneOrder::kAny && std::is_same_v<scalar_t, BFloat16>) {
    // Every word holds an element in each half.
    const Word words = load_bits<Word>(from);
    return {bit_cast<Vector<float>>(words << 16), bit_cast<Vector<float>>(words & 0xffff0000u)};
  } else {
    return {load(from), load(from + kLanes<acc_type<scalar_t>>)};
  }
}

// The bits of a pair of vectors of elements from the i-th on, as load_pair() has these.
template <LaneOrder kOrder, typename scalar_t>
inline PairMask<acc_type<scalar_t>> load_pair_mask(const uint8_t* mask, int64_t i) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kWidth = kLanes<acc_t>;
  if constexpr (kOrder == LaneOrder::kAny && std::is_same_v<scalar_t, BFloat16>) {
    constexpr uint32_t kAll = (uint64_t{1} << kWidth) - 1;
    const uint32_t bits =
        (load_mask<scalar_t>(mask, i) & kAll) | load_mask<scalar_t>(mask, i + kWidth) << kWidth;
    return {lanes_of<acc_t>(bits, 2, 0), lanes_of<acc_t>(bits, 2, 1)};
  } else {
    return {lanes_of<acc_t>(load_mask<scalar_t>(mask, i)),
            lanes_of<acc_t>(load_mask<scalar_t>(mask, i + kWidth))};
  }
}

template <LaneOrder kOrder, bool kStream, typename scalar_t>
inline void store_pair(scalar_t* to, Pair<acc_type<scalar_t>> pair) {
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    const Word first = float_to_bfloat16<Word>(pair.first);
    if constexpr (kOrder == LaneOrder::kAny) {
      const Word second = round_to_bfloat16<Word>(pair.second) & 0xffff0000u;
      kStream ? stream_bits(to, first | second) : store_bits(to, first | second);
      return;
    }
#if defined(__x86_64__) && FASTBN_VECTOR_BYTES == 32
    const Word second = float_to_bfloat16<Word>(pair.second);
    const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(first), bit_cast<__m256i>(second));
    const __m256i ordered = _mm256_permute4x64_epi64(packed, 0xd8);
    kStream ? stream_bits(to, ordered) : store_bits(to, ordered);
    return;
#endif
  }
  store<kStream>(to, pair.first);
  store<kStream>(to + kLanes<acc_type<scalar_t>>, pair.second);
}

}  // namespace fastbn::cpu::FASTBN_CAPABILITY
