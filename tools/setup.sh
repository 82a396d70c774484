#!/bin/sh
# From a bare machine to a working build. Run from anywhere, as root or with sudo; what is there already is left as it is.
#
#   sh tools/setup.sh demo    build, run the golden cases, a prefill and 200 decode steps: what runs here, how fast, how exact
#   sh tools/setup.sh test    build and run every test
set -eu
cd "$(dirname "$0")/.."
mkdir -p build
log=build/setup.log

say() { printf '==> %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# compiles COMPILER FLAG...: does it make a program of stdin?
compiles() { "$@" -o build/setup.probe >/dev/null 2>&1; }

has_program() { command -v "$1" >/dev/null 2>&1; }
has_cc() { echo '#include <stdio.h>
int main(void) { return puts("") < 0; }' | compiles cc -x c -; }
has_cjson() { echo '#include <cjson/cJSON.h>
int main(void) { return cJSON_Parse("1") == NULL; }' | compiles cc -x c - -lcjson; }
has_cxx() { echo '#include <cstdio>
int main() { return std::puts("") < 0; }' | compiles "$1" -x c++ -; }
has_mingw() { echo '#include <windows.h>
int main(void) { return 0; }' | compiles x86_64-w64-mingw32-gcc -x c -; }
has_fuzzer() { echo 'int LLVMFuzzerTestOneInput(const unsigned char *p, unsigned long n);
int LLVMFuzzerTestOneInput(const unsigned char *p, unsigned long n) { return n > 9 && p[0] == 1 ? -1 : 0; }' |
    compiles clang -fsanitize=fuzzer,address -x c -; }

has_venv() { python3 -c 'import ensurepip, venv' >/dev/null 2>&1; }

# The disassembler of the kernels' images. It comes from PyPI, into a folder of its own.
has_disassembler() {
    for bin in build/venv/lib/python3*/site-packages/nvidia/cu13/bin; do
        "$bin/cuobjdump" --version && "$bin/nvdisasm" --version
    done >/dev/null 2>&1
}

missing=
# need PACKAGES CHECK...: note the packages as missing where the check fails
need() {
    packages=$1
    shift
    "$@" || missing="$missing $packages"
}

need_for_build() {
    need 'gcc libc6-dev' has_cc
    need ninja-build has_program ninja
    need libcjson-dev has_cjson
}

need_for_test() {
    need g++ has_cxx g++
    need clang has_cxx clang++
    need tcc has_program tcc
    need gcc-mingw-w64-x86-64 has_mingw
    need 'wine wine64' has_program wine
    need python3-venv has_venv
}

# Packages of the sanitizers' and the fuzzer's runtimes carry clang's version in their names.
need_for_fuzzer() {
    need "libclang-rt-$(clang -dumpversion | cut -d. -f1)-dev" has_fuzzer
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

# quietly COMMAND...: its output shown where it fails
quietly() {
    "$@" >"$log" 2>&1 </dev/null || {
        tail -n 20 "$log" >&2
        die "'$*' failed; the whole output is in $log"
    }
}

# provide NEED...: find out what is missing, install it, see that it is there
provide() {
    missing=
    for function in "$@"; do "$function"; done
    [ -n "$missing" ] || return 0
    has_program apt-get || die "missing:$missing (their names on Debian). This script installs with apt-get alone: install them by" \
        "hand (dnf: gcc ninja-build cjson-devel; pacman: gcc ninja cjson; brew: ninja cjson) and run it again"
    [ "$(id -u)" -eq 0 ] || has_program sudo || die "missing:$missing. Installing needs root: become root, or install them and run it again"
    say "installing$missing"
    quietly as_root apt-get update
    # shellcheck disable=SC2086 # a list of names
    quietly as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing
    missing=
    for function in "$@"; do "$function"; done
    [ -z "$missing" ] || die "still missing after the installation:$missing"
}

provide_disassembler() {
    has_disassembler && return
    say "installing nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm from PyPI into build/venv"
    quietly python3 -m venv --clear build/venv
    quietly build/venv/bin/pip install --disable-pip-version-check 'nvidia-cuda-cuobjdump~=13.2' 'nvidia-cuda-nvdisasm~=13.2'
    has_disassembler || die "cuobjdump and nvdisasm do not run after their installation into build/venv"
}

demo() {
    provide need_for_build
    say "building"
    ninja
    cc -O2 tools/demo.c -o build/demo -ldl -lpthread -lm
    say "this machine"
    build/flashqla info
    say "golden cases: relative L2 error of every tensor against an independent float64 recurrence"
    build/flashqla check tests/golden/*.safetensors
    say "a prefill of 8192 tokens at heads 16/32, then 200 decode steps"
    build/demo
    say "done: everything above ran and is within its tolerance"
}

run_tests() {
    provide need_for_build need_for_test
    provide need_for_fuzzer
    provide_disassembler
    say "is flashqla.h what its sources generate?"
    ninja check-header
    say "running the tests"
    ninja test
}

case ${1-} in
    demo) demo ;;
    test) run_tests ;;
    *)
        echo "usage: sh tools/setup.sh demo|test" >&2
        exit 2
        ;;
esac
