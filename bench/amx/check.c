/* Products in matrix registers beside sums in double and beside those without, on a processor without a system: see
 * README.md. A program of its own, for the emulator; `tests/test_kernels.py` has the same laws for what runs here. */

#include "bare.h"
#include "products.c"

static uint64_t state = 1;

static float draw(void) { /* in [-1, 1) */
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return ((int32_t)(state >> 33) - (1 << 30)) / (float)(1 << 30);
}

static bf16 *draw_many(i64 count) {
    bf16 *numbers = take(count * sizeof *numbers);
    for (i64 i = 0; i < count; i++) store_bf16(numbers + i, draw());
    return numbers;
}

/* `gap` numbers lie between rows of x. Returns whether all is right. */
static int check(i64 rows, i64 inputs, i64 outputs, int has_bias, i64 gap) {
    forget();
    i64 stride = inputs + gap, blocks = (outputs + WIDE - 1) / WIDE;
    bf16 *x = draw_many(rows * stride), *weights = draw_many(outputs * inputs), *bias = draw_many(outputs);
    bf16 *out = take(rows * outputs * 2), *plain = take(rows * outputs * 2), *alone = take(outputs * 2);
    packed_bf16 *layout = take(blocks * UNITS_bf16(inputs) * WIDE * sizeof *layout);
    memset(layout, 0, blocks * UNITS_bf16(inputs) * WIDE * sizeof *layout);
    fastgrpo_pack_bf16(weights, layout, 0, outputs, inputs);
    if (!has_bias) bias = 0;
    fastgrpo_use_matrices(0);
    int failed = fastgrpo_product_bf16(x, stride, layout, bias, plain, rows, inputs, outputs);
    failed |= !fastgrpo_use_matrices(1);
    failed |= fastgrpo_product_bf16(x, stride, layout, bias, out, rows, inputs, outputs);
    i64 wrong = 0, other_bits = 0, apart = 0;
    for (i64 row = 0; row < rows; row++)
        for (i64 output = 0; output < outputs; output++) {
            double sum = bias ? load_bf16(bias + output) : 0, got = load_bf16(out + row * outputs + output);
            for (i64 i = 0; i < inputs; i++)
                sum += (double)load_bf16(x + row * stride + i) * load_bf16(weights + output * inputs + i);
            wrong += !(__builtin_fabs(got - sum) <= __builtin_fabs(sum) / 256 + 1e-4);
            apart += out[row * outputs + output] != plain[row * outputs + output];
        }
    for (i64 row = 0; row < rows; row += 1 + rows / 5) {
        fastgrpo_product_bf16(x + row * stride, stride, layout, bias, alone, 1, inputs, outputs);
        other_bits += memcmp(alone, out + row * outputs, outputs * 2) != 0;
    }
    say("rows ", rows), say(" inputs ", inputs), say(" outputs ", outputs), say(": wrong ", wrong);
    say(", of other bits alone ", other_bits), say(", rounded otherwise than without ", apart), say_line("");
    return !failed && !wrong && !other_bits;
}

int main(void) {
    const i64 rows[] = {1, 2, 5, 15, 16, 17, 31, 32, 33, 40, 257, 300};
    int is_right = 1;
    for (i64 i = 0; i < 12; i++) is_right &= check(rows[i], 41 + 7 * i, 33 + i, i % 2, i % 3);
    is_right &= check(4, 576, 96, 0, 0), is_right &= check(64, 576, 64, 1, 0), is_right &= check(16, 1536, 32, 0, 5);
    is_right &= check(3, 3, 5, 1, 0);
    say_line(is_right ? "ALL RIGHT" : "WRONG");
    return 0;
}
