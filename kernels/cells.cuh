// The packed cells of a group of utterances: which (t, u) a stored cell is, and which cells a lattice row has.
//
// Utterance b of the group owns cells [cells, cells + frames * width): row t, stored after row t - 1, holds the labels
// u in [first_t, first_t + width), of which those with u <= labels are real. A full lattice has first_t = 0 and
// width = labels + 1; a band has other first labels and a smaller width, and is the same object to every kernel.
#pragma once

struct Utterance {
    long long index;   // position in the batch, of its rows in the encoder, predictor, targets and weights
    long long cells;   // offset of its first cell in the group's per-cell arrays
    long long rows;    // offset of its first row in the group's per-row arrays
    long long frames;  // T_b >= 1
    long long labels;  // U_b >= 0
    long long width;   // cells stored per row
};

struct Cell { long long utterance, frame, label; };

DEVICE long long first_label(const Utterance& of, const int* first, long long frame) {
    return first ? (long long)first[of.rows + frame] : 0;
}

DEVICE bool in_row(const Utterance& of, const int* first, long long frame, long long label) {
    const long long column = label - first_label(of, first, frame);
    return column >= 0 && column < of.width && label <= of.labels;
}

DEVICE long long cell_at(const Utterance& of, const int* first, long long frame, long long label) {
    return of.cells + frame * of.width + label - first_label(of, first, frame);
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

DEVICE Cell locate(const Utterance* utterances, long long count, const int* first, long long cell) {
    const long long b = owner(utterances, count, &Utterance::cells, cell);
    const Utterance& of = utterances[b];
    const long long frame = (cell - of.cells) / of.width;
    return {b, frame, first_label(of, first, frame) + (cell - of.cells) - frame * of.width};
}
