// Tiles whose keys no other tile looks at, several at a time: each key is read once, packed by the task that needs it.
#pragma once

#include "cells.h"

namespace chronotope {

// Neighbouring query tiles with the panels that they list, and where each begins.
struct Neighbours {
  std::vector<Entry> entries;
  std::vector<int64_t> first;     // of each tile, in entries
  std::vector<int32_t> source, token;  // of the keys of all entries, panel by panel
  std::vector<Run> keys, queries;

  int64_t tiles() const { return static_cast<int64_t>(first.size()) - 1; }
  int64_t slots(int64_t i) const { return (first[i + 1] - first[i]) * VEC; }

  // Rows of tile i begin one row later for each tile before it: tiles of a power of two would otherwise meet in the same
  // sets of the cache.
  int64_t key_row(int64_t i) const { return first[i] * VEC + i; }
  int64_t query_row(const Problem& p, int64_t from, int64_t i) const {
    return p.queries.first[from + i] - p.queries.first[from] + i;
  }

  void list(const Problem& p, int64_t from, int64_t to) {
    entries.clear(), source.clear(), token.clear();
    first.assign(1, 0);
    for (int64_t tile = from; tile < to; ++tile) {
      list_panels(p, tile, entries);
      first.push_back(static_cast<int64_t>(entries.size()));
    }
    for (const Entry& entry : entries) {
      source.insert(source.end(), p.keys.source + entry.slot, p.keys.source + entry.slot + VEC);
      token.insert(token.end(), p.keys.token + entry.slot, p.keys.token + entry.slot + VEC);
    }
  }

  // The keys of each tile as rows of `width` numbers from `memory` on; the padding at the end of a tile is left out.
  const std::vector<Run>& key_runs(const std::vector<int32_t>& tokens, int64_t width, float* memory) {
    keys.clear();
    for (int64_t i = 0; i < tiles(); ++i) {
      const int64_t padding = first[i] < first[i + 1] ? VEC - entries[first[i + 1] - 1].lanes : 0;
      keys.push_back({tokens.data() + first[i] * VEC, slots(i) - padding, memory + key_row(i) * width});
    }
    return keys;
  }

  // The queries of each tile, likewise; `tokens` by slot.
  const std::vector<Run>& query_runs(const Problem& p, const int32_t* tokens, int64_t from, int64_t width,
                                     float* memory) {
    queries.clear();
    for (int64_t i = 0; i < tiles(); ++i) {
      const int64_t start = p.queries.first[from + i], end = p.queries.first[from + i + 1];
      queries.push_back({tokens + start, end - start, memory + query_row(p, from, i) * width});
    }
    return queries;
  }
};

// How many tiles a task takes: what it packs should stay in the cache.
inline int64_t tiles_at_once(const Problem& p, int64_t numbers_per_slot) {
  constexpr int64_t BYTES = 1 << 18, MOST = 16;
  const int64_t slots = std::max<int64_t>(1, (p.queries.slots + p.keys.slots) / std::max<int64_t>(1, p.queries.tiles));
  return std::clamp<int64_t>(BYTES / (4 * slots * numbers_per_slot), 1, MOST);
}

}  // namespace chronotope
