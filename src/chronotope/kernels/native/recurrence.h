// One call of a recurrence, as Python describes it (`recurrences/native.py` has the same structure; keep them equal),
// and one chunk of it.
#pragma once

#include <cmath>

#include "pack.h"
#include "product.h"

namespace chronotope {

// [batch, head, token]; strides count numbers. `channels`: the numbers of a token, which lie side by side.
struct Scalars {
  float* data;
  int64_t batch, head, token, channels;

  float* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

// The state before the first token, [batch, head, row, column]; strides may be 0.
struct Start {
  const float* data;
  int64_t batch, head, row, column;
};

// Everything is float32. Other states are contiguous, [batch, heads, depth(, value_depth)].
struct Recurrence {
  int64_t batch, heads, tokens, depth, value_depth, chunk;
  Tensor q, k, v, out;
  Scalars decay, beta;  // data null: nothing decays; no delta rule
  Start memory;
  float* memory_after;
  const float* normalizer;  // null: none
  float *normalizer_after, *total;  // total [batch, heads, tokens]
  // Backward only.
  Tensor dout, dq, dk, dv;
  const float *dtotal, *dmemory_after, *dnormalizer_after;
  Scalars ddecay;
  float* dbeta;  // [batch, heads, tokens]
  float *dmemory, *dnormalizer;
};

constexpr int MOST_CHUNK = 128, MOST_CELLS = 64;
constexpr int MOST_PANELS = MOST_CHUNK / VEC, MOST_STRIPS = MOST_CHUNK / STRIP, MOST_PARTS = MOST_PANELS + 1;
static_assert(VEC == STRIP || HALF_VEC == STRIP);

// Sizes in memory: rows of q and k are `key` wide, rows of v `value`; a state has `key` rows of v's width.
struct Sizes {
  int64_t depth, key, value, tokens, panels, strips;

  explicit Sizes(const Recurrence& r)
      : depth(r.depth),
        key(round_up(r.depth, VEC)),
        value(round_up(r.value_depth, VEC)),
        tokens(round_up(std::min(r.chunk, r.tokens), VEC)),
        panels(tokens / VEC),
        strips(tokens / STRIP) {}
  int64_t panel() const { return key * VEC; }
  int64_t state() const { return key * value; }
};

// Which of some head's tokens are in a chunk.
struct Place {
  int64_t batch, head, from, count;
};

// Rows [tokens][width] of a chunk; zeros beyond its last token.
inline void read_rows(const Tensor& x, const Place& at, int64_t size, int64_t width, int64_t tokens, float* out) {
  for (int64_t i = 0; i < at.count; ++i, out += width) {
    std::copy_n(static_cast<const float*>(x.data) + offset(x, at.batch, at.head, at.from + i), size, out);
    std::fill(out + size, out + width, 0.0f);
  }
  std::fill(out, out + (tokens - at.count) * width, 0.0f);
}

inline void write_rows(const Tensor& x, const Place& at, int64_t size, int64_t width, const float* rows) {
  for (int64_t i = 0; i < at.count; ++i)
    write(x, FLOAT, at.batch, at.head, at.from + i, size, 1.0f, rows + i * width);
}

// The rows where they are, if a chunk is whole and they lie one after the other without padding; else copied to `room`.
inline const float* rows_of(const Tensor& x, const Place& at, int64_t size, int64_t width, int64_t tokens,
                            float* room) {
  if (at.count == tokens && size == width && x.token == width)
    return static_cast<const float*>(x.data) + offset(x, at.batch, at.head, at.from);
  read_rows(x, at, size, width, tokens, room);
  return room;
}

// Rows as panels [width][VEC], lanes being rows; `rows` is a multiple of VEC.
inline void turn_rows(const float* rows, int64_t count, int64_t width, float* panels) {
  for (int64_t i = 0; i < count; i += VEC) turn(rows + i * width, width, width, panels + i * width);
}

// What rows are multiplied by: one number for each, or one for each channel; null: nothing.
struct Factor {
  const float* values;
  int64_t width;  // of a row of factors; 0: one number

  // Rows of `size` numbers from row `from` on, times their factors.
  void apply(const float* rows, int64_t from, int64_t count, int64_t size, float* out) const {
    for (int64_t i = from; i < from + count; ++i, rows += size, out += size) {
      if (values == nullptr)
        std::copy_n(rows, size, out);
      else if (width == 0)
        for (int64_t c = 0; c < size; c += VEC) store(out + c, values[i] * load(rows + c));
      else
        for (int64_t c = 0; c < size; c += VEC) store(out + c, load(values + i * width + c) * load(rows + c));
    }
  }
  vec at(int64_t row, int64_t column) const {
    if (values == nullptr) return all(1.0f);
    return width ? load(values + row * width + column) : all(values[row]);
  }
};

// Rows of numbers [STRIP][lanes], `apart` apart, that weigh the rows of a table.
struct Part {
  const float* rows;
  int64_t apart, lanes;
  const float* table;
};

// result(r, column, sum over parts and lanes of rows[r][lane] * table[lane][column]), N vectors of columns from `at`
// on. A function of its own: inside a large one GCC keeps some of the sums in memory.
template <int N, class F>
[[gnu::noinline]] void weigh_parts(const Part* parts, int count, int64_t width, int64_t at, F&& result) {
  vec sum[STRIP][N] = {};
  for (int p = 0; p < count; ++p) {
    const int64_t apart = parts[p].apart;
    const float *low = parts[p].rows, *high = low + STRIP / 2 * apart, *table = parts[p].table + at;
    for (int64_t lane = 0; lane < parts[p].lanes; ++lane) {
      vec y[N];
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) y[c] = load(table + lane * width + c * VEC);
#pragma GCC unroll 8
      for (int r = 0; r < STRIP; ++r) {
        const float x = (r < STRIP / 2 ? low : high)[r % (STRIP / 2) * apart + lane];
#pragma GCC unroll 4
        for (int c = 0; c < N; ++c) sum[r][c] += x * y[c];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < STRIP; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < N; ++c) result(r, at + c * VEC, sum[r][c]);
}

// A sum of products of rows and tables, whose rows are as wide as the result.
struct Sum {
  Part parts[MOST_PARTS];
  int count = 0;

  void add(const float* rows, int64_t apart, const float* table, int64_t lanes) {
    parts[count++] = {rows, apart, lanes, table};
  }
  template <class F>
  void each(int64_t width, F&& result) const {
    columns(width, [&]<int N>(int64_t at) { weigh_parts<N>(parts, count, width, at, result); });
  }
  // out [STRIP][width] += the sum.
  void into(int64_t width, float* out) const {
    each(width, [&](int r, int64_t column, vec sum) { chronotope::add(out + r * width + column, sum); });
  }
};

// Rows times their factors as panels; `panels` are the rows as they are, turned. Without decays these are the answer.
inline const float* scaled_panels(const float* rows, const float* panels, const Sizes& s, const Factor& factor,
                                  float* scaled_rows, float* out) {
  if (factor.values == nullptr) return panels;
  if (factor.width == 0) {
    for (int64_t p = 0; p < s.panels; ++p) {
      const vec lanes = load(factor.values + p * VEC);
      for (int64_t i = p * s.panel(); i < (p + 1) * s.panel(); i += VEC) store(out + i, lanes * load(panels + i));
    }
    return out;
  }
  factor.apply(rows, 0, s.tokens, s.key, scaled_rows);
  turn_rows(scaled_rows, s.tokens, s.key, out);
  return out;
}

// Sums in double precision.
typedef double doubles __attribute__((vector_size(8 * HALF_VEC)));

inline doubles widened(const float* x) { return __builtin_convertvector(load_as<half_vec>(x), doubles); }

inline doubles load(const double* p) {
  doubles out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

inline void store(double* p, doubles x) { std::memcpy(p, &x, sizeof x); }

inline double total(doubles x) {
  double out = 0;
  for (int i = 0; i < HALF_VEC; ++i) out += x[i];
  return out;
}

// `size` is whole vectors.
inline double dot(const float* x, const float* y, int64_t size) {
  doubles low = {}, high = {};
  for (int64_t i = 0; i < size; i += VEC) {
    low += widened(x + i) * widened(y + i);
    high += widened(x + i + HALF_VEC) * widened(y + i + HALF_VEC);
  }
  return total(low + high);
}

// The rows of a chunk that comes later, on their way to the cache: in equal shares, because a processor waits for few
// lines at once and stops where there are more.
class Coming {
 public:
  explicit Coming(const Place& at = {}) : at_(at) {}
  void add(const Tensor& x, int64_t size) {
    add(static_cast<const float*>(x.data) + offset(x, at_.batch, at_.head, at_.from), x.token, size);
  }
  void add(const Scalars& x) {
    if (x.data != nullptr) add(x.at(at_.batch, at_.head, at_.from), x.token, x.channels);
  }
  // Call before the first of so many steps.
  void divide(int64_t steps) { share_ = (total_ + steps - 1) / steps; }
  void step() {
    for (int64_t left = share_; left > 0 && now_ < count_; --left) {
      const Block& block = blocks_[now_];
      __builtin_prefetch(block.rows + row_ * block.apart + column_, 0, 2);
      column_ += LINE;
      if (column_ < block.size) continue;
      column_ = 0;
      if (++row_ == at_.count) row_ = 0, ++now_;
    }
  }

 private:
  static constexpr int64_t LINE = 16;
  struct Block {
    const float* rows;
    int64_t apart, size;
  };

  void add(const float* rows, int64_t apart, int64_t size) {
    if (at_.count <= 0) return;
    blocks_[count_++] = {rows, apart, size};
    total_ += at_.count * ((size + LINE - 1) / LINE);
  }

  Place at_;
  Block blocks_[5];
  int count_ = 0, now_ = 0;
  int64_t total_ = 0, share_ = 0, row_ = 0, column_ = 0;
};

inline void read_beta(const Recurrence& r, const Place& at, int64_t tokens, float* out) {
  for (int64_t i = 0; i < tokens; ++i) out[i] = i < at.count ? *r.beta.at(at.batch, at.head, at.from + i) : 0.0f;
}

// State [key][value] from and to [depth][value_depth] without padding.
inline void read_state(const Recurrence& r, const Sizes& s, const float* from, int64_t row, int64_t column, float* to) {
  std::fill(to, to + s.state(), 0.0f);
  for (int64_t d = 0; d < r.depth; ++d, from += row, to += s.value) {
    if (column == 1)
      std::copy_n(from, r.value_depth, to);
    else if (column == 0)
      std::fill_n(to, r.value_depth, *from);
    else
      for (int64_t e = 0; e < r.value_depth; ++e) to[e] = from[e * column];
  }
}

inline void read_start(const Recurrence& r, const Sizes& s, int64_t task, float* to) {
  const float* from = r.memory.data + task / r.heads * r.memory.batch + task % r.heads * r.memory.head;
  read_state(r, s, from, r.memory.row, r.memory.column, to);
}

inline void write_state(const Recurrence& r, const Sizes& s, const float* from, float* to) {
  for (int64_t d = 0; d < r.depth; ++d) std::copy_n(from + d * s.value, r.value_depth, to + d * r.value_depth);
}

}  // namespace chronotope

extern "C" {
int64_t chronotope_recurrence_size();
int chronotope_recurrence_forward(const chronotope::Recurrence* r);
int chronotope_recurrence_backward(const chronotope::Recurrence* r);
}
