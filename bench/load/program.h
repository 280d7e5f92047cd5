/* What every program here needs: a clock, a way to end with a reason, numbers from its command line. */
#ifndef PROGRAM
#error "define PROGRAM, the name that errors begin with, before this"
#endif

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static inline void die(const char *what) {
    fprintf(stderr, PROGRAM ": %s%s%s\n", what, errno ? ": " : "", errno ? strerror(errno) : "");
    exit(1);
}

static inline double number(const char *text, double least, double most) {
    char *end;
    double value = strtod(text, &end);
    errno = 0;
    if (end == text || *end || !(value >= least && value <= most))
        die("an option is not a number, or outside its bounds");
    return value;
}
