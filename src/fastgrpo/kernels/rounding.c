/* Rounding of weights to bfloat16 in which sums keep what single numbers lose: see `fastgrpo.weights.round_evenly`. */

#include "common.h"

void fastgrpo_round_evenly(const float *values, bf16 *out, i64 rows, i64 columns, i64 by_row, i64 by_column) {
#pragma omp parallel for if (rows * columns > FEW)
    for (i64 row = 0; row < rows; row++) {
        const float *from = values + row * columns;
        bf16 *to = out + row * columns;
        uint32_t first = (uint32_t)row * (uint32_t)by_row;
        for (i64 column = 0; column < columns; column++) {
            uint32_t bits = float_to_bits(from[column]);
            uint32_t threshold = (first + (uint32_t)column * (uint32_t)by_column) & 0xFFFF;
            uint32_t is_finite = (bits & 0x7F800000) != 0x7F800000;
            to[column] = (bf16)(is_finite ? (bits + threshold) >> 16 : round_bits(from[column]));
        }
    }
}
