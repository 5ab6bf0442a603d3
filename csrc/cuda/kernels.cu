// The functions that r1mega/kernels/cuda.py calls, through ctypes: plain C, so that the library needs neither Python's
// nor torch's headers and serves every version of both. Structures are passed whole; cuda.py declares the same fields
// in the same order. The checks of shapes and types are in Python. Each returns a cudaError_t.
#include "permute.h"
#include "rank.h"
#include "route.h"
#include "route_backward.h"
#include "scan.h"

#define R1MEGA_EXPORT extern "C" __attribute__((visibility("default")))

R1MEGA_EXPORT int r1mega_interface() { return 2; }  // cuda.py wants the same; raise both together
R1MEGA_EXPORT const char* r1mega_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

using namespace r1mega;

R1MEGA_EXPORT int r1mega_route(const RouteArguments* a, void* stream) { return route(*a, stream); }
R1MEGA_EXPORT int r1mega_route_backward(const RouteBackwardArguments* a, void* stream) {
  return route_backward(*a, stream);
}
R1MEGA_EXPORT int r1mega_rank(const RankArguments* a, void* stream) { return rank(*a, stream); }
R1MEGA_EXPORT int r1mega_scan(const ScanArguments* a, void* stream) { return scan(*a, stream); }
R1MEGA_EXPORT int r1mega_permute(const PermuteArguments* a, void* stream) { return permute(*a, stream); }
