// Runs a block as real threads with real barriers, so that the sanitizers see on the host what a GPU would do: a missing
// barrier is a data race, an index one too far leaves its array, a barrier that not all threads reach ends with a message.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_THREAD__)
extern "C" {
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

struct Index { unsigned int x; };
static thread_local Index threadIdx;
static Index blockDim;

namespace emulation {

static thread_local unsigned int shuffles = 0;  // of this thread, of whatever type

constexpr int WARP = 32, MOST_THREADS = 1024, EXIT_STATUS = 86;

// _Exit and not abort: the block's other threads still run, so nothing of theirs may be destroyed.
[[noreturn]] inline void fail() {
    std::fflush(stderr);
    std::_Exit(EXIT_STATUS);
}

// Where in the kernels a thread waits.
struct Site { const char* file; int line; };

// Waits until all of `members` threads have come, to the same place in the kernel.
class Barrier {
public:
    void wait(int members, Site site) {
        unsigned int round;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (arrived_ == 0) site_ = site;
            if (site.line != site_.line || std::strcmp(site.file, site_.file) != 0) {
                std::fprintf(stderr, "barrier divergence: %d of %d threads wait at %s:%d, another comes to %s:%d\n", arrived_,
                             members, site_.file, site_.line, site.file, site.line);
                fail();
            }
            round = round_.load();
            if (++arrived_ == members) {
                arrived_ = 0;
                round_.store(round + 1);
                round_.notify_all();
                return;
            }
        }
        round_.wait(round);
    }

    unsigned int rounds() const { return round_.load(); }

    void report(const char* whose, int members) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (arrived_ > 0)
            std::fprintf(stderr, "  %d of %d threads of %s wait at %s:%d\n", arrived_, members, whose, site_.file, site_.line);
    }

private:
    std::mutex mutex_;
    std::atomic<unsigned int> round_{0};
    int arrived_ = 0;
    Site site_{};
};

// The lanes' values on their way through a shuffle: two sets in turn, so that one barrier is enough for each.
struct Warp {
    Barrier barrier;
    unsigned char values[2][WARP][16];
};

// As long as it lives ThreadSanitizer does not see what the thread does, so that what other threads do is not ordered by it.
struct Unseen {
#if defined(__SANITIZE_THREAD__)
    Unseen() {
        AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Unseen() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
        AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
    }
#endif
};

// The threads of a block. They live on from launch to launch: under a sanitizer it takes long to start one.
class Block {
public:
    typedef std::function<void(long long begin, long long end)> Body;

    ~Block() { resize(0); }

    void run(int threads, long long items, const Body& body) {
        if (threads < WARP || threads > MOST_THREADS || threads % WARP != 0) {
            std::fprintf(stderr, "block of %d threads: expected whole warps of %d, at most %d\n", threads, WARP, MOST_THREADS);
            fail();
        }
        resize(threads);
        blockDim.x = (unsigned int)threads;
        std::unique_lock<std::mutex> lock(mutex_);
        start(&body, items);
        // Blocks that pass barriers are alive, however slow the machine.
        const char* const asked = std::getenv("EMULATOR_PATIENCE");
        const std::chrono::duration<double> patience(asked ? std::atof(asked) : 10.0);
        for (unsigned int seen = barrier_.rounds(); !finished_.wait_for(lock, patience, [&] { return working_ == 0; });) {
            if (barrier_.rounds() == seen) hung(patience.count());
            seen = barrier_.rounds();
        }
    }

    void synchronise(Site site) { barrier_.wait(size(), site); }

    Warp& warp() { return warps_[threadIdx.x / WARP]; }

    // An array that the threads share: alone in memory, so that AddressSanitizer sees both its ends.
    void* share(std::size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        shared_.push_back({std::malloc(bytes), bytes});
        poison(shared_.back());
        return shared_.back().start;
    }

private:
    struct Shared { void* start; std::size_t bytes; };

    // NaN in every type of float: a block finds nothing in its shared memory.
    static void poison(const Shared& shared) { std::memset(shared.start, 0xff, shared.bytes); }

    int size() const { return (int)threads_.size(); }

    void start(const Body* body, long long items) {
        body_ = body;
        items_ = items;
        working_ = size();
        ++job_;
        started_.notify_all();
    }

    void resize(int threads) {
        if (threads == size()) return;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            start(nullptr, 0);
        }
        for (std::thread& thread : threads_) thread.join();
        threads_.resize((std::size_t)threads);
        warps_.resize((std::size_t)threads / WARP);
        for (int i = 0; i < threads; ++i) threads_[(std::size_t)i] = std::thread([this, i, last = job_] { work(i, last); });
    }

    void work(int index, int last_job) {
        threadIdx.x = (unsigned int)index;
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                started_.wait(lock, [&] { return job_ != last_job; });
                last_job = job_;
            }
            if (!body_) return;
            // Every second block takes two items, as in a grid smaller than the work: one item must leave nothing to the next.
            for (long long begin = 0, end; begin < items_; begin = end) {
                end = std::min(items_, begin + (begin % 3 == 0 ? 1 : 2));
                if (index == 0)
                    for (const Shared& shared : shared_) poison(shared);
                synchronise({"the start of the kernel", 0});
                (*body_)(begin, end);
                synchronise({"the end of the kernel", 0});
            }
            const std::lock_guard<std::mutex> lock(mutex_);
            if (--working_ == 0) finished_.notify_one();
        }
    }

    [[noreturn]] void hung(double seconds) {
        std::fprintf(stderr, "barrier hang: the block passed no barrier for %g seconds\n", seconds);
        barrier_.report("the block", size());
        for (Warp& warp : warps_) warp.barrier.report("a warp", WARP);
        fail();
    }

    std::vector<std::thread> threads_;
    std::deque<Warp> warps_;
    std::vector<Shared> shared_;
    Barrier barrier_;
    std::mutex mutex_;
    std::condition_variable started_, finished_;
    int job_ = 0, working_ = 0;
    long long items_ = 0;
    const Body* body_ = nullptr;
};

inline Block block;

template <typename T, std::size_t n> T (&shared_array())[n] { return *static_cast<T(*)[n]>(block.share(sizeof(T[n]))); }

}  // namespace emulation

// Blocks run one after the other, so that one array of each name is enough.
#define SHARED(type, name, n) static type(&name)[n] = emulation::shared_array<type, n>()

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulation::block.synchronise({file, line});
}

// A shuffle hands over its value and orders nothing else, so that ThreadSanitizer finds memory that lanes exchange without a
// barrier of its own: CUDA promises no more.
template <typename T>
T shuffle_xor(T value, int mask, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    static_assert(sizeof(T) <= 16 && std::is_trivially_copyable<T>::value, "a lane's value has up to 16 plain bytes");
    [[maybe_unused]] const emulation::Unseen unseen;
    emulation::Warp& warp = emulation::block.warp();
    auto& values = warp.values[emulation::shuffles++ % 2];
    const int lane = (int)threadIdx.x % emulation::WARP;
    std::memcpy(values[lane], &value, sizeof(T));
    warp.barrier.wait(emulation::WARP, {file, line});
    std::memcpy(&value, values[lane ^ mask], sizeof(T));
    return value;
}

// Runs body(begin, end) in `threads` threads, for the items [0, items) one block after the other.
template <typename Body> void emulate(int threads, long long items, const Body& body) {
    emulation::block.run(threads, items, body);
}
