/* Draft trees on the host: grown level by level, pruned to the best nodes, and what the target's walk says of them.
 *
 * The small operations between the passes of a drafter; PyTorch's counterparts are in drafters/pools.py, verify.py,
 * tree.py and drafters/calibration.py. Rows are trees of their own.
 */

#include <stdlib.h>

#include "common.h"

#define LEAST_MISS -1e-6f /* log chances are taken for this at most where log-odds are computed */
#define MOST_ODDS 8.0f

static inline float log_odds(float chance) {
    float odds = chance - logf(-expm1f(chance < LEAST_MISS ? chance : LEAST_MISS));
    return odds < -MOST_ODDS ? -MOST_ODDS : odds > MOST_ODDS ? MOST_ODDS : odds;
}

/* log(sigmoid(slope * odds + offset)); an absent candidate stays one */
static inline float calibrate(float chance, float slope, float offset) {
    if (chance == -INFINITY || (slope == 1.0f && offset == 0.0f)) return chance;
    float x = slope * log_odds(chance) + offset;
    return (x < 0 ? x : 0.0f) - log1pf(expf(x < 0 ? x : -x));
}

/* The candidates of a level join the pool (`capacity` places a row, `filled` of them taken), and the best `most` of
 * them are chosen to be expanded.
 *
 * places, sums: of the nodes expanded last: where they stand in the tree (0 is the root), log chance from there.
 * visible: their ancestors among the `expanded` nodes so far, themselves included.
 * above, out_*: of those chosen: place of the parent among the nodes expanded last; the same of themselves.
 *
 * The candidates of a wide level, and in `fastgrpo_prune` those of a tree, are more than a stack may hold.
 */
int fastgrpo_grow_level(const float *chances, const i64 *tokens, i64 rows, i64 nodes, i64 children, float slope,
                        float offset, float penalty, const i64 *places, const float *sums, const uint8_t *visible,
                        i64 expanded, i64 capacity, i64 filled, float *pool_chances, i64 *pool_tokens,
                        float *pool_sums, i64 *pool_parents, i64 most, i64 *out_tokens, i64 *above, i64 *out_places,
                        float *out_sums, uint8_t *out_visible) {
    i64 width = nodes * children, seen = expanded + most;
    float *score = malloc((width + 1) * sizeof *score);
    if (!score) return NO_MEMORY;
    for (i64 row = 0; row < rows; row++) {
        i64 first = row * capacity + filled, best[most + 1];
        float value[most + 1];
        for (i64 i = 0; i < width; i++) {
            i64 node = row * nodes + i / children;
            pool_chances[first + i] = chances[row * width + i];
            pool_tokens[first + i] = tokens[row * width + i];
            pool_parents[first + i] = places[node];
            score[i] = sums[node] + calibrate(chances[row * width + i], slope, offset) - penalty;
            pool_sums[first + i] = score[i];
        }
        take_best(score, width, most, value, best);
        for (i64 n = 0; n < most; n++) {
            i64 own = row * most + n;
            above[own] = best[n] / children;
            out_tokens[own] = tokens[row * width + best[n]];
            out_places[own] = 1 + filled + best[n];
            out_sums[own] = value[n];
            uint8_t *mask = out_visible + own * seen;
            if (expanded) memcpy(mask, visible + (row * nodes + above[own]) * expanded, expanded);
            memset(mask + expanded, 0, most);
            mask[expanded + n] = 1;
        }
    }
    free(score);
    return 0;
}

/* The best `most` candidates of each row behind its root, best first, so that parents stand before their children.
 * Absent ones, whose sum is -infinity, end a row. `sums` are used up.
 */
int fastgrpo_prune(const float *chances, const i64 *tokens, float *sums, const i64 *parents, i64 rows, i64 capacity,
                   i64 filled, i64 most, const i64 *roots, i64 *out_tokens, i64 *out_parents, i64 *num_nodes,
                   float *out_chances, float *out_sums) {
    i64 *place = malloc((filled + 1) * sizeof *place);
    if (!place) return NO_MEMORY;
    for (i64 row = 0; row < rows; row++) {
        i64 first = row * capacity, out = row * (most + 1), best[most + 1];
        float value[most + 1];
        take_best(sums + first, filled, most, value, best);
        out_tokens[out] = roots[row], out_parents[out] = -1, out_chances[out] = 0, out_sums[out] = 0;
        num_nodes[row] = 1, place[0] = 0;
        for (i64 n = 0; n < most; n++)
            if (value[n] > -INFINITY) place[1 + best[n]] = num_nodes[row]++;
        for (i64 n = 0; n < most; n++) {
            int used = value[n] > -INFINITY;
            out_tokens[out + 1 + n] = used ? tokens[first + best[n]] : 0;
            out_parents[out + 1 + n] = used ? place[parents[first + best[n]]] : -1;
            out_chances[out + 1 + n] = used ? chances[first + best[n]] : 0;
            out_sums[out + 1 + n] = value[n];
        }
    }
    free(place);
    return 0;
}

/* visible[b, i, j]: node j is node i or an ancestor of it */
void fastgrpo_find_ancestors(const i64 *parents, i64 rows, i64 nodes, uint8_t *visible) {
    for (i64 i = 0; i < rows * nodes; i++) {
        uint8_t *own = visible + i * nodes;
        i64 node = i % nodes;
        if (parents[i] >= 0)
            memcpy(own, own + (parents[i] - node) * nodes, nodes);
        else
            memset(own, 0, nodes);
        own[node] = 1;
    }
}

/* Of each row, the chances of all nodes but the root, added up. */
void fastgrpo_sum_chances(const float *scores, i64 rows, i64 nodes, float *sums) {
    for (i64 row = 0; row < rows; row++) {
        sums[row] = 0;
        for (i64 n = 1; n < nodes; n++) sums[row] += expf(scores[row * nodes + n]);
    }
}

/* Children of each walked node, and the place among them of the one that the target chose, or -1. */
void fastgrpo_find_ranks(const i64 *path, const i64 *chosen, i64 rows, i64 levels, const i64 *tokens,
                         const i64 *parents, i64 nodes, i64 *num_children, i64 *ranks) {
    for (i64 at = 0; at < rows * levels; at++) {
        const i64 *links = parents + at / levels * nodes, *below = tokens + at / levels * nodes;
        num_children[at] = 0, ranks[at] = -1;
        if (path[at] < 0) continue;
        for (i64 n = path[at] + 1; n < nodes; n++)
            if (links[n] == path[at]) {
                if (below[n] == chosen[at]) ranks[at] = num_children[at];
                num_children[at]++;
            }
    }
}

/* Whether the next node of one tree comes before another's: the likelier one, of equal ones the earlier tree's. */
static inline int is_before(const float *scores, i64 nodes, const i64 *next, i64 a, i64 b) {
    float own = scores[a * nodes + next[a]], other = scores[b * nodes + next[b]];
    return own > other || (own == other && a < b);
}

/* A heap of trees, the one with the likeliest next node at its top, where `at` may stand too high. */
static void sift(i64 *heap, i64 size, i64 at, const float *scores, i64 nodes, const i64 *next) {
    for (i64 below; (below = 2 * at + 1) < size; at = below) {
        if (below + 1 < size && is_before(scores, nodes, next, heap[below + 1], heap[below])) below++;
        if (!is_before(scores, nodes, next, heap[below], heap[at])) return;
        i64 tree = heap[at];
        heap[at] = heap[below], heap[below] = tree;
    }
}

/* The chances of all nodes but the roots, in falling order, and the tree of each. Those of a tree fall as they stand.
 * Returns how many there are.
 */
int fastgrpo_rank_nodes(const float *scores, i64 rows, i64 nodes, const i64 *counts, double *chances, i64 *trees) {
    i64 heap[rows + 1], next[rows + 1], size = 0, total = 0;
    for (i64 row = 0; row < rows; row++) {
        next[row] = 1;
        if (counts[row] > 1) heap[size++] = row;
    }
    for (i64 at = size / 2; at-- > 0;) sift(heap, size, at, scores, nodes, next);
    for (; size; total++) {
        i64 tree = trees[total] = heap[0];
        chances[total] = exp(scores[tree * nodes + next[tree]]);
        if (++next[tree] == counts[tree]) heap[0] = heap[--size];
        sift(heap, size, 0, scores, nodes, next);
    }
    return (int)total;
}

/* The first `counts` nodes of each tree, `most` at most; those beyond are marked as unused. */
void fastgrpo_keep_nodes(const i64 *parents, const float *scores, i64 rows, i64 nodes, const i64 *counts, i64 most,
                         i64 *out_parents, float *out_scores) {
    for (i64 row = 0; row < rows; row++)
        for (i64 n = 0; n < most; n++) {
            int is_used = n < counts[row];
            out_parents[row * most + n] = is_used ? parents[row * nodes + n] : -1;
            out_scores[row * most + n] = is_used ? scores[row * nodes + n] : -INFINITY;
        }
}

/* Adds the children of walked nodes to tables of [levels, bins] by depth and log-odds, and those walked to; what was
 * there counts for `decay` of itself. */
void fastgrpo_count_judged(const i64 *path, i64 rows, i64 steps, const i64 *parents, const float *chances, i64 nodes,
                           i64 levels, i64 bins, double *offered, double *hits, double decay) {
    float scale = (float)(bins - 1) / (2 * MOST_ODDS);
    for (i64 i = 0; i < levels * bins; i++) offered[i] *= decay, hits[i] *= decay;
    for (i64 row = 0; row < rows; row++) {
        i64 depth[nodes];
        for (i64 n = 0; n < nodes; n++) depth[n] = -1;
        for (i64 step = 0; step < steps; step++)
            if (path[row * steps + step] >= 0) depth[path[row * steps + step]] = step;
        for (i64 n = 1; n < nodes; n++) {
            i64 parent = parents[row * nodes + n];
            float chance = chances[row * nodes + n];
            if (parent < 0 || depth[parent] < 0 || chance == -INFINITY) continue;
            i64 level = depth[parent] < levels ? depth[parent] : levels - 1;
            i64 cell = level * bins + (i64)rintf((log_odds(chance) + MOST_ODDS) * scale);
            offered[cell] += 1;
            hits[cell] += depth[n] >= 0;
        }
    }
}

/* Walked nodes of each row move to the positions behind its `lengths` ones, in all layers of keys and values; their
 * features, which stand packed from `starts` on, are written there, where there are any. Sizes are bytes. A path's
 * nodes rise, so that none is written over before it is read.
 */
void fastgrpo_keep_path(const i64 *path, i64 rows, i64 levels, const i64 *lengths, const i64 *blocks, i64 most_blocks,
                        char *keys, char *values, i64 layers, i64 plane, i64 size, char *cached, const char *features,
                        const i64 *starts, i64 feature_size) {
    for (i64 row = 0; row < rows; row++)
        for (i64 level = 0; level < levels && path[row * levels + level] >= 0; level++) {
            i64 node = path[row * levels + level];
            i64 from = find_place(blocks + row * most_blocks, most_blocks, lengths[row] + node);
            i64 to = find_place(blocks + row * most_blocks, most_blocks, lengths[row] + level);
            for (i64 layer = 0; node > level && layer < layers; layer++) {
                memcpy(keys + layer * plane + to * size, keys + layer * plane + from * size, size);
                memcpy(values + layer * plane + to * size, values + layer * plane + from * size, size);
            }
            if (!features) continue;
            memcpy(cached + to * feature_size, features + (starts[row] + node) * feature_size, feature_size);
        }
}
