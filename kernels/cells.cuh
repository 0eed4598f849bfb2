// The packed cells of a group of utterances: which (t, u) a stored cell is, and which cells a lattice row has.
//
// Utterance b of the group owns cells [cells, cells + frames * width): row t, stored after row t - 1, begins with the label
// first_t, and of its cells those with u < end_t are real. A full lattice has first_t = 0, end_t = width = labels + 1; a band
// or an alignment-restricted lattice has other rows, and is the same object to every kernel.
#pragma once

enum Topology { REGULAR = 0, MODIFIED = 1, CONSTRAINED = 2 };

// An occupancy below this is taken for 0 where it goes into matrix products: what is made of it would be subnormal, and some
// processors take a hundred times longer for those. All that an utterance loses by it is less than 1e-20 of its gradient.
static constexpr double NEGLIGIBLE = 1e-30;

struct Utterance {
    long long index;   // position in the batch, of its rows in the encoder, predictor, targets and weights
    long long cells;   // offset of its first cell in the group's per-cell arrays
    long long rows;    // offset of its first row in the group's per-row arrays
    long long frames;  // T_b >= 1
    long long labels;  // U_b >= 0
    long long width;   // cells stored per row
    long long encoder; // position of its encoder rows, which utterances may share
};

struct Cell { long long utterance, frame, label; };

// The labels of one lattice row; null stands for full rows. 0 <= first and end <= labels + 1; a row may be empty, and one
// that ends below 0 is an error of whoever made it.
struct Span { int first, end; };

DEVICE long long first_label(const Utterance& of, const Span* spans, long long frame) {
    return spans ? (long long)spans[of.rows + frame].first : 0;
}

DEVICE long long end_label(const Utterance& of, const Span* spans, long long frame) {
    return spans ? (long long)spans[of.rows + frame].end : of.labels + 1;
}

DEVICE bool in_row(const Utterance& of, const Span* spans, long long frame, long long label) {
    return label >= first_label(of, spans, frame) && label < end_label(of, spans, frame);
}

DEVICE long long cell_at(const Utterance& of, const Span* spans, long long frame, long long label) {
    return of.cells + frame * of.width + label - first_label(of, spans, frame);
}

// The utterance that owns item `wanted` of an array in which utterance b starts at utterances[b].*start.
DEVICE long long owner(const Utterance* utterances, long long count, long long Utterance::*start, long long wanted) {
    long long low = 0, high = count;
    while (high - low > 1) {
        const long long middle = (low + high) / 2;
        if (utterances[middle].*start <= wanted) low = middle;
        else high = middle;
    }
    return low;
}

DEVICE Cell locate(const Utterance* utterances, long long count, const Span* spans, long long cell) {
    const long long b = owner(utterances, count, &Utterance::cells, cell);
    const Utterance& of = utterances[b];
    const long long frame = (cell - of.cells) / of.width;
    return {b, frame, first_label(of, spans, frame) + (cell - of.cells) - frame * of.width};
}

// targets[b, u], or -1 past the last label. A label outside [0, classes) makes the cell invalid.
template <typename Label>
DEVICE long long target_of(const Utterance& of, const void* targets, long long by_utterance, long long by_label, long long label) {
    if (label >= of.labels) return -1;
    return (long long)((const Label*)targets)[of.index * by_utterance + label * by_label];
}

DEVICE long long target_of(const Utterance& of, const void* targets, long long wide, long long by_utterance,
                           long long by_label, long long label) {
    return wide ? target_of<long long>(of, targets, by_utterance, by_label, label)
                : target_of<int>(of, targets, by_utterance, by_label, label);
}
