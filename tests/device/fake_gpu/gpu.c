#define _GNU_SOURCE
#include "gpu.h"
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#define MAX 4096
#define MEMORY (256u << 20)

struct range {
    uint64_t address;
    size_t size;
    char *bytes;
    int fd, imports; /* 0 imports: allocated here */
};
struct copy {
    struct copy *next;
    char *from, *to;
    size_t size;
    int value; /* with from == NULL: a memset */
};
struct handle {
    uint32_t magic;
    int32_t pid, fd;
    uint64_t address, size;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct range ranges[MAX], pins[MAX];
static struct copy *first, **last = &first;
static uint64_t queued, done, next_address = 0xd0000000000;
static size_t used;
static int things, held, pinned_copies, plain_copies, lost;
static struct { char name[64]; int code, after; } faults[16];

static struct range *find(struct range *table, uint64_t address) {
    for (int i = 0; i < MAX; i++)
        if (table[i].size && address >= table[i].address && address < table[i].address + table[i].size) return table + i;
    return NULL;
}

static struct range *enter(struct range *table, uint64_t address, size_t size) {
    for (int i = 0; i < MAX; i++)
        if (!table[i].size) {
            table[i] = (struct range){address, size, NULL, -1, 0};
            return table + i;
        }
    abort();
}

static struct range *map(int fd, size_t size) {
    char *bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (bytes == MAP_FAILED) return NULL;
    struct range *made = enter(ranges, next_address, size);
    made->bytes = bytes, made->fd = fd;
    next_address += (size + (2u << 20)) & ~((2ull << 20) - 1);
    return made;
}

static void drop(struct range *range) {
    munmap(range->bytes, range->size);
    close(range->fd);
    range->size = 0;
}

#define LOCKED(...)                          \
    pthread_mutex_lock(&lock);               \
    int result = lost ? GPU_LOST : GPU_OK;   \
    if (!result) do __VA_ARGS__ while (0);   \
    pthread_mutex_unlock(&lock);             \
    return result

int gpu_alloc(uint64_t *address, size_t size) {
    LOCKED({
        size = (size + PAGE - 1) & ~(size_t)(PAGE - 1);
        int fd = size && used + size <= MEMORY ? memfd_create("fake-gpu", MFD_CLOEXEC) : -1;
        struct range *made = fd >= 0 && !ftruncate(fd, size) ? map(fd, size) : NULL;
        if (!made) { result = GPU_NO_MEMORY; break; }
        memset(made->bytes, 0xa5, size); /* what an earlier user left */
        used += size, *address = made->address;
    });
}

int gpu_free(uint64_t address) {
    pthread_mutex_lock(&lock);
    struct range *range = find(ranges, address);
    int result = range && range->address == address && !range->imports ? GPU_OK : GPU_INVALID;
    if (!result) used -= range->size, drop(range);
    pthread_mutex_unlock(&lock);
    return result;
}

int gpu_range(uint64_t address, uint64_t *base, size_t *size) {
    LOCKED({
        struct range *range = find(ranges, address);
        if (!range) { result = GPU_INVALID; break; }
        if (base) *base = range->address;
        if (size) *size = range->size;
    });
}

int gpu_export(uint64_t address, void *handle) {
    LOCKED({
        struct range *range = find(ranges, address);
        if (!range || range->imports) { result = GPU_INVALID; break; }
        struct handle made = {0xfa4e, getpid(), range->fd, range->address, range->size};
        memset(handle, 0, 64), memcpy(handle, &made, sizeof made);
    });
}

int gpu_import(uint64_t *address, const void *handle) {
    struct handle given;
    memcpy(&given, handle, sizeof given);
    LOCKED({
        if (given.magic != 0xfa4e || !given.size) { result = GPU_NO_HANDLE; break; }
        if (given.pid == getpid()) { result = GPU_OWN_HANDLE; break; }
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/fd/%d", given.pid, given.fd);
        int fd = open(path, O_RDWR | O_CLOEXEC);
        struct range *made = fd >= 0 ? map(fd, given.size) : NULL;
        if (!made) { result = GPU_NO_HANDLE; break; }
        made->imports = 1, *address = made->address;
    });
}

int gpu_unimport(uint64_t address) {
    pthread_mutex_lock(&lock);
    struct range *range = find(ranges, address);
    int result = range && range->imports ? GPU_OK : GPU_INVALID;
    if (!result) drop(range);
    pthread_mutex_unlock(&lock);
    return result;
}

int gpu_dma_buf(int *fd, uint64_t address, size_t size) {
    LOCKED({
        struct range *range = find(ranges, address);
        if (!range || !size || address % PAGE || size % PAGE || address + size > range->address + range->size)
            result = GPU_INVALID;
        else
            *fd = fcntl(range->fd, F_DUPFD_CLOEXEC, 0);
    });
}

int gpu_pin(void *host, size_t size) {
    LOCKED({
        if (!size || find(pins, (uint64_t)host)) result = GPU_INVALID;
        else enter(pins, (uint64_t)host, size);
    });
}

int gpu_unpin(void *host) {
    pthread_mutex_lock(&lock);
    struct range *range = find(pins, (uint64_t)host);
    int result = range && range->address == (uint64_t)host ? GPU_OK : GPU_INVALID;
    if (!result) range->size = 0;
    pthread_mutex_unlock(&lock);
    return result;
}

static void *run(void *unused) {
    for (;;) {
        pthread_mutex_lock(&lock);
        while (!first || held) pthread_cond_wait(&changed, &lock);
        struct copy *next = first;
        if (!(first = next->next)) last = &first;
        pthread_mutex_unlock(&lock);
        if (next->from) memcpy(next->to, next->from, next->size);
        else memset(next->to, next->value, next->size);
        free(next);
        pthread_mutex_lock(&lock);
        done++;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
    }
    return unused;
}

static void start(void) {
    pthread_t thread;
    pthread_create(&thread, NULL, run, NULL);
    pthread_detach(thread);
}

static int queue(uint64_t address, void *host, size_t size, int to_device, int value) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, start);
    LOCKED({
        struct range *range = find(ranges, address);
        if (!range || address + size > range->address + range->size) { result = GPU_INVALID; break; }
        char *bytes = range->bytes + (address - range->address);
        struct copy *made = malloc(sizeof *made);
        *made = (struct copy){NULL, to_device ? host : bytes, to_device ? bytes : host, size, value};
        *last = made, last = &made->next, queued++;
        if (host) *(find(pins, (uint64_t)host) ? &pinned_copies : &plain_copies) += 1;
        pthread_cond_broadcast(&changed);
    });
}

int gpu_copy(uint64_t address, void *host, size_t size, int to_device) { return queue(address, host, size, to_device, 0); }
int gpu_set(uint64_t address, int value, size_t size) { return queue(address, NULL, size, 1, value); }

uint64_t gpu_mark(void) {
    pthread_mutex_lock(&lock);
    uint64_t mark = queued;
    pthread_mutex_unlock(&lock);
    return mark;
}

int gpu_wait(uint64_t mark) {
    pthread_mutex_lock(&lock);
    while (done < mark) pthread_cond_wait(&changed, &lock);
    int result = lost ? GPU_LOST : GPU_OK;
    pthread_mutex_unlock(&lock);
    return result;
}

const char *gpu_address(void) {
    const char *set = getenv("FAKE_GPU_ADDRESS");
    return set ? set : "0000:41:00.0";
}

void gpu_made(int count) {
    pthread_mutex_lock(&lock);
    things += count;
    pthread_mutex_unlock(&lock);
}

int gpu_fault(const char *name) {
    int code = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < 16; i++)
        if (faults[i].code && !strcmp(faults[i].name, name)) {
            if (faults[i].after) faults[i].after--;
            else code = faults[i].code;
        }
    pthread_mutex_unlock(&lock);
    return code;
}

/* For tests. */

void fake_fail(const char *name, int code, int after) { /* after so many good calls; code 0: no more */
    pthread_mutex_lock(&lock);
    int slot = 0;
    for (int i = 15; i >= 0; i--)
        if (!faults[i].code || !strcmp(faults[i].name, name)) slot = i;
    snprintf(faults[slot].name, sizeof faults[slot].name, "%s", name);
    faults[slot].code = code, faults[slot].after = after;
    pthread_mutex_unlock(&lock);
}

void fake_reset(void) { /* nothing fails, nothing waits, the GPU is there */
    pthread_mutex_lock(&lock);
    memset(faults, 0, sizeof faults);
    held = lost = pinned_copies = plain_copies = 0;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

void fake_hold(int on) { /* copies wait */
    pthread_mutex_lock(&lock);
    held = on;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

void fake_lose(int on) { /* the GPU falls off its bus */
    pthread_mutex_lock(&lock);
    lost = on;
    pthread_mutex_unlock(&lock);
}

int fake_open(void) { /* allocations, imports, pins, streams, events and contexts that are open */
    pthread_mutex_lock(&lock);
    int count = things;
    for (int i = 0; i < MAX; i++) count += !!ranges[i].size + !!pins[i].size;
    pthread_mutex_unlock(&lock);
    return count;
}

int fake_queued(void) { /* copies that were not made yet */
    pthread_mutex_lock(&lock);
    int count = (int)(queued - done);
    pthread_mutex_unlock(&lock);
    return count;
}

int fake_copies(int pinned) { /* since the last time this was asked */
    pthread_mutex_lock(&lock);
    int *counter = pinned ? &pinned_copies : &plain_copies, count = *counter;
    *counter = 0;
    pthread_mutex_unlock(&lock);
    return count;
}
