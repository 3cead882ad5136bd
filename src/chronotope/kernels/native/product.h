// The inner products, on blocks of STRIP rows by VEC columns that lie one after the other ("cells").
#pragma once

#include "simd.h"

namespace chronotope {

constexpr int CELL = STRIP * VEC;

// cells[p][r][lane] = scale * sum over d of rows[r][d] * panels[p][d][lane], for N panels at once; rows are `width` apart.
template <int N>
inline void score(const float* rows, int64_t width, int64_t depth, const float* const* panels, float* const* cells,
                  float scale) {
  vec sum[STRIP][N] = {};
  for (int64_t d = 0; d < depth; ++d) {
    vec y[N];
#pragma GCC unroll 4
    for (int p = 0; p < N; ++p) y[p] = load(panels[p] + d * VEC);
#pragma GCC unroll 8
    for (int r = 0; r < STRIP; ++r) {
      const float x = rows[r * width + d];
#pragma GCC unroll 4
      for (int p = 0; p < N; ++p) sum[r][p] += x * y[p];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < STRIP; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < N; ++p) store(cells[p] + r * VEC, scale * sum[r][p]);
}

// The same for one panel of which only the first half is needed.
inline void score_half(const float* rows, int64_t width, int64_t depth, const float* panel, float* cell,
                       float scale = 1.0f) {
  half_vec sum[STRIP] = {};
  for (int64_t d = 0; d < depth; ++d) {
    half_vec y;
    std::memcpy(&y, panel + d * VEC, sizeof y);
#pragma GCC unroll 8
    for (int r = 0; r < STRIP; ++r) sum[r] += rows[r * width + d] * y;
  }
#pragma GCC unroll 8
  for (int r = 0; r < STRIP; ++r) {
    const half_vec cells = scale * sum[r];
    std::memcpy(cell + r * VEC, &cells, sizeof cells);
  }
}

// Cells of so many panels; of a single one only the first `lanes` count.
inline void scores(const float* rows, int64_t width, int64_t depth, const float* const* panels, float* const* cells,
                   int count, int lanes, float scale = 1.0f) {
  if (count == 1 && lanes <= HALF_VEC) {
    score_half(rows, width, depth, panels[0], cells[0], scale);
    return;
  }
  int p = 0;
  for (; p + WIDE <= count; p += WIDE) score<WIDE>(rows, width, depth, panels + p, cells + p, scale);
  if constexpr (WIDE > 2) {
    if (p + 2 <= count) {
      score<2>(rows, width, depth, panels + p, cells + p, scale);
      p += 2;
    }
  }
  for (; p < count; ++p) score<1>(rows, width, depth, panels + p, cells + p, scale);
}

// A sum is complete before it is added to what was there: two short sums err less than a long one.
inline void add(float* out, vec sum) { store(out, load(out) + sum); }

// out[r][column] += sum over cells and their lanes of cells[p][r][lane] * tables[p][lane][column], for N vectors of
// columns from `at` on.
template <int N>
inline void weigh(const float* const* cells, const float* const* tables, const int* lanes, int count, int64_t width,
                  int64_t out_width, int64_t at, float* out) {
  vec sum[STRIP][N] = {};
  for (int p = 0; p < count; ++p) {
    const float *weights = cells[p], *table = tables[p] + at;
    for (int lane = 0; lane < lanes[p]; ++lane) {
      vec y[N];
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) y[c] = load(table + lane * width + c * VEC);
#pragma GCC unroll 8
      for (int r = 0; r < STRIP; ++r) {
        const float x = weights[r * VEC + lane];
#pragma GCC unroll 4
        for (int c = 0; c < N; ++c) sum[r][c] += x * y[c];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < STRIP; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < N; ++c) add(out + at + r * out_width + c * VEC, sum[r][c]);
}

// out[lane][column] += sum over cells and rows of cells[s][r][lane] * tables[s][r][column], for STRIP of
// the lanes and N vectors of columns from `at` on.
template <int N>
inline void weigh_columns(const float* const* cells, const float* const* tables, int count, int64_t width, int64_t at,
                          float* out) {
  vec sum[STRIP][N] = {};
  for (int s = 0; s < count; ++s) {
    const float *weights = cells[s], *table = tables[s] + at;
    for (int r = 0; r < STRIP; ++r) {
      vec y[N];
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) y[c] = load(table + r * width + c * VEC);
#pragma GCC unroll 8
      for (int l = 0; l < STRIP; ++l) {
        const float x = weights[r * VEC + l];
#pragma GCC unroll 4
        for (int c = 0; c < N; ++c) sum[l][c] += x * y[c];
      }
    }
  }
#pragma GCC unroll 8
  for (int l = 0; l < STRIP; ++l)
#pragma GCC unroll 4
    for (int c = 0; c < N; ++c) add(out + at + l * width + c * VEC, sum[l][c]);
}

// Calls f.operator()<N>(first column) over the columns, N vectors at a time: as even as WIDE allows.
template <class F>
inline void columns(int64_t width, F&& f) {
  int64_t left = width / VEC, at = 0;
  while (left > 0) {
    if (WIDE > 2 && left >= WIDE && left != WIDE + 1) {
      f.template operator()<WIDE>(at);
      at += WIDE * VEC, left -= WIDE;
    } else if (left >= 2) {
      f.template operator()<2>(at);
      at += 2 * VEC, left -= 2;
    } else {
      f.template operator()<1>(at);
      at += VEC, left -= 1;
    }
  }
}

}  // namespace chronotope
