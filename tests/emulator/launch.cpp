/* What the fake driver calls where it is linked with the emulator. */
#include "launch.h"
#include <map>
#include <string>

static std::map<std::string, emulator_bind *> &kernels() {
    static std::map<std::string, emulator_bind *> all;
    return all;
}

void emulator_enter(const char *name, emulator_bind *bind) { kernels()[name] = bind; }

extern "C" void fake_cuda_run(const char *name, const void *parameters, unsigned int blocks, unsigned int threads) {
    emulator_launch(kernels().at(name)(parameters), blocks, threads);
}
