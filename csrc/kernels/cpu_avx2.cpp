/* AVX2 with FMA: 16 registers of 32 bytes. */
#include "cpu_isa.h"
#ifdef KECORE_X86
#include <cstdint>
#include <cstring>
KECORE_TARGET_BEGIN("avx2,fma")
#include "cpu_tile.h"

namespace kecore {
namespace {
typedef Plain<float, 8, 6, 2> Single;
typedef Plains<Single, Plain<double, 4, 6, 2>> All;
} // namespace

const Isa kAvx2 = {"avx2", &All::kSingle, nullptr, &All::kTwice, multiply<Single>, solve};

} // namespace kecore
KECORE_TARGET_END
#endif
