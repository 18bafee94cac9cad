/* AVX-512: 32 registers of 64 bytes. */
#include "cpu_isa.h"
#ifdef KECORE_X86
#include <cstdint>
#include <cstring>
KECORE_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "cpu_tile.h"

namespace kecore {
namespace {
typedef Plain<float, 16, 8, 3> Single;
typedef Plains<Single, Plain<double, 8, 8, 3>> All;
} // namespace

const Isa kAvx512 = {"avx512", &All::kSingle, nullptr, &All::kTwice, multiply<Single>, solve};

} // namespace kecore
KECORE_TARGET_END
#endif
