// One SIMD register of floats for the ISA that the including file is compiled for.
//
// Included by per-ISA files only, which must not include anything of the standard library: an inline function compiled
// for AVX-512 here could otherwise be the copy that the linker keeps for everyone.
#pragma once

#include <stdint.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sparsekit::SPARSEKIT_ISA {

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
// Past the caches; p must be aligned to the register.
inline void stream_store(float* p, Vec v) { _mm512_stream_ps(p, v); }
inline void stream_fence() { _mm_sfence(); }
inline __mmask16 first(int64_t n) { return (__mmask16)((1u << n) - 1); }
inline Vec load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
// Those lanes whose bits are set.
inline void store_lanes(float* p, Vec v, uint32_t lanes) { _mm512_mask_storeu_ps(p, (__mmask16)lanes, v); }
// The first n lanes of v, 0 in the others.
inline Vec only(Vec v, int64_t n) { return _mm512_maskz_mov_ps(first(n), v); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
// Both return the second argument where one is NaN.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
// The larger; NaN if one of them is.
inline Vec max_or_nan(Vec a, Vec b) {
  return _mm512_mask_add_ps(max(a, b), _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), a, b);
}
// The registers a and b are neighbours: b with the last lane of a before it, a with the first lane of b behind it.
inline Vec shift_in_last(Vec a, Vec b) {
  return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(b), _mm512_castps_si512(a), kLanes - 1));
}
inline Vec shift_in_first(Vec a, Vec b) {
  return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(b), _mm512_castps_si512(a), 1));
}
// The even or odd lanes of a, then those of b.
inline Vec even_lanes(Vec a, Vec b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_ps(a, even, b);
}
inline Vec odd_lanes(Vec a, Vec b) {
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_permutex2var_ps(a, odd, b);
}
// Lanes of a and b in turns: those of the first halves, and of the second.
inline Vec zip_first(Vec a, Vec b) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return _mm512_permutex2var_ps(a, first, b);
}
inline Vec zip_second(Vec a, Vec b) {
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return _mm512_permutex2var_ps(a, second, b);
}
// n whole numbers in [0, 255] as bytes, and back.
inline void put_bytes(uint8_t* p, Vec v, int64_t n) {
  _mm512_mask_cvtepi32_storeu_epi8(p, first(n), _mm512_cvtps_epi32(v));
}
inline Vec some_bytes(const uint8_t* p, int64_t n) {
  alignas(kLanes) uint8_t bytes[kLanes] = {};
  __builtin_memcpy(bytes, p, n);
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_load_si128((const __m128i*)bytes)));
}
// `yes` where a is more than b or NaN, else `no`.
inline Vec where_more(Vec a, Vec b, Vec yes, Vec no) {
  const __mmask16 more = _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(no, more, yes);
}
// v where a is b, else 0.
inline Vec where_equal(Vec a, Vec b, Vec v) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), v); }
// v where mask is -1, 0 where it is 0; nullptr keeps all.
using Mask = __mmask16;
inline Mask mask_of(const int32_t* mask) {
  return mask ? _mm512_movepi32_mask(_mm512_loadu_si512(mask)) : (__mmask16)-1;
}
inline bool keeps_all(Mask mask) { return mask == (__mmask16)-1; }
inline Vec keep(Vec v, Mask mask) { return _mm512_maskz_mov_ps(mask, v); }
// v, 0 where x <= 0.
inline Vec where_positive(Vec v, Vec x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ), v);
}
// A bit for every float, beginning with lane i of all, a multiple of kLanes: 0 where x <= 0.
inline void put_positive(uint8_t* bits, int64_t i, Vec x) {
  const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ);
  __builtin_memcpy(bits + i / 8, &positive, sizeof(positive));
}
// v, 0 where that bit is.
inline Vec where_positive(Vec v, const uint8_t* bits, int64_t i) {
  __mmask16 positive;
  __builtin_memcpy(&positive, bits + i / 8, sizeof(positive));
  return _mm512_maskz_mov_ps(positive, v);
}
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec round(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// v * 2^n for whole n in [-126, 127].
inline Vec scale(Vec v, Vec n) { return _mm512_scalef_ps(v, n); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Four weights, of which lane<i> is a broadcast. Where a core loads two registers a cycle, shuffles would only compete
// with FMAs; where it loads one (SPARSEKIT_SHUFFLES), they save a load.
#if defined(SPARSEKIT_SHUFFLES)
using Weights = Vec;
inline Weights load4(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
template <int I>
inline Vec lane(Weights v) {
  return _mm512_permute_ps(v, I * 0x55);
}
#else
using Weights = const float*;
inline Weights load4(const float* p) { return p; }
template <int I>
inline Vec lane(Weights p) {
  return broadcast(p[I]);
}
#endif

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void stream_store(float* p, Vec v) { _mm256_stream_ps(p, v); }
inline void stream_fence() { _mm_sfence(); }
inline __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
// By parts: a masked store is slow microcode on some CPUs.
inline void store(float* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  __m128 part = _mm256_castps256_ps128(v);
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps(v, 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi((__m64*)p, part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
}
inline Vec only(Vec v, int64_t n) { return _mm256_and_ps(v, _mm256_castsi256_ps(first(n))); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec max_or_nan(Vec a, Vec b) { return _mm256_or_ps(max(a, b), _mm256_cmp_ps(a, b, _CMP_UNORD_Q)); }
inline Vec even_lanes(Vec a, Vec b) {
  const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
  return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xd8));
}
inline Vec odd_lanes(Vec a, Vec b) {
  const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
  return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xd8));
}
inline Vec zip_first(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
inline Vec zip_second(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}
inline void put_bytes(uint8_t* p, Vec v, int64_t n) {
  const __m256i whole = _mm256_cvtps_epi32(v);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
  __builtin_memcpy(p, &bytes, n);
}
inline Vec some_bytes(const uint8_t* p, int64_t n) {
  int64_t bytes = 0;
  __builtin_memcpy(&bytes, p, n);
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes)));
}
inline Vec where_more(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_or_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), _mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
inline Vec where_equal(Vec a, Vec b, Vec v) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ), v); }
using Mask = Vec;
inline Mask mask_of(const int32_t* mask) {
  return mask ? _mm256_loadu_ps((const float*)mask) : _mm256_castsi256_ps(_mm256_set1_epi32(-1));
}
inline bool keeps_all(Mask mask) { return _mm256_movemask_ps(mask) == 0xff; }
inline Vec keep(Vec v, Mask mask) { return _mm256_and_ps(v, mask); }
inline Vec where_positive(Vec v, Vec x) { return _mm256_and_ps(_mm256_cmp_ps(x, zero(), _CMP_NLE_UQ), v); }
inline void put_positive(uint8_t* bits, int64_t i, Vec x) {
  bits[i / 8] = (uint8_t)_mm256_movemask_ps(_mm256_cmp_ps(x, zero(), _CMP_NLE_UQ));
}
inline Vec where_positive(Vec v, const uint8_t* bits, int64_t i) {
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i positive = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits[i / 8]), lanes), lanes);
  return _mm256_and_ps(_mm256_castsi256_ps(positive), v);
}
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec round(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale(Vec v, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
using Weights = Vec;
inline Weights load4(const float* p) { return _mm256_broadcast_ps((const __m128*)p); }
template <int I>
inline Vec lane(Weights v) {
  return _mm256_permute_ps(v, I * 0x55);
}

#else

// The compiler's own vectors: SSE2 on x86-64, NEON on 64-bit ARM.
typedef float Vec __attribute__((vector_size(16), aligned(16)));
typedef float VecUnaligned __attribute__((vector_size(16), aligned(4), may_alias));
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
inline Vec zero() { return Vec{0, 0, 0, 0}; }
inline Vec broadcast(float x) { return Vec{x, x, x, x}; }
inline Vec load(const float* p) { return (Vec) * (const VecUnaligned*)p; }
inline void store(float* p, Vec v) { *(VecUnaligned*)p = (VecUnaligned)v; }
inline void stream_store(float* p, Vec v) { store(p, v); }
inline void stream_fence() {}
inline Vec load(const float* p, int64_t n) {
  Vec v = zero();
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
inline void store(float* p, Vec v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
inline Vec only(Vec v, int64_t n) {
  for (int64_t i = n; i < kLanes; ++i) v[i] = 0;
  return v;
}
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec max_or_nan(Vec a, Vec b) { return (a > b) | (a != a) ? a : b; }
inline Vec even_lanes(Vec a, Vec b) { return Vec{a[0], a[2], b[0], b[2]}; }
inline Vec odd_lanes(Vec a, Vec b) { return Vec{a[1], a[3], b[1], b[3]}; }
inline Vec zip_first(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
inline Vec zip_second(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }
inline void put_bytes(uint8_t* p, Vec v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = (uint8_t)(int)v[i];
}
inline Vec some_bytes(const uint8_t* p, int64_t n) {
  Vec v = zero();
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
inline Vec where_more(Vec a, Vec b, Vec yes, Vec no) { return (a > b) | (a != a) ? yes : no; }
inline Vec where_equal(Vec a, Vec b, Vec v) { return a == b ? v : zero(); }
using Mask = const int32_t*;
inline Mask mask_of(const int32_t* mask) { return mask; }
inline bool keeps_all(Mask mask) {
  for (int i = 0; mask && i < kLanes; ++i)
    if (!mask[i]) return false;
  return true;
}
inline Vec keep(Vec v, Mask mask) {
  for (int i = 0; mask && i < kLanes; ++i) v[i] = mask[i] ? v[i] : 0;
  return v;
}
inline Vec where_positive(Vec v, Vec x) { return x <= zero() ? zero() : v; }
inline void put_positive(uint8_t* bits, int64_t i, Vec x) {
  unsigned positive = i % 8 ? bits[i / 8] : 0;
  for (int k = 0; k < kLanes; ++k) positive |= (x[k] <= 0 ? 0u : 1u) << (i % 8 + k);
  bits[i / 8] = (uint8_t)positive;
}
inline Vec where_positive(Vec v, const uint8_t* bits, int64_t i) {
  for (int k = 0; k < kLanes; ++k) v[k] = bits[i / 8] >> (i % 8 + k) & 1 ? v[k] : 0;
  return v;
}
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec round(Vec v) {
  const Vec whole = broadcast(12582912.f);  // 1.5 * 2^23, where floats are a whole apart
  return (v + whole) - whole;
}
inline Vec scale(Vec v, Vec n) {
  typedef int32_t Int __attribute__((vector_size(16)));
  return v * (Vec)((__builtin_convertvector(n, Int) + 127) << 23);
}
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
using Weights = Vec;
inline Weights load4(const float* p) { return load(p); }
template <int I>
inline Vec lane(Weights v) {
  return broadcast(v[I]);
}

#endif

}  // namespace sparsekit::SPARSEKIT_ISA
