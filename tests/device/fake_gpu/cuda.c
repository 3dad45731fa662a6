/* The CUDA driver's entry points that peermem uses, for the one GPU. */
#define _GNU_SOURCE
#include "gpu.h"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char bytes[64]; } handle_t;

static const int CODES[] = {0, 1, 2, 801, 201, 400, 46};
static int ordering = 0, flush_options = 1, has_dma_buf = 1, has_pcie_flag = 1, flushes = 0, exported_with = 0, shares = 1;

#define ENTER                                  \
    int fault = gpu_fault(__func__);           \
    if (fault) return fault
#define MADE(count) (gpu_made(count), 0)

int cuInit(unsigned flags) { ENTER; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetByPCIBusId(int *device, const char *address) {
    ENTER;
    *device = 0;
    return strcmp(address, gpu_address()) ? 101 : 0;
}
int cuDeviceGetPCIBusId(char *address, int length, int device) {
    ENTER;
    snprintf(address, length, "%s", gpu_address());
    return device ? 101 : 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER;
    *value = attribute == 124 ? has_dma_buf : attribute == 118 ? ordering : attribute == 117 ? flush_options : 1;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    ENTER;
    static int retained;
    *context = &retained;
    return MADE(1);
}
int cuDevicePrimaryCtxRelease(int device) { return MADE(-1); }
int cuCtxSetCurrent(void *context) { ENTER; return 0; }
int cuCtxPushCurrent(void *context) { ENTER; return 0; }
int cuCtxPopCurrent(void **context) { ENTER; return 0; }
int cuMemAlloc(uint64_t *address, size_t size) { ENTER; return CODES[gpu_alloc(address, size)]; }
int cuMemFree(uint64_t address) { ENTER; return CODES[gpu_free(address)]; }
int cuMemGetAddressRange(uint64_t *base, size_t *size, uint64_t address) {
    ENTER;
    return CODES[gpu_range(address, base, size)];
}
int cuPointerSetAttribute(const void *value, int attribute, uint64_t address) { ENTER; return 0; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t address) {
    ENTER;
    int known = gpu_range(address, NULL, NULL);
    if (known) return CODES[known];
    if (attribute == 1) *(void **)value = &flushes; /* context */
    else if (attribute == 2) *(unsigned *)value = 2; /* memory type: device */
    else if (attribute == 9) *(int *)value = 0; /* device ordinal */
    else if (attribute == 10) *(int *)value = shares; /* whether there is a handle */
    else return 1;
    return 0;
}
int cuMemGetHandleForAddressRange(void *handle, uint64_t address, size_t size, int type, unsigned long long flags) {
    ENTER;
    if (type != 1 || !has_dma_buf || (flags && !has_pcie_flag)) return 801;
    exported_with = (int)flags;
    return CODES[gpu_dma_buf(handle, address, size)];
}
int cuIpcGetMemHandle(void *handle, uint64_t address) { ENTER; return CODES[gpu_export(address, handle)]; }
int cuIpcOpenMemHandle(uint64_t *address, handle_t handle, unsigned flags) {
    ENTER;
    return CODES[gpu_import(address, &handle)];
}
int cuIpcCloseMemHandle(uint64_t address) { ENTER; return CODES[gpu_unimport(address)]; }
int cuMemHostRegister(void *host, size_t size, unsigned flags) { ENTER; return CODES[gpu_pin(host, size)]; }
int cuMemHostUnregister(void *host) { return CODES[gpu_unpin(host)]; }
int cuStreamCreate(void **stream, unsigned flags) {
    ENTER;
    static int one;
    *stream = &one;
    return MADE(1);
}
int cuStreamDestroy(void *stream) { return MADE(-1); }
int cuMemcpyHtoDAsync(uint64_t to, const void *from, size_t size, void *stream) {
    ENTER;
    return CODES[gpu_copy(to, (void *)from, size, 1)];
}
int cuMemcpyDtoHAsync(void *to, uint64_t from, size_t size, void *stream) {
    ENTER;
    return CODES[gpu_copy(from, to, size, 0)];
}
int cuMemcpyHtoD(uint64_t to, const void *from, size_t size) {
    int result = gpu_copy(to, (void *)from, size, 1);
    return CODES[result ? result : gpu_wait(gpu_mark())];
}
int cuMemcpyDtoH(void *to, uint64_t from, size_t size) {
    int result = gpu_copy(from, to, size, 0);
    return CODES[result ? result : gpu_wait(gpu_mark())];
}
int cuMemsetD8Async(uint64_t address, unsigned char value, size_t size, void *stream) {
    ENTER;
    return CODES[gpu_set(address, value, size)];
}
int cuEventCreate(uint64_t **event, unsigned flags) { ENTER; *event = malloc(sizeof **event); return MADE(1); }
int cuEventRecord(uint64_t *event, void *stream) { ENTER; *event = gpu_mark(); return 0; }
int cuEventSynchronize(uint64_t *event) { ENTER; return CODES[gpu_wait(*event)]; }
int cuEventDestroy(uint64_t *event) { free(event); return MADE(-1); }
int cuFlushGPUDirectRDMAWrites(int target, int scope) { ENTER; flushes++; return 0; }
int cuGetErrorName(int code, const char **name) {
    *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 801 ? "CUDA_ERROR_NOT_SUPPORTED" : "CUDA_ERROR_FAKE";
    return 0;
}

#define V2(name, ...) int name##_v2(__VA_ARGS__) __attribute__((alias(#name)))
V2(cuMemAlloc, uint64_t *, size_t);
V2(cuMemFree, uint64_t);
V2(cuMemGetAddressRange, uint64_t *, size_t *, uint64_t);
V2(cuIpcOpenMemHandle, uint64_t *, handle_t, unsigned);
V2(cuMemcpyHtoD, uint64_t, const void *, size_t);
V2(cuMemcpyDtoH, void *, uint64_t, size_t);
V2(cuCtxPushCurrent, void *);
V2(cuCtxPopCurrent, void **);

int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags, int *status) {
    static void *self;
    if (!self) self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    *function = dlsym(self, name);
    if (status) *status = *function ? 0 : 1;
    return *function ? 0 : 500;
}
V2(cuGetProcAddress, const char *, void **, int, uint64_t, int *);

/* For tests. */

void fake_cuda(int new_ordering, int new_flush_options, int new_dma_buf, int new_pcie_flag) {
    ordering = new_ordering, flush_options = new_flush_options, has_dma_buf = new_dma_buf, has_pcie_flag = new_pcie_flag;
}
void fake_share(int new) { shares = new; }
int fake_exported_with(void) { return exported_with; } /* the flags of the last dma-buf */
int fake_flushes(void) {
    int count = flushes;
    flushes = 0;
    return count;
}
