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

// Whether out goes to memory past the cache: all of it would not stay there, and each line would be read to be written.
bool streamed(const Recurrence& r, const Sizes& s) {
  constexpr int64_t LARGE = 1 << 24;  // bytes
  if (!STREAMS || r.value_depth != s.value || 4 * r.batch * r.heads * r.tokens * s.value < LARGE) return false;
  return reinterpret_cast<uintptr_t>(r.out.data) % 64 == 0 && (r.out.batch | r.out.head | r.out.token) % VEC == 0;
}

// Where everything of one chunk lies.
struct Memory {
  float *q, *k, *since, *grown, *spare, *k_grown;  // rows of `key`
  float *v, *written;                              // rows of `value`
  float *panels, *turned;                          // lanes are tokens
  float *pairs, *link;                             // cells of all pairs
  float *out, *state, *z;
  bool streams;

  Memory(const Recurrence& r, const Sizes& s, Work& w) {
    const int64_t rows = s.tokens * s.key, values = s.tokens * s.value, all_pairs = s.strips * s.panels * CELL;
    float* at = w.memory.take(8 * rows + 2 * values + 2 * all_pairs + STRIP * s.value + s.state() + s.key);
    for (float** x : {&q, &k, &since, &grown, &spare, &k_grown, &panels, &turned}) *x = at, at += rows;
    for (float** x : {&v, &written}) *x = at, at += values;
    for (float** x : {&pairs, &link}) *x = at, at += all_pairs;
    out = at, at += STRIP * s.value;
    state = at, at += s.state();
    z = at;
    if (!r.beta.data) link = nullptr;
    streams = streamed(r, s);
  }
};

// q . z for the rows of a strip, q being what is left of it since the chunk's start; and what their own chunk adds: the
// sums of its cells.
void add_totals(const Recurrence& r, const Sizes& s, const Place& at, int64_t strip, float* const* cells,
                const float* grown, const float* z) {
  for (int i = 0; i < STRIP; ++i) {
    const int64_t t = strip * STRIP + i;
    if (t >= at.count) return;
    vec sum = {};
    for (int p = 0; p < seen_panels(strip); ++p) sum += load(cells[p] + i * VEC);
    for (int64_t c = 0; c < s.key; c += VEC) sum += load(grown + t * s.key + c) * load(z + c);
    r.total[(at.batch * r.heads + at.head) * r.tokens + at.from + t] = chronotope::sum(sum);
  }
}

// Weights of all pairs, with the delta rule those of the keys too. Returns the queries times what is left since the
// start of the chunk; `kept` become the keys, turned, times what is left of them at its end.
const float* weigh_chunk(const Recurrence& r, const Sizes& s, const Weights& w, const float* q, const float* k,
                         const Memory& m, Coming& coming, const float*& kept) {
  if (w.form == BY_CHANNEL) {
    turn_to_end(s, w, k, m.spare, m.panels);
    follow(s, w, q, m.since, m.grown);
    if (r.beta.data) follow(s, w, k, m.spare, m.k_grown);
  } else {
    turn_rows(k, s.tokens, s.key, m.panels);
    if (w.form == BY_TOKEN) w.grown().apply(q, 0, s.tokens, s.key, m.grown);
    if (r.beta.data) w.grown().apply(k, 0, s.tokens, s.key, m.k_grown);
  }
  all_pairs(s, w, {{k, m.spare, true, m.link}, {q, m.since, false, m.pairs}}, k, m.panels, coming);
  kept = w.form == BY_CHANNEL ? m.panels : scaled_panels(k, m.panels, s, w.rest(), m.spare, m.turned);
  return w.form == NEVER ? q : m.grown;
}

// out of one strip: what it reads of the state, and of its own chunk.
void write_out(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, int64_t strip, const float* grown,
               const float* written, Coming& coming) {
  const Cells cells(s, m.pairs, strip);
  // A sum is complete before it is added to the other: two short sums err less than a long one.
  Sum before, sum;
  before.add(grown + strip * STRIP * s.key, s.key, m.state, s.depth);
  before.each(s.value, [&](int row, int64_t column, vec x) { store(m.out + row * s.value + column, x); });
  add_pairs(sum, cells, strip, written, s.value);
  coming.step();
  const Place own{at.batch, at.head, at.from + strip * STRIP, std::min<int64_t>(STRIP, at.count - strip * STRIP)};
  const bool whole = own.count == STRIP && r.value_depth == s.value;
  float* out = whole ? static_cast<float*>(r.out.data) + offset(r.out, own.batch, own.head, own.from) : m.out;
  const int64_t apart = whole ? r.out.token : s.value;
  const auto both = [&](int row, int64_t column, vec x) { return load(m.out + row * s.value + column) + x; };
  if (whole && m.streams)
    sum.each(s.value, [&](int row, int64_t c, vec x) { stream(out + row * apart + c, both(row, c, x)); });
  else
    sum.each(s.value, [&](int row, int64_t c, vec x) { store(out + row * apart + c, both(row, c, x)); });
  if (!whole) write_rows(r.out, own, r.value_depth, s.value, out);
  if (r.total) add_totals(r, s, at, strip, cells.own, grown, m.z);
  coming.step();
}

void chunk_forward(const Recurrence& r, const Sizes& s, const Place& at, const Memory& m, Work& work) {
  Weights& w = work.weights;
  w.set(r, s, at);
  const float* q = rows_of(r.q, at, r.depth, s.key, s.tokens, m.q);
  const float* k = rows_of(r.k, at, r.depth, s.key, s.tokens, m.k);
  const Place next{at.batch, at.head, at.from + at.count, std::min(s.tokens, r.tokens - at.from - at.count)};
  Coming coming(next);
  coming.add(r.q, r.depth), coming.add(r.k, r.depth), coming.add(r.v, r.value_depth), coming.add(r.decay);
  coming.divide((r.beta.data ? 5 : 3) * s.strips + s.key / STRIP);
  const float *kept, *grown = weigh_chunk(r, s, w, q, k, m, coming, kept), *written = m.written;
  if (r.beta.data) {
    read_rows(r.v, at, r.value_depth, s.value, s.tokens, m.v);
    read_beta(r, at, s.tokens, work.beta);
    solve_delta(s, m.k_grown, m.state, work.beta, m.link, m.v, m.written, coming);
  } else {
    written = rows_of(r.v, at, r.value_depth, s.value, s.tokens, m.v);
  }
  for (int64_t strip = 0; strip * STRIP < at.count; ++strip) write_out(r, s, at, m, strip, grown, written, coming);
  write_over(s, [&](int64_t d) { return w.left(d); }, kept, written, m.state, m.state, coming);
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
      read_start(r, s, task, m.state);
      std::fill(m.z, m.z + s.key, 0.0f);
      if (r.total) std::copy_n(r.normalizer + task * r.depth, r.depth, m.z);
      for (int64_t from = 0; from < r.tokens; from += s.tokens) {
        const Place at{task / r.heads, task % r.heads, from, std::min(s.tokens, r.tokens - from)};
        chunk_forward(r, s, at, m, w);
      }
      if (m.streams) fence();
      write_state(r, s, m.state, r.memory_after + task * r.depth * r.value_depth);
      if (r.total) std::copy_n(m.z, r.depth, r.normalizer_after + task * r.depth);
    });
  });
}
