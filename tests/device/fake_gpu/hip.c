/* The entry points of HIP and HSA that peermem uses, for the one GPU. */
#define _GNU_SOURCE
#include "gpu.h"
#include <stdlib.h>
#include <string.h>

typedef struct { char bytes[64]; } handle_t;

static const int CODES[] = {0, 1, 2, 801, 201, 400, 46};
static volatile uint32_t flush_register;
static int has_flush = 1, has_dma_buf = 1;

#define ENTER                                  \
    int fault = gpu_fault(__func__);           \
    if (fault) return fault
#define MADE(count) (gpu_made(count), 0)

int hipInit(unsigned flags) { ENTER; return 0; }
int hipDeviceGetByPCIBusId(int *device, const char *address) {
    ENTER;
    *device = 0;
    return strcmp(address, gpu_address()) ? 101 : 0;
}
int hipDeviceGetAttribute(void *value, int attribute, int device) {
    ENTER;
    if (attribute != 10005) return 1;
    *(volatile uint32_t **)value = has_flush ? &flush_register : NULL;
    return 0;
}
int hipDeviceGetPCIBusId(char *address, int length, int device) {
    ENTER;
    strncpy(address, gpu_address(), length);
    return device ? 101 : 0;
}
int hipGetDevice(int *device) { *device = 0; return 0; }
int hipSetDevice(int device) { ENTER; return 0; }
int hipMalloc(uint64_t *address, size_t size) { ENTER; return CODES[gpu_alloc(address, size)]; }
int hipFree(uint64_t address) { ENTER; return CODES[gpu_free(address)]; }
int hipMemGetAddressRange(uint64_t *base, size_t *size, uint64_t address) {
    ENTER;
    return CODES[gpu_range(address, base, size)];
}
int hipIpcGetMemHandle(void *handle, uint64_t address) { ENTER; return CODES[gpu_export(address, handle)]; }
int hipIpcOpenMemHandle(uint64_t *address, handle_t handle, unsigned flags) {
    ENTER;
    return CODES[gpu_import(address, &handle)];
}
int hipIpcCloseMemHandle(uint64_t address) { ENTER; return CODES[gpu_unimport(address)]; }
int hipHostRegister(void *host, size_t size, unsigned flags) { ENTER; return CODES[gpu_pin(host, size)]; }
int hipHostUnregister(void *host) { return CODES[gpu_unpin(host)]; }
int hipStreamCreateWithFlags(void **stream, unsigned flags) {
    ENTER;
    static int one;
    *stream = &one;
    return MADE(1);
}
int hipStreamDestroy(void *stream) { return MADE(-1); }
int hipMemcpyHtoDAsync(uint64_t to, void *from, size_t size, void *stream) {
    ENTER;
    return CODES[gpu_copy(to, from, size, 1)];
}
int hipMemcpyDtoHAsync(void *to, uint64_t from, size_t size, void *stream) {
    ENTER;
    return CODES[gpu_copy(from, to, size, 0)];
}
int hipMemcpyHtoD(uint64_t to, void *from, size_t size) {
    int result = gpu_copy(to, from, size, 1);
    return CODES[result ? result : gpu_wait(gpu_mark())];
}
int hipMemcpyDtoH(void *to, uint64_t from, size_t size) {
    int result = gpu_copy(from, to, size, 0);
    return CODES[result ? result : gpu_wait(gpu_mark())];
}
int hipMemsetAsync(uint64_t address, int value, size_t size, void *stream) {
    ENTER;
    return CODES[gpu_set(address, value, size)];
}
int hipEventCreateWithFlags(uint64_t **event, unsigned flags) { ENTER; *event = malloc(sizeof **event); return MADE(1); }
int hipEventRecord(uint64_t *event, void *stream) { ENTER; *event = gpu_mark(); return 0; }
int hipEventSynchronize(uint64_t *event) { ENTER; return CODES[gpu_wait(*event)]; }
int hipEventDestroy(uint64_t *event) { free(event); return MADE(-1); }
const char *hipGetErrorName(int code) { return code == 2 ? "hipErrorOutOfMemory" : "hipErrorFake"; }

int hsa_amd_portable_export_dmabuf(uint64_t address, size_t size, int *fd, uint64_t *offset) {
    ENTER;
    *offset = 0;
    return has_dma_buf ? gpu_dma_buf(fd, address, size) : 0x1000;
}

/* For tests. */

void fake_hip(int new_flush, int new_dma_buf) { has_flush = new_flush, has_dma_buf = new_dma_buf; }
int fake_flushes(void) {
    int count = (int)flush_register;
    flush_register = 0;
    return count;
}
