// Streams and events.
#include "world.h"

#include <cmath>

extern "C" {

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
    *event = cudaEvent_t(new Event);
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
}
