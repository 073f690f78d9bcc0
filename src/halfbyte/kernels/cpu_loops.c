/* The loops that plain torch is slow at on a CPU: four-bit blocks, eight-bit AdamW, softmax loss.
 *
 * native.py compiles this file on first use; the *_cpu.py modules call it. Four-bit blocks come out
 * as the same bits as from the plain-torch reference, so it must be built without -ffast-math and
 * without contraction into fused multiply-adds (-ffp-contract=off). Tables: codebooks.py.
 *
 * dtype: 0 float32, 1 bfloat16, 2 float16. Every block size is even and at most MAX_BLOCK.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#endif

#define MAX_BLOCK 4096
#define NESTED_BLOCK 256 /* of double quantization, and of the moments of AdamW */
#define NESTED_BINS 65536 /* of [-1, 1], in which the codes of double quantization are looked up */
#define SIGNED_ZERO 127  /* index of 0 in the signed dynamic map */
#define PARALLEL_FROM 32768 /* elements; below it waking a thread costs more than the work */

enum { FLOAT32, BFLOAT16, FLOAT16 };

static inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

static inline uint16_t to_bfloat16(float x) {
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    return (u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (uint16_t)rounded;
}

static inline uint16_t to_float16(float x) {
    _Float16 h = (_Float16)x;
    uint16_t u;
    memcpy(&u, &h, 2);
    return u;
}

static inline float from_float16(uint16_t u) {
    _Float16 h;
    memcpy(&h, &u, 2);
    return (float)h;
}

/* ---- dequantize: a block's sixteen products are rounded once, then looked up ---- */

#if defined(__AVX2__) && defined(__F16C__)

/* Eight products, rounded to sixteen bits each, in lanes of 32. */
static inline __m256i products_16(const float *levels, __m256 absmax, int dtype) {
    __m256 product = _mm256_mul_ps(_mm256_loadu_ps(levels), absmax);
    if (dtype == FLOAT16)
        return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT));
    __m256i u = _mm256_castps_si256(product);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(product, product, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7FC0), is_nan);
}

/* The low bytes of two times eight lanes of 32 bits, in order, in both halves. */
static inline __m256i bytes_of(__m256i a, __m256i b) {
    const __m256i byte = _mm256_set1_epi32(255);
    __m256i mixed = _mm256_packus_epi32(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte));
    __m256i pairs = _mm256_permute4x64_epi64(mixed, 0xD8);
    __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs),
                                     _mm256_extracti128_si256(pairs, 1));
    return _mm256_broadcastsi128_si256(bytes);
}

/* Two byte shuffles, of the products' low and of their high bytes, look up 32 codes at once. */
static int64_t look_up_many_16(const uint8_t *packed, const float *levels, float absmax,
                               uint16_t *out, int64_t bytes, int dtype) {
    const __m256 scale = _mm256_set1_ps(absmax);
    const __m256i a = products_16(levels, scale, dtype), b = products_16(levels + 8, scale, dtype);
    const __m256i lows = bytes_of(a, b);
    const __m256i highs = bytes_of(_mm256_srli_epi32(a, 8), _mm256_srli_epi32(b, 8));
    const __m256i nibble = _mm256_set1_epi8(15);
    int64_t j = 0;
    for (; j + 16 <= bytes; j += 16) {
        __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(packed + j)));
        /* Each 16-bit lane: the high nibble's code first, then the low one's. */
        __m256i codes = _mm256_and_si256(
            _mm256_or_si256(_mm256_srli_epi16(wide, 4), _mm256_slli_epi16(wide, 8)), nibble);
        __m256i lo = _mm256_shuffle_epi8(lows, codes);
        __m256i hi = _mm256_shuffle_epi8(highs, codes);
        __m256i first = _mm256_unpacklo_epi8(lo, hi);  /* codes 0-7 and 16-23 */
        __m256i second = _mm256_unpackhi_epi8(lo, hi); /* codes 8-15 and 24-31 */
        __m256i *to = (__m256i *)(out + 2 * j);
        _mm256_storeu_si256(to, _mm256_permute2x128_si256(first, second, 0x20));
        _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(first, second, 0x31));
    }
    return j;
}

#else

static int64_t look_up_many_16(const uint8_t *packed, const float *levels, float absmax,
                               uint16_t *out, int64_t bytes, int dtype) {
    (void)packed, (void)levels, (void)absmax, (void)out, (void)bytes, (void)dtype;
    return 0;
}

#endif

static void dequantize_16(const uint8_t *packed, const float *levels, float absmax, uint16_t *out,
                          int64_t count, int dtype) {
    int64_t done = 2 * look_up_many_16(packed, levels, absmax, out, count / 2, dtype);
    if (done == count) return;
    uint16_t table[16];
    for (int k = 0; k < 16; k++) {
        float product = levels[k] * absmax;
        table[k] = dtype == BFLOAT16 ? to_bfloat16(product) : to_float16(product);
    }
    for (int64_t i = done; i < count; i++) out[i] = table[packed[i / 2] >> (i % 2 ? 0 : 4) & 15];
}

static void dequantize_32(const uint8_t *packed, const float *levels, float absmax, float *out,
                          int64_t count) {
    float table[16];
    for (int k = 0; k < 16; k++) table[k] = levels[k] * absmax;
    for (int64_t j = 0; j < count / 2; j++) {
        out[2 * j] = table[packed[j] >> 4];
        out[2 * j + 1] = table[packed[j] & 15];
    }
    if (count % 2) out[count - 1] = table[packed[count / 2] >> 4];
}

/* Without double quantization codes is NULL and scales holds absmax itself. */
void hb_dequantize(const uint8_t *packed, const uint8_t *codes, const float *scales,
                   const float *map, const float *offset, const float *levels, void *out,
                   int64_t numel, int64_t block, int dtype, int threads) {
    int64_t blocks = (numel + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads) if (numel >= PARALLEL_FROM)
    for (int64_t b = 0; b < blocks; b++) {
        float absmax;
        if (codes) { /* scales is then 1 / NESTED_BLOCK as long: scales[b] lies outside it */
            float scaled = map[codes[b]] * scales[b / NESTED_BLOCK];
            absmax = scaled + *offset;
        } else {
            absmax = scales[b];
        }
        int64_t start = b * block, left = numel - start;
        int64_t count = left < block ? left : block;
        if (dtype == FLOAT32)
            dequantize_32(packed + start / 2, levels, absmax, (float *)out + start, count);
        else
            dequantize_16(packed + start / 2, levels, absmax, (uint16_t *)out + start, count, dtype);
    }
}

/* ---- quantize ---- */

static void load(const void *source, int64_t start, int64_t count, int dtype, float *to) {
    if (dtype == FLOAT32) {
        memcpy(to, (const float *)source + start, 4 * count);
    } else if (dtype == BFLOAT16) {
        const uint16_t *from = (const uint16_t *)source + start;
        for (int64_t i = 0; i < count; i++) to[i] = float_of((uint32_t)from[i] << 16);
    } else {
        const uint16_t *from = (const uint16_t *)source + start;
        for (int64_t i = 0; i < count; i++) to[i] = from_float16(from[i]);
    }
}

/* As integers the magnitudes order likewise, and a NaN is above all: it shows in absmax. */
static float largest_magnitude(const float *x, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
        largest = magnitude > largest ? magnitude : largest;
    }
    return float_of(largest);
}

void hb_quantize(const void *source, const float *thresholds, const uint8_t *order,
                 float smallest_absmax, uint8_t *packed, float *absmax, int64_t numel,
                 int64_t block, int dtype, int threads) {
    int64_t blocks = (numel + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads) if (numel >= PARALLEL_FROM)
    for (int64_t b = 0; b < blocks; b++) {
        float x[MAX_BLOCK + 1];
        int32_t code[MAX_BLOCK]; /* as wide as x, so that compilers vectorize the comparisons */
        int64_t start = b * block, left = numel - start;
        int64_t count = left < block ? left : block;
        load(source, start, count, dtype, x);
        float largest = largest_magnitude(x, count);
        float divisor = largest < smallest_absmax ? smallest_absmax : largest;
        if (count == block) {
            float inverse = 1.0f / divisor;
            for (int64_t i = 0; i < count; i++) x[i] *= inverse;
        } else { /* bitsandbytes divides in a short block, and keeps the divisor */
            for (int64_t i = 0; i < count; i++) x[i] /= divisor;
            largest = divisor;
        }
        absmax[b] = largest;
        x[count] = 0.0f; /* pads an odd count: a full block is even, so this stays inside */
        count += count % 2;
        for (int64_t i = 0; i < count; i++) {
            int32_t rank = 0;
            /* Written so that a NaN ranks highest, as in torch.bucketize. */
            for (int k = 0; k < 15; k++) rank += !(x[i] <= thresholds[k]);
            code[i] = rank;
        }
        if (order)
            for (int64_t i = 0; i < count; i++) code[i] = order[code[i]];
        uint8_t *to = packed + start / 2;
        for (int64_t j = 0; j < count / 2; j++)
            to[j] = (uint8_t)(code[2 * j] << 4 | code[2 * j + 1]);
    }
}

/* Scales to the signed dynamic map. bitsandbytes looks codes up by bin, as code_of_bin does. */
void hb_quantize_blockwise(const float *values, const uint8_t *code_of_bin, uint8_t *codes,
                           float *absmax, int64_t numel, int threads) {
    int64_t blocks = (numel + NESTED_BLOCK - 1) / NESTED_BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (numel >= PARALLEL_FROM)
    for (int64_t b = 0; b < blocks; b++) {
        int32_t bin[NESTED_BLOCK];
        int64_t start = b * NESTED_BLOCK, left = numel - start;
        int64_t count = left < NESTED_BLOCK ? left : NESTED_BLOCK;
        absmax[b] = largest_magnitude(values + start, count);
        float inverse = 1.0f / absmax[b];
        for (int64_t i = 0; i < count; i++) {
            float x = values[start + i] * inverse;
            x = x < 1.0f ? x : 1.0f; /* NaN too: its bin is in the table, and its code 0 below */
            x = x > -1.0f ? x : -1.0f;
            bin[i] = (int32_t)((x + 1.0f) * 0.5f * (NESTED_BINS - 1) + 0.5f);
        }
        for (int64_t i = 0; i < count; i++)
            codes[start + i] = absmax[b] > 0.0f ? code_of_bin[bin[i]] : 0;
    }
}

/* ---- eight-bit AdamW; the formulas are in adamw.py ---- */

/* index[i] = the count of thresholds (255, ascending) below x[i]: a binary search, all at once. */
static void nearest(const float *thresholds, const float *x, int32_t *index) {
    for (int64_t i = 0; i < NESTED_BLOCK; i++) index[i] = 0;
    for (int32_t step = 128; step; step /= 2)
        for (int64_t i = 0; i < NESTED_BLOCK; i++)
            index[i] += thresholds[index[i] + step - 1] < x[i] ? step : 0;
}

struct adamw8 {
    float beta1, beta2, gain1, gain2, eps, decay, step_size, root_correction2, grad_scale;
};

void hb_adamw8(float *param, const float *grad, uint8_t *exp_avg, uint8_t *exp_avg_sq,
               float *absmax1, float *absmax2, const float *map1, const float *map2,
               const float *thresholds1, const float *thresholds2, int64_t numel,
               const struct adamw8 *s, int threads) {
    int64_t blocks = (numel + NESTED_BLOCK - 1) / NESTED_BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (numel >= PARALLEL_FROM)
    for (int64_t b = 0; b < blocks; b++) {
        float m[NESTED_BLOCK] = {0}, v[NESTED_BLOCK] = {0};
        int32_t index1[NESTED_BLOCK], index2[NESTED_BLOCK];
        int64_t start = b * NESTED_BLOCK, left = numel - start;
        int64_t count = left < NESTED_BLOCK ? left : NESTED_BLOCK;
        float *p = param + start;
        const float *raw = grad + start;
        uint8_t *code1 = exp_avg + start, *code2 = exp_avg_sq + start;
        for (int64_t i = 0; i < count; i++) {
            float g = raw[i] * s->grad_scale;
            m[i] = map1[code1[i]] * absmax1[b] * s->beta1 + g * s->gain1;
            v[i] = map2[code2[i]] * absmax2[b] * s->beta2 + g * g * s->gain2;
        }
        for (int64_t i = 0; i < count; i++) {
            float update = m[i] / (sqrtf(v[i]) / s->root_correction2 + s->eps);
            p[i] = p[i] * s->decay - s->step_size * update;
        }
        absmax1[b] = largest_magnitude(m, count);
        absmax2[b] = largest_magnitude(v, count);
        float divisor1 = absmax1[b] < FLT_MIN ? FLT_MIN : absmax1[b];
        float divisor2 = absmax2[b] < FLT_MIN ? FLT_MIN : absmax2[b];
        for (int64_t i = 0; i < NESTED_BLOCK; i++) {
            m[i] /= divisor1;
            v[i] /= divisor2;
        }
        nearest(thresholds1, m, index1);
        nearest(thresholds2, v, index2);
        for (int64_t i = 0; i < count; i++) {
            code1[i] = (uint8_t)(index1[i] - (index1[i] == SIGNED_ZERO && m[i] < 0.0f));
            code2[i] = (uint8_t)index2[i];
        }
    }
}

/* ---- softmax loss: each row's loss, and the gradient in the place of its logits ---- */

/* exp(x) of x <= 0 to about 1e-7 of itself, 0 below -87: 2^n times a polynomial on [-ln2/2, ln2/2].
 * Written so that compilers vectorize it; adding and taking away 1.5 * 2^23 rounds to an integer. */
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
    float power = float_of((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.0f ? 0.0f : y * power;
}

static inline float logit_at(const void *row, int64_t i, int dtype) {
    return dtype == FLOAT32 ? ((const float *)row)[i]
                            : float_of((uint32_t)((const uint16_t *)row)[i] << 16);
}

static inline __attribute__((always_inline)) float softmax_loss_row(
    void *row, int64_t columns, int64_t target, float scale, int dtype) {
    float largest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < columns; i++) {
        float z = logit_at(row, i, dtype) * scale;
        largest = z > largest ? z : largest;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < columns; i++)
        sum += exp_of_negative(logit_at(row, i, dtype) * scale - largest);
    float inverse = 1.0f / sum;
    float at_target = logit_at(row, target, dtype) * scale;
    float target_grad = (exp_of_negative(at_target - largest) * inverse - 1.0f) * scale;
#pragma omp simd
    for (int64_t i = 0; i < columns; i++) {
        float grad = exp_of_negative(logit_at(row, i, dtype) * scale - largest) * inverse * scale;
        if (dtype == FLOAT32)
            ((float *)row)[i] = grad;
        else
            ((uint16_t *)row)[i] = to_bfloat16(grad);
    }
    if (dtype == FLOAT32)
        ((float *)row)[target] = target_grad;
    else
        ((uint16_t *)row)[target] = to_bfloat16(target_grad);
    return logf(sum) + (largest - at_target);
}

/* dtype is FLOAT32 or BFLOAT16. */
void hb_softmax_loss(void *logits, const int64_t *target, float *loss, int64_t rows,
                     int64_t columns, float scale, int dtype, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns >= PARALLEL_FROM)
    for (int64_t i = 0; i < rows; i++) {
        float *wide = (float *)logits + i * columns;
        uint16_t *narrow = (uint16_t *)logits + i * columns;
        /* Two calls, so that dtype is a constant in each. */
        loss[i] = dtype == FLOAT32
                      ? softmax_loss_row(wide, columns, target[i], scale, FLOAT32)
                      : softmax_loss_row(narrow, columns, target[i], scale, BFLOAT16);
    }
}
