// Vectors of floats by the compiler's vector extensions, which GCC and Clang lower to whatever the machine has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace chronotope {

// VEC floats fill a register. A strip is STRIP query rows; a panel is VEC keys. The inner products keep
// STRIP x WIDE accumulators in registers, beside WIDE operands and one broadcast. VEC is a multiple of STRIP.
#if defined(__AVX512F__)
constexpr int VEC = 16, STRIP = 8, WIDE = 3;
#elif defined(__AVX__)
constexpr int VEC = 8, STRIP = 4, WIDE = 3;
#elif defined(__ARM_NEON)
constexpr int VEC = 4, STRIP = 4, WIDE = 4;
#else
constexpr int VEC = 4, STRIP = 4, WIDE = 2;
#endif

typedef float vec __attribute__((vector_size(4 * VEC)));
typedef int32_t ivec __attribute__((vector_size(4 * VEC)));

// Half a register, for tiles of few keys.
constexpr int HALF_VEC = VEC / 2;
typedef float half_vec __attribute__((vector_size(4 * HALF_VEC)));

// Of a register of any length: how many floats it holds, and what comparing two of them gives.
template <class V>
constexpr int LANES = sizeof(V) / 4;
template <class V>
using ints = decltype(V{} < V{});

template <class V>
inline V load_as(const float* p) {
  V out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

inline vec load(const float* p) { return load_as<vec>(p); }

inline ivec load(const int32_t* p) {
  ivec out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

template <class V>
inline void store(float* p, V x) {
  std::memcpy(p, &x, sizeof x);
}

// Whether a register is a line of the cache: such a line can be written without having been read.
constexpr bool STREAMS = sizeof(vec) == 64;

// Past the cache, to memory aligned to lines; plain where that is not possible.
inline void stream(float* p, vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#else
  store(p, x);
#endif
}

// What was streamed before comes before what is written after.
inline void fence() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

inline vec all(float x) {
  vec out;
  for (int i = 0; i < VEC; ++i) out[i] = x;
  return out;
}

inline ivec all(int32_t x) {
  ivec out;
  for (int i = 0; i < VEC; ++i) out[i] = x;
  return out;
}

inline vec larger(vec a, vec b) { return a > b ? a : b; }

// Lanes of a and b in turn: of their lower halves, of their upper halves.
template <class V>
inline void zip(V a, V b, V& low, V& high) {
  constexpr int N = LANES<V>;
#if defined(__clang__)
  for (int i = 0; i < N; ++i) {
    low[i] = i % 2 ? b[i / 2] : a[i / 2];
    high[i] = i % 2 ? b[N / 2 + i / 2] : a[N / 2 + i / 2];
  }
#else
  ints<V> first;
  for (int i = 0; i < N; ++i) first[i] = i / 2 + (i % 2) * N;
  low = __builtin_shuffle(a, b, first);
  high = __builtin_shuffle(a, b, first + N / 2);
#endif
}

// out[r] = f over all lanes of x[r]. Two rows become one by zipping their halves together.
template <class F>
inline void fold(vec (&x)[STRIP], float* out, F f) {
  for (int rows = STRIP / 2; rows > 0; rows /= 2)
    for (int r = 0; r < rows; ++r) {
      vec low, high;
      zip(x[r], x[r + rows], low, high);
      x[r] = f(low, high);
    }
  // Lane i belongs to row i % STRIP now.
  float lanes[VEC];
  for (int half = VEC / 2; half >= STRIP; half /= 2) {
    store(lanes, x[0]);
    vec other = {};
    std::memcpy(&other, lanes + half, sizeof(float) * half);
    x[0] = f(x[0], other);
  }
  store(lanes, x[0]);
  std::memcpy(out, lanes, sizeof(float) * STRIP);
}

inline float sum(vec x) {
  float out = 0;
  for (int i = 0; i < VEC; ++i) out += x[i];
  return out;
}

// e^x within 1 unit in the last place or so; 0 below -87, NaN where x is NaN. Cephes' polynomial.
template <class V>
inline V exp(V x) {
  const V low = V{} - 87.0f, magic = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V y = x < low ? low : x;
  const V shifted = y * 1.44269504f + magic;
  const V n = shifted - magic;
  V r = y - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const V out = (V)((ints<V>)p + ((ints<V>)shifted << 23));
  return x == x ? (x < low ? V{} : out) : x;
}

// The natural logarithm of normal numbers above 0, within 1 unit in the last place or so; NaN where x is NaN. Cephes'
// polynomial.
template <class V>
inline V log(V x) {
  const ints<V> bits = (ints<V>)x;
  const V half = (V)((bits & 0x007fffff) | 0x3f000000);  // x is half * 2^e, 0.5 <= half < 1
  const ints<V> small = half < 0.707106781f;
  const V e = __builtin_convertvector((bits >> 23) - 126 + small, V);
  const V r = (small ? half + half : half) - 1.0f;
  const V z = r * r;
  V p = r * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const V out = (p * r * z - e * 2.12194440e-4f - z * 0.5f) + r + e * 0.693359375f;
  return x == x ? out : x;
}

// tanh, accurate also near 0, where 1 - 2 / (e^2x + 1) would cancel. Cephes' polynomial.
inline vec tanh(vec x) {
  const vec size = x < vec{} ? -x : x;
  const vec z = x * x;
  vec p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vec near = p * z * x + x;
  const vec tail = 1.0f - 2.0f / (exp(size < 9.1f ? size + size : all(18.2f)) + 1.0f);
  const vec far = x < vec{} ? -tail : tail;
  return x == x ? (size < 0.625f ? near : far) : x;
}

// Bit i of `bits` keeps lane i; the others become `other`.
inline vec keep(uint32_t bits, vec x, vec other) {
  ivec lane;
  for (int i = 0; i < VEC; ++i) lane[i] = 1 << i;
  return (all((int32_t)bits) & lane) != 0 ? x : other;
}

// Transposes a square block: out[j][i] = in[i][j]. Each stage zips row i with row i + N / 2.
template <class V, std::size_t N>
inline void transpose(V (&x)[N]) {
  static_assert(N == LANES<V>);
#pragma GCC unroll 4
  for (std::size_t stage = 1; stage < N; stage *= 2) {
    V y[N];
#pragma GCC unroll 16
    for (std::size_t i = 0; i < N / 2; ++i) zip(x[i], x[i + N / 2], y[2 * i], y[2 * i + 1]);
    std::memcpy(x, y, sizeof y);
  }
}

}  // namespace chronotope
