/*
 * Load generator of the benchmark, and the target it talks to: one file, no library but libc, Linux.
 *
 *   load serve                                     the target; prints "PORT n", runs until its stdin ends
 *   load up|down  ADDRESS PORT [options]           one stream of bytes, checked and counted at the receiver
 *   load echo     ADDRESS PORT [options]           ping-pong on one connection: rate, p50, p99
 *   load many     ADDRESS PORT [options]           ping-pong on --connections at once
 *   load open     ADDRESS PORT [options]           connect, one byte there, one byte back, close
 *   load keys     ADDRESS PORT [options]           an echo every --every-us on one connection: --idle seconds alone,
 *                                                  then beside --up streams of bytes one way and --down the other
 *
 *   --seconds S --warmup S --bytes N --count N --connections N --size N --idle S --every-us N --up N --down N
 *
 * One JSON object on stdout; exit 0 only if every byte was right. Every run is bounded by time and by count, and only
 * 127.0.0.0/8 is accepted: this program loads the machine it runs on and no other.
 *
 * What a connection says first:
 *   'U' + plan (24 bytes)   then payload and a trailer (16 bytes: magic, count); answered by a verdict (32 bytes) and
 *                           FIN. No FIN before: several proxies end both directions when one has ended
 *   'D' + plan              answered by payload, a trailer and FIN
 *   'E'                     everything after it comes back
 *   'O'                     one byte comes back; then FIN by the peer
 * Plan: bytes u64, run ms u32, warm-up ms u32, 8 bytes 0. Integers are little endian (both ends are this machine).
 *
 * Payload at position p is pattern[p % PERIOD], PERIOD prime. The receiver compares every byte with what must stand at
 * that position, which finds what a checksum finds (loss, change) and also bytes that were swapped, doubled, or come
 * from another stream; it costs one memcmp. Rates are those of the receiver, from the end of the warm-up on.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define PROGRAM "load"
#include "known.h"

#define TRAILER 16u
#define MAX_SECONDS 600.0
#define MAX_COUNT 200000000ull
#define MAX_BYTES (1ull << 42)
#define MAX_CONNECTIONS 20000u
#define OPEN_AT_ONCE 32u
#define STALL_SECONDS 15.0 /* no progress for so long ends a run with an error */

struct plan {
    uint64_t bytes;
    uint32_t run_ms, warm_ms;
    uint64_t zero;
};

struct verdict {
    uint64_t total;    /* payload bytes that arrived */
    uint64_t bad_at;   /* position of the first wrong byte, or UINT64_MAX */
    uint64_t measured; /* bytes after the warm-up */
    uint64_t nanos;    /* from the end of the warm-up to the last byte */
};

/* -- the receiver's account ------------------------------------------------------------------------------------- */

struct account {
    uint64_t total, bad_at, started, warm_until, warm_bytes, last;
};

static void account_start(struct account *a) {
    memset(a, 0, sizeof *a);
    a->bad_at = UINT64_MAX;
}

static void account_take(struct account *a, const unsigned char *data, size_t size, uint64_t warm_ns) {
    uint64_t now = now_ns();
    if (!a->started) {
        a->started = now;
        a->warm_until = now + warm_ns;
        if (!warm_ns) a->warm_bytes = size; /* the clock starts when the first bytes are already there */
    }
    if (a->bad_at == UINT64_MAX) {
        const unsigned char *want = pattern + a->total % PERIOD;
        if (memcmp(data, want, size) != 0) {
            size_t i = 0;
            while (data[i] == want[i]) i++;
            a->bad_at = a->total + i;
        }
    }
    a->total += size;
    a->last = now;
    if (now < a->warm_until) a->warm_bytes = a->total;
}

static struct verdict account_close(const struct account *a) {
    struct verdict v = {a->total, a->bad_at, 0, 0};
    if (a->last > a->warm_until) {
        v.measured = a->total - a->warm_bytes;
        v.nanos = a->last - a->warm_until;
    }
    return v;
}

/* -- sockets ---------------------------------------------------------------------------------------------------- */

static void no_delay(int fd) {
    int one = 1;
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one)) die("TCP_NODELAY");
}

static struct sockaddr_in address_of(const char *host, const char *port) {
    struct sockaddr_in a = {.sin_family = AF_INET};
    char *end;
    errno = 0;
    unsigned long n = strtoul(port, &end, 10);
    if (*end || !n || n > 65535) die("a port is a number from 1 to 65535");
    if (inet_pton(AF_INET, host, &a.sin_addr) != 1 || ntohl(a.sin_addr.s_addr) >> 24 != 127)
        die("only addresses of 127.0.0.0/8 are accepted: this program loads its own machine and no other");
    a.sin_port = htons((uint16_t)n);
    return a;
}

static int dial(const struct sockaddr_in *a, int more_flags) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | more_flags, 0);
    if (fd < 0) die("socket");
    no_delay(fd);
    if (connect(fd, (const struct sockaddr *)a, sizeof *a) && errno != EINPROGRESS) die("connect");
    return fd;
}

/* A blocking socket that gives up when nothing moves: a run never hangs. */
static int dial_blocking(const struct sockaddr_in *a) {
    int fd = dial(a, 0);
    struct timeval t = {(time_t)STALL_SECONDS, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t);
    return fd;
}

static void send_all(int fd, const void *data, size_t size) {
    const char *p = data;
    while (size) {
        ssize_t n = send(fd, p, size, MSG_NOSIGNAL);
        if (n < 0) die("send");
        p += n, size -= (size_t)n;
    }
}

static void recv_all(int fd, void *data, size_t size) {
    char *p = data;
    while (size) {
        ssize_t n = recv(fd, p, size, 0);
        if (n < 0) die("recv");
        if (!n) errno = 0, die("the connection ended early");
        p += n, size -= (size_t)n;
    }
}

/* -- the target ------------------------------------------------------------------------------------------------- */

enum mode { COMMAND, SINK, SOURCE, ECHO, ONE, DONE };

struct peer {
    int fd;
    int poller; /* of the thread that serves it */
    enum mode mode;
    uint32_t watched; /* epoll's events */
    unsigned have;    /* bytes of `head` */
    unsigned char head[1 + sizeof(struct plan)];
    struct plan plan;
    struct account account;
    uint64_t sent, stop_at;
    unsigned char *held; /* echo: what the socket did not take yet */
    size_t held_from, held_size;
    unsigned char kept[TRAILER]; /* sink: the last bytes so far, which may be the trailer */
    unsigned kept_size;
    unsigned char tail[sizeof(struct verdict)];
    unsigned tail_from, tail_size;
    int shut_after_tail;
};

static int poller, echo_poller;

static void watch(struct peer *p, uint32_t events) {
    if (events == p->watched) return;
    struct epoll_event e = {.events = events, .data.ptr = p};
    int how = p->watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    p->watched = events; /* first: once it is watched, another thread may have it, and may have freed it */
    if (epoll_ctl(p->poller, how, p->fd, &e)) die("epoll_ctl");
}

static void drop(struct peer *p) {
    close(p->fd);
    free(p->held);
    free(p);
}

/* Sends what is left of the tail; 1 when all is gone, 0 when the socket is full, -1 when it is broken. */
static int send_tail(struct peer *p) {
    while (p->tail_from < p->tail_size) {
        ssize_t n = send(p->fd, p->tail + p->tail_from, p->tail_size - p->tail_from, MSG_NOSIGNAL);
        if (n < 0) return errno == EAGAIN ? 0 : -1;
        p->tail_from += (unsigned)n;
    }
    if (p->shut_after_tail) shutdown(p->fd, SHUT_WR);
    p->mode = DONE;
    return 1;
}

static void set_tail(struct peer *p, const void *data, unsigned size, int shut) {
    memcpy(p->tail, data, size);
    p->tail_from = 0, p->tail_size = size, p->shut_after_tail = shut;
}

/* One turn of one connection; 0 when it is over. */
static int serve_one(struct peer *p, unsigned char *buffer) {
    ssize_t n;
    if (p->tail_size && p->mode != DONE) {
        int r = send_tail(p);
        if (r < 0) return 0;
        watch(p, r ? EPOLLIN : EPOLLOUT);
        return 1;
    }
    switch (p->mode) {
    case COMMAND:
        n = recv(p->fd, p->head + p->have, p->have ? sizeof p->head - p->have : 1, 0);
        if (n <= 0) return n < 0 && errno == EAGAIN;
        p->have += (unsigned)n;
        if (p->head[0] == 'E') { /* echoes have a thread of their own: they do not wait for bulk */
            p->mode = ECHO;
            if (epoll_ctl(p->poller, EPOLL_CTL_DEL, p->fd, NULL)) die("epoll_ctl");
            p->watched = 0;
            p->poller = echo_poller;
            watch(p, EPOLLIN); /* from here on the other thread may have it */
        } else if (p->head[0] == 'O') {
            p->mode = ONE;
            set_tail(p, "o", 1, 0);
            int r = send_tail(p);
            if (r < 0) return 0;
            if (!r) watch(p, EPOLLOUT);
        } else if (p->head[0] != 'U' && p->head[0] != 'D') {
            return 0;
        } else if (p->have == sizeof p->head) {
            memcpy(&p->plan, p->head + 1, sizeof p->plan);
            account_start(&p->account);
            p->mode = p->head[0] == 'U' ? SINK : SOURCE;
            p->stop_at = now_ns() + (uint64_t)(p->plan.run_ms + p->plan.warm_ms) * 1000000ull;
            if (p->mode == SOURCE) watch(p, EPOLLOUT);
        }
        return 1;
    case SINK:
        memcpy(buffer, p->kept, p->kept_size);
        n = recv(p->fd, buffer + p->kept_size, CHUNK, 0);
        if (n <= 0) return n < 0 && errno == EAGAIN; /* a stream that is cut gets no verdict */
        size_t have = p->kept_size + (size_t)n;
        p->kept_size = have < TRAILER ? (unsigned)have : TRAILER;
        have -= p->kept_size;
        memcpy(p->kept, buffer + have, p->kept_size);
        if (have) account_take(&p->account, buffer, have, (uint64_t)p->plan.warm_ms * 1000000ull);
        uint64_t said[2] = {0, 0};
        memcpy(said, p->kept, p->kept_size);
        if (p->kept_size < TRAILER || said[0] != MAGIC) return 1;
        struct verdict v = account_close(&p->account);
        set_tail(p, &v, sizeof v, 1);
        return send_tail(p) >= 0;
    case SOURCE: {
        uint64_t left = p->plan.bytes - p->sent;
        if (left && now_ns() < p->stop_at) {
            n = send(p->fd, pattern + p->sent % PERIOD, left < CHUNK ? left : CHUNK, MSG_NOSIGNAL);
            if (n < 0) return errno == EAGAIN;
            p->sent += (uint64_t)n;
            return 1;
        }
        uint64_t trailer[2] = {MAGIC, p->sent};
        set_tail(p, trailer, TRAILER, 1);
        int r = send_tail(p);
        if (r == 1) watch(p, EPOLLIN);
        return r >= 0;
    }
    case ECHO:
        if (p->held_size) {
            n = send(p->fd, p->held + p->held_from, p->held_size, MSG_NOSIGNAL);
            if (n < 0) return errno == EAGAIN;
            p->held_from += (size_t)n, p->held_size -= (size_t)n;
            if (!p->held_size) watch(p, EPOLLIN);
            return 1;
        }
        n = recv(p->fd, buffer, CHUNK, 0);
        if (n <= 0) return n < 0 && errno == EAGAIN;
        ssize_t sent = send(p->fd, buffer, (size_t)n, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) return 0;
        if (sent < 0) sent = 0;
        if (sent < n) {
            if (!p->held && !(p->held = malloc(CHUNK))) die("malloc");
            p->held_from = 0, p->held_size = (size_t)(n - sent);
            memcpy(p->held, buffer + sent, p->held_size);
            watch(p, EPOLLOUT);
        }
        return 1;
    default:
        n = recv(p->fd, buffer, CHUNK, 0);
        return n > 0 || (n < 0 && errno == EAGAIN);
    }
}

static void *serve_echoes(void *unused) {
    static unsigned char buffer[CHUNK];
    struct epoll_event ready[256];
    (void)unused;
    for (;;) {
        int count = epoll_wait(echo_poller, ready, 256, -1);
        if (count < 0 && errno != EINTR) die("epoll_wait");
        for (int i = 0; i < count; i++)
            if (!serve_one(ready[i].data.ptr, buffer)) drop(ready[i].data.ptr);
    }
    return NULL;
}

static int serve(void) {
    static unsigned char buffer[TRAILER + CHUNK];
    pthread_t echoes;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof a;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&a, size) || listen(listener, 4096)) die("listen");
    if (getsockname(listener, (struct sockaddr *)&a, &size)) die("getsockname");
    if ((poller = epoll_create1(EPOLL_CLOEXEC)) < 0 || (echo_poller = epoll_create1(EPOLL_CLOEXEC)) < 0)
        die("epoll_create1");
    if ((errno = pthread_create(&echoes, NULL, serve_echoes, NULL))) die("pthread_create");
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL};
    struct epoll_event in = {.events = EPOLLIN, .data.ptr = &poller};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, &e) || epoll_ctl(poller, EPOLL_CTL_ADD, 0, &in)) die("epoll_ctl");
    printf("PORT %u\n", ntohs(a.sin_port));
    fflush(stdout);
    struct epoll_event ready[256];
    for (;;) {
        int count = epoll_wait(poller, ready, 256, -1);
        if (count < 0 && errno != EINTR) die("epoll_wait");
        for (int i = 0; i < count; i++) {
            struct peer *p = ready[i].data.ptr;
            if (p == (void *)&poller) { /* the process that started this program is gone, or has closed the pipe */
                if (read(0, buffer, sizeof buffer) <= 0) return 0;
                continue;
            }
            if (p) {
                if (!serve_one(p, buffer)) drop(p);
                continue;
            }
            for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
                if (!(p = calloc(1, sizeof *p))) die("calloc");
                p->fd = fd;
                p->poller = poller;
                no_delay(fd);
                watch(p, EPOLLIN);
                if (!serve_one(p, buffer)) drop(p);
            }
        }
    }
}

/* -- the clients ------------------------------------------------------------------------------------------------ */

struct options {
    double seconds, warmup, idle;
    uint64_t bytes, count;
    unsigned connections, size, every_us, up, down;
};

/* One stream's end as its receiver saw it. */
struct outcome {
    struct verdict verdict;
    uint64_t expected;
    uint64_t whole_nanos; /* from before the connection was asked for to its end; 0: not told */
};

static void print_outcome(const struct outcome *o) {
    const struct verdict *v = &o->verdict;
    uint64_t expected = o->expected;
    int right = v->total == expected && v->bad_at == UINT64_MAX;
    double seconds = (double)v->nanos / 1e9;
    printf("{\"total_bytes\": %llu, \"measured_bytes\": %llu, \"seconds\": %.6f, \"mb_per_s\": %.3f, \"right\": %s",
           (unsigned long long)v->total, (unsigned long long)v->measured, seconds,
           v->nanos ? (double)v->measured / 1e6 / seconds : 0.0, right ? "true" : "false");
    if (o->whole_nanos) printf(", \"whole_seconds\": %.6f", (double)o->whole_nanos / 1e9);
    if (v->bad_at != UINT64_MAX) printf(", \"bad_at\": %llu", (unsigned long long)v->bad_at);
    printf("}");
    if (!right) {
        fprintf(stderr, "load: %llu of %llu bytes arrived, the first wrong one at %lld\n", (unsigned long long)v->total,
                (unsigned long long)expected, (long long)v->bad_at);
        exit(1);
    }
}

static void begin(int fd, char command, const struct options *o) {
    struct plan plan = {o->bytes, (uint32_t)(o->seconds * 1000), (uint32_t)(o->warmup * 1000), 0};
    unsigned char head[1 + sizeof plan];
    head[0] = (unsigned char)command;
    memcpy(head + 1, &plan, sizeof plan);
    send_all(fd, head, sizeof head);
}

static struct outcome go_up(const struct sockaddr_in *a, const struct options *o) {
    int fd = dial_blocking(a);
    begin(fd, 'U', o);
    uint64_t sent = 0, stop = now_ns() + (uint64_t)((o->seconds + o->warmup) * 1e9);
    while (sent < o->bytes && now_ns() < stop) {
        uint64_t left = o->bytes - sent;
        ssize_t n = send(fd, pattern + sent % PERIOD, left < CHUNK ? left : CHUNK, MSG_NOSIGNAL);
        if (n < 0) die("send");
        sent += (uint64_t)n;
    }
    uint64_t trailer[2] = {MAGIC, sent};
    send_all(fd, trailer, sizeof trailer);
    struct outcome out = {.expected = sent};
    recv_all(fd, &out.verdict, sizeof out.verdict);
    close(fd);
    return out;
}

static struct outcome go_down(const struct sockaddr_in *a, const struct options *o) {
    unsigned char buffer[TRAILER + CHUNK];
    int fd = dial_blocking(a);
    begin(fd, 'D', o);
    struct account account;
    account_start(&account);
    size_t kept = 0; /* the last 16 bytes so far are always kept back: they may be the trailer */
    for (;;) {
        ssize_t n = recv(fd, buffer + kept, CHUNK, 0);
        if (n < 0) die("recv");
        if (!n) break;
        size_t have = kept + (size_t)n;
        if (have <= TRAILER) {
            kept = have;
            continue;
        }
        account_take(&account, buffer, have - TRAILER, (uint64_t)(o->warmup * 1e9));
        memmove(buffer, buffer + have - TRAILER, TRAILER);
        kept = TRAILER;
    }
    uint64_t trailer[2];
    memcpy(trailer, buffer, sizeof trailer);
    errno = 0;
    if (kept != TRAILER || trailer[0] != MAGIC) die("the stream was cut: it ended without its trailer");
    close(fd);
    return (struct outcome){.verdict = account_close(&account), .expected = trailer[1]};
}

static int run_one_stream(const struct sockaddr_in *a, const struct options *o, int up) {
    uint64_t begun = now_ns();
    struct outcome out = up ? go_up(a, o) : go_down(a, o);
    out.whole_nanos = now_ns() - begun;
    print_outcome(&out);
    printf("\n");
    return 0;
}

static void print_samples(uint64_t from, uint64_t to) {
    double seconds = (double)(to - from) / 1e9;
    qsort(samples, sample_count, sizeof *samples, rising);
    errno = 0;
    if (!sample_count) die("nothing was measured: the warm-up took all the time or all the count");
    printf("{\"count\": %zu, \"seconds\": %.6f, \"per_s\": %.1f, \"p50_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f}",
           sample_count, seconds, (double)sample_count / seconds, quantile_us(0.5), quantile_us(0.99), quantile_us(1));
}

/* Message `number` of a connection differs from its neighbours in time and space: a mix-up of streams is seen. */
static const unsigned char *message(uint64_t connection, uint64_t number) {
    return pattern + (connection * 131071u + number * 257u) % PERIOD;
}

static int run_echo(const struct sockaddr_in *a, const struct options *o) {
    unsigned char back[CHUNK];
    int fd = dial_blocking(a);
    send_all(fd, "E", 1);
    uint64_t start = now_ns(), measure = start + (uint64_t)(o->warmup * 1e9);
    uint64_t stop = measure + (uint64_t)(o->seconds * 1e9), before, after = start, first = 0;
    for (uint64_t i = 0; i < o->count && after < stop; i++) {
        const unsigned char *m = message(0, i);
        before = now_ns();
        send_all(fd, m, o->size);
        recv_all(fd, back, o->size);
        after = now_ns();
        if (memcmp(m, back, o->size)) errno = 0, die("an echo came back changed");
        if (before >= measure) {
            if (!first) first = before;
            sample(after - before);
        }
    }
    print_samples(first, after);
    printf("\n");
    return 0;
}

struct echoer {
    int fd;
    unsigned got;
    uint64_t number, since;
    unsigned char back[1024];
};

static void start_echoer(struct echoer *all, unsigned i, const struct sockaddr_in *a, unsigned size) {
    struct epoll_event e = {.events = EPOLLIN, .data.u32 = i};
    all[i].fd = dial(a, 0);
    if (epoll_ctl(poller, EPOLL_CTL_ADD, all[i].fd, &e)) die("epoll_ctl");
    send_all(all[i].fd, "E", 1);
    send_all(all[i].fd, message(i, 0), size);
}

static int run_many(const struct sockaddr_in *a, const struct options *o) {
    struct echoer *all = calloc(o->connections, sizeof *all);
    errno = 0;
    if (!all || o->size > sizeof all->back) die("too many connections, or messages too large, for `many`");
    if ((poller = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll_create1");
    /* Nothing is timed before each connection has had one echo: where opening is dear, the first would wait for the
     * last. Few are opened at once: frp's relay closes what goes beyond a queue of 128. */
    unsigned opened = 0, waiting = o->connections;
    uint64_t measure = UINT64_MAX, stop = UINT64_MAX, now = now_ns(), first = 0;
    while (opened < o->connections && opened < OPEN_AT_ONCE) start_echoer(all, opened++, a, o->size);
    struct epoll_event ready[256];
    for (uint64_t done = 0; done < o->count && now < stop;) {
        int n = epoll_wait(poller, ready, 256, (int)(STALL_SECONDS * 1000));
        if (n < 0 && errno != EINTR) die("epoll_wait");
        errno = 0;
        if (!n) die("no echo came back any more");
        for (int k = 0; k < n; k++) {
            unsigned i = ready[k].data.u32;
            struct echoer *one = all + i;
            ssize_t got = recv(one->fd, one->back + one->got, o->size - one->got, 0);
            if (got < 0) die("recv");
            errno = 0;
            if (!got) die("a connection ended early");
            if ((one->got += (unsigned)got) < o->size) continue;
            if (memcmp(one->back, message(i, one->number), o->size)) die("an echo came back changed");
            now = now_ns();
            if (waiting) {
                one->got = 0;
                one->number++;
                if (opened < o->connections) start_echoer(all, opened++, a, o->size);
                if (--waiting) continue;
                measure = now + (uint64_t)(o->warmup * 1e9);
                stop = measure + (uint64_t)(o->seconds * 1e9);
                for (unsigned j = 0; j < o->connections; j++) {
                    all[j].since = now_ns();
                    send_all(all[j].fd, message(j, all[j].number), o->size);
                }
                continue;
            }
            done++;
            if (now >= measure) {
                if (!first) first = now; /* the clock starts with this echo, so it is not one of the measured */
                else sample(now - one->since);
            }
            one->got = 0;
            one->number++;
            one->since = now;
            send_all(one->fd, message(i, one->number), o->size);
        }
    }
    print_samples(first, now);
    printf("\n");
    return 0;
}

struct opener {
    int fd, asked;
    uint64_t since;
};

static int run_open(const struct sockaddr_in *a, const struct options *o) {
    struct opener *all = calloc(o->connections, sizeof *all);
    if (!all) die("calloc");
    if ((poller = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll_create1");
    uint64_t start = now_ns(), measure = start + (uint64_t)(o->warmup * 1e9);
    uint64_t stop = measure + (uint64_t)(o->seconds * 1e9), now = start, first = 0, begun = 0;
    unsigned busy = 0;
    for (unsigned i = 0; i < o->connections; i++) all[i].fd = -1;
    struct epoll_event ready[256];
    for (;;) {
        for (unsigned i = 0; i < o->connections && busy < o->connections; i++) {
            if (all[i].fd >= 0 || begun >= o->count || now >= stop) continue;
            begun++, busy++;
            all[i].since = now_ns();
            all[i].asked = 0;
            all[i].fd = dial(a, SOCK_NONBLOCK);
            struct epoll_event e = {.events = EPOLLOUT, .data.u32 = i};
            if (epoll_ctl(poller, EPOLL_CTL_ADD, all[i].fd, &e)) die("epoll_ctl");
        }
        if (!busy) break;
        int n = epoll_wait(poller, ready, 256, (int)(STALL_SECONDS * 1000));
        if (n < 0 && errno != EINTR) die("epoll_wait");
        errno = 0;
        if (!n) die("a connection gave no byte");
        for (int k = 0; k < n; k++) {
            struct opener *one = all + ready[k].data.u32;
            if (!one->asked) {
                one->asked = 1;
                send_all(one->fd, "O", 1);
                struct epoll_event e = {.events = EPOLLIN, .data.u32 = ready[k].data.u32};
                if (epoll_ctl(poller, EPOLL_CTL_MOD, one->fd, &e)) die("epoll_ctl");
                continue;
            }
            char byte;
            ssize_t got = recv(one->fd, &byte, 1, 0);
            if (got < 0 && errno == EAGAIN) continue;
            if (got < 0) die("recv");
            errno = 0;
            if (got != 1 || byte != 'o') die("a connection did not give its byte");
            close(one->fd);
            one->fd = -1;
            busy--;
            now = now_ns();
            if (one->since >= measure) {
                if (!first) first = one->since;
                sample(now - one->since);
            }
        }
    }
    print_samples(first, now);
    printf("\n");
    return 0;
}

/* -- keystrokes beside bulk -------------------------------------------------------------------------------------- */

struct stream {
    pthread_t thread;
    const struct sockaddr_in *address;
    const struct options *options;
    int up;
    struct outcome outcome;
};

static void *move_bulk(void *argument) {
    struct stream *s = argument;
    s->outcome = s->up ? go_up(s->address, s->options) : go_down(s->address, s->options);
    return NULL;
}

/* The keyboard: one message per tick, whether or not the last one is back; a round trip counts from the tick at which
 * the message was due, so that a stall counts for every keystroke that waited in it. */
struct keyboard {
    int fd;
    const struct options *o;
    uint64_t start, every, sent, back; /* ticks */
    unsigned sent_part, back_part;
};

/* Type until `stop`, then wait for all that is still out. Echoes of ticks from `measure` on are samples. */
static void type_until(struct keyboard *k, uint64_t measure, uint64_t stop) {
    unsigned char buffer[CHUNK];
    uint64_t last = now_ns();
    for (;;) {
        uint64_t now = now_ns(), due = k->start + k->sent * k->every;
        if (due >= stop && !k->sent_part && k->back == k->sent) return;
        int may_send = due < stop || k->sent_part;
        if (may_send && due <= now) {
            const unsigned char *m = message(0, k->sent);
            ssize_t n = send(k->fd, m + k->sent_part, k->o->size - k->sent_part, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (n < 0 && errno != EAGAIN) die("send");
            if (n > 0 && (k->sent_part += (unsigned)n) == k->o->size) {
                k->sent_part = 0;
                k->sent++;
                continue;
            }
        }
        struct pollfd p = {k->fd, POLLIN | (may_send && due <= now ? POLLOUT : 0), 0};
        uint64_t wait = may_send && due > now ? due - now : (uint64_t)(STALL_SECONDS * 1e9);
        struct timespec t = {(time_t)(wait / 1000000000ull), (long)(wait % 1000000000ull)};
        if (ppoll(&p, 1, &t, NULL) < 0 && errno != EINTR) die("ppoll");
        now = now_ns();
        errno = 0;
        if (k->back < k->sent && now - last > (uint64_t)(STALL_SECONDS * 1e9)) die("no echo came back any more");
        if (k->back == k->sent) last = now;
        if (!(p.revents & (POLLIN | POLLHUP | POLLERR))) continue;
        ssize_t n = recv(k->fd, buffer, sizeof buffer, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN) continue;
        if (n < 0) die("recv");
        errno = 0;
        if (!n) die("the connection ended early");
        last = now = now_ns();
        for (ssize_t at = 0; at < n;) {
            unsigned size = k->o->size - k->back_part;
            if ((ssize_t)size > n - at) size = (unsigned)(n - at);
            if (memcmp(buffer + at, message(0, k->back) + k->back_part, size)) die("an echo came back changed");
            at += size;
            if ((k->back_part += size) < k->o->size) continue;
            uint64_t typed = k->start + k->back * k->every;
            if (typed >= measure && typed < stop) sample(now - typed);
            k->back_part = 0;
            k->back++;
        }
    }
}

static int run_keys(const struct sockaddr_in *a, const struct options *o) {
    unsigned count = o->up + o->down;
    struct stream *streams = calloc(count + 1, sizeof *streams);
    if (!streams) die("calloc");
    struct keyboard k = {.fd = dial_blocking(a), .o = o, .every = o->every_us * 1000ull};
    send_all(k.fd, "E", 1);
    k.start = now_ns();
    uint64_t warmup = (uint64_t)(o->warmup * 1e9), idle = (uint64_t)(o->idle * 1e9);
    uint64_t measure = k.start + idle / 5, stop = k.start + idle;
    if (idle) {
        type_until(&k, measure, stop);
        printf("{\"idle\": ");
        print_samples(measure, stop);
    } else {
        printf("{\"idle\": null");
    }
    sample_count = 0;
    k.start = now_ns() - k.sent * k.every; /* its next tick is now */
    for (unsigned i = 0; i < count; i++) {
        streams[i] = (struct stream){.address = a, .options = o, .up = i < o->up};
        if ((errno = pthread_create(&streams[i].thread, NULL, move_bulk, streams + i))) die("pthread_create");
    }
    measure = now_ns() + warmup;
    stop = measure + (uint64_t)(o->seconds * 1e9);
    type_until(&k, measure, stop);
    printf(", \"busy\": ");
    print_samples(measure, stop);
    for (int up = 1; up >= 0; up--) {
        printf(", \"%s\": [", up ? "up" : "down");
        for (unsigned i = up ? 0 : o->up; i < (up ? o->up : count); i++) {
            if ((errno = pthread_join(streams[i].thread, NULL))) die("pthread_join");
            if (i != (up ? 0 : o->up)) printf(", ");
            print_outcome(&streams[i].outcome);
        }
        printf("]");
    }
    printf("}\n");
    return 0;
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    make_pattern();
    struct rlimit files;
    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    if (argc == 2 && !strcmp(argv[1], "serve")) return serve();
    if (argc < 4) {
        fprintf(stderr, "usage: load serve | load up|down|echo|many|open|keys ADDRESS PORT [--seconds S] [--warmup S] "
                        "[--bytes N] [--count N] [--connections N] [--size N] [--idle S] [--every-us N] [--up N] "
                        "[--down N]\n");
        return 2;
    }
    struct sockaddr_in a = address_of(argv[2], argv[3]);
    struct options o = {.seconds = 1.0, .warmup = 0.2, .bytes = MAX_BYTES, .count = MAX_COUNT};
    o.connections = 1, o.size = 100, o.every_us = 10000;
    for (int i = 4; i < argc; i += 2) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(name, "--seconds")) o.seconds = number(value, 0.001, MAX_SECONDS);
        else if (!strcmp(name, "--warmup")) o.warmup = number(value, 0, MAX_SECONDS);
        else if (!strcmp(name, "--bytes")) o.bytes = (uint64_t)number(value, 1, (double)MAX_BYTES);
        else if (!strcmp(name, "--count")) o.count = (uint64_t)number(value, 1, (double)MAX_COUNT);
        else if (!strcmp(name, "--connections")) o.connections = (unsigned)number(value, 1, MAX_CONNECTIONS);
        else if (!strcmp(name, "--size")) o.size = (unsigned)number(value, 1, CHUNK);
        else if (!strcmp(name, "--idle")) o.idle = number(value, 0, MAX_SECONDS);
        else if (!strcmp(name, "--every-us")) o.every_us = (unsigned)number(value, 100, 1e6);
        else if (!strcmp(name, "--up")) o.up = (unsigned)number(value, 0, 64);
        else if (!strcmp(name, "--down")) o.down = (unsigned)number(value, 0, 64);
        else errno = 0, die("unknown option");
    }
    if (!strcmp(argv[1], "up")) return run_one_stream(&a, &o, 1);
    if (!strcmp(argv[1], "down")) return run_one_stream(&a, &o, 0);
    if (!strcmp(argv[1], "keys")) return run_keys(&a, &o);
    if (!strcmp(argv[1], "echo")) return run_echo(&a, &o);
    if (!strcmp(argv[1], "many")) return run_many(&a, &o);
    if (!strcmp(argv[1], "open")) return run_open(&a, &o);
    errno = 0;
    die("unknown command");
}
