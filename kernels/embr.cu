// Expected edit distance over the renormalised N-best list, and its gradient: of hypothesis i it is
// -p_i sum_j p_j (d_i - d_j) / temperature, a sum of differences, so that equal distances give exactly 0.
#include "processor.cuh"

// What counts of an utterance's hypotheses: PADDING has no length, REPEATED is equal to an earlier one, whose probability would
// count twice, and UNREADABLE has a length that is none.
enum Standing { PADDING = 0, COUNTED, REPEATED, UNREADABLE };

// The standing of every hypothesis, given its labels, `columns` apart, and their counts as edit_distance_labels makes them;
// without labels their lengths, of which none is REPEATED. One block per utterance.
KERNEL embr_standing(long long batch, long long members, const long long* labels, long long columns, const long long* counts,
                     unsigned char* standing) {
    BLOCKS(b, batch) {
        PARALLEL(i, members) {
            const long long mine = b * members + i, count = counts[mine];
            unsigned char found = count >= 0 ? COUNTED : labels && count == -2 ? UNREADABLE : PADDING;
            for (long long other = b * members; labels && found == COUNTED && other < mine; ++other) {
                if (counts[other] != count) continue;
                long long same = 0;
                while (same < count && labels[mine * columns + same] == labels[other * columns + same]) ++same;
                if (same == count) found = REPEATED;
            }
            standing[mine] = found;
        }
    }
}

// Losses (batch) and, where there is a gradient, those of sum_b weights_b loss_b. `share` (batch, members) is scratch. Without
// `standing` all hypotheses count. One block per utterance.
template <typename T>
KERNEL embr_loss(long long batch, long long members, const T* nll, const Compute<T>* distances, const unsigned char* standing,
                 double temperature, const T* reference_nll, double interpolation, const Compute<T>* weights, double infeasible,
                 double* share, Compute<T>* loss, T* gradient, T* reference_gradient) {
    typedef Compute<T> Real;
    BLOCKS(b, batch) {
        const T* const x = nll + b * members;
        const Real* const d = distances + b * members;
        const unsigned char* const standing_of = standing ? standing + b * members : nullptr;
        double* const weight_of = share + b * members;
        double least = infinity<double>();
        int bad = 0;
        PARALLEL(i, members) {
            const int stands = standing_of ? standing_of[i] : COUNTED;
            const double mine = (double)load(x + i);
            if (stands == UNREADABLE || (stands == COUNTED && (is_nan(mine) || mine == -infinity<double>()))) bad = 1;
            if (stands == COUNTED && mine < least) least = mine;
        }
        least = -block_max(-least);
        double sum = 0.0;
        PARALLEL(i, members) {
            const bool counts = (!standing_of || standing_of[i] == COUNTED) && (double)load(x + i) < infinity<double>();
            const double mine = counts ? exponential((least - (double)load(x + i)) / temperature) : 0.0;
            if (mine > 0.0 && !is_finite(d[i])) bad = 1;
            weight_of[i] = mine;
            sum += mine;
        }
        sum = block_sum(sum);
        bad = block_max(bad);
        const bool empty = !(sum > 0.0);
        const double added = interpolation != 0.0 ? interpolation * (double)load(reference_nll + b) : 0.0;
        const bool live = !bad && !empty && is_finite(added);
        const double upstream = weights ? (double)weights[b] : 1.0;
        double risk = 0.0;
        PARALLEL(i, members) {
            const double p = live ? weight_of[i] / sum : 0.0;
            double against = 0.0;
            if (p > 0.0) {
                risk += p * (double)d[i];
                for (long long j = 0; gradient && j < members; ++j)
                    if (weight_of[j] > 0.0) against += weight_of[j] / sum * ((double)d[i] - (double)d[j]);
            }
            if (gradient) store(gradient + b * members + i, live ? (Real)(-upstream * p * against / temperature) : Real(0));
        }
        risk = block_sum(risk);
        if (threadIdx.x == 0) {
            const double value = (bad ? nan_value<double>() : empty ? infeasible : risk) + added;
            loss[b] = (Real)value;
            if (reference_gradient) store(reference_gradient + b, is_finite(value) ? (Real)(interpolation * upstream) : Real(0));
        }
    }
}

EXPORT(embr_standing)
EXPORT_FLOATS(embr_loss)
