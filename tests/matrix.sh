#!/bin/sh
# matrix.sh DIR COMPILER FLAGS...: the header with one compiler: with the implementation in a unit of its own, FLASHQLA_STATIC in
# one unit, and FLASHQLA_NO_CUDA, unoptimised and at -O2, warnings as errors. Each program is run; of Windows' only where wine is
# there. Ends with the line of a test runner.
set -u
dir=$1
shift
mkdir -p "$dir"
passed=0 failed=0 skipped=0
libs='-ldl -lpthread -lm' suffix='' wine=''
case $1 in
*mingw*) libs='' suffix='.exe' wine=$(command -v wine64 || command -v wine) || wine=none ;;
esac
export WINEPREFIX="$PWD/build/wine" WINEDEBUG=-all

# variant NAME SOURCES AND FLAGS...
variant() {
    program=$dir/$1$suffix
    shift
    # shellcheck disable=SC2086 # libs and compiler are lists of words
    if ! $compiler -Wall -Wextra -pedantic -Wshadow -Wconversion -Werror -I. "$@" -o "$program" $libs; then
        echo "$compiler $*: does not build"
        failed=$((failed + 1))
    elif [ "$wine" = none ]; then
        skipped=$((skipped + 1))
    elif ! $wine "$program"; then
        echo "$program: does not run"
        failed=$((failed + 1))
    else
        passed=$((passed + 1))
    fi
}

compiler=$*
for level in -O0 -O2; do
    variant "two_units$level" $level tests/small.c tests/flashqla.c
    variant "no_cuda$level" $level -DFLASHQLA_NO_CUDA tests/small.c tests/flashqla.c
    variant "static$level" $level -DFLASHQLA_IMPLEMENTATION -DFLASHQLA_STATIC tests/small.c
done
# a private copy beside the public one
variant private_copy -O0 tests/private_copy.c tests/flashqla.c
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
