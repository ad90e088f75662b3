// The kernels of tests/driver_*.rs. driver.ptx beside it was made by
// nvcc -arch=compute_80 -ptx -O3 driver.cu

// y[i] = a * x[i]: one thread an element. y: (n,), x: (n,)
extern "C" __global__ void scale_f32(float* y, const float* x, float a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i];
}

// y[i] += x[i]. y: (n,), x: (n,)
extern "C" __global__ void add_f32(float* y, const float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += x[i];
}

// x[i] = value, for n elements, whether x has as many or not.
extern "C" __global__ void fill_u32(unsigned* x, unsigned value, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = value;
}

// One store at a byte offset that need not be a multiple of 4.
extern "C" __global__ void store_at_u32(char* x, int offset) {
    *(unsigned*)(x + offset) = 1;
}

// Reverses each block's part of x through dynamic shared memory. x: (gridDim.x * blockDim.x,)
extern "C" __global__ void __launch_bounds__(128) reverse_u32(unsigned* x) {
    extern __shared__ unsigned part[];
    unsigned* own = x + blockIdx.x * blockDim.x;
    part[threadIdx.x] = own[threadIdx.x];
    __syncthreads();
    own[threadIdx.x] = part[blockDim.x - 1 - threadIdx.x];
}

__constant__ unsigned table[4];
__device__ unsigned total = 7;

// y[i] = table[i % 4] + total. y: (n,)
extern "C" __global__ void lookup_u32(unsigned* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = table[i % 4] + total;
}

struct Params { const unsigned* x; unsigned* y; unsigned n; unsigned char step; };

// y[i] = x[i] + step, its arguments in one struct by value.
extern "C" __global__ void shift_u32(const Params p) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.n) p.y[i] = p.x[i] + p.step;
}
