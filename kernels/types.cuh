// Integers of fixed width and offsets, where the run-time compiler has no headers of the host.
#pragma once
#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef short int16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
typedef unsigned long long uintptr_t;
#define INFINITY __int_as_float(0x7f800000)
#define OFFSET_OF(type, member) __INTADDR__(&((type*)0)->member)
#else
#include <cmath>
#include <cstddef>
#include <cstdint>
#define OFFSET_OF(type, member) offsetof(type, member)
#endif
