/* Pours bytes through sessions that its parent process has joined, at the least cost to itself.
 *
 *     pour SECONDS WARMUP SOURCES SINKS        lists of descriptor numbers, joined by commas
 *
 * One thread writes to all sources as fast as they take it, another one takes from all sinks and drops what it takes in
 * the kernel (MSG_TRUNC), uncopied: what is measured stands between the two. Bytes are counted at the sinks; at the end
 * the writer stops, and all it has written must come. Prints one line of JSON.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>

enum { MOST = 1024, CHUNK = 256 * 1024, TURN = 8, PATIENCE = 15 };

static int sources[MOST], sinks[MOST], source_count, sink_count;
static atomic_ullong written, taken;
static atomic_int stop_writing, stop_taking;
static char chunk[CHUNK];

static void die(const char *what) {
    fprintf(stderr, "pour: %s: %s\n", what, errno ? strerror(errno) : "ended");
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void nap(double seconds) {
    struct timespec t = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
    nanosleep(&t, NULL);
}

static int list(char *text, int *out) {
    int n = 0;
    for (char *part = strtok(text, ","); part; part = strtok(NULL, ",")) {
        if (n == MOST) die("too many descriptors");
        out[n] = atoi(part);
        if (fcntl(out[n], F_SETFL, fcntl(out[n], F_GETFL) | O_NONBLOCK)) die("fcntl");
        n++;
    }
    return n;
}

static int poller(int *fds, int n, unsigned events) {
    int p = epoll_create1(EPOLL_CLOEXEC);
    if (p < 0) die("epoll_create1");
    for (int i = 0; i < n; i++) {
        struct epoll_event e = {.events = events, .data.fd = fds[i]};
        if (epoll_ctl(p, EPOLL_CTL_ADD, fds[i], &e)) die("epoll_ctl");
    }
    return p;
}

static void *write_all(void *unused) {
    (void)unused;
    int p = poller(sources, source_count, EPOLLOUT);
    struct epoll_event ready[64];
    while (!atomic_load(&stop_writing)) {
        int n = epoll_wait(p, ready, 64, 50);
        for (int i = 0; i < n; i++)
            for (int turn = 0; turn < TURN; turn++) {
                ssize_t sent = send(ready[i].data.fd, chunk, CHUNK, MSG_NOSIGNAL);
                if (sent < 0 && (errno == EAGAIN || errno == EINTR)) break;
                if (sent < 0) die("send");
                atomic_fetch_add(&written, sent);
                if (sent < CHUNK) break;
            }
    }
    return NULL;
}

static void *take_all(void *unused) {
    (void)unused;
    int p = poller(sinks, sink_count, EPOLLIN);
    struct epoll_event ready[64];
    while (!atomic_load(&stop_taking)) {
        int n = epoll_wait(p, ready, 64, 50);
        for (int i = 0; i < n; i++)
            for (int turn = 0; turn < TURN; turn++) {
                errno = 0;
                ssize_t got = recv(ready[i].data.fd, NULL, 4 * CHUNK, MSG_TRUNC);
                if (got < 0 && (errno == EAGAIN || errno == EINTR)) break;
                if (got <= 0) die("recv");
                atomic_fetch_add(&taken, got);
                if (got < CHUNK) break;
            }
    }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: pour SECONDS WARMUP SOURCES SINKS\n");
        return 2;
    }
    double seconds = atof(argv[1]), warmup = atof(argv[2]);
    source_count = list(argv[3], sources);
    sink_count = list(argv[4], sinks);
    pthread_t writer, taker;
    if (pthread_create(&taker, NULL, take_all, NULL) || pthread_create(&writer, NULL, write_all, NULL)) die("thread");
    nap(warmup);
    unsigned long long before = atomic_load(&taken);
    double begun = now();
    printf("{\"begun\": %.6f, ", begun);
    nap(seconds);
    unsigned long long after = atomic_load(&taken);
    double took = now() - begun;
    atomic_store(&stop_writing, 1);
    pthread_join(writer, NULL);
    for (double until = now() + PATIENCE; atomic_load(&taken) != atomic_load(&written);) {
        if (now() > until || atomic_load(&taken) > atomic_load(&written)) {
            fprintf(stderr, "pour: %llu bytes written, %llu came\n", atomic_load(&written), atomic_load(&taken));
            return 1;
        }
        nap(0.005);
    }
    atomic_store(&stop_taking, 1);
    pthread_join(taker, NULL);
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu = used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    printf("\"mb_per_s\": %.3f, \"total_bytes\": %llu, \"cpu_s\": %.3f}\n", (after - before) / took / 1e6,
           atomic_load(&taken), cpu);
    return 0;
}
