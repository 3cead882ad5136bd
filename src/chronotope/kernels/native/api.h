// What Python calls. Functions return 0, or 1 when memory ran out.
#pragma once

#include <new>

#include "problem.h"

namespace chronotope {

template <class F>
inline int guarded(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Whether every key is looked at by one query tile only, and these keys are few.
inline bool local(const Problem& p, int64_t most) {
  if (!p.exclusive) return false;
  for (int64_t tile = 0; tile < p.queries.tiles; ++tile) {
    int64_t keys = 0;
    for (int64_t i = p.start[tile]; i < p.start[tile + 1]; ++i) keys += p.keys.size[p.tile[i]];
    if (keys > most) return false;
  }
  return true;
}

}  // namespace chronotope

extern "C" {
int chronotope_lanes();
int chronotope_strip();
int chronotope_threads();
int64_t chronotope_problem_size();
// seen [kinds, width, depth] -> words, as Problem::bits; first[kind] says where.
void chronotope_masks(int64_t kinds, int64_t width, int64_t depth, const uint8_t* seen, const int32_t* rows,
                      const int32_t* columns, const int64_t* first, uint16_t* words);
// Asks for large pages under memory that will be written for the first time, and has them made by all threads.
void chronotope_advise(void* data, int64_t bytes);
int chronotope_forward(const chronotope::Problem* problem);
int chronotope_backward(const chronotope::Problem* problem);
}
