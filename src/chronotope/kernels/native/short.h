// Tiles of few queries and few keys, which no other tile looks at: all scores of a query at once, so no online softmax.
// Scores are transposed, [key][query]: maxima and sums over the keys are then those of registers, lane by lane.
#pragma once

#include "pack.h"
#include "product.h"

namespace chronotope {

constexpr int64_t SHORT = 64;       // at most so many queries, and keys, has such a tile
constexpr int64_t GROUP = 2 * VEC;  // queries at once
constexpr int64_t LARGE = 1 << 24;  // bytes: the beginning of a longer result is in no cache when its end is written

// Whether all tiles are such, nothing is added to the scores, and none is hidden.
inline bool is_short(const Problem& p) {
  if (!p.exclusive || p.terms > 0 || p.bias != nullptr || p.softcap > 0) return false;
  for (int64_t tile = 0; tile < p.queries.tiles; ++tile) {
    int64_t keys = 0;
    for (int64_t i = p.start[tile]; i < p.start[tile + 1]; ++i) {
      if (p.kind[i] >= 0) return false;
      keys += p.keys.size[p.tile[i]];
    }
    if (keys > SHORT || p.queries.size[tile] > SHORT) return false;
  }
  return true;
}

void forward_short(const Problem& p);
void backward_short(const Problem& p);

// A query tile: the tokens to read and to write, and its keys, all of which are seen where nothing is hidden.
struct ShortTile {
  const int32_t *source, *token;
  int64_t queries, keys;
  int32_t key[SHORT];

  void list(const Problem& p, int64_t tile) {
    source = p.queries.source + p.queries.first[tile], token = p.queries.token + p.queries.first[tile];
    queries = p.queries.size[tile], keys = 0;
    for (int64_t i = p.start[tile]; i < p.start[tile + 1]; ++i) {
      const int32_t* from = p.keys.source + p.keys.first[p.tile[i]];
      keys = std::copy(from, from + p.keys.size[p.tile[i]], key + keys) - key;
    }
  }
};

// Rows of one head of a tensor.
struct Rows {
  const Tensor& x;
  int64_t type, batch, head, size, width;  // width: size in whole registers
  bool in_place;                           // rows can be used where they are
  bool streams;                            // rows are written past the cache

  Rows(const Problem& p, const Tensor& tensor, int64_t tokens, int64_t batch, int64_t head, int64_t size)
      : x(tensor), type(p.type), batch(batch), head(head), size(size), width(round_up(size, VEC)),
        in_place(p.type == FLOAT && size % VEC == 0) {
    constexpr int64_t LINE = 64;
    const bool aligned = reinterpret_cast<uintptr_t>(x.data) % LINE == 0 && (x.batch | x.head | x.token) % VEC == 0;
    streams = STREAMS && in_place && aligned && 4 * p.batch * tokens * size >= LARGE;
  }
  static Rows of_queries(const Problem& p, const Tensor& x, int64_t batch, int64_t head, int64_t size) {
    return {p, x, p.heads * p.tokens, batch, head, size};
  }
  static Rows of_keys(const Problem& p, const Tensor& x, int64_t batch, int64_t head, int64_t size) {
    return {p, x, p.key_heads * p.key_tokens, batch, head, size};
  }

  float* at(int64_t token) const { return static_cast<float*>(x.data) + offset(x, batch, head, token); }

  // Where a row is, if necessary `room`, where it is brought then.
  const float* row(int64_t token, float* room) const {
    if (in_place && token >= 0) return at(token);
    read(x, type, batch, head, token, size, 1.0f, width, room);
    return room;
  }

  // Copies rows to `rows`, times `scale`.
  void bring(const int32_t* tokens, int64_t count, float scale, float* rows) const {
    for (int64_t i = 0; i < count; ++i, rows += width) {
      if (in_place && tokens[i] >= 0) {
        const float* from = at(tokens[i]);
        for (int64_t c = 0; c < width; c += VEC) store(rows + c, scale * load(from + c));
      } else {
        read(x, type, batch, head, tokens[i], size, scale, width, rows);
      }
    }
  }

  // Rows that were not written where they belong.
  void send(const int32_t* tokens, int64_t count, const float* rows) const {
    for (int64_t i = 0; i < count; ++i)
      write(x, type, batch, head, tokens[i], size, 1.0f, rows + i * width);
  }

  // In how many groups columns() goes through a row, at least.
  int64_t groups() const { return (width / VEC + WIDE - 1) / WIDE; }
};

// Announces rows that will be read, some at a time: all at once would hold up what is computed meanwhile. Into the
// second cache only: rows that are strided by a power of two would meet in the same few lines of the first.
class Ahead {
 public:
  void clear() { count_ = next_ = total_ = share_ = 0; }

  void add(const Rows& rows, const int32_t* tokens, int64_t count) {
    const int64_t bytes = rows.type == FLOAT ? 4 : 2;
    const char* base = static_cast<const char*>(rows.x.data) + bytes * offset(rows.x, rows.batch, rows.head, 0);
    lists_[count_++] = {base, bytes * rows.x.token, bytes * rows.size, tokens, count};
    total_ += count;
  }

  // In `steps` calls of step() all of them are announced.
  void divide(int64_t steps) { list_ = 0, share_ = (total_ + steps - 1) / steps; }

  void step() {
    constexpr int64_t LINE = 64;
    for (int64_t left = share_; left > 0 && list_ < count_;) {
      const List& list = lists_[list_];
      const int64_t end = std::min(list.count, next_ + left);
      left -= end - next_;
      for (; next_ < end; ++next_) {
        if (list.tokens[next_] < 0) continue;
        const char* row = list.base + list.tokens[next_] * list.step;
        for (int64_t i = 0; i < list.bytes; i += LINE) __builtin_prefetch(row + i, 0, 2);
      }
      if (next_ == list.count) next_ = 0, ++list_;
    }
  }

 private:
  struct List {
    const char* base;
    int64_t step, bytes;
    const int32_t* tokens;
    int64_t count;
  };
  List lists_[4];
  int64_t count_ = 0, list_ = 0, next_ = 0, total_ = 0, share_ = 0;
};

// panel[d][n][lane] = scale * rows[n * lanes + lane][d], for N registers of queries.
template <int N, class V>
inline void turn_rows(const float* const* rows, int64_t depth, float scale, float* panel) {
  constexpr int L = LANES<V>;
  for (int64_t d = 0; d < depth; d += L)
    for (int n = 0; n < N; ++n) {
      V block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = scale * load_as<V>(rows[n * L + i] + d);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(panel + ((d + i) * N + n) * L, block[i]);
    }
}

// cells[r][n][lane] = scale * sum over d of rows[r][d] * panel[d][n][lane], for STRIP keys.
template <int N, class V>
inline void score_rows(const float* rows, int64_t width, int64_t depth, const float* panel, float* cells,
                       float scale = 1.0f) {
  constexpr int L = LANES<V>;
  V sum[STRIP][N] = {};
  const float* high = rows + 4 * width;  // pointers to all rows would take more registers than there are
  const int64_t twice = 2 * width, thrice = 3 * width;
  for (int64_t d = 0; d < depth; ++d) {
    V y[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) y[n] = load_as<V>(panel + (d * N + n) * L);
#pragma GCC unroll 8
    for (int r = 0; r < STRIP; ++r) {
      const float* from = (r < 4 ? rows : high) + d;
      const float x = r % 4 == 0 ? from[0] : r % 4 == 1 ? from[width] : r % 4 == 2 ? from[twice] : from[thrice];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] += x * y[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < STRIP; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(cells + (r * N + n) * L, scale * sum[r][n]);
}

// Where STRIP rows of a result go, and what they are multiplied by.
struct Results {
  float* row[STRIP];
  float share[STRIP];
  bool streams, adds;

  // Rows of `tokens` where they are, else, and beyond `count`, in `room`.
  Results(const Rows& x, const int32_t* tokens, int64_t count, bool in_place, float factor, float* room)
      : streams(in_place && x.streams), adds(false) {
    for (int i = 0; i < STRIP; ++i) {
      row[i] = in_place && i < count ? x.at(tokens[i]) : room + i * x.width;
      share[i] = factor;
    }
  }
};

// out[i][column] = share[i] * sum over j of weights[i * DOWN + j * ALONG] * rows[j][column], for STRIP rows i and C
// vectors of columns from `at` on.
template <int C, int DOWN, int ALONG>
inline void combine(const float* weights, const float* const* rows, int64_t count, int64_t at, const Results& out) {
  vec sum[STRIP][C] = {};
  for (int64_t j = 0; j < count; ++j) {
    vec y[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) y[c] = load(rows[j] + at + c * VEC);
#pragma GCC unroll 8
    for (int i = 0; i < STRIP; ++i) {
      const float x = weights[i * DOWN + j * ALONG];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[i][c] += x * y[c];
    }
  }
  const auto put = [&](auto&& f) {
#pragma GCC unroll 8
    for (int i = 0; i < STRIP; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) f(out.row[i] + at + c * VEC, out.share[i] * sum[i][c]);
  };
  if (out.streams)
    put(stream);
  else if (out.adds)
    put([](float* p, vec x) { store(p, load(p) + x); });
  else
    put([](float* p, vec x) { store(p, x); });
}

// How many tiles a task takes: enough for a processor to be told of most of them ahead, and for all threads.
inline int64_t short_tiles_at_once(const Problem& p, int64_t threads) {
  constexpr int64_t MOST = 256, TASKS = 16;
  return std::clamp<int64_t>(p.batch * p.key_heads * p.queries.tiles / (threads * TASKS), 1, MOST);
}

// The tiles from the present one on, as many as are announced.
class Upcoming {
 public:
  const ShortTile& at(int64_t tile) const { return tiles_[tile % AHEAD]; }

  // Before each of the tiles [from, to), in order.
  void reach(const Problem& p, int64_t tile, int64_t from, int64_t to) {
    if (tile == from) listed_ = from;
    for (; listed_ < std::min(tile + AHEAD, to); ++listed_) tiles_[listed_ % AHEAD].list(p, listed_);
  }

  // How many tiles ahead rows are announced: so many that they arrive in time.
  static int64_t distance(const ShortTile& tile) {
    return std::clamp<int64_t>(ROWS / std::max<int64_t>(tile.queries, 1), 1, AHEAD - 1);
  }

 private:
  static constexpr int64_t AHEAD = 4, ROWS = 16;
  ShortTile tiles_[AHEAD];
  int64_t listed_ = 0;
};

// Calls f.operator()<N, V>(first, count) over the queries, N registers V at a time, as few as hold them.
template <class F>
inline void lanes_of(int64_t queries, F&& f) {
  for (int64_t from = 0; from < queries; from += GROUP) {
    const int64_t count = std::min<int64_t>(GROUP, queries - from);
    if (count > VEC)
      f.template operator()<2, vec>(from, count);
    else if (count > HALF_VEC || HALF_VEC < STRIP)
      f.template operator()<1, vec>(from, count);
    else if constexpr (HALF_VEC >= STRIP)
      f.template operator()<1, half_vec>(from, count);
  }
}

}  // namespace chronotope
