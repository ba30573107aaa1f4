#pragma once

#include <cstdint>
#include <cstring>

#include "headroom/core/attention_problem.hpp"
#include "headroom/core/register_tile.hpp"
#include "headroom/core/stored.hpp"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HEADROOM_PAIRS_BY_TILE_UNIT
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__AVX512BF16__)
#define HEADROOM_PAIRS_BY_LANES
#endif

/// Products of bfloat16 matrices, summed in float, by the instructions that processors have for them: AMX's tile unit,
/// or AVX-512's dot products of pairs. They multiply two neighbours at a time, so one operand is stored in pairs.
namespace headroom::inline v0::core::detail {

/// Two bfloat16 that are next to each other in the direction of the sum; the first in the low half.
using Pair = std::uint32_t;

inline constexpr Index kPairRows = 16;   ///< rows of a and c come in multiples of this
inline constexpr Index kPairDepth = 32;  ///< and terms of a sum in multiples of this

constexpr Index padded(Index count, Index multiple) { return (count + multiple - 1) / multiple * multiple; }

#if defined(HEADROOM_PAIRS_BY_TILE_UNIT)

inline constexpr bool kHasPairProducts = true;

/// Gives the tile unit to the calling thread for as long as it lives. Others who use the unit in this thread may trust
/// that it keeps the shapes of tiles that they configured, as oneDNN does: they are put back.
class PairUnit {
 public:
  /// Whether this process may use the unit: Linux wants to be asked.
  static bool available() {
    static const bool granted = [] {
      constexpr long kRequestPermission = 0x1023, kTileData = 18;
      return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return granted;
  }
  PairUnit() {
    _tile_storeconfig(&before_);
    Shapes whole{.palette = 1};
    for (int tile = 0; tile < 8; ++tile) whole.row_bytes[tile] = 64, whole.rows[tile] = 16;
    _tile_loadconfig(&whole);
  }
  ~PairUnit() { before_.palette == 0 ? _tile_release() : _tile_loadconfig(&before_); }
  PairUnit(const PairUnit&) = delete;
  PairUnit& operator=(const PairUnit&) = delete;

 private:
  struct alignas(64) Shapes {
    std::uint8_t palette = 0, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
  };
  Shapes before_;
};

/// Rows first, first + 16, … of c, as many as Blocks: independent sums hide how long a tile takes.
template <int Vectors, bool Adds, int Blocks>
EIGEN_ALWAYS_INLINE void multiply_row_blocks(const Eigen::bfloat16* a, Index a_stride, const Pair* b, Index b_stride,
                                             Index pairs, float* c, Index c_stride) {
  const Index a_bytes = 2 * a_stride, b_bytes = 4 * b_stride, c_bytes = 4 * c_stride;
  const auto* const a_below = a + kPairRows * a_stride;
  float* const c_below = c + kPairRows * c_stride;
  if constexpr (Adds) {  // tiles 0, 1, 2 and below them 3, 4, 5 sum up
    _tile_loadd(0, c, c_bytes);
    if constexpr (Vectors > 1) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (Vectors > 2) _tile_loadd(2, c + 32, c_bytes);
    if constexpr (Blocks > 1) _tile_loadd(3, c_below, c_bytes);
    if constexpr (Blocks > 1 && Vectors > 1) _tile_loadd(4, c_below + 16, c_bytes);
    if constexpr (Blocks > 1 && Vectors > 2) _tile_loadd(5, c_below + 32, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (Vectors > 1) _tile_zero(1);
    if constexpr (Vectors > 2) _tile_zero(2);
    if constexpr (Blocks > 1) _tile_zero(3);
    if constexpr (Blocks > 1 && Vectors > 1) _tile_zero(4);
    if constexpr (Blocks > 1 && Vectors > 2) _tile_zero(5);
  }
  for (Index k = 0; k < pairs; k += kPairDepth / 2, b += kPairDepth / 2 * b_stride) {
    _tile_loadd(6, a + 2 * k, a_bytes);
    _tile_loadd(7, b, b_bytes);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (Blocks > 1) {
      _tile_loadd(6, a_below + 2 * k, a_bytes);
      _tile_dpbf16ps(3, 6, 7);
    }
    if constexpr (Vectors > 1) {
      _tile_loadd(7, b + 16, b_bytes);
      if constexpr (Blocks > 1) {
        _tile_dpbf16ps(4, 6, 7);
        _tile_loadd(6, a + 2 * k, a_bytes);
      }
      _tile_dpbf16ps(1, 6, 7);
    }
    if constexpr (Vectors > 2) {
      _tile_loadd(7, b + 32, b_bytes);
      _tile_dpbf16ps(2, 6, 7);
      if constexpr (Blocks > 1) {
        _tile_loadd(6, a_below + 2 * k, a_bytes);
        _tile_dpbf16ps(5, 6, 7);
      }
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (Vectors > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (Vectors > 2) _tile_stored(2, c + 32, c_bytes);
  if constexpr (Blocks > 1) _tile_stored(3, c_below, c_bytes);
  if constexpr (Blocks > 1 && Vectors > 1) _tile_stored(4, c_below + 16, c_bytes);
  if constexpr (Blocks > 1 && Vectors > 2) _tile_stored(5, c_below + 32, c_bytes);
}

/// c(r,:) = sum_k a(r,k)·b(k,:), or += with Adds: a [rows][2·pairs], b [pairs][16·Vectors] in pairs, c [rows][…].
/// Strides count elements. Needs a PairUnit in this thread.
template <int Vectors, bool Adds>
void multiply_pairs(const Eigen::bfloat16* a, Index a_stride, const Pair* b, Index b_stride, Index rows, Index pairs,
                    float* c, Index c_stride) {
  static_assert(1 <= Vectors && Vectors <= 3);
  Index r = 0;
  for (; r + 2 * kPairRows <= rows; r += 2 * kPairRows) {
    multiply_row_blocks<Vectors, Adds, 2>(a + r * a_stride, a_stride, b, b_stride, pairs, c + r * c_stride, c_stride);
  }
  if (r < rows) {
    multiply_row_blocks<Vectors, Adds, 1>(a + r * a_stride, a_stride, b, b_stride, pairs, c + r * c_stride, c_stride);
  }
}

#elif defined(HEADROOM_PAIRS_BY_LANES)

inline constexpr bool kHasPairProducts = true;

struct PairUnit {
  static bool available() { return true; }
  PairUnit() {}
};

template <int Vectors, bool Adds>
void multiply_pairs(const Eigen::bfloat16* a, Index a_stride, const Pair* b, Index b_stride, Index rows, Index pairs,
                    float* c, Index c_stride) {
  for (Index r = 0; r < rows; r += kTileRows, a += kTileRows * a_stride, c += kTileRows * c_stride) {
    __m512 sum[kTileRows][Vectors];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        sum[i][v] = Adds ? _mm512_loadu_ps(c + i * c_stride + 16 * v) : _mm512_setzero_ps();
      }
    }
#pragma GCC unroll 1
    for (Index k = 0; k < pairs; ++k) {
      __m512bh b_row[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) b_row[v] = (__m512bh)_mm512_loadu_si512(b + k * b_stride + 16 * v);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        Pair pair;
        std::memcpy(&pair, a + i * a_stride + 2 * k, sizeof(pair));
        const auto a_pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], a_pair, b_row[v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(c + i * c_stride + 16 * v, sum[i][v]);
    }
  }
}

#else

inline constexpr bool kHasPairProducts = false;

struct PairUnit {
  static bool available() { return false; }
  PairUnit() {}
};

template <int Vectors, bool Adds>
void multiply_pairs(const Eigen::bfloat16*, Index, const Pair*, Index, Index, Index, float*, Index) {}

#endif

#undef HEADROOM_PAIRS_BY_TILE_UNIT
#undef HEADROOM_PAIRS_BY_LANES

/// Whether attention multiplies in pairs. For a few keys that would take longer than to widen them.
inline bool multiplies_pairs(const AttentionTensors& x, const AttentionParams& params) {
  return kHasPairProducts && PairUnit::available() && !params.rotary && x.q.type == kStoredType<Eigen::bfloat16> &&
         x.k.length() >= 48;
}

/// Rows [first, first + count) of x to [count padded to `rows`][dim], dim a multiple of kPairDepth; 0 where x ends;
/// negated where `sign` is negative.
inline void copy_pair_rows(Eigen::bfloat16* to, Index rows, Index dim, const StoredMatrix& x, Index first, Index count,
                           float sign) {
  const auto view = x.as<Eigen::bfloat16>();
  for (Index i = 0; i < count; ++i) {
    Eigen::bfloat16* const row = to + i * dim;
    Index d = 0;
#ifdef __AVX512BF16__
    const __m512i flip = _mm512_set1_epi16(sign < 0 ? static_cast<short>(0x8000) : 0);
    for (; x.col_stride == 1 && d < dim; d += kPairDepth) {
      const Index left = std::clamp<Index>(x.cols - d, 0, kPairDepth);
      const auto part = _mm512_maskz_loadu_epi16(static_cast<__mmask32>((std::uint64_t(1) << left) - 1),
                                                 view.data + (first + i) * view.row_stride + d);
      _mm512_storeu_si512(row + d, _mm512_xor_si512(part, flip));
    }
#endif
    for (; d < x.cols; ++d) row[d] = sign < 0 ? -view(first + i, d) : view(first + i, d);
    for (; d < dim; ++d) row[d] = Eigen::bfloat16(0);
  }
  std::fill(to + count * dim, to + rows * dim, Eigen::bfloat16(0));
}

/// Leaves what comes as it is, bit for bit.
struct Assign {
  template <class T>
  EIGEN_ALWAYS_INLINE T operator()(T, T x) const {
    return x;
  }
};

/// to [dim/2][width] in pairs = rows [rows][dim] in lanes.
inline void pair_lanes(Pair* to, Index width, const Eigen::bfloat16* rows, Index count, Index dim) {
  // 32 bits are 32 bits to a transposition
  const auto* const words = reinterpret_cast<const float*>(rows);
  pack_lanes(reinterpret_cast<float*>(to), width, MatrixView<const float>{words, count, dim / 2, dim / 2, 1}, Assign{});
}

/// to [dim][stride] = the transposed rows [count][dim]; `words` holds [dim/2][count].
inline void transpose_pairs(Eigen::bfloat16* to, Index stride, const Eigen::bfloat16* rows, Index count, Index dim,
                            Pair* words) {
  pair_lanes(words, count, rows, count, dim);
  for (Index k = 0; k < dim / 2; ++k) {
    auto* const even = reinterpret_cast<std::uint16_t*>(to + 2 * k * stride);
    std::uint16_t* const odd = even + stride;
    const Pair* const column = words + k * count;
    for (Index i = 0; i < count; ++i) even[i] = static_cast<std::uint16_t>(column[i]);
    for (Index i = 0; i < count; ++i) odd[i] = static_cast<std::uint16_t>(column[i] >> 16);
  }
}

/// to [lanes] = pairs of the nearest bfloat16 of what two packets hold.
EIGEN_ALWAYS_INLINE void store_pairs(Pair* to, simd::Packet<float> even, simd::Packet<float> odd) {
#ifdef __AVX512BF16__
  alignas(64) static constexpr std::uint16_t kAlternating[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                                 21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kAlternating), halves));
#else
  static_cast<void>(to), static_cast<void>(even), static_cast<void>(odd);  // never called
#endif
}

/// to [lanes] = the nearest bfloat16 of what a packet holds.
EIGEN_ALWAYS_INLINE void store_rounded(Eigen::bfloat16* to, simd::Packet<float> x) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
#else
  static_cast<void>(to), static_cast<void>(x);                             // never called
#endif
}

/// to [rows][stride] = x [rows][width] rounded, 0 behind the width.
template <int Vectors>
void round_rows(Eigen::bfloat16* to, Index stride, const float* x, Index rows) {
  constexpr Index N = simd::kLanes<float>, width = Vectors * N;
  for (Index i = 0; i < rows; ++i) {
    for (int v = 0; v < Vectors; ++v) store_rounded(to + i * stride + v * N, simd::load(x + i * width + v * N));
    std::fill(to + i * stride + width, to + (i + 1) * stride, Eigen::bfloat16(0));
  }
}

/// Rows from `first` (even) on of to [rows/2][width] in pairs = x [count][width]; what is behind it is 0. May be in
/// place.
template <int Vectors>
void pair_rows(Pair* to, const float* x, Index first, Index count, Index rows) {
  constexpr Index N = simd::kLanes<float>, width = Vectors * N;
  const auto row = [&](Index i, int v) {
    return i < count ? simd::load(x + i * width + v * N) : simd::broadcast(0.0F);
  };
  for (Index i = first; i < rows; i += 2) {
    for (int v = 0; v < Vectors; ++v) store_pairs(to + i / 2 * width + v * N, row(i, v), row(i + 1, v));
  }
}

/// Whether no element is infinite or NaN.
inline bool pairs_are_finite(const Eigen::bfloat16* x, Index count) {
  const auto* const bits = reinterpret_cast<const std::uint16_t*>(x);
  std::uint16_t largest = 0;
  for (Index i = 0; i < count; ++i) largest = std::max<std::uint16_t>(largest, bits[i] & 0x7fffU);
  return largest < 0x7f80U;
}

}  // namespace headroom::inline v0::core::detail
