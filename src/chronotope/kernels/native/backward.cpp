// dq, dk, dv and the gradients of bias and tables, from lse: the probabilities are computed again, block by block.
//
// With P = exp(score - lse), D = sum(dout * out) - dlse for each query:
//   dv = P^T dout, dS = P * (dout v^T - D), dq = scale * dS' k, dk = scale * dS'^T q, dS' being dS through the softcap.
#include "api.h"
#include "local.h"
#include "schedule.h"
#include "short.h"

namespace chronotope {
namespace {

constexpr int64_t ROWS = 128;     // queries of one block
constexpr int WINDOW = 12;        // panels of one block: its cells stay in the cache
constexpr int STRIPS = ROWS / STRIP;
constexpr int64_t LOCAL_KEYS = 512;
constexpr int64_t PARTS = 8;      // of the queries of one key head, each with gradients of its keys

// Keys of one key head, packed in every order that a product needs, and their gradients so far.
struct Keys {
  float *k, *v;              // panels
  float *rows, *dk, *dv;     // rows
};

struct Look {
  float *k, *v, *rows, *dk, *dv;
};

struct Work {
  Scratch q, dout, dq, cells, rows, keys;
  float lse[ROWS], shift[ROWS];
  std::vector<Entry> entries;
  std::vector<Look> looks;
  Neighbours tiles;
};

Work& work() {
  static thread_local Work own;
  return own;
}

struct Widths {
  int64_t key, value, row;  // of a row of q or k, of v, and of either
  explicit Widths(const Problem& p)
      : key(round_up(p.depth, VEC)), value(round_up(p.value_depth, VEC)), row(std::max(key, value)) {}
  // Numbers for the keys of so many slots.
  int64_t packed(int64_t slots) const { return slots * (2 * key + value); }
  int64_t gradients(int64_t slots) const { return slots * (key + value); }
};

Keys divide(const Problem& p, float* packed, float* gradients, int64_t slots) {
  const Widths w(p);
  return {packed, packed + slots * p.depth, packed + slots * (p.depth + p.value_depth), gradients,
          gradients + slots * w.key};
}

Look look(const Problem& p, const Keys& keys, int64_t slot) {
  const Widths w(p);
  return {keys.k + slot * p.depth, keys.v + slot * p.value_depth, keys.rows + slot * w.key, keys.dk + slot * w.key,
          keys.dv + slot * w.value};
}

struct Strip {
  const float *q, *dout;  // rows of `key` and `value` numbers
  float* dq;
  const float *lse, *shift;
  int64_t slot, number;
};

struct Cells {
  float *weights, *ds;
};

void add_learned(const Problem& p, int64_t batch, int64_t head, int64_t lane, const Strip& strip, const Entry& entry,
                 const float* ds) {
  each_table(p, head, strip.slot, entry, [&](const Term& term, int64_t at, int r, int i) {
    if (term.gradient != nullptr) term.gradient[lane * p.heads * term.entries + at] += ds[r * VEC + i];
  });
  if (p.dbias != nullptr)
    each_bias(p, batch, head, strip.slot, entry,
              [&](int64_t at, int r, int i) { p.dbias[lane * p.bias_size + at] += ds[r * VEC + i]; });
}

// P and dS' of one strip and the panels chosen, and dq.
void strip_gradients(const Problem& p, int64_t batch, int64_t head, int64_t lane, const Strip& strip,
                     const Entry* entries, const Look* looks, const int* chosen, int count, const Cells* cells) {
  const Widths w(p);
  const float *k[WINDOW], *v[WINDOW], *rows[WINDOW];
  float *weights[WINDOW], *ds[WINDOW];
  int lanes[WINDOW];
  for (int i = 0; i < count; ++i) {
    lanes[i] = entries[chosen[i]].lanes;
    const Look& own = looks[chosen[i]];
    k[i] = own.k, v[i] = own.v, rows[i] = own.rows;
    weights[i] = cells[chosen[i]].weights, ds[i] = cells[chosen[i]].ds;
  }
  scores(strip.q, w.key, p.depth, k, weights, count, lanes[0], p.sum_scale());
  scores(strip.dout, w.value, p.value_depth, v, ds, count, lanes[0]);
  const bool biased = p.terms > 0 || p.bias != nullptr, learned = p.lanes > 0;
  for (int i = 0; i < count; ++i) {
    const Entry& entry = entries[chosen[i]];
    float slope[CELL];
    if (p.softcap > 0) bend(static_cast<float>(p.softcap), weights[i], slope);
    if (biased) add_bias(p, batch, head, strip.slot, entry, weights[i]);
    hide(entry, strip.number, weights[i], NONE);
    for (int r = 0; r < STRIP; ++r) {
      float *weight = weights[i] + r * VEC, *d = ds[i] + r * VEC;
      const vec probability = exp(load(weight) - strip.lse[r]);
      store(weight, probability);
      store(d, probability * (load(d) - strip.shift[r]));
    }
    // A score of minus infinity by a bias leaves 0 * NaN where the query has an infinite gradient; masks do not.
    hide(entry, strip.number, ds[i], 0.0f);
    if (learned) add_learned(p, batch, head, lane, strip, entry, ds[i]);
    if (p.softcap > 0)
      for (int r = 0; r < STRIP; ++r) store(ds[i] + r * VEC, load(ds[i] + r * VEC) * load(slope + r * VEC));
  }
  columns(w.key, [&]<int N>(int64_t at) { weigh<N>(ds, rows, lanes, count, w.key, w.row, at, strip.dq); });
}

// dk and dv of one panel from all strips that see it.
void panel_gradients(const Problem& p, const Look& own, const float* const* weights, const float* const* ds,
                     const float* const* q, const float* const* dout, int count) {
  const Widths w(p);
  for (int lane = 0; lane < VEC; lane += STRIP) {
    const float *shifted[STRIPS], *dshifted[STRIPS];
    for (int s = 0; s < count; ++s) shifted[s] = weights[s] + lane, dshifted[s] = ds[s] + lane;
    columns(w.value, [&]<int N>(int64_t at) {
      weigh_columns<N>(shifted, dout, count, w.value, at, own.dv + lane * w.value);
    });
    columns(w.key, [&]<int N>(int64_t at) { weigh_columns<N>(dshifted, q, count, w.key, at, own.dk + lane * w.key); });
  }
}

// Some queries of a tile, from slot `base` on, `from` being their place in the tile. q, dout and dq are rows;
// dq holds out at first.
void attend(const Problem& p, int64_t batch, int64_t head, int64_t base, int64_t from, int64_t rows, int64_t lane,
            const Entry* every_entry, const Look* every_look, int64_t entries, const float* q, const float* dout,
            float* dq, Work& w) {
  const Widths widths(p);
  const int strips = static_cast<int>(rows / STRIP);
  float* cells = w.cells.take(2 * STRIPS * WINDOW * CELL);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = p.queries.source[base + r], at = (batch * p.heads + head) * p.tokens + token;
    const bool blind = token < 0 || p.lse[at] == NONE;
    w.lse[r] = blind ? -NONE : p.lse[at];
    vec product = {};
    for (int64_t c = 0; c < widths.value; c += VEC)
      product += load(dq + r * widths.row + c) * load(dout + r * widths.value + c);
    w.shift[r] = blind ? 0.0f : sum(product) - (p.dlse != nullptr ? p.dlse[at] : 0.0f);
    std::fill(dq + r * widths.row, dq + (r + 1) * widths.row, 0.0f);
  }
  for (int64_t start = 0; start < entries; start += WINDOW) {
    const int some = static_cast<int>(std::min<int64_t>(WINDOW, entries - start));
    const Entry* own = every_entry + start;
    const Look* looks = every_look + start;
    bool met[STRIPS][WINDOW];
    for (int s = 0; s < strips; ++s) {
      const int64_t r = s * STRIP;
      const Strip strip{q + r * widths.key, dout + r * widths.value, dq + r * widths.row, w.lse + r, w.shift + r,
                        base + r, from / STRIP + s};
      int chosen[WINDOW], count = 0;
      Cells here[WINDOW];
      for (int i = 0; i < some; ++i) {
        met[s][i] = visible(own[i], strip.number);
        if (met[s][i]) chosen[count++] = i;
        float* cell = cells + (s * WINDOW + i) * 2 * CELL;
        here[i] = {cell, cell + CELL};
      }
      if (count > 0) strip_gradients(p, batch, head, lane, strip, own, looks, chosen, count, here);
    }
    for (int i = 0; i < some; ++i) {
      const float *weights[STRIPS], *ds[STRIPS], *qs[STRIPS], *douts[STRIPS];
      int count = 0;
      for (int s = 0; s < strips; ++s)
        if (met[s][i]) {
          weights[count] = cells + (s * WINDOW + i) * 2 * CELL, ds[count] = weights[count] + CELL;
          qs[count] = q + s * STRIP * widths.key, douts[count++] = dout + s * STRIP * widths.value;
        }
      if (count > 0) panel_gradients(p, looks[i], weights, ds, qs, douts, count);
    }
  }
}

// Tiles that share no keys: a task takes some neighbours, packs their keys, and has their gradients complete in the end.
void backward_local(const Problem& p) {
  const Widths widths(p);
  const int64_t tiles = p.queries.tiles, group = p.heads / p.key_heads;
  const int64_t some = tiles_at_once(p, 4 * widths.key + 4 * widths.value), bundles = (tiles + some - 1) / some;
  const auto run = [&](int64_t task, int64_t lane) {
    Work& w = work();
    const int64_t from = task % bundles * some, to = std::min(from + some, tiles), pair = task / bundles;
    const int64_t batch = pair / p.key_heads, key_head = pair % p.key_heads;
    w.tiles.list(p, from, to);
    const int64_t count = static_cast<int64_t>(w.tiles.entries.size()), slots = count * VEC + some;
    const int64_t packed = widths.packed(slots), gradients = widths.gradients(slots);
    float* memory = w.keys.take(packed + gradients);
    const Keys keys = divide(p, memory, memory + packed, slots);
    // dv's room holds the rows of v until they are turned.
    const auto& values = w.tiles.key_runs(w.tiles.source, widths.value, keys.dv);
    gather(p.v, p.type, batch, key_head, values.data(), to - from, p.value_depth, 1.0f, widths.value);
    const auto& rows = w.tiles.key_runs(w.tiles.source, widths.key, keys.rows);
    gather(p.k, p.type, batch, key_head, rows.data(), to - from, p.depth, 1.0f, widths.key);
    w.looks.clear();
    for (int64_t tile = 0; tile < to - from; ++tile)
      for (int64_t i = w.tiles.first[tile]; i < w.tiles.first[tile + 1]; ++i) {
        const Look own = look(p, keys, i * VEC + tile);
        turn(own.dv, widths.value, p.value_depth, own.v);
        turn(own.rows, widths.key, p.depth, own.k);
        w.looks.push_back(own);
      }
    std::fill(keys.dk, keys.dk + gradients, 0.0f);
    const int64_t length = p.queries.first[to] - p.queries.first[from] + some;
    float *q = w.q.take(length * widths.key), *dout = w.dout.take(length * widths.value);
    float* dq = w.dq.take(length * widths.row);
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      const auto bring = [&](const Tensor& x, int64_t size, float scale, int64_t width, float* into) {
        const auto& runs = w.tiles.query_runs(p, p.queries.source, from, width, into);
        gather(x, p.type, batch, head, runs.data(), to - from, size, scale, width);
      };
      bring(p.q, p.depth, p.row_scale(), widths.key, q);
      bring(p.dout, p.value_depth, 1.0f, widths.value, dout);
      bring(p.out, p.value_depth, 1.0f, widths.row, dq);
      for (int64_t tile = from; tile < to; ++tile) {
        const int64_t at = w.tiles.first[tile - from], first = p.queries.first[tile], end = p.queries.first[tile + 1];
        for (int64_t slot = first; slot < end; slot += ROWS) {
          const int64_t row = w.tiles.query_row(p, from, tile - from) + slot - first;
          attend(p, batch, head, slot, slot - first, std::min(ROWS, end - slot), lane, w.tiles.entries.data() + at,
                 w.looks.data() + at, w.tiles.first[tile - from + 1] - at, q + row * widths.key,
                 dout + row * widths.value, dq + row * widths.row, w);
        }
      }
      const auto& results = w.tiles.query_runs(p, p.queries.token, from, widths.row, dq);
      scatter(p.dq, p.type, batch, head, results.data(), to - from, p.depth, static_cast<float>(p.scale), widths.row);
    }
    const auto& dk = w.tiles.key_runs(w.tiles.token, widths.key, keys.dk);
    scatter(p.dk, p.type, batch, key_head, dk.data(), to - from, p.depth, p.sum_scale(), widths.key);
    const auto& dv = w.tiles.key_runs(w.tiles.token, widths.value, keys.dv);
    scatter(p.dv, p.type, batch, key_head, dv.data(), to - from, p.value_depth, 1.0f, widths.value);
  };
  const int64_t tasks = p.batch * p.key_heads * bundles;
  if (p.lanes > 0)
    deal_in_lanes(tasks, p.lanes, run);
  else
    deal(tasks, 1, run);
}

// All queries of a tile, for the heads that share a key head.
void tile_gradients(const Problem& p, int64_t batch, int64_t key_head, int64_t tile, int64_t lane, const Keys& keys,
                    Work& w) {
  const Widths widths(p);
  const int64_t group = p.heads / p.key_heads, first = p.queries.first[tile], end = p.queries.first[tile + 1];
  w.entries.clear(), w.looks.clear();
  list_panels(p, tile, w.entries);
  for (const Entry& entry : w.entries) w.looks.push_back(look(p, keys, entry.slot));
  float *q = w.q.take(ROWS * widths.key), *dout = w.dout.take(ROWS * widths.value), *dq = w.dq.take(ROWS * widths.row);
  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
    for (int64_t base = first; base < end; base += ROWS) {
      const int64_t rows = std::min(ROWS, end - base);
      const auto run = [&](const int32_t* tokens, float* into) { return Run{tokens + base, rows, into}; };
      const Run qs = run(p.queries.source, q), douts = run(p.queries.source, dout), outs = run(p.queries.source, dq);
      gather(p.q, p.type, batch, head, &qs, 1, p.depth, p.row_scale(), widths.key);
      gather(p.dout, p.type, batch, head, &douts, 1, p.value_depth, 1.0f, widths.value);
      gather(p.out, p.type, batch, head, &outs, 1, p.value_depth, 1.0f, widths.row);
      attend(p, batch, head, base, base - first, rows, lane, w.entries.data(), w.looks.data(),
             static_cast<int64_t>(w.entries.size()), q, dout, dq, w);
      const Run dqs = run(p.queries.token, dq);
      scatter(p.dq, p.type, batch, head, &dqs, 1, p.depth, static_cast<float>(p.scale), widths.row);
    }
}

void write_keys(const Problem& p, int64_t batch, int64_t head, int64_t from, int64_t to, float* dk, float* dv) {
  const Widths w(p);
  const Run dks{p.keys.token + from, to - from, dk}, dvs{p.keys.token + from, to - from, dv};
  scatter(p.dk, p.type, batch, head, &dks, 1, p.depth, p.sum_scale(), w.key);
  scatter(p.dv, p.type, batch, head, &dvs, 1, p.value_depth, 1.0f, w.value);
}

// The query tiles of a key head in `parts` pieces of about the same work; each piece has gradients of its own.
std::vector<int64_t> cut(const Problem& p, int64_t parts) {
  std::vector<int64_t> ends{0};
  int64_t total = 0, sum = 0;
  const auto cost = [&](int64_t tile) {
    int64_t keys = 1;
    for (int64_t i = p.start[tile]; i < p.start[tile + 1]; ++i) keys += p.keys.size[p.tile[i]];
    return keys * p.queries.size[tile];
  };
  for (int64_t tile = 0; tile < p.queries.tiles; ++tile) total += cost(tile);
  for (int64_t tile = 0; tile < p.queries.tiles; ++tile) {
    sum += cost(tile);
    while (static_cast<int64_t>(ends.size()) <= parts && sum * parts >= total * static_cast<int64_t>(ends.size()))
      ends.push_back(tile + 1);
  }
  ends.resize(parts + 1, p.queries.tiles);
  return ends;
}

// Some key heads at a time. A task owns the gradients that it adds to, so that the result is the same every time.
void backward_shared(const Problem& p) {
  const Widths widths(p);
  const int64_t threads = at::get_num_threads(), pairs = p.batch * p.key_heads, slots = p.keys.slots;
  const int64_t packed = widths.packed(slots), gradients = widths.gradients(slots);
  const int64_t at_once = std::min(pairs, threads);
  const int64_t parts = std::min({p.queries.tiles, (threads + at_once - 1) / at_once, PARTS});
  const std::vector<int64_t> ends = cut(p, parts);
  Scratch scratch;
  float* memory = scratch.take(at_once * (packed + parts * gradients));
  float* sums = memory + at_once * packed;
  for (int64_t start = 0; start < pairs; start += at_once) {
    const int64_t some = std::min(at_once, pairs - start);
    deal(some * p.keys.tiles, 8, [&](int64_t task, int64_t) {
      const int64_t pair = task / p.keys.tiles, tile = task % p.keys.tiles;
      const int64_t batch = (start + pair) / p.key_heads, head = (start + pair) % p.key_heads;
      const int64_t from = p.keys.first[tile], to = p.keys.first[tile + 1];
      const Look own = look(p, divide(p, memory + pair * packed, sums, slots), from);
      const Run run{p.keys.source + from, to - from, own.rows};
      gather(p.k, p.type, batch, head, &run, 1, p.depth, 1.0f, widths.key);
      for (int64_t i = 0; i < to - from; i += VEC)
        turn(own.rows + i * widths.key, widths.key, p.depth, own.k + i * p.depth);
      float* rows = work().rows.take(VEC * widths.value);
      pack_panels(p.v, p.type, batch, head, p.keys.source, from, to, p.value_depth, rows, own.v);
    });
    const auto run = [&](int64_t task, int64_t lane) {
      Work& w = work();
      const int64_t pair = task / parts, part = task % parts;
      const Keys keys = divide(p, memory + pair * packed, sums + task * gradients, slots);
      std::fill(keys.dk, keys.dk + gradients, 0.0f);
      for (int64_t tile = ends[part]; tile < ends[part + 1]; ++tile)
        tile_gradients(p, (start + pair) / p.key_heads, (start + pair) % p.key_heads, tile, lane, keys, w);
    };
    if (p.lanes > 0)
      deal_in_lanes(some * parts, p.lanes, run);
    else
      deal(some * parts, 1, run);
    deal(some * p.keys.tiles, 8, [&](int64_t task, int64_t) {
      const int64_t pair = task / p.keys.tiles, tile = task % p.keys.tiles;
      const int64_t from = p.keys.first[tile], to = p.keys.first[tile + 1];
      const auto add = [&](int64_t offset, int64_t width) {
        float* first = sums + pair * parts * gradients + offset + from * width;
        for (int64_t part = 1; part < parts; ++part)
          for (int64_t i = 0; i < (to - from) * width; ++i) first[i] += first[part * gradients + i];
        return first;
      };
      float *dk = add(0, widths.key), *dv = add(slots * widths.key, widths.value);
      write_keys(p, (start + pair) / p.key_heads, (start + pair) % p.key_heads, from, to, dk, dv);
    });
  }
}

}  // namespace
}  // namespace chronotope

int chronotope_backward(const chronotope::Problem* p) {
  return chronotope::guarded([&] {
    if (chronotope::is_short(*p))
      chronotope::backward_short(*p);
    else if (chronotope::local(*p, chronotope::LOCAL_KEYS))
      chronotope::backward_local(*p);
    else
      chronotope::backward_shared(*p);
  });
}
