// SPDX-License-Identifier: Apache-2.0
// Reading operands of any type and strides as float.
#pragma once
#include "operand.h"
#include "vec.h"

namespace vosops::VOSOPS_ISA {

inline int64_t offset(const Positions& positions, int64_t position) {
  if (positions.dims == 1) return position * positions.stride[0];
  int64_t sum = 0;
  for (int d = positions.dims - 1; d >= 0; --d) {
    sum += (position % positions.size[d]) * positions.stride[d];
    position /= positions.size[d];
  }
  return sum;
}

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Loads element `offset` as float.
template <DType T>
struct Loader;
template <>
struct Loader<DType::kFloat> {
  static constexpr DType kType = DType::kFloat;
  static float at(const void* data, int64_t offset) { return static_cast<const float*>(data)[offset]; }
};
template <>
struct Loader<DType::kBFloat16> {
  static constexpr DType kType = DType::kBFloat16;
  static float at(const void* data, int64_t offset) {
    return bfloat16_to_float(static_cast<const uint16_t*>(data)[offset]);
  }
};
template <>
struct Loader<DType::kHalf> {
  static constexpr DType kType = DType::kHalf;
  static float at(const void* data, int64_t offset) {
    const uint32_t h = static_cast<const uint16_t*>(data)[offset];
    const uint32_t sign = (h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    uint32_t bits;
    if (exponent == 31) {
      bits = sign | 0x7f800000 | (fraction << 13);
    } else if (exponent != 0) {
      bits = sign | ((exponent + 112) << 23) | (fraction << 13);
    } else {
      const float tiny = float(fraction) * 5.9604644775390625e-8f;  // subnormal: fraction * 2^-24
      std::memcpy(&bits, &tiny, sizeof bits);
      bits |= sign;
    }
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

// Calls f with the Loader of `dtype`, chosen once outside the loops.
template <class F>
inline void with_loader(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat: return f(Loader<DType::kFloat>{});
    case DType::kBFloat16: return f(Loader<DType::kBFloat16>{});
    case DType::kHalf: return f(Loader<DType::kHalf>{});
  }
}

// Element offsets of positions first .. first + count; true if they are consecutive in memory.
inline bool offsets_of(const Positions& positions, int64_t first, int count, int64_t* out) {
  bool consecutive = true;
  for (int i = 0; i < count; ++i) {
    out[i] = offset(positions, first + i);
    consecutive &= out[i] == out[0] + i;
  }
  return consecutive;
}

#if defined(__AVX512F__)
// dst[c * dst_stride + r] = src[r * src_stride + c] for a 16 x 16 block.
inline void transpose16(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(src + i * src_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int h = 0; h < 2; ++h) {
      const __m512d low = _mm512_castps_pd(b[i + h]), high = _mm512_castps_pd(b[i + 2 + h]);
      a[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88);
    b[4 + i] = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
    b[8 + i] = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
    b[12 + i] = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_ps(dst + (i)*dst_stride, _mm512_shuffle_f32x4(b[i], b[8 + i], 0x88));
    _mm512_storeu_ps(dst + (4 + i) * dst_stride, _mm512_shuffle_f32x4(b[4 + i], b[12 + i], 0x88));
    _mm512_storeu_ps(dst + (8 + i) * dst_stride, _mm512_shuffle_f32x4(b[i], b[8 + i], 0xdd));
    _mm512_storeu_ps(dst + (12 + i) * dst_stride, _mm512_shuffle_f32x4(b[4 + i], b[12 + i], 0xdd));
  }
}
#endif

// dst[c * dst_stride + r] = src[r * src_stride + c].
inline void transpose(const float* src, int64_t src_stride, int rows, int cols, float* dst,
                      int64_t dst_stride) {
  int done = 0;
#if defined(__AVX512F__)
  for (; done + 16 <= rows; done += 16) {
    int c = 0;
    for (; c + 16 <= cols; c += 16)
      transpose16(src + done * src_stride + c, src_stride, dst + c * dst_stride + done, dst_stride);
    for (; c < cols; ++c)
      for (int r = done; r < done + 16; ++r) dst[c * dst_stride + r] = src[r * src_stride + c];
  }
#endif
  for (int r = done; r < rows; ++r)
    for (int c = 0; c < cols; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
}

template <DType T>
inline Vec load_as(const void* data, int64_t at) {
  if constexpr (T == DType::kFloat) {
    return load(static_cast<const float*>(data) + at);
  } else if constexpr (T == DType::kBFloat16) {
    typedef uint16_t Bits __attribute__((vector_size(2 * kLanes)));
    typedef uint32_t Wide __attribute__((vector_size(4 * kLanes)));
    Bits bits;
    std::memcpy(&bits, static_cast<const uint16_t*>(data) + at, sizeof bits);
    const Wide wide = __builtin_convertvector(bits, Wide) << 16;
    Vec v;
    std::memcpy(&v, &wide, sizeof v);
    return v;
  } else {
    const uint16_t* bits = static_cast<const uint16_t*>(data) + at;
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits)));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits)));
#else
    Vec v;
    for (int l = 0; l < kLanes; ++l) v[l] = Loader<T>::at(bits, l);
    return v;
#endif
  }
}

template <DType T>
inline void copy_run(const void* data, int64_t at, int count, float* dst) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(dst + i, load_as<T>(data, at + i));
  for (; i < count; ++i) dst[i] = Loader<T>::at(data, at + i);
}

constexpr int kMaxRun = 128;  // positions loaded at a time
constexpr int kStrip = 16;    // channels transposed at a time

// Copies a block of [channel][position] to floats: dst[c * dst_stride + p]. `where` are the position
// offsets of count <= kMaxRun positions.
inline void load_channel_major(const Operand& x, const void* base, int channels, const int64_t* where,
                               int count, bool consecutive, float* dst, int64_t dst_stride) {
  with_loader(x.dtype, [&](auto loader) {
    constexpr DType kType = decltype(loader)::kType;
    if (consecutive) {
      for (int c = 0; c < channels; ++c)
        copy_run<kType>(base, c * x.channel_stride + where[0], count, dst + c * dst_stride);
    } else if (x.channel_stride == 1) {
      float strip[kMaxRun * kStrip];
      for (int c = 0; c < channels; c += kStrip) {
        const int width = channels - c < kStrip ? channels - c : kStrip;
        for (int p = 0; p < count; ++p) copy_run<kType>(base, where[p] + c, width, strip + p * kStrip);
        transpose(strip, kStrip, count, width, dst + c * dst_stride, dst_stride);
      }
    } else {
      for (int p = 0; p < count; ++p)
        for (int c = 0; c < channels; ++c)
          dst[c * dst_stride + p] = loader.at(base, c * x.channel_stride + where[p]);
    }
  });
}

// Copies a block of [position][channel] to floats: dst[p * dst_stride + c].
inline void load_position_major(const Operand& x, const void* base, int channels, const int64_t* where,
                                int count, bool consecutive, float* dst, int64_t dst_stride) {
  with_loader(x.dtype, [&](auto loader) {
    constexpr DType kType = decltype(loader)::kType;
    if (x.channel_stride == 1) {
      for (int p = 0; p < count; ++p) copy_run<kType>(base, where[p], channels, dst + p * dst_stride);
    } else if (consecutive) {
      float strip[kStrip * kMaxRun];
      for (int c = 0; c < channels; c += kStrip) {
        const int width = channels - c < kStrip ? channels - c : kStrip;
        for (int i = 0; i < width; ++i)
          copy_run<kType>(base, (c + i) * x.channel_stride + where[0], count, strip + i * kMaxRun);
        transpose(strip, kMaxRun, width, count, dst + c, dst_stride);
      }
    } else {
      for (int c = 0; c < channels; ++c)
        for (int p = 0; p < count; ++p)
          dst[p * dst_stride + c] = loader.at(base, c * x.channel_stride + where[p]);
    }
  });
}

// Base address of an operand's batch entry, its head if it has several, and object.
inline const void* base_of(const Operand& x, int64_t batch, int64_t object = 0) {
  const int64_t size = x.dtype == DType::kFloat ? 4 : 2;
  const int64_t start = batch / x.heads * x.batch_stride + batch % x.heads * x.head_stride;
  return static_cast<const char*>(x.data) + (start + object * x.object_stride) * size;
}

// Element `where` (plus a channel's offset) of a batch entry as float.
inline float load_one(const Operand& x, const void* base, int64_t where) {
  float value = 0;
  with_loader(x.dtype, [&](auto loader) { value = loader.at(base, where); });
  return value;
}

}  // namespace vosops::VOSOPS_ISA
