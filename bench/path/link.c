/*
 * A longer, narrower way between two programs of one machine: a TCP proxy with a round trip, a rate and a queue.
 * One file, no library but libc, Linux.
 *
 *   link ADDRESS PORT --delay-us D [--bits-per-s R] [--queue-bytes Q] [--report-ms M]
 *
 * Prints "PORT n", passes what connects to 127.0.0.1:n on to ADDRESS:PORT, runs until its stdin ends.
 *
 * Each direction is one link for all connections: bytes enter a first-in-first-out queue of Q bytes, leave it at R bits
 * per second (0: at once), and arrive D microseconds (one way) later, never sooner. A full queue loses nothing: the
 * link stops reading, and TCP holds the sender back, so that what a sender meets is a deep buffer without loss. Bytes
 * enter in pieces of a quarter of a millisecond of the link, but at least one packet (1448 bytes) and at most 64 KiB;
 * connections that have bytes take turns. An end passes in order behind the bytes, each direction by itself; a reset
 * passes, too. A new connection costs a round trip before its first byte is taken, as a handshake does. Only payload
 * is counted: there are no headers here.
 *
 * What the kernel hides: the link's sockets announce an MSS of one piece, receive into a small buffer (two milliseconds
 * of the link, at least 16 KiB asked for, which the kernel doubles), send from one with TCP_NOTSENT_LOWAT. Bytes wait
 * in the receive buffer only while the queue is full (measured: 29 KB at 20 Mbit/s, 180 KB at 400), and in the send
 * buffer only while the receiver does not read (40 and 150 KB). A receiver that stops reading stops the link's reading
 * after 1 MiB more; what is queued and on the way still arrives and is held for it. What the sender's own socket holds
 * is the sender's affair, as it is on a real path.
 *
 * With --report-ms one JSON object per M ms goes to stderr: bytes in the queue, on the way, and held back by a slow
 * receiver, for each direction. Only 127.0.0.0/8 is accepted.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define PROGRAM "link"
#include "program.h"

#define PACKET 1448u
#define LARGEST (64u * 1024u)
#define MOST_SEGMENT 32000u /* TCP_MAXSEG takes no more than 32767 */
#define PIECE_NS 250000ull
#define LEAST_BUFFER (16u * 1024u)
#define MOST_ON_THE_WAY (512ull * 1024 * 1024) /* per direction: an unshaped way holds rate x delay */
#define MOST_HELD (1024ull * 1024)             /* per connection and direction: what its receiver has not taken */

enum { UP, DOWN };
enum kind { DATA, END, RESET, DIAL };

struct piece {
    struct piece *next;
    struct flow *flow;
    uint64_t due; /* when it has arrived */
    uint32_t size, from;
    enum kind kind;
    unsigned char data[];
};

struct list {
    struct piece *head, **tail;
};

/* One direction of one connection. */
struct flow {
    struct connection *connection;
    struct flow *next; /* in the ring of those that may have bytes */
    int direction, in_ring, started, finished /* no more is read */, ended /* the end was passed on */;
    struct list arrived; /* what the receiver's socket did not take yet */
    uint64_t held;       /* bytes of it */
};

struct end {
    struct connection *connection;
    int fd, readable, writable, side;
};

struct connection {
    struct connection *next_start, *next_dead;
    uint64_t start_at; /* 0: it has started */
    struct end end[2];   /* near, far; flow[UP] reads the near one and writes the far one */
    struct flow flow[2]; /* UP, DOWN */
    unsigned pieces;     /* that name it and are still on the way */
    int dead;
};

struct direction {
    struct list on_the_way; /* in order of arrival */
    uint64_t bytes;         /* of it */
    uint64_t free_at;       /* when the link has sent all that it has */
    struct flow *ring, **ring_tail;
};

static struct direction directions[2];
static struct connection *starts, **starts_tail = &starts, *dead;
static uint64_t delay_ns, queue_bytes, report_ns;
static double ns_per_byte;
static uint32_t piece_bytes = LARGEST;
static int poller, buffer_bytes;
static struct sockaddr_in far_address;
static int64_t held_in_all[2];

static void set(int fd, int level, int option, int value) {
    if (setsockopt(fd, level, option, &value, sizeof value)) die("setsockopt");
}

static void shape_socket(int fd) {
    set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set(fd, IPPROTO_TCP, TCP_MAXSEG, (int)(piece_bytes < MOST_SEGMENT ? piece_bytes : MOST_SEGMENT));
    set(fd, SOL_SOCKET, SO_RCVBUF, buffer_bytes);
    set(fd, SOL_SOCKET, SO_SNDBUF, buffer_bytes * 2);
    set(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, buffer_bytes);
}

static void append(struct list *list, struct piece *piece) {
    piece->next = NULL;
    *list->tail = piece;
    list->tail = &piece->next;
}

static struct piece *take(struct list *list) {
    struct piece *piece = list->head;
    if (!(list->head = piece->next)) list->tail = &list->head;
    return piece;
}

static void into_ring(struct flow *flow) {
    struct direction *d = directions + flow->direction;
    if (flow->in_ring || flow->finished || !flow->started || flow->connection->dead) return;
    flow->in_ring = 1;
    flow->next = NULL;
    *d->ring_tail = flow;
    d->ring_tail = &flow->next;
}

static struct flow *out_of_ring(struct direction *d) {
    struct flow *flow = d->ring;
    if (!(d->ring = flow->next)) d->ring_tail = &d->ring;
    flow->in_ring = 0;
    return flow;
}

/* Bytes that wait for the link at `now`. */
static uint64_t queued(const struct direction *d, uint64_t now) {
    return d->free_at > now && ns_per_byte > 0 ? (uint64_t)((double)(d->free_at - now) / ns_per_byte) : 0;
}

/* When the queue takes another piece; 0: now. */
static uint64_t room_at(const struct direction *d, uint64_t now) {
    if (ns_per_byte <= 0) return d->bytes < MOST_ON_THE_WAY ? 0 : now + 1000000;
    if (queued(d, now) + piece_bytes <= queue_bytes) return 0;
    return d->free_at - (uint64_t)((double)(queue_bytes - piece_bytes) * ns_per_byte);
}

static void enqueue(struct flow *flow, enum kind kind, const void *data, uint32_t size, uint64_t now) {
    struct direction *d = directions + flow->direction;
    struct piece *piece = malloc(sizeof *piece + size);
    if (!piece) die("malloc");
    if (size) memcpy(piece->data, data, size);
    if (d->free_at < now) d->free_at = now;
    d->free_at += (uint64_t)((double)size * ns_per_byte + 0.999);
    piece->flow = flow, piece->kind = kind, piece->size = size, piece->from = 0;
    piece->due = d->free_at + delay_ns;
    flow->connection->pieces++;
    d->bytes += size;
    append(&d->on_the_way, piece);
}

static void finish(struct connection *c, int with_reset) {
    if (c->dead) return;
    c->dead = 1;
    c->next_dead = dead;
    dead = c;
    for (int i = 0; i < 2; i++) {
        struct flow *flow = c->flow + i;
        held_in_all[i] -= (int64_t)flow->held;
        while (flow->arrived.head) free(take(&flow->arrived));
        if (c->end[i].fd < 0) continue;
        struct linger now = {1, 0};
        if (with_reset) setsockopt(c->end[i].fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
        close(c->end[i].fd);
    }
}

static void watch(struct end *end) {
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = end};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, end->fd, &e)) die("epoll_ctl");
}

static void dial(struct connection *c) {
    struct end *far = &c->end[1];
    far->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (far->fd < 0) die("socket");
    shape_socket(far->fd);
    if (connect(far->fd, (struct sockaddr *)&far_address, sizeof far_address) && errno != EINPROGRESS) {
        finish(c, 1);
        return;
    }
    c->flow[DOWN].started = 1;
    watch(far);
}

/* Hand to the receiver what has arrived. */
static void flush(struct flow *flow) {
    struct connection *c = flow->connection;
    struct end *to = &c->end[flow->direction == UP ? 1 : 0];
    int was_full = flow->held >= MOST_HELD;
    while (!c->dead && flow->arrived.head) {
        struct piece *piece = flow->arrived.head;
        if (piece->kind == DATA) {
            if (!to->writable) break;
            ssize_t n = send(to->fd, piece->data + piece->from, piece->size - piece->from, MSG_NOSIGNAL);
            if (n < 0) { /* full; or broken, which reading from it tells, too */
                to->writable = 0;
                if (errno != EAGAIN) into_ring(&c->flow[!flow->direction]);
                break;
            }
            piece->from += (uint32_t)n;
            flow->held -= (uint64_t)n, held_in_all[flow->direction] -= n;
            if (piece->from < piece->size) continue;
        } else if (piece->kind == END) {
            if (!to->writable) break; /* not connected yet */
            shutdown(to->fd, SHUT_WR);
            flow->ended = 1;
        }
        free(take(&flow->arrived));
    }
    if (!c->dead && c->flow[UP].ended && c->flow[DOWN].ended) finish(c, 0);
    if (was_full && flow->held < MOST_HELD) into_ring(flow);
}

/* Take one piece from the sender of `flow`; 0: it has nothing now. */
static int read_one(struct flow *flow, uint64_t now) {
    static unsigned char buffer[LARGEST];
    struct connection *c = flow->connection;
    struct end *from = &c->end[flow->direction == UP ? 0 : 1];
    if (c->dead || flow->finished || flow->held >= MOST_HELD || !from->readable) return 0;
    ssize_t n = recv(from->fd, buffer, piece_bytes, 0);
    if (n > 0) {
        enqueue(flow, DATA, buffer, (uint32_t)n, now);
        return 1;
    }
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        from->readable = 0;
        return 0;
    }
    flow->finished = 1;
    enqueue(flow, n ? RESET : END, NULL, 0, now);
    return 0;
}

static void pump(uint64_t now) {
    for (int i = 0; i < 2; i++) {
        struct direction *d = directions + i;
        while (d->ring && !room_at(d, now)) {
            struct flow *flow = out_of_ring(d);
            if (read_one(flow, now)) into_ring(flow);
        }
        while (d->on_the_way.head && d->on_the_way.head->due <= now) {
            struct piece *piece = take(&d->on_the_way);
            struct flow *flow = piece->flow;
            struct connection *c = flow->connection;
            enum kind kind = piece->kind;
            c->pieces--;
            d->bytes -= piece->size;
            if (c->dead || kind == RESET || kind == DIAL) {
                free(piece);
                if (!c->dead && kind == RESET) finish(c, 1);
                if (!c->dead && kind == DIAL) dial(c);
            } else {
                flow->held += piece->size, held_in_all[i] += piece->size;
                append(&flow->arrived, piece);
                flush(flow);
            }
        }
    }
}

/* Free what is over, but for what a ring, a piece on the way or the list of starts still names. */
static void bury(void) {
    for (struct connection **at = &dead; *at;) {
        struct connection *c = *at;
        if (c->pieces || c->flow[UP].in_ring || c->flow[DOWN].in_ring || c->start_at) {
            at = &c->next_dead;
            continue;
        }
        *at = c->next_dead;
        free(c);
    }
}

static void accept_all(int listener, uint64_t now) {
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
        struct connection *c = calloc(1, sizeof *c);
        if (!c) die("calloc");
        shape_socket(fd);
        for (int i = 0; i < 2; i++) {
            c->end[i] = (struct end){c, -1, 0, 0, i};
            c->flow[i].connection = c;
            c->flow[i].direction = i;
            c->flow[i].arrived.tail = &c->flow[i].arrived.head;
        }
        c->end[0].fd = fd;
        c->start_at = now + 2 * delay_ns;
        *starts_tail = c;
        starts_tail = &c->next_start;
        watch(&c->end[0]);
    }
}

static void start_due(uint64_t now) {
    while (starts && starts->start_at <= now) {
        struct connection *c = starts;
        if (!(starts = c->next_start)) starts_tail = &starts;
        c->start_at = 0;
        c->flow[UP].started = 1;
        enqueue(&c->flow[UP], DIAL, NULL, 0, now);
        into_ring(&c->flow[UP]);
    }
}

static void happened(struct end *end, uint32_t events) {
    struct connection *c = end->connection;
    if (c->dead) return;
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
        end->readable = 1;
        into_ring(&c->flow[end->side == 0 ? UP : DOWN]);
    }
    if (events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) {
        end->writable = 1;
        flush(&c->flow[end->side == 0 ? DOWN : UP]);
    }
}

static void report(uint64_t now) {
    fprintf(stderr, "{\"ms\": %.1f", (double)now / 1e6);
    for (int i = 0; i < 2; i++) {
        uint64_t waiting = queued(directions + i, now);
        fprintf(stderr, ", \"%s\": {\"queued\": %llu, \"on_the_way\": %llu, \"held\": %lld}", i ? "down" : "up",
                (unsigned long long)waiting, (unsigned long long)(directions[i].bytes - waiting),
                (long long)held_in_all[i]);
    }
    fprintf(stderr, "}\n");
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
    struct rlimit files;
    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    if (argc < 3) {
        fprintf(stderr, "usage: link ADDRESS PORT [--delay-us D] [--bits-per-s R] [--queue-bytes Q] [--report-ms M]\n");
        return 2;
    }
    far_address.sin_family = AF_INET;
    far_address.sin_port = htons((uint16_t)number(argv[2], 1, 65535));
    errno = 0;
    if (inet_pton(AF_INET, argv[1], &far_address.sin_addr) != 1 || ntohl(far_address.sin_addr.s_addr) >> 24 != 127)
        die("only addresses of 127.0.0.0/8 are accepted: this program stays on its own machine");
    double bits_per_s = 0;
    for (int i = 3; i < argc; i += 2) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(name, "--delay-us")) delay_ns = (uint64_t)(number(value, 0, 10e6) * 1e3);
        else if (!strcmp(name, "--bits-per-s")) bits_per_s = number(value, 0, 1e11);
        else if (!strcmp(name, "--queue-bytes")) queue_bytes = (uint64_t)number(value, 0, 1e9);
        else if (!strcmp(name, "--report-ms")) report_ns = (uint64_t)(number(value, 0, 1e6) * 1e6);
        else errno = 0, die("unknown option");
    }
    if (bits_per_s > 0) {
        ns_per_byte = 8e9 / bits_per_s;
        double piece = (double)PIECE_NS / ns_per_byte;
        piece_bytes = piece < PACKET ? PACKET : piece > LARGEST ? LARGEST : (uint32_t)piece;
        if (!queue_bytes) { /* two round trips, so that no sender starves the link for want of a place to wait */
            queue_bytes = (uint64_t)(4 * (double)delay_ns / ns_per_byte);
            if (queue_bytes < 4u << 20) queue_bytes = 4u << 20;
        }
        if (queue_bytes < 2 * piece_bytes) errno = 0, die("a queue must hold two pieces of the link at least");
    }
    /* Enough that a scheduler which is late by two milliseconds does not empty the link. */
    double wanted = ns_per_byte > 0 ? 2e6 / ns_per_byte : 2.0 * LARGEST;
    buffer_bytes = (int)(wanted < 2.0 * piece_bytes ? 2.0 * piece_bytes : wanted);
    if (buffer_bytes < (int)LEAST_BUFFER) buffer_bytes = LEAST_BUFFER;
    for (int i = 0; i < 2; i++) {
        directions[i].on_the_way.tail = &directions[i].on_the_way.head;
        directions[i].ring_tail = &directions[i].ring;
    }

    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof a;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listener < 0) die("socket");
    shape_socket(listener); /* what is accepted has its buffers and its MSS from the handshake on */
    if (bind(listener, (struct sockaddr *)&a, size) || listen(listener, 4096)) die("listen");
    if (getsockname(listener, (struct sockaddr *)&a, &size)) die("getsockname");
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (timer < 0 || (poller = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll_create1");
    static char is_listener, is_timer, is_stdin;
    struct epoll_event e[3] = {{EPOLLIN, {.ptr = &is_listener}}, {EPOLLIN, {.ptr = &is_timer}},
                               {EPOLLIN, {.ptr = &is_stdin}}};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, e) || epoll_ctl(poller, EPOLL_CTL_ADD, timer, e + 1) ||
        epoll_ctl(poller, EPOLL_CTL_ADD, 0, e + 2))
        die("epoll_ctl");
    printf("PORT %u\n", ntohs(a.sin_port));
    fflush(stdout);

    struct epoll_event ready[256];
    uint64_t armed = 0, now = now_ns(), report_at = now + report_ns;
    for (;;) {
        uint64_t wake = starts ? starts->start_at : UINT64_MAX;
        for (int i = 0; i < 2; i++) {
            struct direction *d = directions + i;
            if (d->on_the_way.head && d->on_the_way.head->due < wake) wake = d->on_the_way.head->due;
            if (d->ring) {
                uint64_t room = room_at(d, now);
                if (room < wake) wake = room;
            }
        }
        if (report_ns && report_at < wake) wake = report_at;
        if (wake > now && wake != armed) {
            uint64_t at = wake == UINT64_MAX ? 0 : wake; /* 0 disarms */
            struct itimerspec when = {.it_value = {(time_t)(at / 1000000000ull), (long)(at % 1000000000ull)}};
            if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL)) die("timerfd_settime");
            armed = wake;
        }
        int count = epoll_wait(poller, ready, 256, wake > now ? -1 : 0);
        if (count < 0 && errno != EINTR) die("epoll_wait");
        now = now_ns();
        for (int i = 0; i < count; i++) {
            void *what = ready[i].data.ptr;
            if (what == &is_listener) {
                accept_all(listener, now);
            } else if (what == &is_timer) {
                uint64_t times;
                if (read(timer, &times, sizeof times) == sizeof times) armed = 0;
            } else if (what == &is_stdin) { /* the program that started this one is gone, or has had enough */
                char byte;
                if (read(0, &byte, 1) <= 0) return 0;
            } else {
                happened(what, ready[i].events);
            }
        }
        start_due(now);
        pump(now);
        bury();
        if (report_ns && now >= report_at) {
            report(now);
            report_at += report_ns;
        }
    }
}
