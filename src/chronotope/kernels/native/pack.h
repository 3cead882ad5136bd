// Reading tokens in the order of the plan, as float32, and writing them back.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>

#include "problem.h"
#include "simd.h"

namespace chronotope {

// Memory aligned to cache lines, which grows and is never initialised.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* take(int64_t count) {
    if (count > size_) {
      std::free(data_);
      size_ = (count + 15) / 16 * 16;
      data_ = static_cast<float*>(std::aligned_alloc(64, 4 * size_));
      if (data_ == nullptr) throw std::bad_alloc();
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

inline float widen(uint16_t bits, bool half) {
  if (half) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return static_cast<float>(x);
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

inline uint16_t narrow(float x, bool half) {
  uint16_t bits;
  if (half) {
    const _Float16 y = static_cast<_Float16>(x);
    std::memcpy(&bits, &y, 2);
    return bits;
  }
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  if (x != x) return static_cast<uint16_t>((wide >> 16) | 0x40);
  return static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);  // to the nearest, ties to even
}

inline int64_t offset(const Tensor& x, int64_t batch, int64_t head, int64_t token) {
  return batch * x.batch + head * x.head + token * x.token;
}

inline void scaled(const float* x, int64_t size, float scale, float* out) {
  int64_t i = 0;
  for (; i + VEC <= size; i += VEC) store(out + i, scale * load(x + i));
  for (; i < size; ++i) out[i] = scale * x[i];
}

// out[i] = scale * x[token][i], zeros up to `width`; all zeros for token -1.
inline void read(const Tensor& x, int64_t type, int64_t batch, int64_t head, int64_t token, int64_t size, float scale,
                 int64_t width, float* out) {
  if (token < 0) {
    std::fill(out, out + width, 0.0f);
    return;
  }
  const int64_t at = offset(x, batch, head, token);
  if (type == FLOAT) {
    const float* row = static_cast<const float*>(x.data) + at;
    scaled(row, size, scale, out);
  } else {
    const uint16_t* row = static_cast<const uint16_t*>(x.data) + at;
    for (int64_t i = 0; i < size; ++i) out[i] = scale * widen(row[i], type == HALF);
  }
  if (size < width) std::fill(out + size, out + width, 0.0f);
}

// x[token][i] = scale * row[i].
inline void write(const Tensor& x, int64_t type, int64_t batch, int64_t head, int64_t token, int64_t size, float scale,
                  const float* row) {
  const int64_t at = offset(x, batch, head, token);
  if (type == FLOAT) {
    scaled(row, size, scale, static_cast<float*>(x.data) + at);
  } else {
    uint16_t* out = static_cast<uint16_t*>(x.data) + at;
    for (int64_t i = 0; i < size; ++i) out[i] = narrow(scale * row[i], type == HALF);
  }
}

// Rows of some tile: row i is token source[i] (zeros where -1), `width` numbers each.
struct Run {
  const int32_t* source;
  int64_t count;
  float* rows;
};

// Calls f(run, row) row by row, row i of every run before row i + 1 of any: for an axis that is strided in memory, row i
// of neighbouring tiles are neighbours in memory. Jumps defeat the processor's own prefetching, so it is told ahead.
template <bool WRITES, class F>
inline void each_row(const Tensor& x, int64_t type, int64_t batch, int64_t head, const Run* runs, int64_t count,
                     int64_t size, F&& f) {
  constexpr int64_t AHEAD = 8, LINE = 64;
  const int64_t bytes = type == FLOAT ? 4 : 2;
  int64_t longest = 0;
  for (int64_t i = 0; i < count; ++i) longest = std::max(longest, runs[i].count);
  int64_t next_row = 0, next_run = 0;
  const auto announce = [&] {
    if (next_row >= longest) return;
    const Run& run = runs[next_run];
    const int64_t token = next_row < run.count ? run.source[next_row] : -1;
    if (token >= 0) {
      const char* at = static_cast<const char*>(x.data) + bytes * offset(x, batch, head, token);
      for (int64_t i = 0; i < bytes * size; i += LINE) __builtin_prefetch(at + i, WRITES, 3);
    }
    if (++next_run == count) next_run = 0, ++next_row;
  };
  for (int64_t i = 0; i < AHEAD; ++i) announce();
  for (int64_t row = 0; row < longest; ++row)
    for (int64_t i = 0; i < count; ++i) {
      announce();
      if (row < runs[i].count) f(runs[i], row);
    }
}

// Reads the runs.
inline void gather(const Tensor& x, int64_t type, int64_t batch, int64_t head, const Run* runs, int64_t count,
                   int64_t size, float scale, int64_t width) {
  each_row<false>(x, type, batch, head, runs, count, size, [&](const Run& run, int64_t row) {
    read(x, type, batch, head, run.source[row], size, scale, width, run.rows + row * width);
  });
}

// Writes the runs; nothing for token -1.
inline void scatter(const Tensor& x, int64_t type, int64_t batch, int64_t head, const Run* runs, int64_t count,
                    int64_t size, float scale, int64_t width) {
  each_row<true>(x, type, batch, head, runs, count, size, [&](const Run& run, int64_t row) {
    if (run.source[row] >= 0) write(x, type, batch, head, run.source[row], size, scale, run.rows + row * width);
  });
}

// VEC rows of `width` numbers as a panel [size][VEC]; width is a multiple of VEC.
inline void turn(const float* rows, int64_t width, int64_t size, float* panel) {
  for (int64_t d = 0; d < size; d += VEC) {
    vec block[VEC];
    for (int i = 0; i < VEC; ++i) block[i] = load(rows + i * width + d);
    transpose(block);
    for (int64_t i = 0; i < std::min<int64_t>(VEC, size - d); ++i) store(panel + (d + i) * VEC, block[i]);
  }
}

// Slots [from, to), whole panels, as panels [size][VEC] one after the other; `rows` has room for VEC rows.
inline void pack_panels(const Tensor& x, int64_t type, int64_t batch, int64_t head, const int32_t* source, int64_t from,
                        int64_t to, int64_t size, float* rows, float* out) {
  const int64_t width = round_up(size, VEC);
  for (int64_t slot = from; slot < to; slot += VEC, out += size * VEC) {
    const Run run{source + slot, VEC, rows};
    gather(x, type, batch, head, &run, 1, size, 1.0f, width);
    turn(rows, width, size, out);
  }
}

}  // namespace chronotope
