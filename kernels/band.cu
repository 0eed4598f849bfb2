// From the occupancies of a lattice to the band of it that is worth keeping (arXiv 2206.13236, section 3.2): a score for
// every first label p of every row, a path of first labels through the scores, and the share of the paths' probability
// that such a band keeps. And the rows of the predictor that belong to a band's cells, and the gradient back.
//
//   regular         score(t, p) = sum of blank(t, u) over u in [p, p + width) - label(t, p - 1)
//   modified        score(t, p) = sum of blank(t, u) + label(t, u) over u in [p, p + width)
//   constrained     as modified, without the last u's label: its arc is cut, as (t, u + 1) lies outside the row
//
// Occupancies and scores lie in padded (B, T, columns) arrays: utterance b owns rows of `columns` cells.
#include "processor.cuh"
#include "cells.cuh"

// The first label of an utterance's last row: the one from which the band reaches the last label.
DEVICE long long last_first(long long labels, long long width) { return larger(labels - width + 1, 0ll); }

// Scores of one row per block, by the rule of a topology, and the p of the highest, the lowest of equal ones. With `common`, p runs as far for every
// utterance as for the longest, as in k2.
template <typename Real>
KERNEL band_scores(long long rows, const Utterance* utterances, long long count, const Real* blank_occupancy,
                   const Real* label_occupancy, long long width, long long score_of, long long common, Real* scores,
                   long long padded_frames, int* first) {
    BLOCKS(row, rows) {
        const Utterance& of = utterances[owner(utterances, count, &Utterance::rows, row)];
        const long long t = row - of.rows, start = of.cells + t * of.width;
        const long long positions = last_first(common ? of.width - 1 : of.labels, width) + 1;
        Real highest = -infinity<Real>();
        PARALLEL(p, positions) {
            Real score = 0;
            const long long end = smaller(p + width, of.width), labels_end = score_of == CONSTRAINED ? end - 1 : end;
            for (long long u = p; u < end; ++u) {
                score += blank_occupancy[start + u];
                if (score_of != REGULAR && u < labels_end) score += label_occupancy[start + u];
            }
            if (score_of == REGULAR && p > 0) score -= label_occupancy[start + p - 1];
            scores[start + p] = score;
            highest = larger(highest, score);
        }
        highest = block_max(highest);
        long long best = positions;
        PARALLEL(p, positions) if (scores[start + p] == highest && p < best) best = p;
        best = -block_max(-best);
        if (threadIdx.x == 0) first[of.index * padded_frames + t] = (int)best;
    }
}

// value(t) -> the smallest of value(t), ..., value(frames - 1), one block.
template <typename Value, typename Keep>
DEVICE void smallest_from_here(long long frames, const Value& value, const Keep& keep) {
    long long negated = -(1ll << 40);
    for (long long start = 0; start < frames; start += blockDim.x) {
        const long long t = frames - 1 - start - threadIdx.x;
        const long long mine = t >= 0 ? -value(t) : -(1ll << 40);
        const long long here = larger(negated, block_scan<Max>(mine));
        if (t >= 0) keep(t, -here);
        negated = larger(negated, block_max(mine));
    }
}

// Makes first labels that begin with 0, end with the last row's, never fall and rise by at most `step` from row to row, one
// block per utterance. Rows past the last frame repeat it.
KERNEL band_local(long long count, const Utterance* utterances, long long width, long long step, long long padded_frames,
                  int* first) {
    BLOCKS(b, count) {
        const Utterance& of = utterances[b];
        int* const row = first + of.index * padded_frames;
        const long long last = last_first(of.labels, width);
        smallest_from_here(
            of.frames, [&](long long t) { return t == of.frames - 1 ? last : (long long)row[t]; },
            [&](long long t, long long p) { row[t] = (int)p; });
        __syncthreads();
        // Rising by at most `step` is not to fall, for step t - p.
        smallest_from_here(
            of.frames, [&](long long t) { return step * t - row[t]; },
            [&](long long t, long long p) { row[t] = (int)(step * t - larger(p, 0ll)); });
        __syncthreads();
        PARALLEL(t, padded_frames) if (t >= of.frames) row[t] = row[of.frames - 1];
    }
}

// The first labels of the highest sum of scores under the same constraints, one block per utterance; of equal ones, coming
// back from the end, the lowest. Where the last row cannot be reached, `first` stays as it is.
// values: 2 columns per utterance; chosen: a predecessor for every score.
template <typename Real>
KERNEL band_optimal(long long count, const Utterance* utterances, long long width, long long step, const Real* scores,
                    double* values, int* chosen, long long padded_frames, int* first) {
    BLOCKS(b, count) {
        const Utterance& of = utterances[b];
        double* const rows = values + of.index * 2 * of.width;
        const long long last = last_first(of.labels, width);
        for (long long t = 0; t < of.frames; ++t) {
            const double* const before = rows + (~t & 1) * of.width;
            double* const now = rows + (t & 1) * of.width;
            const long long start = of.cells + t * of.width;
            PARALLEL(p, last + 1) {
                double best = t == 0 && p == 0 ? 0.0 : -infinity<double>();
                long long from = 0;
                for (long long other = p; t > 0 && other >= larger(p - step, 0ll); --other)
                    if (before[other] >= best) {
                        best = before[other];
                        from = other;
                    }
                now[p] = best + (double)scores[start + p];
                chosen[start + p] = (int)from;
            }
            __syncthreads();
        }
        if (threadIdx.x == 0 && rows[(~of.frames & 1) * of.width + last] > -infinity<double>()) {
            long long p = last;
            for (long long t = of.frames - 1; t >= 0; --t) {
                first[of.index * padded_frames + t] = (int)p;
                p = chosen[of.cells + t * of.width + p];
            }
            for (long long t = of.frames; t < padded_frames; ++t) first[of.index * padded_frames + t] = (int)last;
        }
        __syncthreads();
    }
}

// The arcs of a band's cells, one block per row, weighted by the probability that a path which has come to the cell goes on
// by them. Summed over the band's lattice they give the share of the probability that the band keeps.
template <typename Real>
KERNEL band_arcs(long long rows, const Utterance* utterances, long long count, const Span* spans,
                 const Real* blank_occupancy, const Real* label_occupancy, long long padded_frames, long long columns,
                 long long topology, Real* log_blank, Real* log_label) {
    BLOCKS(row, rows) {
        const Utterance& of = utterances[owner(utterances, count, &Utterance::rows, row)];
        const long long t = row - of.rows, start = first_label(of, spans, t), end = end_label(of, spans, t);
        PARALLEL(column, of.width) {
            const long long u = start + column, cell = of.cells + t * of.width + column;
            const long long from = (of.index * padded_frames + t) * columns + u;
            const Real blank = u < end ? blank_occupancy[from] : Real(0), label = u < end ? label_occupancy[from] : Real(0);
            const Real both = blank + label;
            log_blank[cell] = blank > Real(0) ? logarithm(blank / both) : -infinity<Real>();
            log_label[cell] = label > Real(0) && (topology != CONSTRAINED || u + 1 < end) ? logarithm(label / both) : -infinity<Real>();
        }
    }
}

// out(b, t, s) = rows(b, first_t + s), a block each; zeros where the band has no such cell.
template <typename T>
KERNEL band_gather(long long n, const Utterance* utterances, const int* first, const int* end, long long padded_frames,
                   long long width, const T* rows, long long by_utterance, long long by_label, long long labels,
                   long long features, T* out) {
    BLOCKS(i, n) {
        const long long b = i / (padded_frames * width), t = i / width % padded_frames;
        const long long u = first[b * padded_frames + t] + i % width;
        const bool real = t < utterances[b].frames && u >= 0 && u < smaller((long long)end[b * padded_frames + t], labels);
        const T* const in = rows + (real ? b * by_utterance + u * by_label : 0);
        T* const to = out + i * features;
        SIMD
        PARALLEL(h, features) store(to + h, real ? load(in + h) : Compute<T>(0));
    }
}

// rows_gradient(b, u) = sum over t of gradient(b, t, u - first_t), a block each, in order of t.
template <typename T>
KERNEL band_gather_backward(long long n, const Utterance* utterances, const int* first, const int* end,
                            long long padded_frames, long long width, const T* gradient, long long by_utterance,
                            long long by_frame, long long by_column, long long labels, long long features, T* rows_gradient) {
    typedef Compute<T> Real;
    BLOCKS(i, n) {
        const long long b = i / labels, u = i % labels;
        const int* const starts = first + b * padded_frames;
        const int* const ends = end + b * padded_frames;
        for (long long h0 = (long long)threadIdx.x * COLUMNS; h0 < features; h0 += (long long)blockDim.x * COLUMNS) {
            const int lanes = (int)smaller((long long)COLUMNS, features - h0);
            Real sum[COLUMNS] = {};
            for (long long t = 0; t < utterances[b].frames; ++t) {
                const long long column = u - starts[t];
                if (column < 0 || column >= width || u >= ends[t]) continue;
                const T* const in = gradient + b * by_utterance + t * by_frame + column * by_column + h0;
                SIMD
                for (int k = 0; k < lanes; ++k) sum[k] += load(in + k);
            }
            SIMD
            for (int k = 0; k < lanes; ++k) store(rows_gradient + i * features + h0 + k, sum[k]);
        }
    }
}

EXPORT(band_scores, float32)
EXPORT(band_scores, float64)
EXPORT(band_local)
EXPORT(band_optimal, float32)
EXPORT(band_optimal, float64)
EXPORT(band_arcs, float32)
EXPORT(band_arcs, float64)
EXPORT(band_gather, float16)
EXPORT(band_gather, bfloat16)
EXPORT(band_gather, float32)
EXPORT(band_gather, float64)
EXPORT(band_gather_backward, float16)
EXPORT(band_gather_backward, bfloat16)
EXPORT(band_gather_backward, float32)
EXPORT(band_gather_backward, float64)
