// What happens to a cell of scores between the two products: softcap, bias, mask; and the list of panels of a tile.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "pack.h"
#include "product.h"

namespace chronotope {

constexpr float NONE = -std::numeric_limits<float>::infinity();

// A panel that a query tile looks at: its first slot, how many of its lanes are tokens, and the words of its mask for the
// tile's first strip. A mask of null is all visible; from one strip to the next the words advance by `stride`.
struct Entry {
  int64_t slot;
  int lanes;
  const uint16_t* mask;
  int64_t stride;
  bool prefix;
};

// Words that keep the first n lanes: the last panel of a tile that is no multiple of VEC.
struct Tails {
  uint16_t words[VEC + 1][STRIP];
  constexpr Tails() : words() {
    for (int n = 0; n <= VEC; ++n)
      for (int r = 0; r < STRIP; ++r) words[n][r] = static_cast<uint16_t>((1u << n) - 1);
  }
};
static constexpr Tails tails;

// Adds the panels that a query tile looks at.
inline void list_panels(const Problem& p, int64_t tile, std::vector<Entry>& out) {
  for (int64_t i = p.start[tile]; i < p.start[tile + 1]; ++i) {
    const int64_t other = p.tile[i], first = p.keys.first[other], size = p.keys.size[other];
    const int64_t panels = (size + VEC - 1) / VEC;
    const bool prefix = other < p.keys.prefix_tiles || tile < p.queries.prefix_tiles;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int lanes = static_cast<int>(std::min<int64_t>(VEC, size - panel * VEC));
      Entry entry{first + panel * VEC, lanes, nullptr, 0, prefix};
      if (p.kind[i] >= 0) {
        entry.mask = p.bits + p.mask[p.kind[i]] + panel * STRIP;
        entry.stride = panels * STRIP;
      } else if (lanes < VEC) {
        entry.mask = tails.words[lanes];
      }
      out.push_back(entry);
    }
  }
}

inline bool visible(const Entry& entry, int64_t strip) {
  if (entry.mask == nullptr) return true;
  const uint16_t* words = entry.mask + strip * entry.stride;
  uint32_t any = 0;
  for (int r = 0; r < STRIP; ++r) any |= words[r];
  return any != 0;
}

inline void hide(const Entry& entry, int64_t strip, float* cell, float other) {
  if (entry.mask == nullptr) return;
  const uint16_t* words = entry.mask + strip * entry.stride;
  const vec hidden = all(other);
  for (int r = 0; r < STRIP; ++r) store(cell + r * VEC, keep(words[r], load(cell + r * VEC), hidden));
}

// cell = softcap * tanh(cell / softcap); keeps 1 - tanh^2 in `slope` where it is wanted.
inline void bend(float softcap, float* cell, float* slope) {
  for (int r = 0; r < STRIP; ++r) {
    const vec t = tanh(load(cell + r * VEC) / softcap);
    store(cell + r * VEC, softcap * t);
    if (slope != nullptr) store(slope + r * VEC, 1.0f - t * t);
  }
}

// The entry of a table for VEC keys and one query.
inline ivec table_entry(const Problem& p, const Term& term, int64_t query, int64_t slot) {
  ivec index = {};
  for (int64_t a = 0; a < term.axes; ++a) {
    const int32_t reach = static_cast<int32_t>(term.reach[a]);
    const int32_t at = p.queries.place[term.axis[a] * p.queries.slots + query];
    ivec gap = load(p.keys.place + term.axis[a] * p.keys.slots + slot) - at;
    gap = gap < -reach ? all(-reach) : gap;
    gap = gap > reach ? all(reach) : gap;
    index = index * (2 * reach + 1) + gap + reach;
  }
  return index;
}

// Calls f(table or its gradient, entry, row, lane) for what is added to each score of a cell.
template <class F>
inline void each_table(const Problem& p, int64_t head, int64_t query, const Entry& entry, F&& f) {
  if (entry.prefix) return;
  for (int64_t t = 0; t < p.terms; ++t)
    for (int r = 0; r < STRIP; ++r) {
      const ivec index = table_entry(p, p.term[t], query + r, entry.slot);
      for (int lane = 0; lane < VEC; ++lane) f(p.term[t], head * p.term[t].entries + index[lane], r, lane);
    }
}

// Calls f(offset in the bias tensor, row, lane) for the pairs of a cell that are no padding.
template <class F>
inline void each_bias(const Problem& p, int64_t batch, int64_t head, int64_t query, const Entry& entry, F&& f) {
  const int64_t base = batch * p.bias_stride[0] + head * p.bias_stride[1];
  for (int r = 0; r < STRIP; ++r) {
    const int64_t token = p.queries.token[query + r];
    if (token < 0) continue;
    for (int lane = 0; lane < VEC; ++lane) {
      const int64_t key = p.keys.token[entry.slot + lane];
      if (key >= 0) f(base + token * p.bias_stride[2] + key * p.bias_stride[3], r, lane);
    }
  }
}

inline void add_bias(const Problem& p, int64_t batch, int64_t head, int64_t query, const Entry& entry, float* cell) {
  each_table(p, head, query, entry,
             [&](const Term& term, int64_t at, int r, int lane) { cell[r * VEC + lane] += term.table[at]; });
  if (p.bias != nullptr)
    each_bias(p, batch, head, query, entry, [&](int64_t at, int r, int lane) { cell[r * VEC + lane] += p.bias[at]; });
}

}  // namespace chronotope
