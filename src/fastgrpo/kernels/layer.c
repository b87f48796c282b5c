/* Whole decoders in one call: the kernels of decoder.c and products.c in the order that `decoder.FusedDecoder` calls
 * them in, so that the bits are the same and only the way from Python is saved: some nine times a layer, and around the
 * layers, where Python's own memory has left the caches for the weights that were read since.
 *
 * R: type of residual, norms and rotation, X: of the products. The room for what stands in between (scratch) is counted
 * in layers.py and heads.py.
 */

#include "common.h"
#include "records.h"

#define DECLARE(X)                                                                                                    \
    int fastgrpo_product_##X(const X *, i64, const void *, const X *, X *, i64, i64, i64);                            \
    void fastgrpo_silu_##X(const X *, X *, i64, i64);                                                                 \
    int fastgrpo_attend_##X(const X *, i64, const X *, const X *, X *, i64, const i64 *, const i64 *, const i64 *,    \
                             const i64 *, i64, const uint8_t *, i64, i64, i64, i64, i64, float);                      \
    static inline int multiply_##X(const linear *own, const X *x, i64 rows, X *out) {                                 \
        return fastgrpo_product_##X(x, own->inputs, own->layout, own->bias, out, rows, own->inputs, own->outputs);    \
    }

DECLARE(bf16)
DECLARE(float)

/* Rows of x go to rows that lie `stride` numbers apart. */
#define DEFINE_PLACE(R, X)                                                                                            \
    static inline void place_##R##_##X(const R *x, X *out, i64 stride, i64 rows, i64 width) {                         \
        for (i64 row = 0; row < rows; row++)                                                                          \
            for (i64 i = 0; i < width; i++) store_##X(out + row * stride + i, load_##R(x + row * width + i));         \
    }

DEFINE_PLACE(bf16, bf16)
DEFINE_PLACE(float, float)
DEFINE_PLACE(float, bf16)

#define DEFINE_LAYER(R, X)                                                                                            \
    void fastgrpo_add_norm_##R##_##X(R *, const X *, const R *, X *, i64, i64, float);                                \
    void fastgrpo_head_norm_##R##_##X(X *, i64, const R *, i64, i64, i64, float);                                     \
    void fastgrpo_rotate_##R##_##X(X *, const R *, const R *, const i64 *, i64, i64, i64, i64, const i64 *, X *,      \
                                   X *);                                                                              \
                                                                                                                      \
    /* What follows the first norm, whose output is x. The residual takes the attention's output; that of the MLP is  \
     * left in delta. */                                                                                              \
    int fastgrpo_layer_##R##_##X(const layer *own, const batch *b, i64 number, const X *x, R *residual, X *delta,     \
                                  X *scratch) {                                                                       \
        i64 tokens = b->tokens, queries = own->heads * own->width, stride = own->states.outputs;                      \
        i64 hidden = own->output.outputs, inner = own->down.inputs;                                                   \
        X *keys = (X *)b->keys + number * b->plane, *values = (X *)b->values + number * b->plane;                     \
        X *states = scratch;                                                                                          \
        X *attended = states + tokens * stride, *normed = attended + tokens * queries;                                \
        X *both = normed + tokens * hidden, *active = both + 2 * tokens * inner;                                      \
        TRY(multiply_##X(&own->states, x, tokens, states));                                                           \
        if (own->query_norm.weight)                                                                                   \
            fastgrpo_head_norm_##R##_##X(states, stride, own->query_norm.weight, tokens, own->heads, own->width,      \
                                         own->query_norm.eps);                                                        \
        if (own->key_norm.weight)                                                                                     \
            fastgrpo_head_norm_##R##_##X(states + queries, stride, own->key_norm.weight, tokens, own->kv_heads,       \
                                         own->width, own->key_norm.eps);                                              \
        fastgrpo_rotate_##R##_##X(states, b->cosine, b->sine, b->positions, tokens, own->heads, own->kv_heads,        \
                                  own->width, b->places, keys, values);                                               \
        TRY(fastgrpo_attend_##X(states, stride, keys, values, attended, b->rows, b->starts, b->nodes, b->lengths,     \
                            b->blocks, b->most_blocks, b->visible, b->most_nodes, b->seen, own->heads, own->kv_heads, \
                            own->width, own->scale));                                                                 \
        TRY(multiply_##X(&own->output, attended, tokens, delta));                                                     \
        fastgrpo_add_norm_##R##_##X(residual, delta, own->before_mlp.weight, normed, tokens, hidden,                  \
                                    own->before_mlp.eps);                                                             \
        TRY(multiply_##X(&own->gate_and_up, normed, tokens, both));                                                   \
        fastgrpo_silu_##X(both, active, tokens, inner);                                                               \
        return multiply_##X(&own->down, active, tokens, delta);                                                       \
    }                                                                                                                 \
                                                                                                                      \
    /* From token ids to normed hidden states; their logits where there is an output for them; and side by side the   \
     * inputs of the `num_kept` layers in `kept` and the hidden states, where there is room for them (features).      \
     * Returns 0, or NO_MEMORY, or which token, counted from 1, is none of the vocabulary. */                         \
    int fastgrpo_decode_##R##_##X(const decoder *own, const batch *b, const linear *output, const i64 *kept,          \
                                  i64 num_kept, X *hidden, X *features, X *logits, R *residual, X *scratch) {         \
        i64 width = own->layers->output.outputs, size = b->tokens * width, stride = (num_kept + 1) * width;           \
        X *delta = scratch, *x = delta + size;                                                                        \
        for (i64 t = 0; t < b->tokens; t++)                                                                           \
            if (b->ids[t] < 0 || b->ids[t] >= own->vocabulary) return (int)(t + 1);                                   \
        for (i64 t = 0; t < b->tokens; t++)                                                                           \
            memcpy(residual + t * width, (const R *)own->embeddings + b->ids[t] * width, width * sizeof(R));          \
        for (i64 number = 0; number < own->count; number++) {                                                         \
            const norm *first = &own->layers[number].before_attention;                                                \
            fastgrpo_add_norm_##R##_##X(residual, number ? delta : NULL, first->weight, x, b->tokens, width,          \
                                        first->eps);                                                                  \
            for (i64 n = 0; n < num_kept; n++)                                                                        \
                if (kept[n] == number) place_##R##_##X(residual, features + n * width, stride, b->tokens, width);     \
            TRY(fastgrpo_layer_##R##_##X(own->layers + number, b, number, x, residual, delta, x + size));             \
        }                                                                                                             \
        fastgrpo_add_norm_##R##_##X(residual, delta, own->last.weight, hidden, b->tokens, width, own->last.eps);      \
        if (features) place_##X##_##X(hidden, features + num_kept * width, stride, b->tokens, width);                 \
        if (output) TRY(multiply_##X(output, hidden, b->tokens, logits));                                             \
        return 0;                                                                                                     \
    }

DEFINE_LAYER(bf16, bf16)
DEFINE_LAYER(float, float)
DEFINE_LAYER(float, bf16)

/* ---- an EAGLE-3 head ---------------------------------------------------------------------------------------- */

/* E: type of the embeddings. */
#define DEFINE_PAIRS(E, X)                                                                                            \
    /* The output for pairs of a hidden state and a token. above: which of its row's `num_above` hidden states each   \
     * has, of rows that are alike; none: its own. */                                                                 \
    int fastgrpo_pairs_##E##_##X(const head *own, const batch *b, const E *embeddings, const X *hidden,               \
                                  const i64 *above, i64 num_above, X *out, X *scratch) {                              \
        i64 size = own->layer.output.outputs;                                                                         \
        X *x = scratch, *delta = x + 2 * b->tokens * size;                                                            \
        for (i64 t = 0; t < b->tokens; t++) {                                                                         \
            X *left = x + 2 * t * size, *right = left + size;                                                         \
            X *state = (X *)hidden + (above ? t / b->most_nodes * num_above + above[t] : t) * size;                   \
            place_##E##_##X(embeddings + b->ids[t] * size, left, size, 1, size);                                      \
            fastgrpo_add_norm_##X##_##X(left, NULL, own->embedded.weight, left, 1, size, own->embedded.eps);          \
            fastgrpo_add_norm_##X##_##X(state, NULL, own->hidden.weight, right, 1, size, own->hidden.eps);            \
            memcpy(out + t * size, own->keeps_normed ? right : state, size * sizeof(X));                              \
        }                                                                                                             \
        TRY(fastgrpo_layer_##X##_##X(&own->layer, b, 0, x, out, delta, delta + b->tokens * size));                    \
        for (i64 i = 0; i < b->tokens * size; i++) store_##X(out + i, load_##X(out + i) + load_##X(delta + i));       \
        return 0;                                                                                                     \
    }                                                                                                                 \
                                                                                                                      \
    /* The output of each row's last pair, of hidden states from the target's features, which are the first numbers of\
     * rows `stride` apart. blocks: where the features of a row stand, from the head's first position on. */          \
    int fastgrpo_read_pairs_##E##_##X(const head *own, const batch *b, const E *embeddings, const X *features,        \
                                       i64 stride, const i64 *blocks, i64 most_blocks, X *last, X *scratch) {         \
        i64 size = own->layer.output.outputs, width = own->features.inputs;                                           \
        X *hidden = scratch, *out = hidden + b->tokens * size, *rest = out + b->tokens * size;                        \
        for (i64 row = 0; row < b->rows; row++)                                                                       \
            for (i64 t = b->starts[row]; t < b->starts[row] + b->nodes[row]; t++) {                                   \
                i64 place = find_place(blocks + row * most_blocks, most_blocks, b->positions[t]);                     \
                memcpy(rest + t * width, features + place * stride, width * sizeof(X));                               \
            }                                                                                                         \
        TRY(multiply_##X(&own->features, rest, b->tokens, hidden));                                                   \
        TRY(fastgrpo_pairs_##E##_##X(own, b, embeddings, hidden, NULL, 0, out, rest));                                \
        for (i64 row = 0; row < b->rows; row++)                                                                       \
            memcpy(last + row * size, out + (b->starts[row] + b->nodes[row] - 1) * size, size * sizeof(X));           \
        return 0;                                                                                                     \
    }

DEFINE_PAIRS(bf16, bf16)
DEFINE_PAIRS(float, float)
DEFINE_PAIRS(float, bf16)

#define DEFINE_SCORE(X)                                                                                               \
    /* Logits of the tokens that are drafted, of outputs that are not normed yet. */                                  \
    int fastgrpo_score_##X(const head *own, X *outputs, i64 rows, X *logits, X *scratch) {                            \
        i64 size = own->output.inputs;                                                                                \
        fastgrpo_add_norm_##X##_##X(outputs, NULL, own->last.weight, scratch, rows, size, own->last.eps);             \
        return multiply_##X(&own->output, scratch, rows, logits);                                                     \
    }

DEFINE_SCORE(bf16)
DEFINE_SCORE(float)
