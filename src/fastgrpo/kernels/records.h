/* Weights, and rows to decode, as layers.py and heads.py describe them, field by field. */

#pragma once

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
    const layer *layers;
    i64 count;
    const void *embeddings;
    i64 vocabulary;
    norm last;
} decoder;

typedef struct {
    const void *cosine, *sine; /* of all positions that there are */
    const i64 *ids, *positions, *places;
    void *keys, *values;
    i64 plane; /* numbers from the keys of one layer to those of the next */
    const i64 *starts, *nodes, *lengths, *blocks;
    const uint8_t *visible;
    i64 tokens, rows, most_blocks, most_nodes, seen;
} batch;

typedef struct {
    norm embedded, hidden; /* side by side they are the layer's input */
    i64 keeps_normed;      /* the residual is the normed hidden state */
    layer layer;
    linear features; /* from the target's features to hidden states */
    norm last;
    linear output; /* to logits of the tokens that are drafted */
} head;

/* Hand on what went wrong. */
#define TRY(call)                                                                                                     \
    do {                                                                                                              \
        int failed = (call);                                                                                          \
        if (failed) return failed;                                                                                    \
    } while (0)
