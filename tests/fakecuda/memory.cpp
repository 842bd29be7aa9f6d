// Memory of the devices, pinned memory, and copies.
#include "world.h"

#include <cstring>
#include <sys/mman.h>

static cudaError_t allocate(void **pointer, size_t bytes, int device) {
    void *begin = mmap(nullptr, bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED)
        return fail(cudaErrorMemoryAllocation, "out of memory");
    std::memset(begin, FAKECUDA_POISON, bytes < FAKECUDA_POISONED ? bytes : FAKECUDA_POISONED);
    world().memory[uintptr_t(*pointer = begin)] = {bytes, device};
    return cudaSuccess;
}

// The pages stay, so that late work does not end the process. A launch may no longer touch them.
static cudaError_t release(void *pointer) {
    world().memory.erase(uintptr_t(pointer));
    return cudaSuccess;
}

static cudaError_t copy(void *to, const void *from, size_t bytes, Stream *stream) {
    bool to_pageable = where(to) == PAGEABLE, from_pageable = where(from) == PAGEABLE;
    if ((to_pageable || from_pageable) && stream->graph) {
        stream->graph->invalid = true;
        return fail(cudaErrorStreamCaptureUnsupported, "a captured copy of memory that is not pinned");
    }
    if (to_pageable) {
        cudaError_t error = run(stream);
        std::memcpy(to, from, bytes);
        return error;
    }
    if (!from_pageable)
        return queue(stream, [=] { std::memcpy(to, from, bytes); return cudaSuccess; });
    auto kept = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + bytes);
    return queue(stream, [=] { std::memcpy(to, kept->data(), bytes); return cudaSuccess; });
}

int fakecuda_where(const void *pointer) { Lock lock(world().mutex); return where(pointer); }

int fakecuda_blocks(int device, uint64_t *blocks, int room) {
    Lock lock(world().mutex);
    int count = 0;
    for (auto &[begin, block] : world().memory)
        if (block.device == device && count < room) {
            blocks[2 * count] = begin, blocks[2 * count + 1] = begin + block.bytes;
            ++count;
        }
    return count;
}

extern "C" {

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    Lock lock(world().mutex);
    ALLOWED_IN_CAPTURE_OR_RETURN("cudaMalloc");
    return allocate(pointer, bytes, current);
}

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned) {
    Lock lock(world().mutex);
    ALLOWED_IN_CAPTURE_OR_RETURN("cudaHostAlloc");
    return allocate(pointer, bytes, PINNED);
}

cudaError_t cudaDeviceSynchronize() {
    Lock lock(world().mutex);
    ALLOWED_IN_CAPTURE_OR_RETURN("cudaDeviceSynchronize");
    for (size_t i = 0; i < world().streams.size(); ++i)  // new ones may come
        if (world().streams[i]->device == current)
            run(world().streams[i]);
    return last = world().sticky;
}

cudaError_t cudaFree(void *pointer) {
    Lock lock(world().mutex);
    cudaError_t error = cudaDeviceSynchronize();
    return error ? error : release(pointer);
}

cudaError_t cudaFreeHost(void *pointer) {
    Lock lock(world().mutex);
    return release(pointer);
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *free = 79ull << 30, *total = 80ull << 30;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *pointer) {
    Lock lock(world().mutex);
    std::memset(attributes, 0, sizeof *attributes);
    int device = where(pointer);
    attributes->type = device == PAGEABLE ? cudaMemoryTypeUnregistered : device == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    attributes->device = device < 0 ? -1 : device;
    attributes->devicePointer = device == PAGEABLE ? nullptr : const_cast<void *>(pointer);
    attributes->hostPointer = device < 0 ? const_cast<void *>(pointer) : nullptr;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    Lock lock(world().mutex);
    return copy(to, from, bytes, stream_of(stream));
}

cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
    Lock lock(world().mutex);
    ALLOWED_IN_CAPTURE_OR_RETURN("cudaMemcpy");
    cudaError_t error = run(stream_of(nullptr));
    std::memcpy(to, from, bytes);
    return error;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    Lock lock(world().mutex);
    return queue(stream_of(stream), [=] { std::memset(to, value, bytes); return cudaSuccess; });
}
}
