// Gradients of the pairs of a chunk, and of what decays leave of them.
#pragma once

#include "recurrence_pairs.h"

namespace chronotope {

struct BackwardWork {
  Scratch memory, exact, states, rights;
  float beta[MOST_CHUNK], dtotal[MOST_CHUNK], ones[MOST_CHUNK];
  double* db;  // as Weights::b
  Weights weights;
  Coming coming;
};

inline BackwardWork& backward_work() {
  static thread_local BackwardWork own;
  return own;
}

// Where everything of one chunk lies.
struct BackwardMemory {
  float *q, *k, *dq, *dk, *spare, *x_part, *y_part, *moving, *grown;  // rows of `key`
  float *written, *dout, *du, *negative;                              // rows of `value`; negative is -dR
  float *k_panels, *q_panels, *turned;                                // lanes are tokens
  float* written_panels;                                              // lanes are tokens
  float *state_panels, *dstate_panels;                                // lanes are key channels
  float *p, *g, *a, *h, *cells;                                       // cells: of all pairs, and of one strip
  float *dstate, *dz;

  BackwardMemory(const Sizes& s, BackwardWork& w) {
    const int64_t rows = s.tokens * s.key, values = s.tokens * s.value, pairs = s.strips * s.panels * CELL;
    const int64_t strip = (s.panels + s.key / VEC) * CELL;
    float* at = w.memory.take(12 * rows + 5 * values + 3 * s.state() + 4 * pairs + strip + s.key);
    for (float** x : {&q, &k, &dq, &dk, &spare, &x_part, &y_part, &moving, &grown, &k_panels, &q_panels, &turned})
      *x = at, at += rows;
    for (float** x : {&written, &dout, &du, &negative, &written_panels}) *x = at, at += values;
    for (float** x : {&state_panels, &dstate_panels, &dstate}) *x = at, at += s.state();
    for (float** x : {&p, &g, &a, &h}) *x = at, at += pairs;
    cells = at, at += strip;
    dz = at;
  }
};

// out [STRIP][width] += cells of this strip times rows of `table`; those of earlier strips only, if `before`.
inline void times_rows(const Cells& cells, int64_t strip, bool before, const float* table, int64_t width, float* out) {
  Sum sum;
  const int last = seen_panels(strip) - 1;
  for (int p = 0; p < last; ++p) sum.add(cells.own[p], VEC, table + p * VEC * width, VEC);
  const int64_t lanes = seen_lanes(strip) - (before ? STRIP : 0);
  if (lanes > 0) sum.add(cells.own[last], VEC, table + last * VEC * width, lanes);
  sum.into(width, out);
}

// out [STRIP][width] += transposed cells of the strips from `first` to `last`, in the columns of `strip`, times their
// rows.
inline void times_columns(const Sizes& s, const float* cells, int64_t strip, int64_t first, int64_t last,
                          const float* table, int64_t width, float* out) {
  const float *own[MOST_STRIPS], *tables[MOST_STRIPS];
  const int64_t panel = strip * STRIP / VEC, lane = strip * STRIP % VEC;
  int count = 0;
  for (int64_t i = first; i < last; ++i, ++count)
    own[count] = cells + (i * s.panels + panel) * CELL + lane, tables[count] = table + i * STRIP * width;
  if (count == 0) return;
  columns(width, [&]<int N>(int64_t at) { weigh_columns<N>(own, tables, count, width, at, out); });
}

// db_i += sign * sum over channels of x_i * y_i, or channel by channel.
inline void add_products(const Sizes& s, BackwardWork& w, int64_t row, float sign, const float* x, const float* y) {
  const Weights& weights = w.weights;
  if (weights.form == NEVER) return;
  double* db = w.db + row * weights.width;
  if (weights.form == BY_TOKEN) {
    *db += sign * dot(x, y, s.key);
    return;
  }
  for (int64_t c = 0; c < s.key; c += HALF_VEC)
    store(db + c, load(db + c) + static_cast<double>(sign) * widened(x + c) * widened(y + c));
}

// db_i += the sum of row i of x * y, db_j -= the sum of column j: in double, so that what cancels does so exactly.
inline void add_exponents(int64_t strip, const Cells& x, const Cells& y, double* db) {
  doubles rows[STRIP] = {};
  for (int p = 0; p < seen_panels(strip); ++p)
    for (int l = 0; l < VEC; l += HALF_VEC) {
      doubles columns = load(db + p * VEC + l);
      for (int r = 0; r < STRIP; ++r) {
        const doubles gain = widened(x.own[p] + r * VEC + l) * widened(y.own[p] + r * VEC + l);
        rows[r] += gain, columns -= gain;
      }
      store(db + p * VEC + l, columns);
    }
  for (int r = 0; r < STRIP; ++r) db[strip * STRIP + r] += total(rows[r]);
}

// Inside a strip, channel by channel, for j < i: x_part_i += g_ij y_j exp(b_i - b_j) and y_part_j the same of x_i.
inline void near_gradients(const Sizes& s, const Weights& w, int64_t strip, const float* g, const float* x,
                           const float* y, const BackwardMemory& m) {
  for (int64_t at = strip * STRIP * s.key; at < (strip * STRIP + 1) * s.key; at += VEC) {
    vec ys[STRIP], y_part[STRIP], kept[STRIP];
#pragma GCC unroll 8
    for (int i = 0; i < STRIP; ++i) {
      ys[i] = load(y + at + i * s.key), kept[i] = load(w.kept + at + i * s.key);
      y_part[i] = load(m.y_part + at + i * s.key);
    }
#pragma GCC unroll 8
    for (int i = 1; i < STRIP; ++i) {
      vec left = kept[i], own = load(m.x_part + at + i * s.key);
      const vec other = load(x + at + i * s.key);
#pragma GCC unroll 8
      for (int j = i - 1; j >= 0; --j) {
        const vec weight = g[i * VEC + j] * left;
        own += weight * ys[j], y_part[j] += weight * other;
        left *= kept[j];
      }
      store(m.x_part + at + i * s.key, own);
    }
#pragma GCC unroll 8
    for (int i = 0; i < STRIP; ++i) store(m.y_part + at + i * s.key, y_part[i]);
  }
}

// Rows of earlier strips, each times what is left of it at the start of the present one: they move from strip to strip.
inline void move_rows(const Sizes& s, const Weights& w, int64_t strip, const float* rows, float* moving) {
  const int64_t first = strip * STRIP * s.key, width = s.key;
  for (int64_t c = 0; c < width; c += VEC) {
    const vec left = load(w.across + strip * width + c);
    for (int64_t i = c; i < first; i += width) store(moving + i, left * load(moving + i));
  }
  for (int64_t i = first; i < first + STRIP * width; i += VEC) store(moving + i, load(w.until + i) * load(rows + i));
}

// Decays by channel: the cells g of dP, hidden but not weighed, become gradients of x (dx) and y (dy), and of the
// decays.
inline void pairs_by_channel_gradients(const Sizes& s, const BackwardMemory& m, const float* g, const float* x,
                                       const float* y, float* dx, float* dy, BackwardWork& work) {
  const Weights& w = work.weights;
  const int64_t rows = s.tokens * s.key, each = STRIP * s.key;
  std::fill(m.x_part, m.x_part + rows, 0.0f);
  std::fill(m.y_part, m.y_part + rows, 0.0f);
  for (int64_t strip = 0; strip < s.strips; ++strip) {
    const Cells cells(s, const_cast<float*>(g), strip);
    float* out = m.x_part + strip * each;
    if (strip > 0) {
      times_rows(cells, strip, true, m.moving, s.key, out);
      for (int64_t i = 0; i < each; i += VEC) store(out + i, load(w.since + strip * each + i) * load(out + i));
    }
    near_gradients(s, w, strip, cells.own[seen_panels(strip) - 1] + strip * STRIP % VEC, x, y, m);
    move_rows(s, w, strip, y, m.moving);
  }
  // What later strips add to earlier rows of y, relative to the start of the strip that was last.
  std::fill(m.moving, m.moving + rows, 0.0f);
  for (int64_t strip = s.strips - 1; strip > 0; --strip) {
    const int64_t first = strip * each;
    for (int64_t c = 0; c < s.key; c += VEC) {
      const vec left = load(w.across + strip * s.key + c);
      for (int64_t i = c; i < first; i += s.key) store(m.moving + i, left * load(m.moving + i));
    }
    for (int64_t i = first; i < first + each; i += VEC) store(m.spare + i, load(w.since + i) * load(x + i));
    for (int64_t j = 0; j < strip; ++j) times_columns(s, g, j, strip, strip + 1, m.spare, s.key, m.moving + j * each);
    for (int64_t i = first - each; i < first; i += VEC) add(m.y_part + i, load(w.until + i) * load(m.moving + i));
  }
  for (int64_t i = 0; i < s.tokens; ++i) {
    add_products(s, work, i, 1.0f, x + i * s.key, m.x_part + i * s.key);
    add_products(s, work, i, -1.0f, y + i * s.key, m.y_part + i * s.key);
    // A token beside itself does not decay, so that it says nothing of decays.
    const float own = Cells(s, const_cast<float*>(g), i / STRIP).own[i / VEC][i % STRIP * VEC + i % VEC];
    for (int64_t c = 0; c < s.key; c += VEC) {
      const int64_t at = i * s.key + c;
      add(dx + at, load(m.x_part + at) + own * load(y + at));
      add(dy + at, load(m.y_part + at) + own * load(x + at));
    }
  }
}

// cells = rows [tokens][value] . written, + the row's number of `extra`; hidden where the key is later.
inline void written_pairs(const Sizes& s, const BackwardMemory& m, const float* rows, const float* extra, bool strict,
                          float* cells) {
  for (int64_t strip = 0; strip < s.strips; ++strip) {
    const Cells out(s, cells, strip);
    const float* panels[MOST_PANELS];
    for (int64_t i = 0; i < s.panels; ++i) panels[i] = m.written_panels + i * VEC * s.value;
    scores(rows + strip * STRIP * s.value, s.value, s.value, panels, out.own, seen_panels(strip), VEC);
    for (int p = 0; extra != nullptr && p < seen_panels(strip); ++p)
      for (int r = 0; r < STRIP; ++r)
        store(out.own[p] + r * VEC, extra[strip * STRIP + r] + load(out.own[p] + r * VEC));
    hide_later(strip, strict, out.own);
  }
}

// Gradients of x and y from those of their weighed products: `weighed` are the products, g their gradients, used up.
inline void pair_gradients(const Sizes& s, const BackwardMemory& m, float* weighed, float* g, bool strict,
                           const float* x, const float* y, float* dx, float* dy, BackwardWork& work) {
  if (work.weights.form == BY_CHANNEL) {
    pairs_by_channel_gradients(s, m, g, x, y, dx, dy, work);
    return;
  }
  for (int64_t strip = 0; strip < s.strips; ++strip) {
    const Cells own(s, g, strip);
    if (work.weights.form == BY_TOKEN) add_exponents(strip, Cells(s, weighed, strip), own, work.db);
    weigh_pairs(s, work.weights, strip, strict, own.own);
    times_rows(own, strip, false, y, s.key, dx + strip * STRIP * s.key);
  }
  for (int64_t strip = 0; strip < s.strips; ++strip)
    times_columns(s, g, strip, strip, s.strips, x, s.key, dy + strip * STRIP * s.key);
}

}  // namespace chronotope
