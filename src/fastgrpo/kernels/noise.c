/* Sampling by the law of sampling.py: noise from counters, the best of warped logits plus noise, and beside it the
 * entropy of the distribution.
 *
 * A value depends on its own key, position and token, to the last bit. Compiled so that products and sums are fused
 * only where it says so: the vector body of a loop and its end would otherwise round differently.
 */

#include <stdlib.h>

#include "common.h"

#define CHUNK 1024 /* tokens of the vocabulary looked at at once */

/* natural logarithm of a positive normal number */
static inline float log_positive(float x) {
    uint32_t bits = float_to_bits(x) - 0x3F3504F3; /* the root of a half, so that the mantissa is around 1 */
    float e = (float)((int32_t)bits >> 23);
    float f = bits_to_float((bits & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
    float p = 7.0376836292e-2f;
    p = __builtin_fmaf(p, f, -1.1514610310e-1f);
    p = __builtin_fmaf(p, f, 1.1676998740e-1f);
    p = __builtin_fmaf(p, f, -1.2420140846e-1f);
    p = __builtin_fmaf(p, f, 1.4249322787e-1f);
    p = __builtin_fmaf(p, f, -1.6668057665e-1f);
    p = __builtin_fmaf(p, f, 2.0000714765e-1f);
    p = __builtin_fmaf(p, f, -2.4999993993e-1f);
    p = __builtin_fmaf(p, f, 3.3333331174e-1f);
    float square = f * f;
    float y = __builtin_fmaf(e, -2.12194440e-4f, f * square * p);
    y = __builtin_fmaf(square, -0.5f, y);
    return __builtin_fmaf(e, 0.693359375f, f + y);
}

/* ---- noise: see sampling.py ------------------------------------------------------------------------------- */

static inline uint64_t position_key(i64 stream_key, i64 position) {
    uint64_t value = (uint64_t)stream_key + (uint64_t)position * 0x9E3779B97F4A7C15ull;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
    return value ^ (value >> 31);
}

/* 31 random bits; the fewer, the larger is the noise. */
static inline int32_t hash_token(uint32_t token, uint32_t low, uint32_t high) {
    uint32_t bits = (token ^ low) * 0x7FEB352Du;
    bits = (bits ^ (bits >> 15)) ^ high;
    bits *= 0x846CA68Bu;
    bits = (bits ^ (bits >> 16)) * 0x9E3779B1u;
    return (int32_t)((bits ^ (bits >> 15)) & 0x7FFFFFFF);
}

static inline float gumbel(uint32_t token, uint32_t low, uint32_t high) {
    int32_t bits = hash_token(token, low, high);
    float u = ((float)bits + 0.5f) * (float)(0x1p-31 - 0x1p-55);
    float t = 1.0f - u;
    float exponential = -(log_positive(t) - (u - (1.0f - t)) / t); /* -log1p(-u) */
    return -log_positive(exponential);
}

void fastgrpo_gumbel(const i64 *stream_keys, const i64 *positions, const int32_t *tokens, i64 rows, i64 width,
                     i64 token_stride, float *out) {
#pragma omp parallel for if (rows * width > FEW)
    for (i64 row = 0; row < rows; row++) {
        uint64_t key = position_key(stream_keys[row], positions[row]);
        uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);
        const int32_t *own = tokens + row * token_stride;
        float *noise = out + row * width;
        for (i64 i = 0; i < width; i++) noise[i] = gumbel((uint32_t)own[i], low, high);
    }
}

/* Lanes keep the first of equal scores; the smallest token among lanes wins. */
static inline void find_best(const float *score, i64 width, i64 offset, float *best, int32_t *token) {
    i64 i = 0;
    for (; i + LANES <= width; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            int better = score[i + lane] > best[lane];
            best[lane] = better ? score[i + lane] : best[lane];
            token[lane] = better ? (int32_t)(offset + i + lane) : token[lane];
        }
    for (; i < width; i++)
        if (score[i] > best[i % LANES]) best[i % LANES] = score[i], token[i % LANES] = (int32_t)(offset + i);
}

/* One token's share of sum(e^x) and of sum(x e^x), x being its logit below the greatest; nothing where e^x is 0.
 * Returns e^x. */
static inline float add_weight(float below, float *mass, float *moment) {
    float weight = exp_negative(below);
    *mass += weight;
    *moment += weight * (below < -88.0f ? -88.0f : below);
    return weight;
}

/* Noise above n has a chance of e^-n, so that hardly any token comes near the best so far: of a logit x below the
 * greatest those alone whose bits are fewer than e^x times this limit, and of the others no noise is computed. 0 where
 * all must be looked at: before the first, behind a much larger logit than those so far, where one is no number. */
#define NEAR 2.0f
#define CAREFUL 1.001f /* sums, logarithms and exponentials are off by 1e-5 at most */

static inline float find_limit(float most, float best) {
    return most - best <= NEAR ? 0x1p31f * CAREFUL * expf(most - best) : 0.0f;
}

/* Tokens that may be better than the best of their lanes. */
static void look_at(const float *scaled, const int32_t *is_near, int count, i64 first, uint32_t low, uint32_t high,
                    float *best, int32_t *token) {
    for (int n = 0; n < count; n++) {
        float noisy = is_near[n] ? gumbel((uint32_t)(first + n), low, high) + scaled[n] : -INFINITY;
        i64 lane = (first + n) % LANES;
        if (noisy > best[lane]) best[lane] = noisy, token[lane] = (int32_t)(first + n);
    }
}

#define DEFINE_SAMPLE(T)                                                                                              \
    static inline void sample_row_##T(const T *own, i64 width, uint64_t key, float temperature, i64 *chosen_token,    \
                                      float *logprob, float *entropy) {                                               \
        uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);                                                   \
        float most = -INFINITY, mass = 0.0f, moment = 0.0f;                                                           \
        float scaled[CHUNK], noisy[CHUNK], best[LANES], sums[LANES], moments[LANES];                                  \
        int32_t token[LANES];                                                                                         \
        int broken = 0;                                                                                               \
        for (int lane = 0; lane < LANES; lane++) best[lane] = -INFINITY, token[lane] = 0;                             \
        for (i64 start = 0; start < width; start += CHUNK) {                                                          \
            i64 count = width - start < CHUNK ? width - start : CHUNK;                                                \
            for (i64 i = 0; i < count; i++) scaled[i] = load_##T(own + start + i);                                    \
            for (i64 i = 0; i < count; i++) broken |= !(scaled[i] < INFINITY);                                        \
            if (temperature > 0 && temperature != 1)                                                                  \
                for (i64 i = 0; i < count; i++) scaled[i] = scaled[i] / temperature;                                  \
            float top = find_max(scaled, count), limit = 0.0f;                                                        \
            if (temperature > 0 && !broken) limit = find_limit(top > most ? top : most, find_max(best, LANES));       \
            if (temperature > 0 && limit == 0) {                                                                      \
                for (i64 i = 0; i < count; i++)                                                                       \
                    noisy[i] = gumbel((uint32_t)(start + i), low, high) + scaled[i];                                  \
                find_best(noisy, count, start, best, token);                                                          \
            } else if (temperature <= 0) {                                                                            \
                find_best(scaled, count, start, best, token);                                                         \
            }                                                                                                         \
            if (top > most) {                                                                                         \
                float shrink = exp_negative(most - top);                                                              \
                moment = shrink > 0 ? (moment + mass * (most - top)) * shrink : 0.0f;                                 \
                mass *= shrink;                                                                                       \
                most = top;                                                                                           \
            }                                                                                                         \
            if (top == -INFINITY) continue;                                                                           \
            for (int lane = 0; lane < LANES; lane++) sums[lane] = moments[lane] = 0;                                  \
            i64 i = 0;                                                                                                \
            for (; i + LANES <= count && limit > 0; i += LANES) {                                                     \
                int32_t is_near[LANES], any = 0;                                                                      \
                for (int lane = 0; lane < LANES; lane++) {                                                            \
                    float weight = add_weight(scaled[i + lane] - most, sums + lane, moments + lane);                  \
                    int32_t bits = hash_token((uint32_t)(start + i + lane), low, high);                               \
                    is_near[lane] = (float)bits < weight * limit;                                                     \
                }                                                                                                     \
                for (int lane = 0; lane < LANES; lane++) any |= is_near[lane];                                        \
                if (any) look_at(scaled + i, is_near, LANES, start + i, low, high, best, token);                      \
            }                                                                                                         \
            for (; i + LANES <= count; i += LANES)                                                                    \
                for (int lane = 0; lane < LANES; lane++)                                                              \
                    add_weight(scaled[i + lane] - most, sums + lane, moments + lane);                                 \
            for (; i < count; i++) {                                                                                  \
                float weight = add_weight(scaled[i] - most, sums, moments);                                           \
                int32_t is_near = (float)hash_token((uint32_t)(start + i), low, high) < weight * limit;               \
                if (is_near) look_at(scaled + i, &is_near, 1, start + i, low, high, best, token);                     \
            }                                                                                                         \
            for (int lane = 0; lane < LANES; lane++) mass += sums[lane], moment += moments[lane];                     \
        }                                                                                                             \
        int winner = 0;                                                                                               \
        for (int lane = 1; lane < LANES; lane++)                                                                      \
            if (best[lane] > best[winner] || (best[lane] == best[winner] && token[lane] < token[winner]))             \
                winner = lane;                                                                                        \
        *chosen_token = token[winner];                                                                                \
        float chosen = load_##T(own + token[winner]);                                                                 \
        if (temperature > 0 && temperature != 1) chosen = chosen / temperature;                                       \
        *logprob = broken ? NAN : chosen - most - logf(mass); /* large logits would swallow the logarithm */          \
        *entropy = broken ? NAN : logf(mass) - moment / mass;                                                         \
    }                                                                                                                 \
                                                                                                                      \
    void fastgrpo_sample_##T(const T *logits, i64 stride, const i64 *stream_keys, const i64 *positions,               \
                             const float *temperatures, i64 rows, i64 width, i64 *tokens, float *logprobs,            \
                             float *entropies) {                                                                      \
        _Pragma("omp parallel for schedule(dynamic, 1) if (rows * width > FEW)")                                      \
        for (i64 row = 0; row < rows; row++)                                                                          \
            sample_row_##T(logits + row * stride, width, position_key(stream_keys[row], positions[row]),              \
                           temperatures[row], tokens + row, logprobs + row, entropies + row);                         \
    }                                                                                                                 \
                                                                                                                      \
    /* Each row's walk from its root (packed row `starts`) along the tokens that the target chooses. */               \
    void fastgrpo_walk_##T(const T *logits, i64 stride, i64 width, const i64 *starts, const i64 *tokens,              \
                           const i64 *parents, i64 rows, i64 nodes, const i64 *stream_keys, const i64 *positions,     \
                           const float *temperatures, i64 levels, i64 *path, i64 *chosen, float *logprobs,            \
                           float *entropies, i64 *num_accepted) {                                                     \
        _Pragma("omp parallel for schedule(dynamic, 1) if (rows * width > FEW)")                                      \
        for (i64 row = 0; row < rows; row++) {                                                                        \
            i64 node = 0;                                                                                             \
            num_accepted[row] = -1;                                                                                   \
            for (i64 level = 0; level < levels; level++) {                                                            \
                i64 at = row * levels + level, child = node + 1;                                                      \
                path[at] = node < nodes ? node : -1, chosen[at] = -1, logprobs[at] = 0, entropies[at] = 0;            \
                if (node == nodes) continue;                                                                          \
                sample_row_##T(logits + (starts[row] + node) * stride, width,                                         \
                               position_key(stream_keys[row], positions[row] + level), temperatures[row],             \
                               chosen + at, logprobs + at, entropies + at);                                           \
                num_accepted[row]++;                                                                                  \
                while (child < nodes && (parents[row * nodes + child] != node ||                                      \
                                         tokens[row * nodes + child] != chosen[at]))                                  \
                    child++;                                                                                          \
                node = child;                                                                                         \
            }                                                                                                         \
        }                                                                                                             \
    }

DEFINE_SAMPLE(bf16)
DEFINE_SAMPLE(float)

/* ---- drafting ---------------------------------------------------------------------------------------------- */

/* Candidates below each node of each tree by logits / temperature + noise; nodes of a tree share its row of noise.
 * Noise and scores are as wide as a vocabulary may be, which is more than the stack of a thread may hold. */
#define DEFINE_RANK(T)                                                                                                \
    static void rank_tree_##T(const T *logits, const int32_t *vocabulary, uint64_t key, float temperature, i64 nodes, \
                              i64 width, i64 most, i64 is_noisy, float *restrict noise, float *restrict score,        \
                              float *chances, i64 *tokens) {                                                          \
        uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);                                                   \
        if (is_noisy && temperature > 0) /* asked once: a condition inside would keep the loop from vectors */        \
            for (i64 i = 0; i < width; i++) noise[i] = gumbel((uint32_t)vocabulary[i], low, high);                    \
        else                                                                                                          \
            memset(noise, 0, width * sizeof(float));                                                                  \
        for (i64 node = 0; node < nodes; node++) {                                                                    \
            const T *own = logits + node * width;                                                                     \
            float divisor = temperature > 0 ? temperature : 1.0f, lanes[LANES] = {0}, mass = 0.0f;                    \
            for (i64 i = 0; i < width; i++) score[i] = load_##T(own + i) / divisor + noise[i];                        \
            float top = find_max(score, width);                                                                       \
            i64 i = 0;                                                                                                \
            for (; i + LANES <= width; i += LANES)                                                                    \
                for (int lane = 0; lane < LANES; lane++) lanes[lane] += exp_negative(score[i + lane] - top);          \
            for (; i < width; i++) lanes[0] += exp_negative(score[i] - top);                                          \
            for (int lane = 0; lane < LANES; lane++) mass += lanes[lane];                                             \
            take_best(score, width, most, chances + node * most, tokens + node * most);                               \
            float total = top + logf(mass);                                                                           \
            for (i64 n = 0; n < most; n++) {                                                                          \
                chances[node * most + n] -= total;                                                                    \
                tokens[node * most + n] = vocabulary[tokens[node * most + n]];                                        \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    int fastgrpo_rank_##T(const T *logits, const int32_t *vocabulary, const i64 *stream_keys, const i64 *positions,   \
                          const float *temperatures, i64 trees, i64 nodes, i64 width, i64 most, i64 is_noisy,         \
                          float *chances, i64 *tokens) {                                                              \
        int is_short = 0; /* of memory */                                                                             \
        _Pragma("omp parallel if (trees * nodes * width > FEW)")                                                      \
        {                                                                                                             \
            float *noise = malloc(2 * width * sizeof(float));                                                         \
            if (!noise) {                                                                                             \
                _Pragma("omp atomic write")                                                                           \
                is_short = 1;                                                                                         \
            }                                                                                                         \
            _Pragma("omp for")                                                                                        \
            for (i64 tree = 0; tree < trees; tree++)                                                                  \
                if (noise)                                                                                            \
                    rank_tree_##T(logits + tree * nodes * width, vocabulary,                                          \
                                  position_key(stream_keys[tree], positions[tree]), temperatures[tree], nodes, width, \
                                  most, is_noisy, noise, noise + width, chances + tree * nodes * most,                \
                                  tokens + tree * nodes * most);                                                      \
            free(noise);                                                                                              \
        }                                                                                                             \
        return is_short ? NO_MEMORY : 0;                                                                              \
    }

DEFINE_RANK(bf16)
DEFINE_RANK(float)
