/* What a decoder layer does between its matrix products: places, norms, rotation and cache write,
 * activation; attention.c has the rest. Half precision is rounded where transformers rounds.
 *
 * A row's result depends on nothing but the row: the order of its sums is fixed by its own length, never by its
 * neighbours or the number of threads.
 */

#include "common.h"

/* ---- places ------------------------------------------------------------------------------------------------ */

/* Packs the nodes in use of each row: token, position, place in the cache; and where each row's first one is. A node sees
 * `lengths` positions and the ancestors among `seen` more, of which the last are the new nodes. */
void fastgrpo_lay_out(const i64 *nodes, const i64 *counts, const uint8_t *visible, const i64 *lengths,
                      const i64 *blocks, i64 rows, i64 most_nodes, i64 seen, i64 most_blocks, i64 *tokens,
                      i64 *positions, i64 *places, i64 *starts) {
    for (i64 row = 0, t = 0; row < rows; row++) {
        starts[row] = t;
        for (i64 node = 0; node < counts[row]; node++, t++) {
            const uint8_t *sees = visible + (row * most_nodes + node) * seen;
            i64 depth = 0;
            for (i64 e = 0; e < seen; e++) depth += sees[e];
            tokens[t] = nodes[row * most_nodes + node];
            positions[t] = lengths[row] + depth - 1;
            places[t] = find_place(blocks + row * most_blocks, most_blocks, lengths[row] + seen - most_nodes + node);
        }
    }
}

int fastgrpo_find_most(const i64 *values, i64 count) {
    i64 most = 0;
    for (i64 i = 0; i < count; i++) most = values[i] > most ? values[i] : most;
    return (int)most;
}

/* ---- norms ------------------------------------------------------------------------------------------------ */

static inline float sum_squares(const float *x, i64 width) {
    vec lanes = {0};
    float sum = 0.0f;
    i64 i = 0;
    for (; i + LANES <= width; i += LANES) lanes += *(const vec *)(x + i) * *(const vec *)(x + i);
    for (; i < width; i++) sum = __builtin_fmaf(x[i], x[i], sum);
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return sum;
}

/* The residual takes the delta (where there is one); out is its RMS norm. R: residual and weight, X: delta and out. */
#define DEFINE_ADD_NORM(R, X)                                                                                         \
    void fastgrpo_add_norm_##R##_##X(R *residual, const X *delta, const R *weight, X *out, i64 rows, i64 width,       \
                                     float eps) {                                                                     \
        _Pragma("omp parallel for if (rows * width > FEW)")                                                           \
        for (i64 row = 0; row < rows; row++) {                                                                        \
            R *own = residual + row * width;                                                                          \
            X *normed = out + row * width;                                                                            \
            float x[width];                                                                                           \
            if (delta) {                                                                                              \
                const X *more = delta + row * width;                                                                  \
                for (i64 i = 0; i < width; i++) {                                                                     \
                    x[i] = as_##R(load_##R(own + i) + load_##X(more + i));                                            \
                    store_##R(own + i, x[i]);                                                                         \
                }                                                                                                     \
            } else                                                                                                    \
                for (i64 i = 0; i < width; i++) x[i] = load_##R(own + i);                                             \
            float scale = 1.0f / sqrtf(sum_squares(x, width) / (float)width + eps);                                   \
            for (i64 i = 0; i < width; i++)                                                                           \
                store_##X(normed + i, as_##R(load_##R(weight + i) * as_##R(x[i] * scale)));                           \
        }                                                                                                             \
    }

DEFINE_ADD_NORM(bf16, bf16)
DEFINE_ADD_NORM(float, float)
DEFINE_ADD_NORM(float, bf16)

/* In place; a token's heads one after the other, tokens `stride` numbers apart. */
#define DEFINE_HEAD_NORM(W, X)                                                                                        \
    void fastgrpo_head_norm_##W##_##X(X *states, i64 stride, const W *weight, i64 tokens, i64 heads, i64 width,       \
                                      float eps) {                                                                    \
        _Pragma("omp parallel for if (tokens * heads * width > FEW)")                                                 \
        for (i64 row = 0; row < tokens * heads; row++) {                                                              \
            X *own = states + row / heads * stride + row % heads * width;                                             \
            float x[width];                                                                                           \
            for (i64 i = 0; i < width; i++) x[i] = load_##X(own + i);                                                 \
            float scale = 1.0f / sqrtf(sum_squares(x, width) / (float)width + eps);                                   \
            for (i64 i = 0; i < width; i++)                                                                           \
                store_##X(own + i, load_##W(weight + i) * as_##X(x[i] * scale));                                      \
        }                                                                                                             \
    }

DEFINE_HEAD_NORM(bf16, bf16)
DEFINE_HEAD_NORM(float, float)
DEFINE_HEAD_NORM(float, bf16)

/* ---- rotation and cache write ----------------------------------------------------------------------------- */

#define DEFINE_ROTATE(C, X)                                                                                           \
    static inline void rotate_##C##_##X(const X *from, X *to, const C *restrict cosine, const C *restrict sine,       \
                                        i64 width) {                                                                  \
        i64 half = width / 2;                                                                                         \
        float first[half], second[half]; /* read before anything is written: the head may be its own target */        \
        for (i64 i = 0; i < half; i++) first[i] = load_##X(from + i), second[i] = load_##X(from + i + half);          \
        for (i64 i = 0; i < half; i++) {                                                                              \
            float left = as_##C(first[i] * load_##C(cosine + i)), right = as_##C(second[i] * load_##C(sine + i));     \
            float low = as_##C(second[i] * load_##C(cosine + i + half));                                              \
            float high = as_##C(first[i] * load_##C(sine + i + half));                                                \
            store_##X(to + i, left - right);                                                                          \
            store_##X(to + i + half, low + high);                                                                     \
        }                                                                                                             \
    }                                                                                                                 \
    /* A token's queries, keys and values stand side by side. Queries are rotated in place; keys, rotated, and values \
     * go to their places in the cache. Row n of cosine and sine is that of position n, or of token n where there are \
     * no positions. */                                                                                               \
    void fastgrpo_rotate_##C##_##X(X *states, const C *cosine, const C *sine, const i64 *positions, i64 tokens,       \
                                   i64 heads, i64 kv_heads, i64 width, const i64 *places, X *keys, X *values) {       \
        i64 cached = kv_heads * width;                                                                                \
        _Pragma("omp parallel for if (tokens * heads * width > FEW)")                                                 \
        for (i64 token = 0; token < tokens; token++) {                                                                \
            i64 row = (positions ? positions[token] : token) * width;                                                 \
            const C *cosines = cosine + row, *sines = sine + row;                                                     \
            X *query = states + token * (heads * width + 2 * cached), *key = query + heads * width;                   \
            for (i64 head = 0; head < heads; head++)                                                                  \
                rotate_##C##_##X(query + head * width, query + head * width, cosines, sines, width);                  \
            for (i64 head = 0; head < kv_heads; head++)                                                               \
                rotate_##C##_##X(key + head * width, keys + places[token] * cached + head * width, cosines, sines,    \
                                 width);                                                                              \
            memcpy(values + places[token] * cached, key + cached, cached * sizeof(X));                                \
        }                                                                                                             \
    }

DEFINE_ROTATE(bf16, bf16)
DEFINE_ROTATE(float, float)
DEFINE_ROTATE(float, bf16)

/* ---- activation ------------------------------------------------------------------------------------------- */

static inline float silu(float x) {
    float e = exp_negative(-fabsf(x));
    return (x >= 0 ? x : x * e) / (1.0f + e);
}

/* gate and up stand side by side. */
#define DEFINE_SILU(X)                                                                                                \
    void fastgrpo_silu_##X(const X *both, X *out, i64 tokens, i64 width) {                                            \
        _Pragma("omp parallel for if (tokens * width > FEW)")                                                         \
        for (i64 token = 0; token < tokens; token++) {                                                                \
            const X *gate = both + 2 * token * width, *up = gate + width;                                             \
            for (i64 i = 0; i < width; i++)                                                                           \
                store_##X(out + token * width + i, as_##X(silu(load_##X(gate + i))) * load_##X(up + i));              \
        }                                                                                                             \
    }

DEFINE_SILU(bf16)
DEFINE_SILU(float)
