#ifndef POSTTRAIN_DISPATCH_H
#define POSTTRAIN_DISPATCH_H

#include "kernels.h"

/* The kernels in use: the best this processor has, unless pt_use chose others. */
const Kernels &active_kernels();

#endif
