#!/bin/sh
# kernels.sh VENV TABLE IMAGE.cubin...: what the kernels' images are made of, by cuobjdump and nvdisasm, which tools/setup.sh puts
# into VENV. Each image holds the kernel that it is named after, keeps everything in registers (no stack frame, no local memory, no
# spills) and multiplies with wgmma where it has a product; its registers, static shared memory, parameters and threads are those of TABLE, which has a
# line for each image and none besides. So a change of a kernel that costs registers is seen. Exit 1 where one is not so.
set -u
venv=$1 table=$2
shift 2
for bin in "$venv"/lib/python3*/site-packages/nvidia/cu13/bin; do :; done
for tool in cuobjdump nvdisasm; do
    [ -x "$bin/$tool" ] || { echo "kernels: no $tool in $venv; sh tools/setup.sh test installs it" && exit 1; }
done
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0

# check WORDS COMMAND...: does it succeed? Else the words say what is wrong.
check() {
    words=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
        return 0
    fi
    failed=$((failed + 1))
    echo "kernels: $words"
    return 1
}

# instructions NAMES: how many of these the image has; NAMES is an extended regular expression
instructions() { grep -cE "^ *(/\*[0-9a-f]+\*/)? *(@!?U?P[0-9T]+ +)?($1)[. ]" "$dir/code"; }

# what the two tools say of the image
read_image() {
    "$bin/cuobjdump" --dump-resource-usage "$image" >"$dir/usage" && "$bin/cuobjdump" -elf "$image" >"$dir/elf" &&
        "$bin/nvdisasm" -c "$image" >"$dir/code"
}

# usage KEY: the number after KEY: in cuobjdump's words
usage() { sed -n "s/.*[ []$1:\([0-9]*\).*/\1/p" "$dir/usage"; }

for image; do
    name=$(basename "$image" .cubin)
    check "$image: cannot be read" read_image || continue
    threads=$(sed -n '/EIATTR_MAX_THREADS/,/Value/s/.*Value:[[:space:]]*\(0x[0-9a-f]*\).*/\1/p' "$dir/elf")
    parameters=0
    for size in $(sed -n 's/.*Size[[:space:]]*: \(0x[0-9a-f]*\).*/\1/p' "$dir/elf"); do parameters=$((parameters + size)); done
    echo "$name $(usage REG) $(usage SHARED) $parameters $((${threads:-0}))" >>"$dir/found"

    functions=$(sed -n 's/ *Function \(.*\):/\1/p' "$dir/usage")
    check "$image: holds $functions, not the kernel of its name alone" [ "$functions" = "$name" ]
    check "$image: a stack frame of $(usage STACK) bytes" [ "$(usage STACK)" = 0 ]
    check "$image: $(usage LOCAL) bytes of local memory" [ "$(usage LOCAL)" = 0 ]
    check "$image: $(instructions 'LDL|STL') loads and stores of local memory" [ "$(instructions 'LDL|STL')" -eq 0 ]
    check "$image: no code that nvdisasm knows" [ "$(instructions 'MOV|IMAD|EXIT')" -gt 0 ]
    case $image in
        */backward_sums.cubin) ;; # it adds up, no more
        *) check "$image: no HGMMA, the tensor cores' instruction" [ "$(instructions HGMMA)" -gt 0 ] ;;
    esac
done

sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$table" | tr -s ' \t' ' ' | sed 's/ $//' | sort >"$dir/expected"
sort -o "$dir/found" "$dir/found"
while read -r line; do
    check "$table lacks: $line" grep -qxF "$line" "$dir/expected"
done <"$dir/found"
while read -r line; do
    grep -qxF "$line" "$dir/found" || check "$table has, and no image: $line" false
done <"$dir/expected"
[ $failed -eq 0 ] || echo "kernels: where a kernel is meant to be so, $table takes the lines that it lacks"
echo "$passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
