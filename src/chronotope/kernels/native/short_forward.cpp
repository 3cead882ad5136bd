// out and lse of short tiles.
#include "cells.h"
#include "schedule.h"
#include "short.h"

namespace chronotope {
namespace {

struct Work {
  Scratch memory;
  Upcoming tiles;
  Ahead ahead;
};

Work& work() {
  static thread_local Work own;
  return own;
}

// Room of one thread.
struct Room {
  float *k, *v, *q, *out, *panel, *cells;
  Room(const Problem& p, Scratch& memory) {
    const int64_t key = round_up(p.depth, VEC), value = round_up(p.value_depth, VEC);
    k = memory.take((SHORT + 2 * GROUP) * key + (SHORT + STRIP) * value + SHORT * GROUP);
    q = k + SHORT * key, panel = q + GROUP * key, v = panel + GROUP * key;
    out = v + SHORT * value, cells = out + STRIP * value;
  }
};

// cells = exp(score - maximum) for each query, with 1 / sum and the logarithm of the sum of exp(score).
template <int N, class V>
void soften(float* cells, int64_t keys, float* share, float* lse) {
  constexpr int L = LANES<V>;
  for (int n = 0; n < N; ++n) {
    float* own = cells + n * L;
    V top = load_as<V>(own);
    for (int64_t j = 1; j < keys; ++j) {
      const V x = load_as<V>(own + j * N * L);
      top = x > top ? x : top;
    }
    const V none = V{} + NONE, base = top == none ? V{} : top;
    V total = {};
    for (int64_t j = 0; j < keys; ++j) {
      const V weight = exp(load_as<V>(own + j * N * L) - base);
      store(own + j * N * L, weight);
      total += weight;
    }
    store(share + n * L, total == 0.0f ? V{} : 1.0f / total);
    store(lse + n * L, total == 0.0f ? none : top + log(total));
  }
}

struct Heads {
  Rows q, out;
  float* lse;
};

// Some queries of a tile, of which k and v are in `room`.
template <int N, class V>
void attend(const Problem& p, const Heads& heads, const ShortTile& tile, const float* const* values, int64_t from,
            int64_t count, const Room& room, Ahead& ahead) {
  constexpr int WIDTH = N * LANES<V>;
  const float* rows[WIDTH];
  for (int i = 0; i < WIDTH; ++i)
    rows[i] = i < count ? heads.q.row(tile.source[from + i], room.q + i * heads.q.width) : rows[i - 1];
  turn_rows<N, V>(rows, heads.q.width, p.row_scale(), room.panel);
  ahead.step();
  for (int64_t j = 0; j < tile.keys; j += STRIP) {
    score_rows<N, V>(room.k + j * heads.q.width, heads.q.width, p.depth, room.panel, room.cells + j * WIDTH,
                     p.sum_scale());
    ahead.step();
  }
  float share[WIDTH], lse[WIDTH];
  soften<N, V>(room.cells, tile.keys, share, lse);
  const Rows& out = heads.out;
  for (int64_t r = 0; r < count; r += STRIP) {
    const int32_t* tokens = tile.token + from + r;
    const int64_t some = std::min<int64_t>(STRIP, count - r);
    Results results(out, tokens, some, out.in_place, 1.0f, room.out);
    std::copy(share + r, share + r + STRIP, results.share);
    columns(out.width, [&]<int C>(int64_t at) {
      combine<C, 1, WIDTH>(room.cells + r, values, tile.keys, at, results);
      ahead.step();
    });
    if (!out.in_place) out.send(tokens, some, room.out);
    for (int64_t i = 0; i < some; ++i) heads.lse[tokens[i]] = lse[r + i];
  }
}

}  // namespace

void forward_short(const Problem& p) {
  const int64_t tiles = p.queries.tiles, group = p.heads / p.key_heads;
  const int64_t some = short_tiles_at_once(p, at::get_num_threads()), bundles = (tiles + some - 1) / some;
  deal(p.batch * p.key_heads * bundles, 1, [&](int64_t task, int64_t) {
    Work& w = work();
    const Room room(p, w.memory);
    const int64_t from = task % bundles * some, to = std::min(from + some, tiles), pair = task / bundles;
    const int64_t batch = pair / p.key_heads, key_head = pair % p.key_heads;
    const Rows k = Rows::of_keys(p, p.k, batch, key_head, p.depth);
    const Rows v = Rows::of_keys(p, p.v, batch, key_head, p.value_depth);
    const Rows q = Rows::of_queries(p, p.q, batch, key_head * group, p.depth);
    for (int64_t i = from; i < to; ++i) {
      w.tiles.reach(p, i, from, to);
      const ShortTile& tile = w.tiles.at(i);
      w.ahead.clear();
      if (const int64_t later = i + Upcoming::distance(tile); later < to) {
        const ShortTile& next = w.tiles.at(later);
        w.ahead.add(k, next.key, next.keys);
        w.ahead.add(q, next.source, next.queries);
        w.ahead.add(v, next.key, next.keys);
        w.ahead.divide(1 + (tile.keys + v.groups() * tile.queries) / STRIP);
      }
      k.bring(tile.key, tile.keys, 1.0f, room.k);
      const float* values[SHORT];
      if (tile.queries * group <= STRIP) {
        for (int64_t j = 0; j < tile.keys; ++j) values[j] = v.row(tile.key[j], room.v + j * v.width);
      } else {
        v.bring(tile.key, tile.keys, 1.0f, room.v);
        for (int64_t j = 0; j < tile.keys; ++j) values[j] = room.v + j * v.width;
      }
      for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
        const Heads heads{Rows::of_queries(p, p.q, batch, head, p.depth),
                          Rows::of_queries(p, p.out, batch, head, p.value_depth),
                          p.lse + (batch * p.heads + head) * p.tokens};
        lanes_of(tile.queries, [&]<int N, class V>(int64_t first, int64_t count) {
          attend<N, V>(p, heads, tile, values, first, count, room, w.ahead);
        });
      }
    }
    fence();
  });
}

}  // namespace chronotope
