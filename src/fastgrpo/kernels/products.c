/* Matrix products of few rows with weights laid out once: out = x W^T + bias, sums in float32.
 *
 * Weights lie in blocks of WIDE outputs; within a block, input by input, as a tile reads them. Half precision is widened
 * in registers, so that memory sends half the bytes and no product needs a processor that multiplies it. Each output
 * is one sum over the inputs in their order, whatever rows stand beside it: a row's result depends on nothing but the row.
 */

#include <stdlib.h>

#include "common.h"

#if defined(__AVX512F__)
#define SPAN 16 /* numbers in a register */
#define TILES X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)
#define TALLEST 12 /* rows of a tile: two sums a row, two weights and one input share 32 registers */
#else
#define SPAN 8
#define TILES X(1) X(2) X(3) X(4) X(5) X(6)
#define TALLEST 6
#endif
#define WIDE (2 * SPAN)
#define STEP 192  /* inputs after which the next tile takes its turn: weights and rows stay in the nearest cache */
#define ROWS 240  /* rows at a time at most */
#define GROUP 120 /* rows of one task at most; half of ROWS */
#define AHEAD 64  /* inputs whose weights are asked for early where a step is one tile: memory is slow */

typedef float span __attribute__((vector_size(4 * SPAN), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * SPAN), aligned(4)));
typedef uint32_t packed_bf16; /* output j of a block in the low half, output j + SPAN in the high one */
typedef float packed_float;

#define NUMBERS_bf16 SPAN /* of a block for one input, as they lie in memory */
#define NUMBERS_float WIDE

static inline void widen_bf16(const packed_bf16 *from, span *low, span *high) {
    bits both = *(const bits *)from;
    *low = (span)(both << 16), *high = (span)(both & 0xFFFF0000u);
}

static inline void widen_float(const packed_float *from, span *low, span *high) {
    *low = *(const span *)from, *high = *(const span *)(from + SPAN);
}

static inline void place_bf16(packed_bf16 *to, i64 output, bf16 weight) {
    to[output % SPAN] |= (uint32_t)weight << (output < SPAN ? 0 : 16);
}

static inline void place_float(packed_float *to, i64 output, float weight) { to[output] = weight; }

/* `outputs` rows of weights become outputs `first`, first + 1, ... of a layout that was filled with zeros. */
#define DEFINE_PACK(X)                                                                                                \
    void fastgrpo_pack_##X(const X *weight, packed_##X *layout, i64 first, i64 outputs, i64 inputs) {                 \
        _Pragma("omp parallel for")                                                                                   \
        for (i64 block = first / WIDE; block <= (first + outputs - 1) / WIDE; block++)                                \
            for (i64 output = 0; output < WIDE; output++) {                                                           \
                i64 row = block * WIDE + output - first;                                                              \
                if (row < 0 || row >= outputs) continue;                                                              \
                const X *from = weight + row * inputs;                                                                \
                packed_##X *to = layout + block * inputs * NUMBERS_##X;                                               \
                for (i64 i = 0; i < inputs; i++, to += NUMBERS_##X) place_##X(to, output, from[i]);                   \
            }                                                                                                         \
    }

DEFINE_PACK(bf16)
DEFINE_PACK(float)

/* R rows and one block of outputs: adds products of `inputs` inputs to sums [R, WIDE]. With each input, weights are
 * asked for that come later, `pace` bytes behind those before. */
#define DEFINE_TILE(X, R)                                                                                             \
    static void tile_##X##_##R(const float *rows, const packed_##X *weights, i64 inputs, float *sums,                 \
                               const char *ahead, i64 pace) {                                                         \
        span low[R], high[R];                                                                                         \
        for (int r = 0; r < R; r++)                                                                                   \
            low[r] = *(const span *)(sums + r * WIDE), high[r] = *(const span *)(sums + r * WIDE + SPAN);             \
        for (i64 i = 0; i < inputs; i++, weights += NUMBERS_##X, rows += R, ahead += pace) {                          \
            span first, second;                                                                                       \
            widen_##X(weights, &first, &second);                                                                      \
            for (int line = 0; line < NUMBERS_##X; line += 16)                                                        \
                __builtin_prefetch(ahead + line * sizeof *weights);                                                   \
            _Pragma("GCC unroll 12")                                                                                  \
            for (int r = 0; r < R; r++) {                                                                             \
                span x = rows[r] - (span){0}; /* minus nothing: one load for all lanes */                             \
                low[r] += x * first, high[r] += x * second;                                                           \
            }                                                                                                         \
        }                                                                                                             \
        for (int r = 0; r < R; r++)                                                                                   \
            *(span *)(sums + r * WIDE) = low[r], *(span *)(sums + r * WIDE + SPAN) = high[r];                         \
    }

#define X(R) DEFINE_TILE(bf16, R)
TILES
#undef X
#define X(R) DEFINE_TILE(float, R)
TILES
#undef X

static inline i64 count_tiles(i64 rows) { return (rows + TALLEST - 1) / TALLEST; }

/* Rows of the next tile, where so many are left: as few tiles as can be, and all alike. */
static inline i64 find_height(i64 left) { return (left + count_tiles(left) - 1) / count_tiles(left); }

#define CASE(T, R) \
    case R: tile_##T##_##R(rows, weights, inputs, sums, ahead, pace); break;

static inline void run_tile_bf16(i64 height, const float *rows, const packed_bf16 *weights, i64 inputs, float *sums,
                                const char *ahead, i64 pace) {
    switch (height) {
#define X(R) CASE(bf16, R)
        TILES
#undef X
    }
}

static inline void run_tile_float(i64 height, const float *rows, const packed_float *weights, i64 inputs, float *sums,
                                 const char *ahead, i64 pace) {
    switch (height) {
#define X(R) CASE(float, R)
        TILES
#undef X
    }
}

/* Rows of each of as few parts as hold `rows` of them with at most `most` in each: parts alike. */
static inline i64 share_rows(i64 rows, i64 most) {
    i64 parts = (rows + most - 1) / most;
    return (rows + parts - 1) / parts;
}

/* `stride` numbers lie between the starts of two rows of x; out is dense. */
#define DEFINE_PRODUCT(X)                                                                                             \
    void fastgrpo_product_##X(const X *x, i64 stride, const packed_##X *layout, const X *bias, X *out, i64 rows,      \
                              i64 inputs, i64 outputs) {                                                              \
        i64 most = share_rows(rows, ROWS), blocks = (outputs + WIDE - 1) / WIDE;                                      \
        float *tiles = malloc(most * inputs * sizeof(float)); /* rows of a tile side by side, input by input */       \
        _Pragma("omp parallel if (rows * inputs * outputs > FEW)")                                                    \
        for (i64 start = 0; start < rows; start += most) {                                                            \
            i64 count = rows - start < most ? rows - start : most, group = share_rows(count, GROUP);                  \
            i64 groups = (count + group - 1) / group;                                                                 \
            _Pragma("omp for")                                                                                        \
            for (i64 row = 0; row < count; row++) {                                                                   \
                i64 first = row / group * group, left = first + group < count ? group : count - first, height;        \
                while (first + (height = find_height(left)) <= row) first += height, left -= height;                  \
                const X *from = x + (start + row) * stride;                                                           \
                float *to = tiles + first * inputs + row - first;                                                     \
                for (i64 i = 0; i < inputs; i++) to[i * height] = load_##X(from + i);                                 \
            }                                                                                                         \
            _Pragma("omp for")                                                                                        \
            for (i64 task = 0; task < groups * blocks; task++) {                                                      \
                i64 block = task / groups, from = task % groups * group; /* a thread has its own blocks */            \
                i64 to = from + group < count ? from + group : count;                                                 \
                const packed_##X *weights = layout + block * inputs * NUMBERS_##X;                                    \
                float sums[GROUP * WIDE];                                                                             \
                memset(sums, 0, (to - from) * WIDE * sizeof(float));                                                  \
                i64 bytes = NUMBERS_##X * sizeof *weights, num_tiles = count_tiles(to - from);                        \
                i64 pace = (bytes + num_tiles - 1) / num_tiles; /* the tiles of a step ask for the next step's */     \
                for (i64 i = 0; i < inputs; i += STEP) {                                                              \
                    i64 size = inputs - i < STEP ? inputs - i : STEP;                                                 \
                    const packed_##X *own = weights + i * NUMBERS_##X;                                                \
                    const char *ahead = (const char *)(own + (num_tiles == 1 ? AHEAD : size) * NUMBERS_##X);          \
                    for (i64 row = from, height; row < to; row += height, ahead += size * pace) {                     \
                        height = find_height(to - row);                                                               \
                        run_tile_##X(height, tiles + row * inputs + i * height, own, size, sums + (row - from) * WIDE,\
                                     ahead, pace);                                                                    \
                    }                                                                                                 \
                }                                                                                                     \
                i64 width = outputs - block * WIDE < WIDE ? outputs - block * WIDE : WIDE;                            \
                for (i64 row = from; row < to; row++)                                                                 \
                    for (i64 j = 0; j < width; j++) {                                                                 \
                        i64 output = block * WIDE + j;                                                                \
                        float sum = sums[(row - from) * WIDE + j];                                                    \
                        store_##X(out + (start + row) * outputs + output, bias ? sum + load_##X(bias + output) : sum); \
                    }                                                                                                 \
            }                                                                                                         \
        }                                                                                                             \
        free(tiles);                                                                                                  \
    }

DEFINE_PRODUCT(bf16)
DEFINE_PRODUCT(float)

/* Outputs of a block; layouts are padded to a multiple of it. */
i64 fastgrpo_block_width(void) { return WIDE; }
