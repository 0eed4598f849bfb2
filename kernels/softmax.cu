// One cell's V logits -> the log-probabilities of its two arcs and its normaliser; and, once the lattice has said how often
// a path takes each arc, the gradient of the loss by the logits.
//
//   softmax      blank = x[blank] - z, label = x[y] - z, z = log sum_v exp x[v]
//   normalized   x are log-probabilities already: blank = x[blank], label = x[y]
//   hat          blank = log sigmoid(x[blank]), label = x[y] - z + log(1 - sigmoid(x[blank])), z without the blank
//
// A cell whose normaliser is not finite (a NaN or +inf logit) gets NaN arcs; -inf is a probability of zero.
//
// Where several processes hold a shard of the vocabulary each, softmax_forward leaves the logits of those of the two classes
// that its own shard has and the logarithm of its own sum; softmax_share and softmax_join make arcs of all shards', about two
// exchanges between the processes.
#include "processor.cuh"
#include "cells.cuh"
#include "rows.cuh"

enum Distribution { SOFTMAX = 0, NORMALIZED = 1, HAT = 2 };

static constexpr long long CELLS_OF_BLOCK = 1024;  // where a cell is a few numbers

// log(1 + exp(x)) without overflow.
template <typename Real> DEVICE Real softplus(Real x) {
    return larger(x, Real(0)) + log_of_one_plus(exponential(x < Real(0) ? x : -x));
}

template <typename Real> DEVICE Real sigmoid(Real x) { return Real(1) / (Real(1) + exponential(-x)); }

// This thread's share of the largest of x[begin] .. x[end - 1]. A NaN among them is left to the sum.
template <typename R> DEVICE typename R::Real highest_in(const R row, long long begin, long long end) {
    typename R::Real highest = -infinity<typename R::Real>();
    SIMD_MAX(highest)
    PARALLEL(i, end - begin) {
        const typename R::Real x = row.logit(begin + i);
        highest = x > highest ? x : highest;
    }
    return highest;
}

// This thread's share of the sum of exp(x[v] - highest) over [begin, end); with `keep` they replace the logits.
template <typename R>
DEVICE typename R::Real exponentials_in(const R row, long long begin, long long end, typename R::Real highest, bool keep) {
    typename R::Real sum = 0;
    if (keep) {
        SIMD_SUM(sum)
        PARALLEL(i, end - begin) {
            const typename R::Real e = exponential(row.logit(begin + i) - highest);
            sum += e;
            store(row.at(begin + i), e);
        }
    } else {
        SIMD_SUM(sum)
        PARALLEL(i, end - begin) sum += exponential(row.logit(begin + i) - highest);
    }
    return sum;
}

// sum_v exp x[v] = sum * exp(base), without class `omitted` if that is not below 0.
template <typename Real> struct Exponentials { Real base, sum; };

// Nothing but -inf sums to 0, not to NaN.
template <typename Real> DEVICE Real base_of(Real highest) { return highest > -infinity<Real>() ? highest : Real(0); }

// Over the block; with `keep` exp(x[v] - base) replaces x[v], but for the omitted class, where what remains is nobody's.
template <typename R> DEVICE Exponentials<typename R::Real> sum_row(const R row, long long classes, long long omitted, bool keep) {
    typedef typename R::Real Real;
    if constexpr (R::in_packets) {
        InPackets<R> held(row, classes);
        const auto unless_omitted = [omitted](Real x, long long v) { return v == omitted ? -infinity<Real>() : x; };
        const auto load_logits = [&] {
            held.load_batch();
            if (omitted >= 0) held.each([&](Real& x, long long v) { x = unless_omitted(x, v); });
        };
        Real highest = -infinity<Real>(), sum = 0;
        held.load_edge();
        held.each_batch([&] {
            load_logits();
            held.each([&](Real& x, long long) { highest = x > highest ? x : highest; });
        });
        Real at_edge = held.edge >= 0 ? unless_omitted(held.edge_logit(), held.edge) : -infinity<Real>();
        highest = at_edge > highest ? at_edge : highest;  // a NaN is left to the sum
        const Real base = base_of(block_max(highest));
        at_edge = exponential(at_edge - base);
        if (keep && held.edge >= 0) store(row.at(held.edge), at_edge);
        held.each_batch([&] {
            if (!held.one_batch()) load_logits();
            held.each([&](Real& x, long long) { sum += x = exponential(x - base); });
            if (keep) held.store_batch();
        });
        return {base, block_sum(sum + at_edge)};
    } else {
        // The classes on either side of the omitted one.
        const long long before = omitted >= 0 ? omitted : 0, after = omitted >= 0 ? omitted + 1 : 0;
        const Real base = base_of(block_max(larger(highest_in(row, 0, before), highest_in(row, after, classes))));
        return {base, block_sum(exponentials_in(row, 0, before, base, keep) + exponentials_in(row, after, classes, base, keep))};
    }
}

// out[v] = value for all v.
template <typename Out, typename Real> DEVICE void fill_row(const Out out, long long classes, Real value) {
    if constexpr (Out::in_packets) {
        InPackets<Out> held(out, classes);
        if (held.edge >= 0) store(out.at(held.edge), value);
        held.each([&](Real& x, long long) { x = value; });
        held.each_batch([&] { held.store_batch(); });
    } else {
        SIMD
        PARALLEL(v, classes) store(out.at(v), value);
    }
}

// out[v] = of(x[v]) for all v. Both may be the same row.
template <typename In, typename Out, typename F> DEVICE void map_row(const In in, const Out out, long long classes, const F of) {
    if constexpr (In::in_packets && Out::in_packets) {
        InPackets<In, Out> held(in, out, classes);
        held.load_edge();
        held.each_batch([&] {
            held.load_batch();
            held.each([&](typename In::Real& x, long long) { x = of(x); });
            held.store_batch();
        });
        if (held.edge >= 0) store(out.at(held.edge), of(held.edge_logit()));
    } else {
        SIMD
        PARALLEL(v, classes) store(out.at(v), of(in.logit(v)));
    }
}

// The arcs' log-probabilities of a cell from their logits, -inf where there is no label, and z. HAT without any class beside
// the blank has no labels to normalise.
template <typename Real>
DEVICE void write_arcs(Real blank_logit, Real label_logit, Real z, int distribution, bool only_blank, Real* log_blank,
                       Real* log_label) {
    const Real no_blank = distribution == HAT ? -softplus(blank_logit) : Real(0);
    const Real blank_value = distribution == HAT ? -softplus(-blank_logit) : blank_logit - z;
    const bool labels_valid = is_finite(z) || (distribution == HAT && only_blank && z == -infinity<Real>());
    const bool valid = labels_valid && !is_nan(no_blank) && blank_logit < infinity<Real>();
    const bool has_label = label_logit > -infinity<Real>();
    *log_blank = valid ? blank_value : nan_value<Real>();
    *log_label = !valid ? nan_value<Real>() : has_label ? label_logit - z + no_blank : -infinity<Real>();
}

// Writes the arcs' log-probabilities of one row. With `keep`, x[v] is overwritten by exp(x[v] - max) (the blank of HAT by
// its sigmoid) and the normaliser is the factor that makes probabilities of them, so that the gradient needs no second exp.
// A blank or a target below 0 is none of the row's classes. With `log_sum` the row is a shard's: the arcs get their logits, and
// `log_sum` gets z, or +inf where something is not valid: the largest of several numbers may pass over a NaN.
template <typename R, typename Real>
DEVICE void arcs_of_row(const R row, long long classes, long long blank, long long target, int distribution, bool keep,
                        Real* log_blank, Real* log_label, Real* normaliser, Real* log_sum) {
    const Real blank_logit = blank >= 0 ? row.logit(blank) : -infinity<Real>();
    const Real label_logit = target >= 0 ? row.logit(target) : -infinity<Real>();
    if (distribution == NORMALIZED) {
        if (threadIdx.x == 0) {
            *log_blank = blank_logit;
            *log_label = label_logit;
            *normaliser = Real(0);
        }
        return;
    }
    const bool without_blank = distribution == HAT && blank >= 0;
    const Exponentials<Real> all = sum_row(row, classes, without_blank ? blank : -1, keep);
    if (threadIdx.x == 0) {
        if (keep && without_blank) store(row.at(blank), sigmoid(blank_logit));
        const Real z = all.base + logarithm(all.sum);
        *normaliser = keep ? Real(1) / all.sum : z;
        if (!log_sum) {
            write_arcs(blank_logit, label_logit, z, distribution, classes == 1, log_blank, log_label);
        } else {
            const bool valid = !is_nan(z) && !is_nan(blank_logit);
            *log_sum = valid ? z : infinity<Real>();
            *log_blank = valid ? blank_logit : Real(0);
            *log_label = valid ? label_logit : Real(0);
        }
    }
}

// Where class v lies in a shard, or -1.
DEVICE long long in_shard(long long v, long long first_class, long long classes) {
    return v >= first_class && v < first_class + classes ? v - first_class : -1;
}

// Cells [begin, begin + n) of the group, one block each. Logits of cell (b, t, u): with `packed`, row (cell - begin) of
// stride by_label; else at b, t, u - first_t of the batch tensor. All strides count elements. `bias` (V,), or null, is added
// to the logits; it comes with dense rows. A row holds the classes [first_class, first_class + classes) of the vocabulary;
// `log_sum` is null where these are all of it.
template <typename T>
KERNEL softmax_forward(long long n, long long begin, const Utterance* utterances, long long count, const Span* spans,
                       T* logits, long long packed, long long by_utterance, long long by_frame, long long by_label,
                       long long by_class, long long classes, long long first_class, long long vocabulary,
                       const Compute<T>* bias, const void* targets, long long wide_targets, long long targets_by_utterance,
                       long long targets_by_label, long long blank, long long distribution, long long keep,
                       Compute<T>* log_blank, Compute<T>* log_label, Compute<T>* normaliser, Compute<T>* log_sum) {
    typedef Compute<T> Real;
    BLOCKS(i, n) {
        const long long cell = begin + i;
        const Cell at = locate(utterances, count, spans, cell);
        const Utterance& of = utterances[at.utterance];
        const bool real = at.label < end_label(of, spans, at.frame);
        const long long target =
            real ? target_of(of, targets, wide_targets, targets_by_utterance, targets_by_label, at.label) : -1;
        // A target read from the device may be anything; past the last label it is -1 by definition.
        const bool allowed = target >= 0 && target < vocabulary && !(distribution == HAT && target == blank);
        if (!real || (at.label < of.labels && !allowed)) {
            if (threadIdx.x == 0) {
                log_blank[cell] = log_label[cell] = normaliser[cell] = real && !log_sum ? nan_value<Real>() : Real(0);
                if (log_sum) log_sum[cell] = real ? infinity<Real>() : Real(0);
            }
            continue;
        }
        T* start = packed ? logits + i * by_label
                          : logits + of.index * by_utterance + at.frame * by_frame +
                                (at.label - first_label(of, spans, at.frame)) * by_label;
        if (by_class == 1) prefetch_row(start + by_label, classes);
        const auto work = [&](auto row) {
            arcs_of_row(row, classes, in_shard(blank, first_class, classes), in_shard(target, first_class, classes),
                        (int)distribution, keep != 0, log_blank + cell, log_label + cell, normaliser + cell,
                        log_sum ? log_sum + cell : nullptr);
        };
        if (by_class != 1)
            work(Row<false, false, T>{start, by_class, nullptr});
        else if (bias)
            work(Row<true, true, T>{start, 1, bias});
        else
            work(Row<true, false, T>{start, 1, nullptr});
    }
}

// A shard's share of a cell's sum of exponentials, as a factor of the largest shard's.
template <typename Real> KERNEL softmax_share(long long n, const Real* log_sum, const Real* largest, Real* share) {
    BLOCKS(block, (n + CELLS_OF_BLOCK - 1) / CELLS_OF_BLOCK) {
        const long long begin = block * CELLS_OF_BLOCK;
        SIMD
        PARALLEL(i, smaller(n - begin, CELLS_OF_BLOCK)) {
            const Real most = largest[begin + i];
            // Where all sums are 0, or one is not valid, the largest says it all.
            share[begin + i] = is_finite(most) ? exponential(log_sum[begin + i] - most) : Real(1);
        }
    }
}

// Arcs of cells from the arcs' logits, of which each shard had its own, and from the largest and the shares of all; and the
// normaliser of this shard's own logits, or with `keep` of what softmax_forward kept of them.
template <typename Real>
KERNEL softmax_join(long long n, const Real* log_sum, const Real* largest, const Real* shares, long long vocabulary,
                    long long distribution, long long keep, Real* log_blank, Real* log_label, Real* normaliser) {
    BLOCKS(block, (n + CELLS_OF_BLOCK - 1) / CELLS_OF_BLOCK) {
        const long long begin = block * CELLS_OF_BLOCK;
        PARALLEL(i, smaller(n - begin, CELLS_OF_BLOCK)) {
            const long long cell = begin + i;
            const Real z = largest[cell] + logarithm(shares[cell]), own = log_sum[cell];
            write_arcs(log_blank[cell], log_label[cell], z, (int)distribution, vocabulary == 1, log_blank + cell,
                       log_label + cell);
            const bool any = own > -infinity<Real>();
            normaliser[cell] = !keep ? z : any ? normaliser[cell] * exponential(own - z) : Real(0);
        }
    }
}

// d loss / d x[v] = w ((gb + ge) p[v] - [v = blank] gb - [v = y] ge), gb and ge the occupancies of the cell's arcs.
// HAT: the blank gets w ((gb + ge) sigmoid - gb), a label w ge (q[v] - [v = y]), q the softmax without blank.
// One loop over the classes, then the two that an arc takes, if the row has them. `finished` is the last to see a value.
template <typename In, typename Out, typename Real, typename Finish>
DEVICE void gradient_of_row(const In in, const Out out, long long classes, long long blank, long long target,
                            int distribution, bool kept, Real normaliser, Real blank_share, Real label_share,
                            const Finish finished) {
    const Real both = blank_share + label_share;
    const Real blank_value = blank < 0 ? Real(0) : in.logit(blank);
    const Real target_value = target < 0 ? Real(0) : in.logit(target);
    const bool unused = blank_share == Real(0) && label_share == Real(0);
    const Real factor = distribution == HAT ? label_share : both;
    __syncthreads();  // in and out may be the same row: every thread has read the blank and the label before one writes
    if (unused || distribution == NORMALIZED) {
        fill_row(out, classes, Real(0));
    } else if (kept) {
        const Real scale = factor * normaliser;
        map_row(in, out, classes, [=](Real x) { return finished(scale * x); });
    } else {
        map_row(in, out, classes, [=](Real x) { return finished(factor * exponential(x - normaliser)); });
    }
    __syncthreads();
    if (threadIdx.x != 0 || unused) return;
    const bool same = target == blank;
    if (distribution == NORMALIZED) {
        store(out.at(blank), finished(-(blank_share + (same ? label_share : Real(0)))));
        if (target >= 0 && !same) store(out.at(target), finished(-label_share));
        return;
    }
    const Real target_p = kept ? target_value * normaliser : exponential(target_value - normaliser);
    const Real blank_p = distribution == HAT ? (kept ? blank_value : sigmoid(blank_value))
                         : kept              ? blank_value * normaliser
                                             : exponential(blank_value - normaliser);
    if (blank >= 0) store(out.at(blank), finished(both * blank_p - blank_share - (same ? label_share : Real(0))));
    if (target >= 0 && !same) store(out.at(target), finished(factor * target_p - label_share));
}

// Gradient of cells [begin, begin + n) of the list `cells` (of the group, where cells is null) into a tile, row i for the
// list's item i. Logits: row i of their tile, to which `bias` (V,), or null, is added; or with `kept` what softmax_forward
// kept of the group's, in the cell's row.
template <typename T, typename G>
KERNEL softmax_backward(long long n, long long begin, const long long* cells, const Utterance* utterances, long long count,
                        const Span* spans, const T* logits, long long kept, long long classes, long long first_class,
                        const Compute<T>* bias, const void* targets, long long wide_targets, long long targets_by_utterance,
                        long long targets_by_label, long long blank, long long distribution, const Compute<T>* normaliser,
                        const Compute<T>* blank_occupancy, const Compute<T>* label_occupancy, const Compute<T>* weights,
                        double constant_weight, G* gradient) {
    typedef Compute<T> Real;
    BLOCKS(i, n) {
        const long long cell = cells ? cells[begin + i] : begin + i;
        const Cell at = locate(utterances, count, spans, cell);
        const Utterance& of = utterances[at.utterance];
        const Real weight = weights ? weights[of.index] * Real(constant_weight) : Real(constant_weight);
        // An utterance of weight 0 or of zero occupancy may hold NaN: neither its logits nor its targets are looked at.
        const bool none = weight == Real(0) || blank_occupancy[cell] + label_occupancy[cell] < Real(NEGLIGIBLE);
        const Real blank_share = none ? Real(0) : weight * blank_occupancy[cell];
        const Real label_share = none ? Real(0) : weight * label_occupancy[cell];
        const Real tiny = Real(NEGLIGIBLE) * (weight < Real(0) ? -weight : weight);
        const long long target =
            none ? -1 : target_of(of, targets, wide_targets, targets_by_utterance, targets_by_label, at.label);
        const T* const in = logits + (kept ? cell : i) * classes;
        const auto not_tiny = [tiny](Real value) { return value < tiny && value > -tiny ? Real(0) : value; };
        const auto work = [&](auto row) {
            gradient_of_row(row, Row<true, false, G>{gradient + i * classes, 1, nullptr}, classes,
                            in_shard(blank, first_class, classes), in_shard(target, first_class, classes),
                            (int)distribution, kept != 0, normaliser[cell], blank_share, label_share, not_tiny);
        };
        if (bias && !kept)
            work(Row<true, true, const T>{in, 1, bias});
        else
            work(Row<true, false, const T>{in, 1, nullptr});
    }
}

// Gradient of the caller's own logits, one block per row: of a (B, frames, columns, V) tensor, padding included, which gets
// zeros; or of the packed (cells, V). May be written over the logits, row by row. Before the weights, values are brought
// into [-clamp, clamp].
template <typename T>
KERNEL softmax_backward_logits(long long n, const Utterance* utterances, long long count, const Span* spans, long long frames,
                       long long columns, const T* logits, long long packed, long long by_utterance, long long by_frame,
                       long long by_label, long long by_class, long long classes, const void* targets,
                       long long wide_targets, long long targets_by_utterance, long long targets_by_label, long long blank,
                       long long distribution, const Compute<T>* normaliser, const Compute<T>* blank_occupancy,
                       const Compute<T>* label_occupancy, const Compute<T>* weights, double clamp, T* gradient,
                       long long out_by_utterance, long long out_by_frame, long long out_by_label, long long out_by_class) {
    typedef Compute<T> Real;
    BLOCKS(i, n) {
        const Cell at = packed ? locate(utterances, count, spans, i)
                               : Cell{i / (frames * columns), i / columns % frames, i % columns};
        const Utterance& of = utterances[at.utterance];
        const long long start = packed || at.frame >= of.frames ? 0 : first_label(of, spans, at.frame);
        const long long column = packed ? 0 : at.label, label = at.label + start;
        const long long cell = packed ? i : of.cells + at.frame * of.width + column;
        const bool real = at.frame < of.frames && column < of.width && label < end_label(of, spans, at.frame);
        const Real weight = weights && real ? weights[of.index] : Real(1);
        const bool none = !real || weight == Real(0) || (blank_occupancy[cell] == Real(0) && label_occupancy[cell] == Real(0));
        const Real blank_share = none ? Real(0) : weight * blank_occupancy[cell];
        const Real label_share = none ? Real(0) : weight * label_occupancy[cell];
        const long long target =
            none ? -1 : target_of(of, targets, wide_targets, targets_by_utterance, targets_by_label, label);
        const Real z = none ? Real(0) : normaliser[cell];
        const T* in = logits + (packed ? i * by_label : of.index * by_utterance + at.frame * by_frame + column * by_label);
        T* out = gradient + (packed ? i * out_by_label
                                    : of.index * out_by_utterance + at.frame * out_by_frame + column * out_by_label);
        const Real limit = Real(clamp) * (weight < Real(0) ? -weight : weight);
        const auto clamped = [limit](Real value) { return value > limit ? limit : value < -limit ? -limit : value; };
        const auto as_it_is = [](Real value) { return value; };
        const auto work = [&](auto in_row, auto out_row, auto finished) {
            gradient_of_row(in_row, out_row, classes, blank, target, (int)distribution, false, z, blank_share, label_share,
                            finished);
        };
        const bool bounded = clamp < infinity<double>();
        if (by_class == 1 && out_by_class == 1) {
            prefetch_row(in + by_label, classes);
            const Row<true, false, const T> in_row{in, 1, nullptr};
            const Row<true, false, T> out_row{out, 1, nullptr};
            if (bounded) work(in_row, out_row, clamped);
            else work(in_row, out_row, as_it_is);
        } else {
            const Row<false, false, const T> in_row{in, by_class, nullptr};
            const Row<false, false, T> out_row{out, out_by_class, nullptr};
            if (bounded) work(in_row, out_row, clamped);
            else work(in_row, out_row, as_it_is);
        }
    }
}

EXPORT(softmax_forward, float16)
EXPORT(softmax_forward, bfloat16)
EXPORT(softmax_forward, float32)
EXPORT(softmax_forward, float64)
EXPORT(softmax_share, float32)
EXPORT(softmax_share, float64)
EXPORT(softmax_join, float32)
EXPORT(softmax_join, float64)
EXPORT(softmax_backward, float32, float32)
EXPORT(softmax_backward, float32, float16)
EXPORT(softmax_backward, float32, bfloat16)
EXPORT(softmax_backward, float64, float64)
EXPORT(softmax_backward_logits, float16)
EXPORT(softmax_backward_logits, bfloat16)
EXPORT(softmax_backward_logits, float32)
EXPORT(softmax_backward_logits, float64)
