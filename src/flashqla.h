/* The header before it is one file: its parts in reading order. tools/amalgamate expands these includes into ../flashqla.h. */
#include "api.h"

#if defined(FLASHQLA_IMPLEMENTATION) && !defined(FLASHQLA_IMPLEMENTED)
#define FLASHQLA_IMPLEMENTED

#include "system.h"
#include "status.h"
#include "memory.h"
#include "platform.h"
#include "cpu_level.h"
#include "cpu_subnormals.h"
#include "cpu_pool.h"
#ifndef FLASHQLA_NO_CUDA
#include "library.h"
#include "cuda_params.h"
#include "cuda_backward_params.h"
#include "cuda_driver.h"
#include "cuda_kernels.h"
#endif
#include "objects.h"
#include "cpu_convert.h"
#include "cpu_gates.h"
#include "cpu_rows.h"
#include "cpu_step.h"
#include "cpu_step_x86.h"
#include "cpu_forward.h"
#include "cpu_matmul.h"
#include "cpu_strip.h"
#include "cpu_backward.h"
#ifndef FLASHQLA_NO_CUDA
#include "cuda_device.h"
#include "cuda_schedule.h"
#include "cuda_backward_schedule.h"
#include "cuda_table.h"
#include "cuda_windows.h"
#include "cuda_forward.h"
#include "cuda_backward.h"
#else
#include "cuda_absent.h"
#endif
#include "context.h"
#include "plan.h"
#include "check.h"
#include "run.h"

#endif /* FLASHQLA_IMPLEMENTATION */

#include "licence.h"
