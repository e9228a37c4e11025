// What the binding asks of the library as a whole.
#include "common.cuh"

namespace {
__global__ void nothing() {}
}  // namespace

// The text of a CUDA error.
extern "C" const char* llama_mm_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// Waits for a stream and returns the error of what ran on it; at once while a graph is being captured.
extern "C" int llama_mm_synchronize(void* stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
    if (status == cudaStreamCaptureStatusNone) cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
    return cudaGetLastError();
}

// Whether the library holds code for the current device: no error, or the one that says why not.
extern "C" int llama_mm_probe() {
    cudaFuncAttributes attributes;
    cudaFuncGetAttributes(&attributes, nothing);
    return cudaGetLastError();
}
