/* Kernels for training and sampling on a CPU: what Paddle computes on one thread or in several passes over memory.
 *
 * Every array is float32, dense and row-major. Results are summed in an order that the number of threads does not
 * change, but for `product`, whose order is oneDNN's.  `library.py` builds this file, `functions.py` has the shapes and the
 * gradients.
 */
#include <errno.h>
#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define BLOCK 64 /* columns that one thread sums at a time, and rows it sums before they join the total */

/* Of the math library that comes with Paddle. */
enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 };
void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float *a,
                 int lda, const float *b, int ldb, float beta, float *c, int ldc);

/* Of oneDNN 3, which comes with Paddle without its headers (oneapi/dnnl/dnnl.h). */
typedef struct dnnl_engine *dnnl_engine_t;
typedef struct dnnl_stream *dnnl_stream_t;
typedef struct dnnl_memory *dnnl_memory_t;
typedef struct dnnl_memory_desc *dnnl_memory_desc_t;
typedef struct dnnl_primitive *dnnl_primitive_t;
typedef struct dnnl_primitive_desc *dnnl_primitive_desc_t;
typedef int64_t dnnl_dims_t[12];
typedef struct {
    int arg;
    dnnl_memory_t memory;
} dnnl_exec_arg_t;
enum { DNNL_CPU = 1, DNNL_DEFAULT_FLAGS = 1, DNNL_BF16 = 2, DNNL_F32 = 3 };
enum { DNNL_ARG_SRC = 1, DNNL_ARG_DST = 17, DNNL_ARG_WEIGHTS = 33 };
int dnnl_engine_create(dnnl_engine_t *, int kind, size_t index);
int dnnl_stream_create(dnnl_stream_t *, dnnl_engine_t, unsigned flags);
int dnnl_stream_wait(dnnl_stream_t);
int dnnl_stream_destroy(dnnl_stream_t);
int dnnl_memory_desc_create_with_strides(dnnl_memory_desc_t *, int ndims, const dnnl_dims_t, int type, const dnnl_dims_t);
int dnnl_memory_desc_destroy(dnnl_memory_desc_t);
int dnnl_memory_create(dnnl_memory_t *, dnnl_memory_desc_t, dnnl_engine_t, void *);
int dnnl_memory_destroy(dnnl_memory_t);
int dnnl_matmul_primitive_desc_create(dnnl_primitive_desc_t *, dnnl_engine_t, dnnl_memory_desc_t, dnnl_memory_desc_t,
                                      dnnl_memory_desc_t bias, dnnl_memory_desc_t, void *attributes);
int dnnl_primitive_desc_destroy(dnnl_primitive_desc_t);
int dnnl_primitive_create(dnnl_primitive_t *, dnnl_primitive_desc_t);
int dnnl_primitive_execute(dnnl_primitive_t, dnnl_stream_t, int count, const dnnl_exec_arg_t *);
int dnnl_primitive_destroy(dnnl_primitive_t);

/* e^x without a call, so that loops over it become vector instructions; relative error 2e-7 (Cephes, expf). */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return (p * r * r + r + 1.0f) * power;
}

/* Normal distribution function at x, given e^(-x^2 / 2); absolute error 1e-7 (Abramowitz and Stegun, 7.1.26). */
static inline float normal_cdf(float x, float bell) {
    float t = 1.0f / (1.0f + 0.3275911f * 0.70710678118654752f * fabsf(x));
    float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    float tail = 0.5f * p * bell;
    return x < 0.0f ? tail : 1.0f - tail;
}

static const float TANH_SCALE = 0.79788456080286536f; /* sqrt(2 / pi) */
static const float CUBE = 0.044715f;

/* GELU of n values, exact or in its tanh approximation. */
void gelu(float *out, const float *x, int64_t n, int approximate) {
    if (approximate) {
#pragma omp parallel for simd
        for (int64_t i = 0; i < n; i++) {
            float v = x[i] < -64.0f ? -64.0f : x[i] > 64.0f ? 64.0f : x[i];
            out[i] = x[i] / (1.0f + exponential(-2.0f * TANH_SCALE * (v + CUBE * v * v * v)));
        }
    } else {
#pragma omp parallel for simd
        for (int64_t i = 0; i < n; i++) out[i] = x[i] * normal_cdf(x[i], exponential(-0.5f * x[i] * x[i]));
    }
}

/* dx = dy times the derivative at x, and once more out = gelu(x); dx may be dy. */
void gelu_gradient(float *dx, float *out, const float *dy, const float *x, int64_t n, int approximate) {
    if (approximate) {
#pragma omp parallel for simd
        for (int64_t i = 0; i < n; i++) {
            /* Beyond 64 nothing changes, and a cube would overflow. */
            float v = x[i] < -64.0f ? -64.0f : x[i] > 64.0f ? 64.0f : x[i], square = v * v;
            float s = 1.0f / (1.0f + exponential(-2.0f * TANH_SCALE * v * (1.0f + CUBE * square)));
            out[i] = x[i] * s;
            dx[i] = dy[i] * (s + v * s * (1.0f - s) * 2.0f * TANH_SCALE * (1.0f + 3.0f * CUBE * square));
        }
    } else {
#pragma omp parallel for simd
        for (int64_t i = 0; i < n; i++) {
            float v = x[i], bell = exponential(-0.5f * v * v), cdf = normal_cdf(v, bell);
            out[i] = v * cdf;
            dx[i] = dy[i] * (cdf + v * 0.3989422804014327f * bell);
        }
    }
}

/* x += bias, for every row. */
void add_bias(float *x, const float *bias, int64_t rows, int64_t width) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        float *row = x + r * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) row[i] += bias[i];
    }
}

/* Sums over rows of [rows, width], as the gradient of a bias is. */
void column_sums(float *out, const float *x, int64_t rows, int64_t width) {
#pragma omp parallel for
    for (int64_t first = 0; first < width; first += BLOCK) {
        int64_t count = width - first < BLOCK ? width - first : BLOCK;
        float total[BLOCK] = {0};
        for (int64_t top = 0; top < rows; top += BLOCK) {
            int64_t bottom = top + BLOCK < rows ? top + BLOCK : rows;
            float part[BLOCK] = {0};
            for (int64_t r = top; r < bottom; r++)
                for (int64_t i = 0; i < count; i++) part[i] += x[r * width + first + i];
            for (int64_t i = 0; i < count; i++) total[i] += part[i];
        }
        memcpy(out + first, total, count * sizeof(float));
    }
}

/* Normalizes each row, then multiplies by gain and adds shift, which each group of `tokens` rows has of its own.
 * Keeps mean and inverse deviation of each row for the gradient. */
void layer_norm(float *out, float *mean, float *inverse, const float *x, const float *gain, const float *shift,
                int64_t groups, int64_t tokens, int64_t width, float epsilon) {
#pragma omp parallel for
    for (int64_t r = 0; r < groups * tokens; r++) {
        const float *row = x + r * width, *g = gain + r / tokens * width, *s = shift + r / tokens * width;
        float *y = out + r * width, sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += row[i];
        float m = sum / width;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += (row[i] - m) * (row[i] - m);
        float inv = 1.0f / sqrtf(squares / width + epsilon);
#pragma omp simd
        for (int64_t i = 0; i < width; i++) y[i] = (row[i] - m) * inv * g[i] + s[i];
        mean[r] = m;
        inverse[r] = inv;
    }
}

void layer_norm_gradient(float *dx, float *dgain, float *dshift, const float *dy, const float *x, const float *mean,
                         const float *inverse, const float *gain, int64_t groups, int64_t tokens, int64_t width) {
#pragma omp parallel for
    for (int64_t r = 0; r < groups * tokens; r++) {
        const float *row = x + r * width, *d = dy + r * width, *g = gain + r / tokens * width;
        float *out = dx + r * width, m = mean[r], inv = inverse[r], sum = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : sum, product)
        for (int64_t i = 0; i < width; i++) {
            sum += d[i] * g[i];
            product += d[i] * g[i] * (row[i] - m);
        }
        sum /= width;
        product *= inv * inv / width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) out[i] = inv * (d[i] * g[i] - sum - (row[i] - m) * product);
    }
    int64_t blocks = (width + BLOCK - 1) / BLOCK;
#pragma omp parallel for
    for (int64_t task = 0; task < groups * blocks; task++) {
        int64_t group = task / blocks, first = task % blocks * BLOCK;
        int64_t count = width - first < BLOCK ? width - first : BLOCK;
        float gains[BLOCK] = {0}, shifts[BLOCK] = {0};
        for (int64_t top = 0; top < tokens; top += BLOCK) {
            int64_t bottom = top + BLOCK < tokens ? top + BLOCK : tokens;
            float gain_part[BLOCK] = {0}, shift_part[BLOCK] = {0};
            for (int64_t t = top; t < bottom; t++) {
                int64_t r = group * tokens + t;
                const float *row = x + r * width + first, *d = dy + r * width + first;
                for (int64_t i = 0; i < count; i++) {
                    gain_part[i] += d[i] * ((row[i] - mean[r]) * inverse[r]);
                    shift_part[i] += d[i];
                }
            }
            for (int64_t i = 0; i < count; i++) gains[i] += gain_part[i], shifts[i] += shift_part[i];
        }
        memcpy(dgain + group * width + first, gains, count * sizeof(float));
        memcpy(dshift + group * width + first, shifts, count * sizeof(float));
    }
}

/* out = x + gate * y; each group of `tokens` rows has a gate [width] of its own. */
void gated_sum(float *out, const float *x, const float *gate, const float *y, int64_t groups, int64_t tokens,
               int64_t width) {
#pragma omp parallel for
    for (int64_t r = 0; r < groups * tokens; r++) {
        const float *g = gate + r / tokens * width;
#pragma omp simd
        for (int64_t i = r * width; i < (r + 1) * width; i++) out[i] = x[i] + g[i - r * width] * y[i];
    }
}

void gated_sum_gradient(float *dgate, float *dy, const float *dout, const float *gate, const float *y, int64_t groups,
                        int64_t tokens, int64_t width) {
    int64_t blocks = (width + BLOCK - 1) / BLOCK;
#pragma omp parallel for
    for (int64_t task = 0; task < groups * blocks; task++) {
        int64_t group = task / blocks, first = task % blocks * BLOCK;
        int64_t count = width - first < BLOCK ? width - first : BLOCK;
        const float *g = gate + group * width + first;
        float total[BLOCK] = {0};
        for (int64_t top = 0; top < tokens; top += BLOCK) {
            int64_t bottom = top + BLOCK < tokens ? top + BLOCK : tokens;
            float part[BLOCK] = {0};
            for (int64_t t = top; t < bottom; t++) {
                int64_t at = (group * tokens + t) * width + first;
                for (int64_t i = 0; i < count; i++) {
                    part[i] += dout[at + i] * y[at + i];
                    dy[at + i] = g[i] * dout[at + i];
                }
            }
            for (int64_t i = 0; i < count; i++) total[i] += part[i];
        }
        memcpy(dgate + group * width + first, total, count * sizeof(float));
    }
}

/* Softmax of `rows` rows of `width` values, which begin `stride` apart. */
static void softmax_rows(float *x, int64_t rows, int64_t width, int64_t stride) {
    for (int64_t r = 0; r < rows; r++) {
        float *row = x + r * stride, top = row[0], sum = 0.0f;
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < width; i++) top = row[i] > top ? row[i] : top;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += row[i] = exponential(row[i] - top);
        float inv = 1.0f / sum;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) row[i] *= inv;
    }
}

/* Self-attention of qkv [batch, tokens, 3, heads, dim] -> out [batch, tokens, heads, dim].
 * A thread takes one head of one sample: its weights are in its part of scratch [threads, tokens, row] and not kept, up
 * to about 500 tokens in the cache; the products read the heads where they lie. A row is longer than tokens where that
 * aligns it. */
void attention(float *out, float *scratch, int64_t threads, int64_t row, const float *qkv, int64_t batch,
               int64_t tokens, int64_t heads, int64_t dim) {
    int64_t width = heads * dim, stride = 3 * width;
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < batch * heads; task++) {
        const float *q = qkv + task / heads * tokens * stride + task % heads * dim;
        const float *k = q + width, *v = k + width;
        float *weights = scratch + omp_get_thread_num() * tokens * row;
        cblas_sgemm(ROW_MAJOR, PLAIN, TRANSPOSED, tokens, tokens, dim, 1.0f / sqrtf(dim), q, stride, k, stride, 0.0f,
                    weights, row);
        softmax_rows(weights, tokens, tokens, row);
        cblas_sgemm(ROW_MAJOR, PLAIN, PLAIN, tokens, dim, tokens, 1.0f, weights, row, v, stride, 0.0f,
                    out + task / heads * tokens * width + task % heads * dim, width);
    }
}

/* The weights are computed again; scratch is [threads, 2, tokens, row]. */
void attention_gradient(float *dqkv, float *scratch, int64_t threads, int64_t row, const float *dout, const float *qkv,
                        int64_t batch, int64_t tokens, int64_t heads, int64_t dim) {
    int64_t width = heads * dim, stride = 3 * width;
    float scale = 1.0f / sqrtf(dim);
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < batch * heads; task++) {
        int64_t at = task / heads * tokens * stride + task % heads * dim;
        const float *q = qkv + at, *k = q + width, *v = k + width;
        const float *d = dout + task / heads * tokens * width + task % heads * dim;
        float *dq = dqkv + at, *dk = dq + width, *dv = dk + width;
        float *weights = scratch + omp_get_thread_num() * 2 * tokens * row, *dweights = weights + tokens * row;
        cblas_sgemm(ROW_MAJOR, PLAIN, TRANSPOSED, tokens, tokens, dim, scale, q, stride, k, stride, 0.0f, weights, row);
        softmax_rows(weights, tokens, tokens, row);
        cblas_sgemm(ROW_MAJOR, TRANSPOSED, PLAIN, tokens, dim, tokens, 1.0f, weights, row, d, width, 0.0f, dv, stride);
        cblas_sgemm(ROW_MAJOR, PLAIN, TRANSPOSED, tokens, tokens, dim, 1.0f, d, width, v, stride, 0.0f, dweights, row);
        for (int64_t r = 0; r < tokens; r++) {
            float *w = weights + r * row, *dw = dweights + r * row, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < tokens; i++) sum += w[i] * dw[i];
#pragma omp simd
            for (int64_t i = 0; i < tokens; i++) dw[i] = w[i] * (dw[i] - sum);
        }
        cblas_sgemm(ROW_MAJOR, PLAIN, PLAIN, tokens, dim, tokens, scale, dweights, row, k, stride, 0.0f, dq, stride);
        cblas_sgemm(ROW_MAJOR, TRANSPOSED, PLAIN, tokens, dim, tokens, scale, dweights, row, q, stride, 0.0f, dk, stride);
    }
}

/* Rounds to the nearest bfloat16, ties to even; NaN stays NaN. */
void to_bfloat16(uint16_t *out, const float *x, int64_t n) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
        out[i] = x[i] == x[i] ? rounded >> 16 : 0x7fc0;
    }
}

static dnnl_engine_t engine;

/* To be called once, before any product; returns oneDNN's status, 0 for success. */
int prepare(void) { return dnnl_engine_create(&engine, DNNL_CPU, 0); }

/* A matrix of rows x columns at `values`, as it is or as the transpose of what lies there. */
static int describe(dnnl_memory_desc_t *matrix, int type, int64_t rows, int64_t columns, int64_t transposed) {
    dnnl_dims_t sizes = {rows, columns}, strides = {transposed ? 1 : columns, transposed ? rows : 1};
    return dnnl_memory_desc_create_with_strides(matrix, 2, sizes, type, strides);
}

/* out [m, n] float32 = a [m, k] x b [k, n], both float32 or both bfloat16, each as it is or transposed in memory; sums
 * are float32. oneDNN keeps what it makes for a shape, so making it again costs microseconds. Returns its status, 0 for
 * success. */
int product(float *out, void *a, void *b, int64_t m, int64_t n, int64_t k, int64_t transpose_a, int64_t transpose_b,
            int64_t bfloat16) {
    int type = bfloat16 ? DNNL_BF16 : DNNL_F32;
    dnnl_stream_t stream = 0;
    dnnl_memory_desc_t kinds[3] = {0};
    dnnl_memory_t memories[3] = {0};
    dnnl_primitive_desc_t description = 0;
    dnnl_primitive_t primitive = 0;
    int status = dnnl_stream_create(&stream, engine, DNNL_DEFAULT_FLAGS) || describe(kinds, type, m, k, transpose_a) || describe(kinds + 1, type, k, n, transpose_b) ||
             describe(kinds + 2, DNNL_F32, m, n, 0) ||
             dnnl_matmul_primitive_desc_create(&description, engine, kinds[0], kinds[1], 0, kinds[2], 0) ||
             dnnl_primitive_create(&primitive, description) || dnnl_memory_create(memories, kinds[0], engine, a) ||
             dnnl_memory_create(memories + 1, kinds[1], engine, b) ||
             dnnl_memory_create(memories + 2, kinds[2], engine, out);
    dnnl_exec_arg_t arguments[] = {
        {DNNL_ARG_SRC, memories[0]}, {DNNL_ARG_WEIGHTS, memories[1]}, {DNNL_ARG_DST, memories[2]}};
    status = status || dnnl_primitive_execute(primitive, stream, 3, arguments) || dnnl_stream_wait(stream);
    for (int i = 0; i < 3; i++) {
        if (memories[i]) dnnl_memory_destroy(memories[i]);
        if (kinds[i]) dnnl_memory_desc_destroy(kinds[i]);
    }
    if (primitive) dnnl_primitive_destroy(primitive);
    if (description) dnnl_primitive_desc_destroy(description);
    if (stream) dnnl_stream_destroy(stream);
    return status;
}

/* average += weight * (value - average). */
void lerp(float *average, const float *value, float weight, int64_t n) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) average[i] += weight * (value[i] - average[i]);
}

/* Whether all these bytes of a file could be read; a short answer is no error, the end of the file is. */
static int read_bytes(int file, void *out, int64_t size, int64_t position) {
    for (int64_t done = 0; done < size;) {
        ssize_t got = pread(file, (char *)out + done, size - done, position + done);
        if (got == 0 || (got < 0 && errno != EINTR)) return 0;
        if (got > 0) done += got;
    }
    return 1;
}

#define PART 8192 /* float16 values that are read before they are converted: they stay in the cache */

/* As `read_bytes`, of n float16 values, converted to float32. Infinity becomes 65536, and NaN more. */
static int read_halves(int file, float *out, int64_t n, int64_t position) {
    uint16_t halves[PART];
    for (int64_t first = 0; first < n; first += PART) {
        int64_t count = n - first < PART ? n - first : PART;
        if (!read_bytes(file, halves, count * sizeof *halves, position + first * sizeof *halves)) return 0;
        for (int64_t i = 0; i < count; i++) {
            /* Sign, exponent and fraction to where a float32 has them; its exponent's bias is 127, not 15. */
            uint32_t bits = (uint32_t)(int16_t)halves[i] << 13 & 0x8fffe000;
            float shifted;
            memcpy(&shifted, &bits, sizeof shifted);
            out[first + i] = shifted * 0x1p112f;
        }
    }
    return 1;
}

/* Reads n records of `count` values, float16 if `half` or else float32, each at a position of a file, to float32.
 * Returns whether all could be read and are finite. One thread, since a forked process can start none of OpenMP's. */
int read_records(float *out, const int32_t *files, const int64_t *positions, int64_t n, int64_t count, int64_t half) {
    const float largest = half ? 65504.0f : FLT_MAX;
    for (int64_t r = 0; r < n; r++) {
        float *record = out + r * count;
        if (!(half ? read_halves(files[r], record, count, positions[r])
                   : read_bytes(files[r], record, count * sizeof *record, positions[r])))
            return 0;
        int finite = 1;
        for (int64_t i = 0; i < count; i++) finite &= fabsf(record[i]) <= largest;
        if (!finite) return 0;
    }
    return 1;
}

/* How many threads a kernel takes. */
int threads(void) { return omp_get_max_threads(); }
