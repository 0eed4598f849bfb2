// A cell's row of V numbers, logits or their gradient, and how a block goes over it: one number after the other, or where
// threads share a row that lies dense in memory, 16 bytes at a time.
#pragma once
#include "processor.cuh"

// x[v] for v = 0 .. V - 1 at any stride, and with `with_bias` the bias that is still to be added to it. Both are known while
// compiling, so that loops over dense rows vectorise.
template <bool dense, bool with_bias, typename T> struct Row {
    typedef T Element;
    typedef Compute<T> Real;
    static constexpr bool biased = with_bias;
#if defined(HOST)
    static constexpr bool in_packets = false;  // the compiler's vectors serve a block of one thread
#else
    static constexpr bool in_packets = dense;
#endif
    T* start;
    long long stride;
    const Real* bias;
    DEVICE T* at(long long v) const { return dense ? start + v : start + v * stride; }
    DEVICE Real logit(long long v) const { return biased ? Real(load(at(v))) + bias[v] : Real(load(at(v))); }
};

// N numbers that one instruction loads or stores, where they lie at a multiple of their size.
template <typename T, int N> struct alignas(sizeof(T) * N) Packet { T values[N]; };

// How many numbers past such a place p is.
template <int N, typename T> DEVICE long long past_boundary(const T* p) {
    return (long long)((unsigned long long)p / sizeof(T) % N);
}

// out = p[0] .. p[N - 1], in one load if `at_once`.
template <int N, typename T, typename Real> DEVICE void load_packet(const T* p, bool at_once, Real (&out)[N]) {
    if (at_once) {
        const Packet<T, N> packet = *(const Packet<T, N>*)p;
        UNROLLED
        for (int j = 0; j < N; ++j) out[j] = Real(load(packet.values + j));
    } else {
        UNROLLED
        for (int j = 0; j < N; ++j) out[j] = Real(load(p + j));
    }
}

template <int N, typename T> DEVICE void store_packet(T* p, const Packet<T, N>& packet) {
#if defined(__CUDACC__)
    // Said outright: the compiler may store a copied struct piece by piece.
    if constexpr (sizeof(packet) == 16) {
        uint4 words;
        memcpy(&words, packet.values, 16);
        __stwb((uint4*)p, words);
    } else {
        uint2 words;
        memcpy(&words, packet.values, 8);
        __stwb((uint2*)p, words);
    }
#else
    *(Packet<T, N>*)p = packet;
#endif
}

template <typename A, typename B> struct Same { static constexpr bool value = false; };
template <typename A> struct Same<A, A> { static constexpr bool value = true; };

// What this thread has of a row that lies dense: packets, in batches of which all are loaded before the first is needed, and at
// the row's edges, where no packet of `out` begins, one number. With as many threads that one batch each is all, a row is read
// once.
template <typename In, typename Out = In> struct InPackets {
    typedef typename In::Real Real;
    typedef typename In::Element Element;
    typedef typename Out::Element Stored;
    static constexpr int N = 16 / (int)(sizeof(Element) > sizeof(Stored) ? sizeof(Element) : sizeof(Stored));
    static constexpr int BATCH = (sizeof(Real) == 4 ? 16 : 4) / N;  // what registers hold beside a float64 exp

    const In in;
    const Out out;
    long long head, packets;
    long long edge;  // its place in the row, or -1
    long long first;  // packet of the batch at work
    Real x[BATCH][N];

    DEVICE InPackets(const In in, const Out out, long long classes) : in(in), out(out), first(threadIdx.x) {
        head = smaller((N - past_boundary<N>(out.start)) % N, classes);
        packets = (classes - head) / N;
        const long long tail = head + packets * N, i = threadIdx.x;
        edge = i < head ? i : i - head < classes - tail ? tail + i - head : -1;
    }

    // The first class of a packet of the batch, or -1 where it has none.
    DEVICE long long begin(int k) const {
        const long long packet = first + (long long)k * blockDim.x;
        return packet < packets ? head + packet * N : -1;
    }
    DEVICE bool one_batch() const { return packets <= (long long)BATCH * blockDim.x; }

    template <typename F> DEVICE void each_batch(const F work) {
        for (first = threadIdx.x; first < packets; first += (long long)BATCH * blockDim.x) work();
    }

    template <typename F> DEVICE void each(const F work) {
        UNROLLED
        for (int k = 0; k < BATCH; ++k) {
            UNROLLED
            for (int j = 0; j < N; ++j) work(x[k][j], begin(k) + j);
        }
    }

    DEVICE void load_batch() {
        const bool at_once = Same<In, Out>::value || past_boundary<N>(in.at(head)) == 0;
        const bool bias_at_once = In::biased && past_boundary<N>(in.bias + head) == 0;
        UNROLLED
        for (int k = 0; k < BATCH; ++k) {
            const long long v = begin(k);
            if (v >= 0) {
                load_packet<N>(in.at(v), at_once, x[k]);
            } else {
                UNROLLED
                for (int j = 0; j < N; ++j) x[k][j] = -infinity<Real>();
            }
        }
        if constexpr (In::biased) {
            UNROLLED
            for (int k = 0; k < BATCH; ++k) {
                const long long v = begin(k);
                if (v < 0) continue;
                Real bias[N];
                load_packet<N>(in.bias + v, bias_at_once, bias);
                UNROLLED
                for (int j = 0; j < N; ++j) x[k][j] += bias[j];
            }
        }
    }

    DEVICE void store_batch() const {
        UNROLLED
        for (int k = 0; k < BATCH; ++k) {
            const long long v = begin(k);
            if (v < 0) continue;
            Packet<Stored, N> packet;
            UNROLLED
            for (int j = 0; j < N; ++j) store(packet.values + j, x[k][j]);
            store_packet(out.at(v), packet);
        }
    }
};
