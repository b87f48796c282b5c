/* Whole drafts of an EAGLE-3 head in one call: its passes (layer.c) and what stands between them (decoder.c, noise.c,
 * trees.c), in the order that `beams.grow_trees` calls them in, so that the trees are the same and only the way from
 * Python is saved, which takes longer than the passes of a few sequences.
 *
 * E: type of the embeddings, X: of the head.
 */

#include <stdlib.h>

#include "common.h"
#include "records.h"

/* What a draft is made from; heads.py has the same, field by field. */
typedef struct {
    const void *embeddings, *cosine, *sine; /* the latter of all positions that there are */
    void *keys, *values;                    /* of the head's own rows */
    const i64 *own_blocks;
    i64 most_own_blocks;
    const void *features; /* of the target, rows `stride` numbers apart */
    i64 stride;
    const i64 *blocks; /* where they stand, from the head's first position on */
    i64 most_blocks;
    const i64 *roots, *lengths, *num_read, *num_unread, *unread; /* unread: [rows, most_unread] token ids */
    i64 rows, most_unread, num_tokens;                            /* num_tokens: unread ones of all rows */
    const int32_t *vocabulary;
    const i64 *stream_keys, *positions;
    const float *temperatures;
    i64 is_noisy;
    const float *lines; /* slope and offset of each level's calibration */
    float penalty;
    i64 depth, width, num_between, num_between_read; /* of a token in a pass of the head, in the first one */
} draft;

/* Nodes that are expanded next, [rows, width] of each at most; see `fastgrpo_grow_level`. */
typedef struct {
    i64 *tokens, *above, *places;
    float *sums;
    uint8_t *visible;
} beam;

/* Room for what stands in between. */
typedef struct {
    beam beams[2];
    void *hidden[2], *logits, *scratch;
    i64 *tokens, *positions, *places, *starts, *nodes; /* of a pass */
    float *chances, *pool_chances, *pool_sums;
    i64 *candidates, *pool_tokens, *pool_parents;
} rooms;

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 most(i64 a, i64 b) { return a > b ? a : b; }

static inline i64 count_children(const head *own, const draft *d) { return least(d->width, own->output.outputs); }

/* Candidates of a tree at most. */
static inline i64 count_candidates(const head *own, const draft *d) {
    return count_children(own, d) * (1 + d->width * (d->depth - 1));
}

/* The next of all rooms, which stand behind one another; NULL where they are only measured. */
static inline void *take(char *room, i64 *used, i64 count, i64 size) {
    void *taken = room ? room + *used : NULL;
    *used += (count * size + 63) / 64 * 64;
    return taken;
}

/* Returns the bytes of all rooms. size: of a number of the head. */
static i64 place_rooms(const head *own, const draft *d, i64 size, char *room, rooms *r) {
    i64 used = 0;
    i64 level = d->rows * d->width, seen = most(d->most_unread, d->width * d->depth);
    i64 hidden = own->output.inputs, tokens = most(d->num_tokens, level), expanded = most(d->most_unread, d->width);
    i64 between = most(d->num_tokens * d->num_between_read, level * most(d->num_between, hidden));
    for (int i = 0; i < 2; i++) {
        beam *b = r->beams + i;
        b->tokens = take(room, &used, level, sizeof(i64)), b->above = take(room, &used, level, sizeof(i64));
        b->places = take(room, &used, level, sizeof(i64)), b->sums = take(room, &used, level, sizeof(float));
        b->visible = take(room, &used, d->rows * expanded * seen, 1);
        r->hidden[i] = take(room, &used, level * hidden, size);
    }
    r->logits = take(room, &used, level * own->output.outputs, size), r->scratch = take(room, &used, between, size);
    r->tokens = take(room, &used, tokens, sizeof(i64)), r->positions = take(room, &used, tokens, sizeof(i64));
    r->places = take(room, &used, tokens, sizeof(i64)), r->starts = take(room, &used, d->rows, sizeof(i64));
    r->nodes = take(room, &used, d->rows, sizeof(i64));
    i64 children = level * count_children(own, d), all = d->rows * count_candidates(own, d);
    r->chances = take(room, &used, children, sizeof(float)), r->candidates = take(room, &used, children, sizeof(i64));
    r->pool_chances = take(room, &used, all, sizeof(float)), r->pool_sums = take(room, &used, all, sizeof(float));
    r->pool_tokens = take(room, &used, all, sizeof(i64)), r->pool_parents = take(room, &used, all, sizeof(i64));
    return used;
}

void fastgrpo_lay_out(const i64 *, const i64 *, const uint8_t *, const i64 *, const i64 *, i64, i64, i64, i64, i64 *,
                      i64 *, i64 *, i64 *);
int fastgrpo_grow_level(const float *, const i64 *, i64, i64, i64, float, float, float, const i64 *, const float *,
                        const uint8_t *, i64, i64, i64, float *, i64 *, float *, i64 *, i64, i64 *, i64 *, i64 *,
                        float *, uint8_t *);
int fastgrpo_prune(const float *, const i64 *, float *, const i64 *, i64, i64, i64, i64, const i64 *, i64 *, i64 *,
                   i64 *, float *, float *);

/* The rows of a pass: `width` nodes of each at most, which see `seen` positions behind its `lengths` ones. */
static batch lay_out(const draft *d, rooms *r, const i64 *ids, const i64 *nodes, const uint8_t *visible,
                     const i64 *lengths, i64 num_tokens, i64 width, i64 seen) {
    fastgrpo_lay_out(ids, nodes, visible, lengths, d->own_blocks, d->rows, width, seen, d->most_own_blocks, r->tokens,
                     r->positions, r->places, r->starts);
    return (batch){d->cosine, d->sine, r->tokens, r->positions, r->places, d->keys, d->values, 0, r->starts, nodes,
                   lengths, d->own_blocks, visible, num_tokens, d->rows, d->most_own_blocks, width, seen};
}

/* Every token sees those before it, and itself. */
static void see_before(uint8_t *visible, i64 rows, i64 width) {
    for (i64 i = 0; i < rows * width; i++)
        for (i64 e = 0; e < width; e++) visible[i * width + e] = e <= i % width;
}

#define DEFINE_DRAFT(E, X)                                                                                            \
    int fastgrpo_pairs_##E##_##X(const head *, const batch *, const E *, const X *, const i64 *, i64, X *, X *);      \
    int fastgrpo_read_pairs_##E##_##X(const head *, const batch *, const E *, const X *, i64, const i64 *, i64, X *,  \
                                       X *);                                                                          \
    int fastgrpo_score_##X(const head *, X *, i64, X *, X *);                                                         \
    int fastgrpo_rank_##X(const X *, const int32_t *, const i64 *, const i64 *, const float *, i64, i64, i64, i64,    \
                          i64, float *, i64 *);                                                                       \
                                                                                                                      \
    static int grow_##E##_##X(const head *own, const draft *d, rooms r, i64 *num_candidates) {                        \
        i64 columns = own->output.outputs, children = count_children(own, d), capacity = count_candidates(own, d);    \
        i64 width = 1, before = 1, expanded = 0, filled = 0, at[d->rows];                                             \
        beam *now = r.beams, *next = r.beams + 1;                                                                     \
        X *hidden = r.hidden[0], *out = r.hidden[1];                                                                  \
        see_before(now->visible, d->rows, d->most_unread);                                                            \
        batch b = lay_out(d, &r, d->unread, d->num_unread, now->visible, d->num_read, d->num_tokens, d->most_unread,  \
                          d->most_unread);                                                                            \
        TRY(fastgrpo_read_pairs_##E##_##X(own, &b, d->embeddings, d->features, d->stride, d->blocks, d->most_blocks,  \
                                           hidden, r.scratch));                                                       \
        for (i64 row = 0; row < d->rows; row++) now->places[row] = 0, now->sums[row] = 0; /* the root */              \
        for (i64 level = 0; level < d->depth; level++) {                                                              \
            if (level) {                                                                                              \
                for (i64 row = 0; row < d->rows; row++) r.nodes[row] = width;                                         \
                b = lay_out(d, &r, now->tokens, r.nodes, now->visible, d->lengths, d->rows * width, width, expanded); \
                TRY(fastgrpo_pairs_##E##_##X(own, &b, d->embeddings, hidden, now->above, before, out, r.scratch));    \
                X *last = hidden;                                                                                     \
                hidden = out, out = last;                                                                             \
            }                                                                                                         \
            for (i64 row = 0; row < d->rows; row++) at[row] = d->positions[row] + level;                              \
            TRY(fastgrpo_score_##X(own, hidden, d->rows * width, r.logits, r.scratch));                               \
            TRY(fastgrpo_rank_##X(r.logits, d->vocabulary, d->stream_keys, at, d->temperatures, d->rows, width,       \
                                  columns, children, d->is_noisy, r.chances, r.candidates));                          \
            i64 chosen = level + 1 < d->depth ? least(d->width, width * children) : 0;                                \
            TRY(fastgrpo_grow_level(r.chances, r.candidates, d->rows, width, children, d->lines[2 * level],           \
                                    d->lines[2 * level + 1], d->penalty, now->places, now->sums, now->visible,        \
                                    expanded, capacity, filled, r.pool_chances, r.pool_tokens, r.pool_sums,           \
                                    r.pool_parents, chosen, next->tokens, next->above, next->places, next->sums,      \
                                    next->visible));                                                                  \
            filled += width * children, expanded += chosen, before = width, width = chosen;                           \
            beam *spent = now;                                                                                        \
            now = next, next = spent;                                                                                 \
        }                                                                                                             \
        *num_candidates = filled;                                                                                     \
        return 0;                                                                                                     \
    }                                                                                                                 \
                                                                                                                      \
    /* The best `count` nodes of each tree, as `fastgrpo_prune` leaves them. */                                       \
    int fastgrpo_draft_##E##_##X(const head *own, const draft *d, i64 count, i64 *tokens, i64 *parents,               \
                                  i64 *num_nodes, float *chances, float *sums) {                                      \
        rooms r;                                                                                                      \
        i64 filled, capacity = count_candidates(own, d);                                                              \
        char *room = aligned_alloc(64, place_rooms(own, d, sizeof(X), NULL, &r));                                     \
        if (!room) return NO_MEMORY;                                                                                  \
        place_rooms(own, d, sizeof(X), room, &r);                                                                     \
        int failed = grow_##E##_##X(own, d, r, &filled);                                                              \
        if (!failed)                                                                                                  \
            failed = fastgrpo_prune(r.pool_chances, r.pool_tokens, r.pool_sums, r.pool_parents, d->rows, capacity,    \
                                    filled, least(count, filled), d->roots, tokens, parents, num_nodes, chances,      \
                                    sums);                                                                            \
        free(room);                                                                                                   \
        return failed;                                                                                                \
    }

DEFINE_DRAFT(bf16, bf16)
DEFINE_DRAFT(float, float)
DEFINE_DRAFT(float, bf16)
