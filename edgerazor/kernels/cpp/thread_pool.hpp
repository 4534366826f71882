// The thread pool of a decoder: its threads work side by side within a call, and sleep between calls.
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

// Tells the core that this thread spins.
inline void cpu_pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// While this object lives, the calling thread blocks all signals, and so do the threads that it starts, which inherit
// the mask: Python handles signals, and only on threads that know its interpreter.
class BlockSignals {
  public:
    BlockSignals() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }

    BlockSignals(const BlockSignals&) = delete;

    ~BlockSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

  private:
    sigset_t before_;
};

// Between calls a worker spins for some 50 microseconds, so that the next token finds it awake, and then sleeps: it
// never takes a core from torch's threads for longer. Within a call the threads meet at barriers often and for short
// times, so there they spin.
//
// Threads do not survive a fork: in the child process nothing of this may be called, not even the destructor.
// `Thread` is std::thread, or a replacement for tests.
template <class Thread>
class BasicThreadPool {
  public:
    // `count` threads, the caller's own among them. Throws std::system_error or std::bad_alloc where a thread cannot be
    // created; those created before it have ended by then.
    explicit BasicThreadPool(int count) : count_(count) {
        const BlockSignals blocked;
        try {
            workers_.reserve(count - 1);
            for (int i = 1; i < count; i++) workers_.emplace_back([this, i] { worker_loop(i); });
        } catch (...) { // C++ does not call the destructor of an object whose constructor threw
            shut_down();
            throw;
        }
    }

    BasicThreadPool(const BasicThreadPool&) = delete;

    ~BasicThreadPool() { shut_down(); }

    int count() const { return count_; }

    // Runs work(thread) on all threads, the caller being thread 0, and returns when all have finished.
    template <class Work>
    void run(const Work& work) {
        publish([](const void* work, int thread) { (*(const Work*)work)(thread); }, &work);
        work(0);
        spin_until([this] { return finished_.load(std::memory_order_acquire) == count_ - 1; });
    }

    // Barrier: blocks until all threads of this call of `run` have arrived.
    void barrier() {
        if (count_ == 1) return;
        const unsigned phase = barrier_phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            barrier_phase_.store(phase + 1, std::memory_order_release);
        } else {
            spin_until([this, phase] { return barrier_phase_.load(std::memory_order_acquire) != phase; });
        }
    }

  private:
    using Call = void (*)(const void* work, int thread);
    static constexpr int kSpinsBeforeSleep = 1000, kSpinsBeforeYield = 1000;

    template <class Condition>
    static void spin_until(const Condition& condition) {
        for (int spins = 0; !condition(); spins++) {
            cpu_pause();
            if (spins >= kSpinsBeforeYield) sched_yield(); // there may be more threads than cores
        }
    }

    // A call without a function tells the workers to end.
    void shut_down() {
        publish(nullptr, nullptr);
        for (Thread& worker : workers_) worker.join();
    }

    void publish(Call call, const void* work) {
        if (count_ == 1) return;
        finished_.store(0, std::memory_order_relaxed);
        call_ = call;
        work_ = work;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            calls_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
    }

    void worker_loop(int thread) {
        for (unsigned served = 0;; finished_.fetch_add(1, std::memory_order_release)) {
            const auto called = [&] { return calls_.load(std::memory_order_acquire) != served; };
            for (int spins = 0; spins < kSpinsBeforeSleep && !called(); spins++) cpu_pause();
            if (!called()) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, called);
            }
            served++;
            if (call_ == nullptr) return;
            call_(work_, thread);
        }
    }

    const int count_;
    std::vector<Thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    Call call_ = nullptr;
    const void* work_ = nullptr;
    // Each on a cache line of its own: other threads write to them while this one spins.
    alignas(64) std::atomic<unsigned> calls_{0};
    alignas(64) std::atomic<int> finished_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> barrier_phase_{0};
};

using ThreadPool = BasicThreadPool<std::thread>;

// The part [first, last) of `count` items that one of `threads` threads works on.
struct WorkRange {
    int64_t first, last;
    WorkRange(int64_t count, int thread, int threads) {
        first = count * thread / threads;
        last = count * (thread + 1) / threads;
    }
};

} // namespace edgerazor
