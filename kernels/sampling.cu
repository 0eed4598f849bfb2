// Which classes a sampled softmax looks at (arXiv 2203.16868): the blank, the labels at hand, and negatives drawn by
// systematic sampling without replacement.
//
// A proposal is an integer weight w[v] of every class. Of those that are not kept anyway, n are drawn, v with probability
//
//   pi[v] = min(1, n w[v] / sum w)     over the classes whose pi is not 1, which are taken for certain: water-filling
//
// by walking over the classes in a random order, with r = a random integer in [0, sum w): r += n w[v]; where r reaches sum w,
// v is picked and r falls by sum w. That happens n times, never twice for a class, and for v with probability pi[v] exactly.
//
// All of it is made of integers, whose sums are the same in any order and on every processor; so are the picks.
#include "processor.cuh"
#include "cells.cuh"
#include "philox.cuh"

// Sums of weights from which negatives are drawn lie below 2^39, so that 64 random bits make an even offset, and 2^22 times
// as much fits a long long: so many classes there may be.
static constexpr unsigned long long DRAWN_FROM = 1ull << 39;

// 2^31 exp(-distance), by one rounded product and integers after it: no processor contracts or approximates them its own way.
DEVICE unsigned int fixed_exponential(float distance) {
    const float binary = distance * 12102203.0f;  // log2(e) 2^23
    const bool far = !(binary < 260046848.0f);    // 31 2^23; NaN is far, too
    const unsigned int fixed = far ? 0u : (unsigned int)(int)binary;
    const unsigned long long g = fixed << 9;  // the fraction in units of 2^-32; 2^-g = 1 - g (c0 - g (c1 - ...))
    unsigned long long p = 4316630u;
    p = 40176172u - (g * p >> 32);
    p = 238031838u - (g * p >> 32);
    p = 1031733117u - (g * p >> 32);
    p = 2977044471u - (g * p >> 32);
    const unsigned int power = 0x80000000u - (unsigned int)(g * p >> 33);
    return far ? 0u : power >> (fixed >> 23);
}

// Logits of a frame, whose classes may lie apart. float64 is rounded to float32: a proposal needs no more.
template <bool dense, typename T> struct Frame {
    const T* start;
    long long stride;
    DEVICE float operator()(long long v) const { return (float)load(start + (dense ? v : v * stride)); }
};

template <typename T, typename Work> DEVICE void with_frame(const T* start, long long stride, const Work& work) {
    if (stride == 1) work(Frame<true, T>{start, 1});
    else work(Frame<false, T>{start, stride});
}

// Of every frame of the auxiliary CTC logits, one block each: the largest logit, and share = 2^63 / sum_v exp(x[v] - largest),
// so that share times an exponential is a probability. A NaN or -inf is a probability of 0; a frame with +inf, or of nothing
// else, has share 0 and is left out.
template <typename T>
KERNEL sampling_frames(long long rows, const Utterance* utterances, long long count, const T* logits, long long by_utterance,
                       long long by_frame, long long by_class, long long classes, float* highest, unsigned long long* share) {
    BLOCKS(row, rows) {
        const Utterance& of = utterances[owner(utterances, count, &Utterance::rows, row)];
        with_frame(logits + of.index * by_utterance + (row - of.rows) * by_frame, by_class, [&](auto frame) {
            float top = -infinity<float>();
            SIMD_MAX(top)
            PARALLEL(v, classes) {
                const float x = frame(v);
                top = x > top ? x : top;
            }
            top = block_max(top);
            unsigned long long sum = 0;
            SIMD_SUM(sum)
            PARALLEL(v, classes) sum += fixed_exponential(top - frame(v));
            sum = block_sum(sum);
            if (threadIdx.x == 0) {
                highest[row] = top;
                share[row] = sum == 0 ? 0 : smaller((1ull << 63) / sum, 0xffffffffull);
            }
        });
    }
}

// Adds to weights[v] the probabilities of class v in an utterance's frames, in units of 2^-36: one block for every `part`
// classes of an utterance. weights_by_utterance is 0 where all have one row together.
template <typename T>
KERNEL sampling_posteriors(long long part, const Utterance* utterances, long long count, const T* logits,
                           long long by_utterance, long long by_frame, long long by_class, long long classes,
                           const float* highest, const unsigned long long* share, unsigned long long* weights,
                           long long weights_by_utterance) {
    const long long parts = (classes + part - 1) / part;
    BLOCKS(item, count * parts) {
        const Utterance& of = utterances[item / parts];
        const long long begin = item % parts * part, end = smaller(begin + part, classes);
        unsigned long long* const out = weights + item / parts * weights_by_utterance;
        for (long long v0 = begin + threadIdx.x * COLUMNS; v0 < end; v0 += blockDim.x * COLUMNS) {
            const int lanes = (int)smaller((long long)COLUMNS, end - v0);
            unsigned long long sum[COLUMNS] = {};
            for (long long t = 0; t < of.frames; ++t) {
                const unsigned long long of_frame = share[of.rows + t];
                if (of_frame == 0) continue;
                const float top = highest[of.rows + t];
                with_frame(logits + of.index * by_utterance + t * by_frame + v0 * by_class, by_class, [&](auto frame) {
                    SIMD
                    for (int k = 0; k < lanes; ++k) sum[k] += fixed_exponential(top - frame(k)) * of_frame >> 27;
                });
            }
            for (int k = 0; k < lanes; ++k)
                if (sum[k] > 0) add_atomically(out + v0 + k, sum[k]);
        }
    }
}

// Class counts -> weights, the largest of them between 2^39 and 2^40. What is no count (negative, NaN, infinite) is 0. One block.
KERNEL sampling_counts(long long classes, const double* counts, unsigned long long* weights) {
    BLOCKS(block, 1) {
        const auto valid = [&](long long v) { return is_finite(counts[v]) && counts[v] > 0.0 ? counts[v] : 0.0; };
        double top = 0.0;
        PARALLEL(v, classes) top = larger(top, valid(v));
        top = block_max(top);
        // By a power of two, so that nothing but the last bits of small counts is lost; no count becomes none.
        const int exponent = (int)(bits_of(top) >> 52) - 1023;
        const double scale = float_of((unsigned long long)(1023 + smaller(39 - exponent, 1023)) << 52);
        PARALLEL(v, classes) weights[v] = valid(v) > 0.0 ? larger((unsigned long long)(valid(v) * scale), 1ull) : 0;
    }
}

// What becomes of a class: KEPT are the blank and labels, CERTAIN those of probability 1.
enum Mark : unsigned char { LEFT_OUT = 0, KEPT, CERTAIN, PICKED };

struct Weights {
    const unsigned long long* given;
    unsigned long long mixed;  // added to each, so that no class has probability 0
    int shift;                 // off go the last bits that the sum has no room for
    bool uniform;
    DEVICE unsigned long long operator()(long long v) const {
        if (uniform) return 1;
        const unsigned long long whole = given[v] + mixed, shifted = whole >> shift;
        return shifted > 0 ? shifted : whole > 0 ? 1 : 0;
    }
};

// A random order of the numbers below n: a bijection of those below a power of two, walked until it leads below n. Two rounds,
// or rounds that leave 0 where it is, would keep some classes from ever being drawn together.
struct Order {
    Philox keys;
    unsigned int n, mask;
    int half;

    DEVICE Order(unsigned int number, const Philox& words) : keys(words), n(number), mask(1), half(1) {
        int bits = 1;
        while (mask < n - 1) mask = 2 * mask + 1, ++bits;
        half = (bits + 1) / 2;
    }

    DEVICE long long operator()(long long position) const {
        unsigned int x = (unsigned int)position;
        do {
            x = (x + keys.words[0]) & mask;
            x ^= x >> half;
            for (int round = 1; round < 4; ++round) {
                x = (x * (keys.words[round] | 1u) + (keys.words[round] >> 16)) & mask;
                x ^= x >> half;
            }
        } while (x >= n);
        return x;
    }
};

// Marks what is taken for certain and returns how many are left to pick; `weights` and the `sum` of those left are then such
// that none of them has a probability of 1 or more.
DEVICE long long fill_certain(unsigned char* marks, long long classes, long long wanted, Weights& weights,
                              unsigned long long& sum) {
    unsigned long long threshold = 0;  // weights from there on are certain
    while (wanted > 0) {
        unsigned long long left = 0, top = 0;
        long long certain = 0, positive = 0;
        PARALLEL(v, classes) {
            if (marks[v] != LEFT_OUT) continue;
            const unsigned long long weight = weights(v);
            if (threshold > 0 && weight >= threshold) {
                marks[v] = CERTAIN;
                ++certain;
            } else {
                left += weight;
                positive += weight > 0;
                top = larger(top, weight);
            }
        }
        sum = block_sum(left);
        top = block_max(top);
        positive = block_sum(positive);
        wanted -= block_sum(certain);
        threshold = 0;
        if (wanted == 0) break;
        if (positive == 0) {
            weights.uniform = true;  // nothing is left that the proposal knows of
        } else if (positive <= wanted) {
            threshold = 1;
        } else {
            const unsigned long long least = (sum + (unsigned long long)wanted - 1) / (unsigned long long)wanted;
            if (top >= least) {
                threshold = least;
            } else if (sum >= DRAWN_FROM) {
                for (unsigned long long rest = sum; rest >= DRAWN_FROM; rest >>= 1) ++weights.shift;
            } else {
                break;
            }
        }
    }
    return wanted;
}

// Draws rows [begin, begin + n) of classes, one block each: of the whole batch, or with `each` of one utterance. ids: the blank,
// then the others in rising order, `slots` in all; probability: pi of each, 1 for those kept. weights (classes,) or (n, classes),
// or null for uniform ones; `mixed` adds 1 % uniform. marks: (n, classes) scratch.
KERNEL sampling_draw(long long n, long long begin, const Utterance* utterances, long long count, long long each,
                     const void* targets, long long wide_targets, long long targets_by_utterance, long long targets_by_label,
                     long long blank, long long classes, const unsigned long long* weights, long long weights_by_row,
                     long long mixed, long long slots, long long seed, long long step, unsigned char* marks_of_rows, int* ids,
                     float* probability) {
    BLOCKS(i, n) {
        const long long row = begin + i;
        unsigned char* const marks = marks_of_rows + i * classes;
        Weights weight{weights ? weights + i * weights_by_row : nullptr, 0, 0, weights == nullptr};
        PARALLEL(v, classes) marks[v] = LEFT_OUT;
        __syncthreads();
        if (threadIdx.x == 0) store_atomically(marks + blank, KEPT);
        for (long long b = each ? row : 0; b < (each ? row + 1 : count); ++b) {
            const Utterance& of = utterances[b];
            PARALLEL(u, of.labels) {
                const long long target = target_of(of, targets, wide_targets, targets_by_utterance, targets_by_label, u);
                if (target >= 0 && target < classes) store_atomically(marks + target, KEPT);
            }
        }
        __syncthreads();
        unsigned long long all = 0;
        long long kept = 0;
        PARALLEL(v, classes) {
            kept += marks[v] == KEPT;
            if (mixed && !weight.uniform) all += weight(v);
        }
        all = block_sum(all);
        kept = block_sum(kept);
        if (mixed) weight.mixed = larger(all / (99ull * (unsigned long long)classes), 1ull);

        unsigned long long sum = 0;
        const long long wanted = fill_certain(marks, classes, slots - kept, weight, sum);
        // Every thread has consecutive places in the order, and later consecutive classes.
        const long long part = (classes + blockDim.x - 1) / blockDim.x;
        const long long low = smaller(threadIdx.x * part, classes), high = smaller(low + part, classes);
        if (wanted > 0) {
            const unsigned int of_row = (unsigned int)row, low_step = (unsigned int)step, high_step = (unsigned int)(step >> 32);
            const Philox offset = philox((unsigned long long)seed, 0, of_row, low_step, high_step);
            const Order order((unsigned int)classes, philox((unsigned long long)seed, 1, of_row, low_step, high_step));
            unsigned long long before = 0;
            if (blockDim.x > 1) {
                for (long long place = low; place < high; ++place) {
                    const long long v = order(place);
                    if (marks[v] == LEFT_OUT) before += weight(v);
                }
                const unsigned long long mine = before;
                before = block_scan<Sum>(mine) - mine;
            }
            const unsigned long long random = (unsigned long long)offset.words[0] << 32 | offset.words[1];
            unsigned long long r = ((unsigned long long)wanted * before + random % sum) % sum;
            for (long long place = low; place < high; ++place) {
                const long long v = order(place);
                if (marks[v] != LEFT_OUT) continue;
                r += (unsigned long long)wanted * weight(v);
                if (r >= sum) {
                    r -= sum;
                    marks[v] = PICKED;
                }
            }
        }
        __syncthreads();
        long long mine = 0;
        for (long long v = low; v < high; ++v) mine += v != blank && marks[v] != LEFT_OUT;
        long long slot = row * slots + 1 + block_scan<Sum>(mine) - mine;
        for (long long v = low; v < high; ++v) {
            if (v == blank || marks[v] == LEFT_OUT) continue;
            ids[slot] = (int)v;
            probability[slot++] =
                marks[v] == PICKED ? (float)((double)((unsigned long long)wanted * weight(v)) / (double)sum) : 1.0f;
        }
        if (threadIdx.x == 0) {
            ids[row * slots] = (int)blank;
            probability[row * slots] = 1.0f;
        }
    }
}

EXPORT(sampling_frames, float16)
EXPORT(sampling_frames, bfloat16)
EXPORT(sampling_frames, float32)
EXPORT(sampling_frames, float64)
EXPORT(sampling_posteriors, float16)
EXPORT(sampling_posteriors, bfloat16)
EXPORT(sampling_posteriors, float32)
EXPORT(sampling_posteriors, float64)
EXPORT(sampling_counts)
EXPORT(sampling_draw)
