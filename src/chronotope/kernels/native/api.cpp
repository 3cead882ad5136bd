#include "api.h"

#include "schedule.h"
#include "simd.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

using chronotope::STRIP;
using chronotope::VEC;

int chronotope_lanes() { return VEC; }
int chronotope_strip() { return STRIP; }
int chronotope_threads() { return at::get_num_threads(); }
int64_t chronotope_problem_size() { return sizeof(chronotope::Problem); }

void chronotope_masks(int64_t kinds, int64_t width, int64_t depth, const uint8_t* seen, const int32_t* rows,
                      const int32_t* columns, const int64_t* first, uint16_t* words) {
  chronotope::deal(kinds, 1, [&](int64_t kind, int64_t) {
    const uint8_t* own = seen + kind * width * depth;
    uint16_t* out = words + first[kind];
    for (int64_t r = 0; r < rows[kind]; r += STRIP)
      for (int64_t c = 0; c < columns[kind]; c += VEC)
        for (int i = 0; i < STRIP; ++i) {
          uint32_t word = 0;
          if (r + i < rows[kind])
            for (int lane = 0; lane < VEC && c + lane < columns[kind]; ++lane)
              word |= static_cast<uint32_t>(own[(r + i) * depth + c + lane] != 0) << lane;
          *out++ = static_cast<uint16_t>(word);
        }
  });
}

void chronotope_advise(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = uintptr_t{1} << 21;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / PAGE * PAGE;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);  // may be refused: no matter
#else
  (void)data, (void)bytes;
#endif
}
