// The state of the runtime: see world.h.
#include "world.h"

#include <cstdio>
#include <cstdlib>

World &world() {
    static World *only = new World;
    return *only;
}

thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

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

cudaError_t run(Stream *stream, const Mark *until) {
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

static int number(const char *name, int otherwise) {
    const char *text = std::getenv(name);
    return text ? std::atoi(text) : otherwise;
}

int fakecuda_devices() { return number("FAKECUDA_DEVICES", 2); }
int fakecuda_capability() { return number("FAKECUDA_CAPABILITY", 90); }
int fakecuda_shared() { return number("FAKECUDA_SHARED", 49152); }
int fakecuda_current() { return current; }
int fakecuda_forbidden(const char *what) { return forbidden_in_capture(what); }
void fakecuda_forget_errors() { last = world().sticky = cudaSuccess; }
void fakecuda_on_launch(fakecuda_launch launch) { world().launch = launch; }
void fakecuda_on_call(fakecuda_call call) { world().call = call; }
