// Rows of float32, float16 and bfloat16 in shared memory, and how they get there. No headers, for NVRTC.
#pragma once

namespace momkd {

#ifndef MOMKD_EMULATED
__device__ inline unsigned in_shared(const void *address) {
  return static_cast<unsigned>(__cvta_generic_to_shared(address));
}
__device__ inline void copy_16(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(in_shared(to)), "l"(from) : "memory");
}
__device__ inline void copy_8(void *to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(in_shared(to)), "l"(from) : "memory");
}
__device__ inline void copy_4(void *to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(in_shared(to)), "l"(from) : "memory");
}
__device__ inline void end_of_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void wait_for_all() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }
__device__ inline void wait_for_all_but_one() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

__device__ inline float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
#endif

struct Float32 {
  static constexpr int kItem = 4, kChunk = 4;  // bytes of an element, elements of 16 bytes
  static __device__ float one(const unsigned char *row, int column) {
    return reinterpret_cast<const float *>(row)[column];
  }
  static __device__ void put(unsigned char *row, int column, float value) {
    reinterpret_cast<float *>(row)[column] = value;
  }
  static __device__ float4 four(const unsigned char *row, int column) {
    return reinterpret_cast<const float4 *>(row)[column / 4];
  }
  using Chunk = float4;
  static __device__ float4 part(const Chunk &chunk, int) { return chunk; }
};

template <typename Half>
struct Sixteen {
  static constexpr int kItem = 2, kChunk = 8;
  static __device__ float one(const unsigned char *row, int column) {
    return Half::widened(reinterpret_cast<const unsigned short *>(row)[column]);
  }
  static __device__ void put(unsigned char *row, int column, float value) {
    reinterpret_cast<unsigned short *>(row)[column] = Half::narrowed(value);
  }
  static __device__ float4 four(const unsigned char *row, int column) {
    const uint2 words = reinterpret_cast<const uint2 *>(row)[column / 4];
    return widened_four(words.x, words.y);
  }
  using Chunk = uint4;
  static __device__ float4 part(const Chunk &chunk, int which) {
    return which ? widened_four(chunk.z, chunk.w) : widened_four(chunk.x, chunk.y);
  }
  static __device__ float4 widened_four(unsigned first, unsigned second) {
    return make_float4(Half::low(first), Half::high(first), Half::low(second), Half::high(second));
  }
};

struct BFloat16 : Sixteen<BFloat16> {
  static __device__ float low(unsigned both) { return __uint_as_float(both << 16); }
  static __device__ float high(unsigned both) { return __uint_as_float(both & 0xffff0000u); }
  static __device__ float widened(unsigned short bits) { return low(bits); }
  static __device__ unsigned short narrowed(float exact) {
    return static_cast<unsigned short>(__float_as_uint(exact) >> 16);
  }
};

struct Float16 : Sixteen<Float16> {
  static __device__ float widened(unsigned short bits) { return half_to_float(bits); }
  static __device__ float low(unsigned both) { return widened(static_cast<unsigned short>(both)); }
  static __device__ float high(unsigned both) { return widened(static_cast<unsigned short>(both >> 16)); }
  // Squared lengths of float16 rows never leave float32, so that only zeros come here.
  static __device__ unsigned short narrowed(float) { return 0; }
};

}  // namespace momkd
