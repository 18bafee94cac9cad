/* Any processor: vectors of 16 bytes, which every compiler target splits or maps as it can. */
#include "cpu_tile.h"

namespace kecore {
namespace {
typedef Plain<float, 4, 4, 2> Single;
typedef Plains<Single, Plain<double, 2, 4, 2>> All;
} // namespace

const Isa kGeneric = {"generic", &All::kSingle, nullptr, &All::kTwice, multiply<Single>, solve};

} // namespace kecore
