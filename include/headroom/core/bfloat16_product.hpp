#pragma once

#include <cstdint>
#include <cstring>

#include "headroom/core/amx_permission.hpp"
#include "headroom/core/lanes.hpp"
#include "headroom/core/stored.hpp"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HEADROOM_BFLOAT16_BY_AMX
#elif defined(__AVX512BF16__)
#define HEADROOM_BFLOAT16_BY_AVX512
#endif

/// Products of bfloat16 matrices, summed in float, by the instructions that processors have for them: AMX's tiles, or
/// the dot products of AVX-512. Both multiply two neighbours along the sum at a time, so the right operand is in VNNI
/// layout: b [depth][columns] is stored as [depth/2][columns] of pairs (b(2k,c), b(2k+1,c)).
namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// Two bfloat16 that are next to each other in the direction of the sum; the first in the low half.
using VnniPair = std::uint32_t;

inline constexpr Index kVnniRows = 16;   ///< rows of a and c come in multiples of this
inline constexpr Index kVnniDepth = 32;  ///< and terms of a sum in multiples of this

constexpr Index padded(Index count, Index multiple) { return (count + multiple - 1) / multiple * multiple; }

/// Operands of a product: a [rows][2·pairs], b [pairs][16·Vectors], c [rows][16·Vectors]. Strides count elements.
struct VnniProduct {
  const Eigen::bfloat16* a;
  Index a_stride;
  const VnniPair* b;
  Index b_stride;
  Index rows, pairs;
  float* c;
  Index c_stride;

  VnniProduct from_row(Index row) const {
    return {a + row * a_stride, a_stride, b, b_stride, rows - row, pairs, c + row * c_stride, c_stride};
  }
};

#if defined(HEADROOM_BFLOAT16_BY_AMX)

inline constexpr bool kHasBfloat16Products = true;
inline constexpr Index kFewestBfloat16Keys = 48;  ///< of attention: fewer are faster in float, as measured

/// Gives AMX's tiles to the calling thread for as long as it lives. Others who use them in this thread may trust that
/// they keep the shapes that were configured, as oneDNN does: they are put back.
class AmxTiles {
 public:
  /// Whether this process may use them.
  static bool available() {
    static const bool granted = may_use_amx_tiles();
    return granted;
  }
  AmxTiles() {
    _tile_storeconfig(&before_);
    Shapes whole{.palette = 1};
    for (int tile = 0; tile < 8; ++tile) whole.row_bytes[tile] = 64, whole.rows[tile] = 16;
    _tile_loadconfig(&whole);
  }
  ~AmxTiles() { before_.palette == 0 ? _tile_release() : _tile_loadconfig(&before_); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

 private:
  struct alignas(64) Shapes {
    std::uint8_t palette = 0, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
  };
  Shapes before_;
};

/// The first rows of c, 16 for each of Blocks: independent sums hide how long a tile takes.
template <int Vectors, bool Accumulates, int Blocks>
EIGEN_ALWAYS_INLINE void multiply_row_blocks(const VnniProduct& p) {
  const Eigen::bfloat16* const a = p.a;
  const VnniPair* b = p.b;
  float* const c = p.c;
  const Index a_bytes = 2 * p.a_stride, b_bytes = 4 * p.b_stride, c_bytes = 4 * p.c_stride;
  const auto* const a_below = a + kVnniRows * p.a_stride;
  float* const c_below = c + kVnniRows * p.c_stride;
  if constexpr (Accumulates) {  // tiles 0, 1, 2 and below them 3, 4, 5 sum up
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
  for (Index k = 0; k < p.pairs; k += kVnniDepth / 2, b += kVnniDepth / 2 * p.b_stride) {
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

/// c(r,:) = sum_k a(r,k)·b(k,:), or += where it accumulates. Needs AmxTiles in this thread.
template <int Vectors, bool Accumulates>
EIGEN_DONT_INLINE void multiply(const VnniProduct& p) {
  static_assert(1 <= Vectors && Vectors <= 3);
  Index r = 0;
  for (; r + 2 * kVnniRows <= p.rows; r += 2 * kVnniRows) {
    multiply_row_blocks<Vectors, Accumulates, 2>(p.from_row(r));
  }
  if (r < p.rows) multiply_row_blocks<Vectors, Accumulates, 1>(p.from_row(r));
}

#elif defined(HEADROOM_BFLOAT16_BY_AVX512)

inline constexpr bool kHasBfloat16Products = true;
inline constexpr Index kFewestBfloat16Keys = 24;

struct AmxTiles {
  static bool available() { return true; }  // the dot products of AVX-512 need nothing
  AmxTiles() {}
};

template <int Vectors, bool Accumulates>
EIGEN_DONT_INLINE void multiply(const VnniProduct& product) {
  const VnniProduct p = product;  // of its own: what is written to c cannot be p
  const Eigen::bfloat16* a = p.a;
  float* c = p.c;
  for (Index r = 0; r < p.rows; r += kTileRows, a += kTileRows * p.a_stride, c += kTileRows * p.c_stride) {
    __m512 sum[kTileRows][Vectors];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        sum[i][v] = Accumulates ? _mm512_loadu_ps(c + i * p.c_stride + 16 * v) : _mm512_setzero_ps();
      }
    }
#pragma GCC unroll 1
    for (Index k = 0; k < p.pairs; ++k) {
      __m512bh b_row[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) b_row[v] = (__m512bh)_mm512_loadu_si512(p.b + k * p.b_stride + 16 * v);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        VnniPair pair;
        std::memcpy(&pair, a + i * p.a_stride + 2 * k, sizeof(pair));
        const auto a_pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], a_pair, b_row[v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(c + i * p.c_stride + 16 * v, sum[i][v]);
    }
  }
}

#else

inline constexpr bool kHasBfloat16Products = false;
inline constexpr Index kFewestBfloat16Keys = 0;

struct AmxTiles {
  static bool available() { return false; }
  AmxTiles() {}
};

template <int Vectors, bool Accumulates>
void multiply(const VnniProduct&) {}

#endif

#undef HEADROOM_BFLOAT16_BY_AMX
#undef HEADROOM_BFLOAT16_BY_AVX512

/// Rows of x to [count padded to `rows`][stride], stride a multiple of kVnniDepth; 0 where x ends; negated where `sign`
/// is negative.
inline void copy_bfloat16_rows(Eigen::bfloat16* to, Index rows, Index stride, const StoredMatrix& x, float sign) {
  const auto view = x.as<Eigen::bfloat16>();
  for (Index i = 0; i < x.rows; ++i) {
    Eigen::bfloat16* const row = to + i * stride;
    Index d = 0;
#ifdef __AVX512BF16__
    const __m512i flip = _mm512_set1_epi16(sign < 0 ? static_cast<short>(0x8000) : 0);
    for (; x.col_stride == 1 && d + kVnniDepth <= x.cols; d += kVnniDepth) {
      const auto part = _mm512_loadu_si512(view.data + i * view.row_stride + d);
      _mm512_storeu_si512(row + d, _mm512_xor_si512(part, flip));
    }
    for (; x.col_stride == 1 && d < stride; d += kVnniDepth) {
      const Index left = std::clamp<Index>(x.cols - d, 0, kVnniDepth);
      const auto part = _mm512_maskz_loadu_epi16(static_cast<__mmask32>((std::uint64_t(1) << left) - 1),
                                                 view.data + i * view.row_stride + d);
      _mm512_storeu_si512(row + d, _mm512_xor_si512(part, flip));
    }
#endif
    for (; d < x.cols; ++d) row[d] = sign < 0 ? -view(i, d) : view(i, d);
    for (; d < stride; ++d) row[d] = Eigen::bfloat16(0);
  }
  std::fill(to + x.rows * stride, to + rows * stride, Eigen::bfloat16(0));
}

/// Leaves what comes as it is, bit for bit.
struct Assign {
  static constexpr bool kOverwrites = true;
  template <class T>
  EIGEN_ALWAYS_INLINE T operator()(T, T x) const {
    return x;
  }
};

/// to [x.cols/2][width] in VNNI layout = dense rows x in lanes.
inline void pack_vnni_lanes(VnniPair* to, Index width, MatrixView<const Eigen::bfloat16> x) {
  // 32 bits are 32 bits to a transposition
  const auto* const words = static_cast<const float*>(static_cast<const void*>(x.data));
  const MatrixView<const float> pairs{words, x.rows, x.cols / 2, x.row_stride / 2, 1};
  pack_lanes(static_cast<float*>(static_cast<void*>(to)), width, pairs, Assign{});
}

/// to [x.cols][stride] = the transpose of dense rows x; `pairs` holds [x.cols/2][x.rows].
inline void transpose_bfloat16(Eigen::bfloat16* to, Index stride, MatrixView<const Eigen::bfloat16> x,
                               VnniPair* pairs) {
  pack_vnni_lanes(pairs, x.rows, x);
  const auto half = [](VnniPair pair) {
    return Eigen::numext::bit_cast<Eigen::bfloat16>(static_cast<std::uint16_t>(pair));
  };
  for (Index k = 0; k < x.cols / 2; ++k) {
    Eigen::bfloat16 *const even = to + 2 * k * stride, *const odd = even + stride;
    const VnniPair* const column = pairs + k * x.rows;
    for (Index i = 0; i < x.rows; ++i) even[i] = half(column[i]);
    for (Index i = 0; i < x.rows; ++i) odd[i] = half(column[i] >> 16);
  }
}

/// to [lanes] = the nearest bfloat16 of what two packets hold, in VNNI layout.
EIGEN_ALWAYS_INLINE void store_vnni(VnniPair* to, simd::Packet<float> even, simd::Packet<float> odd) {
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
  _mm256_storeu_si256(static_cast<__m256i*>(static_cast<void*>(to)), (__m256i)_mm512_cvtneps_pbh(x));
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

/// Rows from `first` (even) on of to [rows/2][width] in VNNI layout = x [count][width], rounded; 0 behind the count.
/// May be in place.
template <int Vectors>
void pack_vnni_rows(VnniPair* to, const float* x, Index first, Index count, Index rows) {
  constexpr Index N = simd::kLanes<float>, width = Vectors * N;
  const auto row = [&](Index i, int v) {
    return i < count ? simd::load(x + i * width + v * N) : simd::broadcast(0.0F);
  };
  for (Index i = first; i < rows; i += 2) {
    for (int v = 0; v < Vectors; ++v) store_vnni(to + i / 2 * width + v * N, row(i, v), row(i + 1, v));
  }
}

/// Whether no element is infinite or NaN.
inline bool are_finite(const Eigen::bfloat16* x, Index count) {
  std::uint16_t largest = 0;
  for (Index i = 0; i < count; ++i) {
    const auto bits = Eigen::numext::bit_cast<std::uint16_t>(x[i]);
    largest = std::max<std::uint16_t>(largest, bits & 0x7fffU);
  }
  return largest < 0x7f80U;
}

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
