/* Threads that share one piece of work, taken item by item. */
#ifndef KECORE_CPU_TEAM_H
#define KECORE_CPU_TEAM_H

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "kecore.h"

namespace kecore {

/* The items 0 .. count - 1, handed to whoever asks next. */
class Items {
  public:
    explicit Items(int64_t count) : count_(count) {}
    bool take(int64_t* item) { return (*item = next_.fetch_add(1)) < count_; }

  private:
    std::atomic<int64_t> next_{0};
    const int64_t count_;
};

/* What ke_set_parallel() was given; null for threads of our own. */
extern std::atomic<ke_parallel> parallel;

/* `body(items)` on at most `threads` threads, this one among them (0: one for each processor). Nobody waits for anybody
 * inside, so that they may also run one after the other. */
template <class Body>
void share(int threads, int64_t count, const Body& body) {
    Items items(count);
    if (threads <= 0) threads = static_cast<int>(std::thread::hardware_concurrency());
    if (threads > count) threads = static_cast<int>(count);
    if (threads < 2) return body(items);
    const auto work = [&] { body(items); };
    if (const ke_parallel run = parallel) {
        run(threads, [](const void* context) { (*static_cast<decltype(work)*>(context))(); }, &work);
        return;
    }
    std::vector<std::thread> others;
    try {
        others.reserve(static_cast<size_t>(threads) - 1);
        for (int i = 1; i < threads; ++i) others.emplace_back(work);
    } catch (const std::exception&) {
        // A system that refuses a thread: fewer do the same work.
    }
    work();
    for (std::thread& other : others) other.join();
}

} // namespace kecore

#endif
