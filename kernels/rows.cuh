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

// Loads, and no more: what it brings is not looked at.
template <int N, typename T> DEVICE void load_packet(const T* p, bool at_once, Packet<T, N>& packet) {
    if (at_once) {
        packet = *(const Packet<T, N>*)p;
    } else {
        UNROLLED
        for (int j = 0; j < N; ++j) packet.values[j] = p[j];
    }
}

template <int N, typename T> DEVICE void store_packet(T* p, const Packet<T, N>& packet) {
#if defined(__CUDACC__)
    static_assert(sizeof(packet) == 16 || sizeof(packet) == 8);
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

template <typename T> struct WithoutConst { typedef T type; };
template <typename T> struct WithoutConst<const T> { typedef T type; };

// What this thread has of a row that lies dense: packets, in batches of which all are loaded before the first is needed, and at
// the row's edges, where no packet of `out` begins, one number. With as many threads that one batch each is all, a row is read
// once. `in` may be the row that `out` is.
template <typename In, typename Out = In> struct InPackets {
    typedef typename In::Real Real;
    typedef typename WithoutConst<typename In::Element>::type Element;
    typedef typename Out::Element Stored;
    static constexpr int N = 16 / (int)(sizeof(Element) > sizeof(Stored) ? sizeof(Element) : sizeof(Stored));
    static constexpr int BATCH = (sizeof(Real) == 4 ? 16 : 2) / N;  // what registers hold beside a float64 exp

    const In in;
    const Out out;
    long long head, packets;
    bool at_once, bias_at_once;
    long long edge;  // its place in the row, or -1
    Element edge_loaded;
    Real edge_bias;
    long long first;  // packet of the batch at work
    Real x[BATCH][N];

    // Of a row that is both.
    DEVICE InPackets(const Out row, long long classes) : InPackets(row, row, classes) { at_once = true; }

    DEVICE InPackets(const In in, const Out out, long long classes) : in(in), out(out), first(threadIdx.x) {
        head = smaller((N - past_boundary<N>(out.start)) % N, classes);
        packets = (classes - head) / N;
        at_once = past_boundary<N>(in.at(head)) == 0;
        bias_at_once = In::biased && past_boundary<N>(in.bias + head) == 0;
        const long long tail = head + packets * N, i = threadIdx.x;
        edge = i < head ? i : i - head < classes - tail ? tail + i - head : -1;
    }

    // Loads the edge, for `edge_logit` to tell later.
    DEVICE void load_edge() {
        if (edge < 0) return;
        edge_loaded = *in.at(edge);
        if constexpr (In::biased) edge_bias = in.bias[edge];
    }
    DEVICE Real edge_logit() const {
        if constexpr (In::biased) return Real(load(&edge_loaded)) + edge_bias;
        else return Real(load(&edge_loaded));
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

    // work(x[v], v) for all of a batch; numbers of packets that it has not are -inf, and their v is none of theirs.
    template <typename F> DEVICE void each(const F work) {
        UNROLLED
        for (int k = 0; k < BATCH; ++k) {
            UNROLLED
            for (int j = 0; j < N; ++j) work(x[k][j], begin(k) + j);
        }
    }

    // The batch's first packet stands in for those that are not there: a branch between loads would wait for the one before.
    DEVICE long long loaded(int k) const { return begin(k) >= 0 ? begin(k) : begin(0); }

    DEVICE void load_batch() {
        Packet<Element, N> packet[BATCH];
        UNROLLED
        for (int k = 0; k < BATCH; ++k) load_packet(in.at(loaded(k)), at_once, packet[k]);
        Packet<Real, N> bias[BATCH];
        if constexpr (In::biased) {
            UNROLLED
            for (int k = 0; k < BATCH; ++k) load_packet(in.bias + loaded(k), bias_at_once, bias[k]);
        }
        UNROLLED
        for (int k = 0; k < BATCH; ++k) {
            const bool there = begin(k) >= 0;
            UNROLLED
            for (int j = 0; j < N; ++j) {
                Real value = Real(load(packet[k].values + j));
                if constexpr (In::biased) value += bias[k].values[j];
                x[k][j] = there ? value : -infinity<Real>();
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
