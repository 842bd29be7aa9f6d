// The CUDA runtime for torch, with devices in the memory of the host. See README.md.
//
// Nothing runs until somebody waits: a stream is a queue. Work that nothing orders behind what it needs, neither its stream nor an
// event, reads what is not there yet. Memory that is given away too early holds something else when the work runs.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <sys/mman.h>

#include "fakecuda.h"

namespace {

using Work = std::function<cudaError_t()>;

struct Graph {
    std::vector<Work> works;
    bool invalid = false;
};

struct Stream {
    int device;
    std::deque<Work> queue;
    Graph *graph = nullptr;         // that captures what is queued here
    bool began_capture = false;     // here, not by an event of a stream that did
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    unsigned long long capture = 0;
};

// A place in a stream, or in a graph.
struct Mark {
    bool reached = false;
    Stream *stream;
    Graph *graph;
};

struct Event {
    int device;
    std::shared_ptr<Mark> mark;
};

struct Memory {
    size_t bytes;
    int device;                     // PINNED, or the device
};

constexpr int PINNED = -1, PAGEABLE = -2;

// What outlives every other object of the process: torch still calls while it ends.
struct World {
    std::recursive_mutex mutex;
    std::vector<Stream *> streams;
    std::map<int, Stream *> default_streams;
    std::map<uintptr_t, Memory> memory;
    std::map<const void *, std::string> kernels;
    unsigned long long captures = 0;
    cudaError_t sticky = cudaSuccess;
    fakecuda_launch launch = nullptr;
    fakecuda_call call = nullptr;
};

World &world() {
    static World *only = new World;
    return *only;
}

thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

using Lock = std::lock_guard<std::recursive_mutex>;

cudaError_t fail(cudaError_t error, const char *what) {
    std::fprintf(stderr, "fakecuda: %s\n", what);
    return last = error;
}

Stream *new_stream(int device) {
    auto *stream = new Stream{device};
    world().streams.push_back(stream);
    return stream;
}

Stream *stream_of(cudaStream_t handle) {
    if (handle && handle != cudaStreamLegacy && handle != cudaStreamPerThread)
        return reinterpret_cast<Stream *>(handle);
    auto &stream = world().default_streams[current];
    return stream ? stream : stream = new_stream(current);
}

int where(const void *pointer) {
    auto &memory = world().memory;
    auto after = memory.upper_bound(uintptr_t(pointer));
    if (after == memory.begin())
        return PAGEABLE;
    auto &[begin, block] = *std::prev(after);
    return uintptr_t(pointer) < begin + block.bytes ? block.device : PAGEABLE;
}

// While a stream captures in the mode "global", no thread may do what could wait, unless it has asked for another mode.
cudaError_t forbidden_in_capture(const char *what) {
    if (thread_mode == cudaStreamCaptureModeRelaxed)
        return cudaSuccess;
    for (auto *stream : world().streams)
        if (stream->graph && stream->began_capture && stream->mode != cudaStreamCaptureModeRelaxed) {
            stream->graph->invalid = true;
            return fail(cudaErrorStreamCaptureUnsupported, (std::string(what) + " while a stream captures").c_str());
        }
    return cudaSuccess;
}

#define ALLOWED_IN_CAPTURE_OR_RETURN(what) \
    if (cudaError_t error = forbidden_in_capture(what)) \
        return error

// Run the stream's work, until the mark is reached if there is one. An error stays, as on a device.
cudaError_t run(Stream *stream, const Mark *until = nullptr) {
    while (!stream->queue.empty() && !(until && until->reached)) {
        Work work = std::move(stream->queue.front());
        stream->queue.pop_front();
        cudaError_t error = world().sticky ? cudaSuccess : work();
        if (error)
            world().sticky = error;
    }
    return last = world().sticky;
}

cudaError_t queue(Stream *stream, Work work) {
    if (stream->graph)
        stream->graph->works.push_back(std::move(work));
    else
        stream->queue.push_back(std::move(work));
    return cudaSuccess;
}

cudaError_t allocate(void **pointer, size_t bytes, int device) {
    void *begin = mmap(nullptr, bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED)
        return fail(cudaErrorMemoryAllocation, "out of memory");
    std::memset(begin, FAKECUDA_POISON, bytes < FAKECUDA_POISONED ? bytes : FAKECUDA_POISONED);
    world().memory[uintptr_t(*pointer = begin)] = {bytes, device};
    return cudaSuccess;
}

// The pages stay, so that late work does not end the process. A launch may no longer touch them.
cudaError_t release(void *pointer) {
    world().memory.erase(uintptr_t(pointer));
    return cudaSuccess;
}

cudaError_t copy(void *to, const void *from, size_t bytes, Stream *stream) {
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

int number(const char *name, int otherwise) {
    const char *text = std::getenv(name);
    return text ? std::atoi(text) : otherwise;
}

}  // namespace

int fakecuda_devices() { return number("FAKECUDA_DEVICES", 2); }
int fakecuda_capability() { return number("FAKECUDA_CAPABILITY", 90); }
int fakecuda_shared() { return number("FAKECUDA_SHARED", 49152); }
int fakecuda_current() { return current; }
int fakecuda_forbidden(const char *what) { return forbidden_in_capture(what); }
int fakecuda_where(const void *pointer) { Lock lock(world().mutex); return where(pointer); }
int fakecuda_device_of(const fakecuda_function *function) { return function->device; }
void fakecuda_forget_errors() { last = world().sticky = cudaSuccess; }
void fakecuda_on_launch(fakecuda_launch launch) { world().launch = launch; }
void fakecuda_on_call(fakecuda_call call) { world().call = call; }

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

extern "C" {

// --- devices and errors ---------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int *count) { *count = fakecuda_devices(); return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = current; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return last; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { *can = 0; return cudaSuccess; }

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= fakecuda_devices())
        return fail(cudaErrorInvalidDevice, "no such device");
    current = device;
    return cudaSuccess;
}

cudaError_t cudaGetLastError() {
    cudaError_t error = last;
    last = world().sticky;
    return error;
}

const char *cudaGetErrorName(cudaError_t error) {
    thread_local char text[32];
    std::snprintf(text, sizeof text, "fakecuda %d", int(error));
    return text;
}

const char *cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    std::memset(properties, 0, sizeof *properties);
    std::snprintf(properties->name, sizeof properties->name, "fakecuda %d", device);
    properties->major = fakecuda_capability() / 10, properties->minor = fakecuda_capability() % 10;
    properties->multiProcessorCount = 132, properties->warpSize = 32, properties->totalGlobalMem = 80ull << 30;
    properties->maxThreadsPerBlock = 1024, properties->maxThreadsPerMultiProcessor = 2048;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->sharedMemPerBlock = 49152, properties->sharedMemPerBlockOptin = fakecuda_shared();
    properties->maxGridSize[0] = 2147483647, properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->textureAlignment = 512, properties->unifiedAddressing = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp properties;
    cudaGetDeviceProperties(&properties, device);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = properties.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = properties.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = properties.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(properties.sharedMemPerBlockOptin); break;
    case cudaDevAttrWarpSize: *value = properties.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = properties.maxThreadsPerBlock; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int room, int device) {
    std::snprintf(text, room, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

// --- memory ---------------------------------------------------------------------------------------------------------------------

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

// --- streams and events ---------------------------------------------------------------------------------------------------------

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0, *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) {
    *priority = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
    Lock lock(world().mutex);
    *stream = cudaStream_t(new_stream(current));
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreateWithPriority(stream, flags, 0); }

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    Lock lock(world().mutex);
    Stream *stream = stream_of(handle);
    if (stream->graph)
        return fail(cudaErrorStreamCaptureUnsupported, "a wait for a stream that captures");
    ALLOWED_IN_CAPTURE_OR_RETURN("cudaStreamSynchronize");
    return run(stream);
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    Lock lock(world().mutex);
    ALLOWED_IN_CAPTURE_OR_RETURN("cudaStreamQuery");
    return stream_of(handle)->queue.empty() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    Lock lock(world().mutex);
    return queue(stream_of(stream), [=] { function(data); return cudaSuccess; });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = cudaEvent_t(new Event{current, nullptr});
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete reinterpret_cast<Event *>(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned) {
    Lock lock(world().mutex);
    auto *event = reinterpret_cast<Event *>(handle);
    Stream *stream = stream_of(stream_handle);
    if (event->device != stream->device)
        return fail(cudaErrorInvalidResourceHandle, "an event is recorded on a stream of another device");
    auto mark = event->mark = std::make_shared<Mark>(Mark{false, stream, stream->graph});
    return stream->graph ? cudaSuccess : queue(stream, [mark] { mark->reached = true; return cudaSuccess; });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }

cudaError_t cudaEventQuery(cudaEvent_t handle) {
    Lock lock(world().mutex);
    auto mark = reinterpret_cast<Event *>(handle)->mark;
    if (mark && mark->graph)
        return fail(cudaErrorCapturedEvent, "a captured event is asked whether it is over");
    ALLOWED_IN_CAPTURE_OR_RETURN("cudaEventQuery");
    return !mark || mark->reached ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    Lock lock(world().mutex);
    auto mark = reinterpret_cast<Event *>(handle)->mark;
    ALLOWED_IN_CAPTURE_OR_RETURN("cudaEventSynchronize");
    return mark && !mark->reached ? run(mark->stream, mark.get()) : cudaSuccess;
}

// There is no clock here that means anything.
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = NAN;
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
    Lock lock(world().mutex);
    auto mark = reinterpret_cast<Event *>(event)->mark;
    Stream *stream = stream_of(handle);
    if (!mark)
        return cudaSuccess;
    if (mark->graph) {  // the stream joins the capture
        stream->graph = mark->graph, stream->capture = mark->stream->capture;
        return cudaSuccess;
    }
    if (stream->graph)
        return fail(cudaErrorStreamCaptureIsolation, "a captured wait for an event outside of the capture");
    return queue(stream, [mark] { return mark->reached ? cudaSuccess : run(mark->stream, mark.get()); });
}

// --- graphs ---------------------------------------------------------------------------------------------------------------------

static cudaError_t begin_capture(Stream *stream, Graph *graph, cudaStreamCaptureMode mode) {
    stream->graph = graph, stream->mode = mode, stream->began_capture = true, stream->capture = ++world().captures;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    Lock lock(world().mutex);
    return begin_capture(stream_of(stream), new Graph, mode);
}

cudaError_t cudaStreamBeginCaptureToGraph(
    cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t *, const cudaGraphEdgeData *, size_t, cudaStreamCaptureMode mode) {
    Lock lock(world().mutex);
    return begin_capture(stream_of(stream), reinterpret_cast<Graph *>(graph), mode);
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *result) {
    Lock lock(world().mutex);
    Graph *graph = stream_of(handle)->graph;
    for (auto *stream : world().streams)
        if (stream->graph == graph)
            stream->graph = nullptr, stream->began_capture = false, stream->capture = 0;
    *result = graph->invalid ? nullptr : cudaGraph_t(graph);
    return graph->invalid ? fail(cudaErrorStreamCaptureInvalidated, "the capture met what it may not do") : cudaSuccess;
}

static cudaStreamCaptureStatus status(const Stream *stream) {
    return !stream->graph             ? cudaStreamCaptureStatusNone
           : stream->graph->invalid ? cudaStreamCaptureStatusInvalidated
                                      : cudaStreamCaptureStatusActive;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *result) {
    Lock lock(world().mutex);
    *result = status(stream_of(stream));
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t handle, cudaStreamCaptureStatus *result, unsigned long long *capture, cudaGraph_t *graph, const cudaGraphNode_t **nodes,
    const cudaGraphEdgeData **edges, size_t *count) {
    Lock lock(world().mutex);
    Stream *stream = stream_of(handle);
    *result = status(stream);
    if (capture) *capture = stream->capture;
    if (graph) *graph = cudaGraph_t(stream->graph);
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
    std::swap(*mode, thread_mode);
    return cudaSuccess;
}

cudaError_t cudaGraphCreate(cudaGraph_t *graph, unsigned) {
    *graph = cudaGraph_t(new Graph);
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *, size_t *count) {
    *count = reinterpret_cast<Graph *>(graph)->works.size();
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long) {
    *executable = cudaGraphExec_t(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiate(executable, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    Lock lock(world().mutex);
    for (auto &work : reinterpret_cast<Graph *>(executable)->works)
        queue(stream_of(stream), work);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }  // the executable one is the same object
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
cudaError_t cudaUserObjectCreate(cudaUserObject_t *object, void *, cudaHostFn_t, unsigned, unsigned) {
    *object = cudaUserObject_t(1);
    return cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }

// --- torch's own kernels --------------------------------------------------------------------------------------------------------

void **__cudaRegisterFatBinary(void *) { static void *handle[4]; return handle; }
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
char __cudaInitModule(void **) { return 0; }
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
void __cudaRegisterFunction(void **, const char *handle, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
    world().kernels[handle] = name;
}

// aten.py replaces them. `torch.cuda._sleep` needs none: no stream moves on by itself.
static cudaError_t refuse(const void *handle) {
    auto kernel = world().kernels.find(handle);
    std::string name = kernel == world().kernels.end() ? "?" : kernel->second;
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
