#include "cpu_isa.h"

#include <cstdlib>
#include <cstring>

#include "kecore.h"

#ifdef KECORE_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace kecore {
namespace {

#ifdef KECORE_X86

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() {
    unsigned a, b, c, d;
    return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

/* The tile registers must be offered by the processor, and by the system for this process: Linux asks for a call. */
bool has_amx() {
#if defined(KECORE_EMULATE_AMX)
    return true;
#elif defined(__linux__)
    unsigned a, b, c, d;
    if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

#endif

} // namespace

const Isa& cpu_isa() {
#ifdef KECORE_X86
    static const bool avx2 = has_avx2(), avx512 = has_avx512(), bf16 = has_avx512_bf16(), amx = has_amx();
    static const Isa widest = avx512 ? kAvx512 : avx2 ? kAvx2 : kGeneric;
    static const Isa with_pairs = {"avx512-bf16", widest.single,   &kAvx512Pairs,
                                   widest.twice,  widest.multiply, widest.solve};
    static const Isa with_tiles = {"amx-bf16", widest.single, &kAmxTiles, widest.twice, widest.multiply, widest.solve};
    const struct {
        const Isa& isa;
        bool here;
    } sets[] = {{with_tiles, amx}, {with_pairs, bf16}, {kAvx512, avx512}, {kAvx2, avx2}, {kGeneric, true}};
    const char* cap = std::getenv("KECORE_CPU_ISA");
    bool allowed = !cap || !*cap;
    for (const auto& set : sets) {
        allowed = allowed || std::strcmp(cap, set.isa.name) == 0;
        if (allowed && set.here) return set.isa;
    }
#endif
    return kGeneric;
}

} // namespace kecore

extern "C" const char* ke_cpu_isa(void) { return kecore::cpu_isa().name; }
