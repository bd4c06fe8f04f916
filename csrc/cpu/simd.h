// The vector type of the tier this file is compiled for (SAEREC_TIER is scalar, avx2 or avx512, with the matching
// compiler flags), as few operations as the kernels need. Everything has internal linkage.
//
// Loads and stores take any alignment. 16-bit floats are widened to float32 on load and rounded to nearest even on
// store.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(SAEREC_TIER_AVX2) || defined(SAEREC_TIER_AVX512)
#include <immintrin.h>
#endif

namespace saerec {
namespace SAEREC_TIER {
namespace {

// Element formats: what is in memory.
struct F32 {
  using Storage = float;
};
struct BF16 {
  using Storage = uint16_t;
};
struct F16 {
  using Storage = uint16_t;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(F32, float value) { return value; }
inline float widen(BF16, uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }
inline float widen(F16, uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  const uint32_t magnitude = value & 0x7FFFu;
  if (magnitude >= 0x7C00u) return from_bits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  if (magnitude < 0x400u) {
    // Subnormal: the mantissa counts units of 2^-24, which float32 holds exactly.
    const float unsigned_value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return from_bits(sign | to_bits(unsigned_value));
  }
  return from_bits(sign | ((magnitude << 13) + 0x38000000u));
}

inline float narrow(F32, float value) { return value; }
inline uint16_t narrow(BF16, float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
inline uint16_t narrow(F16, float value) {
  const uint32_t bits = to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u | (magnitude >> 13 & 0x1FFu));
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65536 and above
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 lines the bits of a float16 subnormal up with the end of a float32 mantissa.
    const uint32_t shifted = to_bits(from_bits(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (shifted - 0x3F000000u));
  }
  // Rounding may carry into the exponent, up to infinity, as it should.
  const uint32_t rounded = magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

#if defined(SAEREC_TIER_AVX512)

constexpr int kLanes = 16;
constexpr int kRowTile = 8;  // 8 rows x 2 vectors = 16 accumulators, 2 weights and a broadcast in 32 registers
using Vec = __m512;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float value) { return _mm512_set1_ps(value); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
inline uint32_t not_le(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }

inline Vec load(F32, const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(BF16, const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Vec load(F16, const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(F32, float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline void store(BF16, uint16_t* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF)), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_blend_epi32(nan, rounded, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
}
inline void store(F16, uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

// Appends the lanes in mask (values, and first + lane) at the ends of both arrays; writes a whole vector, so both need
// kLanes free places. Compressing in a register and storing it whole beats a compressing store, which is microcoded on
// Zen 4.
inline int append(float* values, uint32_t* ids, Vec value, uint32_t first, uint32_t mask) {
  const __mmask16 lanes = static_cast<__mmask16>(mask);
  const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i id = _mm512_add_epi32(iota, _mm512_set1_epi32(static_cast<int>(first)));
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(lanes, value));
  _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32(lanes, id));
  return __builtin_popcount(mask);
}

// out[j * out_stride + i] = rows[i][j] for i, j < 16; with fewer than 16 columns the rest of out gets zeros.
template <class Element>
inline void transpose_tile(Element element, const typename Element::Storage* const* rows, int columns, float* out,
                           int64_t out_stride) {
  __m512 r[16];
  for (int i = 0; i < 16; ++i) {
    if (rows[i] == nullptr) {
      r[i] = zero();
    } else if (columns >= 16) {
      r[i] = load(element, rows[i]);
    } else {
      typename Element::Storage padded[16] = {};
      for (int j = 0; j < columns; ++j) padded[j] = rows[i][j];
      r[i] = load(element, padded);
    }
  }
  __m512 t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 2]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 1]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
  // r[4 g + c] now holds, in its 128-bit lane q, column 4 q + c of rows 4 g .. 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 low01 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x44),
                 high01 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xEE);
    const __m512 low23 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x44);
    const __m512 high23 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xEE);
    _mm512_storeu_ps(out + (c)*out_stride, _mm512_shuffle_f32x4(low01, low23, 0x88));
    _mm512_storeu_ps(out + (4 + c) * out_stride, _mm512_shuffle_f32x4(low01, low23, 0xDD));
    _mm512_storeu_ps(out + (8 + c) * out_stride, _mm512_shuffle_f32x4(high01, high23, 0x88));
    _mm512_storeu_ps(out + (12 + c) * out_stride, _mm512_shuffle_f32x4(high01, high23, 0xDD));
  }
}

#elif defined(SAEREC_TIER_AVX2)

constexpr int kLanes = 8;
constexpr int kRowTile = 6;  // 6 rows x 2 vectors = 12 accumulators, 2 weights and a broadcast in 16 registers
using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float value) { return _mm256_set1_ps(value); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float reduce_add(Vec a) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}
inline uint32_t not_le(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
}

inline Vec load(F32, const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(BF16, const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vec load(F16, const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(F32, float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline void store(BF16 element, uint16_t* p, Vec a) {
  float lanes[8];
  _mm256_storeu_ps(lanes, a);
  for (int i = 0; i < 8; ++i) p[i] = narrow(element, lanes[i]);
}
inline void store(F16, uint16_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

template <class Element>
inline void transpose_tile(Element element, const typename Element::Storage* const* rows, int columns, float* out,
                           int64_t out_stride) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) {
    if (rows[i] == nullptr) {
      r[i] = zero();
    } else if (columns >= 8) {
      r[i] = load(element, rows[i]);
    } else {
      typename Element::Storage padded[8] = {};
      for (int j = 0; j < columns; ++j) padded[j] = rows[i][j];
      r[i] = load(element, padded);
    }
  }
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    const __m256 a = t[4 * i], b = t[4 * i + 1], c = t[4 * i + 2], d = t[4 * i + 3];
    r[4 * i] = _mm256_shuffle_ps(a, c, 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
    r[4 * i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
  }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(out + c * out_stride, _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
    _mm256_storeu_ps(out + (4 + c) * out_stride, _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
  }
}

#else

constexpr int kLanes = 4;
constexpr int kRowTile = 2;
struct Vec {
  float lane[4];
};

inline Vec zero() { return Vec{}; }
inline Vec set1(float value) { return Vec{{value, value, value, value}}; }
inline Vec add(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline Vec sub(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.lane[i] -= b.lane[i];
  return a;
}
inline Vec fmadd(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 4; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
inline float reduce_add(Vec a) { return (a.lane[0] + a.lane[2]) + (a.lane[1] + a.lane[3]); }
inline uint32_t not_le(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) mask |= static_cast<uint32_t>(!(a.lane[i] <= b.lane[i])) << i;
  return mask;
}
template <class Element>
inline Vec load(Element element, const typename Element::Storage* p) {
  Vec a;
  for (int i = 0; i < 4; ++i) a.lane[i] = widen(element, p[i]);
  return a;
}
template <class Element>
inline void store(Element element, typename Element::Storage* p, Vec a) {
  for (int i = 0; i < 4; ++i) p[i] = narrow(element, a.lane[i]);
}
template <class Element>
inline void transpose_tile(Element element, const typename Element::Storage* const* rows, int columns, float* out,
                           int64_t out_stride) {
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < 4; ++i) {
      out[j * out_stride + i] = rows[i] != nullptr && j < columns ? widen(element, rows[i][j]) : 0.0f;
    }
  }
}

#endif

#if !defined(SAEREC_TIER_AVX512)
inline int append(float* values, uint32_t* ids, Vec value, uint32_t first, uint32_t mask) {
  float lanes[kLanes];
  store(F32{}, lanes, value);
  int count = 0;
  for (; mask != 0; mask &= mask - 1) {
    const int lane = __builtin_ctz(mask);
    values[count] = lanes[lane];
    ids[count] = first + static_cast<uint32_t>(lane);
    ++count;
  }
  return count;
}
#endif

template <class Element>
inline Vec load_partial(Element element, const typename Element::Storage* p, int64_t count) {
  typename Element::Storage padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(element, padded);
}

template <class Element>
inline void store_partial(Element element, typename Element::Storage* p, int64_t count, Vec a) {
  typename Element::Storage padded[kLanes];
  store(element, padded, a);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

template <class Body>
inline void with_element(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(F32{});
    case DType::kBFloat16:
      return body(BF16{});
    case DType::kFloat16:
      return body(F16{});
  }
}

inline float value_at(const Vector& vector, int64_t i) {
  i *= vector.stride;
  switch (vector.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(vector.data)[i];
    case DType::kBFloat16:
      return widen(BF16{}, static_cast<const uint16_t*>(vector.data)[i]);
    case DType::kFloat16:
      return widen(F16{}, static_cast<const uint16_t*>(vector.data)[i]);
  }
  return 0.0f;
}

}  // namespace
}  // namespace SAEREC_TIER
}  // namespace saerec
