// Launches: those of the driver, and torch's own kernels, which aten.py replaces.
#include "world.h"

#include <cstring>
#include <map>
#include <string>
#include <dlfcn.h>

int fakecuda_device_of(const fakecuda_function *function) { return function->device; }

int fakecuda_queue_launch(fakecuda_function *function, const unsigned *grid, unsigned block, unsigned shared, void *handle, void **parameters) {
    Lock lock(world().mutex);
    Stream *stream = stream_of(cudaStream_t(handle));
    if (function->device != stream->device || current != stream->device)
        return fail(cudaErrorInvalidResourceHandle, "a launch on a stream of another device than the kernel or the thread");
    std::string bytes;
    for (size_t i = 0; i < function->sizes.size(); ++i)
        bytes.append((const char *)parameters[i], function->sizes[i]);
    unsigned x = grid[0], y = grid[1], z = grid[2];
    return queue(stream, [=] { return cudaError_t(world().launch(function, x, y, z, block, shared, bytes.data())); });
}

void fakecuda_queue_call(void *handle, size_t call) {
    Lock lock(world().mutex);
    queue(stream_of(cudaStream_t(handle)), [=] { return cudaError_t(world().call(call)); });
}

// The names of torch's kernels by their handles. They outlive every other object.
static std::map<const void *, std::string> &kernels() {
    static auto *only = new std::map<const void *, std::string>;
    return *only;
}

extern "C" {

void **__cudaRegisterFatBinary(void *) { static void *handle[4]; return handle; }
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
char __cudaInitModule(void **) { return 0; }
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
void __cudaRegisterFunction(void **, const char *handle, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
    kernels()[handle] = name;
}

// aten.py replaces them. `torch.cuda._sleep` needs none: no stream moves on by itself.
static cudaError_t refuse(const void *handle) {
    auto kernel = kernels().find(handle);
    std::string name = kernel == kernels().end() ? "?" : kernel->second;
    return name.find("spin_kernel") != std::string::npos ? cudaSuccess : fail(cudaErrorNotSupported, ("a kernel of torch: " + name).c_str());
}

static thread_local struct { dim3 grid, block; size_t shared; void *stream; } configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared, *(void **)stream = configuration.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *handle) { *kernel = cudaKernel_t(handle); return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void **, size_t, cudaStream_t) { return refuse(kernel); }
cudaError_t cudaLaunchKernel(const void *handle, dim3, dim3, void **, size_t, cudaStream_t) { return refuse(handle); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *handle, void **) { return refuse(handle); }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
    std::memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = fakecuda_capability();
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult *found) {
    static void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
    *function = driver ? dlsym(driver, name) : nullptr;
    if (found)
        *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags, cudaDriverEntryPointQueryResult *found) {
    return cudaGetDriverEntryPointByVersion(name, function, CUDART_VERSION, flags, found);
}
}
