// The kernels as one shared library for the host. Python finds every instance by name and runs a range of its blocks; the
// threads are Python's own, so that nothing here holds a pool that a fork could break.
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if !defined(EMULATED)
#define HOST
#endif

namespace {

typedef void (*Launcher)(const int64_t* arguments);
struct Kernel { const char* name; Launcher run; };

std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}

// Arguments are 8 bytes each, whatever their type.
template <typename T> T argument(int64_t slot) {
    static_assert(sizeof(T) == 8, "kernel arguments are pointers, long long or double");
    T value;
    std::memcpy(&value, &slot, 8);
    return value;
}

template <auto kernel> struct Call;
template <typename... Args, void (*kernel)(Args...)> struct Call<kernel> {
    template <std::size_t... i> static void unpack(const int64_t* arguments, std::index_sequence<i...>) {
        kernel(argument<Args>(arguments[i])...);
    }
    static void run(const int64_t* arguments) { unpack(arguments, std::index_sequence_for<Args...>()); }
};

struct Registered {
    Registered(const char* name, Launcher run) { kernels().push_back({name, run}); }
};

}  // namespace

// EXPORT(name, types...) makes the instance name<types...> known by exactly that name.
#define JOINED_(a, b) a##b
#define JOINED(a, b) JOINED_(a, b)
#define EXPORT_PLAIN(name) static Registered JOINED(registered_, __COUNTER__)(#name, &Call<&name>::run);
#define EXPORT_ONE(name, a) static Registered JOINED(registered_, __COUNTER__)(#name "<" #a ">", &Call<&name<a>>::run);
#define EXPORT_TWO(name, a, b) static Registered JOINED(registered_, __COUNTER__)(#name "<" #a "," #b ">", &Call<&name<a, b>>::run);
#define EXPORT_CHOICE(_1, _2, _3, chosen, ...) chosen
#define EXPORT(...) EXPORT_CHOICE(__VA_ARGS__, EXPORT_TWO, EXPORT_ONE, EXPORT_PLAIN)(__VA_ARGS__)

#include "amortized.cu"
#include "band.cu"
#include "compact.cu"
#include "edit_distance.cu"
#include "embr.cu"
#include "joint.cu"
#include "lattice.cu"
#include "output_layer.cu"
#include "reduced_predictor.cu"
#include "sampling.cu"
#include "simple_joint.cu"
#include "softmax.cu"

extern "C" {
#define VISIBLE __attribute__((visibility("default")))

VISIBLE int64_t kernel_count() { return (int64_t)kernels().size(); }

VISIBLE const char* kernel_name(int64_t i) { return kernels()[(std::size_t)i].name; }

#if defined(HOST)
// Runs blocks [begin, end) of kernel i in the calling thread.
VISIBLE void run_blocks(int64_t i, int64_t begin, int64_t end, const int64_t* arguments) {
    blocks_here = {begin, end};
    kernels()[(std::size_t)i].run(arguments);
}
#else
// Runs blocks [0, blocks) of kernel i one after the other, each with `threads` real threads.
VISIBLE void run_emulated(int64_t i, int64_t blocks, int64_t threads, const int64_t* arguments) {
    emulate((int)threads, blocks, [=](long long begin, long long end) {
        blocks_here = {begin, end};
        kernels()[(std::size_t)i].run(arguments);
    });
}
#endif
}
