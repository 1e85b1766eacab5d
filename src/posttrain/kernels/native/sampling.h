/* What sampling.cpp offers to other files of this library. */
#ifndef POSTTRAIN_SAMPLING_H
#define POSTTRAIN_SAMPLING_H

#include "posttrain.h"

/* pt_sample for callers that are `guarded`. */
int32_t sample(float *logits, int32_t vocabulary, const pt_draw &draw);

#endif
