// A recurrence forward: chunk after chunk, the formulas of `recurrences/chunked.py`. A task is one head.
#include "recurrence.h"

#include "api.h"
#include "schedule.h"

namespace chronotope {
namespace {

struct Work {
  Scratch q, k, v, panels, out, cells, written, link, state;
  float beta[MOST_CHUNK];
  Weights weights;
};

Work& work() {
  static thread_local Work own;
  return own;
}

struct Memory {
  float *q, *k, *v, *panels, *out, *cells, *written, *link, *state, *z;

  Memory(const Recurrence& r, const Sizes& s, Work& w)
      : q(w.q.take(s.tokens * s.key)),
        k(w.k.take(s.tokens * s.key)),
        v(w.v.take(s.tokens * s.value)),
        panels(w.panels.take(s.panels * s.panel())),
        out(w.out.take(STRIP * s.value)),
        cells(w.cells.take((s.panels + s.key / VEC) * CELL)),
        written(r.beta.data ? w.written.take(s.tokens * s.value) : nullptr),
        link(r.beta.data ? w.link.take(s.strips * s.panels * CELL) : nullptr),
        state(w.state.take(s.state() + s.key)),
        z(state + s.state()) {}
};

// q . z for the rows of a strip, and what their own chunk adds: the sums of its cells.
void add_totals(const Recurrence& r, const Sizes& s, const Place& at, const Weights& w, int64_t strip,
                float* const* cells, const Memory& m) {
  for (int i = 0; i < STRIP; ++i) {
    const int64_t t = strip * STRIP + i;
    if (t >= at.count) return;
    vec sum = {};
    for (int p = 0; p < seen_panels(strip); ++p) sum += load(cells[p] + i * VEC);
    float before = 0;
    for (int64_t d = 0; d < s.depth; ++d) before += m.q[t * s.key + d] * m.z[d];
    r.total[(at.batch * r.heads + at.head) * r.tokens + at.from + t] = chronotope::sum(sum) + w.grown[t] * before;
  }
}

void chunk_forward(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, Work& work) {
  Weights& w = work.weights;
  weigh_decays(r, at, s.tokens, w);
  read_rows(r.q, at, r.depth, s.key, s.tokens, m.q);
  read_rows(r.k, at, r.depth, s.key, s.tokens, m.k);
  read_rows(r.v, at, r.value_depth, s.value, s.tokens, m.v);
  turn_rows(m.k, s.tokens, s.key, m.panels);
  const float* written = m.v;
  if (r.beta.data) {
    read_beta(r, at, s.tokens, work.beta);
    solve_delta(s, w, m.k, m.panels, m.state, {m.link, m.written, work.beta}, m.v, m.cells);
    written = m.written;
  }
  float* cells[MOST_PANELS];
  for (int64_t p = 0; p < s.panels; ++p) cells[p] = m.cells + (s.key / VEC + p) * CELL;
  for (int64_t strip = 0; strip * STRIP < at.count; ++strip) {
    const float* q = m.q + strip * STRIP * s.key;
    std::fill(m.out, m.out + STRIP * s.value, 0.0f);
    through(q, s.depth, s.key, w.grown + strip * STRIP, 1.0f, m.state, s.value, m.cells, m.out);
    paired(s, w, q, m.panels, strip, false, cells);
    Sum sum;
    for (int p = 0; p < seen_panels(strip); ++p) sum.add(cells[p], written + p * VEC * s.value, VEC);
    sum.into(s.value, m.out);
    if (r.total) add_totals(r, s, at, w, strip, cells, m);
    const Place own{at.batch, at.head, at.from + strip * STRIP, std::min<int64_t>(STRIP, at.count - strip * STRIP)};
    write_rows(r.out, own, r.value_depth, s.value, m.out);
  }
  shrink(m.state, s.state(), w.over);
  gather_state(m.panels, s, w.rest, written, s.value, m.state);
  if (r.total) gather_normalizer(s, m.panels, w.over, m.z);
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
