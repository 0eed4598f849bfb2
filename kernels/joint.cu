// hidden(t, u) = dropout(activation(E_t + P_u)) for packed cells, and its gradient: one row of dHidden gives dE, summed over
// u, and dP, summed over t, each sum in a fixed order.
#include "processor.cuh"
#include "cells.cuh"
#include "philox.cuh"

enum ActivationName { TANH = 0, RELU, LEAKY_RELU, SIGMOID, GELU, GELU_TANH, SILU, IDENTITY };

// value(z), and slope(z, a) = d value / dz where a = value(z); those that can, tell the slope from a alone.
struct Tanh {
    template <typename R> static DEVICE R value(R z) { return hyperbolic_tangent(z); }
    template <typename R> static DEVICE R slope(R, R a) { return R(1) - a * a; }
};
struct Relu {
    template <typename R> static DEVICE R value(R z) { return z < R(0) ? R(0) : z; }  // a NaN stays one
    template <typename R> static DEVICE R slope(R, R a) { return a > R(0) ? R(1) : R(0); }
};
struct LeakyRelu {
    template <typename R> static DEVICE R value(R z) { return z < R(0) ? R(0.01) * z : z; }
    template <typename R> static DEVICE R slope(R, R a) { return a > R(0) ? R(1) : R(0.01); }
};
struct Sigmoid {
    template <typename R> static DEVICE R value(R z) { return R(1) / (R(1) + exponential(-z)); }
    template <typename R> static DEVICE R slope(R, R a) { return a * (R(1) - a); }
};
struct Gelu {
    template <typename R> static DEVICE R value(R z) { return z * (R(0.5) + R(0.5) * error_function(z * R(0.7071067811865476))); }
    template <typename R> static DEVICE R slope(R z, R) {
        return R(0.5) + R(0.5) * error_function(z * R(0.7071067811865476)) +
               z * R(0.3989422804014327) * exponential(R(-0.5) * z * z);
    }
};
struct GeluTanh {
    template <typename R> static DEVICE R inner(R z) { return R(0.7978845608028654) * (z + R(0.044715) * z * z * z); }
    template <typename R> static DEVICE R value(R z) { return R(0.5) * z * (R(1) + hyperbolic_tangent(inner(z))); }
    template <typename R> static DEVICE R slope(R z, R) {
        const R h = hyperbolic_tangent(inner(z));
        return R(0.5) * (R(1) + h) +
               R(0.5) * z * (R(1) - h * h) * R(0.7978845608028654) * (R(1) + R(3 * 0.044715) * z * z);
    }
};
struct Silu {
    template <typename R> static DEVICE R value(R z) { return z / (R(1) + exponential(-z)); }
    template <typename R> static DEVICE R slope(R z, R) {
        const R s = R(1) / (R(1) + exponential(-z));
        return s + z * s * (R(1) - s);
    }
};
struct Identity {
    template <typename R> static DEVICE R value(R z) { return z; }
    template <typename R> static DEVICE R slope(R, R) { return R(1); }
};

// The choice is the same for all threads and made once per row, outside the loop over features.
template <typename Work> DEVICE void with_activation(long long name, const Work& work) {
    switch (name) {
        case TANH: return work(Tanh());
        case RELU: return work(Relu());
        case LEAKY_RELU: return work(LeakyRelu());
        case SIGMOID: return work(Sigmoid());
        case GELU: return work(Gelu());
        case GELU_TANH: return work(GeluTanh());
        case SILU: return work(Silu());
        default: return work(Identity());
    }
}

// Dropout of the hidden features. The counter of its random bits is (h / 4, u, t, b): the same mask whatever the tiles, the
// groups and the processor, so that the second pass makes the first one's mask again.
template <typename Real> struct Dropout {
    unsigned long long seed;
    unsigned int threshold;  // dropped where the 32 random bits are below it; 0 is no dropout
    Real scale;

    DEVICE Dropout(long long of_seed, double probability)
        : seed((unsigned long long)of_seed), threshold((unsigned int)(probability * 4294967296.0)),
          scale((Real)(1.0 / (1.0 - probability))) {}

    DEVICE Real factor(long long b, long long t, long long u, long long h) const {
        const Philox drawn =
            philox(seed, (unsigned int)(h >> 2), (unsigned int)u, (unsigned int)t, (unsigned int)b);
        const unsigned int bits = drawn.word((int)(h & 3));
        return bits < threshold ? Real(0) : scale;
    }
};

// Hidden features of cells [begin, begin + n) of the list `cells` (of the group, where cells is null), one block per cell.
// Where `loss` is given, utterances whose loss is not finite get rows of zeros: their NaN must not meet the zeros of their
// gradient in the product that makes dW. Cells past the last label of a row are zeros too.
template <typename In, typename Hidden>
KERNEL joint_forward(long long n, long long begin, const long long* cells, const Utterance* utterances, long long count,
                     const Span* spans, const In* encoder, long long encoder_by_utterance, long long encoder_by_frame,
                     const In* predictor, long long predictor_by_utterance, long long predictor_by_label, long long features,
                     long long activation, double dropout, long long seed, const Compute<In>* loss, Hidden* hidden) {
    typedef Compute<In> Real;
    const Dropout<Real> drop(seed, dropout);
    BLOCKS(i, n) {
        const Cell at = locate(utterances, count, spans, cells ? cells[begin + i] : begin + i);
        const Utterance& of = utterances[at.utterance];
        Hidden* const out = hidden + i * features;
        if (at.label >= end_label(of, spans, at.frame) || (loss && !is_finite(loss[of.index]))) {
            PARALLEL(h, features) store(out + h, Real(0));
            continue;
        }
        const In* const e = encoder + of.encoder * encoder_by_utterance + at.frame * encoder_by_frame;
        const In* const p = predictor + of.index * predictor_by_utterance + at.label * predictor_by_label;
        with_activation(activation, [&](auto kind) {
            if (drop.threshold == 0) {
                SIMD
                PARALLEL(h, features) store(out + h, kind.value(Real(load(e + h)) + Real(load(p + h))));
            } else {
                SIMD
                PARALLEL(h, features)
                store(out + h, kind.value(Real(load(e + h)) + Real(load(p + h))) *
                                   drop.factor(of.index, at.frame, at.label, h));
            }
        });
    }
}

// The first item after i, or n, whose cell is not below `limit`; not above i where its own is not. Cells only grow.
DEVICE long long end_of_cells(const long long* cells, long long begin, long long i, long long n, long long limit) {
    const long long most = smaller(n, i + limit - (cells ? cells[begin + i] : begin + i));
    return cells ? first_not_below(cells + begin, i, most, limit) : most;
}

// Cells whose numbers are loaded before those of the first are needed, as many as registers hold. A block of one thread looks
// ahead by itself.
#if defined(HOST)
template <typename Real> static constexpr int CELLS_AT_ONCE = 1;
#else
template <typename Real> static constexpr int CELLS_AT_ONCE = 24 / (int)sizeof(Real);
#endif

// A feature of one cell: the gradient by it, itself, and the activation's argument.
template <typename Real> struct FeatureOf {
    Real gradient, value, argument;
    // The gradient by the argument, with what dropout made of the feature, `kept`, or without dropout.
    template <typename Kind> DEVICE Real back(Kind) const { return gradient * Kind::slope(argument, value); }
    template <typename Kind> DEVICE Real back(Kind, Real kept) const {
        return gradient * kept * Kind::slope(argument, Kind::value(argument));
    }
};

// dHidden of the tile [begin, begin + n), in place times the slope of the activation; and its sum over each frame's cells,
// added to dE, or where gradient_frames is 0 to an array of the group's rows. A cell has a block for every `width` of the features;
// it works only if the cell is its frame's first in the tile, and then goes down to the frame's end.
template <typename In, typename Hidden>
KERNEL joint_backward_encoder(long long n, long long begin, const long long* cells, const Utterance* utterances,
                              long long count, const Span* spans, const In* encoder, long long encoder_by_utterance,
                              long long encoder_by_frame, const In* predictor, long long predictor_by_utterance,
                              long long predictor_by_label, long long features, long long activation, double dropout,
                              long long seed, const Compute<In>* loss, const Hidden* hidden,
                              Compute<In>* hidden_gradient, Compute<In>* encoder_gradient, long long gradient_frames,
                              long long width) {
    typedef Compute<In> Real;
    constexpr int AT_ONCE = CELLS_AT_ONCE<Real>;
    const Dropout<Real> drop(seed, dropout);
    const long long slices = (features + width - 1) / width;
    BLOCKS(item, n * slices) {
        const long long i = item / slices, low = item % slices * width, high = smaller(low + width, features);
        const long long cell = cells ? cells[begin + i] : begin + i;
        const Cell at = locate(utterances, count, spans, cell);
        const Utterance& of = utterances[at.utterance];
        const long long row_begin = of.cells + at.frame * of.width, row_end = row_begin + of.width;
        if (i > 0 && (cells ? cells[begin + i - 1] : cell - 1) >= row_begin) continue;
        if (!is_finite(loss[of.index])) {  // its features may be NaN, and 0 * NaN is NaN
            const long long end = end_of_cells(cells, begin, i, n, row_end);
            for (long long j = i; j < end; ++j)
                PARALLEL(h, high - low) hidden_gradient[j * features + low + h] = Real(0);
            continue;
        }
        const long long start = first_label(of, spans, at.frame);
        const long long end = end_of_cells(cells, begin, i, n, row_begin + end_label(of, spans, at.frame) - start);
        const In* const e = encoder + of.encoder * encoder_by_utterance + at.frame * encoder_by_frame;
        const In* const p = predictor + of.index * predictor_by_utterance;
        const long long row = gradient_frames ? of.encoder * gradient_frames : of.rows;
        Real* const sum_out = encoder_gradient + (row + at.frame) * features;
        const auto label = [&](long long j) { return start + (cells ? cells[begin + j] : begin + j) - row_begin; };
        const auto feature = [&](long long j, Real e_h, const In* p_u, long long h) {
            return FeatureOf<Real>{hidden_gradient[j * features + h], Real(load(hidden + j * features + h)),
                                   e_h + Real(load(p_u + h))};
        };
        if constexpr (AT_ONCE == 1) {
            with_activation(activation, [&](auto kind) {
                for (long long h0 = low; h0 < high; h0 += COLUMNS) {
                    const int lanes = (int)smaller((long long)COLUMNS, high - h0);
                    Real sum[COLUMNS] = {};
                    for (long long j = i; j < end; ++j) {
                        const long long u = label(j);
                        const In* const p_u = p + u * predictor_by_label;
                        Real* const d = hidden_gradient + j * features + h0;
                        if (drop.threshold == 0) {
                            SIMD
                            for (int k = 0; k < lanes; ++k)
                                sum[k] += d[k] = feature(j, Real(load(e + h0 + k)), p_u, h0 + k).back(kind);
                        } else {
                            SIMD
                            for (int k = 0; k < lanes; ++k) {
                                const Real kept = drop.factor(of.index, at.frame, u, h0 + k);
                                sum[k] += d[k] = feature(j, Real(load(e + h0 + k)), p_u, h0 + k).back(kind, kept);
                            }
                        }
                    }
                    SIMD
                    for (int k = 0; k < lanes; ++k) sum_out[h0 + k] += sum[k];
                }
            });
        } else {
            PARALLEL(column, high - low) {
                const long long h = low + column;
                const Real e_h = Real(load(e + h));
                Real sum = 0;
                for (long long j0 = i; j0 < end; j0 += AT_ONCE) {
                    // The last cell stands in for those past it: a branch between loads would wait for the one before.
                    const auto cell_of = [&](int c) { return smaller(j0 + c, end - 1); };
                    FeatureOf<Real> loaded[AT_ONCE];
                    Real kept[AT_ONCE] = {};
                    UNROLLED
                    for (int c = 0; c < AT_ONCE; ++c)
                        loaded[c] = feature(cell_of(c), e_h, p + label(cell_of(c)) * predictor_by_label, h);
                    if (drop.threshold != 0) {
                        UNROLLED
                        for (int c = 0; c < AT_ONCE; ++c) kept[c] = drop.factor(of.index, at.frame, label(cell_of(c)), h);
                    }
                    with_activation(activation, [&](auto kind) {
                        UNROLLED
                        for (int c = 0; c < AT_ONCE; ++c) {
                            if (j0 + c >= end) continue;
                            const Real value = drop.threshold == 0 ? loaded[c].back(kind) : loaded[c].back(kind, kept[c]);
                            sum += hidden_gradient[(j0 + c) * features + h] = value;
                        }
                    });
                }
                sum_out[h] += sum;
            }
        }
    }
}

// Adds gradients of the group's rows to dE where utterances share their encoder: in their order, as `order` lists them by encoder.
// One block per utterance and frame, of which those of an encoder's first utterance work.
template <typename Real>
KERNEL joint_backward_shared(long long count, long long most_frames, const Utterance* utterances, const long long* order,
                             long long features, const Real* rows, Real* encoder_gradient, long long gradient_frames) {
    BLOCKS(item, count * most_frames) {
        const long long i = item / most_frames, t = item % most_frames;
        const Utterance& of = utterances[order[i]];
        if (t >= of.frames || (i > 0 && utterances[order[i - 1]].encoder == of.encoder)) continue;
        Real* const out = encoder_gradient + (of.encoder * gradient_frames + t) * features;
        for (long long j = i; j < count && utterances[order[j]].encoder == of.encoder; ++j) {
            const Real* const from = rows + (utterances[order[j]].rows + t) * features;
            SIMD
            PARALLEL(h, features) out[h] += from[h];
        }
    }
}

// The sum of the tile's dHidden (already times the slope) over the frames of each label, added to dP: one block per
// utterance and label. Utterance `carried` is summed into `carry` (labels, features) instead, for whoever adds it later.
template <typename Real>
KERNEL joint_backward_predictor(long long columns, long long n, long long begin, const long long* cells,
                                const long long* positions, const Utterance* utterances, long long count, const Span* spans,
                                long long features, const Real* hidden_gradient, Real* predictor_gradient,
                                long long gradient_labels, long long carried, Real* carry) {
    BLOCKS(item, count * columns) {
        const Utterance& of = utterances[item / columns];
        const long long u = item % columns;
        const long long low = cells ? cells[begin] : begin, high = cells ? cells[begin + n - 1] : begin + n - 1;
        if (u > of.labels || high < of.cells || low >= of.cells + of.frames * of.width) continue;
        const long long from = low > of.cells ? (low - of.cells) / of.width : 0;
        const long long to = smaller((high - of.cells) / of.width, of.frames - 1);
        Real* const out = (item / columns == carried ? carry : predictor_gradient + of.index * gradient_labels * features) +
                          u * features;
        for (long long h0 = (long long)threadIdx.x * COLUMNS; h0 < features; h0 += (long long)blockDim.x * COLUMNS) {
            const int lanes = (int)smaller((long long)COLUMNS, features - h0);
            Real sum[COLUMNS] = {};
            for (long long t = from; t <= to; ++t) {
                if (!in_row(of, spans, t, u)) continue;
                const long long cell = cell_at(of, spans, t, u);
                if (cell < low || cell > high || (positions && positions[cell + 1] == positions[cell])) continue;
                const Real* const d = hidden_gradient + ((positions ? positions[cell] : cell) - begin) * features + h0;
                SIMD
                for (int k = 0; k < lanes; ++k) sum[k] += d[k];
            }
            SIMD
            for (int k = 0; k < lanes; ++k) out[h0 + k] += sum[k];
        }
    }
}

EXPORT(joint_forward, float16, float16)
EXPORT(joint_forward, float16, float32)
EXPORT(joint_forward, bfloat16, bfloat16)
EXPORT(joint_forward, bfloat16, float32)
EXPORT(joint_forward, float32, float32)
EXPORT(joint_forward, float64, float64)
EXPORT(joint_backward_encoder, float16, float16)
EXPORT(joint_backward_encoder, float16, float32)
EXPORT(joint_backward_encoder, bfloat16, bfloat16)
EXPORT(joint_backward_encoder, bfloat16, float32)
EXPORT(joint_backward_encoder, float32, float32)
EXPORT(joint_backward_encoder, float64, float64)
EXPORT(joint_backward_shared, float32)
EXPORT(joint_backward_shared, float64)
EXPORT(joint_backward_predictor, float32)
EXPORT(joint_backward_predictor, float64)
