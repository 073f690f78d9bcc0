/* The element-wise loops of a decoder layer in bfloat16 on a CPU: RMSNorm, gated activation, RoPE.
 *
 * native.py compiles this file together with cpu_loops.c; rms_norm_cpu.py, gated_cpu.py and
 * rope_cpu.py call it. Everything is computed in float32 and rounded once, as in the references.
 * Rows may have a pitch (the distance of two rows, in elements).
 */
#include <math.h>
#include <stdint.h>
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
