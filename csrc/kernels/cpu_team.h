/* Threads that share one piece of work, taken item by item. */
#ifndef KECORE_CPU_TEAM_H
#define KECORE_CPU_TEAM_H

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace kecore {

class Team {
  public:
    explicit Team(int size) : size_(size) {}

    /* Hands the items 0 .. count - 1 to whoever is free, and returns when all are done.
     * Every member calls this, in the same order. */
    template <class Work>
    void share(int64_t count, const Work& work) {
        for (int64_t item; (item = next_.fetch_add(1)) < count;) work(item);
        std::unique_lock<std::mutex> lock(mutex_);
        const int64_t round = round_;
        if (++waiting_ == size_) {
            waiting_ = 0;
            next_ = 0;
            ++round_;
            all_.notify_all();
        } else {
            all_.wait(lock, [&] { return round_ != round; });
        }
    }

  private:
    int size_;
    int waiting_ = 0;
    int64_t round_ = 0;
    std::atomic<int64_t> next_{0};
    std::mutex mutex_;
    std::condition_variable all_;
};

/* Runs `body(team)` on at most `threads` threads, this one included (0: one for each processor). */
template <class Body>
void run_team(int threads, int64_t most_useful, const Body& body) {
    if (threads <= 0) threads = static_cast<int>(std::thread::hardware_concurrency());
    if (threads > most_useful) threads = static_cast<int>(most_useful);
    if (threads < 2) {
        Team alone(1);
        body(alone);
        return;
    }
    // Nobody starts before it is known how many there are: a system may refuse a thread.
    std::mutex gate;
    gate.lock();
    std::unique_ptr<Team> team;
    std::vector<std::thread> others;
    try {
        others.reserve(static_cast<size_t>(threads) - 1);
        for (int i = 1; i < threads; ++i)
            others.emplace_back([&] {
                gate.lock();
                gate.unlock();
                body(*team);
            });
    } catch (const std::exception&) {
        // Fewer threads do the same work.
    }
    team.reset(new Team(static_cast<int>(others.size()) + 1));
    gate.unlock();
    body(*team);
    for (std::thread& other : others) other.join();
}

} // namespace kecore

#endif
