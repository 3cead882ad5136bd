// The gradients of a recurrence. A task is one head: forward for the states before each chunk, then chunk after chunk
// from the last. With G = dP exp(b_i - b_j), dP = dout U^T, P = tril(Q K^T exp(b_i - b_j)), S the state before a chunk
// and dS' the gradient of the state after it:
//
//   dQ = G K + exp(b) dout S^T,   dK = G^T Q + exp(b_C - b) U dS'^T,   dU = P^T dout + exp(b_C - b) K dS'
//   dS = exp(b_C) dS' + (exp(b) Q)^T dout
//
// and with the delta rule, U = beta R, R = V - exp(b) K S - A U: (1 + beta A^T) dR = beta dU, dV = dR, and -dR is to K
// as dout is to Q. Each b_i gets what its row of exponents gains, less what its column does.
#include "api.h"
#include "recurrence_gradients.h"
#include "schedule.h"

namespace chronotope {
namespace {

using Work = BackwardWork;
using Memory = BackwardMemory;

// out [tokens][key] += factor * (rows [tokens][value] times a state, whose panels are given, + extra * z); the decays
// of each row gain `sign` times its product with `with`, and `last`, where there is one, the opposite.
void through_transposed(const Sizes& s, const float* rows, const float* panels, const Factor& factor,
                        const float* extra, const float* z, const float* with, float sign, int64_t last, float* memory,
                        float* out, Work& work) {
  const int count = static_cast<int>(s.key / VEC);
  const float* own[MOST_CELLS];
  float* cells[MOST_CELLS];
  for (int c = 0; c < count; ++c) own[c] = panels + c * VEC * s.value, cells[c] = memory + c * CELL;
  for (int64_t strip = 0; strip < s.strips; ++strip) {
    scores(rows + strip * STRIP * s.value, s.value, s.value, own, cells, count, VEC);
    for (int r = 0; r < STRIP; ++r) {
      const int64_t i = strip * STRIP + r;
      float row[MOST_CELLS * VEC];
      for (int c = 0; c < count; ++c) {
        vec x = load(cells[c] + r * VEC);
        if (z != nullptr) x += extra[i] * load(z + c * VEC);
        store(row + c * VEC, factor.at(i, c * VEC) * x);
        add(out + i * s.key + c * VEC, load(row + c * VEC));
      }
      add_products(s, work, i, sign, row, with + i * s.key);
      if (last >= 0) add_products(s, work, last, -sign, row, with + i * s.key);
    }
  }
}

// dU, and with the delta rule dR in its place, -dR and dbeta.
void value_gradients(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, const float* rights,
                     Work& work) {
  for (int64_t strip = s.strips - 1; strip >= 0; --strip) {
    float* du = m.du + strip * STRIP * s.value;
    std::fill(du, du + STRIP * s.value, 0.0f);
    times_columns(s, m.p, strip, strip, s.strips, m.dout, s.value, du);
    work.weights.rest().apply(m.k + strip * STRIP * s.key, strip * STRIP, STRIP, s.key, m.cells);
    Sum sum;
    sum.add(m.cells, s.key, m.dstate, s.depth);
    sum.into(s.value, du);
    if (!r.beta.data) continue;
    times_columns(s, m.a, strip, strip + 1, s.strips, m.negative, s.value, du);
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

void state_gradients(const Recurrence& r, const Sizes& s, const Memory& m, const float* state, const float* z,
                     int64_t last, Work& work) {
  const Weights& w = work.weights;
  for (int64_t d = 0; d < s.key && w.form != NEVER; ++d) {
    double kept = dot(state + d * s.value, m.dstate + d * s.value, s.value);
    if (r.total) kept += static_cast<double>(z[d]) * m.dz[d];
    work.db[last * w.width + (w.form == BY_CHANNEL ? d : 0)] += w.left(d) * kept;
  }
  const float* read = scaled_panels(m.q, m.q_panels, s, w.grown(), m.spare, m.turned);
  write_over(s, [&](int64_t d) { return w.left(d); }, read, m.dout, m.dstate, m.dstate, work.coming);
  if (r.total) gather_normalizer(s, w, read, work.dtotal, m.dz);
  if (!r.beta.data) return;
  read = scaled_panels(m.k, m.k_panels, s, w.grown(), m.spare, m.turned);
  write_over(s, [](int64_t) { return 1.0f; }, read, m.negative, m.dstate, m.dstate, work.coming);
}

// Keys of a chunk, and all pairs that it needs: of queries and keys if `queries`, of keys if there is the delta rule.
void read_pairs(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, bool queries, Work& work) {
  Weights& w = work.weights;
  w.set(r, s, at);
  read_rows(r.k, at, r.depth, s.key, s.tokens, m.k);
  if (r.beta.data) read_beta(r, at, s.tokens, work.beta);
  if (w.form == BY_CHANNEL) {
    turn_to_end(s, w, m.k, m.spare, m.k_panels);
    if (r.beta.data) follow(s, w, m.k, m.spare, m.grown);
    if (queries) follow(s, w, m.q, m.x_part, m.y_part);
  } else {
    turn_rows(m.k, s.tokens, s.key, m.k_panels);
    if (r.beta.data) w.grown().apply(m.k, 0, s.tokens, s.key, m.grown);
  }
  const Meeting keys{m.k, m.spare, true, r.beta.data ? m.a : nullptr};
  all_pairs(s, w, {keys, {m.q, m.x_part, false, queries ? m.p : nullptr}}, m.k, m.k_panels, work.coming);
}

// One chunk of the way there: the state before it is `state`, after it `next`. `rights` gets R.
void chunk_state(const Recurrence& r, const Sizes& s, const Place& at, const Place& later, const Memory& m,
                 const float* state, float* next, float* rights, Work& work) {
  const Weights& w = work.weights;
  read_pairs(r, s, at, m, false, work);
  const float* written = m.written;
  if (r.beta.data) {
    read_rows(r.v, at, r.value_depth, s.value, s.tokens, rights);
    solve_delta(s, m.grown, state, work.beta, m.a, rights, m.written, work.coming);
  } else {
    written = rows_of(r.v, at, r.value_depth, s.value, s.tokens, m.written);
  }
  const float* kept = m.k_panels;
  if (w.form != BY_CHANNEL) kept = scaled_panels(m.k, m.k_panels, s, w.rest(), m.spare, m.turned);
  write_over(s, [&](int64_t d) { return w.left(d); }, kept, written, state, next, work.coming);
  if (!r.total) return;
  std::copy_n(state + s.state(), s.key, next + s.state());
  gather_normalizer(s, w, kept, nullptr, next + s.state());
}

void read_chunk(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, const float* state,
                const float* rights, Work& work) {
  read_rows(r.q, at, r.depth, s.key, s.tokens, m.q);
  read_rows(r.dout, at, r.value_depth, s.value, s.tokens, m.dout);
  read_pairs(r, s, at, m, true, work);
  work.weights.spread(s);
  turn_rows(m.q, s.tokens, s.key, m.q_panels);
  if (r.beta.data)
    for (int64_t i = 0; i < s.tokens; ++i) scaled(rights + i * s.value, s.value, work.beta[i], m.written + i * s.value);
  else
    read_rows(r.v, at, r.value_depth, s.value, s.tokens, m.written);
  turn_rows(m.written, s.tokens, s.value, m.written_panels);
  turn_rows(state, s.key, s.value, m.state_panels);
  turn_rows(m.dstate, s.key, s.value, m.dstate_panels);
  const int64_t count = s.tokens * work.weights.width;
  work.db = reinterpret_cast<double*>(work.exact.take(2 * count));
  std::fill(work.db, work.db + count, 0.0);
  std::fill(work.ones, work.ones + s.tokens, 1.0f);
  const float* dtotal = r.total ? r.dtotal + (at.batch * r.heads + at.head) * r.tokens + at.from : nullptr;
  for (int64_t i = 0; i < s.tokens; ++i) work.dtotal[i] = dtotal != nullptr && i < at.count ? dtotal[i] : 0.0f;
  std::fill(m.dq, m.dq + s.tokens * s.key, 0.0f);
  std::fill(m.dk, m.dk + s.tokens * s.key, 0.0f);
}

// A decay counts for its token and all that come after. Below FLOOR it leaves nothing, however strong it is: no
// gradient.
void write_decays(const Recurrence& r, const Place& at, Work& work) {
  if (!r.decay.data) return;
  constexpr float FLOOR = -800.0f;
  const int64_t channels = r.decay.channels, width = work.weights.width;
  for (int64_t i = at.count - 1; i >= 0; --i) {
    double* db = work.db + i * width;
    const float* decay = r.decay.at(at.batch, at.head, at.from + i);
    float* out = r.ddecay.at(at.batch, at.head, at.from + i);
    for (int64_t c = 0; c < width && i < at.count - 1; ++c) db[c] += db[width + c];
    for (int64_t c = 0; c < channels; ++c) out[c] = decay[c] < FLOOR ? 0.0f : static_cast<float>(db[c]);
  }
}

// One chunk of the way back.
void chunk_gradients(const Recurrence& r, const Sizes& s, const Place& at, const Place& earlier, const Memory& m,
                     const float* state, const float* rights, Work& work) {
  read_chunk(r, s, at, m, state, rights, work);
  const Weights& w = work.weights;
  const float *z = r.total ? state + s.state() : nullptr, *dz = r.total ? m.dz : nullptr;
  const int64_t last = at.count - 1;
  value_gradients(r, s, at, m, rights, work);
  through_transposed(s, m.dout, m.state_panels, w.grown(), work.dtotal, z, m.q, 1.0f, -1, m.cells, m.dq, work);
  through_transposed(s, m.written, m.dstate_panels, w.rest(), work.ones, dz, m.k, -1.0f, last, m.cells, m.dk, work);
  written_pairs(s, m, m.dout, r.total ? work.dtotal : nullptr, false, m.g);
  pair_gradients(s, m, m.p, m.g, false, m.q, m.k, m.dq, m.dk, work);
  if (r.beta.data) {
    through_transposed(s, m.negative, m.state_panels, w.grown(), nullptr, nullptr, m.k, 1.0f, -1, m.cells, m.dk, work);
    written_pairs(s, m, m.negative, nullptr, true, m.h);
    pair_gradients(s, m, m.a, m.h, true, m.k, m.k, m.dk, m.dk, work);
  }
  write_rows(r.dq, at, r.depth, s.key, m.dq);
  write_rows(r.dk, at, r.depth, s.key, m.dk);
  write_rows(r.dv, at, r.value_depth, s.value, m.du);
  state_gradients(r, s, m, state, z, last, work);
  write_decays(r, at, work);
}

void head_gradients(const Recurrence& r, const Sizes& s, int64_t task) {
  Work& w = backward_work();
  const Memory m(s, w);
  const int64_t chunks = (r.tokens + s.tokens - 1) / s.tokens, each = s.state() + s.key;
  const int64_t size = r.depth * r.value_depth;
  float* states = w.states.take((chunks + 1) * each);
  float* rights = r.beta.data ? w.rights.take(chunks * s.tokens * s.value) : nullptr;
  const auto place = [&](int64_t chunk) {
    const int64_t from = chunk * s.tokens;
    return Place{task / r.heads, task % r.heads, from, chunk < 0 ? 0 : std::min(s.tokens, r.tokens - from)};
  };
  const auto right = [&](int64_t chunk) { return rights ? rights + chunk * s.tokens * s.value : nullptr; };
  read_start(r, s, task, states);
  std::fill(states + s.state(), states + each, 0.0f);
  if (r.total) std::copy_n(r.normalizer + task * r.depth, r.depth, states + s.state());
  for (int64_t i = 0; i + 1 < chunks || (rights && i < chunks); ++i)
    chunk_state(r, s, place(i), place(i + 1), m, states + i * each, states + (i + 1) * each, right(i), w);
  read_state(r, s, r.dmemory_after + task * size, r.value_depth, 1, m.dstate);
  std::fill(m.dz, m.dz + s.key, 0.0f);
  if (r.total) std::copy_n(r.dnormalizer_after + task * r.depth, r.depth, m.dz);
  for (int64_t i = chunks - 1; i >= 0; --i)
    chunk_gradients(r, s, place(i), place(i - 1), m, states + i * each, right(i), w);
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
