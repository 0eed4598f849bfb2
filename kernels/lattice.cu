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
    const Utterance of;  // a copy: stores of values cannot change it
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
        return label_weight(t, log_label[at], topology == CONSTRAINED ? log_blank[at + 1] : Real(0));
    }
    // What a label's arc out of frame t weighs: `above` is the log-probability of the blank out of (t, u + 1).
    DEVICE Real label_weight(long long t, Real own, Real above) const {
        // 2.0 t and not t: the middle of an even number of frames lies between two of them.
        const Real delayed = delay_penalty == Real(0) ? own
            : own + delay_penalty * (Real(0.5) * Real(of.frames - 1 - 2 * t));
        return topology == CONSTRAINED ? delayed + above : delayed;
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

// The cells of a step: frames [start, end) of a diagonal, or columns [start, end) of a row.
struct Range { long long start, end; };

// A cell and the log-probabilities behind the arcs into it (ahead) or out of it, as they lie in memory.
template <typename Real> struct Fetched {
    long long t, u, cell;  // cell -1: none
    bool has_blank, has_label;
    Real blank, label, above;
};

// The same with its arcs' weights.
template <typename Semiring> struct Weighted {
    long long t, u, cell;
    bool has_blank, has_label;
    typename Semiring::Value blank, label;
};

// Walks the lattice of one utterance and leaves the value of every cell in `values`: of all ways from the start to the cell
// (ahead), or from the cell to the end (else).
template <typename Semiring, bool ahead, typename Real> struct Walk {
    typedef typename Semiring::Value Value;
    const Arcs<Real>& arcs;
    const bool diagonal;
    const long long steps;
    Diagonal on;
    bool bad;  // whether a weight is not finite: only coming back are all arcs looked at

    DEVICE explicit Walk(const Arcs<Real>& arcs)
        : arcs(arcs), diagonal(arcs.topology == REGULAR),
          steps(diagonal ? arcs.of.frames + arcs.of.labels : arcs.of.frames),
          on(ahead ? Diagonal{0, 0} : Diagonal{arcs.of.frames, arcs.of.frames}), bad(false) {}

    DEVICE long long step_of(long long i) const { return ahead ? i : steps - 1 - i; }

    // To be asked for one i after the other.
    DEVICE Range range(long long i) {
        if (i >= steps) return {0, 0};
        const long long step = step_of(i);
        if (!diagonal) return {first_label(arcs.of, arcs.spans, step), end_label(arcs.of, arcs.spans, step)};
        if (ahead) on.forward(arcs.of, arcs.spans, step);
        else on.backward(arcs.of, arcs.spans, step);
        return {on.low, on.high};
    }

    // Only loads: but for a band's rows, nothing here waits for what they bring.
    DEVICE Fetched<Real> fetch(long long i, Range range, long long j) const {
        Fetched<Real> found{};
        found.cell = -1;
        if (j >= range.end - range.start) return found;
        const long long t = diagonal ? range.start + j : step_of(i), u = diagonal ? step_of(i) - t : range.start + j;
        if (!in_row(arcs.of, arcs.spans, t, u)) return found;
        found.t = t;
        found.u = u;
        found.cell = arcs.cell(t, u);
        const long long from = !ahead || diagonal ? t : t - 1, label = ahead ? u - 1 : u;  // the cell that the label's arc is out of
        found.has_blank = ahead ? t > 0 && arcs.has(t - 1, u) : arcs.has_blank(t, u);
        found.has_label = (!ahead || arcs.has(from, label)) && arcs.has_label(from, label);
        // Coming back, arcs that lead nowhere count as well: a NaN is an error of the input wherever it is.
        if (found.has_blank || !ahead) found.blank = ahead ? arcs.blank(t - 1, u) : arcs.log_blank[found.cell];
        if (found.has_label || !ahead) {
            const long long at = ahead ? arcs.cell(from, label) : found.cell;
            found.label = arcs.log_label[at];
            if (found.has_label && arcs.topology == CONSTRAINED) found.above = arcs.log_blank[at + 1];
        }
        return found;
    }

    DEVICE Weighted<Semiring> weighted(const Fetched<Real>& found) {
        Weighted<Semiring> of{found.t, found.u, found.cell, found.has_blank, found.has_label, Semiring::none(), Semiring::none()};
        if (found.cell < 0) return of;
        const Real label = arcs.label_weight(ahead && !diagonal ? found.t - 1 : found.t, found.label, found.above);
        if (!ahead)
            bad |= !(found.blank <= Real(HIGHEST_WEIGHT)) || !(found.label <= Real(HIGHEST_WEIGHT)) ||
                   (found.has_label && !(label <= Real(HIGHEST_WEIGHT)));
        if (found.has_blank) of.blank = Semiring::arc(found.blank);
        if (found.has_label) of.label = Semiring::arc(label);
        return of;
    }

    // The value of a cell, from those of the step before.
    DEVICE Value value(const Weighted<Semiring>& of, const Value* before) const {
        Value value = ahead && of.t == 0 && of.u == 0 ? Semiring::one() : Semiring::none();
        if (of.has_blank)
            value = Semiring::through(!ahead && arcs.blank_ends(of.t, of.u) ? Semiring::one() : before[of.u], of.blank);
        if (of.has_label) {
            const Value rest = ahead                              ? before[of.u - 1]
                               : arcs.label_ends(of.t, of.u) ? Semiring::one() : before[of.u + 1];
            value = Semiring::either(value, Semiring::through(rest, of.label));
        }
        return value;
    }

    // Two steps' values are exchanged in `shared`, or in `scratch` where a lattice is wider.
    DEVICE void run(Value* values, Value* shared, Value* scratch) {
        const long long columns = arcs.of.labels + 1;
        Value* const buffer = columns <= SHARED_COLUMNS ? shared : scratch;
        const auto take = [&](long long i, const Weighted<Semiring>& of) {
            if (of.cell < 0) return;
            values[of.cell] = buffer[(i & 1) * columns + of.u] = value(of, buffer + (~i & 1) * columns);
        };
#if defined(HOST)
        for (long long i = 0; i < steps; ++i) {
            const Range now = range(i);
            for (long long j = 0; j < now.end - now.start; ++j) take(i, weighted(fetch(i, now, j)));
        }
#else
        // A step is short, and all of it waits for the step before. So a thread's first cell, in most lattices its only one,
        // is loaded two steps ahead and its arcs are weighed one step ahead.
        const long long mine = threadIdx.x;
        Range now = range(0), next = range(1);
        Weighted<Semiring> ready = weighted(fetch(0, now, mine));
        const auto step = [&](long long i, const Fetched<Real>& fetched, Fetched<Real>& coming) {
            const Range later = range(i + 2);
            coming = fetch(i + 2, later, mine);
            take(i, ready);
            ready = weighted(fetched);
            for (long long j = mine + blockDim.x; j < now.end - now.start; j += blockDim.x) take(i, weighted(fetch(i, now, j)));
            __syncthreads();
            now = next;
            next = later;
        };
        // Two by turns, as a copy would wait for what is loaded. Past the last step there are no cells.
        Fetched<Real> odd = fetch(1, next, mine), even;
        for (long long i = 0; i < steps; i += 2) {
            step(i, odd, even);
            step(i + 1, even, odd);
        }
#endif
    }
};

// Returns whether it met a weight that is not finite.
template <typename Semiring, bool ahead, typename Real>
DEVICE bool walk(const Arcs<Real>& arcs, typename Semiring::Value* values, typename Semiring::Value* shared,
                 typename Semiring::Value* scratch) {
    Walk<Semiring, ahead, Real> walk(arcs);
    walk.run(values, shared, scratch);
    return walk.bad;
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
    typedef SumOfPaths<Real> Paths;
    SHARED(Scaled<Real>, shared, 2 * SHARED_COLUMNS);
    BLOCKS(item, 2 * count) {
        const long long b = item >> 1;
        const bool forward = (item & 1) == 0;
        const Arcs<Real> arcs{utterances[b], spans, log_blank, log_label, (int)topology, (Real)delay_penalty};
        bool bad = out_of_order(arcs.of, spans);
        Scaled<Real>* const row = scratch + item * 2 * scratch_columns;
        bad |= forward ? walk<Paths, true>(arcs, ahead, shared, row) : walk<Paths, false>(arcs, back, shared, row);
        bad = block_any(bad);
        if (forward || threadIdx.x != 0) continue;
        const double total = has_path(arcs) ? Paths::log(back[arcs.cell(0, 0)]) : -infinity<double>();
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
    SHARED(double, shared, 2 * SHARED_COLUMNS);
    BLOCKS(b, count) {
        const Arcs<Real> arcs{utterances[b], spans, log_blank, log_label, (int)topology, (Real)delay_penalty};
        const Utterance& of = arcs.of;
        double* const row = scratch + b * 2 * scratch_columns;
        // Comes back first, only to learn whether a weight is bad: the way ahead does not visit every arc.
        const bool bad = block_any(walk<BestPath, false>(arcs, ahead, shared, row) | out_of_order(of, spans));
        const double best = has_path(arcs) ? ahead[arcs.cell(0, 0)] : -infinity<double>();
        __syncthreads();
        walk<BestPath, true>(arcs, ahead, shared, row);
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
