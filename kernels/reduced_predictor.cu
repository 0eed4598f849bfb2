// Reduced prediction network: a weighted average of the embeddings x_n of the last N labels,
//
//   out(u) = share sum_n x_n score(u, n),   score(u, n) = x_n . Q_n,   x_n = embedding[label u - n],   share = 1 / (heads N),
//
// where n = 0 is the label just emitted, labels before the start are zeros, and Q_n is the sum of the heads' position vectors:
// what the heads give differs in nothing else. And its gradient: label i is x_n of the rows u = i + 1 + n.
#include "processor.cuh"

// Labels (batch, columns), their embeddings, and the rows that see them: those of u = 0 .. columns, or with `last` that of
// u = U_b alone.
template <typename T> struct Seen {
    const long long* lengths;
    const long long* labels;
    long long columns, last, reach;
    const T* embedding;
    long long by_class, classes;

    // U_b, or -1 for a length that is none.
    DEVICE long long length(long long b) const { return lengths[b] >= 0 && lengths[b] <= columns ? lengths[b] : -1; }
    DEVICE long long rows() const { return last ? 1 : columns + 1; }
    // Row r of all utterances' rows is that of this u.
    DEVICE long long label_of(long long r) const { return last ? length(r) : r % (columns + 1); }
    // The row of utterance b that u has, or -1.
    DEVICE long long row_of(long long b, long long u) const {
        return u > length(b) || (last && u < length(b)) ? -1 : last ? b : b * (columns + 1) + u;
    }
    // How many labels row r sees: of a row past the last label, none.
    DEVICE long long number(long long r) const {
        const long long u = label_of(r);
        return u > length(r / rows()) ? 0 : smaller(u, reach);
    }
    // The class of label n of row r, counted back from its last, or -1 where none has its number.
    DEVICE long long class_of(long long r, long long n) const { return known(r / rows() * columns + label_of(r) - 1 - n); }
    DEVICE long long known(long long item) const { return labels[item] >= 0 && labels[item] < classes ? labels[item] : -1; }
    DEVICE const T* vector(long long v) const { return embedding + v * by_class; }
};

// scores (all rows, N), the first of them NaN where one is not finite: of a label that no class has, too. One block per row.
template <typename T>
KERNEL reduced_predictor_scores(long long all, const long long* lengths, const long long* labels, long long columns,
                                long long last, long long reach, const T* embedding, long long by_class, long long classes,
                                long long features, const Compute<T>* positions, Compute<T>* scores) {
    typedef Compute<T> Real;
    const Seen<T> of{lengths, labels, columns, last, reach, embedding, by_class, classes};
    BLOCKS(r, all) {
        bool live = of.length(r / of.rows()) >= 0;
        for (long long n = 0; n < (live ? of.number(r) : 0); ++n) {
            const long long v = of.class_of(r, n);
            Real score = nan_value<Real>();
            if (v >= 0) {
                const T* const x = of.vector(v);
                const Real* const q = positions + n * features;
                Real sum = 0;
                SIMD_SUM(sum)
                PARALLEL(e, features) sum += Real(load(x + e)) * q[e];
                score = block_sum(sum);
            }
            live = live && is_finite(score);
            if (threadIdx.x == 0) scores[r * reach + n] = score;
        }
        if (threadIdx.x == 0 && !(live && of.number(r) > 0)) scores[r * reach] = live ? Real(0) : nan_value<Real>();
    }
}

// One block per row, given the scores: rows past the last label are zeros, those of a score that is not finite NaN.
template <typename T>
KERNEL reduced_predictor_forward(long long all, const long long* lengths, const long long* labels, long long columns,
                                 long long last, long long reach, const T* embedding, long long by_class, long long classes,
                                 long long features, double share, const Compute<T>* scores, T* out) {
    typedef Compute<T> Real;
    const Seen<T> of{lengths, labels, columns, last, reach, embedding, by_class, classes};
    BLOCKS(r, all) {
        const Real* const score = scores + r * reach;
        const bool live = is_finite(score[0]);
        const long long number = live ? of.number(r) : 0;
        for (long long h0 = (long long)threadIdx.x * COLUMNS; h0 < features; h0 += (long long)blockDim.x * COLUMNS) {
            const int lanes = (int)smaller((long long)COLUMNS, features - h0);
            Real sum[COLUMNS] = {};
            for (long long n = 0; n < number; ++n) {
                const T* const x = of.vector(of.class_of(r, n)) + h0;
                SIMD
                for (int k = 0; k < lanes; ++k) sum[k] += score[n] * Real(load(x + k));
            }
            for (int k = 0; k < lanes; ++k)
                store(out + r * features + h0 + k, live ? sum[k] * (Real)share : nan_value<Real>());
        }
    }
}

// Of every label: its class into `keys`, or `classes` where it is past the last or none; the gradient by its embedding into
// `gradients` (batch, columns, features); and x_n . upstream into `products` (all rows, N) for those rows whose scores are
// finite, as others have no gradient. One block per label.
template <typename T>
KERNEL reduced_predictor_backward_labels(long long items, const long long* lengths, const long long* labels, long long columns,
                                         long long last, long long reach, const T* embedding, long long by_class,
                                         long long classes, long long features, double share, const Compute<T>* scores,
                                         const Compute<T>* positions, const T* upstream, long long by_utterance,
                                         long long by_row, Compute<T>* products, Compute<T>* gradients, long long* keys) {
    typedef Compute<T> Real;
    const Seen<T> of{lengths, labels, columns, last, reach, embedding, by_class, classes};
    BLOCKS(item, items) {
        const long long b = item / columns, i = item % columns;
        const long long v = i < of.length(b) ? of.known(item) : -1;
        if (threadIdx.x == 0) keys[item] = v >= 0 ? v : classes;
        if (v < 0) continue;
        const T* const x = of.vector(v);
        for (long long n = 0; n < reach; ++n) {
            const long long r = of.row_of(b, i + 1 + n);
            if (r < 0 || !is_finite(scores[r * reach])) continue;
            const T* const g = upstream + b * by_utterance + r % of.rows() * by_row;
            Real product = 0;
            SIMD_SUM(product)
            PARALLEL(e, features) product += Real(load(x + e)) * Real(load(g + e));
            product = block_sum(product);
            if (threadIdx.x == 0) products[r * reach + n] = product;
        }
        __syncthreads();
        for (long long h0 = (long long)threadIdx.x * COLUMNS; h0 < features; h0 += (long long)blockDim.x * COLUMNS) {
            const int lanes = (int)smaller((long long)COLUMNS, features - h0);
            Real sum[COLUMNS] = {};
            for (long long n = 0; n < reach; ++n) {
                const long long r = of.row_of(b, i + 1 + n);
                if (r < 0 || !is_finite(scores[r * reach])) continue;
                const Real score = scores[r * reach + n], product = products[r * reach + n];
                const Real* const q = positions + n * features + h0;
                const T* const g = upstream + b * by_utterance + r % of.rows() * by_row + h0;
                SIMD
                for (int k = 0; k < lanes; ++k) sum[k] += score * Real(load(g + k)) + product * q[k];
            }
            for (int k = 0; k < lanes; ++k) gradients[item * features + h0 + k] = sum[k] * (Real)share;
        }
    }
}

// Labels of a class whose gradients one block adds up.
static constexpr long long RUN = 64;

// Adds up the labels' gradients by their classes, in two steps: `order` lists the labels by class. First runs of labels of one
// class, into the gradient of each run's first. One block per label, of which the first of a run works.
template <typename Real>
KERNEL reduced_predictor_backward_runs(long long items, long long classes, long long features, const long long* keys,
                                       const long long* order, Real* gradients) {
    BLOCKS(item, items) {
        const long long v = keys[order[item]];
        if (v == classes || (item % RUN != 0 && keys[order[item - 1]] == v)) continue;
        Real* const out = gradients + order[item] * features;
        for (long long other = item + 1; other < items && other % RUN != 0 && keys[order[other]] == v; ++other) {
            const Real* const from = gradients + order[other] * features;
            SIMD
            PARALLEL(h, features) out[h] += from[h];
        }
    }
}

// Then the runs, in their order. One block per label, of which the first of a class works; rows of other classes are left as
// they are.
template <typename T>
KERNEL reduced_predictor_backward_embedding(long long items, long long classes, long long features, const long long* keys,
                                            const long long* order, const Compute<T>* gradients, T* embedding) {
    typedef Compute<T> Real;
    BLOCKS(item, items) {
        const long long v = keys[order[item]];
        if (v == classes || (item > 0 && keys[order[item - 1]] == v)) continue;
        for (long long h0 = (long long)threadIdx.x * COLUMNS; h0 < features; h0 += (long long)blockDim.x * COLUMNS) {
            const int lanes = (int)smaller((long long)COLUMNS, features - h0);
            Real sum[COLUMNS] = {};
            for (long long other = item; other < items && keys[order[other]] == v; other += RUN - other % RUN) {
                const Real* const from = gradients + order[other] * features + h0;
                SIMD
                for (int k = 0; k < lanes; ++k) sum[k] += from[k];
            }
            for (int k = 0; k < lanes; ++k) store(embedding + v * features + h0 + k, sum[k]);
        }
    }
}

// Gradient by the sum of the heads' position vectors, in parts (parts, N, features): each of some of the rows, in their order.
// One block per part and n.
template <typename T>
KERNEL reduced_predictor_backward_positions(long long parts, long long all, const long long* lengths, const long long* labels,
                                            long long columns, long long last, long long reach, const T* embedding,
                                            long long by_class, long long classes, long long features, double share,
                                            const Compute<T>* scores, const Compute<T>* products, Compute<T>* sums) {
    typedef Compute<T> Real;
    const Seen<T> of{lengths, labels, columns, last, reach, embedding, by_class, classes};
    BLOCKS(item, parts * reach) {
        const long long part = item / reach, n = item % reach;
        const long long begin = all * part / parts, end = all * (part + 1) / parts;
        for (long long h0 = (long long)threadIdx.x * COLUMNS; h0 < features; h0 += (long long)blockDim.x * COLUMNS) {
            const int lanes = (int)smaller((long long)COLUMNS, features - h0);
            Real sum[COLUMNS] = {};
            for (long long r = begin; r < end; ++r) {
                if (n >= of.number(r) || !is_finite(scores[r * reach])) continue;
                const Real product = products[r * reach + n];
                const T* const x = of.vector(of.class_of(r, n)) + h0;
                SIMD
                for (int k = 0; k < lanes; ++k) sum[k] += product * Real(load(x + k));
            }
            for (int k = 0; k < lanes; ++k) sums[item * features + h0 + k] = sum[k] * (Real)share;
        }
    }
}

EXPORT_FLOATS(reduced_predictor_scores)
EXPORT_FLOATS(reduced_predictor_forward)
EXPORT_FLOATS(reduced_predictor_backward_labels)
EXPORT(reduced_predictor_backward_runs, float32)
EXPORT(reduced_predictor_backward_runs, float64)
EXPORT_FLOATS(reduced_predictor_backward_embedding)
EXPORT_FLOATS(reduced_predictor_backward_positions)
