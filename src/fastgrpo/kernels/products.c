/* Matrix products of few rows with weights laid out once: out = x W^T + bias, sums in float32.
 *
 * Weights lie in blocks of WIDE outputs; within a block, unit by unit of the inputs, as a tile reads them. A unit is a
 * pair of inputs where the processor multiplies pairs in half precision (vdpbf16ps), else one input, which is widened
 * in registers: memory sends half the bytes either way. Each output is one sum over the inputs in their order, whatever
 * rows stand beside it: a row's result depends on nothing but the row. Where the processor has matrix registers (AMX),
 * they make these sums, in an order of their own, for a process that has asked for them (`fastgrpo_use_matrices`).
 */

#include <omp.h>
#include <stdlib.h>

#include "common.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__) && (defined(EMULATED_MATRICES) || (defined(__AMX_TILE__) && defined(__AMX_BF16__)))
#define HAS_MATRICES 1
#else
#define HAS_MATRICES 0
#endif

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
#define OWN_BYTES (1 << 18) /* of tiles, up to which each thread lays its own: they stay in its second cache */
#define APART 64 /* numbers between the tiles of two threads: they share no line */
#define PART 256 /* units of a block that are laid out at a time: they stay in the second cache */
#define AHEAD 64  /* inputs whose weights are asked for early where a step is one tile: memory is slow */

/* Whether weights stay in the caches behind a tile's: they are read once a step of the engine, so that a caches' worth
 * of them drives out what the step needs besides, Python among it. Tried on Zen 4 alone. */
#define STAY (IS_ZEN_4 ? 0 : 3)

/* So many rows compute about as long as memory takes, and do not catch up with what comes late: they ask for weights
 * FAR bytes behind the early ones, too, into the second cache. Fewer rows lose by it, since that drives out what they
 * need, and more rows win nothing. Tried on Zen 4 alone. */
#define FAR 8192
static inline i64 find_far(i64 rows) { return IS_ZEN_4 && rows >= 7 && rows <= 20 ? FAR : 0; }

typedef float span __attribute__((vector_size(4 * SPAN), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * SPAN), aligned(4)));
typedef float packed_float;

#define UNIT_float 1
#define UNITS_float(inputs) (inputs)
#define NUMBERS_float WIDE /* of a block for one unit, as they lie in memory */
typedef float row_float; /* a row's unit */
typedef span weights_float;

static inline void read_float(const packed_float *from, span *low, span *high) {
    *low = *(const span *)from, *high = *(const span *)(from + SPAN);
}
static inline span repeat_float(float x) { return x - (span){0}; } /* minus nothing: one load for all lanes */
static inline span add_float(span sum, span x, span weights) { return sum + x * weights; }
static inline void place_float(packed_float *to, i64 output, const float *unit, i64 left) {
    to[output] = left > 0 ? *unit : 0;
}
static inline row_float join_float(const float *x, i64 left) { return (void)left, *x; }

typedef uint32_t packed_bf16;
#if HAS_MATRICES
#define INPUTS 32 /* that a matrix register has of each row: a layout has whole ones */
#else
#define INPUTS 2
#endif
#if defined(__AVX512BF16__)
#define UNIT_bf16 2
#define UNITS_bf16(inputs) (((inputs) + INPUTS - 1) / INPUTS * (INPUTS / 2))
#define NUMBERS_bf16 WIDE /* each output's two inputs, the first in the low half */
typedef uint32_t row_bf16;
typedef __m512bh weights_bf16;

static inline void read_bf16(const packed_bf16 *from, weights_bf16 *low, weights_bf16 *high) {
    *low = (weights_bf16)_mm512_loadu_si512(from), *high = (weights_bf16)_mm512_loadu_si512(from + SPAN);
}
static inline weights_bf16 repeat_bf16(row_bf16 x) { return (weights_bf16)_mm512_set1_epi32((int)x); }
static inline span add_bf16(span sum, weights_bf16 x, weights_bf16 weights) {
    return (span)_mm512_dpbf16_ps((__m512)sum, x, weights);
}
static inline void place_bf16(packed_bf16 *to, i64 output, const bf16 *unit, i64 left) {
    to[output] = (left > 0 ? unit[0] : 0) | (left > 1 ? (uint32_t)unit[1] << 16 : 0);
}
static inline row_bf16 join_bf16(const bf16 *x, i64 left) {
    return (INPUTS == 2 || left > 0 ? x[0] : 0) | (left > 1 ? (uint32_t)x[1] << 16 : 0);
}
#else
#define UNIT_bf16 1
#define UNITS_bf16(inputs) (inputs)
#define NUMBERS_bf16 SPAN /* output j of a block in the low half, output j + SPAN in the high one */
typedef float row_bf16;
typedef span weights_bf16;

static inline void read_bf16(const packed_bf16 *from, span *low, span *high) {
    bits both = *(const bits *)from;
    *low = (span)(both << 16), *high = (span)(both & 0xFFFF0000u);
}
static inline span repeat_bf16(row_bf16 x) { return repeat_float(x); }
static inline span add_bf16(span sum, span x, span weights) { return add_float(sum, x, weights); }
static inline void place_bf16(packed_bf16 *to, i64 output, const bf16 *unit, i64 left) {
    uint32_t weight = left > 0 ? *unit : 0, *both = to + output % SPAN;
    *both = output < SPAN ? (*both & 0xFFFF0000u) | weight : (*both & 0xFFFFu) | weight << 16;
}
static inline row_bf16 join_bf16(const bf16 *x, i64 left) { return (void)left, load_bf16(x); }
#endif

/* `outputs` rows of weights become outputs `first`, first + 1, ... of a layout, and what is left of their last block
 * zeros; outputs before `first` stay as they are. */
#define DEFINE_PACK(X)                                                                                                \
    void fastgrpo_pack_##X(const X *weight, packed_##X *layout, i64 first, i64 outputs, i64 inputs) {                 \
        i64 units = UNITS_##X(inputs);                                                                                \
        _Pragma("omp parallel for")                                                                                   \
        for (i64 block = first / WIDE; block <= (first + outputs - 1) / WIDE; block++)                                \
            for (i64 part = 0; part < units; part += PART)                                                            \
                for (i64 output = 0; output < WIDE; output++) {                                                       \
                    i64 row = block * WIDE + output - first, left = row < outputs ? inputs - part * UNIT_##X : 0;     \
                    if (row < 0) continue;                                                                            \
                    const X *from = weight + row * inputs + part * UNIT_##X;                                          \
                    packed_##X *to = layout + (block * units + part) * NUMBERS_##X;                                   \
                    i64 last = part + PART < units ? PART : units - part, i = 0;                                      \
                    for (; i < last && i < left / UNIT_##X; i++)                                                      \
                        place_##X(to + i * NUMBERS_##X, output, from + i * UNIT_##X, UNIT_##X);                       \
                    for (; i < last; i++)                                                                             \
                        place_##X(to + i * NUMBERS_##X, output, from + i * UNIT_##X, left - i * UNIT_##X);            \
                }                                                                                                     \
    }

DEFINE_PACK(bf16)
DEFINE_PACK(float)

/* R rows and one block of outputs: adds products of `units` units to sums [R, WIDE]. With each unit, weights are
 * asked for that come later, `pace` bytes behind those before, and those `far` bytes behind them if that is not 0. */
#define DEFINE_TILE(X, R)                                                                                             \
    static void tile_##X##_##R(const row_##X *rows, const packed_##X *weights, i64 units, float *sums,                \
                               const char *ahead, i64 pace, i64 far) {                                                \
        span low[R], high[R];                                                                                         \
        for (int r = 0; r < R; r++)                                                                                   \
            low[r] = *(const span *)(sums + r * WIDE), high[r] = *(const span *)(sums + r * WIDE + SPAN);             \
        for (i64 i = 0; i < units; i++, weights += NUMBERS_##X, rows += R, ahead += pace) {                           \
            weights_##X first, second;                                                                                \
            read_##X(weights, &first, &second);                                                                       \
            for (int line = 0; line < NUMBERS_##X; line += 16) {                                                      \
                __builtin_prefetch(ahead + line * sizeof *weights, 0, STAY);                                          \
                if (far) __builtin_prefetch(ahead + far + line * sizeof *weights, 0, 2);                              \
            }                                                                                                         \
            _Pragma("GCC unroll 12")                                                                                  \
            for (int r = 0; r < R; r++) {                                                                             \
                weights_##X x = repeat_##X(rows[r]);                                                                  \
                low[r] = add_##X(low[r], x, first), high[r] = add_##X(high[r], x, second);                            \
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

#define CASE(T, R)                                                                                                    \
    case R: tile_##T##_##R(rows, weights, units, sums, ahead, pace, far); break;

static inline void run_tile_bf16(i64 height, const row_bf16 *rows, const packed_bf16 *weights, i64 units,
                                 float *sums, const char *ahead, i64 pace, i64 far) {
    switch (height) {
#define X(R) CASE(bf16, R)
        TILES
#undef X
    }
}

static inline void run_tile_float(i64 height, const row_float *rows, const packed_float *weights, i64 units,
                                  float *sums, const char *ahead, i64 pace, i64 far) {
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

/* `height` rows of x, `stride` numbers apart, side by side in a tile, unit by unit. */
#define DEFINE_LAY(X)                                                                                                 \
    static inline void lay_##X(const X *x, i64 stride, i64 height, i64 inputs, row_##X *tile) {                       \
        i64 units = UNITS_##X(inputs), whole = inputs / UNIT_##X;                                                     \
        for (i64 row = 0; row < height; row++) {                                                                      \
            const X *from = x + row * stride;                                                                         \
            row_##X *to = tile + row;                                                                                 \
            for (i64 i = 0; i < whole; i++) to[i * height] = join_##X(from + i * UNIT_##X, UNIT_##X);                 \
            for (i64 i = whole; i < units; i++) to[i * height] = join_##X(from + i * UNIT_##X, inputs - i * UNIT_##X);\
        }                                                                                                             \
    }

DEFINE_LAY(bf16)
DEFINE_LAY(float)

/* `stride` numbers lie between the starts of two rows of x; out is dense. Of few rows each thread lays its own tiles:
 * all of them is less work than to fetch another core's, and two threads that write one tile take its lines from each
 * other at every unit. */
#define DEFINE_PRODUCT(X)                                                                                             \
    static int multiply_##X(const X *x, i64 stride, const packed_##X *layout, const X *bias, X *out, i64 rows,        \
                            i64 inputs, i64 outputs) {                                                                \
        i64 most = share_rows(rows, ROWS), blocks = (outputs + WIDE - 1) / WIDE;                                      \
        i64 units = UNITS_##X(inputs), step = STEP / UNIT_##X, early = AHEAD / UNIT_##X, size = most * units + APART; \
        i64 is_own = rows == most && most * units * (i64)sizeof(row_##X) <= OWN_BYTES;                                \
        row_##X *room = malloc((is_own ? omp_get_max_threads() : 1) * size * sizeof *room);                           \
        if (!room) return NO_MEMORY;                                                                                  \
        _Pragma("omp parallel if (rows * inputs * outputs > FEW)")                                                    \
        for (i64 start = 0; start < rows; start += most) {                                                            \
            i64 count = rows - start < most ? rows - start : most, group = share_rows(count, GROUP);                  \
            i64 groups = (count + group - 1) / group, thread = omp_get_thread_num(), threads = omp_get_num_threads(); \
            row_##X *tiles = is_own ? room + thread * size : room; /* one behind the other; none crosses groups */    \
            for (i64 row = 0, number = 0, height; row < count; row += height, number++) {                             \
                i64 left = group - row % group;                                                                       \
                height = find_height(left < count - row ? left : count - row);                                        \
                if (is_own || number % threads == thread)                                                             \
                    lay_##X(x + (start + row) * stride, stride, height, inputs, tiles + row * units);                 \
            }                                                                                                         \
            if (!is_own) {                                                                                            \
                _Pragma("omp barrier")                                                                                \
            }                                                                                                         \
            _Pragma("omp for")                                                                                        \
            for (i64 task = 0; task < groups * blocks; task++) {                                                      \
                i64 block = task / groups, from = task % groups * group; /* a thread has its own blocks */            \
                i64 to = from + group < count ? from + group : count;                                                 \
                const packed_##X *weights = layout + block * units * NUMBERS_##X;                                     \
                float sums[GROUP * WIDE];                                                                             \
                memset(sums, 0, (to - from) * WIDE * sizeof(float));                                                  \
                i64 bytes = NUMBERS_##X * sizeof *weights, num_tiles = count_tiles(to - from);                        \
                i64 pace = (bytes + num_tiles - 1) / num_tiles; /* the tiles of a step ask for the next step's */     \
                i64 far = find_far(to - from);                                                                        \
                for (i64 i = 0; i < units; i += step) {                                                               \
                    i64 part = units - i < step ? units - i : step;                                                   \
                    const packed_##X *own = weights + i * NUMBERS_##X;                                                \
                    const char *ahead = (const char *)(own + (num_tiles == 1 ? early : part) * NUMBERS_##X);          \
                    for (i64 row = from, height; row < to; row += height, ahead += part * pace) {                     \
                        height = find_height(to - row);                                                               \
                        run_tile_##X(height, tiles + row * units + i * height, own, part, sums + (row - from) * WIDE, \
                                     ahead, pace, far);                                                               \
                    }                                                                                                 \
                }                                                                                                     \
                i64 width = outputs - block * WIDE < WIDE ? outputs - block * WIDE : WIDE;                            \
                for (i64 row = from; row < to; row++)                                                                 \
                    for (i64 j = 0; j < width; j++) {                                                                 \
                        i64 output = block * WIDE + j;                                                                \
                        float sum = sums[(row - from) * WIDE + j];                                                    \
                        store_##X(out + (start + row) * outputs + output, bias ? sum + load_##X(bias + output) : sum);\
                    }                                                                                                 \
            }                                                                                                         \
        }                                                                                                             \
        free(room);                                                                                                   \
        return 0;                                                                                                     \
    }

DEFINE_PRODUCT(bf16)
DEFINE_PRODUCT(float)

#if HAS_MATRICES
#include "matrices.h"

static int uses_matrices;
#else
#define uses_matrices 0
#define multiply_in_matrices multiply_bf16
#endif

/* Sums in matrix registers from now on, or not; returns whether they are. The process must have been given them. */
int fastgrpo_use_matrices(i64 wanted) {
#if HAS_MATRICES
    uses_matrices = wanted != 0;
#endif
    return (void)wanted, uses_matrices;
}

int fastgrpo_product_bf16(const bf16 *x, i64 stride, const packed_bf16 *layout, const bf16 *bias, bf16 *out, i64 rows,
                          i64 inputs, i64 outputs) {
    if (!rows) return 0; /* which have no shares */
    if (uses_matrices) return multiply_in_matrices(x, stride, layout, bias, out, rows, inputs, outputs);
    return multiply_bf16(x, stride, layout, bias, out, rows, inputs, outputs);
}

int fastgrpo_product_float(const float *x, i64 stride, const packed_float *layout, const float *bias, float *out,
                           i64 rows, i64 inputs, i64 outputs) {
    return rows ? multiply_float(x, stride, layout, bias, out, rows, inputs, outputs) : 0;
}

/* Outputs of a block, and inputs of a step; layouts are padded to a multiple of either. */
i64 fastgrpo_block_width(void) { return WIDE; }
i64 fastgrpo_block_inputs(void) { return INPUTS; }
