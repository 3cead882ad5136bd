// out and lse: for each strip of queries the panels that it sees, with online softmax.
#include "api.h"
#include "local.h"
#include "schedule.h"
#include "short.h"

namespace chronotope {
namespace {

constexpr int64_t ROWS = 128;           // queries of one task
constexpr int64_t WINDOW_BYTES = 1 << 19;  // keys and values that the strips of a task go through together
constexpr int BATCH = 24;               // panels between two rescalings
constexpr int64_t LOCAL_KEYS = 512;     // up to so many, keys that one tile alone looks at are packed by its task
constexpr int64_t PACKED_BYTES = 1 << 26;

struct Work {
  Scratch q, out, cells, rows, k, v;
  float top[ROWS], total[ROWS];
  std::vector<Entry> entries;
  std::vector<const float*> panels, values;  // of each entry
  Neighbours tiles;
};

Work& work() {
  static thread_local Work own;
  return own;
}

struct Strip {
  float *q, *out, *top, *total;
  int64_t slot, number;  // first query, and which strip of the tile
};

// What a strip looks at: entries, and where their keys and values are.
struct Looks {
  const Entry* entries;
  const float *const *panels, *const *values;
  int64_t count;
};

// One batch of panels for one strip.
void absorb(const Problem& p, int64_t batch, int64_t head, const Strip& strip, const Looks& looks, const int* chosen,
            int count, float* memory) {
  const int64_t width = round_up(p.value_depth, VEC);
  const float *panels[BATCH], *values[BATCH];
  float* cells[BATCH] = {};
  int lanes[BATCH];
  for (int i = 0; i < count; ++i) {
    lanes[i] = looks.entries[chosen[i]].lanes;
    panels[i] = looks.panels[chosen[i]];
    values[i] = looks.values[chosen[i]];
    cells[i] = memory + i * CELL;
  }
  scores(strip.q, p.depth, p.depth, panels, cells, count, lanes[0], p.sum_scale());
  const bool biased = p.terms > 0 || p.bias != nullptr;
  for (int i = 0; i < count; ++i) {
    const Entry& entry = looks.entries[chosen[i]];
    if (p.softcap > 0) bend(static_cast<float>(p.softcap), cells[i], nullptr);
    if (biased) add_bias(p, batch, head, strip.slot, entry, cells[i]);
    hide(entry, strip.number, cells[i], NONE);
  }
  vec most[STRIP], added[STRIP] = {};
  float top[STRIP], sum[STRIP];
  for (int r = 0; r < STRIP; ++r) {
    most[r] = load(cells[0] + r * VEC);
    for (int i = 1; i < count; ++i) most[r] = larger(most[r], load(cells[i] + r * VEC));
  }
  fold(most, top, larger);
  for (int r = 0; r < STRIP; ++r) {
    top[r] = std::max(strip.top[r], top[r]);
    const float base = top[r] == NONE ? 0.0f : top[r];
    for (int i = 0; i < count; ++i) {
      const vec weight = exp(load(cells[i] + r * VEC) - base);
      store(cells[i] + r * VEC, weight);
      added[r] += weight;
    }
  }
  fold(added, sum, [](vec a, vec b) { return a + b; });
  for (int r = 0; r < STRIP; ++r) {
    if (strip.top[r] != NONE && top[r] != strip.top[r]) {
      const float shrink = std::exp(strip.top[r] - top[r]);
      strip.total[r] *= shrink;
      for (int64_t c = 0; c < width; c += VEC) store(strip.out + r * width + c, shrink * load(strip.out + r * width + c));
    }
    strip.top[r] = top[r];
    strip.total[r] += sum[r];
  }
  columns(width, [&]<int N>(int64_t at) { weigh<N>(cells, values, lanes, count, width, width, at, strip.out); });
}

// Some queries of a tile, from slot `base` on, `from` being their place in the tile: q holds their rows, out takes them.
void attend(const Problem& p, int64_t batch, int64_t head, int64_t base, int64_t from, int64_t rows,
            const Looks& looks, float* q, float* out, Work& w) {
  const int64_t width = round_up(p.value_depth, VEC);
  std::fill(out, out + rows * width, 0.0f);
  std::fill(w.top, w.top + rows, NONE);
  std::fill(w.total, w.total + rows, 0.0f);
  float* cells = w.cells.take(BATCH * CELL);
  const int64_t window = std::max<int64_t>(BATCH, WINDOW_BYTES / (4 * VEC * (p.depth + width)));
  for (int64_t start = 0; start < looks.count; start += window)
    for (int64_t r = 0; r < rows; r += STRIP) {
      const Strip strip{q + r * p.depth, out + r * width, w.top + r, w.total + r, base + r, (from + r) / STRIP};
      int chosen[BATCH], count = 0;
      for (int64_t i = start; i < std::min(start + window, looks.count); ++i) {
        if (!visible(looks.entries[i], strip.number)) continue;
        chosen[count++] = static_cast<int>(i);
        if (count == BATCH) absorb(p, batch, head, strip, looks, chosen, std::exchange(count, 0), cells);
      }
      if (count > 0) absorb(p, batch, head, strip, looks, chosen, count, cells);
    }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = p.queries.token[base + r];
    if (token < 0) continue;
    const float total = w.total[r], share = total == 0.0f ? 0.0f : 1.0f / total;
    for (int64_t c = 0; c < width; c += VEC) store(out + r * width + c, share * load(out + r * width + c));
    p.lse[(batch * p.heads + head) * p.tokens + token] = total == 0.0f ? NONE : w.top[r] + std::log(total);
  }
}

// Tiles that share no keys: a task takes some neighbours, packs their keys, and runs them.
void forward_local(const Problem& p) {
  const int64_t tiles = p.queries.tiles, group = p.heads / p.key_heads;
  const int64_t key_width = round_up(p.depth, VEC), width = round_up(p.value_depth, VEC);
  const int64_t some = tiles_at_once(p, 2 * key_width + width), bundles = (tiles + some - 1) / some;
  deal(p.batch * p.key_heads * bundles, 1, [&](int64_t task, int64_t) {
    Work& w = work();
    const int64_t from = task % bundles * some, to = std::min(from + some, tiles), pair = task / bundles;
    const int64_t batch = pair / p.key_heads, key_head = pair % p.key_heads;
    w.tiles.list(p, from, to);
    const int64_t count = static_cast<int64_t>(w.tiles.entries.size());
    float *rows = w.rows.take((count * VEC + some) * key_width), *k = w.k.take(count * VEC * p.depth);
    const auto& keys = w.tiles.key_runs(w.tiles.source, key_width, rows);
    gather(p.k, p.type, batch, key_head, keys.data(), to - from, p.depth, 1.0f, key_width);
    float* v = w.v.take((count * VEC + some) * width);
    w.panels.resize(count), w.values.resize(count);
    for (int64_t tile = 0; tile < to - from; ++tile)
      for (int64_t i = w.tiles.first[tile]; i < w.tiles.first[tile + 1]; ++i) {
        turn(rows + (i * VEC + tile) * key_width, key_width, p.depth, k + i * VEC * p.depth);
        w.panels[i] = k + i * VEC * p.depth, w.values[i] = v + (i * VEC + tile) * width;
      }
    const auto& values = w.tiles.key_runs(w.tiles.source, width, v);
    gather(p.v, p.type, batch, key_head, values.data(), to - from, p.value_depth, 1.0f, width);
    const int64_t slots = p.queries.first[to] - p.queries.first[from];
    float *q = w.q.take((slots + some) * p.depth), *out = w.out.take((slots + some) * width);
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      const auto& queries = w.tiles.query_runs(p, p.queries.source, from, p.depth, q);
      gather(p.q, p.type, batch, head, queries.data(), to - from, p.depth, p.row_scale(), p.depth);
      for (int64_t tile = from; tile < to; ++tile) {
        const int64_t at = w.tiles.first[tile - from], first = p.queries.first[tile], end = p.queries.first[tile + 1];
        const Looks looks{w.tiles.entries.data() + at, w.panels.data() + at, w.values.data() + at,
                          w.tiles.first[tile - from + 1] - at};
        for (int64_t slot = first; slot < end; slot += ROWS) {
          const int64_t row = w.tiles.query_row(p, from, tile - from) + slot - first;
          attend(p, batch, head, slot, slot - first, std::min(ROWS, end - slot), looks, q + row * p.depth,
                 out + row * width, w);
        }
      }
      const auto& results = w.tiles.query_runs(p, p.queries.token, from, width, out);
      scatter(p.out, p.type, batch, head, results.data(), to - from, p.value_depth, 1.0f, width);
    }
  });
}

// Some key heads at a time: their keys are packed once, then all their query tiles run.
void forward_shared(const Problem& p) {
  const int64_t group = p.heads / p.key_heads, width = round_up(p.value_depth, VEC), pairs = p.batch * p.key_heads;
  const int64_t each = p.keys.slots * (p.depth + width);
  const int64_t at_once = std::clamp<int64_t>(PACKED_BYTES / (4 * std::max<int64_t>(each, 1)), 1, pairs);
  struct Piece {
    int64_t tile, from, to;
  };
  std::vector<Piece> pieces;
  for (int64_t tile = 0; tile < p.queries.tiles; ++tile) {
    const int64_t slots = p.queries.first[tile + 1] - p.queries.first[tile];
    for (int64_t from = 0; from < slots; from += ROWS) pieces.push_back({tile, from, std::min(from + ROWS, slots)});
  }
  Scratch packed;
  float* memory = packed.take(at_once * each);
  const int64_t count = static_cast<int64_t>(pieces.size());
  for (int64_t start = 0; start < pairs; start += at_once) {
    const int64_t some = std::min(at_once, pairs - start);
    deal(some * p.keys.tiles, 8, [&](int64_t task, int64_t) {
      const int64_t pair = task / p.keys.tiles, tile = task % p.keys.tiles;
      const int64_t batch = (start + pair) / p.key_heads, head = (start + pair) % p.key_heads;
      const int64_t from = p.keys.first[tile], to = p.keys.first[tile + 1];
      float *k = memory + pair * each, *v = k + p.keys.slots * p.depth;
      float* rows = work().rows.take(VEC * round_up(p.depth, VEC));
      pack_panels(p.k, p.type, batch, head, p.keys.source, from, to, p.depth, rows, k + from * p.depth);
      const Run run{p.keys.source + from, to - from, v + from * width};
      gather(p.v, p.type, batch, head, &run, 1, p.value_depth, 1.0f, width);
    });
    deal(some * group * count, 1, [&](int64_t task, int64_t) {
      Work& w = work();
      const Piece& piece = pieces[task % count];
      const int64_t pair = task / count / group, batch = (start + pair) / p.key_heads;
      const int64_t head = (start + pair) % p.key_heads * group + task / count % group;
      const float *k = memory + pair * each, *v = k + p.keys.slots * p.depth;
      w.entries.clear(), w.panels.clear(), w.values.clear();
      list_panels(p, piece.tile, w.entries);
      for (const Entry& entry : w.entries) {
        w.panels.push_back(k + entry.slot * p.depth);
        w.values.push_back(v + entry.slot * width);
      }
      const Looks looks{w.entries.data(), w.panels.data(), w.values.data(), static_cast<int64_t>(w.entries.size())};
      const int64_t base = p.queries.first[piece.tile] + piece.from, rows = piece.to - piece.from;
      float *q = w.q.take(ROWS * p.depth), *out = w.out.take(ROWS * width);
      const Run queries{p.queries.source + base, rows, q}, results{p.queries.token + base, rows, out};
      gather(p.q, p.type, batch, head, &queries, 1, p.depth, p.row_scale(), p.depth);
      attend(p, batch, head, base, piece.from, rows, looks, q, out, w);
      scatter(p.out, p.type, batch, head, &results, 1, p.value_depth, 1.0f, width);
    });
  }
}

}  // namespace
}  // namespace chronotope

int chronotope_forward(const chronotope::Problem* p) {
  return chronotope::guarded([&] {
    if (chronotope::is_short(*p))
      chronotope::forward_short(*p);
    else if (chronotope::local(*p, chronotope::LOCAL_KEYS))
      chronotope::forward_local(*p);
    else
      chronotope::forward_shared(*p);
  });
}
