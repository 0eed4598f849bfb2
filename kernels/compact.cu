// The cells that need a gradient: those that paths use. A cell of utterance b is dropped when the summed occupancy of its
// arcs is below floor (T_b + U_b) / cells_b, so that all dropped ones together stay below floor (T_b + U_b), without a sort.
// Utterances of weight 0 and those without a finite loss are dropped whole.
//
// An ordered scan in three launches (count, scan, write), without atomics and without blocks that wait for each other.
#include "processor.cuh"
#include "cells.cuh"

template <typename Real> struct Occupied {
    const Real* blank_occupancy;
    const Real* label_occupancy;
    Real floor;
    bool live;

    DEVICE Occupied(const Utterance& of, const Real* blank, const Real* label, const Real* loss, const Real* weights, double share)
        : blank_occupancy(blank), label_occupancy(label),
          floor((Real)(share * (double)(of.frames + of.labels) / (double)(of.frames * of.width))),
          live(is_finite(loss[of.index]) && !(weights && weights[of.index] == Real(0))) {}

    DEVICE bool operator()(long long cell) const {
        const Real used = blank_occupancy[cell] + label_occupancy[cell];
        return live && used > Real(0) && used >= floor;
    }
};

// Kept cells of every lattice row, one block per row.
template <typename Real>
KERNEL compact_count(long long rows, const Utterance* utterances, long long count, const Real* blank_occupancy,
                     const Real* label_occupancy, const Real* loss, const Real* weights, double floor, long long* counts) {
    BLOCKS(row, rows) {
        const Utterance& of = utterances[owner(utterances, count, &Utterance::rows, row)];
        const Occupied<Real> occupied(of, blank_occupancy, label_occupancy, loss, weights, floor);
        const long long start = of.cells + (row - of.rows) * of.width;
        long long kept = 0;
        PARALLEL(column, of.width) kept += occupied(start + column) ? 1 : 0;
        kept = block_sum(kept);
        if (threadIdx.x == 0) counts[row] = kept;
    }
}

// counts of n rows -> the number kept before each row, in place, and in all as item n. One block.
KERNEL compact_scan(long long n, long long* counts) {
    BLOCKS(block, 1) {
        long long before = block;
        for (long long start = 0; start <= n; start += blockDim.x) {
            const long long i = start + threadIdx.x;
            const long long mine = i < n ? counts[i] : 0;
            const long long upto = before + block_scan<Sum>(mine);
            if (i <= n) counts[i] = upto - mine;
            before += block_sum(mine);
        }
    }
}

// cells[k]: the k-th kept cell, in order. positions[c]: how many kept cells lie before cell c, with the number of all cells
// as last index; cell c is kept where positions[c + 1] > positions[c].
template <typename Real>
KERNEL compact_write(long long rows, const Utterance* utterances, long long count, const Real* blank_occupancy,
                     const Real* label_occupancy, const Real* loss, const Real* weights, double floor,
                     const long long* before_row, long long* cells, long long* positions) {
    BLOCKS(row, rows) {
        const Utterance& of = utterances[owner(utterances, count, &Utterance::rows, row)];
        const Occupied<Real> occupied(of, blank_occupancy, label_occupancy, loss, weights, floor);
        const long long first_cell = of.cells + (row - of.rows) * of.width;
        long long before = before_row[row];
        for (long long start = 0; start < of.width; start += blockDim.x) {
            const long long column = start + threadIdx.x, cell = first_cell + column;
            const bool kept = column < of.width && occupied(cell);
            const long long upto = before + block_scan<Sum>((long long)(kept ? 1 : 0));
            if (column < of.width) positions[cell] = upto - (kept ? 1 : 0);
            if (kept) cells[upto - 1] = cell;
            before += block_sum((long long)(kept ? 1 : 0));
        }
        if (row == rows - 1 && threadIdx.x == 0) positions[first_cell + of.width] = before;
    }
}

EXPORT(compact_count, float32)
EXPORT(compact_count, float64)
EXPORT(compact_scan)
EXPORT(compact_write, float32)
EXPORT(compact_write, float64)
