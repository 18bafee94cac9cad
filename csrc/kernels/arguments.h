/* What every implementation refuses before it reads a matrix. */
#ifndef KE_ARGUMENTS_H
#define KE_ARGUMENTS_H

#include "kecore.h"

namespace kecore {

/* KE_OK or why the arguments of a second moment are wrong. */
inline int check_moment(const ke_moment_layer* layers, int n_layers, int key_dtype, int moment_dtype) {
    if (n_layers < 0 || (layers == nullptr && n_layers > 0)) return KE_BAD_ARGUMENT;
    if (n_layers > KE_MAX_LAYERS) return KE_TOO_LARGE;
    if (key_dtype != KE_F32 && key_dtype != KE_F16 && key_dtype != KE_BF16) return KE_BAD_DTYPE;
    if (moment_dtype != KE_F32 && moment_dtype != KE_F64) return KE_BAD_DTYPE;
    for (int i = 0; i < n_layers; ++i) {
        const ke_moment_layer& layer = layers[i];
        if (layer.tokens < 0 || layer.d < 0 || layer.n_rows < 0) return KE_BAD_ARGUMENT;
        if (layer.key_stride < layer.d && layer.tokens > 1) return KE_BAD_ARGUMENT;
        if (layer.moment_stride < layer.d && layer.d > 1) return KE_BAD_ARGUMENT;
        if (layer.rows != nullptr && layer.mask != nullptr) return KE_BAD_ARGUMENT;
        if (layer.d > 0 && layer.moment == nullptr) return KE_BAD_ARGUMENT;
        if (layer.d > 0 && layer.tokens > 0 && layer.keys == nullptr) return KE_BAD_ARGUMENT;
    }
    return KE_OK;
}

/* KE_OK or why the arguments of a batch of systems are wrong. */
inline int check_gram_solve(const ke_gram_solve_args* args) {
    if (args == nullptr) return KE_BAD_ARGUMENT;
    const ke_gram_solve_args& a = *args;
    if (a.batch < 0 || a.d < 0 || a.n < 1 || a.c < 0 || a.u < 0 || a.c > a.n) return KE_BAD_ARGUMENT;
    if (a.shares == nullptr && a.c != a.u) return KE_BAD_ARGUMENT;
    if (a.batch == 0) return KE_OK;
    if (a.ridge == nullptr || a.pivots == nullptr) return KE_BAD_ARGUMENT;
    if (a.gram == nullptr || (a.u > 0 && a.weights == nullptr)) return KE_BAD_ARGUMENT;
    return a.d > 0 && a.white == nullptr ? KE_BAD_ARGUMENT : KE_OK;
}

}  // namespace kecore

#endif
