// The gradients of a recurrence. A task is one head: forward for the states before each chunk, then chunk after chunk
// from the last. With G = dP exp(b_i - b_j), dP = dout U^T, P = tril(Q K^T exp(b_i - b_j)), S the state before a chunk and
// dS' the gradient of the state after it:
//
//   dQ = G K + exp(b) dout S^T,   dK = G^T Q + exp(b_C - b) U dS'^T,   dU = P^T dout + exp(b_C - b) K dS'
//   dS = exp(b_C) dS' + (exp(b) Q)^T dout
//
// and with the delta rule, U = beta R, R = V - exp(b) K S - A U: (1 + beta A^T) dR = beta dU, dV = dR, and -dR is to K as
// dout is to Q. Each b_i gets what its row of exponents gains, less what its column does.
#include "api.h"
#include "recurrence.h"
#include "schedule.h"

namespace chronotope {
namespace {

struct Work {
  Scratch rows, panels, cells, states, rights;
  float beta[MOST_CHUNK], dtotal[MOST_CHUNK];
  double db[MOST_CHUNK];
  Weights weights;
};

Work& work() {
  static thread_local Work own;
  return own;
}

// Where everything of one chunk lies.
struct Memory {
  float *q, *k, *dq, *dk;                       // rows of `key`
  float *written, *dout, *du, *negative;        // rows of `value`; negative is -dR
  float *k_panels, *q_panels;                   // lanes are tokens
  float *written_panels;                        // lanes are tokens
  float *state_panels, *dstate_panels;          // lanes are key channels
  float *p, *g, *a, *h, *spare;                 // cells
  float *dstate, *dz;

  Memory(const Sizes& s, Work& w) {
    float* at = w.rows.take(s.tokens * (4 * s.key + 4 * s.value));
    for (float** x : {&q, &k, &dq, &dk}) *x = at, at += s.tokens * s.key;
    for (float** x : {&written, &dout, &du, &negative}) *x = at, at += s.tokens * s.value;
    at = w.panels.take(s.tokens * (2 * s.key + s.value) + 2 * s.state());
    for (float** x : {&k_panels, &q_panels}) *x = at, at += s.tokens * s.key;
    written_panels = at, at += s.tokens * s.value;
    for (float** x : {&state_panels, &dstate_panels}) *x = at, at += s.state();
    const int64_t pairs = s.strips * s.panels * CELL;
    at = w.cells.take(4 * pairs + (s.panels + s.key / VEC) * CELL + s.state() + s.key);
    for (float** x : {&p, &g, &a, &h}) *x = at, at += pairs;
    spare = at, at += (s.panels + s.key / VEC) * CELL;
    dstate = at, at += s.state();
    dz = at;
  }
};

struct Cells {
  float* own[MOST_PANELS];
  Cells(const Sizes& s, float* all, int64_t strip) {
    for (int64_t p = 0; p < s.panels; ++p) own[p] = all + (strip * s.panels + p) * CELL;
  }
};

// db_i += the sum of row i of x * y, db_j -= the sum of column j: in double, so that what cancels does so exactly.
void add_exponents(int64_t strip, float* const* x, float* const* y, double* db) {
  for (int p = 0; p < seen_panels(strip); ++p)
    for (int r = 0; r < STRIP; ++r) {
      double row = 0;
      for (int l = 0; l < VEC; ++l) {
        const double gain = static_cast<double>(x[p][r * VEC + l]) * y[p][r * VEC + l];
        row += gain;
        db[p * VEC + l] -= gain;
      }
      db[strip * STRIP + r] += row;
    }
}

// out [STRIP][width] += cells of this strip times rows of `table`.
void times_rows(float* const* cells, int64_t strip, const float* table, int64_t width, float* out) {
  Sum sum;
  for (int p = 0; p < seen_panels(strip); ++p) sum.add(cells[p], table + p * VEC * width, VEC);
  sum.into(width, out);
}

// out [STRIP][width] += transposed cells of the strips from `first` on, in the columns of `strip`, times their rows.
void times_columns(const Sizes& s, const float* cells, int64_t strip, int64_t first, const float* table, int64_t width,
                   float* out) {
  const float *own[MOST_STRIPS], *tables[MOST_STRIPS];
  const int64_t panel = strip * STRIP / VEC, lane = strip * STRIP % VEC;
  int count = 0;
  for (int64_t i = first; i < s.strips; ++i, ++count)
    own[count] = cells + (i * s.panels + panel) * CELL + lane, tables[count] = table + i * STRIP * width;
  if (count == 0) return;
  columns(width, [&]<int N>(int64_t at) { weigh_columns<N>(own, tables, count, width, at, out); });
}

// out [STRIP][key] += factor * (rows [STRIP][value] times a state, whose panels are given, + extra * z); returns in `dots`
// the dot products of what was added with `with`.
void through_transposed(const Sizes& s, const float* rows, const float* panels, const float* factor, const float* extra,
                        const float* z, const float* with, float* memory, float* out, float* dots) {
  const int count = static_cast<int>(s.key / VEC);
  const float* own[MOST_CELLS];
  float* cells[MOST_CELLS];
  for (int c = 0; c < count; ++c) own[c] = panels + c * VEC * s.value, cells[c] = memory + c * CELL;
  scores(rows, s.value, s.value, own, cells, count, VEC);
  for (int r = 0; r < STRIP; ++r) {
    vec dot = {};
    for (int c = 0; c < count; ++c) {
      vec x = load(cells[c] + r * VEC);
      if (z != nullptr) x += extra[r] * load(z + c * VEC);
      x *= factor[r];
      dot += x * load(with + r * s.key + c * VEC);
      add(out + r * s.key + c * VEC, x);
    }
    dots[r] = chronotope::sum(dot);
  }
}

// P and G of the chunk, dQ, and what queries say of the decays.
void query_gradients(const Recurrence& r, const Sizes& s, const Memory& m, const float* z, Work& work) {
  for (int64_t strip = 0; strip < s.strips; ++strip) {
    const Cells p(s, m.p, strip), g(s, m.g, strip);
    const float *q = m.q + strip * STRIP * s.key, *dout = m.dout + strip * STRIP * s.value;
    paired(s, work.weights, q, m.k_panels, strip, false, p.own);
    const float* panels[MOST_PANELS];
    for (int64_t i = 0; i < s.panels; ++i) panels[i] = m.written_panels + i * VEC * s.value;
    scores(dout, s.value, s.value, panels, g.own, seen_panels(strip), VEC);
    if (r.total)
      for (int i = 0; i < seen_panels(strip); ++i)
        for (int row = 0; row < STRIP; ++row)
          store(g.own[i] + row * VEC, work.dtotal[strip * STRIP + row] + load(g.own[i] + row * VEC));
    if (r.decay.data) add_exponents(strip, p.own, g.own, work.db);
    weigh_pairs(work.weights, strip, false, g.own);
    float* dq = m.dq + strip * STRIP * s.key;
    float dots[STRIP];
    std::fill(dq, dq + STRIP * s.key, 0.0f);
    through_transposed(s, dout, m.state_panels, work.weights.grown + strip * STRIP, work.dtotal + strip * STRIP, z, q,
                       m.spare, dq, dots);
    for (int i = 0; i < STRIP; ++i) work.db[strip * STRIP + i] += dots[i];
    times_rows(g.own, strip, m.k, s.key, dq);
  }
}

// dU, and with the delta rule -dR in its place and dbeta.
void value_gradients(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, const float* rights,
                     Work& work) {
  for (int64_t strip = s.strips - 1; strip >= 0; --strip) {
    float* du = m.du + strip * STRIP * s.value;
    std::fill(du, du + STRIP * s.value, 0.0f);
    times_columns(s, m.p, strip, strip, m.dout, s.value, du);
    through(m.k + strip * STRIP * s.key, s.depth, s.key, work.weights.rest + strip * STRIP, 1.0f, m.dstate, s.value,
            m.spare, du);
    if (!r.beta.data) continue;
    times_columns(s, m.a, strip, strip + 1, m.negative, s.value, du);
    const float* link = Cells(s, m.a, strip).own[seen_panels(strip) - 1] + strip * STRIP % VEC;
    for (int i = STRIP - 1; i >= 0; --i) {
      const int64_t t = strip * STRIP + i;
      vec dot = {};
      for (int64_t c = 0; c < s.value; c += VEC) {
        vec x = load(du + i * s.value + c);
        for (int later = i + 1; later < STRIP; ++later)
          x += link[later * VEC + i] * load(m.negative + (strip * STRIP + later) * s.value + c);
        dot += x * load(rights + t * s.value + c);
        store(du + i * s.value + c, work.beta[t] * x);
        store(m.negative + t * s.value + c, -work.beta[t] * x);
      }
      if (t < at.count) r.dbeta[(at.batch * r.heads + at.head) * r.tokens + at.from + t] = chronotope::sum(dot);
    }
  }
}

// dK: keys as they are read by queries, as they write the state, and with the delta rule as they read it.
void key_gradients(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, Work& work) {
  float ones[STRIP], dots[STRIP];
  std::fill(ones, ones + STRIP, 1.0f);
  for (int64_t strip = 0; r.beta.data && strip < s.strips; ++strip) {
    const Cells a(s, m.a, strip), h(s, m.h, strip);
    const float* panels[MOST_PANELS];
    for (int64_t i = 0; i < s.panels; ++i) panels[i] = m.written_panels + i * VEC * s.value;
    scores(m.negative + strip * STRIP * s.value, s.value, s.value, panels, h.own, seen_panels(strip), VEC);
    if (r.decay.data) add_exponents(strip, a.own, h.own, work.db);
    weigh_pairs(work.weights, strip, true, h.own);
  }
  for (int64_t strip = 0; strip < s.strips; ++strip) {
    const float* k = m.k + strip * STRIP * s.key;
    float* dk = m.dk + strip * STRIP * s.key;
    std::fill(dk, dk + STRIP * s.key, 0.0f);
    through_transposed(s, m.written + strip * STRIP * s.value, m.dstate_panels, work.weights.rest + strip * STRIP, ones,
                       r.total ? m.dz : nullptr, k, m.spare, dk, dots);
    for (int i = 0; i < STRIP; ++i) {
      work.db[strip * STRIP + i] -= dots[i];
      work.db[at.count - 1] += dots[i];
    }
    times_columns(s, m.g, strip, strip, m.q, s.key, dk);
    if (!r.beta.data) continue;
    through_transposed(s, m.negative + strip * STRIP * s.value, m.state_panels, work.weights.grown + strip * STRIP,
                       nullptr, nullptr, k, m.spare, dk, dots);
    for (int i = 0; i < STRIP; ++i) work.db[strip * STRIP + i] += dots[i];
    times_rows(Cells(s, m.h, strip).own, strip, m.k, s.key, dk);
    times_columns(s, m.h, strip, strip, m.k, s.key, dk);
  }
}

void state_gradients(const Recurrence& r, const Sizes& s, const Memory& m, const float* state, const float* z,
                     int64_t last, Work& work) {
  const Weights& w = work.weights;
  double kept = 0;
  for (int64_t i = 0; i < s.state(); ++i) kept += static_cast<double>(state[i]) * m.dstate[i];
  for (int64_t d = 0; r.total && d < s.depth; ++d) kept += static_cast<double>(z[d]) * m.dz[d];
  work.db[last] += w.over * kept;
  shrink(m.dstate, s.state(), w.over);
  gather_state(m.q_panels, s, w.grown, m.dout, s.value, m.dstate);
  if (r.beta.data) gather_state(m.k_panels, s, w.grown, m.negative, s.value, m.dstate);
  if (!r.total) return;
  for (int64_t d = 0; d < s.depth; ++d) {
    vec sum = {};
    for (int64_t p = 0; p < s.panels; ++p)
      sum += load(work.dtotal + p * VEC) * load(m.q_panels + p * s.panel() + d * VEC);
    m.dz[d] = w.over * m.dz[d] + chronotope::sum(sum);
  }
}

void read_chunk(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, Work& work) {
  weigh_decays(r, at, s.tokens, work.weights);
  read_rows(r.k, at, r.depth, s.key, s.tokens, m.k);
  turn_rows(m.k, s.tokens, s.key, m.k_panels);
  if (r.beta.data) read_beta(r, at, s.tokens, work.beta);
}

// One chunk of the way there: the state before it is `state`, after it `next`. `rights` gets R.
void chunk_state(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, const float* state, float* next,
                 float* rights, Work& work) {
  read_chunk(r, s, at, m, work);
  float* v = r.beta.data ? rights : m.written;
  read_rows(r.v, at, r.value_depth, s.value, s.tokens, v);
  if (r.beta.data)
    solve_delta(s, work.weights, m.k, m.k_panels, state, {m.a, m.written, work.beta}, rights, m.spare);
  std::copy_n(state, s.state() + s.key, next);
  shrink(next, s.state(), work.weights.over);
  gather_state(m.k_panels, s, work.weights.rest, m.written, s.value, next);
  if (r.total) gather_normalizer(s, m.k_panels, work.weights.over, next + s.state());
}

// One chunk of the way back.
void chunk_gradients(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, const float* state,
                     const float* rights, Work& work) {
  const int64_t token = (at.batch * r.heads + at.head) * r.tokens + at.from;
  read_chunk(r, s, at, m, work);
  read_rows(r.q, at, r.depth, s.key, s.tokens, m.q);
  read_rows(r.dout, at, r.value_depth, s.value, s.tokens, m.dout);
  turn_rows(m.q, s.tokens, s.key, m.q_panels);
  if (r.beta.data) {
    for (int64_t i = 0; i < s.tokens; ++i) scaled(rights + i * s.value, s.value, work.beta[i], m.written + i * s.value);
    for (int64_t strip = 0; strip < s.strips; ++strip)
      paired(s, work.weights, m.k + strip * STRIP * s.key, m.k_panels, strip, true, Cells(s, m.a, strip).own);
  } else {
    read_rows(r.v, at, r.value_depth, s.value, s.tokens, m.written);
  }
  turn_rows(m.written, s.tokens, s.value, m.written_panels);
  turn_rows(state, s.key, s.value, m.state_panels);
  turn_rows(m.dstate, s.key, s.value, m.dstate_panels);
  for (int64_t i = 0; i < s.tokens; ++i) {
    work.dtotal[i] = r.total && i < at.count ? r.dtotal[token + i] : 0.0f;
    work.db[i] = 0;
  }
  const float* z = r.total ? state + s.state() : nullptr;
  query_gradients(r, s, m, z, work);
  value_gradients(r, s, at, m, rights, work);
  key_gradients(r, s, at, m, work);
  write_rows(r.dq, at, r.depth, s.key, m.dq);
  write_rows(r.dk, at, r.depth, s.key, m.dk);
  write_rows(r.dv, at, r.value_depth, s.value, m.du);
  state_gradients(r, s, m, state, z, at.count - 1, work);
  double sum = 0;
  for (int64_t i = at.count - 1; r.decay.data && i >= 0; --i)
    r.ddecay[token + i] = static_cast<float>(sum += work.db[i]);
}

void head_gradients(const Recurrence& r, const Sizes& s, int64_t task) {
  Work& w = work();
  const Memory m(s, w);
  const int64_t chunks = (r.tokens + s.tokens - 1) / s.tokens, each = s.state() + s.key;
  const int64_t size = r.depth * r.value_depth;
  float* states = w.states.take((chunks + 1) * each);
  float* rights = r.beta.data ? w.rights.take(chunks * s.tokens * s.value) : nullptr;
  const auto place = [&](int64_t chunk) {
    const int64_t from = chunk * s.tokens;
    return Place{task / r.heads, task % r.heads, from, std::min(s.tokens, r.tokens - from)};
  };
  const auto right = [&](int64_t chunk) { return rights ? rights + chunk * s.tokens * s.value : nullptr; };
  read_state(r, s, r.memory + task * size, states);
  std::fill(states + s.state(), states + each, 0.0f);
  if (r.total) std::copy_n(r.normalizer + task * r.depth, r.depth, states + s.state());
  for (int64_t i = 0; i + 1 < chunks || (rights && i < chunks); ++i)
    chunk_state(r, s, place(i), m, states + i * each, states + (i + 1) * each, right(i), w);
  read_state(r, s, r.dmemory_after + task * size, m.dstate);
  std::fill(m.dz, m.dz + s.key, 0.0f);
  if (r.total) std::copy_n(r.dnormalizer_after + task * r.depth, r.depth, m.dz);
  for (int64_t i = chunks - 1; i >= 0; --i) chunk_gradients(r, s, place(i), m, states + i * each, right(i), w);
  write_state(r, s, m.dstate, r.dmemory + task * size);
  if (r.total) std::copy_n(m.dz, r.depth, r.dnormalizer + task * r.depth);
}

}  // namespace
}  // namespace chronotope

int chronotope_recurrence_backward(const chronotope::Recurrence* given) {
  using namespace chronotope;
  return guarded([&] {
    const Sizes s(*given);
    deal(given->batch * given->heads, 1, [&](int64_t task, int64_t) { head_gradients(*given, s, task); });
  });
}
