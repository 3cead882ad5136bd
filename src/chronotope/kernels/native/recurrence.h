// One call of a recurrence, as Python describes it (`recurrences/native.py` has the same structure; keep them equal), and
// one chunk of it.
#pragma once

#include <cmath>

#include "pack.h"
#include "product.h"

namespace chronotope {

// [batch, head, token]; strides count numbers. `channels`: the numbers of a token, which lie side by side.
struct Scalars {
  float* data;
  int64_t batch, head, token, channels;

  const float* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

// Everything is float32. States are contiguous, [batch, heads, depth(, value_depth)].
struct Recurrence {
  int64_t batch, heads, tokens, depth, value_depth, chunk;
  Tensor q, k, v, out;
  Scalars decay, beta;  // data null: nothing decays; no delta rule
  const float* memory;
  float* memory_after;
  const float* normalizer;  // null: none
  float *normalizer_after, *total;  // total [batch, heads, tokens]
  // Backward only.
  Tensor dout, dq, dk, dv;
  const float *dtotal, *dmemory_after, *dnormalizer_after;
  float *ddecay, *dbeta;  // [batch, heads, tokens(, channels)]
  float *dmemory, *dnormalizer;
};

constexpr int MOST_CHUNK = 128, MOST_CELLS = 64;
constexpr int MOST_PANELS = MOST_CHUNK / VEC, MOST_STRIPS = MOST_CHUNK / STRIP;

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
  for (int64_t i = 0; i < at.count; ++i)
    read(x, FLOAT, at.batch, at.head, at.from + i, size, width, out + i * width);
  std::fill(out + at.count * width, out + tokens * width, 0.0f);
}

inline void write_rows(const Tensor& x, const Place& at, int64_t size, int64_t width, const float* rows) {
  for (int64_t i = 0; i < at.count; ++i)
    write(x, FLOAT, at.batch, at.head, at.from + i, size, 1.0f, rows + i * width);
}

// Rows as panels [width][VEC], lanes being rows; `rows` is a multiple of VEC.
inline void turn_rows(const float* rows, int64_t count, int64_t width, float* panels) {
  for (int64_t i = 0; i < count; i += VEC) turn(rows + i * width, width, width, panels + i * width);
}

// What rows are multiplied by: one number for each, or one for each channel; null: nothing.
struct Factor {
  const float* values;
  int64_t width;  // of a row of factors; 0: one number

  Factor from(int64_t row) const { return {values ? values + (width ? row * width : row) : nullptr, width}; }
  vec at(int64_t row, int64_t column) const {
    if (values == nullptr) return all(1.0f);
    return width ? load(values + row * width + column) : all(values[row]);
  }
};

// One strip of rows as cells [width / VEC][STRIP][VEC], times their factors.
inline void as_cells(const float* rows, int64_t width, const Factor& factor, float sign, float* cells) {
  for (int64_t c = 0; c < width; c += VEC, cells += CELL)
    for (int i = 0; i < STRIP; ++i) store(cells + i * VEC, sign * factor.at(i, c) * load(rows + i * width + c));
}

// A sum of cells times tables, over at most MOST_CELLS of them.
struct Sum {
  const float *cells[MOST_CELLS], *tables[MOST_CELLS];
  int lanes[MOST_CELLS];
  int count = 0;

  void add(const float* cell, const float* table, int lanes_used) {
    cells[count] = cell, tables[count] = table, lanes[count++] = lanes_used;
  }
  // out [STRIP][width] += the sum; rows of the tables are `width` apart too.
  void into(int64_t width, float* out) const {
    columns(width, [&]<int N>(int64_t at) { weigh<N>(cells, tables, lanes, count, width, width, at, out); });
  }
};

// out [STRIP][width] += sign * factor * rows [STRIP][depth] times a table [depth][width]; `memory` holds the cells.
inline void through(const float* rows, int64_t depth, int64_t row_width, const Factor& factor, float sign,
                    const float* table, int64_t width, float* memory, float* out) {
  as_cells(rows, row_width, factor, sign, memory);
  Sum sum;
  for (int64_t d = 0; d < depth; d += VEC)
    sum.add(memory + d / VEC * CELL, table + d * width, static_cast<int>(std::min<int64_t>(VEC, depth - d)));
  sum.into(width, out);
}

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
  for (int64_t i = 0; i < s.tokens; ++i)
    for (int64_t c = 0; c < s.key; c += VEC)
      store(scaled_rows + i * s.key + c, factor.at(i, c) * load(rows + i * s.key + c));
  turn_rows(scaled_rows, s.tokens, s.key, out);
  return out;
}

// table [key][width] += sum over tokens t of lane t of the panels, times row t of `tokens`.
inline void gather_state(const float* panels, const Sizes& s, const float* tokens, int64_t width, float* table) {
  for (int64_t d = 0; d < s.key; d += STRIP) {
    Sum sum;
    for (int64_t p = 0; p < s.panels; ++p) sum.add(panels + p * s.panel() + d * VEC, tokens + p * VEC * width, VEC);
    sum.into(width, table + d * width);
  }
}

// The rows of a chunk that comes later, on their way to the cache.
inline void announce(const Tensor& x, const Place& at, int64_t size) {
  constexpr int64_t LINE = 16;
  for (int64_t i = 0; i < at.count; ++i) {
    const float* row = static_cast<const float*>(x.data) + offset(x, at.batch, at.head, at.from + i);
    for (int64_t c = 0; c < size; c += LINE) __builtin_prefetch(row + c, 0, 2);
  }
}

inline void read_beta(const Recurrence& r, const Place& at, int64_t tokens, float* out) {
  for (int64_t i = 0; i < tokens; ++i) out[i] = i < at.count ? *r.beta.at(at.batch, at.head, at.from + i) : 0.0f;
}

// State [key][value] from and to [depth][value_depth] without padding.
inline void read_state(const Recurrence& r, const Sizes& s, const float* from, float* to) {
  std::fill(to, to + s.state(), 0.0f);
  for (int64_t d = 0; d < r.depth; ++d) std::copy_n(from + d * r.value_depth, r.value_depth, to + d * s.value);
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
