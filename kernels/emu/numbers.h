// 16-bit floats, bit for bit as the PTX ISA defines cvt.rn and cvt: nearest, ties to even, with subnormals,
// overflow to infinity; every NaN becomes the canonical one, 0x7fff.
#pragma once
#include <math.h>
#include <stdint.h>

namespace emu {

inline float bits_to_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

inline uint16_t float_to_bf16(float x) {
    uint32_t bits = float_to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t float_to_f16(float x) {
    uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return 0x7fff;
    if (size >= 0x47800000) return (uint16_t)(sign | 0x7c00);  // 65536 and above; 65520 rounds up to it below
    if (size < 0x38800000) {  // below 2^-14: units of 2^-24, the unit of 0.5f's last place
        float shifted = bits_to_float(size) + 0.5f;
        return (uint16_t)(sign | (float_to_bits(shifted) - 0x3f000000));
    }
    return (uint16_t)(sign | ((size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13));
}

// Without branches, so that loops over it vectorise: the exponent's offset is a multiplication, which also
// normalises subnormals.
inline float f16_to_float(uint16_t half) {
    uint32_t size = half & 0x7fff, sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t finite = float_to_bits(bits_to_float(size << 13) * 0x1p112f);
    uint32_t special = 0x7f800000 | size << 13;
    return bits_to_float(sign | (size >= 0x7c00 ? special : finite));
}

// .ftz: subnormal inputs and results are zeroes of their sign.
inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
inline float exp2_approx(float x) { return flush(exp2f(x)); }
inline float rcp_approx(float x) { return flush(1.0f / flush(x)); }

// c += a b for the columns of b, as mma does. The 16 products are added in f64 in order of k, then c, and the sum is
// rounded once. The chip adds with fewer bits in an order that it does not tell, so it may differ from this by a few
// units in the last place of the largest term.
void multiply(const uint16_t (&a)[16][16], const uint16_t (&b)[8][16], float (&c)[16][8], bool bf16);

}  // namespace emu
