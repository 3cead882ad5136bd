// One call of attention, as Python describes it. `tables.py` has the same structures; keep them equal.
#pragma once

#include <cstdint>

namespace chronotope {

constexpr int MOST_AXES = 8, MOST_TERMS = 8;

enum Type : int32_t { FLOAT = 0, BFLOAT16 = 1, HALF = 2 };

// [batch, head, token, size]; strides count numbers, the last is 1.
struct Tensor {
  void* data;
  int64_t batch, head, token;
};

// A layout. Tiles are padded to whole strips (queries) or panels (keys); a slot is a position in the padded order.
struct Side {
  int64_t tiles, slots, prefix_tiles;  // prefix tiles come first
  const int32_t* first;   // [tiles + 1]: the first slot of each tile
  const int32_t* size;    // [tiles]: tokens in each tile
  const int32_t* token;   // [slots]: -1 in the padding
  const int32_t* source;  // [slots]: token, but -1 also where nobody looks, or nothing is seen: read as zeros
  const int32_t* place;   // [axes, slots]: coordinates on the key grid's axes, for bias tables
};

// A table of relative offsets: entry sum_a (clamp(key - query, -reach, reach) + reach) * stride.
struct Term {
  int64_t axes, entries;
  int64_t axis[MOST_AXES], reach[MOST_AXES];
  const float* table;  // [heads, entries]
  double* gradient;    // [lanes, heads, entries]: sums over many pairs
};

struct Problem {
  int64_t batch, heads, key_heads, depth, value_depth, type;
  int64_t tokens, key_tokens;
  double scale, softcap;  // softcap 0: none
  Tensor q, k, v, out;
  float* lse;  // [batch, heads, queries]
  Side queries, keys;
  // For query tile i the key tiles tile[start[i]] to tile[start[i + 1]], with the kind of each mask, or -1.
  const int32_t *start, *tile, *kind;
  // Masks: of each kind [strips, panels, STRIP] words of VEC bits, from bits[mask[kind]] on.
  const uint16_t* bits;
  const int64_t* mask;
  int64_t exclusive;  // no key tile is listed twice
  int64_t terms;
  Term term[MOST_TERMS];
  const float* bias;       // or null
  int64_t bias_stride[4];  // [batch, head, query, key]; 0 where it broadcasts
  // Backward only. Gradients of bias and tables are added up in `lanes` copies, one for each thread.
  Tensor dout, dq, dk, dv;
  const float* dlse;  // [batch, heads, queries], or null
  int64_t lanes, bias_size;
  double* dbias;  // [lanes, bias_size], or null

  // What rows of q, and what their sums with keys, are multiplied by. Products of 16-bit numbers are exact in float32, so
  // that nothing is rounded before they are summed up; in float32 a row of q is rounded once, not every sum.
  float row_scale() const { return type == FLOAT ? static_cast<float>(scale) : 1.0f; }
  float sum_scale() const { return type == FLOAT ? 1.0f : static_cast<float>(scale); }
};

}  // namespace chronotope
