#!/bin/sh
# test_cli.sh FLASHQLA CLI_FILES FAKE_CUDA: the command line's words and exit codes: misuse, files that are no good, round trips of
# good ones. FAKE_CUDA: the folder of the fake driver. Says what did not hold, and at the end how many checks there were; exit 1 if
# one did not hold.
set -u
flashqla=$1 cli_files=$2 fake_cuda=$3
for program in "$flashqla" "$cli_files" "$fake_cuda/libcuda.so.1"; do
    [ -x "$program" ] || { echo "test_cli: no program $program" && exit 1; }
done
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
checks=0 wrong=0

report() {
    checks=$((checks + 1))
    [ "$1" = yes ] && return
    wrong=$((wrong + 1))
    echo "test_cli: $2"
    sed 's/^/    /' "$dir/err" | cut -c 1-300 | head -n 5
}

# expect CODE PATTERN ARGUMENTS...: the exit code, and a line of stderr that PATTERN matches; with code 1 it is the only line
expect() {
    code=$1 pattern=$2
    shift 2
    timeout 60 "$flashqla" "$@" >"$dir/out" 2>"$dir/err" </dev/null
    got=$?
    ok=yes
    [ $got -eq "$code" ] || ok=no
    [ -z "$pattern" ] || grep -q -e "$pattern" "$dir/err" || ok=no
    [ "$code" -ne 1 ] || [ "$(wc -l <"$dir/err")" -eq 1 ] || ok=no
    report $ok "flashqla $*: exit $got, expected $code and '$pattern'"
}

# says PATTERN: a line of the last command's stdout
says() {
    if grep -q -e "$1" "$dir/out"; then report yes; else report no "stdout lacks '$1'"; fi
}

# ---- misuse: exit 2, a word on stderr, nothing on stdout
misuse() {
    expect 2 . "$@"
    if [ -s "$dir/out" ]; then report no "flashqla $*: misuse, and words on stdout"; fi
}
misuse
misuse fly
misuse --backend cpu
misuse run
misuse run a.safetensors
misuse run -o b.safetensors
misuse run a.safetensors b.safetensors -o c.safetensors
misuse run a.safetensors -o
misuse run a.safetensors -o b.safetensors -o c.safetensors
misuse run a.safetensors -o b.safetensors --backwards
misuse run a.safetensors -o b.safetensors --backward=1
misuse check
misuse check --tolerance 1 a.safetensors
misuse bench
misuse bench --rows
misuse bench --row 'fwd 1 2'
misuse bench --row 'fwd 1 2 64,'
misuse bench --row 'fwd 1 2 64 64'
misuse bench --row 'fwd 1 x 64'
misuse bench --row 'sideways 1 2 64'
misuse bench --row 'decode 1 2 0'
misuse bench --row 'fwd 1 2 64' stray
misuse bench --all-plans
misuse bench --all-plans=1 --row 'fwd 1 2 64'
misuse bench --all-plans --row 'fwd 1 2 64' --against "$0"
misuse bench --all-plans --row 'bwd 1 2 64' --row 'decode 1 2 3'
misuse bench --all-plans --row 'fwd 1 2'
misuse info stray
for command in info run check bench; do
    misuse $command --no-such-option
    misuse $command --backend tpu
    misuse $command --backend
    misuse $command --threads 0
    misuse $command --threads -1
    misuse $command --threads many
    misuse $command --threads 99999999999999999999
    expect 0 '' $command --help
    says "usage: flashqla $command"
    says '--backend'
done
expect 0 '' --help
says 'usage: flashqla'

expect 0 '' info --backend cpu
says 'cpu: ready'
expect 0 '' info
if ! "$flashqla" info --backend cuda >/dev/null 2>&1; then
    expect 1 . info --backend cuda
    says 'cuda: cannot be used: .'
    expect 1 . check --backend cuda "$dir/any.safetensors"
fi

# ---- files that are no good: exit 1 and one line, at once, and nothing written
# byte N: the character of code N
byte() { printf "\\$(printf %03o "$1")"; }

# store FILE HEADER DATA_BYTES: a file with zeros for data
store() {
    size=$(printf %s "$2" | wc -c)
    {
        byte $((size % 256)) && byte $((size / 256 % 256)) && byte $((size / 65536)) && printf '\0\0\0\0\0'
        printf %s "$2"
        head -c "$3" /dev/zero
    } >"$1"
}

# refused PATTERN: $dir/bad is refused by run and by check, with that word
refused() {
    rm -f "$dir/never"
    expect 1 "$1" run --backend cpu "$dir/bad" -o "$dir/never"
    if [ -s "$dir/out" ] || [ -e "$dir/never" ]; then report no "something was written"; fi
    expect 1 "$1" check --backend cpu "$dir/bad"
}

good='{"q":{"dtype":"F32","shape":[1,1,8],"data_offsets":[0,32]},"k":{"dtype":"F32","shape":[1,1,8],"data_offsets":[32,64]},'
good=$good'"v":{"dtype":"F32","shape":[1,1,8],"data_offsets":[64,96]},"g":{"dtype":"F32","shape":[1,1],"data_offsets":[96,100]},'
good=$good'"beta":{"dtype":"F32","shape":[1,1],"data_offsets":[100,104]},"o":{"dtype":"F32","shape":[1,1,8],"data_offsets":[104,136]}}'
store "$dir/good" "$good" 136
expect 0 '' run --backend cpu "$dir/good" -o "$dir/out.safetensors"
expect 0 '' check --backend cpu "$dir/good"
store "$dir/good" "$good    " 136 # spaces may follow
expect 0 '' check --backend cpu "$dir/good"

expect 1 'cannot be opened' run "$dir/absent" -o "$dir/never"
expect 1 'regular file' run "$dir" -o "$dir/never"
: >"$dir/bad" && refused 'not a safetensors file'
printf '\1\2\3' >"$dir/bad" && refused 'not a safetensors file'
head -c 20 "$dir/good" >"$dir/bad" && refused 'cut off'
head -c 400 "$dir/good" >"$dir/bad" && refused 'ends at byte\|cut off'
printf '\377\377\377\377\377\377\377\377{}' >"$dir/bad" && refused 'cut off'
printf '\0\0\0\0\0\0\0\200{}' >"$dir/bad" && refused 'cut off'
head -c 8 /dev/zero >"$dir/bad" && refused 'not a JSON object'
store "$dir/bad" "$good" 135 && refused 'ends at byte'
store "$dir/bad" "$good" 137 && refused 'belong to none'
{ printf '\0\341\365\5\0\0\0\0' && head -c 100000000 /dev/zero | tr '\0' '['; } >"$dir/bad" && refused 'header of 100000000 bytes'
store "$dir/bad" "{\"a\":$(head -c 900000 /dev/zero | tr '\0' '[')" 0 && refused 'not a JSON object'
store "$dir/bad" "{\"a\":[$(head -c 300000 /dev/zero | sed 's/\x0/[],/g')[]]}" 0 && refused '"a"'

# mutated PATTERN SED [DATA_BYTES]: the good header after a sed command
mutated() {
    store "$dir/bad" "$(printf %s "$good" | sed "$2")" "${3-136}"
    refused "$1"
}
mutated 'not a JSON object' 's/^{/[/'
mutated 'not a JSON object' 's/}$//'
mutated 'not a JSON object' 's/$/x/'
mutated 'UTF-8' "s/\"g\"/\"g$(byte 255)\"/"
mutated 'UTF-8' "s/\"g\"/\"g$(byte 192)$(byte 128)\"/"
mutated 'UTF-8' "s/\"g\"/\"g$(byte 237)$(byte 160)$(byte 128)\"/"
mutated 'UTF-8' "s/\"g\"/\"g$(byte 226)$(byte 130)\"/"
mutated 'zero in a string' 's/"g"/"g\\u0000"/'
mutated 'twice' 's/"k"/"q"/'
mutated 'twice' 's/^{/{"__metadata__":{"a":"1","a":"2"},/'
mutated '__metadata__' 's/^{/{"__metadata__":1,/'
mutated '__metadata__' 's/^{/{"__metadata__":{"a":1},/'
mutated '"k" is not' 's/"k":{[^}]*}/"k":7/'
mutated '"k" is not' 's/"k":{"dtype":"F32",/"k":{/'
mutated '"k" is not' 's/"k":{"dtype"/"k":{"dtype":"F32","dtype"/'
mutated '"k" is not' 's/"k":{"dtype":"F32"/"k":{"dtype":32/'
mutated 'unknown dtype' 's/"k":{"dtype":"F32"/"k":{"dtype":"F33"/'
mutated 'dtype' 's/"k":{"dtype":"F32"/"k":{"dtype":"I32"/'
mutated 'dtype' 's/"k":{"dtype":"F32","shape":\[1,1,8\]/"k":{"dtype":"F64","shape":[1,1,4]/'
mutated 'whole numbers' 's/"k":\({"dtype":"F32","shape":\)\[1,1,8\]/"k":\1[1,-1,8]/'
mutated 'whole numbers' 's/"k":\({"dtype":"F32","shape":\)\[1,1,8\]/"k":\1[1,1.5,8]/'
mutated 'whole numbers' 's/"k":\({"dtype":"F32","shape":\)\[1,1,8\]/"k":\1[1,1e300,8]/'
mutated 'whole numbers' 's/"k":\({"dtype":"F32","shape":\)\[1,1,8\]/"k":\1["1",1,8]/'
mutated 'overflows' 's/"k":\({"dtype":"F32","shape":\)\[1,1,8\]/"k":\1[4294967296,4294967296,8]/'
mutated 'over 8 dimensions' 's/"k":\({"dtype":"F32","shape":\)\[1,1,8\]/"k":\1[1,1,1,1,1,1,1,1,8]/'
mutated 'its shape and dtype make' 's/"k":\({"dtype":"F32","shape":\)\[1,1,8\]/"k":\1[1,1,16]/'
mutated 'dimensions' 's/"k":\({"dtype":"F32","shape":\)\[1,1,8\]/"k":\1[8]/'
mutated 'the others make it' 's/"k":\({"dtype":"F32","shape":\)\[1,1,8\]/"k":\1[1,8,1]/'
mutated 'the others make it' 's/"v":\({"dtype":"F32","shape":\)\[1,1,8\]/"v":\1[2,1,4]/'
mutated 'the others make it' 's/"g":\({"dtype":"F32","shape":\)\[1,1\],"data_offsets":\[96,100\]},"beta".*$/"g":\1[2,1],"data_offsets":[96,104]},"beta":{"dtype":"F32","shape":[1,1],"data_offsets":[104,108]}}/' 108
mutated 'data_offsets' 's/\[32,64\]/[64,32]/'
mutated 'data_offsets' 's/\[32,64\]/[32]/'
mutated 'data_offsets' 's/\[32,64\]/[32,64,96]/'
mutated 'data_offsets' 's/\[32,64\]/[-32,0]/'
mutated 'data_offsets' 's/\[32,64\]/["32","64"]/'
mutated 'ends at byte' 's/\[32,64\]/[9007199254740960,9007199254740992]/'
mutated 'data_offsets' 's/\[32,64\]/[18446744073709551584,18446744073709551616]/'
mutated 'overlap' 's/\[32,64\]/[16,48]/'
mutated 'overlap' 's/\[32,64\]/[0,32]/'
mutated 'hole' 's/\[104,136\]/[108,140]/' 140
mutated '"v" is missing' 's/"v"/"w"/'
mutated 'scale' 's/^{/{"__metadata__":{"scale":"big"},/'
mutated 'scale' 's/^{/{"__metadata__":{"scale":"nan"},/'
mutated 'scale' 's/^{/{"__metadata__":{"scale":"0"},/'
mutated 'state_layout' 's/^{/{"__metadata__":{"state_layout":"N,H"},/'
mutated 'head_map' 's/^{/{"__metadata__":{"head_map":"2"},/'
mutated 'l2norm' 's/^{/{"__metadata__":{"l2norm":"yes"},/'
mutated 'multiple' 's/\[1,1,8\]/[1,1,4]/g; s/"data_offsets":.*$/"data_offsets":[0,16]},"k":{"dtype":"F32","shape":[1,1,4],"data_offsets":[16,32]},"v":{"dtype":"F32","shape":[1,1,4],"data_offsets":[32,48]},"g":{"dtype":"F32","shape":[1,1],"data_offsets":[48,52]},"beta":{"dtype":"F32","shape":[1,1],"data_offsets":[52,56]},"o":{"dtype":"F32","shape":[1,1,4],"data_offsets":[56,72]}}/' 72

# seqlens PATTERN COUNT BYTES...: borders of 32 bits, in octal escapes
seqlens() {
    {
        header=$(printf %s "$good" | sed "s/^{/{\"cu_seqlens\":{\"dtype\":\"I32\",\"shape\":[$2],\"data_offsets\":[136,$((136 + 4 * $2))]},/")
        store "$dir/bad" "$header" 136
        printf "$3" >>"$dir/bad"
        refused "$1"
    }
}
seqlens '2 or more' 1 '\0\0\0\0'
seqlens 'ends at 0' 2 '\0\0\0\0\0\0\0\0'
seqlens 'cu_seqlens' 2 '\1\0\0\0\1\0\0\0'
seqlens 'cu_seqlens' 2 '\0\0\0\0\377\377\377\377'
seqlens 'cu_seqlens' 2 '\0\0\0\0\2\0\0\0'
seqlens 'cu_seqlens' 3 '\0\0\0\0\2\0\0\0\1\0\0\0'

mutated_check() {
    store "$dir/bad" "$(printf %s "$good" | sed "$2")" "${3-136}"
    expect 1 "$1" check --backend cpu "$dir/bad"
}
mutated_check 'no expected output' 's/"o"/"p"/'
mutated_check 'another shape' 's/"o":\({"dtype":"F32","shape":\)\[1,1,8\]/"o":\1[1,8,1]/'
mutated_check '"o" has dtype I32' 's/"o":{"dtype":"F32"/"o":{"dtype":"I32"/'
mutated_check '"do" is missing' 's/"o":\({"dtype":"F32","shape":\)\[1,1,8\]/"dq":\1[1,1,8]/'
expect 1 '"do" is missing' run --backend cpu --backward "$dir/good" -o "$dir/never"
expect 1 'cannot be written' run --backend cpu "$dir/good" -o "$dir/no/such/folder"
expect 1 'cannot be written' run --backend cpu "$dir/good" -o /dev/full
echo precious >"$dir/kept"
expect 1 . run --backend cpu "$dir/absent" -o "$dir/kept"
[ "$(cat "$dir/kept")" = precious ] && report yes || report no 'a failed run touched its output'
if ls "$dir"/*.part >/dev/null 2>&1; then report no 'a temporary file is left'; fi

# ---- good files: what run writes, check accepts; all dtypes, layouts and dimensions
round_trip() {
    "$cli_files" problem "$dir/in" "$@"
    expect 0 '' run --backend cpu --backward "$dir/in" -o "$dir/out.safetensors"
    "$cli_files" merge "$dir/in" "$dir/out.safetensors" "$dir/both"
    expect 0 '' check --backend cpu --threads 1 "$dir/both"
    [ "$(grep -c ' ok$' "$dir/out")" -eq 8 ] && report yes || report no "not 8 tensors were checked: $*"
}
round_trip
round_trip dtype=F16 gates=BF16 states=BF16 seqlens=I64
round_trip dtype=F32 gates=F16 states=none seqlens=none
round_trip dtype=F16 do=F32 hk=2 hv=4 map=mod layout=N,H,V,K l2norm=1 scale=0.25
round_trip dk=8 dv=256 dtype=F32 tokens=9
round_trip tokens=0 seqlens=none
strings=$(tr -d '\0' <"$dir/out.safetensors" | head -c 400)
for word in '"scale":"0.0883883461"' '"state_layout":"N,H,K,V"' '"head_map":"div"' '"l2norm":"0"'; do
    case $strings in
        *"$word"*) report yes ;;
        *) report no "the output's metadata lacks $word" ;;
    esac
done

"$cli_files" problem "$dir/in" && expect 0 '' run --backend cpu "$dir/in" -o "$dir/out.safetensors"
"$cli_files" merge "$dir/in" "$dir/out.safetensors" "$dir/both"
expect 0 '' check --backend cpu "$dir/both"
[ "$(grep -c ' ok$' "$dir/out")" -eq 2 ] && report yes || report no 'a forward alone writes o and ht'
expect 0 '' run --backend cpu "$dir/in" -o "$dir/in" # over itself
expect 0 '' run --backend=cpu -o "$dir/again" --threads=2 -- "$dir/both"
cmp -s "$dir/again" "$dir/out.safetensors" && report yes || report no 'two runs wrote different bytes'

"$cli_files" poke "$dir/both" ht 9 "$dir/off" 2>"$dir/err"
timeout 60 "$flashqla" check --backend cpu "$dir/both" "$dir/off" "$dir/both" >"$dir/out" 2>"$dir/err"
[ $? -eq 1 ] && report yes || report no 'a wrong ht passes'
says 'off  ht .*FAILED'
says 'both  ht .*ok'
"$cli_files" poke "$dir/both" o nan "$dir/off"
timeout 60 "$flashqla" check --backend cpu "$dir/off" >"$dir/out" 2>"$dir/err"
[ $? -eq 1 ] && report yes || report no 'a NaN passes'
timeout 60 "$flashqla" check --backend cpu "$dir/absent" "$dir/both" >"$dir/out" 2>"$dir/err"
[ $? -eq 1 ] && report yes || report no 'a missing file passes'
says 'both  ht .*ok'
"$flashqla" check --backend cpu "$dir/both" >/dev/full 2>"$dir/err"
[ $? -eq 1 ] && report yes || report no 'a full disk passes'

# ---- bench
printf '# rows\n\nfwd 1 2 64,0,7 # three sequences\nbwd 1 2 70\n  decode 2 4 3\r\n' >"$dir/rows"
{
    echo '{"op": "matmul8192", "tflops": 705.0}'
    echo '{"op": "fwd", "h_qk": 1, "h_v": 2, "lens": [64, 0, 7], "ms": {"near": 1.0, "far": null}}'
    echo '{"op": "acc", "lens": "none", "rel": {}}'
    echo '{"op": "fwd", "h_qk": 1, "h_v": 2, "lens": [64, 0, 8], "ms": {"other": 1.0}}'
} >"$dir/peers"
expect 0 '' bench --backend cpu --rows "$dir/rows" --row 'fwd 1 1 8' --against "$dir/peers" --json "$dir/json"
says 'fwd 1/2 3 of 71 '
says ' near'
tail -n 4 "$dir/out" | head -n 1 | grep -q 'geometric means' && report yes || report no 'geometric means do not come last'
if grep -q 'far\|other' "$dir/out"; then report no 'a null time or another row counts'; fi
[ "$(grep -c '^{"op":.*"h_qk":.*"ms":{"ours":[0-9].*"plan":".*"floor":.*"tflops":.*"gbs":.*}$' "$dir/json")" -eq 4 ] &&
    report yes || report no 'the JSON lines lack something'
grep -q '"lens":\[64,0,7\],"ms":{"ours":[0-9.]*,"near":1}' "$dir/json" && report yes || report no 'the JSON line lacks its peer'
expect 0 '' bench --backend cpu --row 'fwd 1 2 64,0,7' --against "$dir/json"
says ' near'
printf 'fwd 1 2 64\nfwd 1 2\n' >"$dir/rows" && expect 1 'rows:2' bench --rows "$dir/rows"
printf '# none\n' >"$dir/rows" && expect 1 'no rows' bench --rows "$dir/rows"
expect 1 'cannot be read' bench --rows "$dir/absent"
echo '{"op": "fwd"' >"$dir/peers" && expect 1 'peers:1' bench --row 'fwd 1 2 64' --against "$dir/peers"
expect 1 'cannot be written' bench --backend cpu --row 'fwd 1 2 64' --json "$dir/no/such/folder"

# ---- bench --all-plans: nothing to choose on the CPU; on a GPU every choice, here on the fake, where a launch takes a microsecond
misuse bench --all-plans --backend cpu --row 'fwd 1 2 64'
expect 2 'needs a GPU.*nothing to choose (CUDA: not asked' bench --all-plans --backend cpu --row 'fwd 1 2 64' --json "$dir/never"
if [ -e "$dir/never" ]; then report no "bench --all-plans on the CPU wrote $dir/never"; fi
expect 0 '' bench --help
says '--all-plans'
export LD_LIBRARY_PATH="$fake_cuda"
expect 0 '' bench --backend cuda --row 'fwd 1 2 64,0,7' --row 'decode 1 2 3' --json "$dir/json"
says 'on Fake GPU 0, bf16'
[ "$(grep -c '"ms":{"ours":0.002}' "$dir/json")" -eq 2 ] && report yes || report no 'a prepare and a forward are two launches'
expect 0 '' bench --backend cuda --row 'bwd 1 2 64' --json "$dir/json"
[ "$(grep -c '"ms":{"ours":0.002}' "$dir/json")" -eq 1 ] && report yes || report no 'chains and gradients are two launches'
expect 0 '' bench --backend cuda --low-memory --row 'bwd 1 2 64' --row 'fwd 1 2 64'
says 'backward in windows of 256 chunks$'
eight=1024,1024,1024,1024,1024,1024,1024,1024
expect 0 '' bench --all-plans --row 'fwd 2 8 8192' --row 'decode 1 2 3' --row "fwd 1 1 $eight" --json "$dir/json"
says '^fwd 2/8 1x8192$'
says '^decode 1/2 3: no fwd row, left out$'
# V in, segments, chunks each, time, the model's; the marked line comes first
[ "$(grep -c '^ \* ' "$dir/out")" -eq 2 ] && report yes || report no 'not one choice of each row is marked'
says '^ \* .* 0\.00[24]0 .*[0-9]$'
says '^ *1 *1 *- *0\.0020 *[0-9.]*$'
says '^ *2 *1 *- *0\.0020 *[0-9.]*$'
says '^ *1 *2 *64 *0\.0040 *[0-9.]*$'
says '^ *2 *32 *4 *0\.0040 *[0-9.]*$'
says "the plan's own choice, V in [12], [0-9]* segments*, lost [0-9.]*% against V in [12], 1 segment$"
tail -n 1 "$dir/out" | grep -q "^2 rows: the plan's own choice lost [0-9.]*% at most (fwd .*), [0-9.]*% in the mean$" &&
    report yes || report no 'the losses do not come last'
# 27 of the first row, 13 of the second, where segments of one chunk are refused: of all tokens that were over 64
line='^{"op":"plan","h_qk":2,"h_v":8,"lens":\[8192\],"v_split":[12],"segment_chunks":-*[1-9][0-9]*,"ms":0.00[24],'
line=$line'"auto":[a-z]*,"model":[0-9.]*}$'
[ "$(grep -c "$line" "$dir/json")" -eq 27 ] && report yes || report no 'the JSON lines lack something'
[ "$(wc -l <"$dir/json")" -eq 40 ] && report yes || report no 'not 40 choices'
[ "$(grep -c '"auto":true' "$dir/json")" -eq 2 ] && report yes || report no 'not one JSON line of a row is the own choice'

echo "test_cli: $checks checks, $wrong wrong"
[ $wrong -eq 0 ]
