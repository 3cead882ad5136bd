// Vectors of floats by the compiler's vector extensions, which GCC and Clang lower to whatever the machine has.
#pragma once

#include <cstdint>
#include <cstring>

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

inline vec load(const float* p) {
  vec out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

inline ivec load(const int32_t* p) {
  ivec out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

inline void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }

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
inline void zip(vec a, vec b, vec& low, vec& high) {
#if defined(__clang__)
  for (int i = 0; i < VEC; ++i) {
    low[i] = i % 2 ? b[i / 2] : a[i / 2];
    high[i] = i % 2 ? b[VEC / 2 + i / 2] : a[VEC / 2 + i / 2];
  }
#else
  ivec first;
  for (int i = 0; i < VEC; ++i) first[i] = i / 2 + (i % 2) * VEC;
  low = __builtin_shuffle(a, b, first);
  high = __builtin_shuffle(a, b, first + VEC / 2);
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
inline vec exp(vec x) {
  const vec low = all(-87.0f), magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec y = x < low ? low : x;
  const vec shifted = y * 1.44269504f + magic;
  const vec n = shifted - magic;
  vec r = y - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vec out = (vec)((ivec)p + ((ivec)shifted << 23));
  return x == x ? (x < low ? vec{} : out) : x;
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

// Transposes a VEC x VEC block: out[j][i] = in[i][j]. Each stage zips row i with row i + VEC / 2.
inline void transpose(vec (&x)[VEC]) {
  for (int stage = 1; stage < VEC; stage *= 2) {
    vec y[VEC];
#pragma GCC unroll 16
    for (int i = 0; i < VEC / 2; ++i) zip(x[i], x[i + VEC / 2], y[2 * i], y[2 * i + 1]);
    std::memcpy(x, y, sizeof y);
  }
}

}  // namespace chronotope
