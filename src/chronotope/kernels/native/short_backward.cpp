// dq, dk and dv of short tiles, all scores of a query being at hand: with P = exp(score - lse) and dP = dout v^T,
//   dv = P^T dout, dS = P * (dP - sum over keys of P * dP + dlse), dq = scale * dS k, dk = scale * dS^T q.
// The sum is that of dout * out, without reading out.
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

// Room of one thread: rows, panels of queries, cells, and results that are not written in place.
struct Room {
  float *k, *v, *q, *dout, *q_panel, *dout_panel, *weights, *ds, *dq, *dk, *dv;
  Room(const Problem& p, Scratch& memory) {
    const int64_t key = round_up(p.depth, VEC), value = round_up(p.value_depth, VEC);
    k = memory.take((2 * SHORT + 2 * GROUP + STRIP) * key + (2 * SHORT + 2 * GROUP) * value + 2 * SHORT * GROUP);
    v = k + SHORT * key, q = v + SHORT * value, dout = q + GROUP * key;
    q_panel = dout + GROUP * value, dout_panel = q_panel + GROUP * key;
    weights = dout_panel + GROUP * value, ds = weights + SHORT * GROUP;
    dq = ds + SHORT * GROUP, dk = dq + STRIP * key, dv = dk + SHORT * key;
  }
};

// From scores and dP: weights and dS.
template <int N, class V>
void differentiate(float* weights, float* ds, int64_t keys, const float* lse, const float* dlse) {
  constexpr int L = LANES<V>, WIDTH = N * L;
  for (int n = 0; n < N; ++n) {
    const V own = load_as<V>(lse + n * L);
    V shift = -load_as<V>(dlse + n * L);
    for (int64_t j = 0; j < keys; ++j) {
      const V weight = exp(load_as<V>(weights + j * WIDTH + n * L) - own);
      store(weights + j * WIDTH + n * L, weight);
      shift += weight * load_as<V>(ds + j * WIDTH + n * L);
    }
    for (int64_t j = 0; j < keys; ++j) {
      float* cell = ds + j * WIDTH + n * L;
      store(cell, load_as<V>(weights + j * WIDTH + n * L) * (load_as<V>(cell) - shift));
    }
  }
}

// What belongs to a head of queries and its head of keys.
struct Heads {
  Rows q, dout, dq, dk, dv;
  const float *lse, *dlse;

  Heads(const Problem& p, int64_t batch, int64_t head, int64_t key_head)
      : q(Rows::of_queries(p, p.q, batch, head, p.depth)),
        dout(Rows::of_queries(p, p.dout, batch, head, p.value_depth)),
        dq(Rows::of_queries(p, p.dq, batch, head, p.depth)),
        dk(Rows::of_keys(p, p.dk, batch, key_head, p.depth)),
        dv(Rows::of_keys(p, p.dv, batch, key_head, p.value_depth)),
        lse(p.lse + (batch * p.heads + head) * p.tokens),
        dlse(p.dlse == nullptr ? nullptr : p.dlse + (batch * p.heads + head) * p.tokens) {}
};

// Gradients of keys come from `passes` groups of queries, one after the other.
struct Pass {
  int64_t number, passes;
};

// dk or dv: factor * weights [key][WIDTH] times the rows of `count` queries.
template <int WIDTH>
void key_gradients(const Rows& out, const ShortTile& tile, const float* weights, float factor,
                   const float* const* rows, int64_t count, Pass pass, float* room, Ahead& ahead) {
  const bool in_place = out.in_place && pass.passes == 1;
  for (int64_t j = 0; j < tile.keys; j += STRIP) {
    Results results(out, tile.key + j, tile.keys - j, in_place, factor, room + j * out.width);
    results.adds = pass.number > 0;
    columns(out.width, [&]<int C>(int64_t at) {
      combine<C, WIDTH, 1>(weights + j * WIDTH, rows, count, at, results);
      ahead.step();
    });
  }
  if (!in_place && pass.number + 1 == pass.passes) out.send(tile.key, tile.keys, room);
}

// Some queries of a tile, of which k and v are in `room`.
template <int N, class V>
void attend(const Problem& p, const Heads& heads, const ShortTile& tile, int64_t from, int64_t count, Pass pass,
            const Room& room, Ahead& ahead) {
  constexpr int WIDTH = N * LANES<V>;
  const int64_t key = heads.q.width, value = heads.dout.width;
  heads.q.bring(tile.source + from, count, p.row_scale(), room.q);
  heads.dout.bring(tile.source + from, count, 1.0f, room.dout);
  const float *q[WIDTH], *dout[WIDTH], *k[SHORT];
  float lse[WIDTH], dlse[WIDTH];
  for (int64_t i = 0; i < WIDTH; ++i) {
    const int64_t row = std::min(i, count - 1), token = tile.token[from + row];
    q[i] = room.q + row * key, dout[i] = room.dout + row * value;
    const bool blind = heads.lse[token] == NONE;
    lse[i] = blind ? -NONE : heads.lse[token];
    dlse[i] = blind || heads.dlse == nullptr ? 0.0f : heads.dlse[token];
  }
  for (int64_t j = 0; j < tile.keys; ++j) k[j] = room.k + j * key;
  turn_rows<N, V>(q, key, 1.0f, room.q_panel);
  turn_rows<N, V>(dout, value, 1.0f, room.dout_panel);
  ahead.step();
  for (int64_t j = 0; j < tile.keys; j += STRIP) {
    score_rows<N, V>(room.k + j * key, key, p.depth, room.q_panel, room.weights + j * WIDTH, p.sum_scale());
    ahead.step();
    score_rows<N, V>(room.v + j * value, value, p.value_depth, room.dout_panel, room.ds + j * WIDTH);
    ahead.step();
  }
  differentiate<N, V>(room.weights, room.ds, tile.keys, lse, dlse);
  for (int64_t r = 0; r < count; r += STRIP) {
    const int32_t* tokens = tile.token + from + r;
    const Results results(heads.dq, tokens, count - r, heads.dq.in_place, static_cast<float>(p.scale), room.dq);
    columns(key, [&]<int C>(int64_t at) {
      combine<C, 1, WIDTH>(room.ds + r, k, tile.keys, at, results);
      ahead.step();
    });
    if (!heads.dq.in_place) heads.dq.send(tokens, std::min<int64_t>(STRIP, count - r), room.dq);
  }
  key_gradients<WIDTH>(heads.dk, tile, room.ds, p.sum_scale(), q, count, pass, room.dk, ahead);
  key_gradients<WIDTH>(heads.dv, tile, room.weights, 1.0f, dout, count, pass, room.dv, ahead);
}

}  // namespace

void backward_short(const Problem& p) {
  const int64_t tiles = p.queries.tiles, group = p.heads / p.key_heads;
  const int64_t some = short_tiles_at_once(p, at::get_num_threads()), bundles = (tiles + some - 1) / some;
  deal(p.batch * p.key_heads * bundles, 1, [&](int64_t task, int64_t) {
    Work& w = work();
    const Room room(p, w.memory);
    const int64_t from = task % bundles * some, to = std::min(from + some, tiles), pair = task / bundles;
    const int64_t batch = pair / p.key_heads, key_head = pair % p.key_heads;
    const Rows k = Rows::of_keys(p, p.k, batch, key_head, p.depth);
    const Rows v = Rows::of_keys(p, p.v, batch, key_head, p.value_depth);
    const Heads first(p, batch, key_head * group, key_head);
    for (int64_t i = from; i < to; ++i) {
      w.tiles.reach(p, i, from, to);
      const ShortTile& tile = w.tiles.at(i);
      w.ahead.clear();
      if (const int64_t later = i + Upcoming::distance(tile); later < to) {
        const ShortTile& next = w.tiles.at(later);
        w.ahead.add(k, next.key, next.keys);
        w.ahead.add(v, next.key, next.keys);
        w.ahead.add(first.q, next.source, next.queries);
        w.ahead.add(first.dout, next.source, next.queries);
        w.ahead.divide(1 + ((2 + k.groups() + v.groups()) * tile.keys + k.groups() * tile.queries) / STRIP);
      }
      k.bring(tile.key, tile.keys, 1.0f, room.k);
      v.bring(tile.key, tile.keys, 1.0f, room.v);
      Pass pass{0, group * ((tile.queries + GROUP - 1) / GROUP)};
      for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
        const Heads heads(p, batch, head, key_head);
        lanes_of(tile.queries, [&]<int N, class V>(int64_t start, int64_t count) {
          attend<N, V>(p, heads, tile, start, count, pass, room, w.ahead);
          ++pass.number;
        });
      }
    }
    fence();
  });
}

}  // namespace chronotope
