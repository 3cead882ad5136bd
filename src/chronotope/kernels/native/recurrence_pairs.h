// Pairs of tokens inside a chunk, and what they do to what is written.
#pragma once

#include "recurrence_weights.h"

namespace chronotope {

// How many panels a strip of queries sees any of, and how many lanes of the last of them.
inline int seen_panels(int64_t strip) { return static_cast<int>(strip * STRIP / VEC) + 1; }
inline int64_t seen_lanes(int64_t strip) { return strip * STRIP % VEC + STRIP; }

// Cells of all pairs of a chunk, [strips][panels][CELL].
struct Cells {
  float* own[MOST_PANELS];
  Cells(const Sizes& s, float* all, int64_t strip) {
    for (int64_t p = 0; p < s.panels; ++p) own[p] = all + (strip * s.panels + p) * CELL;
  }
};

// The bits of the lanes of a panel that come before row i, or are it unless `strict`.
inline uint32_t earlier(int64_t i, int64_t panel, bool strict) {
  const int64_t lanes = std::clamp<int64_t>(i - (strict ? 1 : 0) - panel * VEC + 1, 0, VEC);
  return (1u << lanes) - 1;
}

// The last panel that a strip sees: what comes later becomes 0.
inline void hide_later(int64_t strip, bool strict, float* const* cells) {
  const int last = seen_panels(strip) - 1;
  for (int r = 0; r < STRIP; ++r) {
    float* row = cells[last] + r * VEC;
    store(row, keep(earlier(strip * STRIP + r, last, strict), load(row), vec{}));
  }
}

// cells times what decays leave of each pair, decays being by token or none, and 0 where j is later. What is left of a
// token of an earlier strip is a product, split at the start of this one.
inline void weigh_pairs(const Sizes& s, const Weights& w, int64_t strip, bool strict, float* const* cells) {
  if (w.form == BY_TOKEN) {
    const int last = seen_panels(strip) - 1;
    const int64_t first = strip * STRIP, lane = first % VEC;
    const float* reach = w.reach + strip * s.tokens;
    for (int p = 0; p < last; ++p) {
      const vec lanes = load(reach + p * VEC);
      for (int r = 0; r < STRIP; ++r) store(cells[p] + r * VEC, w.since[first + r] * lanes * load(cells[p] + r * VEC));
    }
    vec row = load(reach + last * VEC);
    for (int r = 0; r < STRIP; ++r) {
      row = keep(1u << (lane + r), all(1.0f), w.kept[first + r] * row);
      store(cells[last] + r * VEC, row * load(cells[last] + r * VEC));
    }
  }
  hide_later(strip, strict, cells);
}

// By channel: sum_d x_id y_jd exp(the decays after j, up to i) for rows R and R + 1 of a strip and all j up to them.
template <int R>
inline void near_rows(const float* x, const float* y, const float* kept, int64_t width, float* low, float* high) {
  vec sums[2 * STRIP] = {};  // of row R, then of row R + 1
  vec* const later = sums + R + 1;
  for (int64_t c = 0; c < width; c += VEC) {
    vec p = load(x + R * width + c), q = load(x + (R + 1) * width + c);
    later[R + 1] += q * load(y + (R + 1) * width + c);
    q *= load(kept + (R + 1) * width + c);
#pragma GCC unroll 8
    for (int j = R; j >= 0; --j) {
      const vec key = load(y + j * width + c), left = load(kept + j * width + c);
      sums[j] += p * key, later[j] += q * key;
      p *= left, q *= left;
    }
  }
  float out[2 * STRIP];
  for (int i = 0; i < 2 * R + 3; i += STRIP) {
    vec some[STRIP];
    for (int j = 0; j < STRIP; ++j) some[j] = sums[i + j];
    fold(some, out + i, [](vec a, vec b) { return a + b; });
  }
  std::copy_n(out, R + 1, low);
  std::copy_n(out + R + 1, R + 2, high);
}

// The same for all rows of a strip, [STRIP][VEC] from the lane of its first token on.
template <int R = 0>
inline void near_pairs(const float* x, const float* y, const float* kept, int64_t width, float* cells) {
  near_rows<R>(x, y, kept, width, cells + R * VEC, cells + (R + 1) * VEC);
  if constexpr (R + 2 < STRIP) near_pairs<R + 2>(x, y, kept, width, cells);
}

// By channel: rows times what is left since the start of their strip, and of the chunk.
inline void follow(const Sizes& s, const Weights& w, const float* rows, float* since, float* grown) {
  for (int64_t strip = 0; strip < s.strips; ++strip)
    for (int64_t c = 0; c < s.key; c += VEC) {
      const vec before = load(w.before + strip * s.key + c);
      vec left = all(1.0f);
      for (int64_t i = strip * STRIP * s.key + c; i < (strip + 1) * STRIP * s.key; i += s.key) {
        left *= load(w.kept + i);
        const vec own = left * load(rows + i);
        store(since + i, own);
        if (grown != nullptr) store(grown + i, before * own);
      }
    }
}

// By channel: keys as panels, each times what is left of it at the end of its strip; `rows` has room for as many.
inline void turn_to_end(const Sizes& s, const Weights& w, const float* keys, float* rows, float* panels) {
  for (int64_t strip = 0; strip < s.strips; ++strip)
    for (int64_t c = 0; c < s.key; c += VEC) {
      vec left = all(1.0f);
      for (int64_t i = ((strip + 1) * STRIP - 1) * s.key + c; i >= strip * STRIP * s.key; i -= s.key) {
        store(rows + i, left * load(keys + i));
        left *= load(w.kept + i);
      }
    }
  turn_rows(rows, s.tokens, s.key, panels);
}

// The keys of earlier strips move from the start of `strip` - 1 to its end, where `strip` starts.
inline void advance(const Sizes& s, const Weights& w, int64_t strip, float* panels) {
  if (strip < 2) return;
  const float* left = w.across + (strip - 1) * s.key;
  const int64_t first = (strip - 1) * STRIP, whole = first / VEC;
  for (int64_t p = 0; p < whole; ++p)
    for (int64_t d = 0; d < s.depth; ++d) {
      float* at = panels + p * s.panel() + d * VEC;
      store(at, left[d] * load(at));
    }
  if (first % VEC == 0) return;
  for (int64_t d = 0; d < s.depth; ++d) {
    float* at = panels + whole * s.panel() + d * VEC;
    store(at, left[d] * load_as<half_vec>(at));
  }
}

// Rows that meet the keys: as they are and, by channel, since the start of their strip. `cells` of all pairs get
// x_i . y_j with what decays leave of it, 0 where j is later than i, or is i with `strict`.
struct Meeting {
  const float *rows, *since;
  bool strict;
  float* cells;
};

inline void meet(const Sizes& s, const Weights& w, const Meeting& own, const float* keys, const float* panels,
                 int64_t strip) {
  const Cells cells(s, own.cells, strip);
  const float *whole[MOST_PANELS], *x = own.rows + strip * STRIP * s.key;
  for (int64_t p = 0; p < s.panels; ++p) whole[p] = panels + p * s.panel();
  const int last = seen_panels(strip) - 1;
  const int64_t first = strip * STRIP, lane = first % VEC;
  if (w.form != BY_CHANNEL) {
    const bool half = seen_lanes(strip) < VEC;
    scores(x, s.key, s.depth, whole, cells.own, last + (half ? 0 : 1), VEC);
    if (half) score_half(x, s.key, s.depth, whole[last], cells.own[last]);
    weigh_pairs(s, w, strip, own.strict, cells.own);
    return;
  }
  const float* since = own.since + first * s.key;
  scores(since, s.key, s.depth, whole, cells.own, last, VEC);
  std::fill(cells.own[last], cells.own[last] + CELL, 0.0f);
  if (lane > 0) score_half(since, s.key, s.depth, whole[last], cells.own[last]);
  near_pairs(x, keys + first * s.key, w.kept + first * s.key, s.key, cells.own[last] + lane);
  if (own.strict) hide_later(strip, true, cells.own);
}

// All pairs of a chunk. `panels` are the keys turned; by channel those of `turn_to_end`, which move to the chunk's end.
template <std::size_t N>
inline void all_pairs(const Sizes& s, const Weights& w, const Meeting (&all)[N], const float* keys, float* panels,
                      Coming& coming) {
  for (int64_t strip = 0; strip < s.strips; ++strip) {
    if (w.form == BY_CHANNEL) advance(s, w, strip, panels);
    for (const Meeting& own : all)
      if (own.cells != nullptr) meet(s, w, own, keys, panels, strip), coming.step();
  }
  if (w.form == BY_CHANNEL) advance(s, w, s.strips, panels);
}

// Adds the cells of a strip times the rows of `table` that they are about.
inline void add_pairs(Sum& sum, const Cells& cells, int64_t strip, const float* table, int64_t width) {
  const int last = seen_panels(strip) - 1;
  for (int p = 0; p <= last; ++p)
    sum.add(cells.own[p], VEC, table + p * VEC * width, p < last ? VEC : seen_lanes(strip));
}

// Inside a strip one row after the other: R - link U, with U = beta R of the rows before.
template <int N>
inline void solve_strip(const float* link, const float* beta, int64_t width, int64_t at, float* rows, float* written) {
  vec u[STRIP][N];
#pragma GCC unroll 8
  for (int r = 0; r < STRIP; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      vec x = load(rows + r * width + at + n * VEC);
#pragma GCC unroll 8
      for (int l = 0; l < r; ++l) x -= link[r * VEC + l] * u[l][n];
      u[r][n] = beta[r] * x;
      store(rows + r * width + at + n * VEC, x);
      store(written + r * width + at + n * VEC, u[r][n]);
    }
}

// The delta rule: `rows` hold v and become R = V - grown S - A U; written becomes U = beta R. A: the cells of `link`;
// grown: exp(b) K.
inline void solve_delta(const Sizes& s, const float* grown, const float* state, const float* beta, float* link,
                        float* rows, float* written, Coming& coming) {
  for (int64_t strip = 0; strip < s.strips; ++strip) {
    const Cells cells(s, link, strip);
    float* right = rows + strip * STRIP * s.value;
    Sum sum;
    sum.add(grown + strip * STRIP * s.key, s.key, state, s.depth);
    const int last = seen_panels(strip) - 1;
    for (int p = 0; p < last; ++p) sum.add(cells.own[p], VEC, written + p * VEC * s.value, VEC);
    const int64_t lane = strip * STRIP % VEC;
    if (lane > 0) sum.add(cells.own[last], VEC, written + last * VEC * s.value, lane);
    sum.each(s.value, [&](int r, int64_t column, vec x) {
      float* at = right + r * s.value + column;
      store(at, load(at) - x);
    });
    float* out = written + strip * STRIP * s.value;
    columns(s.value, [&]<int N>(int64_t at) {
      solve_strip<N>(cells.own[last] + lane, beta + strip * STRIP, s.value, at, right, out);
    });
    coming.step();
  }
}

// to [key][value] = left(channel) * from + the sum over tokens t of lane t of the panels times row t of `written`.
template <class F>
inline void write_over(const Sizes& s, F&& left, const float* panels, const float* written, const float* from,
                       float* to, Coming& coming) {
  for (int64_t d = 0; d < s.key; d += STRIP) {
    Sum sum;
    for (int64_t p = 0; p < s.panels; ++p)
      sum.add(panels + p * s.panel() + d * VEC, VEC, written + p * VEC * s.value, VEC);
    sum.each(s.value, [&](int r, int64_t column, vec x) {
      const int64_t at = (d + r) * s.value + column;
      store(to + at, left(d + r) * load(from + at) + x);
    });
    coming.step();
  }
}

// z = over * z + sum over tokens of the panels, each lane times its factor.
inline void gather_normalizer(const Sizes& s, const Weights& w, const float* panels, const float* factor, float* z) {
  for (int64_t d = 0; d < s.depth; ++d) {
    vec sum = {};
    for (int64_t p = 0; p < s.panels; ++p)
      sum += (factor ? load(factor + p * VEC) : all(1.0f)) * load(panels + p * s.panel() + d * VEC);
    z[d] = w.left(d) * z[d] + chronotope::sum(sum);
  }
}

}  // namespace chronotope
