// Amortized Networks: gates that choose a branch of the network in every frame, what the chosen branches cost, and the backlog
// of a recogniser that works while frames come in. All with gradients, frames past an utterance's length left out.
#include "processor.cuh"
#include "philox.cuh"

// Gates or their gradient of one utterance: (frames, branches), any strides.
template <typename T> struct Gates {
    const T* first;
    long long by_frame, by_branch;

    DEVICE Gates(const T* gates, long long by_utterance, long long of_frame, long long of_branch, long long b)
        : first(gates + b * by_utterance), by_frame(of_frame), by_branch(of_branch) {}

    DEVICE Compute<T> operator()(long long t, long long k) const { return load(first + t * by_frame + k * by_branch); }

    // What frame t takes of something that branch k has per_branch[k] of.
    DEVICE double taken(long long t, long long branches, const double* per_branch) const {
        double sum = 0.0;
        for (long long k = 0; k < branches; ++k) sum += (double)(*this)(t, k) * per_branch[k];
        return sum;
    }
};

// Frames of an utterance, or 0 for a length that is none.
DEVICE long long length_of(const long long* lengths, long long b, long long padded) {
    return lengths[b] >= 1 && lengths[b] <= padded ? lengths[b] : 0;
}

// Mean cost of a frame, one block per utterance: NaN, with gradient 0, where it is not finite.
template <typename T>
KERNEL amortized_cost(long long batch, const T* gates, long long by_utterance, long long by_frame, long long by_branch,
                      long long padded, long long branches, const long long* lengths, const double* costs,
                      const Compute<T>* weights, Compute<T>* cost, T* gradient) {
    typedef Compute<T> Real;
    BLOCKS(b, batch) {
        const Gates<T> z(gates, by_utterance, by_frame, by_branch, b);
        const long long frames = length_of(lengths, b, padded);
        double sum = 0.0;
        PARALLEL(t, frames) sum += z.taken(t, branches, costs);
        sum = block_sum(sum);
        const bool live = frames > 0 && is_finite(sum);
        if (threadIdx.x == 0) cost[b] = live ? (Real)(sum / (double)frames) : nan_value<Real>();
        if (!gradient) continue;
        const double share = live ? (weights ? (double)weights[b] : 1.0) / (double)frames : 0.0;
        PARALLEL(t, padded) {
            for (long long k = 0; k < branches; ++k)
                store(gradient + (b * padded + t) * branches + k, live && t < frames ? (Real)(share * costs[k]) : Real(0));
        }
    }
}

// q -> max(least, q + shift): what some frames make of the backlog before them. Of two such, one after the other, is one again.
struct Waiting {
    double shift, least;
    static DEVICE Waiting of(Waiting earlier, Waiting later) {
        return {earlier.shift + later.shift, larger(later.least, earlier.least + later.shift)};
    }
};

// s -> slope (offset + s): what some frames, from the last on, make of the gradient that comes back to them.
struct Returning {
    double slope, sum;
    static DEVICE Returning of(Returning later, Returning earlier) {
        return {later.slope * earlier.slope, earlier.sum + earlier.slope * later.sum};
    }
};

enum Statistic { MEAN = 0, LAST };

// Backlog q_t = max(0, q_{t-1} + taken_t - frame_period), its mean or its last value: NaN, with gradient 0, where it is not
// finite. `waiting` (batch, padded) is scratch. One block per utterance, whose two recurrences are scans.
template <typename T>
KERNEL amortized_backlog(long long batch, const T* gates, long long by_utterance, long long by_frame, long long by_branch,
                         long long padded, long long branches, const long long* lengths, const double* durations,
                         double frame_period, long long statistic, const Compute<T>* weights, double* waiting,
                         Compute<T>* backlog, T* gradient) {
    typedef Compute<T> Real;
    SHARED(double, handed_over, 1);
    BLOCKS(b, batch) {
        const Gates<T> z(gates, by_utterance, by_frame, by_branch, b);
        const long long frames = length_of(lengths, b, padded);
        double* const q = waiting + b * padded;
        double carried = 0.0, sum = 0.0;
        int bad = frames > 0 ? 0 : 1;
        for (long long start = 0; start < frames; start += blockDim.x) {
            const long long t = start + threadIdx.x;
            const double shift = t < frames ? z.taken(t, branches, durations) - frame_period : 0.0;
            if (!is_finite(shift)) bad = 1;
            const Waiting upto = block_scan<Waiting>(Waiting{shift, 0.0});
            const double mine = larger(upto.least, carried + upto.shift);
            if (t < frames) {
                q[t] = mine;
                sum += mine;
            }
            if (threadIdx.x == blockDim.x - 1) handed_over[0] = mine;
            __syncthreads();
            carried = handed_over[0];  // overwritten in the next turn, after its scan
        }
        bad = block_max(bad);
        sum = block_sum(sum);
        const double value = bad ? nan_value<double>() : statistic == MEAN ? sum / (double)frames : q[frames - 1];
        const bool live = is_finite(value);
        if (threadIdx.x == 0) backlog[b] = live ? (Real)value : nan_value<Real>();
        if (!gradient) continue;
        T* const out = gradient + b * padded * branches;
        const double weight = weights ? (double)weights[b] : 1.0;
        carried = 0.0;
        for (long long start = 0; start < padded; start += blockDim.x) {
            const long long t = padded - 1 - start - threadIdx.x;
            const bool real = live && t >= 0 && t < frames;
            const double slope = real && q[t] > 0.0 ? 1.0 : 0.0;
            const double own = statistic == MEAN ? 1.0 / (double)frames : t == frames - 1 ? 1.0 : 0.0;
            const Returning upto = block_scan<Returning>(Returning{slope, slope * own});
            const double mine = upto.sum + upto.slope * carried;
            for (long long k = 0; t >= 0 && k < branches; ++k)
                store(out + t * branches + k, real ? (Real)(weight * mine * durations[k]) : Real(0));
            if (threadIdx.x == blockDim.x - 1) handed_over[0] = mine;
            __syncthreads();
            carried = handed_over[0];
        }
    }
}

// Frames that a block's threads share out.
static constexpr long long FRAMES = 256;

// The noisy logits of one frame over the temperature, and what a softmax needs of them. The counter of their random bits is
// (k / 4, t, b, 0), so that they are the same on every processor and when they are made again.
template <typename T> struct Noisy {
    Gates<T> logits;
    unsigned long long seed;
    bool noise;
    double temperature;
    long long b, t;

    DEVICE double operator()(long long k) const {
        double gumbel = 0.0;
        if (noise) {
            const Philox drawn = philox(seed, (unsigned int)(k >> 2), (unsigned int)t, (unsigned int)b, 0u);
            gumbel = -logarithm(-logarithm(((double)drawn.word((int)(k & 3)) + 0.5) / 4294967296.0));
        }
        return ((double)logits(t, k) + gumbel) / temperature;
    }
};

// Of one frame's noisy logits. Their differences are rounded, not they: at a low temperature they are large.
template <typename T> struct Softmax {
    typedef Compute<T> Real;
    double most;
    Real sum;
    long long chosen;

    DEVICE Softmax(const Noisy<T>& y, long long branches) : most(-infinity<double>()), sum(0), chosen(0) {
        for (long long k = 0; k < branches; ++k) {
            const double x = y(k);
            if (x > most) {
                sum = sum * exponential((Real)(most - x)) + Real(1);
                most = x;
                chosen = k;
            } else if (!(x == -infinity<double>())) {  // a branch that is ruled out; a NaN is not
                sum += exponential((Real)(x - most));
            }
        }
    }

    DEVICE bool live() const { return is_finite(sum) && is_finite(most); }
    DEVICE Real gate(double x) const { return exponential((Real)(x - most)) / sum; }
};

// Gates of every frame, softmax of the noisy logits or with `hard` one-hot of the largest; frames past the length, 0. Frames
// without finite gates, and utterances whose length is none, are NaN.
template <typename T>
KERNEL amortized_gate(long long frames, const T* logits, long long by_utterance, long long by_frame, long long by_branch,
                      long long padded, long long branches, const long long* lengths, double temperature, long long hard,
                      long long noise, long long seed, T* gates) {
    typedef Compute<T> Real;
    BLOCKS(block, (frames + FRAMES - 1) / FRAMES) {
        PARALLEL(i, smaller(FRAMES, frames - block * FRAMES)) {
            const long long frame = block * FRAMES + i, b = frame / padded, t = frame % padded;
            const long long length = lengths ? length_of(lengths, b, padded) : padded;
            T* const out = gates + frame * branches;
            if (length > 0 && t >= length) {
                for (long long k = 0; k < branches; ++k) store(out + k, Real(0));
                continue;
            }
            const Noisy<T> y{{logits, by_utterance, by_frame, by_branch, b}, (unsigned long long)seed, noise != 0, temperature, b, t};
            const Softmax<T> of(y, branches);
            for (long long k = 0; k < branches; ++k) {
                const Real gate = hard ? Real(k == of.chosen ? 1 : 0) : of.gate(y(k));
                store(out + k, length > 0 && of.live() ? gate : nan_value<Real>());
            }
        }
    }
}

// Gradient by the logits of the soft gates, whichever were given out: p_k (g_k - sum_j p_j g_j) / temperature. Frames without
// finite gates have none.
template <typename T>
KERNEL amortized_gate_backward(long long frames, const T* upstream, long long upstream_by_utterance,
                               long long upstream_by_frame, long long upstream_by_branch, const T* logits,
                               long long by_utterance, long long by_frame, long long by_branch, long long padded,
                               long long branches, const long long* lengths, double temperature, long long noise,
                               long long seed, T* gradient) {
    typedef Compute<T> Real;
    BLOCKS(block, (frames + FRAMES - 1) / FRAMES) {
        PARALLEL(i, smaller(FRAMES, frames - block * FRAMES)) {
            const long long frame = block * FRAMES + i, b = frame / padded, t = frame % padded;
            T* const out = gradient + frame * branches;
            const long long read = t < (lengths ? length_of(lengths, b, padded) : padded) ? branches : 0;
            const Gates<T> g(upstream, upstream_by_utterance, upstream_by_frame, upstream_by_branch, b);
            const Noisy<T> y{{logits, by_utterance, by_frame, by_branch, b}, (unsigned long long)seed, noise != 0, temperature, b, t};
            const Softmax<T> of(y, read);
            Real mean = 0;
            for (long long k = 0; of.live() && k < branches; ++k) mean += of.gate(y(k)) * g(t, k);
            for (long long k = 0; k < branches; ++k) {
                const Real slope = of.live() ? of.gate(y(k)) * (g(t, k) - mean) : Real(0);
                store(out + k, (Real)((double)slope / temperature));
            }
        }
    }
}

EXPORT_FLOATS(amortized_cost)
EXPORT_FLOATS(amortized_backlog)
EXPORT_FLOATS(amortized_gate)
EXPORT_FLOATS(amortized_gate_backward)
