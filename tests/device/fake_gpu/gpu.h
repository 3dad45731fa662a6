/* A GPU that is not there: memory of its own, queues that copy in their own time, handles for other processes.
 *
 * Device addresses are of no use to the CPU. Memory is a memory file that only this library maps, so bytes get in and
 * out by its copies alone. Copies run in one thread, in the order in which they were queued. What a test may ask is at
 * the end. Both vendors' entry points (cuda.c, hip.c) are made of these functions. */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum gpu_result { GPU_OK, GPU_INVALID, GPU_NO_MEMORY, GPU_NOT_SUPPORTED, GPU_OWN_HANDLE, GPU_NO_HANDLE, GPU_LOST };

int gpu_alloc(uint64_t *address, size_t size);
int gpu_free(uint64_t address);
int gpu_range(uint64_t address, uint64_t *base, size_t *size);
int gpu_export(uint64_t address, void *handle);
int gpu_import(uint64_t *address, const void *handle);
int gpu_unimport(uint64_t address);
int gpu_dma_buf(int *fd, uint64_t address, size_t size);
int gpu_pin(void *host, size_t size);
int gpu_unpin(void *host);
int gpu_copy(uint64_t address, void *host, size_t size, int to_device);
int gpu_set(uint64_t address, int value, size_t size);
uint64_t gpu_mark(void);
int gpu_wait(uint64_t mark);
const char *gpu_address(void); /* of the PCI function: FAKE_GPU_ADDRESS, or 0000:41:00.0 */
void gpu_made(int count); /* streams, events and contexts: only counted */

/* Whether the entry point `name` is to fail now, and with what. */
int gpu_fault(const char *name);
