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
#include "recurrence_pairs.h"
#include "schedule.h"

namespace chronotope {
namespace {

struct Work {
  Scratch memory, exact, states, rights;
  float beta[MOST_CHUNK], dtotal[MOST_CHUNK], ones[MOST_CHUNK];
  double* db;  // as Weights::b
  Weights weights;
};

Work& work() {
  static thread_local Work own;
  return own;
}

// Where everything of one chunk lies.
struct Memory {
  float *q, *k, *dq, *dk, *spare, *x_part, *y_part;  // rows of `key`
  float *written, *dout, *du, *negative;             // rows of `value`; negative is -dR
  float *k_panels, *q_panels, *turned;               // lanes are tokens
  float* written_panels;                             // lanes are tokens
  float *state_panels, *dstate_panels;               // lanes are key channels
  float *p, *g, *a, *h, *cells;                      // cells: of all pairs, and of one strip
  float *dstate, *dz;

  Memory(const Sizes& s, Work& w) {
    const int64_t rows = s.tokens * s.key, values = s.tokens * s.value, pairs = s.strips * s.panels * CELL;
    const int64_t strip = (s.panels + s.key / VEC) * CELL;
    float* at = w.memory.take(10 * rows + 5 * values + 3 * s.state() + 4 * pairs + strip + s.key);
    for (float** x : {&q, &k, &dq, &dk, &spare, &x_part, &y_part, &k_panels, &q_panels, &turned}) *x = at, at += rows;
    for (float** x : {&written, &dout, &du, &negative, &written_panels}) *x = at, at += values;
    for (float** x : {&state_panels, &dstate_panels, &dstate}) *x = at, at += s.state();
    for (float** x : {&p, &g, &a, &h}) *x = at, at += pairs;
    cells = at, at += strip;
    dz = at;
  }
};

// out [STRIP][width] += cells of this strip times rows of `table`.
void times_rows(const Cells& cells, int64_t strip, const float* table, int64_t width, float* out) {
  Sum sum;
  for (int p = 0; p < seen_panels(strip); ++p) sum.add(cells.own[p], table + p * VEC * width, VEC);
  sum.into(width, out);
}

// out [STRIP][width] += transposed cells of the strips from `first` to `last`, in the columns of `strip`, times their rows.
void times_columns(const Sizes& s, const float* cells, int64_t strip, int64_t first, int64_t last, const float* table,
                   int64_t width, float* out) {
  const float *own[MOST_STRIPS], *tables[MOST_STRIPS];
  const int64_t panel = strip * STRIP / VEC, lane = strip * STRIP % VEC;
  int count = 0;
  for (int64_t i = first; i < last; ++i, ++count)
    own[count] = cells + (i * s.panels + panel) * CELL + lane, tables[count] = table + i * STRIP * width;
  if (count == 0) return;
  columns(width, [&]<int N>(int64_t at) { weigh_columns<N>(own, tables, count, width, at, out); });
}

// db_i += sign * sum over channels of x_i * y_i, or channel by channel.
void add_products(const Sizes& s, Work& w, int64_t row, float sign, const float* x, const float* y) {
  const Weights& weights = w.weights;
  if (weights.form == NEVER) return;
  double* db = w.db + row * weights.width;
  double sum = 0;
  for (int64_t c = 0; c < s.key; ++c) {
    const double gain = static_cast<double>(x[c]) * y[c];
    if (weights.form == BY_CHANNEL)
      db[c] += sign * gain;
    else
      sum += gain;
  }
  if (weights.form == BY_TOKEN) *db += sign * sum;
}

// db_i += the sum of row i of x * y, db_j -= the sum of column j: in double, so that what cancels does so exactly.
void add_exponents(int64_t strip, const Cells& x, const Cells& y, double* db) {
  for (int p = 0; p < seen_panels(strip); ++p)
    for (int r = 0; r < STRIP; ++r) {
      double row = 0;
      for (int l = 0; l < VEC; ++l) {
        const double gain = static_cast<double>(x.own[p][r * VEC + l]) * y.own[p][r * VEC + l];
        row += gain;
        db[p * VEC + l] -= gain;
      }
      db[strip * STRIP + r] += row;
    }
}

// Inside a strip, channel by channel: x_part_i += g_ij y_j exp(b_i - b_j) and y_part_j += g_ij x_i exp(b_i - b_j), j < i.
void near_pairs(const Sizes& s, const Weights& w, int64_t strip, const float* g, const float* x, const float* y,
                const Memory& m) {
  const int64_t first = strip * STRIP;
  for (int r = 1; r < STRIP; ++r)
    for (int l = 0; l < r; ++l)
      for (int64_t c = 0; c < s.key; c += VEC) {
        const int64_t i = (first + r) * s.key + c, j = (first + l) * s.key + c;
        const vec weight = g[r * VEC + l] * w.between(first + r, first + l, c);
        store(m.x_part + i, load(m.x_part + i) + weight * load(y + j));
        store(m.y_part + j, load(m.y_part + j) + weight * load(x + i));
      }
}

// Decays by channel: the cells g of dP, hidden but not weighed, become gradients of x (dx) and y (dy), and of the decays.
void pairs_by_channel_gradients(const Sizes& s, const Memory& m, const float* g, const float* x, const float* y, float* dx,
                                float* dy, Work& work) {
  const Weights& w = work.weights;
  const int64_t rows = s.tokens * s.key;
  std::fill(m.x_part, m.x_part + rows, 0.0f);
  std::fill(m.y_part, m.y_part + rows, 0.0f);
  Running running(s, w, y);
  for (int64_t strip = 0; strip < s.strips; ++strip) {
    const Cells cells(s, const_cast<float*>(g), strip);
    const int64_t first = strip * STRIP;
    float* out = m.x_part + first * s.key;
    if (strip > 0) {
      times_rows(cells, strip, w.running, s.key, out);
      since_strip(s, w, m.x_part, strip, out);
    }
    near_pairs(s, w, strip, cells.own[seen_panels(strip) - 1] + first % VEC, x, y, m);
    running.advance(strip);
  }
  // What later strips add to earlier rows of y, relative to the token before the strip that was last.
  float* sums = w.running;
  std::fill(sums, sums + rows, 0.0f);
  for (int64_t strip = s.strips - 1; strip > 0; --strip) {
    const int64_t first = strip * STRIP, last = first + STRIP - 1;
    for (int64_t c = 0; c < s.key; c += VEC) {
      const vec shrunk = w.between(last, first - 1, c);
      for (int64_t j = 0; j < first; ++j) store(sums + j * s.key + c, shrunk * load(sums + j * s.key + c));
    }
    since_strip(s, w, x, strip, m.spare + first * s.key);
    for (int64_t j = 0; j < strip; ++j)
      times_columns(s, g, j, strip, strip + 1, m.spare, s.key, sums + j * STRIP * s.key);
    for (int64_t j = first - STRIP; j < first; ++j)
      for (int64_t c = 0; c < s.key; c += VEC)
        add(m.y_part + j * s.key + c, w.between(first - 1, j, c) * load(sums + j * s.key + c));
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
void written_pairs(const Sizes& s, const Memory& m, const float* rows, const float* extra, bool strict, float* cells) {
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
void pair_gradients(const Sizes& s, const Memory& m, float* weighed, float* g, bool strict, const float* x,
                    const float* y, float* dx, float* dy, Work& work) {
  if (work.weights.form == BY_CHANNEL) {
    pairs_by_channel_gradients(s, m, g, x, y, dx, dy, work);
    return;
  }
  for (int64_t strip = 0; strip < s.strips; ++strip) {
    const Cells own(s, g, strip);
    if (work.weights.form == BY_TOKEN) add_exponents(strip, Cells(s, weighed, strip), own, work.db);
    weigh_pairs(work.weights, strip, strict, own.own);
    times_rows(own, strip, y, s.key, dx + strip * STRIP * s.key);
  }
  for (int64_t strip = 0; strip < s.strips; ++strip)
    times_columns(s, g, strip, strip, s.strips, x, s.key, dy + strip * STRIP * s.key);
}

// out [tokens][key] += factor * (rows [tokens][value] times a state, whose panels are given, + extra * z); the decays of
// each row gain `sign` times its product with `with`, and `last`, where there is one, the opposite.
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
    through(m.k + strip * STRIP * s.key, s.depth, s.key, work.weights.rest().from(strip * STRIP), 1.0f, m.dstate,
            s.value, m.cells, du);
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
    double kept = 0;
    for (int64_t e = 0; e < s.value; ++e) kept += static_cast<double>(state[d * s.value + e]) * m.dstate[d * s.value + e];
    if (r.total) kept += static_cast<double>(z[d]) * m.dz[d];
    work.db[last * w.width + (w.form == BY_CHANNEL ? d : 0)] += w.over(d)[0] * kept;
  }
  shrink(s, w, m.dstate);
  const float* read = scaled_panels(m.q, m.q_panels, s, w.grown(), m.spare, m.turned);
  gather_state(read, s, m.dout, s.value, m.dstate);
  if (r.total) gather_normalizer(s, w, read, work.dtotal, m.dz);
  if (!r.beta.data) return;
  gather_state(scaled_panels(m.k, m.k_panels, s, w.grown(), m.spare, m.turned), s, m.negative, s.value, m.dstate);
}

void read_keys(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, Work& work) {
  work.weights.set(r, s, at);
  read_rows(r.k, at, r.depth, s.key, s.tokens, m.k);
  turn_rows(m.k, s.tokens, s.key, m.k_panels);
  if (!r.beta.data) return;
  read_beta(r, at, s.tokens, work.beta);
  all_pairs(s, work.weights, m.k, m.k, m.k_panels, true, m.turned, m.a);
}

// One chunk of the way there: the state before it is `state`, after it `next`. `rights` gets R.
void chunk_state(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, const float* state, float* next,
                 float* rights, Work& work) {
  read_keys(r, s, at, m, work);
  read_rows(r.v, at, r.value_depth, s.value, s.tokens, r.beta.data ? rights : m.written);
  if (r.beta.data) solve_delta(s, work.weights, m.k, state, work.beta, m.a, rights, m.written, m.cells);
  std::copy_n(state, s.state() + s.key, next);
  shrink(s, work.weights, next);
  const float* kept = scaled_panels(m.k, m.k_panels, s, work.weights.rest(), m.spare, m.turned);
  gather_state(kept, s, m.written, s.value, next);
  if (r.total) gather_normalizer(s, work.weights, kept, nullptr, next + s.state());
}

void read_chunk(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, const float* state,
                const float* rights, Work& work) {
  read_keys(r, s, at, m, work);
  read_rows(r.q, at, r.depth, s.key, s.tokens, m.q);
  read_rows(r.dout, at, r.value_depth, s.value, s.tokens, m.dout);
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

void write_decays(const Recurrence& r, const Place& at, Work& work) {
  if (!r.decay.data) return;
  const int64_t channels = r.decay.channels, width = work.weights.width;
  float* out = r.ddecay + ((at.batch * r.heads + at.head) * r.tokens + at.from) * channels;
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t i = at.count - 1; i >= 0; --i) out[i * channels + c] = static_cast<float>(sum += work.db[i * width + c]);
  }
}

// One chunk of the way back.
void chunk_gradients(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, const float* state,
                     const float* rights, Work& work) {
  read_chunk(r, s, at, m, state, rights, work);
  const Weights& w = work.weights;
  const float *z = r.total ? state + s.state() : nullptr, *dz = r.total ? m.dz : nullptr;
  const int64_t last = at.count - 1;
  all_pairs(s, w, m.q, m.k, m.k_panels, false, m.turned, m.p);
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
