// The vector types of the tier this file is compiled for (SAEREC_TIER is scalar, avx2, avx2_vnni, avx512 or
// avx512_vnni, with the matching compiler flags), as few operations as the kernels need. Everything has internal
// linkage.
//
// Vec holds kLanes float32, Quads kLanes int32 or kLanes x 4 bytes. Loads and stores take any alignment. 16-bit floats
// are widened to float32 on load and rounded to nearest even on store.
//
// quad_dot(sum, a, b) adds to each lane of sum the products of its four unsigned bytes of a with its four signed bytes
// of b. Without VNNI pairs of products are added in saturating 16 bits, which signed bytes of at most kByteLevels in
// magnitude cannot saturate: 2 * 255 * 64 < 2^15.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(SAEREC_TIER_AVX512_VNNI)
#define SAEREC_TIER_AVX512
#endif
#if defined(SAEREC_TIER_AVX2_VNNI)
#define SAEREC_TIER_AVX2
#endif
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
using Quads = __m512i;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float value) { return _mm512_set1_ps(value); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec minimum(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
inline float reduce_min(Vec a) { return _mm512_reduce_min_ps(a); }
// The lanes of a mask as bits of a number. GCC 12 fuses the comparison with the widening to 32 bits, and then takes it
// to write the lower 16: in a register the others are zero all the same, on the stack they are whatever was there. A
// mask goes to the stack where a call stands between the comparison and its use, as ThreadSanitizer puts one at every
// access to memory. The statement, of no instructions, needs the number in a general register, where it is whole.
// Other builds have no such calls, and would pay with moves between mask and general registers.
inline uint32_t mask_bits(__mmask16 mask) {
  uint32_t bits = mask;
#if defined(__SANITIZE_THREAD__)
  __asm__("" : "+r"(bits));
#endif
  return bits;
}
inline uint32_t at_least(Vec a, Vec b) { return mask_bits(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ)); }

#if defined(SAEREC_TIER_AVX512_VNNI)
constexpr int kByteLevels = 127;
inline Quads quad_dot(Quads sum, Quads a, Quads b) {
  // Not the intrinsic: around it GCC 12 copies every accumulator twice.
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#else
constexpr int kByteLevels = 64;
inline Quads quad_dot(Quads sum, Quads a, Quads b) {
  const Quads pairs = _mm512_maddubs_epi16(a, b);
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif
inline Quads quads_set1(int32_t value) { return _mm512_set1_epi32(value); }
inline Quads quads_load(const void* p) { return _mm512_loadu_si512(p); }
inline Quads quads_add(Quads a, Quads b) { return _mm512_add_epi32(a, b); }
inline void quads_store(void* p, Quads a) { _mm512_storeu_si512(p, a); }
// Adds 1 to the lanes of counts where a < b.
inline Quads count_less(Quads counts, Quads a, Quads b) {
  return _mm512_mask_add_epi32(counts, _mm512_cmplt_epi32_mask(a, b), counts, _mm512_set1_epi32(1));
}
inline uint32_t at_least(Quads a, Quads b) { return mask_bits(_mm512_cmpge_epi32_mask(a, b)); }
inline Vec to_float(Quads a) { return _mm512_cvtepi32_ps(a); }
inline Vec round_even(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// The lanes, whole numbers that fit, as bytes.
inline void store_bytes(uint8_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}

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

// Ids of the lanes of one vector after another. Kept in a register and counted up there, since making them anew takes
// the port that comparing and compressing need.
class LaneIds {
 public:
  explicit LaneIds(int64_t first)
      : ids_(_mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                              _mm512_set1_epi32(static_cast<int>(first)))) {}

  // Stores the ids of the next vector's lanes in mask, and returns how many; writes a whole vector. Compressing in a
  // register and storing it whole beats a compressing store, which is microcoded on Zen 4.
  int store_next(uint32_t* out, uint32_t mask) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), ids_));
    ids_ = _mm512_add_epi32(ids_, _mm512_set1_epi32(kLanes));
    return __builtin_popcount(mask);
  }

 private:
  __m512i ids_;
};

// Packs the values and ids of the lanes in mask at the front of both arrays; writes whole vectors.
inline int pack_front(float* values, uint32_t* ids, Vec value, Quads id, uint32_t mask) {
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), value));
  _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), id));
  return __builtin_popcount(mask);
}

// Lane i of the result is the sum over the lanes of sums[i].
inline Vec reduce_each(const Vec* sums) {
  __m512 pairs[8], fours[4];
  for (int i = 0; i < 8; ++i) {
    pairs[i] = add(_mm512_unpacklo_ps(sums[2 * i], sums[2 * i + 1]), _mm512_unpackhi_ps(sums[2 * i], sums[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  // Each 128-bit lane of fours[i] now holds sums of that lane for four of the inputs.
  const __m512 low =
      add(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88), _mm512_shuffle_f32x4(fours[0], fours[1], 0xDD));
  const __m512 high =
      add(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88), _mm512_shuffle_f32x4(fours[2], fours[3], 0xDD));
  return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
}

// out[j * out_stride + i] = in[i * in_stride + j] for i, j < kLanes, 4 bytes each.
inline void transpose_quads(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * in_stride);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4 g + c] now holds, in its 128-bit lane q, column 4 q + c of rows 4 g .. 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xEE);
    const __m512i low23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xEE);
    _mm512_storeu_si512(out + c * out_stride, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(out + (4 + c) * out_stride, _mm512_shuffle_i32x4(low01, low23, 0xDD));
    _mm512_storeu_si512(out + (8 + c) * out_stride, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(out + (12 + c) * out_stride, _mm512_shuffle_i32x4(high01, high23, 0xDD));
  }
}

#elif defined(SAEREC_TIER_AVX2)

constexpr int kLanes = 8;
constexpr int kRowTile = 4;  // 4 rows x 2 vectors = 8 accumulators, 2 weights, a broadcast, ones and products in 16
using Vec = __m256;
using Quads = __m256i;

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
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec minimum(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline float reduce_max(Vec a) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}
inline float reduce_min(Vec a) { return -reduce_max(sub(zero(), a)); }
inline uint32_t at_least(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}

#if defined(SAEREC_TIER_AVX2_VNNI)
constexpr int kByteLevels = 127;
inline Quads quad_dot(Quads sum, Quads a, Quads b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#else
constexpr int kByteLevels = 64;
inline Quads quad_dot(Quads sum, Quads a, Quads b) {
  const Quads pairs = _mm256_maddubs_epi16(a, b);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif
inline Quads quads_set1(int32_t value) { return _mm256_set1_epi32(value); }
inline Quads quads_load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Quads quads_add(Quads a, Quads b) { return _mm256_add_epi32(a, b); }
inline void quads_store(void* p, Quads a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline Quads count_less(Quads counts, Quads a, Quads b) { return _mm256_sub_epi32(counts, _mm256_cmpgt_epi32(b, a)); }
inline uint32_t at_least(Quads a, Quads b) {
  return ~static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a)))) & 0xFFu;
}
inline Vec to_float(Quads a) { return _mm256_cvtepi32_ps(a); }
inline Vec round_even(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store_bytes(uint8_t* p, Vec a) {
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_cvtps_epi32(a));
  for (int i = 0; i < 8; ++i) p[i] = static_cast<uint8_t>(lanes[i]);
}

inline Vec reduce_each(const Vec* sums) {
  const __m256 ab = _mm256_hadd_ps(sums[0], sums[1]), cd = _mm256_hadd_ps(sums[2], sums[3]);
  const __m256 ef = _mm256_hadd_ps(sums[4], sums[5]), gh = _mm256_hadd_ps(sums[6], sums[7]);
  const __m256 low = _mm256_hadd_ps(ab, cd), high = _mm256_hadd_ps(ef, gh);
  return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
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

#else

constexpr int kLanes = 4;
constexpr int kRowTile = 2;
constexpr int kByteLevels = 127;
struct Vec {
  float lane[4];
};
struct Quads {
  int32_t lane[4];
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
inline Vec mul(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.lane[i] *= b.lane[i];
  return a;
}
inline Vec maximum(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
inline Vec minimum(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
inline float reduce_max(Vec a) {
  const Vec swapped{{a.lane[2], a.lane[3], a.lane[0], a.lane[1]}};
  const Vec half = maximum(a, swapped);
  return half.lane[0] > half.lane[1] ? half.lane[0] : half.lane[1];
}
inline float reduce_min(Vec a) { return -reduce_max(sub(zero(), a)); }
inline uint32_t at_least(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) mask |= static_cast<uint32_t>(a.lane[i] >= b.lane[i]) << i;
  return mask;
}

inline Quads quad_dot(Quads sum, Quads a, Quads b) {
  uint8_t unsigned_bytes[16];
  int8_t signed_bytes[16];
  std::memcpy(unsigned_bytes, &a, 16);
  std::memcpy(signed_bytes, &b, 16);
  for (int i = 0; i < 16; ++i) sum.lane[i / 4] += unsigned_bytes[i] * signed_bytes[i];
  return sum;
}
inline Quads quads_set1(int32_t value) { return Quads{{value, value, value, value}}; }
inline Quads quads_load(const void* p) {
  Quads a;
  std::memcpy(&a, p, 16);
  return a;
}
inline Quads quads_add(Quads a, Quads b) {
  for (int i = 0; i < 4; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline void quads_store(void* p, Quads a) { std::memcpy(p, &a, 16); }
inline Quads count_less(Quads counts, Quads a, Quads b) {
  for (int i = 0; i < 4; ++i) counts.lane[i] += a.lane[i] < b.lane[i];
  return counts;
}
inline uint32_t at_least(Quads a, Quads b) {
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) mask |= static_cast<uint32_t>(a.lane[i] >= b.lane[i]) << i;
  return mask;
}
inline Vec to_float(Quads a) {
  Vec b;
  for (int i = 0; i < 4; ++i) b.lane[i] = static_cast<float>(a.lane[i]);
  return b;
}
inline Vec round_even(Vec a) {
  // Below 2^22 in magnitude, which is all that is asked for, adding and taking off 1.5 * 2^23 rounds to even.
  for (int i = 0; i < 4; ++i) a.lane[i] = (a.lane[i] + 12582912.0f) - 12582912.0f;
  return a;
}
inline void store_bytes(uint8_t* p, Vec a) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<uint8_t>(static_cast<int32_t>(a.lane[i]));
}
inline Vec reduce_each(const Vec* sums) {
  return Vec{{reduce_add(sums[0]), reduce_add(sums[1]), reduce_add(sums[2]), reduce_add(sums[3])}};
}
template <class Element>
inline Vec load(Element element, const typename Element::Storage* p) {
  Vec a;
  // Packed weights are bytes, which may lie at any address.
  typename Element::Storage values[4];
  std::memcpy(values, p, sizeof values);
  for (int i = 0; i < 4; ++i) a.lane[i] = widen(element, values[i]);
  return a;
}
template <class Element>
inline void store(Element element, typename Element::Storage* p, Vec a) {
  for (int i = 0; i < 4; ++i) p[i] = narrow(element, a.lane[i]);
}

#endif

#if !defined(SAEREC_TIER_AVX512)
class LaneIds {
 public:
  explicit LaneIds(int64_t first) : next_(static_cast<uint32_t>(first)) {}

  int store_next(uint32_t* out, uint32_t mask) {
    int count = 0;
    for (; mask != 0; mask &= mask - 1) out[count++] = next_ + static_cast<uint32_t>(__builtin_ctz(mask));
    next_ += kLanes;
    return count;
  }

 private:
  uint32_t next_;
};

inline int pack_front(float* values, uint32_t* ids, Vec value, Quads id, uint32_t mask) {
  float value_lanes[kLanes];
  uint32_t id_lanes[kLanes];
  store(F32{}, value_lanes, value);
  quads_store(id_lanes, id);
  int count = 0;
  for (; mask != 0; mask &= mask - 1, ++count) {
    values[count] = value_lanes[__builtin_ctz(mask)];
    ids[count] = id_lanes[__builtin_ctz(mask)];
  }
  return count;
}

inline void transpose_quads(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
  for (int j = 0; j < kLanes; ++j) {
    for (int i = 0; i < kLanes; ++i) out[j * out_stride + i] = in[i * in_stride + j];
  }
}
#endif

#if defined(SAEREC_TIER_AVX512)
inline Vec load_partial(F32, const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
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

inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void prefetch_second_level(const void* p) { __builtin_prefetch(p, 0, 2); }

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
