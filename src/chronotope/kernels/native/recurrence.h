// One call of a recurrence, as Python describes it (`recurrences/native.py` has the same structure; keep them equal), and
// one chunk of it.
#pragma once

#include <cmath>

#include "pack.h"
#include "product.h"

namespace chronotope {

// [batch, head, token]; strides count numbers.
struct Scalars {
  float* data;
  int64_t batch, head, token;

  float at(int64_t b, int64_t h, int64_t t) const { return data[b * batch + h * head + t * token]; }
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
  float *ddecay, *dbeta;  // [batch, heads, tokens]
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

// What decays do inside a chunk, b being their running sum: exp(b), exp(end - b), exp(end).
struct Weights {
  bool any;
  double b[MOST_CHUNK];
  float grown[MOST_CHUNK], rest[MOST_CHUNK], over;
};

// Which of some head's tokens are in a chunk.
struct Place {
  int64_t batch, head, from, count;
};

inline void weigh_decays(const Recurrence& r, const Place& at, int64_t tokens, Weights& w) {
  w.any = r.decay.data != nullptr;
  w.over = 1.0f;
  if (!w.any) {
    std::fill(w.grown, w.grown + tokens, 1.0f);
    std::fill(w.rest, w.rest + tokens, 1.0f);
    return;
  }
  double sum = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    if (i < at.count) sum += r.decay.at(at.batch, at.head, at.from + i);
    w.b[i] = sum;
  }
  float exponent[MOST_CHUNK + VEC];
  for (int64_t i = 0; i < tokens; ++i) exponent[i] = static_cast<float>(w.b[i]);
  for (int64_t i = 0; i < tokens; i += VEC) store(w.grown + i, exp(load(exponent + i)));
  for (int64_t i = 0; i < tokens; ++i) exponent[i] = static_cast<float>(sum - w.b[i]);
  for (int64_t i = 0; i < tokens; i += VEC) store(w.rest + i, exp(load(exponent + i)));
  w.over = std::exp(static_cast<float>(sum));
}

// Rows [tokens][width] of a chunk; zeros beyond its last token.
inline void read_rows(const Tensor& x, const Place& at, int64_t size, int64_t width, int64_t tokens, float* out) {
  for (int64_t i = 0; i < at.count; ++i)
    read(x, FLOAT, at.batch, at.head, at.from + i, size, 1.0f, width, out + i * width);
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

// One strip of rows as cells [width / VEC][STRIP][VEC], each row times its factor.
inline void as_cells(const float* rows, int64_t width, const float* factor, float sign, float* cells) {
  for (int64_t c = 0; c < width; c += VEC, cells += CELL)
    for (int i = 0; i < STRIP; ++i) store(cells + i * VEC, sign * factor[i] * load(rows + i * width + c));
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
inline void through(const float* rows, int64_t depth, int64_t row_width, const float* factor, float sign,
                    const float* table, int64_t width, float* memory, float* out) {
  as_cells(rows, row_width, factor, sign, memory);
  Sum sum;
  for (int64_t d = 0; d < depth; d += VEC)
    sum.add(memory + d / VEC * CELL, table + d * width, static_cast<int>(std::min<int64_t>(VEC, depth - d)));
  sum.into(width, out);
}

// table [key][width] += sum over tokens of column t of the panels, times its factor, times row t of `tokens`.
// The panels are scaled in place.
inline void gather_state(float* panels, const Sizes& s, const float* factor, const float* tokens, int64_t width,
                         float* table) {
  for (int64_t p = 0; p < s.panels; ++p) {
    const vec scale = load(factor + p * VEC);
    float* panel = panels + p * s.panel();
    for (int64_t d = 0; d < s.key; ++d) store(panel + d * VEC, scale * load(panel + d * VEC));
  }
  for (int64_t d = 0; d < s.key; d += STRIP) {
    Sum sum;
    for (int64_t p = 0; p < s.panels; ++p) sum.add(panels + p * s.panel() + d * VEC, tokens + p * VEC * width, VEC);
    sum.into(width, table + d * width);
  }
}

// How many panels a strip of queries sees any of.
inline int seen_panels(int64_t strip) { return static_cast<int>(strip * STRIP / VEC) + 1; }

// exp(b_i - b_j) for the rows of a strip and the lanes of a panel; 0 where j > i, or j >= i with `strict`.
inline void pair_weights(const Weights& w, int64_t strip, int64_t panel, bool strict, float* out) {
  const int64_t first = strip * STRIP, key = panel * VEC;
  const int64_t shift = strict ? 1 : 0;
  for (int r = 0; r < STRIP; ++r) {
    const int64_t i = first + r;
    const uint32_t lanes = static_cast<uint32_t>(std::clamp<int64_t>(i - shift - key + 1, 0, VEC));
    const uint32_t bits = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    vec weight = all(1.0f);
    if (w.any) {
      float gap[VEC];
      for (int l = 0; l < VEC; ++l) gap[l] = static_cast<float>(std::min(w.b[i] - w.b[key + l], 0.0));
      weight = exp(load(gap));
    }
    store(out + r * VEC, keep(bits, weight, vec{}));
  }
}

// cells[p] *= exp(b_i - b_j) for the panels that a strip sees. Between a strip and panels that end before it, the
// exponent is split at the token before the strip, so that both parts are sums of decays.
inline void weigh_pairs(const Weights& w, int64_t strip, bool strict, float* const* cells) {
  const int count = seen_panels(strip);
  const int64_t first = strip * STRIP;
  float rows[STRIP];
  if (w.any && count > 1)
    for (int r = 0; r < STRIP; ++r) rows[r] = std::exp(static_cast<float>(w.b[first + r] - w.b[first - 1]));
  for (int p = 0; p + 1 < count && w.any; ++p) {
    float gap[VEC];
    for (int l = 0; l < VEC; ++l) gap[l] = static_cast<float>(w.b[first - 1] - w.b[p * VEC + l]);
    const vec lanes = exp(load(gap));
    for (int r = 0; r < STRIP; ++r) store(cells[p] + r * VEC, rows[r] * lanes * load(cells[p] + r * VEC));
  }
  float last[CELL];
  pair_weights(w, strip, count - 1, strict, last);
  for (int r = 0; r < STRIP; ++r)
    store(cells[count - 1] + r * VEC, load(last + r * VEC) * load(cells[count - 1] + r * VEC));
}

// cells[p] = (rows of a strip . keys of panel p) * exp(b_i - b_j), for the panels that the strip sees.
inline void paired(const Sizes& s, const Weights& w, const float* rows, const float* panels, int64_t strip, bool strict,
                   float* const* cells) {
  const float* own[MOST_PANELS];
  const int count = seen_panels(strip);
  for (int p = 0; p < count; ++p) own[p] = panels + p * s.panel();
  scores(rows, s.key, s.depth, own, cells, count, VEC);
  weigh_pairs(w, strip, strict, cells);
}

// The delta rule: rows hold v and become R = V - exp(b) K S - A U; written becomes U = beta R. A = link, its cells kept.
struct Delta {
  float* link;  // [strips][panels][CELL]
  float* written;
  const float* beta;

  float* cell(const Sizes& s, int64_t strip, int64_t panel) const { return link + (strip * s.panels + panel) * CELL; }
};

inline void solve_delta(const Sizes& s, const Weights& w, const float* k, const float* panels, const float* state,
                        const Delta& delta, float* rows, float* memory) {
  for (int64_t strip = 0; strip < s.strips; ++strip) {
    const int count = seen_panels(strip);
    float* cells[MOST_PANELS];
    for (int p = 0; p < count; ++p) cells[p] = delta.cell(s, strip, p);
    const float* own = k + strip * STRIP * s.key;
    paired(s, w, own, panels, strip, true, cells);
    float* right = rows + strip * STRIP * s.value;
    through(own, s.depth, s.key, w.grown + strip * STRIP, -1.0f, state, s.value, memory, right);
    Sum before;
    for (int p = 0; p < count; ++p) {
      const int lanes = static_cast<int>(std::min<int64_t>(VEC, strip * STRIP - p * VEC));
      if (lanes <= 0) continue;
      float* negative = memory + before.count * CELL;
      for (int r = 0; r < STRIP; ++r) store(negative + r * VEC, -load(cells[p] + r * VEC));
      before.add(negative, delta.written + p * VEC * s.value, lanes);
    }
    if (before.count > 0) before.into(s.value, right);
    // Inside the strip one row after the other.
    const float* last = cells[count - 1] + strip * STRIP % VEC;
    float* out = delta.written + strip * STRIP * s.value;
    for (int r = 0; r < STRIP; ++r)
      for (int64_t c = 0; c < s.value; c += VEC) {
        vec x = load(right + r * s.value + c);
        for (int l = 0; l < r; ++l) x -= last[r * VEC + l] * load(out + l * s.value + c);
        store(right + r * s.value + c, x);
        store(out + r * s.value + c, delta.beta[strip * STRIP + r] * x);
      }
  }
}

inline void read_beta(const Recurrence& r, const Place& at, int64_t tokens, float* out) {
  for (int64_t i = 0; i < tokens; ++i) out[i] = i < at.count ? r.beta.at(at.batch, at.head, at.from + i) : 0.0f;
}

// z = over * z + sum over tokens of the panels, which are scaled to the end of the chunk already.
inline void gather_normalizer(const Sizes& s, const float* panels, float over, float* z) {
  for (int64_t d = 0; d < s.depth; ++d) {
    vec sum = {};
    for (int64_t p = 0; p < s.panels; ++p) sum += load(panels + p * s.panel() + d * VEC);
    z[d] = over * z[d] + chronotope::sum(sum);
  }
}

// State [key][value] from and to [depth][value_depth] without padding.
inline void read_state(const Recurrence& r, const Sizes& s, const float* from, float* to) {
  std::fill(to, to + s.state(), 0.0f);
  for (int64_t d = 0; d < r.depth; ++d) std::copy_n(from + d * r.value_depth, r.value_depth, to + d * s.value);
}

inline void write_state(const Recurrence& r, const Sizes& s, const float* from, float* to) {
  for (int64_t d = 0; d < r.depth; ++d) std::copy_n(from + d * s.value, r.value_depth, to + d * r.value_depth);
}

inline void shrink(float* x, int64_t count, float factor) {
  for (int64_t i = 0; i < count; i += VEC) store(x + i, factor * load(x + i));
}

}  // namespace chronotope

extern "C" {
int64_t chronotope_recurrence_size();
int chronotope_recurrence_forward(const chronotope::Recurrence* r);
int chronotope_recurrence_backward(const chronotope::Recurrence* r);
}
