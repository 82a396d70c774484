/* Kernels by name: kernel.cpp enters them, launch.cpp runs them for the fake driver. */
#ifndef EMULATOR_LAUNCH_H
#define EMULATOR_LAUNCH_H

#include <functional>

typedef std::function<void()> emulator_bind(const void *parameters); /* a call with a copy of them */
void emulator_enter(const char *name, emulator_bind *bind);
void emulator_launch(std::function<void()> call, unsigned int blocks, unsigned int block_threads);

#endif
