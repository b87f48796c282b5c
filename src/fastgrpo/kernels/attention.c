/* Attention of packed nodes over ragged rows of a paged cache.
 *
 * The cache is read in order, a chunk of positions at a time, once for all queries that see it: for all nodes and heads
 * of a row, and for all rows that share it (a prompt's completions). A task is a segment of one row or of rows that
 * share its beginning; what a row saw of its segments is added up in their order. So a row's result depends on nothing
 * but the row, and what a node of a tree sees counts as if it stood in a row: it has the bits of the same text decoded
 * token by token, whoever its neighbours are and however many threads there are.
 *
 * Where the processor multiplies pairs in half precision (vdpbf16ps), numbers of half precision are multiplied as they
 * are, and weights are rounded to it; elsewhere they are widened first. A word is 32 bits: one number or such a pair.
 */

#include <omp.h>
#include <stdlib.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "common.h"

#define CHUNK 32      /* of them are read at once: two registers of scores */
#define SEGMENT 128   /* of them are one task's: whole blocks */
#define PAIR 32       /* numbers of a head that are read together; padded heads are a multiple of it */
#define TOGETHER 4    /* queries that meet a chunk at once, so that each number of it is loaded once for all of them */
#define MOST_ROWS 16  /* of a task */
#define MOST_NODES 64 /* of a row in a task: their queries and sums stay near; a row of more (a prompt) is long */
#define MOST_STATES (32 << 20) /* bytes of segments' states for each thread */
#define FEW_TASKS 2   /* for each thread: fewer are parted once more, by heads */
#define READING 4     /* queries that take as long as it takes to read a chunk for them */

typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t word __attribute__((may_alias));
typedef bf16 half __attribute__((may_alias)); /* of a word */

/* In a register, for compilers that would load it again for each use. */
#if defined(__AVX512F__)
#define KEEP(x) __asm__("" : "+v"(x))
#else
#define KEEP(x)
#endif

/* ---- reading and writing ------------------------------------------------------------------------------------ */

/* Rows become columns. */
static inline void transpose(vec *x) {
    vec a[LANES];
    for (int i = 0; i < LANES; i += 2) {
        a[i] = PICK(x[i], x[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        a[i + 1] = PICK(x[i], x[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            vec even = a[i + j], odd = a[i + j + 2];
            x[i + 2 * j] = PICK(even, odd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            x[i + 2 * j + 1] = PICK(even, odd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    for (int i = 0; i < 4; i++) {
        vec p = PICK(x[i], x[4 + i], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        vec q = PICK(x[i], x[4 + i], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        vec r = PICK(x[8 + i], x[12 + i], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        vec s = PICK(x[8 + i], x[12 + i], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        a[i] = PICK(p, r, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        a[8 + i] = PICK(p, r, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        a[4 + i] = PICK(q, s, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        a[12 + i] = PICK(q, s, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    for (int i = 0; i < LANES; i++) x[i] = a[i];
}

/* Numbers in a word: neighbours in a head of a query and a key, at neighbouring positions of values. */
#define UNIT_float 1
#define WHOLE_float LANES /* of a head in a register */

static inline vec meet_float(vec sum, vec x, vec y) { return sum + x * y; }
static inline void put_column_float(float *keys, int i, vec column) { *(vec *)(keys + i * CHUNK) = column; }
static inline void put_query_float(float *query, i64 j, float x) { query[j] = x; }
static inline void put_key_float(float *columns, i64 p, i64 j, float x) { columns[j * CHUNK + p] = x; }

/* PAIR numbers of one position as two registers, in any order, and back. */
static inline void split_float(const float *from, vec *first, vec *second) {
    *first = *(const vec *)from, *second = *(const vec *)(from + LANES);
}

static inline void join_float(float *to, vec first, vec second) {
    *(vec *)to = first, *(vec *)(to + LANES) = second;
}

/* Weights as they meet values; returns their sums by lane. */
static inline vec settle_float(float *weights) { return *(vec *)weights + *(vec *)(weights + LANES); }

#define WHOLE_bf16 PAIR

static inline void split_bf16(const void *from, vec *first, vec *second) { /* even and odd ones */
    words both = *(const words *)from;
    *first = (vec)(both << 16), *second = (vec)(both & 0xFFFF0000u);
}

#if defined(__AVX512BF16__)
#define UNIT_bf16 2

static inline vec meet_bf16(vec sum, vec x, vec y) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}

static inline void put_column_bf16(float *keys, int i, vec column) { *(vec *)(keys + i * CHUNK) = column; }
static inline void put_query_bf16(float *query, i64 j, bf16 x) { ((half *)query)[j] = x; }
static inline void put_key_bf16(float *columns, i64 p, i64 j, bf16 x) {
    ((half *)(columns + j / 2 * CHUNK + p))[j % 2] = x;
}

static inline void join_bf16(void *to, vec first, vec second) {
    *(words *)to = (words)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

static inline vec settle_bf16(float *weights) {
    vec even, odd;
    join_bf16(weights, *(vec *)weights, *(vec *)(weights + LANES));
    split_bf16(weights, &even, &odd);
    return even + odd;
}

#else
#define UNIT_bf16 1

static inline words round_words(vec x) {
    words bits = (words)x, rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u, is_nan = (words)(x != x);
    return (is_nan & 0x7FC00000u) | (~is_nan & rounded);
}

static inline void put_column_bf16(float *keys, int i, vec column) {
    split_bf16(&column, (vec *)(keys + 2 * i * CHUNK), (vec *)(keys + (2 * i + 1) * CHUNK));
}

static inline void put_query_bf16(float *query, i64 j, bf16 x) { query[j] = load_bf16(&x); }
static inline void put_key_bf16(float *columns, i64 p, i64 j, bf16 x) { columns[j * CHUNK + p] = load_bf16(&x); }

static inline void join_bf16(void *to, vec first, vec second) {
    *(words *)to = round_words(first) >> 16 | round_words(second);
}

#define meet_bf16 meet_float
#define settle_bf16 settle_float
#endif

/* Keys of a chunk become columns of words [padded / UNIT, CHUNK]; in the cache positions stand `stride` numbers apart.
 * Behind the last of `size` keys others of their block are read and never counted. */
#define DEFINE_READ(X)                                                                                                \
    static void read_keys_##X(const X *keys, float *columns, i64 size, i64 stride, i64 width) {                       \
        for (i64 p = 0; p < size; p += LANES, keys += LANES * stride)                                                 \
            for (i64 j = 0; j < width; j += WHOLE_##X) {                                                              \
                X few[LANES][WHOLE_##X];                                                                              \
                const X *from = keys + j;                                                                             \
                i64 apart = stride;                                                                                   \
                if (width - j < WHOLE_##X) {                                                                          \
                    memset(few, 0, sizeof few);                                                                       \
                    for (int i = 0; i < LANES; i++) memcpy(few[i], from + i * stride, (width - j) * sizeof(X));       \
                    from = few[0], apart = WHOLE_##X;                                                                 \
                }                                                                                                     \
                vec heads[LANES];                                                                                     \
                for (int i = 0; i < LANES; i++) heads[i] = *(const vec *)(from + i * apart);                          \
                transpose(heads);                                                                                     \
                float *to = columns + p + j / UNIT_##X * CHUNK;                                                       \
                for (int i = 0; i < LANES; i++) put_column_##X(to, i, heads[i]);                                      \
            }                                                                                                         \
    }                                                                                                                 \
    static void write_values_##X(X *to, const float *sum, float mass, i64 width) {                                    \
        for (i64 j = 0; j < width; j += PAIR) {                                                                       \
            X few[PAIR];                                                                                              \
            join_##X(few, *(const vec *)(sum + j) / mass, *(const vec *)(sum + j + LANES) / mass);                    \
            memcpy(to + j, few, (width - j < PAIR ? width - j : PAIR) * sizeof(X));                                   \
        }                                                                                                             \
    }

DEFINE_READ(bf16)
DEFINE_READ(float)

/* Values become rows of words [CHUNK / UNIT, padded]: one position's, or a whole chunk's. What weighs nothing must be
 * numbers, for another row may have left none: `read_values` leaves zeros behind the last of `size` positions. */
#define DEFINE_VALUES(X)                                                                                              \
    static void put_value_##X(const X *value, float *rows, i64 p, i64 width, i64 padded) {                            \
        for (i64 j = 0; j < width; j += PAIR) {                                                                       \
            X few[PAIR] = {0};                                                                                        \
            const X *from = value + j;                                                                                \
            if (width - j < PAIR) memcpy(few, from, (width - j) * sizeof(X)), from = few;                             \
            split_##X(from, (vec *)(rows + p * padded + j), (vec *)(rows + p * padded + j + LANES));                  \
        }                                                                                                             \
    }                                                                                                                 \
    static void clear_values_##X(float *rows, i64 from, i64 to, i64 padded) {                                         \
        memset(rows + from * padded, 0, (to - from) * padded * sizeof(float));                                        \
    }                                                                                                                 \
    static void read_values_##X(const X *values, float *rows, i64 size, i64 stride, i64 width, i64 padded) {          \
        for (i64 p = 0; p < size; p++) put_value_##X(values + p * stride, rows, p, width, padded);                    \
        clear_values_##X(rows, size, CHUNK, padded);                                                                  \
    }

DEFINE_VALUES(float)

#if UNIT_bf16 == 1
DEFINE_VALUES(bf16)
#else

static void put_value_bf16(const bf16 *value, float *rows, i64 p, i64 width, i64 padded) {
    half *to = (half *)(rows + p / 2 * padded) + p % 2;
    for (i64 j = 0; j < width; j++) to[2 * j] = value[j];
}

static void clear_values_bf16(float *rows, i64 from, i64 to, i64 padded) {
    for (i64 p = from; p < to; p++)
        for (i64 j = 0; j < padded; j++) ((half *)(rows + p / 2 * padded + j))[p % 2] = 0;
}

static void read_values_bf16(const bf16 *values, float *rows, i64 size, i64 stride, i64 width, i64 padded) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(LANES));
    i64 pairs = (size + 1) / 2;
    for (i64 pair = 0; pair < pairs; pair++, values += 2 * stride)
        for (i64 j = 0; j < padded; j += PAIR) {
            i64 count = width - j < PAIR ? width - j : PAIR;
            __mmask32 even = 0xFFFFFFFFu >> (PAIR - count), odd = 2 * pair + 1 < size ? even : 0;
            __m512i x = _mm512_maskz_loadu_epi16(even, values + j);
            __m512i y = _mm512_maskz_loadu_epi16(odd, values + stride + j);
            _mm512_storeu_si512(rows + pair * padded + j, _mm512_permutex2var_epi16(x, low, y));
            _mm512_storeu_si512(rows + pair * padded + j + LANES, _mm512_permutex2var_epi16(x, high, y));
        }
    memset(rows + pairs * padded, 0, (CHUNK / 2 - pairs) * padded * sizeof(float));
}

#endif

/* ---- queries and a chunk ------------------------------------------------------------------------------------ */

/* What a query has seen: the sum of values by weight [padded], the sum of weights by lane, the best score. */
#define ROOM(padded) ((padded) + 2 * LANES)
#define MASS(state, padded) ((vec *)((state) + (padded)))
#define BEST(state, padded) ((state) + (padded) + LANES)

/* How near memory is brought that is read soon. Zen 4 waits for room in its nearest cache, and takes 1.5 times as long
 * with 64 rows. */
#define NEARNESS (IS_ZEN_4 ? 2 : 3)

/* What is read next: memory is slow, so a little of it is asked for with each step of the sums. */
typedef struct {
    const char *keys, *values;
    i64 pace; /* bytes a step */
} ahead;

static inline void ask(const char **next, i64 pace) {
    __builtin_prefetch(*next, 0, NEARNESS), __builtin_prefetch(*next + 64, 0, NEARNESS);
    *next += pace;
}

static inline vec repeat(const float *from) { return (vec)(*(const word *)from + (words){0}); }

/* Products of Q queries with a chunk's keys, and a chunk's values added, each times its weight. Even and odd words are
 * summed apart, which saves waiting for each sum; a query's sums are the same whatever Q is. */
#define DEFINE_SUMS(X, Q)                                                                                             \
    static void score_##X##_##Q(const float *query, const float *keys, float *scores, i64 padded, float scale,        \
                                ahead *next) {                                                                        \
        vec sums[2][Q][2] = {{{{0}}}};                                                                                \
        for (i64 j = 0; j < padded / UNIT_##X; j += 2, keys += 2 * CHUNK) {                                           \
            for (int i = 0; i < UNIT_##X; i++) ask(&next->keys, next->pace);                                          \
            for (int odd = 0; odd < 2; odd++) {                                                                       \
                vec low = *(const vec *)(keys + odd * CHUNK), high = *(const vec *)(keys + odd * CHUNK + LANES);      \
                KEEP(low);                                                                                            \
                KEEP(high);                                                                                           \
                for (int i = 0; i < Q; i++) {                                                                         \
                    vec x = repeat(query + i * padded + j + odd);                                                     \
                    sums[odd][i][0] = meet_##X(sums[odd][i][0], x, low);                                              \
                    sums[odd][i][1] = meet_##X(sums[odd][i][1], x, high);                                             \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
        for (int i = 0; i < Q; i++)                                                                                   \
            for (int part = 0; part < 2; part++)                                                                      \
                *(vec *)(scores + i * CHUNK + part * LANES) = (sums[0][i][part] + sums[1][i][part]) * scale;          \
    }                                                                                                                 \
    static void add_##X##_##Q(float *into, const float *weights, const float *values, i64 padded, ahead *next) {      \
        for (i64 j = 0; j < padded; j += PAIR) {                                                                      \
            vec sums[2][Q][2] = {{{{0}}}};                                                                            \
            for (i64 p = 0; p < CHUNK / UNIT_##X; p += 2) {                                                           \
                const float *value = values + p * padded + j;                                                         \
                for (int i = 0; i < UNIT_##X; i++) ask(&next->values, next->pace);                                    \
                for (int odd = 0; odd < 2; odd++, value += padded) {                                                  \
                    vec low = *(const vec *)value, high = *(const vec *)(value + LANES);                              \
                    KEEP(low);                                                                                        \
                    KEEP(high);                                                                                       \
                    for (int i = 0; i < Q; i++) {                                                                     \
                        vec x = repeat(weights + i * CHUNK + p + odd);                                                \
                        sums[odd][i][0] = meet_##X(sums[odd][i][0], x, low);                                          \
                        sums[odd][i][1] = meet_##X(sums[odd][i][1], x, high);                                         \
                    }                                                                                                 \
                }                                                                                                     \
            }                                                                                                         \
            for (int i = 0; i < Q; i++)                                                                               \
                for (int part = 0; part < 2; part++)                                                                  \
                    *(vec *)(into + i * ROOM(padded) + j + part * LANES) += sums[0][i][part] + sums[1][i][part];      \
        }                                                                                                             \
    }

#define DEFINE_ALL_SUMS(X) DEFINE_SUMS(X, 1) DEFINE_SUMS(X, 2) DEFINE_SUMS(X, 3) DEFINE_SUMS(X, 4)

DEFINE_ALL_SUMS(bf16)
DEFINE_ALL_SUMS(float)

/* Sums so far become those relative to a better score. */
static inline void raise_best(float *state, float best, i64 padded) {
    float fade = exp_negative(*BEST(state, padded) - best);
    for (i64 j = 0; j < padded; j += LANES) *(vec *)(state + j) *= fade;
    *MASS(state, padded) *= fade, *BEST(state, padded) = best;
}

/* What a query saw of the segment behind. */
static void add_state(float *sum, float *other, i64 padded) {
    float best = *BEST(sum, padded), theirs = *BEST(other, padded);
    if (theirs > best) raise_best(sum, theirs, padded);
    if (theirs < best) raise_best(other, best, padded);
    for (i64 j = 0; j < padded + LANES; j += LANES) *(vec *)(sum + j) += *(vec *)(other + j);
}

/* `count` queries, one after the other, see the first `size` of a chunk. */
#define DEFINE_CHUNK(X)                                                                                               \
    static void attend_to_chunk_##X(const float *queries, float *states, i64 count, const float *keys,                \
                                    const float *values, i64 size, i64 padded, float scale, ahead *next) {            \
        static void (*const score[])(const float *, const float *, float *, i64, float, ahead *) = {                  \
            score_##X##_1, score_##X##_2, score_##X##_3, score_##X##_4};                                              \
        static void (*const add[])(float *, const float *, const float *, i64, ahead *) = {                           \
            add_##X##_1, add_##X##_2, add_##X##_3, add_##X##_4};                                                      \
        float scores[TOGETHER * CHUNK] __attribute__((aligned(64)));                                                  \
        for (i64 i = 0, together; i < count; i += together) {                                                         \
            together = count - i < TOGETHER ? count - i : TOGETHER;                                                   \
            score[together - 1](queries + i * padded, keys, scores, padded, scale, next);                             \
            for (i64 t = 0; t < together; t++) {                                                                      \
                float *own = scores + t * CHUNK, *state = states + (i + t) * ROOM(padded);                            \
                for (i64 p = size; p < CHUNK; p++) own[p] = -INFINITY;                                                \
                float best = max_lane(max_vec(*(vec *)own, *(vec *)(own + LANES)));                                   \
                if (best > *BEST(state, padded)) raise_best(state, best, padded);                                     \
                best = *BEST(state, padded);                                                                          \
                for (i64 p = 0; p < CHUNK; p++) own[p] = exp_negative(own[p] - best);                                 \
                *MASS(state, padded) += settle_##X(own);                                                              \
            }                                                                                                         \
            add[together - 1](states + i * ROOM(padded), scores, values, padded, next);                               \
        }                                                                                                             \
    }

DEFINE_CHUNK(bf16)
DEFINE_CHUNK(float)

/* ---- rows --------------------------------------------------------------------------------------------------- */

/* See `fastgrpo_attend`. */
typedef struct {
    i64 rows;
    const i64 *starts, *nodes, *lengths, *blocks;
    i64 most_blocks;
    const uint8_t *visible;
    i64 most_nodes, seen, kv_heads, repeats, width, padded;
    float scale;
    i64 *first_query, *first_state;     /* of each row */
    i64 *num_prefix, *order, *num_seen; /* of each row, see order_nodes */
    i64 *is_long;                       /* of each row, see find_long */
} batch;

/* A segment of rows `row` to `end`, which share its beginning where they are several; of each these nodes, heads. */
typedef struct {
    i64 row, end, first, node, last, head, last_head;
} task;

static inline i64 count_positions(const batch *b, i64 row) {
    return b->nodes[row] ? b->lengths[row] + b->seen - b->most_nodes + b->nodes[row] : 0;
}

static inline i64 count_parts(const batch *b, i64 row) { return (count_positions(b, row) + SEGMENT - 1) / SEGMENT; }

/* Long rows have tasks enough without their segments, whose states would be too many: one task has all of them. Long are
 * those of many nodes and, where the others' states would be more than `most` bytes, those with more than their share. */
static int find_long(const batch *b, i64 most) {
    i64 heads = b->kv_heads * b->repeats * ROOM(b->padded) * (i64)sizeof(float), num_bytes = 0, num_long = 0;
    for (i64 row = 0; row < b->rows; row++)
        if (b->nodes[row] <= MOST_NODES) num_bytes += count_parts(b, row) * b->nodes[row] * heads;
    i64 share = num_bytes > most ? most / b->rows : num_bytes;
    for (i64 row = 0; row < b->rows; row++) {
        b->is_long[row] = b->nodes[row] > MOST_NODES || count_parts(b, row) * b->nodes[row] * heads > share;
        num_long += b->is_long[row];
    }
    return num_long > 0;
}

/* Segments whose states are kept. */
static inline i64 count_segments(const batch *b, i64 row) { return b->is_long[row] ? 1 : count_parts(b, row); }

/* A row's queries stand head by head and node by node, and so do their states for each segment that is kept. */
static inline i64 find_query(const batch *b, i64 row, i64 head) {
    return b->first_query[row] + head * b->nodes[row] * b->repeats;
}

static inline i64 find_state(const batch *b, i64 row, i64 first, i64 head) {
    return b->first_state[row] + (first / SEGMENT * b->kv_heads + head) * b->nodes[row] * b->repeats;
}

static inline i64 place_of(const batch *b, i64 row, i64 position) {
    return find_place(b->blocks + row * b->most_blocks, b->most_blocks, position);
}

/* Whether all nodes of two rows see one and the same chunk. */
static inline int shares_chunk(const batch *b, i64 row, i64 other, i64 first) {
    i64 end = first + CHUNK;
    return end <= b->lengths[row] && end <= b->lengths[other] && b->nodes[row] && b->nodes[other] && !b->is_long[row] &&
           !b->is_long[other] && place_of(b, row, first) == place_of(b, other, first);
}

/* All segments of all rows, with `heads` of their heads in a task. Rows that share their beginning stand together, and
 * so do a head's segments where a task has one head: what is added up lies with one thread, more or less. */
static i64 list_tasks(const batch *b, i64 heads, task *tasks) {
    i64 count = 0;
    for (i64 from = 0, to; from < b->rows; from = to) {
        to = from + 1;
        while (to < b->rows && to - from < MOST_ROWS && shares_chunk(b, from, to, 0)) to++;
        for (i64 head = 0; head < b->kv_heads; head += heads)
            for (i64 first = 0, left = 1; left; first += SEGMENT) {
                left = 0;
                for (i64 row = from, end; row < to; row = end) {
                    end = row + 1;
                    if (first / SEGMENT >= count_segments(b, row)) continue;
                    while (end < to && shares_chunk(b, row, end, first)) end++;
                    for (i64 node = 0; node < b->nodes[row]; node += MOST_NODES, left++)
                        tasks[count++] = (task){row, end, first, node, node + MOST_NODES, head, head + heads};
                }
            }
    }
    return count;
}

/* Where the chunk after the one at `first` of the rows before `end` begins; -1 where there is none. */
static i64 find_next(const batch *b, const task *own, const task *soon, i64 end, i64 first) {
    i64 next = first + CHUNK;
    if (end < own->end) return place_of(b, end, first);
    if (next < own->first + SEGMENT && next < count_positions(b, own->row)) return place_of(b, own->row, next);
    return soon ? place_of(b, soon->row, soon->first) : -1;
}

static inline i64 find_last(const batch *b, const task *own, i64 row) {
    return own->last < b->nodes[row] ? own->last : b->nodes[row];
}

/* Where the states of a task's segment stand, counted from a head's first query on: those of a long row's further
 * segments, of the task's own nodes, are in `scratch`. */
static inline float *find_states(const batch *b, const task *own, i64 row, i64 head, float *states, float *scratch) {
    if (b->is_long[row] && own->first > 0)
        return scratch + (head * MOST_NODES - own->node) * b->repeats * ROOM(b->padded);
    return states + find_state(b, row, own->first, head) * ROOM(b->padded);
}

/* What a task takes: chunks, each as often as a query meets it. */
static i64 count_work(const batch *b, const task *own) {
    i64 left = count_positions(b, own->row) - own->first, queries = READING;
    for (i64 row = own->row; row < own->end; row++) queries += (find_last(b, own, row) - own->node) * b->repeats;
    left = left < SEGMENT || b->is_long[own->row] ? left : SEGMENT;
    return (left + CHUNK - 1) / CHUNK * queries * (own->last_head - own->head);
}

/* The first of the tasks that thread number `thread` of `threads` has; those of the next thread follow its own. Who has
 * what hangs on the batch alone, so that a thread finds in its cache what it wrote for the layer before. */
static i64 find_share(const batch *b, const task *tasks, i64 num_tasks, i64 work, i64 thread, i64 threads) {
    i64 number = 0;
    for (i64 before = 0, own; number < num_tasks; number++, before += own) {
        own = count_work(b, tasks + number);
        if ((2 * before + own) * threads >= 2 * work * thread) break;
    }
    return number;
}

/* Batches of queries that meet a chunk of rows `row` to `end` for each key head, more or less. */
static i64 count_batches(const batch *b, const task *own, i64 row, i64 end) {
    i64 count = 0;
    for (; row < end; row++) count += ((find_last(b, own, row) - own->node) * b->repeats + TOGETHER - 1) / TOGETHER;
    return count;
}

/* The nodes of a row, those first that see the first positions of `seen` and no others; what each of all nodes sees. */
static void order_nodes(const batch *b, i64 row) {
    i64 *order = b->order + row * b->most_nodes, *num_seen = b->num_seen + row * b->most_nodes;
    i64 num_prefix = 0, num_others = 0;
    for (i64 node = 0; node < b->nodes[row]; node++) {
        const uint8_t *sees = b->visible + (row * b->most_nodes + node) * b->seen;
        i64 count = 0, prefix = 0;
        for (i64 e = 0; e < b->seen; e++) count += sees[e];
        for (i64 e = 0; e < count; e++) prefix += sees[e];
        num_seen[node] = count;
        if (prefix == count)
            order[num_prefix++] = node;
        else
            order[b->nodes[row] - ++num_others] = node;
    }
    b->num_prefix[row] = num_prefix;
}

#define DEFINE_ATTEND(X)                                                                                              \
    /* A row's nodes and the chunk that holds what not all of them see. Neighbours that see all of it go together;    \
     * those that do not see a prefix of it put their own path there. What a node does not see weighs nothing, which  \
     * takes a number: rows from `filled` on are zeros meanwhile. */                                                  \
    static void attend_to_end_##X(const batch *b, const task *own, i64 row, i64 first, i64 size, i64 head,            \
                                  const X *keys, const X *values, const float *queries, float *states, float *columns,\
                                  float *rows, ahead *next) {                                                         \
        const i64 *order = b->order + row * b->most_nodes, *num_seen = b->num_seen + row * b->most_nodes;             \
        i64 length = b->lengths[row], stride = b->kv_heads * b->width, last = find_last(b, own, row), filled = size;  \
        for (i64 turn = 0, count; turn < b->nodes[row]; turn += count) {                                              \
            i64 node = order[turn], end = length + num_seen[node] - first, at = node * b->repeats;                    \
            count = 1;                                                                                                \
            if (end <= 0 || node < own->node || node >= last) continue;                                               \
            i64 most = turn < b->num_prefix[row] && end >= size ? b->num_prefix[row] - turn : 1;                      \
            while (count < most && node + count < last && order[turn + count] == node + count &&                      \
                   length + num_seen[node + count] - first >= size)                                                   \
                count++;                                                                                              \
            end = end < size ? end : size;                                                                            \
            if (turn < b->num_prefix[row] && end > filled)                                                            \
                for (i64 p = filled; p < end; p++)                                                                    \
                    put_value_##X(values + place_of(b, row, first + p) * stride + head * b->width, rows, p, b->width, \
                                  b->padded);                                                                         \
            const uint8_t *sees = b->visible + (row * b->most_nodes + node) * b->seen;                                \
            for (i64 e = 0, to = length - first; turn >= b->num_prefix[row] && to < end; e++) {                       \
                if (!sees[e]) continue;                                                                               \
                i64 from = place_of(b, row, length + e) * stride + head * b->width;                                   \
                for (i64 j = 0; to >= 0 && j < b->width; j++) put_key_##X(columns, to, j, keys[from + j]);            \
                if (to >= 0) put_value_##X(values + from, rows, to, b->width, b->padded);                             \
                to++;                                                                                                 \
            }                                                                                                         \
            if (end < filled) clear_values_##X(rows, end, filled, b->padded);                                         \
            filled = end;                                                                                             \
            attend_to_chunk_##X(queries + at * b->padded, states + at * ROOM(b->padded), count * b->repeats, columns, \
                                rows, end, b->padded, b->scale, next);                                                \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    /* queries, states: [query of all rows, *], a state for each segment; see find_query and find_states. */          \
    static void attend_to_segment_##X(const batch *b, const task *own, const task *soon, const X *keys,               \
                                      const X *values, const float *queries, float *states, float *scratch,           \
                                      float *columns) {                                                               \
        i64 stride = b->kv_heads * b->width, room = ROOM(b->padded);                                                  \
        float *rows = columns + CHUNK * b->padded;                                                                    \
        for (i64 row = own->row; row < own->end; row++)                                                               \
            for (i64 head = own->head; head < own->last_head; head++)                                                 \
                for (i64 i = own->node * b->repeats; i < find_last(b, own, row) * b->repeats; i++) {                  \
                    float *state = find_states(b, own, row, head, states, scratch) + i * room;                        \
                    memset(state, 0, room * sizeof(float));                                                           \
                    *BEST(state, b->padded) = -INFINITY;                                                              \
                }                                                                                                     \
        for (i64 first = own->first; first < own->first + SEGMENT; first += CHUNK)                                    \
            for (i64 row = own->row, end; row < own->end; row = end) {                                                \
                i64 left = count_positions(b, row) - first, size = left < CHUNK ? left : CHUNK;                       \
                end = row + 1;                                                                                        \
                if (size <= 0) continue;                                                                              \
                while (end < own->end && shares_chunk(b, row, end, first)) end++;                                     \
                i64 place = place_of(b, row, first) * stride, soonest = find_next(b, own, soon, end, first);          \
                i64 after = soonest < 0 ? place : soonest * stride;                                                   \
                i64 steps = count_batches(b, own, row, end) * b->padded / 2;                                          \
                ahead next = {(const char *)(keys + after), (const char *)(values + after), 0};                       \
                if (soonest >= 0) next.pace = CHUNK * b->width * (i64)sizeof(X) / steps;                              \
                for (i64 head = own->head; head < own->last_head; head++) {                                           \
                    i64 start = place + head * b->width;                                                              \
                    read_keys_##X(keys + start, columns, size, stride, b->width);                                     \
                    read_values_##X(values + start, rows, size, stride, b->width, b->padded);                         \
                    for (i64 each = row; each < end; each++) {                                                        \
                        const float *query = queries + find_query(b, each, head) * b->padded;                         \
                        float *state = find_states(b, own, each, head, states, scratch);                              \
                        i64 from = own->node * b->repeats, count = find_last(b, own, each) * b->repeats - from;       \
                        if (first + CHUNK <= b->lengths[each])                                                        \
                            attend_to_chunk_##X(query + from * b->padded, state + from * room, count, columns, rows,  \
                                                size, b->padded, b->scale, &next);                                    \
                        else                                                                                          \
                            attend_to_end_##X(b, own, each, first, size, head, keys, values, query, state, columns,   \
                                              rows, &next);                                                           \
                    }                                                                                                 \
                }                                                                                                     \
            }                                                                                                         \
    }                                                                                                                 \
                                                                                                                      \
    /* A long row's further segments are added as they come. */                                                       \
    static void run_task_##X(const batch *b, const task *own, const task *soon, const X *keys, const X *values,       \
                             const float *queries, float *states, float *scratch, float *columns) {                   \
        attend_to_segment_##X(b, own, soon, keys, values, queries, states, scratch, columns);                         \
        if (!b->is_long[own->row]) return;                                                                            \
        task next = *own;                                                                                             \
        while ((next.first += SEGMENT) < count_positions(b, own->row)) {                                              \
            attend_to_segment_##X(b, &next, soon, keys, values, queries, states, scratch, columns);                   \
            for (i64 head = own->head; head < own->last_head; head++)                                                 \
                for (i64 i = own->node * b->repeats; i < find_last(b, own, own->row) * b->repeats; i++)               \
                    add_state(find_states(b, own, own->row, head, states, scratch) + i * ROOM(b->padded),             \
                              find_states(b, &next, own->row, head, states, scratch) + i * ROOM(b->padded), b->padded);\
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    static void take_queries_##X(const batch *b, const X *query, i64 stride, i64 row, i64 head, float *to) {          \
        for (i64 node = 0; node < b->nodes[row]; node++)                                                              \
            for (i64 r = 0; r < b->repeats; r++, to += b->padded) {                                                   \
                const X *from = query + (b->starts[row] + node) * stride + (head * b->repeats + r) * b->width;        \
                for (i64 j = 0; j < b->width; j++) put_query_##X(to, j, from[j]);                                     \
                for (i64 j = b->width; j < b->padded; j++) put_query_##X(to, j, 0);                                   \
            }                                                                                                         \
    }                                                                                                                 \
                                                                                                                      \
    /* A row's segments, added up in their order. */                                                                  \
    static void write_row_##X(const batch *b, float *states, i64 row, i64 head, X *out) {                             \
        for (i64 node = 0, i = 0; node < b->nodes[row]; node++)                                                       \
            for (i64 r = 0; r < b->repeats; r++, i++) {                                                               \
                float *sum = states + (find_state(b, row, 0, head) + i) * ROOM(b->padded);                            \
                for (i64 first = SEGMENT; first / SEGMENT < count_segments(b, row); first += SEGMENT)                 \
                    add_state(sum, states + (find_state(b, row, first, head) + i) * ROOM(b->padded), b->padded);      \
                i64 token = b->starts[row] + node, own = head * b->repeats + r;                                       \
                write_values_##X(out + (token * b->kv_heads * b->repeats + own) * b->width, sum,                      \
                                 sum_lane(*MASS(sum, b->padded)), b->width);                                          \
            }                                                                                                         \
    }                                                                                                                 \
                                                                                                                      \
    /* Nodes of `rows` trees over their own cached positions.                                                         \
     *                                                                                                                \
     * query: [tokens, heads, width], tokens `stride` numbers apart; row b has nodes[b] of them from starts[b] on.    \
     * out: the same, one after the other.                                                                            \
     * keys, values: [*, kv_heads * width]; position p of row b is number blocks[b][p / BLOCK] + p % BLOCK, where     \
     * blocks is [rows, most_blocks]. Rows may share blocks: siblings read the same lines of their prompt.            \
     * visible: [rows, most_nodes, seen]: entry (b, n, e) says whether node n sees position lengths[b] + e; every node\
     * sees all positions below lengths[b]. */                                                                        \
    int fastgrpo_attend_##X(const X *query, i64 stride, const X *keys, const X *values, X *out, i64 rows,             \
                             const i64 *starts, const i64 *nodes, const i64 *lengths, const i64 *blocks,              \
                             i64 most_blocks, const uint8_t *visible, i64 most_nodes, i64 seen, i64 heads,            \
                             i64 kv_heads, i64 width, float scale) {                                                  \
        i64 padded = (width + PAIR - 1) / PAIR * PAIR, num_tasks = 0, work = 0;                                       \
        i64 *table = malloc((rows + 1) * (2 * most_nodes + 4) * sizeof(i64));                                         \
        if (!table) return NO_MEMORY;                                                                                 \
        batch b = {rows, starts, nodes, lengths, blocks, most_blocks, visible, most_nodes, seen, kv_heads,            \
                   heads / kv_heads, width, padded, scale, table, table + rows + 1, table + 2 * (rows + 1),           \
                   table + 3 * (rows + 1), table + (3 + most_nodes) * (rows + 1),                                     \
                   table + (3 + 2 * most_nodes) * (rows + 1)};                                                        \
        int has_long = find_long(&b, (i64)MOST_STATES * omp_get_max_threads());                                       \
        b.first_query[0] = b.first_state[0] = 0;                                                                      \
        for (i64 row = 0; row < rows; row++) {                                                                        \
            i64 segments = count_segments(&b, row), blocks_of_nodes = (nodes[row] + MOST_NODES - 1) / MOST_NODES;     \
            b.first_query[row + 1] = b.first_query[row] + nodes[row] * heads;                                         \
            b.first_state[row + 1] = b.first_state[row] + nodes[row] * heads * segments;                              \
            num_tasks += segments * blocks_of_nodes;                                                                  \
        }                                                                                                             \
        i64 num_queries = b.first_query[rows] * padded, num_states = b.first_state[rows] * ROOM(padded);              \
        task *tasks = malloc((num_tasks + 1) * kv_heads * sizeof(task));                                              \
        float *queries = aligned_alloc(64, (num_queries + num_states) * sizeof(float));                               \
        if (!tasks || !queries) {                                                                                     \
            free(queries), free(tasks), free(table);                                                                  \
            return NO_MEMORY;                                                                                         \
        }                                                                                                             \
        num_tasks = list_tasks(&b, kv_heads, tasks);                                                                  \
        if (num_tasks < FEW_TASKS * omp_get_max_threads()) num_tasks = list_tasks(&b, 1, tasks);                      \
        for (i64 number = 0; number < num_tasks; number++) work += count_work(&b, tasks + number);                    \
        float *states = queries + num_queries;                                                                        \
        int is_short = 0; /* of memory */                                                                             \
        _Pragma("omp parallel if (rows * kv_heads > 1)")                                                              \
        {                                                                                                             \
            i64 num_columns = 2 * CHUNK * padded, num_scratch = has_long ? MOST_NODES * heads : 0;                    \
            float *columns = aligned_alloc(64, (num_columns + num_scratch * ROOM(padded)) * sizeof(float));           \
            if (columns) memset(columns, 0, num_columns * sizeof(float));                                             \
            else {                                                                                                    \
                _Pragma("omp atomic write")                                                                           \
                is_short = 1;                                                                                         \
            }                                                                                                         \
            _Pragma("omp for collapse(2)")                                                                            \
            for (i64 row = 0; row < rows; row++)                                                                      \
                for (i64 head = 0; head < kv_heads; head++) {                                                         \
                    if (head == 0) order_nodes(&b, row);                                                              \
                    float *to = queries + find_query(&b, row, head) * padded;                                         \
                    take_queries_##X(&b, query, stride, row, head, to);                                               \
                }                                                                                                     \
            i64 thread = omp_get_thread_num(), threads = omp_get_num_threads();                                       \
            i64 stop = find_share(&b, tasks, num_tasks, work, thread + 1, threads);                                   \
            for (i64 mine = find_share(&b, tasks, num_tasks, work, thread, threads); mine < stop && !is_short; mine++)\
                run_task_##X(&b, tasks + mine, mine + 1 < stop ? tasks + mine + 1 : NULL, keys, values, queries,      \
                             states, columns + num_columns, columns); /* a task asks for the memory of the next one */\
            _Pragma("omp barrier")                                                                                    \
            _Pragma("omp for collapse(2)")                                                                            \
            for (i64 row = 0; row < rows; row++)                                                                      \
                for (i64 head = 0; head < kv_heads; head++)                                                           \
                    if (!is_short) write_row_##X(&b, states, row, head, out);                                         \
            free(columns);                                                                                            \
        }                                                                                                             \
        free(queries), free(tasks), free(table);                                                                      \
        return is_short ? NO_MEMORY : 0;                                                                              \
    }

DEFINE_ATTEND(bf16)
DEFINE_ATTEND(float)
