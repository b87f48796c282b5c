/* What the kernels share: half precision, an exponential, the maximum of a vector. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef int64_t i64;

#if defined(__AVX512F__) && (defined(__znver3__) || defined(__znver4__) || defined(__znver5__))
#define IS_ZEN_4 1 /* or later; gcc 12 calls it znver3 */
#else
#define IS_ZEN_4 0
#endif

#define NO_MEMORY (-1) /* what a kernel that takes some returns where there is none; what it was to write is unfinished */

#define LANES 16
#define FEW 16384 /* numbers; fewer are not worth a second thread */

static inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float load_bf16(const bf16 *x) { return bits_to_float((uint32_t)*x << 16); }
static inline float load_f32(const float *x) { return *x; }

static inline uint32_t round_bits(float value) {
    uint32_t bits = float_to_bits(value);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded; /* a NaN stays one */
}

static inline void store_bf16(bf16 *x, float value) { *x = (bf16)round_bits(value); }
static inline void store_f32(float *x, float value) { *x = value; }
static inline float as_bf16(float value) { return bits_to_float(round_bits(value) << 16); }
static inline float as_f32(float value) { return value; }

/* e^x for x <= 0; 0 below the smallest normal number */
static inline float exp_negative(float x) {
    float shifted = __builtin_fmaf(x, 1.44269504f, 12582912.0f); /* 1.5 * 2^23: rounds to an integer */
    float n = shifted - 12582912.0f;
    float r = __builtin_fmaf(n, -0.693145752f, x);
    r = __builtin_fmaf(n, -1.42860677e-6f, r);
    float p = 1.98756915e-4f;
    p = __builtin_fmaf(p, r, 1.39819995e-3f);
    p = __builtin_fmaf(p, r, 8.33345191e-3f);
    p = __builtin_fmaf(p, r, 4.16657962e-2f);
    p = __builtin_fmaf(p, r, 1.66666655e-1f);
    p = __builtin_fmaf(p, r, 0.5f);
    p = __builtin_fmaf(p, r * r, r) + 1.0f;
    float scale = bits_to_float((float_to_bits(shifted) + 127) << 23);
    return x < -87.0f ? 0.0f : p * scale;
}

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

/* `a` where the mask is set, else `b`. */
static inline vec choose(lanes mask, vec a, vec b) { return (vec)((mask & (lanes)a) | (~mask & (lanes)b)); }

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif
#define SWAP_8(x) PICK(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define SWAP_4(x) PICK(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define SWAP_2(x) PICK(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define SWAP_1(x) PICK(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)

static inline vec max_vec(vec a, vec b) { return choose(a > b, a, b); }

static inline float max_lane(vec x) {
    x = max_vec(x, SWAP_8(x)), x = max_vec(x, SWAP_4(x)), x = max_vec(x, SWAP_2(x));
    return max_vec(x, SWAP_1(x))[0];
}

static inline float sum_lane(vec x) {
    x += SWAP_8(x), x += SWAP_4(x), x += SWAP_2(x);
    return (x + SWAP_1(x))[0];
}

static inline float find_max(const float *x, i64 width) {
    vec most = (vec){0} - INFINITY;
    i64 i = 0;
    for (; i + LANES <= width; i += LANES) most = max_vec(*(const vec *)(x + i), most);
    float rest = max_lane(most);
    for (; i < width; i++) rest = x[i] > rest ? x[i] : rest;
    return rest;
}

#define STRIP 64 /* candidates that are looked through together for the next best */

/* The `most` best of `width` scores, best first, of equals the first; scores taken become -infinity. */
static inline void take_best(float *score, i64 width, i64 most, float *values, i64 *places) {
    i64 strips = (width + STRIP - 1) / STRIP;
    float tops[strips];
    for (i64 strip = 0; strip < strips; strip++)
        tops[strip] = find_max(score + strip * STRIP, width - strip * STRIP < STRIP ? width - strip * STRIP : STRIP);
    for (i64 n = 0; n < most; n++) {
        i64 best = 0;
        for (i64 strip = 1; strip < strips; strip++)
            if (tops[strip] > tops[best]) best = strip;
        i64 start = best * STRIP, size = width - start < STRIP ? width - start : STRIP, place = 0;
        while (place + 1 < size && score[start + place] != tops[best]) place++;
        values[n] = tops[best], places[n] = start + place;
        score[start + place] = -INFINITY;
        tops[best] = find_max(score + start, size);
    }
}

#define load_float load_f32
#define store_float store_f32
#define as_float as_f32

#define BLOCK 64 /* cached positions that stand together, as in blocks.py */

/* Where a position of a row stands in the cache, one beyond its blocks anywhere. */
static inline i64 find_place(const i64 *blocks, i64 most_blocks, i64 position) {
    i64 block = position / BLOCK;
    return blocks[block < most_blocks ? block : most_blocks - 1] + position % BLOCK;
}
