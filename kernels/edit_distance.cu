// Edit distance of pairs of label sequences, and how many insertions and deletions its best alignment has.
//
// A value of the table is one integer: distance, insertions and deletions side by side. Their minimum is the least distance and,
// of the alignments that have it, the one with the fewest insertions; insertions less deletions are the difference of the
// lengths, so that is the one with the fewest deletions and the most substitutions, too. One integer to compare, no path to trace.
#include "processor.cuh"

static constexpr int COUNT_BITS = 21;
static constexpr long long SUBSTITUTION = 1ll << 2 * COUNT_BITS;
static constexpr long long INSERTION = SUBSTITUTION + (1ll << COUNT_BITS);
static constexpr long long DELETION = SUBSTITUTION + 1;
// The longest reference whose three diagonals lie in shared memory.
static constexpr int SHARED_LABELS = 1023;

// The labels of every sequence, `columns` apart, and how many they are, without those equal to `blank` if `leave_out`: -1 for a
// length below 0, -2 for one beyond `columns`. Sequence s is member s % members of utterance s / members. One block each.
KERNEL edit_distance_labels(long long sequences, long long members, const void* labels, long long wide, long long by_utterance,
                            long long by_member, long long by_label, long long columns, const long long* lengths,
                            long long leave_out, long long blank, long long* found, long long* counts) {
    BLOCKS(s, sequences) {
        const long long length = lengths[s], real = length < 0 || length > columns ? 0 : length;
        const long long first = s / members * by_utterance + s % members * by_member;
        long long before = 0;
        for (long long start = 0; start < real; start += blockDim.x) {
            const long long i = start + threadIdx.x, at = first + i * by_label;
            const long long label = i >= real ? 0 : wide ? ((const long long*)labels)[at] : (long long)((const int*)labels)[at];
            const long long kept = i < real && !(leave_out && label == blank) ? 1 : 0;
            const long long upto = before + block_scan<Sum>(kept);
            if (kept) found[s * columns + upto - 1] = label;
            before += block_sum(kept);
        }
        if (threadIdx.x == 0) counts[s] = length < 0 ? -1 : length > columns ? -2 : before;
    }
}

// total, insertions, deletions and substitutions of every hypothesis and its utterance's reference, -1 where one of them has no
// length. One block per pair goes along the anti-diagonals of the table, of which it keeps three: in `scratch`, 3 (columns + 1)
// a pair, where a reference may be too long for shared memory.
KERNEL edit_distance_counts(long long pairs, long long members, const long long* hypotheses, long long hypothesis_columns,
                            const long long* hypothesis_counts, const long long* references, long long reference_columns,
                            const long long* reference_counts, long long* scratch, int* total, int* insertions, int* deletions,
                            int* substitutions) {
    SHARED(long long, diagonals, 3 * (SHARED_LABELS + 1));
    BLOCKS(pair, pairs) {
        const long long m = hypothesis_counts[pair], n = reference_counts[pair / members];
        if (m < 0 || n < 0) {
            if (threadIdx.x == 0) total[pair] = insertions[pair] = deletions[pair] = substitutions[pair] = -1;
            continue;
        }
        const long long* const hypothesis = hypotheses + pair * hypothesis_columns;
        const long long* const reference = references + pair / members * reference_columns;
        const long long stride = scratch ? reference_columns + 1 : SHARED_LABELS + 1;
        long long* now = scratch ? scratch + pair * 3 * stride : diagonals;
        long long* last = now + stride;
        long long* before_last = last + stride;
        // Entry i of diagonal d: the first i labels of the reference against the first d - i of the hypothesis.
        for (long long d = 0; d <= m + n; ++d) {
            if (threadIdx.x == 0) {
                if (d <= m) now[0] = d * INSERTION;
                if (d <= n) now[d] = d * DELETION;
            }
            const long long from = larger(1ll, d - m), to = smaller(n, d - 1);
            const long long* const opposite = hypothesis + d - 1 - from;
            SIMD
            PARALLEL(k, to - from + 1) {
                const long long i = from + k;
                const long long matched = before_last[i - 1] + (reference[i - 1] == opposite[-k] ? 0 : SUBSTITUTION);
                now[i] = smaller(matched, smaller(last[i - 1] + DELETION, last[i] + INSERTION));
            }
            __syncthreads();
            long long* const oldest = before_last;
            before_last = last;
            last = now;
            now = oldest;
        }
        if (threadIdx.x == 0) {
            const long long best = last[n], mask = (1ll << COUNT_BITS) - 1;
            const int wrong = (int)(best >> 2 * COUNT_BITS), more = (int)(best >> COUNT_BITS & mask), less = (int)(best & mask);
            total[pair] = wrong;
            insertions[pair] = more;
            deletions[pair] = less;
            substitutions[pair] = wrong - more - less;
        }
    }
}

EXPORT(edit_distance_labels)
EXPORT(edit_distance_counts)
