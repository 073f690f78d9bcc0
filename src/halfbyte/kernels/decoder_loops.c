/* The loops of a decoder layer in bfloat16 on a CPU: RMSNorm, gated activation, RoPE, attention.
 *
 * native.py compiles this file together with cpu_loops.c; rms_norm_cpu.py, gated_cpu.py,
 * rope_cpu.py and attention_cpu.py call it. Everything is computed in float32 and rounded once, as in the references.
 * Rows may have a pitch (the distance of two rows, in elements).
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PARALLEL_FROM 32768 /* elements; below it waking a thread costs more than the work */

enum { SILU, GELU_TANH };

static inline float wide(uint16_t x) {
    uint32_t u = (uint32_t)x << 16;
    float y;
    memcpy(&y, &u, 4);
    return y;
}

static inline uint16_t narrow(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    return (u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (uint16_t)rounded;
}

/* ---- RMSNorm ---- */

static inline float inverse_root(const uint16_t *x, int64_t size, float eps) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += wide(x[i]) * wide(x[i]);
    return 1.0f / sqrtf(sum / (float)size + eps);
}

/* residual = x + delta (where there is a delta), out = residual normed. */
void hb_add_rms_norm(const uint16_t *x, const uint16_t *delta, const float *weight, float eps,
                     uint16_t *residual, uint16_t *out, int64_t rows, int64_t size,
                     int64_t x_pitch, int64_t delta_pitch, int64_t out_pitch, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size >= PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *normed = x + row * x_pitch;
        if (delta) {
            const uint16_t *from = normed, *add = delta + row * delta_pitch;
            uint16_t *sum = residual + row * size;
#pragma omp simd
            for (int64_t i = 0; i < size; i++) sum[i] = narrow(wide(from[i]) + wide(add[i]));
            normed = sum;
        }
        float scale = inverse_root(normed, size, eps);
        uint16_t *to = out + row * out_pitch;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) to[i] = narrow(wide(normed[i]) * scale * weight[i]);
    }
}

/* The gradient of x through the norm, plus grad_residual (where there is one) around it. */
void hb_rms_norm_backward(const uint16_t *grad, const uint16_t *x, const float *weight, float eps,
                          const uint16_t *grad_residual, uint16_t *out, int64_t rows, int64_t size,
                          int64_t grad_pitch, int64_t x_pitch, int64_t residual_pitch,
                          int64_t out_pitch, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size >= PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *g = grad + row * grad_pitch, *from = x + row * x_pitch;
        const uint16_t *around = grad_residual ? grad_residual + row * residual_pitch : 0;
        uint16_t *to = out + row * out_pitch;
        float scale = inverse_root(from, size, eps), dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < size; i++) dot += wide(g[i]) * weight[i] * wide(from[i]);
        float mean = dot * scale / (float)size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            float normed = wide(from[i]) * scale;
            float grad_x = scale * (wide(g[i]) * weight[i] - normed * mean);
            to[i] = narrow(around ? grad_x + wide(around[i]) : grad_x);
        }
    }
}

/* ---- gated activation: x sigmoid(k(x)), with k(x) = x for SiLU and a cubic for GELU ---- */

/* exp(x) of x <= 0 to about 1e-7 of itself, 0 below -87; adding and taking away 1.5 * 2^23 rounds. */
static inline float exp_of_negative(float x) {
    const float to_integer = 12582912.0f;
    float clamped = x < -87.0f ? -87.0f : x;
    float n = (clamped * 1.44269504f + to_integer) - to_integer;
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : y * power;
}

static inline float sigmoid(float x) {
    float e = exp_of_negative(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

#define GELU_SLOPE 1.5957691216f /* 2 sqrt(2 / pi) */
#define GELU_CUBIC 0.044715f

static inline float inner(float x, int kind) {
    return kind == SILU ? x : GELU_SLOPE * (x + GELU_CUBIC * x * x * x);
}

static inline float inner_slope(float x, int kind) {
    return kind == SILU ? 1.0f : GELU_SLOPE * (1.0f + 3.0f * GELU_CUBIC * x * x);
}

static inline __attribute__((always_inline)) void gated_row(
    const uint16_t *gate, const uint16_t *up, uint16_t *out, int64_t size, int kind) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
        float x = wide(gate[i]);
        out[i] = narrow(x * sigmoid(inner(x, kind)) * wide(up[i]));
    }
}

static inline __attribute__((always_inline)) void gated_backward_row(
    uint16_t *gate, uint16_t *up, const uint16_t *grad, uint16_t *hidden, int64_t size, int kind) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
        float x = wide(gate[i]), u = wide(up[i]), g = wide(grad[i]);
        float s = sigmoid(inner(x, kind));
        float slope = s + x * s * (1.0f - s) * inner_slope(x, kind);
        hidden[i] = narrow(x * s * u);
        gate[i] = narrow(g * u * slope);
        up[i] = narrow(g * x * s);
    }
}

void hb_gated_forward(const uint16_t *gate_up, uint16_t *out, int64_t rows, int64_t size,
                      int64_t pitch, int64_t out_pitch, int kind, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size >= PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *gate = gate_up + row * pitch;
        uint16_t *to = out + row * out_pitch;
        /* Two calls, so that kind is a constant in each. */
        if (kind == SILU)
            gated_row(gate, gate + size, to, size, SILU);
        else
            gated_row(gate, gate + size, to, size, GELU_TANH);
    }
}

/* Gate and up become their gradients; hidden becomes the forward's result again. */
void hb_gated_backward(uint16_t *gate_up, const uint16_t *grad, uint16_t *hidden, int64_t rows,
                       int64_t size, int64_t pitch, int64_t grad_pitch, int kind, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size >= PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
        uint16_t *gate = gate_up + row * pitch, *to = hidden + row * size;
        const uint16_t *from = grad + row * grad_pitch;
        if (kind == SILU)
            gated_backward_row(gate, gate + size, from, to, size, SILU);
        else
            gated_backward_row(gate, gate + size, from, to, size, GELU_TANH);
    }
}

/* ---- RoPE: to = from turned by the angles, times sign; from may be to ---- */

/* Heads are size elements; the first rotated of them turn, in pairs (i, i + rotated / 2). */
void hb_rope(const uint16_t *from, uint16_t *to, const float *cos, const float *sin, float sign,
             int64_t tokens, int64_t heads, int64_t size, int64_t rotated, int64_t from_token,
             int64_t from_head, int64_t to_token, int threads) {
    int64_t half = rotated / 2;
#pragma omp parallel for schedule(static) num_threads(threads) \
    if (tokens * heads * size >= PARALLEL_FROM)
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cos + t * rotated, *s = sin + t * rotated;
        for (int64_t h = 0; h < heads; h++) {
            const uint16_t *x = from + t * from_token + h * from_head;
            uint16_t *y = to + t * to_token + h * size;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float a = wide(x[i]), b = wide(x[i + half]);
                y[i] = narrow(a * c[i] - b * (s[i] * sign));
                y[i + half] = narrow(b * c[i + half] + a * (s[i + half] * sign));
            }
            for (int64_t i = rotated; i < size; i++) y[i] = x[i];
        }
    }
}

/* ---- the gradient of causal attention, a head at a time in cache ----
 *
 * P = exp(s Q K^T - lse), dS = P * (dO V^T - rowsum(dO * O)), dQ = s dS K, dK = s dS^T Q, dV = P^T dO.
 * Buffers of a head: S tokens padded to 16, D a multiple of 16; padding is zero.
 */

typedef float lanes __attribute__((vector_size(64), aligned(4)));

/* Products may fuse multiply and add here: nothing has to equal another implementation's bits. */
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif

/* Four rows of 64 or of 16 columns of c = a b; element (r, k) of a is a[r * a_row + k * a_step].
 * The sums are sixteen variables, since compilers keep variables in registers and arrays not. */
#define ROW(r)                                                       \
    do {                                                             \
        float y = by[r * a_row];                                     \
        s##r##0 += y * x0, s##r##1 += y * x1;                        \
        s##r##2 += y * x2, s##r##3 += y * x3;                        \
    } while (0)
#define STORE(r)                                                     \
    do {                                                             \
        lanes *to = (lanes *)(c + r * c_pitch);                      \
        to[0] = s##r##0, to[1] = s##r##1, to[2] = s##r##2, to[3] = s##r##3; \
    } while (0)

static void tile_64(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_pitch,
                    float *c, int64_t c_pitch, int64_t depth) {
    lanes s00 = {0}, s01 = {0}, s02 = {0}, s03 = {0}, s10 = {0}, s11 = {0}, s12 = {0}, s13 = {0};
    lanes s20 = {0}, s21 = {0}, s22 = {0}, s23 = {0}, s30 = {0}, s31 = {0}, s32 = {0}, s33 = {0};
    for (int64_t k = 0; k < depth; k++) {
        const lanes *from = (const lanes *)(b + k * b_pitch);
        const float *by = a + k * a_step;
        lanes x0 = from[0], x1 = from[1], x2 = from[2], x3 = from[3];
        ROW(0);
        ROW(1);
        ROW(2);
        ROW(3);
    }
    STORE(0);
    STORE(1);
    STORE(2);
    STORE(3);
}

static void tile_16(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_pitch,
                    float *c, int64_t c_pitch, int64_t depth) {
    lanes s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    for (int64_t k = 0; k < depth; k++) {
        const float *by = a + k * a_step;
        lanes x = *(const lanes *)(b + k * b_pitch);
        s0 += by[0] * x, s1 += by[a_row] * x;
        s2 += by[2 * a_row] * x, s3 += by[3 * a_row] * x;
    }
    *(lanes *)c = s0, *(lanes *)(c + c_pitch) = s1;
    *(lanes *)(c + 2 * c_pitch) = s2, *(lanes *)(c + 3 * c_pitch) = s3;
}

/* Four rows of c = a b, columns a multiple of 16. */
static void four_rows(const float *a, int64_t a_row, int64_t a_step, const float *b,
                      int64_t b_pitch, float *c, int64_t c_pitch, int64_t depth, int64_t columns) {
    int64_t j = 0;
    for (; j + 64 <= columns; j += 64)
        tile_64(a, a_row, a_step, b + j, b_pitch, c + j, c_pitch, depth);
    for (; j < columns; j += 16)
        tile_16(a, a_row, a_step, b + j, b_pitch, c + j, c_pitch, depth);
}

#if !defined(__clang__) && defined(__GNUC__)
#pragma GCC pop_options
#endif

/* One head's tensors in bfloat16; tokens are the given number of elements apart. */
typedef struct {
    const uint16_t *query, *key, *value, *out, *grad;
    int64_t query_token, key_token, value_token, out_token, grad_token;
    const float *lse;
    uint16_t *grad_query, *grad_key, *grad_value;
    int64_t result_token;
} head_t;

static void load_head(const head_t *h, int64_t length, int64_t padded, int64_t size, float scale,
                      float *q, float *k, float *g, float *k_t, float *v_t, float *delta) {
    for (int64_t t = 0; t < length; t++) {
        const uint16_t *query = h->query + t * h->query_token, *key = h->key + t * h->key_token;
        const uint16_t *value = h->value + t * h->value_token, *out = h->out + t * h->out_token;
        const uint16_t *grad = h->grad + t * h->grad_token;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < size; d++) {
            q[t * size + d] = wide(query[d]) * scale;
            k[t * size + d] = wide(key[d]);
            g[t * size + d] = wide(grad[d]);
            sum += wide(grad[d]) * wide(out[d]);
        }
        delta[t] = sum;
        for (int64_t d = 0; d < size; d++) {
            k_t[d * padded + t] = wide(key[d]);
            v_t[d * padded + t] = wide(value[d]);
        }
    }
}

static void store_rows(const float *rows, int64_t size, int64_t count, float scale, uint16_t *to,
                       int64_t token) {
    for (int64_t r = 0; r < count; r++)
#pragma omp simd
        for (int64_t d = 0; d < size; d++) to[r * token + d] = narrow(rows[r * size + d] * scale);
}

static void head_backward(const head_t *h, int64_t length, int64_t size, float scale,
                          float *memory) {
    int64_t padded = (length + 15) / 16 * 16, matrix = padded * size;
    float *q = memory, *k = q + matrix, *g = k + matrix, *k_t = g + matrix, *v_t = k_t + matrix;
    float *p = v_t + matrix, *ds = p + padded * padded, *delta = ds + padded * padded;
    float *rows = delta + padded;
    load_head(h, length, padded, size, scale, q, k, g, k_t, v_t, delta);
    for (int64_t i0 = 0; i0 < length; i0 += 4) {
        int64_t columns = (i0 + 4 + 15) / 16 * 16;
        four_rows(q + i0 * size, size, 1, k_t, padded, p + i0 * padded, padded, size, columns);
        four_rows(g + i0 * size, size, 1, v_t, padded, ds + i0 * padded, padded, size, columns);
        for (int64_t i = i0; i < i0 + 4; i++) {
            float *pi = p + i * padded, *dsi = ds + i * padded;
            int64_t seen = i < length ? i + 1 : 0;
            float lse = i < length ? h->lse[i] : 0.0f, less = delta[i];
#pragma omp simd
            for (int64_t j = 0; j < seen; j++) {
                pi[j] = exp_of_negative(pi[j] - lse);
                dsi[j] = pi[j] * (dsi[j] - less);
            }
            for (int64_t j = seen; j < columns; j++) pi[j] = dsi[j] = 0.0f;
        }
    }
    for (int64_t t = 0; t < length; t += 4) {
        int64_t count = length - t < 4 ? length - t : 4, left = (length - t + 3) / 4 * 4;
        int64_t diagonal = t * padded + t, to = t * h->result_token;
        four_rows(ds + t * padded, padded, 1, k, size, rows, size, t + 4, size);
        store_rows(rows, size, count, scale, h->grad_query + to, h->result_token);
        four_rows(ds + diagonal, 1, padded, q + t * size, size, rows, size, left, size);
        store_rows(rows, size, count, 1.0f, h->grad_key + to, h->result_token);
        four_rows(p + diagonal, 1, padded, g + t * size, size, rows, size, left, size);
        store_rows(rows, size, count, 1.0f, h->grad_value + to, h->result_token);
    }
}

/* Strides are those of batch, head and token of query, key, value, out, grad and the results, in
 * elements; lse is [batch, heads, length] in one piece. Returns 0, or 1 where memory is short. */
int hb_attention_backward(const uint16_t *query, const uint16_t *key, const uint16_t *value,
                          const uint16_t *out, const uint16_t *grad, const float *lse,
                          uint16_t *grad_query, uint16_t *grad_key, uint16_t *grad_value,
                          const int64_t *strides, int64_t batch, int64_t heads, int64_t length,
                          int64_t size, float scale, int threads) {
    int64_t padded = (length + 15) / 16 * 16;
    int64_t floats = 5 * padded * size + 2 * padded * padded + padded + 4 * size;
    const int64_t *qs = strides, *ks = qs + 3, *vs = ks + 3, *os = vs + 3, *gs = os + 3, *rs = gs + 3;
    int is_short = 0;
#pragma omp parallel num_threads(threads)
    {
        float *memory = calloc((size_t)floats, sizeof(float));
#pragma omp atomic
        is_short |= memory == 0;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < batch * heads; n++) {
            int64_t b = n / heads, i = n % heads, r = b * rs[0] + i * rs[1];
            head_t h = {
                query + b * qs[0] + i * qs[1], key + b * ks[0] + i * ks[1],
                value + b * vs[0] + i * vs[1], out + b * os[0] + i * os[1],
                grad + b * gs[0] + i * gs[1], qs[2], ks[2], vs[2], os[2], gs[2],
                lse + n * length, grad_query + r, grad_key + r, grad_value + r, rs[2],
            };
            if (memory) head_backward(&h, length, size, scale, memory);
        }
        free(memory);
    }
    return is_short;
}
