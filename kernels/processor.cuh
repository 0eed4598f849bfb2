// The few words that both processors speak. A kernel is written once, as a block of threads:
//
//   CUDA       compiled by NVRTC; a block is a block.
//   host       compiled by the C++ compiler with HOST: a block has one thread, so block loops become plain loops that
//              vectorise, and reductions and barriers vanish.
//   emulation  compiled by the C++ compiler with EMULATED: a block is real threads with real barriers, for sanitizers.
//
// Every kernel argument is 8 bytes wide (a pointer, a long long or a double), so that one packed list of arguments serves
// every launcher.
#pragma once

#if defined(__CUDACC__)
// Up to 512 threads; asked for no more than one block at a time, ptxas spills no register to make room for others.
#define KERNEL __global__ void __launch_bounds__(512, 1)
#define DEVICE __device__ __forceinline__
#define SHARED(type, name, n) __shared__ type name[n]
#define EXPORT(...)
#else
#define KERNEL static void
#define DEVICE inline __attribute__((always_inline))
#endif

#if defined(HOST)
struct OneThread { static constexpr long long x = 0; };
struct OneWide { static constexpr long long x = 1; };
static constexpr OneThread threadIdx{};
static constexpr OneWide blockDim{};
static inline void __syncthreads() {}
#define SHARED(type, name, n) type name[n]
#elif defined(EMULATED)
#include "emulator.h"
#endif

// A kernel of one type, for each type that arrays may have.
#define EXPORT_FLOATS(name) EXPORT(name, float16) EXPORT(name, bfloat16) EXPORT(name, float32) EXPORT(name, float64)

// BLOCKS: the work items of this block. PARALLEL: the columns of this thread.
#if defined(__CUDACC__)
#define BLOCKS(i, n) for (long long i = blockIdx.x; i < (n); i += gridDim.x)
#else
struct BlockRange { long long begin, end; };
static thread_local BlockRange blocks_here;
#define BLOCKS(i, n) for (long long i = blocks_here.begin, last_##i = blocks_here.end < (n) ? blocks_here.end : (n); i < last_##i; ++i)
#endif
#define PARALLEL(i, n) for (long long i = threadIdx.x; i < (n); i += blockDim.x)

// Before a PARALLEL loop whose iterations are independent, or which only reduces into `...`.
#define PRAGMA(text) _Pragma(#text)
#if defined(HOST)
#define SIMD PRAGMA(omp simd)
#define SIMD_SUM(name) PRAGMA(omp simd reduction(+ : name))
#define SIMD_MAX(name) PRAGMA(omp simd reduction(max : name))
// Columns that one thread works on together: on the host whole rows of most models, so that memory is read in order.
static constexpr int COLUMNS = 512;
#else
#define SIMD
#define SIMD_SUM(name)
#define SIMD_MAX(name)
static constexpr int COLUMNS = 1;
#endif
// Before a loop of a known length over an array that is to stay in registers.
#if defined(__CUDACC__)
#define UNROLLED PRAGMA(unroll)
#else
#define UNROLLED
#endif

typedef float float32;
typedef double float64;
struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

// The type a value is computed and accumulated in.
template <typename T> struct ComputeOf { typedef float type; };
template <> struct ComputeOf<float64> { typedef double type; };
template <typename T> struct ComputeOf<const T> : ComputeOf<T> {};
template <typename T> using Compute = typename ComputeOf<T>::type;

DEVICE unsigned int bits_of(float x) {
#if defined(__CUDACC__)
    return __float_as_uint(x);
#else
    unsigned int bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
#endif
}

DEVICE float float_of(unsigned int bits) {
#if defined(__CUDACC__)
    return __uint_as_float(bits);
#else
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
#endif
}

DEVICE unsigned long long bits_of(double x) {
#if defined(__CUDACC__)
    return (unsigned long long)__double_as_longlong(x);
#else
    unsigned long long bits;
    __builtin_memcpy(&bits, &x, 8);
    return bits;
#endif
}

DEVICE double float_of(unsigned long long bits) {
#if defined(__CUDACC__)
    return __longlong_as_double((long long)bits);
#else
    double x;
    __builtin_memcpy(&x, &bits, 8);
    return x;
#endif
}

template <typename Real> DEVICE Real infinity() { return Real(float_of(0x7f800000u)); }
template <typename Real> DEVICE Real nan_value() { return Real(float_of(0x7fc00000u)); }

template <typename Real> DEVICE bool is_finite(Real x) { return x - x == Real(0); }
template <typename Real> DEVICE bool is_nan(Real x) { return !(x == x); }

template <typename T> DEVICE T smaller(T a, T b) { return b < a ? b : a; }
template <typename T> DEVICE T larger(T a, T b) { return b > a ? b : a; }

// The first of places [low, high) of rising `values` that is not below `wanted`, or high.
template <typename T> DEVICE long long first_not_below(const T* values, long long low, long long high, long long wanted) {
    while (low < high) {
        const long long middle = (low + high) / 2;
        if (values[middle] < wanted) low = middle + 1;
        else high = middle;
    }
    return low;
}

DEVICE float load(const float* p) { return *p; }
DEVICE double load(const double* p) { return *p; }
DEVICE float load(const bfloat16* p) { return float_of((unsigned int)p->bits << 16); }
DEVICE float load(const float16* p) {
#if defined(__CUDACC__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(p->bits));
    return x;
#else
    // Shifting the exponent field and multiplying by 2^112 rebiases it, subnormals included; infinities and NaN are then
    // recognised by their size. Free of branches, so that loops over it vectorise.
    const unsigned int magnitude = (p->bits & 0x7fffu) << 13;
    const float scaled = float_of(magnitude) * float_of(0x77800000u);
    const unsigned int special = bits_of(scaled) | 0x7f800000u;
    const unsigned int bits = magnitude >= 0x0f800000u ? special : bits_of(scaled);
    return float_of(bits | (unsigned int)(p->bits & 0x8000u) << 16);
#endif
}

DEVICE void store(float* p, float x) { *p = x; }
DEVICE void store(double* p, double x) { *p = x; }
DEVICE void store(bfloat16* p, float x) {
    const unsigned int bits = bits_of(x);
    const unsigned int rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    p->bits = (unsigned short)(is_nan(x) ? (bits >> 16 | 0x40u) : rounded);
}
DEVICE void store(float16* p, float x) {
#if defined(__CUDACC__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
#else
    const unsigned int bits = bits_of(x), magnitude = bits & 0x7fffffffu;
    // Adding 0.5 (whose unit in the last place is the smallest float16 subnormal) rounds subnormals as the format does.
    const unsigned int subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const unsigned int normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const unsigned int large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const unsigned int finite = magnitude < 0x38800000u ? subnormal : normal;
    p->bits = (unsigned short)((magnitude >= 0x477ff000u ? large : finite) | (bits >> 16 & 0x8000u));
#endif
}

// exp(x) = scale (1 + q) with scale = 2^n and q = expm1(x - n ln 2), |x - n ln 2| <= ln 2 / 2.
struct Exponential { float scale, q; };

DEVICE Exponential exponential_parts(float x) {
    // Below -88.3 the scale becomes an exact zero; NaN passes both comparisons.
    x = x < -88.3f ? -88.3f : x;
    x = x > 88.3f ? 88.3f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low mantissa bits
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float q = 1.98412698e-4f;
    q = q * r + 1.38888889e-3f;
    q = q * r + 8.33333333e-3f;
    q = q * r + 4.16666667e-2f;
    q = q * r + 1.66666667e-1f;
    q = q * r + 0.5f;
    return {float_of((bits_of(shifted) << 23) + 0x3f800000u), q * (r * r) + r};
}

#if defined(__CUDACC__)
DEVICE float exponential(float x) { return expf(x); }
DEVICE double exponential(double x) { return exp(x); }
DEVICE float logarithm(float x) { return logf(x); }
DEVICE double logarithm(double x) { return log(x); }
DEVICE float log_of_one_plus(float x) { return log1pf(x); }
DEVICE double log_of_one_plus(double x) { return log1p(x); }
DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
DEVICE double hyperbolic_tangent(double x) { return tanh(x); }
DEVICE float error_function(float x) { return erff(x); }
DEVICE double error_function(double x) { return erf(x); }
#else
// No branch and no call, so that GCC and Clang vectorise it without -ffast-math, which would break infinities.
DEVICE float exponential(float x) {
    const Exponential e = exponential_parts(x);
    return e.scale * e.q + e.scale;
}
DEVICE double exponential(double x) { return __builtin_exp(x); }
DEVICE float logarithm(float x) { return __builtin_logf(x); }
DEVICE double logarithm(double x) { return __builtin_log(x); }
DEVICE float log_of_one_plus(float x) { return __builtin_log1pf(x); }
DEVICE double log_of_one_plus(double x) { return __builtin_log1p(x); }
// tanh x = expm1(2x) / (expm1(2x) + 2) keeps the relative accuracy of small x; beyond 9.1 a float is 1.
DEVICE float hyperbolic_tangent(float x) {
    x = x < -9.1f ? -9.1f : x;
    x = x > 9.1f ? 9.1f : x;
    const Exponential e = exponential_parts(2.0f * x);
    const float minus_one = e.scale * e.q + (e.scale - 1.0f);
    return minus_one / (minus_one + 2.0f);
}
DEVICE double hyperbolic_tangent(double x) { return __builtin_tanh(x); }
DEVICE float error_function(float x) { return __builtin_erff(x); }
DEVICE double error_function(double x) { return __builtin_erf(x); }
#endif

// Begins to load the row that comes after the one at work. A core of the host sees no further than the arithmetic of one
// row, and its own prefetching stops at every page; on a GPU other blocks fill the time.
template <typename T> DEVICE void prefetch_row(const T* row, long long elements) {
#if defined(HOST)
    const long long bytes = elements * (long long)sizeof(T), most = 4096;
    for (long long at = 0; at < (bytes < most ? bytes : most); at += 64) __builtin_prefetch((const char*)row + at);
#endif
}

// Of several blocks or threads: sums of integers are the same in any order, and so is what all write alike.
DEVICE void add_atomically(unsigned long long* sum, unsigned long long value) {
#if defined(__CUDACC__)
    atomicAdd(sum, value);
#else
    __atomic_fetch_add(sum, value, __ATOMIC_RELAXED);
#endif
}

DEVICE void store_atomically(unsigned char* p, unsigned char value) {
#if defined(__CUDACC__)
    *p = value;
#else
    __atomic_store_n(p, value, __ATOMIC_RELAXED);
#endif
}

struct Sum { template <typename T> static DEVICE T of(T a, T b) { return a + b; } };
struct Max { template <typename T> static DEVICE T of(T a, T b) { return larger(a, b); } };

// Over the block: block_reduce gives every thread the result, block_scan what the threads up to this one make. Blocks are
// whole warps of 32. Each is a barrier too: what a thread read before it, another may overwrite after it.
#if defined(HOST)
template <typename Combine, typename T> DEVICE T block_reduce(T value) { return value; }
template <typename Combine, typename T> DEVICE T block_scan(T value) { return value; }
#else
#if defined(__CUDACC__)
template <typename T> DEVICE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
#endif

template <typename Combine, typename T> DEVICE T block_reduce(T value) {
    SHARED(T, of_warp, 32);
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, warps = (int)blockDim.x >> 5;
    for (int mask = 16; mask > 0; mask >>= 1) value = Combine::of(value, shuffle_xor(value, mask));
    if (warps > 1) {
        if (lane == 0) of_warp[warp] = value;
        __syncthreads();
        value = of_warp[0];
        for (int other = 1; other < warps; ++other) value = Combine::of(value, of_warp[other]);
        __syncthreads();  // of_warp belongs to the next reduction from here
    } else {
        __syncthreads();  // a shuffle alone orders no memory
    }
    return value;
}

template <typename Combine, typename T> DEVICE T block_scan(T value) {
    SHARED(T, results, 1024);
    results[threadIdx.x] = value;
    __syncthreads();
    for (int reach = 1; reach < (int)blockDim.x; reach *= 2) {
        const T before = (int)threadIdx.x >= reach ? results[threadIdx.x - reach] : value;
        __syncthreads();
        if ((int)threadIdx.x >= reach) results[threadIdx.x] = Combine::of(before, results[threadIdx.x]);
        __syncthreads();
    }
    return results[threadIdx.x];
}
#endif
template <typename T> DEVICE T block_sum(T value) { return block_reduce<Sum>(value); }
template <typename T> DEVICE T block_max(T value) { return block_reduce<Max>(value); }
