/* Programmatic dependent launch: a kernel may start while the one before it in the stream still runs. */
#ifndef FLASHQLA_GRID_H
#define FLASHQLA_GRID_H

/* Until the kernels that this one depends on have ended and their writes are visible. */
static __device__ __forceinline__ void grid_wait(void) { asm volatile("griddepcontrol.wait;" ::: "memory"); }

/* The next kernel may start as soon as every block has said so or ended. */
static __device__ __forceinline__ void grid_launch_dependents(void) { asm volatile("griddepcontrol.launch_dependents;"); }

#endif
