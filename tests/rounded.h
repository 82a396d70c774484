/* What 16-bit operands cost: the chunked forward and backward in float64, but with everything rounded that the Hopper kernels round
   (the headers of ptx/prepare.cu, forward.cu, backward_chains.cu and backward_gradients.cu have the formulas). The same
   problem as the oracle's; against the oracle's results it says how exact a kernel can be on these very inputs. Heads of 128; dtype:
   that of q, k, v, o, float32: nothing is rounded, and the results are the oracle's. */
#ifndef ROUNDED_H
#define ROUNDED_H

#include "oracle.h"

/* x to the nearest bfloat16 or float16, ties to even; other types: x. */
double rounded(double x, fqla_dtype dtype);

void rounded_forward(const oracle *p, fqla_dtype dtype); /* without snapshots */
void rounded_backward(const oracle *p, fqla_dtype dtype);

#endif
