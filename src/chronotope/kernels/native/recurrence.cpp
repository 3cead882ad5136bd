// A recurrence forward: chunk after chunk, the formulas of `recurrences/chunked.py`. A task is one head.
#include "api.h"
#include "recurrence_pairs.h"
#include "schedule.h"

namespace chronotope {
namespace {

struct Work {
  Scratch memory;
  float beta[MOST_CHUNK];
  Weights weights;
};

Work& work() {
  static thread_local Work own;
  return own;
}

// Where everything of one chunk lies.
struct Memory {
  float *q, *k, *spare;         // rows of `key`
  float *v, *written;           // rows of `value`
  float *panels, *turned;       // lanes are tokens
  float *pairs, *link, *cells;  // cells: of all pairs, and of one strip
  float *out, *state, *z;

  Memory(const Recurrence& r, const Sizes& s, Work& w) {
    const int64_t rows = s.tokens * s.key, values = s.tokens * s.value, all_pairs = s.strips * s.panels * CELL;
    const int64_t strip = (s.panels + s.key / VEC) * CELL;
    float* at = w.memory.take(5 * rows + 2 * values + 2 * all_pairs + strip + STRIP * s.value + s.state() + s.key);
    for (float** x : {&q, &k, &spare, &panels, &turned}) *x = at, at += rows;
    for (float** x : {&v, &written}) *x = at, at += values;
    for (float** x : {&pairs, &link}) *x = at, at += all_pairs;
    cells = at, at += strip;
    out = at, at += STRIP * s.value;
    state = at, at += s.state();
    z = at;
    if (!r.beta.data) written = v;
  }
};

// q . z for the rows of a strip, and what their own chunk adds: the sums of its cells.
void add_totals(const Recurrence& r, const Sizes& s, const Place& at, const Weights& w, int64_t strip,
                float* const* cells, const Memory& m) {
  for (int i = 0; i < STRIP; ++i) {
    const int64_t t = strip * STRIP + i;
    if (t >= at.count) return;
    vec sum = {};
    for (int p = 0; p < seen_panels(strip); ++p) sum += load(cells[p] + i * VEC);
    for (int64_t c = 0; c < s.key; c += VEC) sum += w.grown().at(t, c) * load(m.q + t * s.key + c) * load(m.z + c);
    r.total[(at.batch * r.heads + at.head) * r.tokens + at.from + t] = chronotope::sum(sum);
  }
}

void chunk_forward(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, Work& work) {
  Weights& w = work.weights;
  w.set(r, s, at);
  read_rows(r.q, at, r.depth, s.key, s.tokens, m.q);
  read_rows(r.k, at, r.depth, s.key, s.tokens, m.k);
  read_rows(r.v, at, r.value_depth, s.value, s.tokens, m.v);
  const Place next{at.batch, at.head, at.from + at.count, std::min(s.tokens, r.tokens - at.from - at.count)};
  announce(r.q, next, r.depth), announce(r.k, next, r.depth), announce(r.v, next, r.value_depth);
  turn_rows(m.k, s.tokens, s.key, m.panels);
  if (r.beta.data) {
    read_beta(r, at, s.tokens, work.beta);
    all_pairs(s, w, m.k, m.k, m.panels, true, m.turned, m.link);
    solve_delta(s, w, m.k, m.state, work.beta, m.link, m.v, m.written, m.cells);
  }
  all_pairs(s, w, m.q, m.k, m.panels, false, m.turned, m.pairs);
  for (int64_t strip = 0; strip * STRIP < at.count; ++strip) {
    const Cells cells(s, m.pairs, strip);
    std::fill(m.out, m.out + STRIP * s.value, 0.0f);
    through(m.q + strip * STRIP * s.key, s.depth, s.key, w.grown().from(strip * STRIP), 1.0f, m.state, s.value, m.cells,
            m.out);
    Sum sum;
    for (int p = 0; p < seen_panels(strip); ++p) sum.add(cells.own[p], m.written + p * VEC * s.value, VEC);
    sum.into(s.value, m.out);
    if (r.total) add_totals(r, s, at, w, strip, cells.own, m);
    const Place own{at.batch, at.head, at.from + strip * STRIP, std::min<int64_t>(STRIP, at.count - strip * STRIP)};
    write_rows(r.out, own, r.value_depth, s.value, m.out);
  }
  shrink(s, w, m.state);
  const float* kept = scaled_panels(m.k, m.panels, s, w.rest(), m.spare, m.turned);
  gather_state(kept, s, m.written, s.value, m.state);
  if (r.total) gather_normalizer(s, w, kept, nullptr, m.z);
}

}  // namespace
}  // namespace chronotope

int64_t chronotope_recurrence_size() { return sizeof(chronotope::Recurrence); }

int chronotope_recurrence_forward(const chronotope::Recurrence* given) {
  using namespace chronotope;
  return guarded([&] {
    const Recurrence& r = *given;
    const Sizes s(r);
    deal(r.batch * r.heads, 1, [&](int64_t task, int64_t) {
      Work& w = work();
      const Memory m(r, s, w);
      read_state(r, s, r.memory + task * r.depth * r.value_depth, m.state);
      std::fill(m.z, m.z + s.key, 0.0f);
      if (r.total) std::copy_n(r.normalizer + task * r.depth, r.depth, m.z);
      for (int64_t from = 0; from < r.tokens; from += s.tokens) {
        const Place at{task / r.heads, task % r.heads, from, std::min(s.tokens, r.tokens - from)};
        chunk_forward(r, s, at, m, w);
      }
      write_state(r, s, m.state, r.memory_after + task * r.depth * r.value_depth);
      if (r.total) std::copy_n(m.z, r.depth, r.normalizer_after + task * r.depth);
    });
  });
}
