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
  constexpr uintptr_t LARGE_PAGE = uintptr_t{1} << 21, PAGE = 1 << 12;
  const uintptr_t first = reinterpret_cast<uintptr_t>(data), last = first + bytes;
  const uintptr_t start = (first + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE, end = last / LARGE_PAGE * LARGE_PAGE;
  if (start >= end || madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE) != 0) return;
  // The system clears a page when it is first written: different threads, different pages.
  const auto touch = [](uintptr_t from, uintptr_t to, uintptr_t step, int64_t grain) {
    chronotope::deal(static_cast<int64_t>((to - from + step - 1) / step), grain, [&](int64_t page, int64_t) {
      *reinterpret_cast<volatile char*>(from + page * step) = 0;
    });
  };
  touch(start, end, LARGE_PAGE, 1);
  touch(first, start, PAGE, 32);
  touch(end, last, PAGE, 32);
#else
  (void)data, (void)bytes;
#endif
}
