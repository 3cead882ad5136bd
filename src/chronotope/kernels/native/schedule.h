// Dealing tasks to threads of torch's own pool.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace chronotope {

// f(task, lane) for all tasks: whoever is free takes the next `grain` of them. `lane` numbers the workers.
template <class F>
inline void deal(int64_t tasks, int64_t grain, F&& f) {
  const int64_t lanes = std::min<int64_t>(at::get_num_threads(), (tasks + grain - 1) / grain);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::max<int64_t>(lanes, 1), 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane)
      for (int64_t from; (from = next.fetch_add(grain)) < tasks;)
        for (int64_t task = from; task < std::min(from + grain, tasks); ++task) f(task, lane);
  });
}

// f(task, lane), task i always in lane i % lanes and in order: sums over the tasks of a lane are the same every time.
template <class F>
inline void deal_in_lanes(int64_t tasks, int64_t lanes, F&& f) {
  at::parallel_for(0, lanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane)
      for (int64_t task = lane; task < tasks; task += lanes) f(task, lane);
  });
}

}  // namespace chronotope
