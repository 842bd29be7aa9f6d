// Devices and errors.
#include "world.h"

#include <cstdio>
#include <cstring>

extern "C" {

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
}
