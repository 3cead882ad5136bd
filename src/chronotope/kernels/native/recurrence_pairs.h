// What decays do inside a chunk: to rows, to pairs of tokens, to the state. b is their running sum, [tokens] or
// [tokens][key]; every exponent is a sum of decays.
#pragma once

#include "recurrence.h"

namespace chronotope {

enum Form { NEVER, BY_TOKEN, BY_CHANNEL };

// exp(b), exp(end - b), exp(end).
struct Weights {
  Form form;
  int64_t width;  // numbers for each token: 1, or `key`
  Scratch exact, memory;
  double* b;
  float *grown_at, *rest_at, *over_at;
  float *running, *own;  // rows of `key` for pairs by channel

  Factor grown() const { return factor(grown_at); }
  Factor rest() const { return factor(rest_at); }
  Factor factor(const float* at) const { return {form == NEVER ? nullptr : at, form == BY_CHANNEL ? width : 0}; }
  vec over(int64_t row) const { return all(over_at[form == BY_CHANNEL ? row : 0]); }
  // exp(b_i - b_j), j <= i, for VEC channels from `c` on.
  vec between(int64_t i, int64_t j, int64_t c) const {
    float gap[VEC];
    for (int l = 0; l < VEC; ++l) gap[l] = static_cast<float>(b[i * width + c + l] - b[j * width + c + l]);
    return exp(load(gap));
  }

  void set(const Recurrence& r, const Sizes& s, const Place& at) {
    form = r.decay.data == nullptr ? NEVER : r.decay.channels > 1 ? BY_CHANNEL : BY_TOKEN;
    width = form == BY_CHANNEL ? s.key : 1;
    const int64_t count = s.tokens * width;
    b = reinterpret_cast<double*>(exact.take(2 * count));
    grown_at = memory.take(2 * count + width + VEC + (form == BY_CHANNEL ? 2 * s.tokens * s.key : 0));
    rest_at = grown_at + count, running = rest_at + count, own = running + (form == BY_CHANNEL ? s.tokens * s.key : 0);
    over_at = own + (form == BY_CHANNEL ? s.tokens * s.key : 0);
    *over_at = 1.0f;
    if (form == NEVER) return;
    for (int64_t i = 0; i < s.tokens; ++i) {
      const float* decay = i < at.count ? r.decay.at(at.batch, at.head, at.from + i) : nullptr;
      for (int64_t c = 0; c < width; ++c) {
        const double before = i > 0 ? b[(i - 1) * width + c] : 0.0;
        b[i * width + c] = before + (decay != nullptr && c < r.decay.channels ? decay[c] : 0.0f);
      }
    }
    const double* end = b + (s.tokens - 1) * width;
    for (int64_t i = 0; i < s.tokens; ++i)
      for (int64_t c = 0; c < width; ++c) {
        grown_at[i * width + c] = static_cast<float>(b[i * width + c]);
        rest_at[i * width + c] = static_cast<float>(end[c] - b[i * width + c]);
      }
    for (int64_t i = 0; i < 2 * count; i += VEC) store(grown_at + i, exp(load(grown_at + i)));
    for (int64_t c = 0; c < width; ++c) over_at[c] = std::exp(static_cast<float>(end[c]));
  }
};

// How many panels a strip of queries sees any of.
inline int seen_panels(int64_t strip) { return static_cast<int>(strip * STRIP / VEC) + 1; }

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

// cells[p] *= exp(b_i - b_j), decays being by token or none, and 0 where j is later. Between a strip and panels that end
// before it, the exponent is split at the token before the strip.
inline void weigh_pairs(const Weights& w, int64_t strip, bool strict, float* const* cells) {
  const int last = seen_panels(strip) - 1;
  const int64_t first = strip * STRIP;
  if (w.form == BY_TOKEN) {
    float rows[STRIP];
    for (int r = 0; r < STRIP && last > 0; ++r) rows[r] = std::exp(static_cast<float>(w.b[first + r] - w.b[first - 1]));
    for (int p = 0; p < last; ++p) {
      float gap[VEC];
      for (int l = 0; l < VEC; ++l) gap[l] = static_cast<float>(w.b[first - 1] - w.b[p * VEC + l]);
      const vec lanes = exp(load(gap));
      for (int r = 0; r < STRIP; ++r) store(cells[p] + r * VEC, rows[r] * lanes * load(cells[p] + r * VEC));
    }
    for (int r = 0; r < STRIP; ++r) {
      float gap[VEC];
      for (int l = 0; l < VEC; ++l) gap[l] = static_cast<float>(std::min(w.b[first + r] - w.b[last * VEC + l], 0.0));
      store(cells[last] + r * VEC, exp(load(gap)) * load(cells[last] + r * VEC));
    }
  }
  hide_later(strip, strict, cells);
}

// Rows of earlier strips, each times exp(b at the token before this strip - b_j): moves from one strip to the next.
class Running {
 public:
  Running(const Sizes& s, const Weights& w, const float* rows) : s_(s), w_(w), rows_(rows) {
    std::fill(w.running, w.running + s.tokens * s.key, 0.0f);
  }
  // To the strip after; the rows of the present one join.
  void advance(int64_t strip) {
    const int64_t first = strip * STRIP, last = first + STRIP - 1;
    for (int64_t c = 0; c < s_.key; c += VEC) {
      const vec shrunk = first > 0 ? w_.between(last, first - 1, c) : all(1.0f);
      for (int64_t j = 0; j < first; ++j) {
        float* at = w_.running + j * s_.key + c;
        store(at, shrunk * load(at));
      }
      for (int64_t j = first; j <= last; ++j)
        store(w_.running + j * s_.key + c, w_.between(last, j, c) * load(rows_ + j * s_.key + c));
    }
  }

 private:
  const Sizes& s_;
  const Weights& w_;
  const float* rows_;
};

// Rows of a strip times exp(b_i - b at the token before the strip).
inline float* since_strip(const Sizes& s, const Weights& w, const float* rows, int64_t strip, float* out) {
  const int64_t first = strip * STRIP;
  for (int r = 0; r < STRIP; ++r)
    for (int64_t c = 0; c < s.key; c += VEC)
      store(out + r * s.key + c, w.between(first + r, first - 1, c) * load(rows + (first + r) * s.key + c));
  return out;
}

// Pairs by channel: sum_d x_id y_jd exp(b_id - b_jd). Inside a strip channel by channel, from earlier strips by `Running`.
inline void pairs_by_channel(const Sizes& s, const Weights& w, const float* x, const float* y, bool strict, float* panels,
                             float* all_cells) {
  Running running(s, w, y);
  for (int64_t strip = 0; strip < s.strips; ++strip) {
    const Cells cells(s, all_cells, strip);
    const int count = seen_panels(strip);
    const int64_t first = strip * STRIP, lane = first % VEC;
    if (strip == 0) {
      std::fill(cells.own[0], cells.own[0] + CELL, 0.0f);
    } else {
      turn_rows(w.running, count * VEC, s.key, panels);
      const float* own[MOST_PANELS];
      for (int p = 0; p < count; ++p) own[p] = panels + p * s.panel();
      scores(since_strip(s, w, x, strip, w.own), s.key, s.depth, own, cells.own, count, VEC);
    }
    for (int r = strict ? 1 : 0; r < STRIP; ++r)
      for (int l = 0; l < r + (strict ? 0 : 1); ++l) {
        vec sum = {};
        for (int64_t c = 0; c < s.key; c += VEC)
          sum += w.between(first + r, first + l, c) * load(x + (first + r) * s.key + c) * load(y + (first + l) * s.key + c);
        cells.own[count - 1][r * VEC + lane + l] = chronotope::sum(sum);
      }
    running.advance(strip);
  }
}

// All pairs of a chunk: (x_i . y_j) with what decays leave of it, 0 where j is later than i, or is i with `strict`.
// `y_panels` are the rows y turned; `spare` has room for as many.
inline void all_pairs(const Sizes& s, const Weights& w, const float* x, const float* y, const float* y_panels, bool strict,
                      float* spare, float* all_cells) {
  if (w.form == BY_CHANNEL) {
    pairs_by_channel(s, w, x, y, strict, spare, all_cells);
    return;
  }
  for (int64_t strip = 0; strip < s.strips; ++strip) {
    const Cells cells(s, all_cells, strip);
    const float* own[MOST_PANELS];
    for (int64_t p = 0; p < s.panels; ++p) own[p] = y_panels + p * s.panel();
    scores(x + strip * STRIP * s.key, s.key, s.depth, own, cells.own, seen_panels(strip), VEC);
    weigh_pairs(w, strip, strict, cells.own);
  }
}

// The delta rule: `rows` hold v and become R = V - exp(b) K S - A U; written becomes U = beta R. A: the cells of `link`.
inline void solve_delta(const Sizes& s, const Weights& w, const float* k, const float* state, const float* beta,
                        float* link, float* rows, float* written, float* memory) {
  for (int64_t strip = 0; strip < s.strips; ++strip) {
    const int count = seen_panels(strip);
    const Cells cells(s, link, strip);
    float* right = rows + strip * STRIP * s.value;
    through(k + strip * STRIP * s.key, s.depth, s.key, w.grown().from(strip * STRIP), -1.0f, state, s.value, memory,
            right);
    Sum before;
    for (int p = 0; p < count; ++p) {
      const int lanes = static_cast<int>(std::min<int64_t>(VEC, strip * STRIP - p * VEC));
      if (lanes <= 0) continue;
      float* negative = memory + before.count * CELL;
      for (int r = 0; r < STRIP; ++r) store(negative + r * VEC, -load(cells.own[p] + r * VEC));
      before.add(negative, written + p * VEC * s.value, lanes);
    }
    if (before.count > 0) before.into(s.value, right);
    // Inside the strip one row after the other.
    const float* last = cells.own[count - 1] + strip * STRIP % VEC;
    float* out = written + strip * STRIP * s.value;
    for (int r = 0; r < STRIP; ++r)
      for (int64_t c = 0; c < s.value; c += VEC) {
        vec x = load(right + r * s.value + c);
        for (int l = 0; l < r; ++l) x -= last[r * VEC + l] * load(out + l * s.value + c);
        store(right + r * s.value + c, x);
        store(out + r * s.value + c, beta[strip * STRIP + r] * x);
      }
  }
}

// The state over a chunk: what is left of it.
inline void shrink(const Sizes& s, const Weights& w, float* state) {
  if (w.form == NEVER) return;
  for (int64_t d = 0; d < s.key; ++d)
    for (int64_t c = 0; c < s.value; c += VEC) store(state + d * s.value + c, w.over(d) * load(state + d * s.value + c));
}

// z = over * z + sum over tokens of the panels, each lane times its factor.
inline void gather_normalizer(const Sizes& s, const Weights& w, const float* panels, const float* factor, float* z) {
  for (int64_t d = 0; d < s.depth; ++d) {
    vec sum = {};
    for (int64_t p = 0; p < s.panels; ++p)
      sum += (factor ? load(factor + p * VEC) : all(1.0f)) * load(panels + p * s.panel() + d * VEC);
    z[d] = w.over(d)[0] * z[d] + chronotope::sum(sum);
  }
}

}  // namespace chronotope
