#!/bin/sh
# ptx.sh SOURCE NAME DIR [-DMACRO...]: compile one variant of a kernel to DIR/NAME.cubin and DIR/NAME.fatbin (`ninja ptx` calls it).
#
# The cubin is what a current driver loads. The fatbin holds the PTX for a driver that refuses the cubin: at .version 8.0, the oldest
# that assembles wgmma (a hint that only later versions know is dropped), and compressed without zstd, which drivers before 550 cannot
# read. What ptxas says of either is an error where it serialised the wgmma (C75..), spilled or made a stack frame. The same source
# gives the same bytes wherever it lies.
set -eu
PATH=$PATH:/usr/local/cuda/bin # where the toolkit installs itself
source=$1 name=$2 dir=$3
shift 3
log=$dir/$name.log

nvcc -gencode arch=compute_90a,code=sm_90a -frandom-seed="$name" "$@" -cubin -Xptxas -v -MMD -MF "$dir/$name.cubin.d" \
    "$source" -o "$dir/$name.cubin" 2>"$log" || { cat "$log" >&2; exit 1; }
nvcc -arch=compute_90a -frandom-seed="$name" "$@" -ptx "$source" -o "$dir/$name.9.ptx"
sed -e 's/^\.version .*/.version 8.0/' -e '/\.pragma "used_bytes_mask/d' "$dir/$name.9.ptx" >"$dir/$name.ptx"
ptxas -arch=sm_90a -v "$dir/$name.ptx" -o "$dir/$name.ptx.cubin" 2>>"$log" || { cat "$log" >&2; exit 1; }
fatbinary -64 --create="$dir/$name.fatbin" --compress-mode=speed --image3=kind=ptx,sm=90a,file="$dir/$name.ptx"
rm -f "$dir/$name.9.ptx" "$dir/$name.ptx.cubin"

if grep -E 'C75[0-9][0-9]' "$log" >&2; then
    echo "ptx.sh: $name: ptxas serialised the wgmma" >&2
    exit 1
fi
if grep -E 'stack frame' "$log" | grep -vE '^ *0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads$' >&2; then
    echo "ptx.sh: $name: a stack frame or spills" >&2
    exit 1
fi
grep -E 'Used [0-9]+ registers' "$log" | head -1 | sed "s/^ptxas info *: /$name: /"
