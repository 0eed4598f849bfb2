// Forward and backward sums over all paths of each utterance's lattice -> loss and occupancy of every arc; and the best path.
//
//   regular      (t,u) -blank-> (t+1,u)   (t,u) -label-> (t,u+1)      ends with the blank out of (T-1, U)
//   modified     (t,u) -blank-> (t+1,u)   (t,u) -label-> (t+1,u+1)    ends in (T, U)
//   constrained  as modified, its label arc weighs label(t,u) + blank(t,u+1)
//
// Cells that depend on nothing but the step before are one step: an anti-diagonal t + u in `regular`, a row t otherwise.
// A block walks the steps of one utterance, its threads share a step's cells.
//
// Sums are held as mantissa * 2^exponent in the linear domain: within 2e-6 of float64 at T = 2000, U = 300 in float32, where
// a float32 log-sum is off by 1e-2, and without exp or log on the way from one step to the next.
#include "processor.cuh"
#include "cells.cuh"

// Columns whose step is exchanged in shared memory; a wider lattice exchanges in a scratch row.
static constexpr long long SHARED_COLUMNS = 1024;

// 2^ZERO_EXPONENT stands for zero. Log-weights below -1.8e8 count as zero too, and those above HIGHEST_WEIGHT (no
// log-probability is) as not finite, so that exponents never overflow.
static constexpr int ZERO_EXPONENT = -(1 << 28);
static constexpr int HIGHEST_WEIGHT = 10000;

template <typename Real> struct Scaled { Real mantissa; int exponent; };  // mantissa in [1, 2), or 0

DEVICE int exponent_field(float x) { return (int)(bits_of(x) >> 23 & 0xffu) - 127; }
DEVICE int exponent_field(double x) { return (int)(bits_of(x) >> 52 & 0x7ffull) - 1023; }
DEVICE float power_of_two(float, int n) { return n < -126 ? 0.0f : float_of((unsigned int)(n + 127) << 23); }
DEVICE double power_of_two(double, int n) { return n < -1022 ? 0.0 : float_of((unsigned long long)(n + 1023) << 52); }

template <typename Real> DEVICE Scaled<Real> normalised(Real mantissa, int exponent) {
    const int shift = exponent_field(mantissa);
    const bool zero = mantissa == Real(0) || exponent + shift <= ZERO_EXPONENT;
    return {zero ? Real(0) : mantissa * power_of_two(mantissa, -shift), zero ? ZERO_EXPONENT : exponent + shift};
}

// The sum over paths.
template <typename Real> struct SumOfPaths {
    typedef Scaled<Real> Value;
    static DEVICE Value none() { return {Real(0), ZERO_EXPONENT}; }
    static DEVICE Value one() { return {Real(1), 0}; }
    static DEVICE Value arc(Real log_weight) {
        const Real scaled = log_weight * Real(1.4426950408889634);
        if (!(scaled > Real(ZERO_EXPONENT) && log_weight <= Real(HIGHEST_WEIGHT))) return none();
        const int n = (int)(scaled < Real(0) ? scaled - Real(0.5) : scaled + Real(0.5));
        // n ln 2 in two parts, the first of which times n is exact.
        const Real rest = (log_weight - Real(n) * Real(0.693359375)) - Real(n) * Real(-2.1219444005469058e-4);
        return normalised(exponential(rest), n);
    }
    static DEVICE Value through(Value path, Value arc) {
        return normalised(path.mantissa * arc.mantissa, path.exponent + arc.exponent);
    }
    static DEVICE Value either(Value a, Value b) {
        const int exponent = a.exponent > b.exponent ? a.exponent : b.exponent;
        return normalised(a.mantissa * power_of_two(a.mantissa, a.exponent - exponent) +
                              b.mantissa * power_of_two(b.mantissa, b.exponent - exponent),
                          exponent);
    }
    static DEVICE double log(Value a) {
        return a.mantissa == Real(0) ? -infinity<double>()
                                     : logarithm((double)a.mantissa) + a.exponent * 0.6931471805599453;
    }
};

// The best path, in log-probabilities.
struct BestPath {
    typedef double Value;
    static DEVICE Value none() { return -infinity<double>(); }
    static DEVICE Value one() { return 0.0; }
    static DEVICE Value arc(double log_weight) { return log_weight; }
    static DEVICE Value through(Value path, Value arc) { return path + arc; }
    static DEVICE Value either(Value a, Value b) { return larger(a, b); }
    static DEVICE double log(Value a) { return a; }
};

// The arcs out of the cells of one utterance.
template <typename Real> struct Arcs {
    const Utterance& of;
    const Span* spans;
    const Real* log_blank;
    const Real* log_label;
    int topology;
    Real delay_penalty;

    DEVICE bool has(long long t, long long u) const { return t >= 0 && t < of.frames && u >= 0 && in_row(of, spans, t, u); }
    DEVICE long long cell(long long t, long long u) const { return cell_at(of, spans, t, u); }

    // Whether the arc out of (t, u) exists, and whether it ends the lattice.
    DEVICE bool blank_ends(long long t, long long u) const { return t == of.frames - 1 && u == of.labels; }
    DEVICE bool has_blank(long long t, long long u) const { return blank_ends(t, u) || has(t + 1, u); }
    DEVICE long long frame_after_label(long long t) const { return topology == REGULAR ? t : t + 1; }
    DEVICE bool label_ends(long long t, long long u) const {
        return topology != REGULAR && t == of.frames - 1 && u == of.labels - 1;
    }
    DEVICE bool has_label(long long t, long long u) const {
        return u < of.labels && (label_ends(t, u) || has(frame_after_label(t), u + 1)) &&
               (topology != CONSTRAINED || has(t, u + 1));
    }
    DEVICE Real blank(long long t, long long u) const { return log_blank[cell(t, u)]; }
    DEVICE Real label(long long t, long long u) const {
        const long long at = cell(t, u);
        // 2.0 t and not t: the middle of an even number of frames lies between two of them.
        const Real delayed = delay_penalty == Real(0) ? log_label[at]
            : log_label[at] + delay_penalty * (Real(0.5) * Real(of.frames - 1 - 2 * t));
        return topology == CONSTRAINED ? delayed + log_blank[at + 1] : delayed;
    }
};

// The frames [low, high) whose row crosses anti-diagonal `step`, kept up to date while the step moves by one. Rows begin on
// strictly increasing diagonals, so both ends only ever move one way.
struct Diagonal {
    long long low, high;
    DEVICE void forward(const Utterance& of, const Span* spans, long long step) {
        while (low < of.frames && low + end_label(of, spans, low) <= step) ++low;
        while (high < of.frames && high + first_label(of, spans, high) <= step) ++high;
    }
    DEVICE void backward(const Utterance& of, const Span* spans, long long step) {
        while (high > 0 && high - 1 + first_label(of, spans, high - 1) > step) --high;
        while (low > 0 && low - 1 + end_label(of, spans, low - 1) > step) --low;
    }
};

// Walks the lattice of one utterance and leaves the value of every cell in `values`: of all ways from the start to the cell
// (ahead), or from the cell to the end (else). Returns whether it met a weight that is not finite
// (coming back it meets every arc, going ahead it does not look).
template <typename Semiring, typename Real>
DEVICE bool walk(const Arcs<Real>& arcs, bool ahead, typename Semiring::Value* values, typename Semiring::Value* scratch) {
    typedef typename Semiring::Value Value;
    SHARED(Value, exchange, 2 * SHARED_COLUMNS);
    const Utterance& of = arcs.of;
    const bool diagonal = arcs.topology == REGULAR;
    const long long columns = of.labels + 1, steps = diagonal ? of.frames + of.labels : of.frames;
    Value* const buffer = columns <= SHARED_COLUMNS ? exchange : scratch;
    Diagonal on = ahead ? Diagonal{0, 0} : Diagonal{of.frames, of.frames};
    bool bad = false;
    for (long long i = 0; i < steps; ++i) {
        const long long step = ahead ? i : steps - 1 - i;
        Value* const now = buffer + (i & 1) * columns;
        const Value* const before = buffer + (~i & 1) * columns;
        if (diagonal && ahead) on.forward(of, arcs.spans, step);
        if (diagonal && !ahead) on.backward(of, arcs.spans, step);
        const long long start = diagonal ? on.low : first_label(of, arcs.spans, step);
        const long long end = diagonal ? on.high : end_label(of, arcs.spans, step);
        PARALLEL(j, end - start) {
            const long long t = diagonal ? start + j : step, u = diagonal ? step - t : start + j;
            if (!in_row(of, arcs.spans, t, u)) continue;
            const long long cell = arcs.cell(t, u);
            Value value = Semiring::none();
            if (ahead) {
                if (t == 0 && u == 0) value = Semiring::one();
                if (t > 0 && arcs.has(t - 1, u))
                    value = Semiring::either(value, Semiring::through(before[u], Semiring::arc(arcs.blank(t - 1, u))));
                const long long from = diagonal ? t : t - 1;
                if (arcs.has(from, u - 1) && arcs.has_label(from, u - 1))
                    value = Semiring::either(value, Semiring::through(before[u - 1], Semiring::arc(arcs.label(from, u - 1))));
            } else {
                const Real log_blank = arcs.blank(t, u), own_label = arcs.log_label[cell];
                // Arcs that lead nowhere count as well: a NaN is an error of the input wherever it is.
                bad |= !(log_blank <= Real(HIGHEST_WEIGHT)) || !(own_label <= Real(HIGHEST_WEIGHT));
                if (arcs.has_blank(t, u)) {
                    const Value rest = arcs.blank_ends(t, u) ? Semiring::one() : before[u];
                    value = Semiring::through(rest, Semiring::arc(log_blank));
                }
                if (arcs.has_label(t, u)) {
                    const Real log_label = arcs.label(t, u);
                    bad |= !(log_label <= Real(HIGHEST_WEIGHT));
                    const Value rest = arcs.label_ends(t, u) ? Semiring::one() : before[u + 1];
                    value = Semiring::either(value, Semiring::through(rest, Semiring::arc(log_label)));
                }
            }
            now[u] = value;
            values[cell] = value;
        }
        __syncthreads();
    }
    return bad;
}

// Whether a row ends below 0, or begins or ends before the one above it: no lattice, and its cells are not all met.
DEVICE bool out_of_order(const Utterance& of, const Span* spans) {
    bool bad = false;
    if (spans)
        PARALLEL(t, of.frames) {
            const Span now = spans[of.rows + t], before = spans[of.rows + (t > 0 ? t - 1 : 0)];
            bad |= now.end < 0 || now.first < before.first || now.end < before.end;
        }
    return bad;
}

DEVICE bool block_any(bool mine) { return block_max(mine ? 1 : 0) != 0; }

template <typename Real> DEVICE bool has_path(const Arcs<Real>& arcs) { return arcs.has(0, 0); }

// Both directions of every utterance, one block each: item 2b goes ahead, 2b + 1 comes back and knows the loss.
// scratch: 4 (max labels + 1) values per utterance, or null where no lattice is wider than SHARED_COLUMNS.
template <typename Real>
KERNEL lattice_sums(long long count, const Utterance* utterances, const Span* spans, const Real* log_blank,
                    const Real* log_label, long long topology, double delay_penalty, Scaled<Real>* ahead,
                    Scaled<Real>* back, Scaled<Real>* scratch, long long scratch_columns, Real* loss, Real* reported,
                    long long infeasible_as_zero) {
    BLOCKS(item, 2 * count) {
        const long long b = item >> 1;
        const bool forward = (item & 1) == 0;
        const Arcs<Real> arcs{utterances[b], spans, log_blank, log_label, (int)topology, (Real)delay_penalty};
        bool bad = out_of_order(arcs.of, spans);
        bad |= walk<SumOfPaths<Real>>(arcs, forward, forward ? ahead : back, scratch + item * 2 * scratch_columns);
        bad = block_any(bad);
        if (forward || threadIdx.x != 0) continue;
        const double total = has_path(arcs) ? SumOfPaths<Real>::log(back[arcs.cell(0, 0)]) : -infinity<double>();
        const Real value = bad ? nan_value<Real>() : (Real)-total;
        loss[arcs.of.index] = value;
        reported[arcs.of.index] = infeasible_as_zero && value == infinity<Real>() ? Real(0) : value;
    }
}

// exp(ahead(from) + weight + back(to) + loss): the share of the paths' probability that takes the arc.
template <typename Real>
DEVICE Real share(Scaled<Real> from, Scaled<Real> arc, Scaled<Real> to, Scaled<Real> total) {
    // Each mantissa is below 2, so neither the product nor the quotient leaves the normal range.
    const Real mantissa = from.mantissa * arc.mantissa * (to.mantissa / total.mantissa);
    const int exponent = from.exponent + arc.exponent + to.exponent - total.exponent;
    return mantissa == Real(0) || exponent < -120 ? Real(0) : mantissa * power_of_two(mantissa, smaller(exponent, 120));
}

// Occupancy of the two arcs of every cell, one block per lattice row; with `effective`, what the gradient needs: the label
// arc of `constrained` also takes the blank above it, and FastEmit weighs labels by 1 + lambda.
template <typename Real>
KERNEL lattice_occupancy(long long rows, const Utterance* utterances, long long count, const Span* spans,
                         const Real* log_blank, const Real* log_label, long long topology, double delay_penalty,
                         const Scaled<Real>* ahead, const Scaled<Real>* back, const Real* loss, long long effective,
                         double fastemit_lambda, Real* blank_occupancy, Real* label_occupancy) {
    typedef SumOfPaths<Real> Paths;
    BLOCKS(row, rows) {
        const long long b = owner(utterances, count, &Utterance::rows, row);
        const Utterance& of = utterances[b];
        const Arcs<Real> arcs{of, spans, log_blank, log_label, (int)topology, (Real)delay_penalty};
        const long long t = row - of.rows, start = first_label(of, spans, t);
        const bool live = is_finite(loss[of.index]);
        const Scaled<Real> total = live ? back[arcs.cell(0, 0)] : Paths::one();
        PARALLEL(column, of.width) {
            const long long u = start + column, cell = of.cells + t * of.width + column;
            const bool real = live && in_row(of, spans, t, u);
            Real blank = 0, label = 0;
            if (real && arcs.has_blank(t, u))
                blank = share(ahead[cell], Paths::arc(arcs.blank(t, u)),
                              arcs.blank_ends(t, u) ? Paths::one() : back[arcs.cell(t + 1, u)], total);
            if (real && arcs.has_label(t, u))
                label = share(ahead[cell], Paths::arc(arcs.label(t, u)),
                              arcs.label_ends(t, u) ? Paths::one() : back[arcs.cell(arcs.frame_after_label(t), u + 1)], total);
            if (effective) {
                if (real && topology == CONSTRAINED && arcs.has(t, u - 1) && arcs.has_label(t, u - 1))
                    blank += share(ahead[cell - 1], Paths::arc(arcs.label(t, u - 1)),
                                   arcs.label_ends(t, u - 1) ? Paths::one() : back[arcs.cell(t + 1, u)], total);
                if (fastemit_lambda != 0.0) label *= (Real)(1.0 + fastemit_lambda);
            }
            blank_occupancy[cell] = blank;
            label_occupancy[cell] = label;
        }
    }
}

// The frame at which the best path emits each label, and the path's log-probability, one block per utterance. Ties take the
// earliest frames. frames of labels that are not there, or of an utterance without a path, are -1.
template <typename Real>
KERNEL lattice_best_path(long long count, const Utterance* utterances, const Span* spans, const Real* log_blank,
                         const Real* log_label, long long topology, double delay_penalty, double* ahead, double* scratch,
                         long long scratch_columns, long long* frames, long long frames_columns, double* score) {
    BLOCKS(b, count) {
        const Arcs<Real> arcs{utterances[b], spans, log_blank, log_label, (int)topology, (Real)delay_penalty};
        const Utterance& of = arcs.of;
        double* const row = scratch + b * 2 * scratch_columns;
        // Comes back first, only to learn whether a weight is bad: the way ahead does not visit every arc.
        const bool bad = block_any(walk<BestPath>(arcs, false, ahead, row) | out_of_order(of, spans));
        const double best = has_path(arcs) ? ahead[arcs.cell(0, 0)] : -infinity<double>();
        __syncthreads();
        walk<BestPath>(arcs, true, ahead, row);
        long long* const out = frames + of.index * frames_columns;
        PARALLEL(u, frames_columns) out[u] = -1;
        __syncthreads();
        if (threadIdx.x != 0) continue;
        score[of.index] = bad ? nan_value<double>() : best;
        if (bad || !is_finite(best)) continue;
        long long t = of.frames, u = of.labels;
        if (topology == REGULAR) {
            --t;
        } else {
            // The final arc: out of (T - 1, U) by blank, or out of (T - 1, U - 1) by label.
            const double blank = arcs.has(t - 1, u) ? ahead[arcs.cell(t - 1, u)] + arcs.blank(t - 1, u) : -infinity<double>();
            const double label = arcs.has(t - 1, u - 1) && arcs.has_label(t - 1, u - 1)
                                     ? ahead[arcs.cell(t - 1, u - 1)] + arcs.label(t - 1, u - 1) : -infinity<double>();
            --t;
            if (label > blank) out[--u] = t;
        }
        while (t > 0 || u > 0) {
            const double blank = arcs.has(t - 1, u) ? ahead[arcs.cell(t - 1, u)] + arcs.blank(t - 1, u) : -infinity<double>();
            const long long from = topology == REGULAR ? t : t - 1;
            const double label = arcs.has(from, u - 1) && arcs.has_label(from, u - 1)
                                     ? ahead[arcs.cell(from, u - 1)] + arcs.label(from, u - 1) : -infinity<double>();
            if (label > blank) {
                out[--u] = from;
                t = from;
            } else {
                --t;
            }
        }
    }
}

EXPORT(lattice_sums, float32)
EXPORT(lattice_sums, float64)
EXPORT(lattice_occupancy, float32)
EXPORT(lattice_occupancy, float64)
EXPORT(lattice_best_path, float32)
EXPORT(lattice_best_path, float64)
