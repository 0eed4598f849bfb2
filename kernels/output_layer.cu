// The rows of the joint's output layer that a sampled softmax looks at: gathered, and their gradients scattered back. A row of
// `ids` is the blank, then other classes in rising order; slot k of it stands for class ids[k].
#include "processor.cuh"
#include "cells.cuh"

// The slot of every label among the ids, one block per utterance: -1 for one that is not among them, and past the last label.
// ids_by_utterance is 0 where all have the same.
KERNEL output_layer_targets(long long count, const Utterance* utterances, const void* targets, long long wide_targets,
                            long long targets_by_utterance, long long targets_by_label, const int* ids,
                            long long ids_by_utterance, long long slots, long long columns, int* found) {
    BLOCKS(b, count) {
        const Utterance& of = utterances[b];
        const int* const sorted = ids + of.index * ids_by_utterance;
        PARALLEL(u, columns) {
            const long long target = target_of(of, targets, wide_targets, targets_by_utterance, targets_by_label, u);
            const long long slot = first_not_below(sorted, 1, slots, target);
            const bool there = slot < slots && sorted[slot] == target;
            found[of.index * columns + u] = target == sorted[0] && u < of.labels ? 0 : there ? (int)slot : -1;
        }
    }
}

// Row k of `rows`: row ids[k] of the weight, one block each; and of its bias, if there is one, less the logarithm of the
// probability with which the class was drawn, if that is given. Slots have NaN whose class does not exist, or that are not in the
// order that makes each class one slot's.
template <typename T, typename Out>
KERNEL output_layer_gather(long long slots, const int* ids, const float* probability, long long blank, long long classes,
                           const T* weight, long long by_class, long long by_feature, long long features, const T* bias,
                           long long bias_by_class, Out* rows, Compute<T>* offsets) {
    typedef Compute<T> Real;
    BLOCKS(k, slots) {
        const long long v = ids[k];
        const bool ordered = k == 0 ? v == blank : v != blank && (k == 1 || v > ids[k - 1]);
        const bool there = ordered && v >= 0 && v < classes;
        Out* const out = rows + k * features;
        if (there) {
            const T* const in = weight + v * by_class;
            SIMD
            PARALLEL(h, features) store(out + h, Compute<Out>(load(in + h * by_feature)));
        } else {
            PARALLEL(h, features) store(out + h, nan_value<Compute<Out>>());
        }
        if (offsets && threadIdx.x == 0) {
            const Real own = bias && there ? Real(load(bias + v * bias_by_class)) : Real(0);
            offsets[k] = probability ? own - logarithm(Real(probability[k])) : own;
        }
    }
}

// Adds row k of the gradient of gathered rows to row ids[k] of the whole layer's; ids are distinct.
template <typename Real>
KERNEL output_layer_scatter(long long slots, const int* ids, long long classes, long long features, const Real* rows,
                            const Real* offsets, Real* weight, Real* bias) {
    BLOCKS(k, slots) {
        const long long v = ids[k];
        if (v < 0 || v >= classes) continue;
        SIMD
        PARALLEL(h, features) weight[v * features + h] += rows[k * features + h];
        if (bias && threadIdx.x == 0) bias[v] += offsets[k];
    }
}

EXPORT(output_layer_targets)
EXPORT(output_layer_gather, float16, float16)
EXPORT(output_layer_gather, float16, float32)
EXPORT(output_layer_gather, bfloat16, bfloat16)
EXPORT(output_layer_gather, bfloat16, float32)
EXPORT(output_layer_gather, float32, float32)
EXPORT(output_layer_gather, float64, float64)
EXPORT(output_layer_scatter, float32)
EXPORT(output_layer_scatter, float64)
