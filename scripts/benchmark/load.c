/* A closed-loop load generator for HTTP/1.1 on 127.0.0.1, in one epoll thread.
 *
 *     load PORT REQUESTS CONNECTIONS SECONDS COUNT FRESH RAMP_MS
 *
 * REQUESTS is a file of whole requests, each behind a line with its size, sent in turn; "################" in one
 * is replaced by a number that no other request has. Each connection sends its next request when the answer is in,
 * until SECONDS are over or COUNT answers are in (0: no such limit); FRESH 1: each on a new connection. RAMP_MS:
 * the time over which the connections begin. Prints one JSON object: answers, errors, seconds, its own processor time
 * (cpu), and quantiles in us of the answers' times, of the time to the first stamp (see upstream.c) and of each stamp's age when it came in.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD = 8192, DIGITS = 19, MAX_SAMPLES = 1 << 22, RECEIVE = 1 << 18 };
static const char PLACE[] = "################";
static const double GRACE = 30; /* seconds for the last answers to end */

struct request {
    char *bytes, *place;
    size_t size;
};

struct samples {
    uint32_t *ns; /* up to 4.29 s; longer ones count as that */
    size_t used;
};

enum state { IDLE, SENDING, IN_HEAD, BY_LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, TO_EOF };

struct conn {
    int fd, closes, stamps, digits;
    enum state state;
    const struct request *request;
    char *own;             /* the request with its number */
    size_t sent, head_used;
    uint64_t begun, starts, stamp;
    long long left;
    char head[HEAD + 1];
};

static struct sockaddr_in server;
static struct request *requests;
static size_t request_count, next_request;
static struct samples whole, first, ages;
static uint64_t answers, errors, stamps, opened, salt, number;
static uint64_t stop_at, most;
static int fresh, epoll_fd, active;
static char buffer[RECEIVE];

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void note(struct samples *s, uint64_t ns) {
    if (s->used < MAX_SAMPLES) s->ns[s->used++] = ns > UINT32_MAX ? UINT32_MAX : (uint32_t)ns;
}

/* --- one request and its answer --- */

static void open_connection(struct conn *c) {
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0 || connect(c->fd, (void *)&server, sizeof server)) die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event)) die("epoll_ctl");
    opened++;
}

static void close_connection(struct conn *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
}

static void go_on_sending(struct conn *c) {
    const char *bytes = c->own ? c->own : c->request->bytes;
    while (c->sent < c->request->size) {
        ssize_t done = send(c->fd, bytes + c->sent, c->request->size - c->sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (done < 0 && errno != EAGAIN) return; /* the end will be seen by recv() */
        if (done < 0) {
            struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
            epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
            return;
        }
        c->sent += (size_t)done;
    }
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (c->state == SENDING) epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
    c->state = IN_HEAD;
}

static void prepare(struct conn *c) {
    c->request = &requests[next_request++ % request_count];
    free(c->own);
    c->own = NULL;
    if (!c->request->place) return;
    char digits[sizeof PLACE];
    snprintf(digits, sizeof digits, "%08llx%08llx", (unsigned long long)salt & 0xffffffff,
             (unsigned long long)number++ & 0xffffffff);
    c->own = malloc(c->request->size);
    if (!c->own) die("malloc");
    memcpy(c->own, c->request->bytes, c->request->size);
    memcpy(c->own + (c->request->place - c->request->bytes), digits, sizeof PLACE - 1);
}

static void begin(struct conn *c) {
    if (now_ns() >= stop_at || (most && answers + errors + (uint64_t)active >= most)) {
        close_connection(c);
        c->state = IDLE;
        return;
    }
    prepare(c);
    active++;
    c->begun = now_ns();
    if (c->fd < 0) open_connection(c);
    c->sent = c->head_used = 0;
    c->stamps = c->closes = c->digits = 0;
    c->state = IN_HEAD;
    go_on_sending(c);
    if (c->sent < c->request->size) c->state = SENDING;
}

static void end(struct conn *c, int fine) {
    active--;
    if (fine) {
        answers++;
        note(&whole, now_ns() - c->begun);
    } else {
        if (!errors++) fprintf(stderr, "load: first error: %.200s\n", c->head_used ? c->head : "no answer");
    }
    if (!fine || fresh || c->closes) close_connection(c);
    begin(c);
}

/* --- reading --- */

static void stamped(struct conn *c, uint64_t now) {
    if (!c->stamps++) note(&first, now - c->begun);
    stamps++;
    note(&ages, now - c->stamp);
}

/* Look for stamps, which may be cut anywhere. */
static void read_payload(struct conn *c, const char *p, size_t size, uint64_t now) {
    const char *stop = p + size;
    while (p < stop) {
        if (!c->digits) {
            p = memchr(p, '@', (size_t)(stop - p));
            if (!p++) return;
            c->digits = 1, c->stamp = 0;
        }
        for (; p < stop && c->digits && c->digits <= DIGITS; p++) {
            if (*p < '0' || *p > '9') c->digits = -1;
            else c->stamp = c->stamp * 10 + (uint64_t)(*p - '0');
            c->digits++;
        }
        if (c->digits > DIGITS) {
            stamped(c, now);
            c->digits = 0;
        }
    }
}

/* The state behind the head; TRAILER for an answer without a body. */
static enum state read_head(struct conn *c, int *fine) {
    const char *length = strcasestr(c->head, "\r\ncontent-length:");
    c->closes = !!strcasestr(c->head, "\r\nconnection: close");
    *fine = !strncmp(c->head + 8, " 200", 4);
    if (strcasestr(c->head, "\r\ntransfer-encoding: chunked")) return CHUNK_SIZE;
    if (!length) return TO_EOF;
    c->left = atoll(length + 17);
    return BY_LENGTH;
}

static size_t take_head(struct conn *c, const char *p, size_t size, int *failed) {
    size_t before = c->head_used, room = HEAD - before, part = size < room ? size : room;
    memcpy(c->head + before, p, part);
    c->head_used += part;
    c->head[c->head_used] = 0;
    char *stop = memmem(c->head, c->head_used, "\r\n\r\n", 4);
    if (!stop) {
        *failed = c->head_used == HEAD;
        return part;
    }
    int fine;
    stop[2] = 0;
    c->state = read_head(c, &fine);
    *failed = !fine;
    c->left = c->state == CHUNK_SIZE ? 0 : c->left;
    return (size_t)(stop + 4 - c->head) - before;
}

/* One step of the chunked coding; returns the bytes taken. */
static size_t take_chunked(struct conn *c, const char *p, size_t size, uint64_t now, int *done) {
    if (c->state == CHUNK_DATA) {
        size_t part = (long long)size < c->left ? size : (size_t)c->left;
        read_payload(c, p, part, now);
        c->left -= (long long)part;
        if (!c->left) c->state = CHUNK_END;
        return part;
    }
    char byte = *p;
    if (c->state == CHUNK_SIZE) {
        int digit = byte >= '0' && byte <= '9' ? byte - '0' : (byte | 32) >= 'a' && (byte | 32) <= 'f' ? (byte | 32) - 87 : -1;
        if (digit >= 0) c->left = c->left * 16 + digit;
        else if (byte == '\n') c->state = c->left ? CHUNK_DATA : TRAILER;
    } else if (byte == '\n') { /* behind a chunk's data, or the end: nobody here sends trailers */
        *done = c->state == TRAILER;
        c->state = CHUNK_SIZE;
    }
    return 1;
}

static void take(struct conn *c, const char *p, size_t size, uint64_t now) {
    int done = 0, failed = 0;
    while (size && !done && !failed) {
        size_t used = size;
        if (c->state == IN_HEAD) {
            used = take_head(c, p, size, &failed);
            done = c->state == BY_LENGTH && !c->left;
        } else if (c->state == BY_LENGTH) {
            read_payload(c, p, size, now);
            c->left -= (long long)size;
            done = c->left <= 0;
        } else if (c->state == TO_EOF) {
            read_payload(c, p, size, now);
        } else {
            used = take_chunked(c, p, size, now, &done);
        }
        p += used, size -= used;
    }
    if (failed || (done && size)) end(c, 0);
    else if (done) end(c, 1);
}

static void receive(struct conn *c) {
    ssize_t got = recv(c->fd, buffer, sizeof buffer, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (c->state == SENDING) c->state = IN_HEAD; /* an answer before the request's end: a refusal */
    if (got > 0) take(c, buffer, (size_t)got, now_ns());
    else end(c, c->state == TO_EOF && !got);
}

/* --- the run --- */

static void read_requests(const char *path) {
    FILE *file = fopen(path, "rb");
    char line[32];
    if (!file) die(path);
    while (fgets(line, sizeof line, file)) {
        struct request r = {.size = strtoul(line, NULL, 10)};
        r.bytes = malloc(r.size + 1);
        requests = realloc(requests, (request_count + 1) * sizeof *requests);
        if (!r.bytes || !requests || fread(r.bytes, 1, r.size, file) != r.size) die("reading the requests");
        r.place = memmem(r.bytes, r.size, PLACE, sizeof PLACE - 1);
        requests[request_count++] = r;
    }
    fclose(file);
    if (!request_count) die("no requests");
}

static int by_size(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void print_quantiles(const char *name, struct samples *s) {
    double sum = 0;
    printf(", \"%s\": ", name);
    if (!s->used) {
        printf("null");
        return;
    }
    qsort(s->ns, s->used, sizeof *s->ns, by_size);
    for (size_t i = 0; i < s->used; i++) sum += s->ns[i];
#define AT(q) (s->ns[(size_t)((double)(s->used - 1) * (q))] / 1e3)
    printf("{\"n\": %zu, \"mean\": %.3f, \"p50\": %.3f, \"p90\": %.3f, \"p99\": %.3f, \"max\": %.3f}", s->used,
           sum / (double)s->used / 1e3, AT(0.5), AT(0.9), AT(0.99), AT(1));
}

static void run(struct conn *all, int count, uint64_t last) {
    struct epoll_event events[256];
    int waiting = 0;
    while (now_ns() < last && (active || waiting < count)) {
        while (waiting < count && all[waiting].starts <= now_ns()) begin(&all[waiting++]);
        int ready = epoll_wait(epoll_fd, events, 256, waiting < count ? 1 : 1000);
        for (int i = 0; i < ready; i++) {
            struct conn *c = events[i].data.ptr;
            if (events[i].events & EPOLLOUT && c->state == SENDING) go_on_sending(c);
            if (events[i].events & ~(uint32_t)EPOLLOUT && c->state != IDLE) receive(c);
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 8) return 2;
    int count = atoi(argv[3]);
    double ramp = atof(argv[7]);
    struct rlimit files = {16384, 16384};
    setrlimit(RLIMIT_NOFILE, &files);
    server = (struct sockaddr_in){
        .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    read_requests(argv[2]);
    most = strtoull(argv[5], NULL, 10), fresh = atoi(argv[6]);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct samples *kinds[] = {&whole, &first, &ages};
    for (int i = 0; i < 3; i++) kinds[i]->ns = malloc(MAX_SAMPLES * sizeof(uint32_t));
    uint64_t start = now_ns();
    salt = start ^ (uint64_t)getpid() << 20;
    stop_at = start + (uint64_t)(atof(argv[4]) * 1e9);
    struct conn *all = calloc((size_t)count, sizeof *all);
    for (int i = 0; i < count; i++) {
        all[i].fd = -1;
        all[i].starts = start + (uint64_t)(ramp * 1e6 * i / count);
    }
    run(all, count, stop_at + (uint64_t)(GRACE * 1e9));
    double seconds = (double)(now_ns() - start) / 1e9;
    struct timespec cpu;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu);
    printf("{\"answers\": %llu, \"errors\": %llu, \"unfinished\": %d, \"opened\": %llu, \"stamps\": %llu, \"seconds\": %.6f, "
           "\"cpu\": %.6f",
           (unsigned long long)answers, (unsigned long long)errors, active, (unsigned long long)opened,
           (unsigned long long)stamps, seconds, (double)cpu.tv_sec + (double)cpu.tv_nsec / 1e9);
    print_quantiles("whole", &whole);
    print_quantiles("first", &first);
    print_quantiles("ages", &ages);
    printf("}\n");
    return 0;
}
