// Threads that work side by side on one call of a decoder, and sleep between calls.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace edgerazor {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The calling thread ignores signals, and so do threads that it starts: signals are for threads that know Python.
class NoSignals {
  public:
    NoSignals() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }

    NoSignals(const NoSignals&) = delete;

    ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

  private:
    sigset_t before_;
};

// Between calls a thread looks for work for some 50 microseconds, so that the next token finds it awake, then sleeps: it
// never takes a core from torch's threads for longer. Within a call all wait for one another often and shortly.
//
// Threads do not survive a fork: in the child nothing of this may be called, the destructor neither.
template <class Thread>
class ThreadsOf {
  public:
    // Throws std::system_error or std::bad_alloc where a thread cannot be created; none is left then.
    explicit ThreadsOf(int count) : count_(count) {
        const NoSignals signals;
        try {
            others_.reserve(count - 1);
            for (int i = 1; i < count; i++) others_.emplace_back([this, i] { serve(i); });
        } catch (...) { // the destructor of an object that was never whole is not called
            stop();
            throw;
        }
    }

    ThreadsOf(const ThreadsOf&) = delete;

    ~ThreadsOf() { stop(); }

    int count() const { return count_; }

    // work(thread) on all threads, the caller being thread 0.
    template <class Work>
    void run(const Work& work) {
        begin([](const void* work, int thread) { (*(const Work*)work)(thread); }, &work);
        work(0);
        wait([this] { return done_.load(std::memory_order_acquire) == count_ - 1; });
    }

    // Within `run`: returns when all threads have called it as often.
    void meet() {
        if (count_ == 1) return;
        const unsigned round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
        } else {
            wait([this, round] { return round_.load(std::memory_order_acquire) != round; });
        }
    }

  private:
    using Call = void (*)(const void* work, int thread);
    static constexpr int kIdleLooks = 1000, kPatience = 1000;

    template <class Condition>
    static void wait(const Condition& condition) {
        for (int looks = 0; !condition(); looks++) {
            pause();
            if (looks >= kPatience) sched_yield(); // more threads than cores
        }
    }

    void stop() {
        begin(nullptr, nullptr);
        for (Thread& other : others_) other.join();
    }

    void begin(Call call, const void* work) {
        if (count_ == 1) return;
        done_.store(0, std::memory_order_relaxed);
        call_ = call;
        work_ = work;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            calls_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
    }

    void serve(int thread) {
        for (unsigned seen = 0;; done_.fetch_add(1, std::memory_order_release)) {
            const auto called = [&] { return calls_.load(std::memory_order_acquire) != seen; };
            for (int looks = 0; looks < kIdleLooks && !called(); looks++) pause();
            if (!called()) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, called);
            }
            seen++;
            if (call_ == nullptr) return;
            call_(work_, thread);
        }
    }

    const int count_;
    std::vector<Thread> others_;
    std::mutex mutex_;
    std::condition_variable wake_;
    Call call_ = nullptr;
    const void* work_ = nullptr;
    alignas(64) std::atomic<unsigned> calls_{0};
    alignas(64) std::atomic<int> done_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> round_{0};
};

using Threads = ThreadsOf<std::thread>;

// [first, last) of `count` things, in whole multiples of `unit`, for one of `threads` threads.
struct Share {
    int64_t first, last;
    Share(int64_t count, int thread, int threads, int64_t unit = 1) {
        const int64_t units = (count + unit - 1) / unit;
        first = units * thread / threads * unit;
        last = units * (thread + 1) / threads * unit;
        if (first > count) first = count;
        if (last > count) last = count;
    }
};

} // namespace edgerazor
