/*
 * Many connections at once, and what is asked of them step by step: one file, no library but libc, Linux. The other end
 * is `load serve` (load.c), and what connections say first is told there.
 *
 *   many ADDRESS PORT CONNECTIONS SIZE
 *
 * opens that many, at most WINDOW of them on their way at a time, each with one echo of SIZE bytes; then it obeys lines
 * on stdin, and answers each (and the opening) with one JSON object on stdout:
 *
 *   rate PER_SECOND SECONDS WARMUP   so many echoes a second, spread evenly over all connections, whatever the answers do
 *   echo SECONDS WARMUP              one echo under way on each connection, as fast as they come
 *   bulk BYTES                       BYTES in all to the other end, an equal share on each of as many new connections; last
 *
 * It ends then, or with stdin. Every byte is compared with what must stand at its position, echoes here, bulk at the
 * receiver. After each line all connections are quiet again. Only 127.0.0.0/8 is accepted, and everything is bounded by
 * time, count and size.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define PROGRAM "many"
#include "known.h"

#define WINDOW 64u
#define MAX_CONNECTIONS 20000u
#define MAX_SIZE 1024u
#define MAX_SECONDS 60.0
#define MAX_RATE 200000.0
#define MAX_BYTES (1ull << 34)
#define STALL_MS 15000 /* no progress for so long ends the run with an error */
#define BULK_MS 40000  /* a share may fit into the buffers on the way, and then nothing is seen until a receiver has all */

struct connection {
    int fd;
    uint64_t sent, received; /* bytes of this connection's sequence, the 'E' apart */
    uint64_t share;          /* bulk: what it is to send */
    uint64_t *due;           /* echo and rate: when the requests under way were due, a ring */
    unsigned first, count, room;
    int wants_write;
};

static struct connection *all;
static unsigned connections, size;
static int poller;

static void wrong(const char *what) {
    errno = 0;
    die(what);
}

/* The bytes at a position of a connection's sequence: they differ between connections, so that a mix-up is seen. */
static const unsigned char *bytes_at(unsigned connection, uint64_t position) {
    return pattern + (connection * 131071ull + position) % PERIOD;
}

/* -- one connection --------------------------------------------------------------------------------------------- */

static void watch(unsigned i, int write) {
    struct connection *c = all + i;
    if (c->wants_write == write) return;
    struct epoll_event e = {.events = EPOLLIN | (write ? EPOLLOUT : 0u), .data.u32 = i};
    if (epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e)) die("epoll_ctl");
    c->wants_write = write;
}

static void push(struct connection *c, uint64_t due) {
    if (c->count == c->room) {
        unsigned room = c->room ? c->room * 2 : 4;
        uint64_t *ring = malloc(room * sizeof *ring);
        if (!ring) die("malloc");
        for (unsigned k = 0; k < c->count; k++) ring[k] = c->due[(c->first + k) % c->room];
        free(c->due);
        c->due = ring, c->room = room, c->first = 0;
    }
    c->due[(c->first + c->count++) % c->room] = due;
}

static uint64_t pop(struct connection *c) {
    uint64_t due = c->due[c->first];
    c->first = (c->first + 1) % c->room;
    c->count--;
    return due;
}

/* One request; what the socket does not take now is an error: requests are small, and the system has stopped reading. */
static void request(unsigned i, uint64_t due) {
    struct connection *c = all + i;
    ssize_t n = send(c->fd, bytes_at(i, c->sent), size, MSG_NOSIGNAL);
    if (n < 0) die("send");
    if ((unsigned)n < size) wrong("a connection took only a part of a request");
    c->sent += size;
    push(c, due);
}

/* What came, compared; how many bytes. */
static size_t take(unsigned i) {
    static unsigned char buffer[CHUNK];
    struct connection *c = all + i;
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n < 0) {
        if (errno == EAGAIN) return 0;
        die("recv");
    }
    if (!n) wrong("a connection ended early");
    if (c->received + (uint64_t)n > c->sent) wrong("more came back than was sent");
    if (memcmp(buffer, bytes_at(i, c->received), (size_t)n)) wrong("bytes came back changed");
    c->received += (uint64_t)n;
    return (size_t)n;
}

/* -- samples ---------------------------------------------------------------------------------------------------- */

/* `requests`: all of the phase, the warm-up included, for who counts CPU time over the whole of it. */
static void tell(double seconds, uint64_t requests) {
    if (!sample_count) wrong("nothing was measured");
    qsort(samples, sample_count, sizeof *samples, rising);
    printf("{\"count\": %zu, \"requests\": %llu, \"seconds\": %.6f, \"per_s\": %.1f, \"p50_us\": %.1f, "
           "\"p99_us\": %.1f, \"max_us\": %.1f}\n",
           sample_count, (unsigned long long)requests, seconds, (double)sample_count / seconds, quantile_us(0.5),
           quantile_us(0.99), quantile_us(1));
    fflush(stdout);
    sample_count = 0;
}

/* -- phases ----------------------------------------------------------------------------------------------------- */

static void dial(const struct sockaddr_in *a, unsigned i) {
    struct connection *c = all + i;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("socket");
    int one = 1;
    if (setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one)) die("TCP_NODELAY");
    if (connect(c->fd, (const struct sockaddr *)a, sizeof *a) && errno != EINPROGRESS) die("connect");
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.u32 = i};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &e)) die("epoll_ctl");
    c->wants_write = 1;
}

static void connected(const struct connection *c) {
    int error = 0;
    socklen_t length = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
    if (error) errno = error, die("connect");
}

static void open_all(const struct sockaddr_in *a) {
    uint64_t start = now_ns();
    unsigned begun = 0, done = 0;
    struct epoll_event ready[256];
    while (done < connections) {
        for (; begun < connections && begun - done < WINDOW; begun++) dial(a, begun);
        int n = epoll_wait(poller, ready, 256, STALL_MS);
        if (n < 0 && errno != EINTR) die("epoll_wait");
        if (!n) {
            fprintf(stderr, "many: after %u of %u connections no more were answered\n", done, connections);
            exit(1);
        }
        for (int k = 0; k < n; k++) {
            unsigned i = ready[k].data.u32;
            struct connection *c = all + i;
            if (c->wants_write) {
                connected(c);
                if (!(ready[k].events & EPOLLOUT)) continue;
                watch(i, 0);
                if (send(c->fd, "E", 1, MSG_NOSIGNAL) != 1) die("send");
                request(i, 0);
            } else {
                take(i);
                if (c->received == c->sent) pop(c), done++;
            }
        }
    }
    printf("{\"opened\": %u, \"seconds\": %.6f}\n", connections, (double)(now_ns() - start) / 1e9);
    fflush(stdout);
}

/* Requests that are complete by now; each is measured if it was due after the warm-up. */
static uint64_t answers(unsigned i, uint64_t measure) {
    struct connection *c = all + i;
    uint64_t before = c->received / size, complete;
    take(i);
    complete = c->received / size - before;
    uint64_t now = now_ns();
    for (uint64_t k = 0; k < complete; k++) {
        uint64_t due = pop(c);
        if (due >= measure) sample(now - due);
    }
    return complete;
}

static void run_echo(double seconds, double warmup) {
    uint64_t measure = now_ns() + (uint64_t)(warmup * 1e9), stop = measure + (uint64_t)(seconds * 1e9);
    uint64_t requests = 0, under_way = 0;
    for (unsigned i = 0; i < connections; i++) request(i, now_ns()), requests++, under_way++;
    struct epoll_event ready[256];
    while (under_way) {
        int n = epoll_wait(poller, ready, 256, STALL_MS);
        if (n < 0 && errno != EINTR) die("epoll_wait");
        if (!n) wrong("no echo came back any more");
        for (int k = 0; k < n; k++) {
            unsigned i = ready[k].data.u32;
            if (!answers(i, measure)) continue;
            uint64_t now = now_ns();
            under_way--;
            if (now < stop) request(i, now), requests++, under_way++;
        }
    }
    /* Those under way at the end were due before it: they count, and the time that they took does. */
    tell((double)(now_ns() - measure) / 1e9, requests);
}

static void run_rate(double per_second, double seconds, double warmup) {
    int clock = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (clock < 0) die("timerfd_create");
    uint64_t step = (uint64_t)(1e9 / per_second), start = now_ns() + 1000000;
    struct itimerspec every = {
        .it_value = {(time_t)(start / 1000000000ull), (long)(start % 1000000000ull)},
        .it_interval = {(time_t)(step / 1000000000ull), (long)(step % 1000000000ull)},
    };
    if (timerfd_settime(clock, TFD_TIMER_ABSTIME, &every, NULL)) die("timerfd_settime");
    struct epoll_event e = {.events = EPOLLIN, .data.u32 = UINT32_MAX};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, clock, &e)) die("epoll_ctl");
    uint64_t measure = start + (uint64_t)(warmup * 1e9), most = (uint64_t)((seconds + warmup) * per_second);
    uint64_t requests = 0, complete = 0, progress = now_ns();
    struct epoll_event ready[256];
    while (complete < most) {
        int n = epoll_wait(poller, ready, 256, STALL_MS);
        if (n < 0 && errno != EINTR) die("epoll_wait");
        if (now_ns() - progress > STALL_MS * 1000000ull) wrong("no echo came back any more");
        for (int k = 0; k < n; k++) {
            unsigned i = ready[k].data.u32;
            if (i != UINT32_MAX) {
                uint64_t came = answers(i, measure);
                if (came) complete += came, progress = now_ns();
                continue;
            }
            uint64_t ticks = 0;
            if (read(clock, &ticks, sizeof ticks) != sizeof ticks) continue;
            for (; ticks && requests < most; ticks--, requests++)
                request((unsigned)(requests % connections), start + requests * step);
            if (requests == most && epoll_ctl(poller, EPOLL_CTL_DEL, clock, NULL)) die("epoll_ctl");
        }
    }
    close(clock);
    tell((double)(now_ns() - measure) / 1e9, requests);
}

struct plan {
    uint64_t bytes, zero[2];
};

struct verdict {
    uint64_t total, bad_at, measured, nanos;
};

/* 1 when the whole share has left, and the trailer behind it. */
static int send_share(struct connection *c) {
    uint64_t trailer[2] = {MAGIC, c->share}, whole = c->share + sizeof trailer;
    while (c->sent < whole) {
        const unsigned char *from = pattern + c->sent % PERIOD;
        uint64_t left = c->share - c->sent;
        if (c->sent >= c->share) from = (unsigned char *)trailer + (c->sent - c->share), left = whole - c->sent;
        ssize_t n = send(c->fd, from, left < CHUNK ? left : CHUNK, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) return 0;
        if (n < 0) die("send");
        c->sent += (uint64_t)n;
    }
    return 1;
}

/* On connections of their own, because the receiver counts: 'U' and a plan, payload, trailer; a verdict comes back. */
static void run_bulk(const struct sockaddr_in *a, uint64_t bytes) {
    uint64_t share = bytes / connections;
    if (!share) wrong("less than one byte for each connection");
    unsigned char head[1 + sizeof(struct plan)] = {'U'};
    struct plan plan = {share, {0, 0}};
    memcpy(head + 1, &plan, sizeof plan);
    for (unsigned i = 0; i < connections; i++) close(all[i].fd), all[i].sent = all[i].received = 0;
    struct epoll_event ready[256];
    for (unsigned begun = 0, done = 0; done < connections;) {
        for (; begun < connections && begun - done < WINDOW; begun++) dial(a, begun);
        int n = epoll_wait(poller, ready, 256, STALL_MS);
        if (n < 0 && errno != EINTR) die("epoll_wait");
        if (!n) wrong("connections are not accepted any more");
        for (int k = 0; k < n; k++) {
            struct connection *c = all + ready[k].data.u32;
            connected(c);
            if (!(ready[k].events & EPOLLOUT)) continue;
            if (send(c->fd, head, sizeof head, MSG_NOSIGNAL) != sizeof head) die("send");
            watch(ready[k].data.u32, 0);
            done++;
        }
    }
    /* Nothing comes back yet that would say that they stand to the far end: time is given instead. */
    usleep(200000 + connections * 400);
    uint64_t start = now_ns(), first = 0;
    for (unsigned i = 0; i < connections; i++) {
        all[i].share = share;
        watch(i, 1);
    }
    for (unsigned left = connections; left;) {
        int n = epoll_wait(poller, ready, 256, BULK_MS);
        if (n < 0 && errno != EINTR) die("epoll_wait");
        if (!n) wrong("nothing moves any more");
        for (int k = 0; k < n; k++) {
            unsigned i = ready[k].data.u32;
            struct connection *c = all + i;
            if (c->wants_write) {
                if (ready[k].events & (EPOLLERR | EPOLLHUP)) wrong("a connection was cut");
                if (send_share(c)) watch(i, 0);
                continue;
            }
            struct verdict v;
            ssize_t got = recv(c->fd, &v, sizeof v, 0);
            if (got < 0) die("recv");
            if (got != sizeof v) wrong("a connection ended without its receiver's verdict");
            if (v.total != share || v.bad_at != UINT64_MAX) wrong("bytes were lost or changed");
            if (epoll_ctl(poller, EPOLL_CTL_DEL, c->fd, NULL)) die("epoll_ctl");
            if (!first) first = now_ns();
            left--;
        }
    }
    uint64_t end = now_ns();
    double seconds = (double)(end - start) / 1e9, moved = (double)share * connections;
    printf("{\"total_bytes\": %.0f, \"seconds\": %.6f, \"mb_per_s\": %.3f, \"first_done_s\": %.6f}\n", moved, seconds,
           moved / 1e6 / seconds, (double)(first - start) / 1e9);
    fflush(stdout);
}

/* -- main ------------------------------------------------------------------------------------------------------- */

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    if (argc != 5) {
        fprintf(stderr, "usage: many ADDRESS PORT CONNECTIONS SIZE\n");
        return 2;
    }
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)number(argv[2], 1, 65535))};
    if (inet_pton(AF_INET, argv[1], &a.sin_addr) != 1 || ntohl(a.sin_addr.s_addr) >> 24 != 127)
        wrong("only addresses of 127.0.0.0/8 are accepted: this program loads its own machine and no other");
    connections = (unsigned)number(argv[3], 1, MAX_CONNECTIONS);
    size = (unsigned)number(argv[4], 1, MAX_SIZE);
    struct rlimit files;
    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    make_pattern();
    if (!(all = calloc(connections, sizeof *all))) die("calloc");
    if ((poller = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll_create1");
    open_all(&a);
    char line[256], word[16], one[64], two[64], three[64];
    while (fgets(line, sizeof line, stdin)) {
        int words = sscanf(line, "%15s %63s %63s %63s", word, one, two, three);
        if (words == 4 && !strcmp(word, "rate"))
            run_rate(number(one, 1, MAX_RATE), number(two, 0.001, MAX_SECONDS), number(three, 0, MAX_SECONDS));
        else if (words == 3 && !strcmp(word, "echo"))
            run_echo(number(one, 0.001, MAX_SECONDS), number(two, 0, MAX_SECONDS));
        else if (words == 2 && !strcmp(word, "bulk"))
            return run_bulk(&a, (uint64_t)number(one, 1, (double)MAX_BYTES)), 0;
        else
            wrong("not a command");
    }
    return 0;
}
