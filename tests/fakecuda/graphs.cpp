// Captures and graphs.
#include "world.h"

#include <utility>

extern "C" {

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
}
