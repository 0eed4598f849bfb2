// The simple joiner logits(t, u, v) = am(t, v) + lm(u, v) of pruned RNN-T (arXiv 2206.13236, section 3.1) without its logits:
//
//   log P(v | t, u) = c (am + lm - Z(t, u)) + l (lm - Zl(u)) + a (am + log m(v) - Za(t)),      c = 1 - l - a
//   Z = log sum_v exp(am + lm),  Zl = log sum_v exp(lm),  m = mean_u exp(lm - Zl),  Za = log sum_v exp(am) m
//
// exp Z(t, u) is a matrix product of exponentials, each row's shifted by its largest. Where the modes of the two rows lie so
// far apart that this product is below SMALLEST, its terms have underflowed: such a cell is summed directly, and takes part in
// the gradient directly. Terms whose scale is 0 are left out, as 0 times -inf is NaN.
//
// Cells lie in padded (B, T, columns) arrays, columns = U + 1. Gradients replace the exponentials, in place.
#include "processor.cuh"
#include "cells.cuh"

// Of a product of two exponentials, so that the terms that matter are normal numbers.
DEVICE float smallest(float) { return 1e-26f; }
DEVICE double smallest(double) { return 1e-290; }

template <typename Real> DEVICE Real combined_scale(double lm_only, double am_only) { return (Real)(1.0 - (lm_only + am_only)); }

// Rows [begin, begin + n) of am (of_labels 0) or lm (1), one block each: exp(x - largest), zeros in padding; the largest; and
// the log of the sum. With `all`, padding is like the rest.
template <typename T>
KERNEL simple_joint_exponentials(long long n, long long begin, const Utterance* utterances, long long of_labels,
                                 long long all, const T* rows, long long padded, long long by_utterance, long long by_row,
                                 long long classes, Compute<T>* exponentials, Compute<T>* highest, Compute<T>* log_sum) {
    typedef Compute<T> Real;
    BLOCKS(i, n) {
        const long long b = (begin + i) / padded, r = (begin + i) % padded;
        const Utterance& of = utterances[b];
        Real* const out = exponentials + i * classes;
        if (!all && r >= (of_labels ? of.labels + 1 : of.frames)) {
            PARALLEL(v, classes) out[v] = Real(0);
            continue;
        }
        const T* const in = rows + b * by_utterance + r * by_row;
        Real top = -infinity<Real>();
        SIMD_MAX(top)
        PARALLEL(v, classes) {
            const Real x = load(in + v);
            top = x > top ? x : top;
        }
        top = block_max(top);
        // A row of nothing but -inf has exponentials of 0, and NaN only where it has a share.
        const Real shift = top > -infinity<Real>() ? top : Real(0);
        Real sum = 0;
        SIMD_SUM(sum)
        PARALLEL(v, classes) {
            const Real e = exponential(Real(load(in + v)) - shift);
            sum += e;
            out[v] = e;
        }
        sum = block_sum(sum);
        if (threadIdx.x == 0) {
            highest[begin + i] = top;
            log_sum[begin + i] = top + logarithm(sum);
        }
    }
}

// log m(v) of one utterance per block; with `all` of all rows of the batch, padding included, by one block.
template <typename T>
KERNEL simple_joint_unigram(long long n, const Utterance* utterances, long long count, long long all, const T* lm,
                            long long padded, long long by_utterance, long long by_row, long long classes,
                            const Compute<T>* log_sum, Compute<T>* unigram) {
    typedef Compute<T> Real;
    BLOCKS(b, n) {
        const long long rows = all ? count * padded : utterances[b].labels + 1;
        for (long long v0 = (long long)threadIdx.x * COLUMNS; v0 < classes; v0 += (long long)blockDim.x * COLUMNS) {
            const int lanes = (int)smaller((long long)COLUMNS, classes - v0);
            Real top[COLUMNS], sum[COLUMNS] = {};
            for (int k = 0; k < lanes; ++k) top[k] = -infinity<Real>();
            for (int pass = 0; pass < 2; ++pass)
                for (long long i = 0; i < rows; ++i) {
                    const long long row = b * padded + i;
                    const T* const in = lm + row / padded * by_utterance + row % padded * by_row + v0;
                    const Real z = log_sum[row];
                    if (pass == 0) {
                        SIMD
                        for (int k = 0; k < lanes; ++k) {
                            const Real x = Real(load(in + k)) - z;
                            top[k] = x > top[k] ? x : top[k];
                        }
                    } else {
                        SIMD
                        for (int k = 0; k < lanes; ++k) sum[k] += exponential(Real(load(in + k)) - z - top[k]);
                    }
                }
            for (int k = 0; k < lanes; ++k)
                unigram[b * classes + v0 + k] = top[k] > -infinity<Real>() ? top[k] + logarithm(sum[k] / Real(rows)) : top[k];
        }
    }
}

// Za(t), one block per lattice row. unigram_by_utterance is 0 where all share one.
template <typename T>
KERNEL simple_joint_unigram_sums(long long rows, const Utterance* utterances, long long count, const T* am,
                                 long long by_utterance, long long by_frame, long long classes, const Compute<T>* unigram,
                                 long long unigram_by_utterance, long long padded_frames, Compute<T>* am_sums) {
    typedef Compute<T> Real;
    BLOCKS(row, rows) {
        const Utterance& of = utterances[owner(utterances, count, &Utterance::rows, row)];
        const long long t = row - of.rows;
        const T* const in = am + of.index * by_utterance + t * by_frame;
        const Real* const m = unigram + of.index * unigram_by_utterance;
        Real top = -infinity<Real>();
        SIMD_MAX(top)
        PARALLEL(v, classes) {
            const Real x = Real(load(in + v)) + m[v];
            top = x > top ? x : top;
        }
        top = block_max(top);
        Real sum = 0;
        SIMD_SUM(sum)
        PARALLEL(v, classes) sum += exponential(Real(load(in + v)) + m[v] - top);
        sum = block_sum(sum);
        if (threadIdx.x == 0) am_sums[of.index * padded_frames + t] = top + logarithm(sum);
    }
}

// Arcs of one lattice row per block. products: sum_v of the exponentials' products. direct: Z of the cells that are summed
// directly, +inf for the others.
template <typename T>
KERNEL simple_joint_arcs(long long rows, const Utterance* utterances, long long count, const T* am, long long am_by_utterance,
                         long long am_by_frame, const T* lm, long long lm_by_utterance, long long lm_by_label,
                         long long classes, const void* targets, long long wide_targets, long long targets_by_utterance,
                         long long targets_by_label, long long blank, double lm_only, double am_only,
                         const Compute<T>* products, const Compute<T>* am_highest, const Compute<T>* lm_highest,
                         const Compute<T>* lm_sums, const Compute<T>* unigram, long long unigram_by_utterance,
                         const Compute<T>* am_sums, long long padded_frames, Compute<T>* direct, Compute<T>* log_blank,
                         Compute<T>* log_label) {
    typedef Compute<T> Real;
    const Real combined = combined_scale<Real>(lm_only, am_only), l = (Real)lm_only, a = (Real)am_only;
    BLOCKS(row, rows) {
        const Utterance& of = utterances[owner(utterances, count, &Utterance::rows, row)];
        const long long t = row - of.rows, start = of.cells + t * of.width, labels = of.index * of.width;
        const T* const am_t = am + of.index * am_by_utterance + t * am_by_frame;
        const T* const lm_b = lm + of.index * lm_by_utterance;
        const Real* const m = unigram + of.index * unigram_by_utterance;
        for (long long u = 0; u <= of.labels; ++u) {
            const bool underflowed = combined != Real(0) && products[start + u] < smallest(Real(0));
            if (threadIdx.x == 0) direct[start + u] = infinity<Real>();
            if (!underflowed) continue;
            const T* const lm_u = lm_b + u * lm_by_label;
            Real top = -infinity<Real>();
            SIMD_MAX(top)
            PARALLEL(v, classes) {
                const Real x = Real(load(am_t + v)) + Real(load(lm_u + v));
                top = x > top ? x : top;
            }
            top = block_max(top);
            Real sum = 0;
            SIMD_SUM(sum)
            PARALLEL(v, classes) sum += exponential(Real(load(am_t + v)) + Real(load(lm_u + v)) - top);
            sum = block_sum(sum);
            if (threadIdx.x == 0) direct[start + u] = top + logarithm(sum);
        }
        __syncthreads();
        PARALLEL(u, of.labels + 1) {
            const T* const lm_u = lm_b + u * lm_by_label;
            const long long target = target_of(of, targets, wide_targets, targets_by_utterance, targets_by_label, u);
            const bool outside = u < of.labels && (target < 0 || target >= classes);
            const Real own = direct[start + u];
            const Real z = own < infinity<Real>() || is_nan(own) ? own
                           : logarithm(products[start + u]) + am_highest[of.index * padded_frames + t] + lm_highest[labels + u];
            const auto log_probability = [&](long long v) {
                const Real of_am = load(am_t + v), of_lm = load(lm_u + v);
                // Without a share in the sum, a NaN among the logits is still one.
                Real sum = combined == Real(0) ? (is_nan(z) ? z : Real(0)) : combined * (of_am + of_lm - z);
                if (l != Real(0)) sum += l * (of_lm - lm_sums[labels + u]);
                if (a != Real(0)) sum += a * (of_am + m[v] - am_sums[of.index * padded_frames + t]);
                return sum;
            };
            log_blank[start + u] = outside ? nan_value<Real>() : log_probability(blank);
            log_label[start + u] = outside ? nan_value<Real>() : u < of.labels ? log_probability(target) : -infinity<Real>();
        }
    }
}

// Which labels of an utterance are the same, one block each: chain(u) = 2 (next u of the same label + 1) + (no earlier one),
// so that each label's sum over its places is one thread's.
KERNEL simple_joint_chains(long long count, const Utterance* utterances, const void* targets, long long wide_targets,
                           long long targets_by_utterance, long long targets_by_label, long long columns, int* chains) {
    BLOCKS(b, count) {
        const Utterance& of = utterances[b];
        PARALLEL(u, of.labels) {
            const auto label = [&](long long at) {
                return target_of(of, targets, wide_targets, targets_by_utterance, targets_by_label, at);
            };
            long long before = u - 1, next = u + 1;
            while (before >= 0 && label(before) != label(u)) --before;
            while (next < of.labels && label(next) != label(u)) ++next;
            chains[of.index * columns + u] = (int)(2 * (next < of.labels ? next + 1 : 0) + (before < 0 ? 1 : 0));
        }
    }
}

// Subtracts from the gradient of every class the occupancy of the label arcs that emit it.
template <typename Real, typename Occupancy>
DEVICE void subtract_labels(const Utterance& of, const int* chains, const void* targets, long long wide_targets,
                            long long targets_by_utterance, long long targets_by_label, const Occupancy& occupancy,
                            Real* gradient) {
    PARALLEL(u, of.labels) {
        if (!(chains[u] & 1)) continue;
        Real sum = 0;
        for (long long at = u; at >= 0; at = (chains[at] >> 1) - 1) sum += occupancy(at);
        gradient[target_of(of, targets, wide_targets, targets_by_utterance, targets_by_label, u)] -= sum;
    }
}

// Of one lattice row per block, in place of the products: (occupancy of both arcs) / product, 0 for the cells that are summed
// directly; and the row's sums of occupancies.
template <typename Real>
KERNEL simple_joint_ratios(long long rows, const Utterance* utterances, long long count, const Real* blank_occupancy,
                           const Real* label_occupancy, const Real* loss, long long padded_frames, Real* products,
                           Real* row_sums) {
    BLOCKS(row, rows) {
        const Utterance& of = utterances[owner(utterances, count, &Utterance::rows, row)];
        const long long t = row - of.rows, start = of.cells + t * of.width;
        const bool live = is_finite(loss[of.index]);
        Real sum = 0;
        PARALLEL(u, of.labels + 1) {
            const Real both = blank_occupancy[start + u] + label_occupancy[start + u];
            const Real product = products[start + u];
            products[start + u] =
                live && both >= Real(NEGLIGIBLE) && product >= smallest(Real(0)) ? both / product : Real(0);
            sum += both;
        }
        sum = block_sum(sum);
        if (threadIdx.x == 0) row_sums[of.index * padded_frames + t] = sum;
    }
}

// Sums over the frames of each label's occupancies, one block per utterance and label.
template <typename Real>
KERNEL simple_joint_column_sums(long long n, const Utterance* utterances, const Real* blank_occupancy,
                                const Real* label_occupancy, Real* blank_sums, Real* label_sums) {
    BLOCKS(i, n) {
        const Utterance& of = utterances[i / utterances[0].width];
        const long long u = i % of.width;
        Real blank = 0, label = 0;
        if (u <= of.labels)
            PARALLEL(t, of.frames) {
                blank += blank_occupancy[of.cells + t * of.width + u];
                label += label_occupancy[of.cells + t * of.width + u];
            }
        blank = block_sum(blank);
        label = block_sum(label);
        if (threadIdx.x == 0) {
            blank_sums[i] = blank;
            label_sums[i] = label;
        }
    }
}

// w m(v) d loss / d m(v) / a of one utterance per block: how much more often the unigram is asked for v than v occurs.
template <typename T>
KERNEL simple_joint_backward_unigram(long long count, const Utterance* utterances, const T* am, long long by_utterance,
                                     long long by_frame, long long classes, const void* targets, long long wide_targets,
                                     long long targets_by_utterance, long long targets_by_label, long long blank,
                                     const int* chains, const Compute<T>* unigram, long long unigram_by_utterance,
                                     const Compute<T>* am_sums, const Compute<T>* row_sums, const Compute<T>* blank_sums,
                                     const Compute<T>* label_sums, long long padded_frames, const Compute<T>* loss,
                                     const Compute<T>* weights, Compute<T>* excess) {
    typedef Compute<T> Real;
    BLOCKS(b, count) {
        const Utterance& of = utterances[b];
        const Real weight = weights ? weights[of.index] : Real(1);
        const bool none = weight == Real(0) || !is_finite(loss[of.index]);
        Real* const out = excess + of.index * classes;
        const Real* const m = unigram + of.index * unigram_by_utterance;
        for (long long v0 = (long long)threadIdx.x * COLUMNS; v0 < classes; v0 += (long long)blockDim.x * COLUMNS) {
            const int lanes = (int)smaller((long long)COLUMNS, classes - v0);
            Real sum[COLUMNS] = {};
            for (long long t = 0; t < of.frames && !none; ++t) {
                const T* const in = am + of.index * by_utterance + t * by_frame + v0;
                const Real share = row_sums[of.index * padded_frames + t], z = am_sums[of.index * padded_frames + t];
                SIMD
                for (int k = 0; k < lanes; ++k) sum[k] += share * exponential(Real(load(in + k)) + m[v0 + k] - z);
            }
            for (int k = 0; k < lanes; ++k) out[v0 + k] = weight * sum[k];
        }
        __syncthreads();
        if (none) continue;
        const long long labels = of.index * of.width;
        subtract_labels(of, chains + labels, targets, wide_targets, targets_by_utterance, targets_by_label,
                        [&](long long u) { return weight * label_sums[labels + u]; }, out);
        __syncthreads();
        Real blanks = 0;
        PARALLEL(u, of.labels + 1) blanks += blank_sums[labels + u];
        blanks = block_sum(blanks);
        if (threadIdx.x == 0) out[blank] -= weight * blanks;
    }
}

// Gradient of rows [begin, begin + n) of am, in place of their exponentials, one block each. spread: ratios times lm's
// exponentials, a row for each.
template <typename T>
KERNEL simple_joint_backward_am(long long n, long long begin, const Utterance* utterances, const T* am,
                                long long am_by_utterance, long long am_by_frame, const T* lm, long long lm_by_utterance,
                                long long lm_by_label, long long classes, const void* targets, long long wide_targets,
                                long long targets_by_utterance, long long targets_by_label, long long blank, double lm_only,
                                double am_only, const int* chains, const Compute<T>* unigram,
                                long long unigram_by_utterance, const Compute<T>* am_sums, const Compute<T>* row_sums,
                                const Compute<T>* direct, const Compute<T>* blank_occupancy,
                                const Compute<T>* label_occupancy, long long padded_frames, const Compute<T>* loss,
                                const Compute<T>* weights, const Compute<T>* spread, Compute<T>* gradient) {
    typedef Compute<T> Real;
    BLOCKS(i, n) {
        const long long b = (begin + i) / padded_frames, t = (begin + i) % padded_frames;
        const Utterance& of = utterances[b];
        const Real weight = weights ? weights[b] : Real(1);
        Real* const out = gradient + i * classes;
        if (t >= of.frames || weight == Real(0) || !is_finite(loss[b])) {
            PARALLEL(v, classes) out[v] = Real(0);
            continue;
        }
        const long long start = of.cells + t * of.width;
        const Real combined = weight * combined_scale<Real>(lm_only, am_only), a = weight * (Real)am_only;
        const T* const am_t = am + b * am_by_utterance + t * am_by_frame;
        const Real* const in = spread + i * classes;
        SIMD
        PARALLEL(v, classes) out[v] = combined * out[v] * in[v];
        for (long long u = 0; u <= of.labels; ++u) {
            const Real z = direct[start + u];
            if (!(z < infinity<Real>())) continue;
            const Real share = combined * (blank_occupancy[start + u] + label_occupancy[start + u]);
            const T* const lm_u = lm + b * lm_by_utterance + u * lm_by_label;
            SIMD
            PARALLEL(v, classes) out[v] += share * exponential(Real(load(am_t + v)) + Real(load(lm_u + v)) - z);
        }
        if (a != Real(0)) {
            const Real share = a * row_sums[b * padded_frames + t], z = am_sums[b * padded_frames + t];
            const Real* const m = unigram + b * unigram_by_utterance;
            SIMD
            PARALLEL(v, classes) out[v] += share * exponential(Real(load(am_t + v)) + m[v] - z);
        }
        __syncthreads();
        subtract_labels(of, chains + b * of.width, targets, wide_targets, targets_by_utterance, targets_by_label,
                        [&](long long u) { return (combined + a) * label_occupancy[start + u]; }, out);
        __syncthreads();
        Real blanks = 0;
        PARALLEL(u, of.labels + 1) blanks += blank_occupancy[start + u];
        blanks = block_sum(blanks);
        if (threadIdx.x == 0) out[blank] -= (combined + a) * blanks;
    }
}

// Gradient of rows [begin, begin + n) of lm, in place of their exponentials, one block each. spread: the transposed ratios
// times am's exponentials. unigram_rows: over how many rows its mean is, of which padding is one where `all` is set.
template <typename T>
KERNEL simple_joint_backward_lm(long long n, long long begin, const Utterance* utterances, const T* am,
                                long long am_by_utterance, long long am_by_frame, const T* lm, long long lm_by_utterance,
                                long long lm_by_label, long long classes, const void* targets, long long wide_targets,
                                long long targets_by_utterance, long long targets_by_label, long long blank, double lm_only,
                                double am_only, long long all, long long unigram_rows, const Compute<T>* unigram,
                                const Compute<T>* excess, long long unigram_by_utterance, const Compute<T>* lm_sums,
                                const Compute<T>* blank_sums, const Compute<T>* label_sums, const Compute<T>* direct,
                                const Compute<T>* blank_occupancy, const Compute<T>* label_occupancy,
                                const Compute<T>* loss, const Compute<T>* weights, const Compute<T>* spread,
                                Compute<T>* gradient) {
    typedef Compute<T> Real;
    BLOCKS(i, n) {
        const long long padded = utterances[0].width, b = (begin + i) / padded, u = (begin + i) % padded;
        const Utterance& of = utterances[b];
        const Real weight = weights ? weights[b] : Real(1);
        Real* const out = gradient + i * classes;
        const bool own = u <= of.labels && weight != Real(0) && is_finite(loss[b]);
        const bool mean = am_only != 0.0 && (all || own);
        const Real combined = weight * combined_scale<Real>(lm_only, am_only), l = weight * (Real)lm_only;
        const T* const lm_u = lm + b * lm_by_utterance + u * lm_by_label;
        const Real* const in = spread + i * classes;
        SIMD
        PARALLEL(v, classes) out[v] = own ? combined * out[v] * in[v] : Real(0);
        if (own) {
            for (long long t = 0; t < of.frames; ++t) {
                const long long cell = of.cells + t * padded + u;
                const Real z = direct[cell];
                if (!(z < infinity<Real>())) continue;
                const Real share = combined * (blank_occupancy[cell] + label_occupancy[cell]);
                const T* const am_t = am + b * am_by_utterance + t * am_by_frame;
                SIMD
                PARALLEL(v, classes) out[v] += share * exponential(Real(load(am_t + v)) + Real(load(lm_u + v)) - z);
            }
            if (l != Real(0)) {
                const Real share = l * (blank_sums[begin + i] + label_sums[begin + i]), z = lm_sums[begin + i];
                SIMD
                PARALLEL(v, classes) out[v] += share * exponential(Real(load(lm_u + v)) - z);
            }
        }
        if (mean) {
            // The row's part in m(v), times what m(v) is asked for; and the softmax's own gradient, in which it sums to 0.
            const Real* const m = unigram + b * unigram_by_utterance;
            const Real* const asked = excess + b * unigram_by_utterance;
            const Real z = lm_sums[begin + i], part = Real(1) / Real(unigram_rows ? unigram_rows : of.labels + 1);
            Real sum = 0;
            SIMD_SUM(sum)
            PARALLEL(v, classes) {
                const Real share = part * exponential(Real(load(lm_u + v)) - z - m[v]) * asked[v];
                sum += m[v] > -infinity<Real>() ? share : Real(0);
            }
            sum = block_sum(sum);
            SIMD
            PARALLEL(v, classes) {
                const Real x = Real(load(lm_u + v)) - z;
                const Real share = part * exponential(x - m[v]) * asked[v];
                out[v] += (Real)am_only * ((m[v] > -infinity<Real>() ? share : Real(0)) - exponential(x) * sum);
            }
        }
        __syncthreads();
        if (own && threadIdx.x == 0) {
            out[blank] -= (combined + l) * blank_sums[begin + i];
            if (u < of.labels)
                out[target_of(of, targets, wide_targets, targets_by_utterance, targets_by_label, u)] -=
                    (combined + l) * label_sums[begin + i];
        }
    }
}

EXPORT(simple_joint_exponentials, float16)
EXPORT(simple_joint_exponentials, bfloat16)
EXPORT(simple_joint_exponentials, float32)
EXPORT(simple_joint_exponentials, float64)
EXPORT(simple_joint_unigram, float16)
EXPORT(simple_joint_unigram, bfloat16)
EXPORT(simple_joint_unigram, float32)
EXPORT(simple_joint_unigram, float64)
EXPORT(simple_joint_unigram_sums, float16)
EXPORT(simple_joint_unigram_sums, bfloat16)
EXPORT(simple_joint_unigram_sums, float32)
EXPORT(simple_joint_unigram_sums, float64)
EXPORT(simple_joint_arcs, float16)
EXPORT(simple_joint_arcs, bfloat16)
EXPORT(simple_joint_arcs, float32)
EXPORT(simple_joint_arcs, float64)
EXPORT(simple_joint_chains)
EXPORT(simple_joint_ratios, float32)
EXPORT(simple_joint_ratios, float64)
EXPORT(simple_joint_column_sums, float32)
EXPORT(simple_joint_column_sums, float64)
EXPORT(simple_joint_backward_unigram, float16)
EXPORT(simple_joint_backward_unigram, bfloat16)
EXPORT(simple_joint_backward_unigram, float32)
EXPORT(simple_joint_backward_unigram, float64)
EXPORT(simple_joint_backward_am, float16)
EXPORT(simple_joint_backward_am, bfloat16)
EXPORT(simple_joint_backward_am, float32)
EXPORT(simple_joint_backward_am, float64)
EXPORT(simple_joint_backward_lm, float16)
EXPORT(simple_joint_backward_lm, bfloat16)
EXPORT(simple_joint_backward_lm, float32)
EXPORT(simple_joint_backward_lm, float64)
