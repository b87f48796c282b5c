/* Products in matrix registers (AMX), part of products.c: 16 rows by 16 outputs by 32 inputs in one instruction.
 *
 * Registers 0 to 3 hold sums of up to two pieces of rows by a block's two halves, 4 and 5 inputs of these rows, 6 and 7
 * weights. All pieces of a call are of one height; a row's sums are the same in any.
 */

#pragma once

#define HEIGHT 16     /* rows of a register: rows of x, or pairs of inputs of the weights */
#define PAIRS 16      /* of inputs, in a register's row */
#define MOST_ROWS 256 /* at a time: they stay in the second cache */
#define EARLY 4096    /* bytes ahead of the weights that are read from memory */

typedef struct {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16]; /* of a row of each register */
    uint8_t rows[16];
} shapes;

#if defined(EMULATED_MATRICES) /* the instructions in C, for processors that have none */
static _Thread_local uint32_t emulated[8][HEIGHT][PAIRS];
static _Thread_local shapes emulated_shapes;

static inline void take_shapes(const shapes *wanted) { emulated_shapes = *wanted, memset(emulated, 0, sizeof emulated); }
static inline void release_registers(void) { emulated_shapes = (shapes){0}; }
static inline void clear_register(int to) { memset(emulated[to], 0, sizeof emulated[to]); }
static inline void load_register(int to, const void *from, i64 stride) {
    for (int r = 0; r < emulated_shapes.rows[to]; r++)
        memcpy(emulated[to][r], (const char *)from + r * stride, emulated_shapes.bytes[to]);
}
static inline void keep_register(int of, void *to, i64 stride) {
    for (int r = 0; r < emulated_shapes.rows[of]; r++)
        memcpy((char *)to + r * stride, emulated[of][r], emulated_shapes.bytes[of]);
}
static inline void multiply_registers(int to, int x, int weights) {
    for (int r = 0; r < emulated_shapes.rows[to]; r++)
        for (int output = 0; output < emulated_shapes.bytes[to] / 4; output++) {
            float even = 0, odd = 0;
            for (int pair = 0; pair < emulated_shapes.bytes[x] / 4; pair++) {
                uint32_t a = emulated[x][r][pair], b = emulated[weights][pair][output];
                even = __builtin_fmaf(bits_to_float(a << 16), bits_to_float(b << 16), even);
                odd = __builtin_fmaf(bits_to_float(a & 0xFFFF0000u), bits_to_float(b & 0xFFFF0000u), odd);
            }
            emulated[to][r][output] = float_to_bits(bits_to_float(emulated[to][r][output]) + (even + odd));
        }
}
#else
static inline void take_shapes(const shapes *wanted) {
    __asm__ volatile("ldtilecfg %0" ::"m"(*wanted) : "memory"); /* gcc 12's own names eight bytes of it */
}
static inline void release_registers(void) { _tile_release(); }
#define clear_register(to) _tile_zero(to)
#define load_register(to, from, stride) _tile_loadd(to, from, stride)
#define keep_register(of, to, stride) _tile_stored(of, to, stride)
#define multiply_registers(to, x, weights) _tile_dpbf16ps(to, x, weights)
#endif

#define ASK_FOR(weights)                                                                                              \
    for (int line = 0; line < HEIGHT * WIDE; line += 16)                                                              \
        __builtin_prefetch((const char *)((weights) + line) + EARLY, 0, STAY)

/* Sums [height, WIDE] of a piece of rows, `units` pairs each, by one block of outputs. */
static void sum_piece(const uint32_t *rows, const packed_bf16 *weights, i64 units, i64 is_first, float *sums) {
    clear_register(0); clear_register(1);
    for (i64 i = 0; i < units; i += PAIRS, weights += PAIRS * WIDE) {
        load_register(6, weights, 4 * WIDE); load_register(7, weights + SPAN, 4 * WIDE);
        load_register(4, rows + i, 4 * units);
        multiply_registers(0, 4, 6); multiply_registers(1, 4, 7);
        if (is_first) ASK_FOR(weights);
    }
    keep_register(0, sums, 4 * WIDE); keep_register(1, sums + SPAN, 4 * WIDE);
}

/* The same of two pieces, one behind the other, and of their sums. */
static void sum_pieces(const uint32_t *rows, i64 height, const packed_bf16 *weights, i64 units, i64 is_first,
                       float *sums) {
    const uint32_t *others = rows + height * units;
    clear_register(0); clear_register(1); clear_register(2); clear_register(3);
    for (i64 i = 0; i < units; i += PAIRS, weights += PAIRS * WIDE) {
        load_register(6, weights, 4 * WIDE); load_register(7, weights + SPAN, 4 * WIDE);
        load_register(4, rows + i, 4 * units);
        multiply_registers(0, 4, 6); multiply_registers(1, 4, 7);
        load_register(5, others + i, 4 * units);
        multiply_registers(2, 5, 6); multiply_registers(3, 5, 7);
        if (is_first) ASK_FOR(weights);
    }
    keep_register(0, sums, 4 * WIDE); keep_register(1, sums + SPAN, 4 * WIDE); sums += height * WIDE;
    keep_register(2, sums, 4 * WIDE); keep_register(3, sums + SPAN, 4 * WIDE);
}

static int multiply_in_matrices(const bf16 *x, i64 stride, const packed_bf16 *layout, const bf16 *bias, bf16 *out,
                                i64 rows, i64 inputs, i64 outputs) {
    i64 most = share_rows(rows, MOST_ROWS), height = share_rows(most, HEIGHT), units = UNITS_bf16(inputs);
    i64 blocks = (outputs + WIDE - 1) / WIDE, room = (most + height - 1) / height * height;
    uint32_t *copies = aligned_alloc(64, room * units * sizeof *copies); /* of rows, padded to whole registers */
    if (!copies) return NO_MEMORY;
    memset(copies, 0, room * units * sizeof *copies);
    shapes wanted = {.palette = 1};
    for (int which = 0; which < 8; which++)
        wanted.bytes[which] = 4 * PAIRS, wanted.rows[which] = which < 6 ? height : HEIGHT;
#pragma omp parallel if (rows * inputs * outputs > FEW)
    {
        take_shapes(&wanted);
        for (i64 start = 0; start < rows; start += most) {
            i64 count = rows - start < most ? rows - start : most, pieces = (count + height - 1) / height;
#pragma omp for
            for (i64 row = 0; row < count; row++)
                memcpy(copies + row * units, x + (start + row) * stride, inputs * sizeof *x);
#pragma omp for
            for (i64 block = 0; block < blocks; block++) {
                const packed_bf16 *weights = layout + block * units * WIDE;
                float sums[2 * HEIGHT * WIDE] __attribute__((aligned(64)));
                i64 first = block * WIDE, width = outputs - first < WIDE ? outputs - first : WIDE;
                for (i64 piece = 0; piece < pieces; piece += 2) {
                    i64 from = piece * height, to = from + 2 * height < count ? from + 2 * height : count;
                    if (piece + 1 < pieces)
                        sum_pieces(copies + from * units, height, weights, units, !piece, sums);
                    else
                        sum_piece(copies + from * units, weights, units, !piece, sums);
                    for (i64 row = from; row < to; row++)
                        for (i64 j = 0; j < width; j++) {
                            float sum = sums[(row - from) * WIDE + j];
                            store_bf16(out + (start + row) * outputs + first + j,
                                       bias ? sum + load_bf16(bias + first + j) : sum);
                        }
                }
            }
        }
        release_registers();
    }
    free(copies);
    return 0;
}
