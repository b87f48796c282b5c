/* What a decoder layer does between its matrix products: places, norms, rotation and cache write, attention over ragged rows,
 * activation. Half precision is rounded where transformers rounds.
 *
 * A row's result depends on nothing but the row: the order of its sums is fixed by its own length, never by its
 * neighbours or the number of threads.
 */

#include <stdlib.h>

#include "common.h"

#define BLOCK 64 /* cached positions that stand together, as in blocks.py */
#define CHUNK 32 /* of them are attended to at once: a divisor */
#define ENOUGH_ROWS 8 /* to attend to whole rows, which reads the cache in order; of fewer, key heads are parted */

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
            i64 slot = lengths[row] + seen - most_nodes + node, block = slot / BLOCK, depth = 0;
            for (i64 e = 0; e < seen; e++) depth += sees[e];
            tokens[t] = nodes[row * most_nodes + node];
            positions[t] = lengths[row] + depth - 1;
            places[t] = blocks[row * most_blocks + (block < most_blocks ? block : most_blocks - 1)] + slot % BLOCK;
        }
    }
}

/* ---- norms ------------------------------------------------------------------------------------------------ */

static inline float sum_squares(const float *x, i64 width) {
    float lanes[LANES] = {0}, sum = 0.0f;
    i64 i = 0;
    for (; i + LANES <= width; i += LANES)
        for (int lane = 0; lane < LANES; lane++) lanes[lane] = __builtin_fmaf(x[i + lane], x[i + lane], lanes[lane]);
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
    static inline void rotate_##C##_##X(const X *from, X *to, const C *cosine, const C *sine, i64 width) {            \
        i64 half = width / 2;                                                                                         \
        for (i64 i = 0; i < half; i++) {                                                                              \
            float first = load_##X(from + i), second = load_##X(from + i + half);                                     \
            float left = as_##C(first * load_##C(cosine + i)), right = as_##C(second * load_##C(sine + i));           \
            float low = as_##C(second * load_##C(cosine + i + half));                                                 \
            float high = as_##C(first * load_##C(sine + i + half));                                                   \
            store_##X(to + i, left - right);                                                                          \
            store_##X(to + i + half, low + high);                                                                     \
        }                                                                                                             \
    }                                                                                                                 \
    /* A token's queries, keys and values stand side by side. Queries are rotated in place; keys, rotated, and values \
     * go to their places in the cache. */                                                                            \
    void fastgrpo_rotate_##C##_##X(X *states, const C *cosine, const C *sine, i64 tokens, i64 heads, i64 kv_heads,    \
                                   i64 width, const i64 *places, X *keys, X *values) {                                \
        i64 cached = kv_heads * width;                                                                                \
        _Pragma("omp parallel for if (tokens * heads * width > FEW)")                                                 \
        for (i64 token = 0; token < tokens; token++) {                                                                \
            const C *cosines = cosine + token * width, *sines = sine + token * width;                                 \
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

/* ---- attention -------------------------------------------------------------------------------------------- */

/* Sums of the lanes of 16 vectors, one lane each. */
static inline vec sum_lanes(const vec *x) {
    vec a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) {
        vec even = x[2 * i], odd = x[2 * i + 1];
        a[i] = PICK(even, odd, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               PICK(even, odd, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < 4; i++)
        b[i] = PICK(a[2 * i], a[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               PICK(a[2 * i], a[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        c[i] = PICK(b[2 * i], b[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
               PICK(b[2 * i], b[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    return PICK(c[0], c[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           PICK(c[0], c[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* Products of one query with `size` keys; fills up to a multiple of 16 scores. Of each 16 keys the first 16 numbers
 * stand together, then the next. */
static inline void score_keys(const float *query, const float *keys, float *scores, i64 size, i64 padded) {
    for (i64 first = 0; first < size; first += LANES) {
        vec sums[LANES];
        for (int p = 0; p < LANES; p++) sums[p] = (vec){0};
        for (i64 j = 0; j < padded; j += LANES, keys += LANES * LANES) {
            vec q = *(const vec *)(query + j);
            for (int p = 0; p < LANES; p++) sums[p] += q * *(const vec *)(keys + p * LANES);
        }
        *(vec *)(scores + first) = sum_lanes(sums);
    }
}

/* Adds `size` values, each times its weight: even and odd ones apart, which saves waiting for each sum. */
static inline void add_values(float *into, const float *weights, const float *values, i64 size, i64 padded) {
    i64 j = 0;
    for (; j + 4 * LANES <= padded; j += 4 * LANES) {
        vec even[4], odd[4];
        for (int u = 0; u < 4; u++) even[u] = *(vec *)(into + j + u * LANES), odd[u] = (vec){0};
        for (i64 p = 0; p < size; p += 2)
            for (int u = 0; u < 4; u++) {
                even[u] += weights[p] * *(const vec *)(values + p * padded + j + u * LANES);
                odd[u] += weights[p + 1] * *(const vec *)(values + (p + 1) * padded + j + u * LANES);
            }
        for (int u = 0; u < 4; u++) *(vec *)(into + j + u * LANES) = even[u] + odd[u];
    }
    for (; j < padded; j += LANES) {
        vec even = *(vec *)(into + j), odd = {0};
        for (i64 p = 0; p < size; p += 2) {
            even += weights[p] * *(const vec *)(values + p * padded + j);
            odd += weights[p + 1] * *(const vec *)(values + (p + 1) * padded + j);
        }
        *(vec *)(into + j) = even + odd;
    }
}

/* Scores become weights, those from `size` to `full` zero; returns their sum. */
static inline float weigh(float *scores, i64 size, i64 full, float most) {
    vec sums = {0};
    for (i64 p = size; p < full; p++) scores[p] = -INFINITY;
    for (i64 p = 0; p < full; p++) scores[p] = exp_negative(scores[p] - most);
    for (i64 p = 0; p < full; p += LANES) sums += *(const vec *)(scores + p);
    return sum_lane(sums);
}

/* Whether a node sees the first positions of `seen` and no others; how many it sees. */
static inline int sees_prefix(const uint8_t *sees, i64 seen, i64 *count) {
    i64 last = -1;
    *count = 0;
    for (i64 e = 0; e < seen; e++)
        if (sees[e]) last = e, ++*count;
    return last + 1 == *count;
}

/* Nodes of `rows` trees over their own cached positions.
 *
 * query: [tokens, heads, width], tokens `stride` numbers apart; row b has nodes[b] of them from starts[b] on.
 * out: the same, one after the other.
 * keys, values: [*, kv_heads * width]; position p of row b is number blocks[b][p / BLOCK] + p % BLOCK, where blocks is
 * [rows, most_blocks]. Rows may share blocks: siblings read the same lines of their prompt.
 * visible: [rows, most_nodes, seen]: entry (b, n, e) says whether node n sees position lengths[b] + e; every node sees
 * all positions below lengths[b].
 * What a node sees is added up as if it stood in a row, whatever stands between: a node of a tree has the bits of the
 * same text decoded token by token. Nodes that see a prefix find it in the chunk as it was read; behind them each of the
 * others puts its own path there.
 */
#define DEFINE_ATTEND(X)                                                                                              \
    static inline void read_pair_##X(const X *key, const X *value, float *k, float *v, i64 p, i64 width,             \
                                     i64 padded) {                                                                    \
        float *to_k = k + p / LANES * LANES * padded + p % LANES * LANES;                                             \
        i64 whole = width / LANES * LANES;                                                                            \
        for (i64 j = 0; j < whole; j += LANES, to_k += LANES * LANES)                                                 \
            for (int u = 0; u < LANES; u++) to_k[u] = load_##X(key + j + u);                                          \
        for (i64 j = whole; j < width; j++) to_k[j - whole] = load_##X(key + j);                                      \
        for (i64 j = 0; j < width; j++) v[p * padded + j] = load_##X(value + j);                                      \
    }                                                                                                                 \
    void fastgrpo_attend_##X(const X *query, i64 stride, const X *keys, const X *values, X *out, i64 rows,            \
                             const i64 *starts, const i64 *nodes, const i64 *lengths, const i64 *blocks,              \
                             i64 most_blocks, const uint8_t *visible, i64 most_nodes, i64 seen, i64 heads,            \
                             i64 kv_heads, i64 width, float scale) {                                                  \
        i64 repeats = heads / kv_heads, padded = (width + LANES - 1) / LANES * LANES, cached = kv_heads * width;      \
        i64 parts = rows < ENOUGH_ROWS ? kv_heads : 1, groups = kv_heads / parts; /* a part has these key heads */    \
        i64 num_floats = groups * repeats * most_nodes * (2 * padded + 2) + CHUNK + 2 * CHUNK * padded;               \
        _Pragma("omp parallel if (rows * parts > 1)")                                                                 \
        {                                                                                                             \
            float *room = malloc(num_floats * sizeof(float));                                                         \
            i64 *order = malloc(2 * most_nodes * sizeof(i64)), *num_seen = order + most_nodes;                        \
            _Pragma("omp for schedule(dynamic, 1)")                                                                   \
            for (i64 task = 0; task < rows * parts; task++) {                                                         \
                i64 row = task / parts, head = task % parts * groups * repeats; /* its first */                       \
                i64 count = nodes[row], queries = groups * repeats * count;                                           \
                i64 total = lengths[row] + seen - most_nodes + count;                                                 \
                float *s = room, *k = s + CHUNK, *v = k + CHUNK * padded, *q = v + CHUNK * padded;                    \
                float *sum = q + queries * padded, *most = sum + queries * padded, *mass = most + queries;            \
                memset(k, 0, (2 * CHUNK + 2 * queries) * padded * sizeof(float));                                     \
                for (i64 i = 0; i < queries; i++) {                                                                   \
                    const X *from = query + (starts[row] + i % count) * stride + (head + i / count) * width;          \
                    for (i64 j = 0; j < width; j++) q[i * padded + j] = load_##X(from + j) * scale;                   \
                    most[i] = -INFINITY, mass[i] = 0.0f;                                                              \
                }                                                                                                     \
                const i64 *own = blocks + row * most_blocks;                                                          \
                i64 num_prefix = 0, num_others = 0;                                                                   \
                for (i64 node = 0; node < count; node++)                                                              \
                    if (sees_prefix(visible + (row * most_nodes + node) * seen, seen, num_seen + node))               \
                        order[num_prefix++] = node;                                                                   \
                    else                                                                                              \
                        order[most_nodes - ++num_others] = node;                                                      \
                for (i64 first = 0; first < total; first += CHUNK) {                                                  \
                    i64 start = own[first / BLOCK] + first % BLOCK, left = total - first - CHUNK;                     \
                    i64 next = left > 0 ? (own[(first + CHUNK) / BLOCK] + (first + CHUNK) % BLOCK) * cached : 0;      \
                    for (i64 group = 0; group < groups; group++) {                                                    \
                        i64 size = total - first < CHUNK ? total - first : CHUNK;                                     \
                        i64 place = start * cached + (head / repeats + group) * width;                                \
                        for (i64 p = 0; p < size; p++)                                                                \
                            read_pair_##X(keys + place + p * cached, values + place + p * cached, k, v, p, width,     \
                                          padded);                                                                    \
                        for (i64 turn = 0; turn < repeats * count; turn++) {                                          \
                            i64 at = turn / repeats, is_other = at >= num_prefix;                                     \
                            i64 node = is_other ? order[most_nodes - 1 - (at - num_prefix)] : order[at];              \
                            i64 i = (group * repeats + turn % repeats) * count + node;                                \
                            i64 share = (left < CHUNK ? left : CHUNK) * cached / queries + 1;                         \
                            for (i64 j = i * share; left > 0 && j < (i + 1) * share; j += 64 / (i64)sizeof(X)) {      \
                                __builtin_prefetch(keys + next + j); /* memory is slow: ask for the next chunk now */ \
                                __builtin_prefetch(values + next + j);                                                \
                            }                                                                                         \
                            i64 end = lengths[row] + num_seen[node]; /* of what it sees, in a row */                  \
                            if (end <= first) continue;                                                               \
                            size = end - first < CHUNK ? end - first : CHUNK;                                         \
                            i64 full = (size + LANES - 1) / LANES * LANES;                                            \
                            const uint8_t *sees = visible + (row * most_nodes + node) * seen;                         \
                            if (is_other && turn % repeats == 0)                                                      \
                                for (i64 e = 0, to = lengths[row] - first; to < size; e++) {                          \
                                    if (!sees[e]) continue;                                                           \
                                    i64 from = lengths[row] + e;                                                      \
                                    from = (own[from / BLOCK] + from % BLOCK) * cached;                               \
                                    from += (head / repeats + group) * width;                                         \
                                    if (to >= 0) read_pair_##X(keys + from, values + from, k, v, to, width, padded);  \
                                    to++;                                                                             \
                                }                                                                                     \
                            score_keys(q + i * padded, k, s, size, padded);                                           \
                            float top = find_max(s, size);                                                            \
                            float *into = sum + i * padded;                                                           \
                            if (top > most[i]) {                                                                      \
                                float fade = exp_negative(most[i] - top);                                             \
                                for (i64 j = 0; j < padded; j++) into[j] *= fade;                                     \
                                mass[i] *= fade, most[i] = top;                                                       \
                            }                                                                                         \
                            mass[i] += weigh(s, size, full, most[i]);                                                 \
                            add_values(into, s, v, full, padded);                                                     \
                        }                                                                                             \
                    }                                                                                                 \
                }                                                                                                     \
                for (i64 i = 0; i < queries; i++) {                                                                   \
                    X *to = out + ((starts[row] + i % count) * heads + head + i / count) * width;                     \
                    for (i64 j = 0; j < width; j++) store_##X(to + j, sum[i * padded + j] / mass[i]);                 \
                }                                                                                                     \
            }                                                                                                         \
            free(room), free(order);                                                                                  \
        }                                                                                                             \
    }

DEFINE_ATTEND(bf16)
DEFINE_ATTEND(float)
