// What the runtime (world.h), the driver (driver.cpp) and Python (runtime.py, kernels.py) share.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// Fresh memory holds this byte, in the first part of a block: no bool, and as a number nothing that a kernel computes.
#define FAKECUDA_POISON 0xAA
#define FAKECUDA_POISONED (32u << 20)

struct fakecuda_function {
    std::string name;
    int device;
    std::vector<size_t> sizes;      // of its parameters, in bytes
};

extern "C" {
// They return a cudaError_t.
typedef int (*fakecuda_launch)(fakecuda_function *, unsigned x, unsigned y, unsigned z, unsigned block, unsigned shared, const char *parameters);
typedef int (*fakecuda_call)(size_t call);

int fakecuda_devices();
int fakecuda_capability();
int fakecuda_shared();
int fakecuda_current();
int fakecuda_forbidden(const char *what);
int fakecuda_where(const void *pointer);
int fakecuda_blocks(int device, uint64_t *blocks, int room);
void fakecuda_forget_errors();
void fakecuda_on_launch(fakecuda_launch);
void fakecuda_on_call(fakecuda_call);
int fakecuda_queue_launch(fakecuda_function *, const unsigned *grid, unsigned block, unsigned shared, void *stream, void **parameters);
void fakecuda_queue_call(void *stream, size_t call);
void fakecuda_sizes(fakecuda_function *, size_t count, const size_t *sizes);
int fakecuda_device_of(const fakecuda_function *);
}
