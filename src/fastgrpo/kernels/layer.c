/* Whole decoder layers in one call: the kernels of decoder.c and products.c in the order that `decoder.FusedDecoder`
 * calls them in, so that the bits are the same and only the way from Python is saved, some nine times a layer.
 *
 * The records are those of layers.py, field by field, and so is the room for what stands in between (scratch). R: type
 * of residual, norms and rotation, X: of the products.
 */

#include "common.h"

typedef struct {
    const void *weight; /* or none, where a layer has no such norm */
    float eps;
} norm;

typedef struct {
    const void *layout, *bias;
    i64 inputs, outputs;
} linear;

typedef struct {
    norm before_attention, query_norm, key_norm, before_mlp;
    linear states, output, gate_and_up, down;
    i64 heads, kv_heads, width;
    float scale;
} layer;

typedef struct {
    const void *cosine, *sine;
    const i64 *places;
    void *keys, *values;
    i64 plane; /* numbers from the keys of one layer to those of the next */
    const i64 *starts, *nodes, *lengths, *blocks;
    const uint8_t *visible;
    i64 tokens, rows, most_blocks, most_nodes, seen;
} batch;

#define DECLARE(X)                                                                                                    \
    void fastgrpo_product_##X(const X *, i64, const void *, const X *, X *, i64, i64, i64);                           \
    void fastgrpo_silu_##X(const X *, X *, i64, i64);                                                                 \
    void fastgrpo_attend_##X(const X *, i64, const X *, const X *, X *, i64, const i64 *, const i64 *, const i64 *,   \
                             const i64 *, i64, const uint8_t *, i64, i64, i64, i64, i64, float);                      \
    static inline void multiply_##X(const linear *own, const X *x, i64 rows, X *out) {                                \
        fastgrpo_product_##X(x, own->inputs, own->layout, own->bias, out, rows, own->inputs, own->outputs);           \
    }

DECLARE(bf16)
DECLARE(float)

#define DEFINE_LAYER(R, X)                                                                                            \
    void fastgrpo_add_norm_##R##_##X(R *, const X *, const R *, X *, i64, i64, float);                                \
    void fastgrpo_head_norm_##R##_##X(X *, i64, const R *, i64, i64, i64, float);                                     \
    void fastgrpo_rotate_##R##_##X(X *, const R *, const R *, i64, i64, i64, i64, const i64 *, X *, X *);             \
                                                                                                                      \
    /* What follows the first norm, whose output is x. The residual takes the attention's output; that of the MLP is  \
     * left in delta. */                                                                                              \
    void fastgrpo_layer_##R##_##X(const layer *own, const batch *b, i64 number, const X *x, R *residual, X *delta,    \
                                  X *scratch) {                                                                       \
        i64 tokens = b->tokens, queries = own->heads * own->width, stride = own->states.outputs;                      \
        i64 hidden = own->output.outputs, inner = own->down.inputs;                                                   \
        X *keys = (X *)b->keys + number * b->plane, *values = (X *)b->values + number * b->plane;                     \
        X *states = scratch;                                                                                          \
        X *attended = states + tokens * stride, *normed = attended + tokens * queries;                                \
        X *both = normed + tokens * hidden, *active = both + 2 * tokens * inner;                                      \
        multiply_##X(&own->states, x, tokens, states);                                                                \
        if (own->query_norm.weight)                                                                                   \
            fastgrpo_head_norm_##R##_##X(states, stride, own->query_norm.weight, tokens, own->heads, own->width,      \
                                         own->query_norm.eps);                                                        \
        if (own->key_norm.weight)                                                                                     \
            fastgrpo_head_norm_##R##_##X(states + queries, stride, own->key_norm.weight, tokens, own->kv_heads,       \
                                         own->width, own->key_norm.eps);                                              \
        fastgrpo_rotate_##R##_##X(states, b->cosine, b->sine, tokens, own->heads, own->kv_heads, own->width,          \
                                  b->places, keys, values);                                                           \
        fastgrpo_attend_##X(states, stride, keys, values, attended, b->rows, b->starts, b->nodes, b->lengths,         \
                            b->blocks, b->most_blocks, b->visible, b->most_nodes, b->seen, own->heads, own->kv_heads, \
                            own->width, own->scale);                                                                  \
        multiply_##X(&own->output, attended, tokens, delta);                                                          \
        fastgrpo_add_norm_##R##_##X(residual, delta, own->before_mlp.weight, normed, tokens, hidden,                  \
                                    own->before_mlp.eps);                                                             \
        multiply_##X(&own->gate_and_up, normed, tokens, both);                                                        \
        fastgrpo_silu_##X(both, active, tokens, inner);                                                               \
        multiply_##X(&own->down, active, tokens, delta);                                                              \
    }                                                                                                                 \
                                                                                                                      \
    /* `count` layers, one after the other; delta is still to be added to the residual. kept: where to put the input  \
     * of each layer that is asked for, else none. */                                                                 \
    void fastgrpo_layers_##R##_##X(const layer *layers, i64 count, const batch *b, R *residual, R *const *kept,       \
                                   X *delta, X *scratch) {                                                            \
        i64 size = b->tokens * layers->output.outputs;                                                                \
        X *x = scratch;                                                                                               \
        for (i64 number = 0; number < count; number++) {                                                              \
            const norm *first = &layers[number].before_attention;                                                     \
            fastgrpo_add_norm_##R##_##X(residual, number ? delta : NULL, first->weight, x, b->tokens,                 \
                                        layers->output.outputs, first->eps);                                          \
            if (kept[number]) memcpy(kept[number], residual, size * sizeof(R));                                       \
            fastgrpo_layer_##R##_##X(layers + number, b, number, x, residual, delta, scratch + size);                 \
        }                                                                                                             \
    }

DEFINE_LAYER(bf16, bf16)
DEFINE_LAYER(float, float)
DEFINE_LAYER(float, bf16)

/* ---- the layer of an EAGLE-3 head --------------------------------------------------------------------------- */

typedef struct {
    norm embedded, hidden; /* side by side they are the layer's input */
    i64 keeps_normed;      /* the residual is the normed hidden state */
} pairing;

/* The output for pairs of a hidden state and a token. above: which hidden state each has; none: its own. */
#define DEFINE_PAIRS(X)                                                                                               \
    void fastgrpo_pairs_##X(const pairing *pair, const layer *own, const batch *b, const X *embeddings,               \
                            const i64 *tokens, const X *hidden, const i64 *above, X *out, X *scratch) {               \
        i64 size = own->output.outputs;                                                                               \
        X *x = scratch, *delta = x + 2 * b->tokens * size;                                                            \
        for (i64 t = 0; t < b->tokens; t++) {                                                                         \
            X *left = x + 2 * t * size, *right = left + size;                                                         \
            X *embedded = (X *)embeddings + tokens[t] * size, *state = (X *)hidden + (above ? above[t] : t) * size;   \
            fastgrpo_add_norm_##X##_##X(embedded, NULL, pair->embedded.weight, left, 1, size, pair->embedded.eps);    \
            fastgrpo_add_norm_##X##_##X(state, NULL, pair->hidden.weight, right, 1, size, pair->hidden.eps);          \
            memcpy(out + t * size, pair->keeps_normed ? right : state, size * sizeof(X));                             \
        }                                                                                                             \
        fastgrpo_layer_##X##_##X(own, b, 0, x, out, delta, delta + b->tokens * size);                                 \
        for (i64 i = 0; i < b->tokens * size; i++) store_##X(out + i, load_##X(out + i) + load_##X(delta + i));       \
    }

DEFINE_PAIRS(bf16)
DEFINE_PAIRS(float)
