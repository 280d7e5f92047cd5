/* The bytes that every receiver can compare with what must stand at their position, and the times that were measured. */
#include "program.h"

#define PERIOD 1048573u /* prime: no frame, record or page size divides it */
#define CHUNK (256u * 1024u)

static const uint64_t MAGIC = 0x6172636272696467ull; /* a trailer begins with it */

static unsigned char pattern[PERIOD + CHUNK];

static inline void make_pattern(void) {
    uint64_t x = 0x9e3779b97f4a7c15ull; /* xorshift64*: incompressible, the same in every process */
    for (size_t i = 0; i < PERIOD; i += 8) {
        x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
        uint64_t word = x * 0x2545f4914f6cdd1dull;
        memcpy(pattern + i, &word, PERIOD - i < 8 ? PERIOD - i : 8);
    }
    memcpy(pattern + PERIOD, pattern, CHUNK);
}

static uint32_t *samples;
static size_t sample_count, sample_room;

static inline void sample(uint64_t nanos) {
    if (sample_count == sample_room) {
        sample_room = sample_room ? sample_room * 2 : 1 << 16;
        if (!(samples = realloc(samples, sample_room * sizeof *samples))) die("realloc");
    }
    samples[sample_count++] = nanos > UINT32_MAX ? UINT32_MAX : (uint32_t)nanos;
}

static inline int rising(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Of samples that are sorted. */
static inline double quantile_us(double q) {
    if (!sample_count) return 0;
    size_t i = (size_t)(q * (double)sample_count);
    return samples[i < sample_count ? i : sample_count - 1] / 1e3;
}
