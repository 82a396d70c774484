/* One kernel, -DKERNEL=name -DSOURCE="ptx/file.cu", compiled as C++. The emulator's headers come first: they bear the guards of
   ptx/'s. */
#include "emulator.h"
#include "launch.h"

#include "ptx/grid.h"
#include "ptx/instructions.h"
#include "ptx/mma.h"
#include "ptx/progress.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"

#include SOURCE

template <typename P> static std::function<void()> bind(void (*function)(P), const void *parameters) {
    alignas(64) P copy;
    memcpy(&copy, parameters, sizeof copy);
    return [=] { function(copy); };
}

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
static const int entered = (emulator_enter(TEXT(KERNEL), [](const void *parameters) { return bind(KERNEL, parameters); }), 0);
