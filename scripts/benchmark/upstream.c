/* A model server without a model: the other end of the benchmark, in one epoll thread.
 *
 *     upstream            prints "PORT" of 127.0.0.1 and serves until its stdin ends
 *
 * It speaks enough of OpenAI's API (/v1/...) and of Ollama's (/api/...) to be proxied. What it answers is said by
 * the model's name, KIND-GAP-COUNT: COUNT chunks, GAP microseconds apart (0: as fast as the reader takes them, one
 * send() each, as servers do it). KIND is text, tools (one tool call) or fail (a 404). Each text chunk carries the
 * time at which it was made, "@" and 19 digits of CLOCK_MONOTONIC in ns: whoever reads it knows how long it took.
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
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FDS = 16384, MAX_REQUEST = 1 << 20, ROOM = 4096, TURN = 256, ANSWER_CHARS = 1200 };

struct conn {
    char *in;              /* the request as far as it is in */
    size_t in_used;
    char out[ROOM * 2];    /* what send() did not take */
    size_t out_used;
    char model[64];
    int is_open, ollama, usage, streaming;
    long gap_us, left, count;
    uint64_t due;          /* ns; when the next chunk is to be sent */
    size_t heap_at;        /* place in the heap + 1; 0: not in it */
};

static struct conn *conns[MAX_FDS];
static int heap[MAX_FDS];  /* descriptors by due time */
static size_t heap_size;
static int epoll_fd, timer_fd;
static char scratch[1 << 16];

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

/* --- the heap of streams that wait for their next chunk --- */

static void place(size_t at, int fd) {
    heap[at] = fd;
    conns[fd]->heap_at = at + 1;
}

static void sift_up(size_t at) {
    int fd = heap[at];
    while (at && conns[heap[(at - 1) / 2]]->due > conns[fd]->due) {
        place(at, heap[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    place(at, fd);
}

static void sift_down(size_t at) {
    int fd = heap[at];
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= heap_size) break;
        if (child + 1 < heap_size && conns[heap[child + 1]]->due < conns[heap[child]]->due) child++;
        if (conns[heap[child]]->due >= conns[fd]->due) break;
        place(at, heap[child]);
        at = child;
    }
    place(at, fd);
}

static void wait_until_due(int fd) {
    heap[heap_size++] = fd;
    sift_up(heap_size - 1);
}

static void forget_due(int fd) {
    size_t at = conns[fd]->heap_at;
    if (!at--) return;
    conns[fd]->heap_at = 0;
    int last = heap[--heap_size];
    if (last == fd) return;
    place(at, last);
    sift_up(at);
    sift_down(conns[last]->heap_at - 1);
}

static void arm_timer(void) {
    static uint64_t armed;
    uint64_t due = heap_size ? conns[heap[0]]->due : 0;
    if (due == armed) return;
    armed = due;
    struct itimerspec when = {{0, 0}, {(time_t)(due / 1000000000u), (long)(due % 1000000000u)}};
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

/* --- sending --- */

static void drop(int fd) {
    struct conn *c = conns[fd];
    forget_due(fd);
    char *in = c->in; /* is kept for the next connection with this descriptor: a new one is measured, not malloc() */
    memset(c, 0, sizeof *c);
    c->in = in;
    close(fd);
}

static void watch(int fd, uint32_t events) {
    struct epoll_event event = {.events = events, .data.fd = fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, fd, &event);
}

/* Send, or keep what does not go; 0 once the connection has failed. */
static int put(int fd, const char *data, size_t size) {
    struct conn *c = conns[fd];
    ssize_t sent = c->out_used ? 0 : send(fd, data, size, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN) return 0;
        sent = 0;
    }
    if ((size_t)sent == size) return 1;
    if (c->out_used + size - (size_t)sent > sizeof c->out) return 0;
    memcpy(c->out + c->out_used, data + sent, size - (size_t)sent);
    c->out_used += size - (size_t)sent;
    watch(fd, EPOLLIN | EPOLLOUT);
    return 1;
}

static int put_chunk(int fd, const char *text) {
    size_t size = strlen(text);
    int used = snprintf(scratch, sizeof scratch, "%zx\r\n%s\r\n", size, text);
    return put(fd, scratch, (size_t)used);
}

static int put_document(int fd, int status, const char *body) {
    int used = snprintf(scratch, sizeof scratch,
                        "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", status,
                        status == 200 ? "OK" : "Not Found", strlen(body), body);
    return put(fd, scratch, (size_t)used);
}

static const char *OPENAI_CHUNK =
    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"%s\","
    "\"choices\":[{\"index\":0,\"delta\":%s,\"finish_reason\":%s}]}\n\n";
static const char *OLLAMA_LINE =
    "{\"model\":\"%s\",\"created_at\":\"2026-01-01T00:00:00.000000Z\",\"message\":{\"role\":\"assistant\","
    "\"content\":\"%s\"%s},\"done\":false}\n";
static const char *OPENAI_CALL =
    "[{\"index\":0,\"id\":\"call_1\",\"type\":\"function\",\"function\":{\"name\":\"weather\","
    "\"arguments\":\"{\\\"city\\\":\\\"Oslo\\\"}\"}}]";
static const char *OLLAMA_CALL =
    ",\"tool_calls\":[{\"function\":{\"name\":\"weather\",\"arguments\":{\"city\":\"Oslo\"}}}]";

static int calls_tools(const struct conn *c) { return !strncmp(c->model, "tools", 5); }

static int send_next_chunk(int fd) {
    struct conn *c = conns[fd];
    char stamp[32], part[512], text[ROOM];
    snprintf(stamp, sizeof stamp, "@%019llu ", (unsigned long long)now_ns());
    if (c->ollama) {
        snprintf(text, sizeof text, OLLAMA_LINE, c->model, stamp, calls_tools(c) ? OLLAMA_CALL : "");
    } else {
        snprintf(part, sizeof part, "{\"content\":\"%s\"%s%s}", stamp, calls_tools(c) ? ",\"tool_calls\":" : "",
                 calls_tools(c) ? OPENAI_CALL : "");
        snprintf(text, sizeof text, OPENAI_CHUNK, c->model, part, "null");
    }
    c->left--;
    return put_chunk(fd, text);
}

static int send_end(int fd) {
    struct conn *c = conns[fd];
    char text[ROOM], chunk[1024], usage[512] = "";
    const char *reason = calls_tools(c) ? "\"tool_calls\"" : "\"stop\"";
    c->streaming = 0;
    if (c->ollama) {
        snprintf(text, sizeof text,
                 "{\"model\":\"%s\",\"created_at\":\"2026-01-01T00:00:00.000000Z\",\"message\":{\"role\":\"assistant\","
                 "\"content\":\"\"},\"done\":true,\"done_reason\":\"stop\",\"total_duration\":9000,"
                 "\"load_duration\":1000,\"prompt_eval_count\":400,\"prompt_eval_duration\":1000,\"eval_count\":%ld,"
                 "\"eval_duration\":1000}\n",
                 c->model, c->count);
    } else {
        if (c->usage)
            snprintf(usage, sizeof usage,
                     "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
                     "\"model\":\"%s\",\"choices\":[],\"usage\":{\"prompt_tokens\":400,\"completion_tokens\":%ld,"
                     "\"total_tokens\":%ld}}\n\n",
                     c->model, c->count, 400 + c->count);
        snprintf(chunk, sizeof chunk, OPENAI_CHUNK, c->model, "{}", reason);
        snprintf(text, sizeof text, "%s%sdata: [DONE]\n\n", chunk, usage);
    }
    return put_chunk(fd, text) && put(fd, "0\r\n\r\n", 5);
}

/* Send what is due; 0 once the connection has failed. */
static int go_on(int fd) {
    struct conn *c = conns[fd];
    for (int turn = 0; c->left; turn++) {
        if (c->out_used) return 1; /* EPOLLOUT comes back here */
        if (c->gap_us && now_ns() < c->due) {
            wait_until_due(fd);
            return 1;
        }
        if (turn == TURN) { /* the others have their turn */
            watch(fd, EPOLLIN | EPOLLOUT);
            return 1;
        }
        if (!send_next_chunk(fd)) return 0;
        c->due += (uint64_t)c->gap_us * 1000;
    }
    return send_end(fd);
}

/* --- requests --- */

static int begin_stream(int fd) {
    struct conn *c = conns[fd];
    char role[ROOM];
    const char *kind = c->ollama ? "application/x-ndjson" : "text/event-stream";
    int used = snprintf(scratch, sizeof scratch,
                        "HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n", kind);
    if (!put(fd, scratch, (size_t)used)) return 0;
    if (!c->ollama) {
        snprintf(role, sizeof role, OPENAI_CHUNK, c->model, "{\"role\":\"assistant\",\"content\":\"\"}", "null");
        if (!put_chunk(fd, role)) return 0;
    }
    c->streaming = 1;
    c->due = now_ns();
    return go_on(fd);
}

static int answer_whole(int fd) {
    struct conn *c = conns[fd];
    char body[ROOM], text[ANSWER_CHARS + 1];
    memset(text, 'x', ANSWER_CHARS);
    text[ANSWER_CHARS] = 0;
    snprintf(body, sizeof body,
             "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"%s\","
             "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"%s\"%s%s},"
             "\"finish_reason\":\"%s\"}],\"usage\":{\"prompt_tokens\":400,\"completion_tokens\":240,"
             "\"total_tokens\":640}}",
             c->model, text, calls_tools(c) ? ",\"tool_calls\":" : "", calls_tools(c) ? OPENAI_CALL : "",
             calls_tools(c) ? "tool_calls" : "stop");
    return put_document(fd, 200, body);
}

static int says(const char *body, size_t size, const char *member, const char *value) {
    const char *at = memmem(body, size, member, strlen(member));
    if (!at) return 0;
    at += strlen(member);
    size_t left = size - (size_t)(at - body);
    while (left && (*at == ':' || *at == ' ')) at++, left--;
    return left >= strlen(value) && !strncmp(at, value, strlen(value));
}

static void read_model(struct conn *c, const char *body, size_t size) {
    const char *at = memmem(body, size, "\"model\"", 7);
    char kind[16];
    c->model[0] = 0;
    c->gap_us = 0, c->count = 1;
    if (!at || sscanf(at, "\"model\" : \"%60[^\"]\"", c->model) != 1)
        if (!at || sscanf(at, "\"model\":\"%60[^\"]\"", c->model) != 1) return;
    sscanf(c->model, "%15[a-z]-%ld-%ld", kind, &c->gap_us, &c->count);
    c->left = c->count;
}

static int answer(int fd, const char *head, const char *body, size_t size) {
    struct conn *c = conns[fd];
    c->ollama = !!strstr(head, " /api/");
    if (!strncmp(head, "GET", 3) || strstr(head, " /api/show"))
        return put_document(fd, 200, c->ollama ? "{\"models\":[]}" : "{\"object\":\"list\",\"data\":[]}");
    read_model(c, body, size);
    if (!strncmp(c->model, "fail", 4)) return put_document(fd, 404, "{\"error\":{\"message\":\"model not found\"}}");
    c->usage = says(body, size, "\"include_usage\"", "true");
    if (c->ollama || says(body, size, "\"stream\"", "true")) return begin_stream(fd);
    return answer_whole(fd);
}

/* Answer the request if it is all in; 0 once the connection has failed. */
static int serve(int fd) {
    struct conn *c = conns[fd];
    c->in[c->in_used] = 0;
    char *end = memmem(c->in, c->in_used, "\r\n\r\n", 4);
    if (!end) return c->in_used < MAX_REQUEST;
    *end = 0; /* the head alone is searched as text */
    char *length = strcasestr(c->in, "\r\ncontent-length:");
    size_t size = length ? strtoul(length + 17, NULL, 10) : 0;
    char *body = end + 4;
    if (c->in_used - (size_t)(body - c->in) < size) {
        *end = '\r';
        return (size_t)(body - c->in) + size <= MAX_REQUEST;
    }
    int fine = answer(fd, c->in, body, size);
    c->in_used = 0; /* nobody here sends ahead */
    return fine;
}

static int receive(int fd) {
    struct conn *c = conns[fd];
    ssize_t got = recv(fd, c->in + c->in_used, MAX_REQUEST - c->in_used, 0);
    if (got <= 0) return got < 0 && errno == EAGAIN;
    c->in_used += (size_t)got;
    return serve(fd);
}

static int flush(int fd) {
    struct conn *c = conns[fd];
    size_t used = c->out_used;
    ssize_t sent = used ? send(fd, c->out, used, MSG_NOSIGNAL) : 0;
    if (sent < 0) return errno == EAGAIN;
    memmove(c->out, c->out + sent, used - (size_t)sent);
    c->out_used -= (size_t)sent;
    if (c->out_used) return 1;
    watch(fd, EPOLLIN);
    return c->streaming ? go_on(fd) : 1;
}

static void take_in(int listener) {
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), on = 1;
    if (fd < 0) return;
    if (fd >= MAX_FDS) {
        close(fd);
        return;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (!conns[fd] && (!(conns[fd] = calloc(1, sizeof **conns)) || !(conns[fd]->in = malloc(MAX_REQUEST + 1))))
        die("malloc");
    conns[fd]->is_open = 1;
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

static void send_what_is_due(void) {
    uint64_t expired;
    if (read(timer_fd, &expired, sizeof expired) < 0 && errno != EAGAIN) die("timer");
    while (heap_size && conns[heap[0]]->due <= now_ns()) {
        int fd = heap[0];
        forget_due(fd);
        if (!go_on(fd)) drop(fd);
    }
}

static int listen_somewhere(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    if (fd < 0 || bind(fd, (void *)&address, size) || listen(fd, 4096)) die("listen");
    getsockname(fd, (void *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

static void add(int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event)) die("epoll_ctl");
}

static void stir(int fd, uint32_t events) {
    int fine = 1;
    if (events & EPOLLOUT) fine = flush(fd);
    if (fine && events & (EPOLLIN | EPOLLHUP | EPOLLERR)) fine = receive(fd);
    if (!fine) drop(fd);
}

int main(void) {
    struct rlimit files = {MAX_FDS, MAX_FDS};
    setrlimit(RLIMIT_NOFILE, &files); /* if it is refused, the scenario with 1,000 streams says so */
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    int listener = listen_somewhere();
    add(listener), add(timer_fd), add(0);
    for (;;) {
        struct epoll_event events[256];
        int count = epoll_wait(epoll_fd, events, 256, -1);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == 0) return 0; /* whoever started us has gone */
            if (fd == listener) take_in(listener);
            else if (fd == timer_fd) send_what_is_due();
            else if (conns[fd] && conns[fd]->is_open) stir(fd, events[i].events);
        }
        arm_timer();
    }
}
