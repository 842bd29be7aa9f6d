// What the parts of the runtime share: streams, events, graphs and blocks of memory.
//
// Nothing runs until somebody waits: a stream is a queue. Work that nothing orders behind what it needs, neither its stream nor an
// event, reads what is not there yet. Memory that is given away too early holds something else when the work runs.
#pragma once
#include <cuda_runtime_api.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fakecuda.h"

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
    std::shared_ptr<Mark> mark;     // where it was last recorded
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
    unsigned long long captures = 0;
    cudaError_t sticky = cudaSuccess;
    fakecuda_launch launch = nullptr;
    fakecuda_call call = nullptr;
};

World &world();

// Of this thread: the device, the last error, and the mode that it has asked for.
extern thread_local int current;
extern thread_local cudaError_t last;
extern thread_local cudaStreamCaptureMode thread_mode;

using Lock = std::lock_guard<std::recursive_mutex>;

cudaError_t fail(cudaError_t error, const char *what);

Stream *new_stream(int device);
Stream *stream_of(cudaStream_t handle);

// The device of the block that holds the pointer, PINNED or PAGEABLE.
int where(const void *pointer);

// While a stream captures in the mode "global", no thread may do what could wait, unless it has asked for another mode.
cudaError_t forbidden_in_capture(const char *what);

#define ALLOWED_IN_CAPTURE_OR_RETURN(what) \
    if (cudaError_t error = forbidden_in_capture(what)) \
        return error

// Run the stream's work, until the mark is reached if there is one. An error stays, as on a device.
cudaError_t run(Stream *stream, const Mark *until = nullptr);

// Put work into the stream, or into the graph that captures it.
cudaError_t queue(Stream *stream, Work work);
