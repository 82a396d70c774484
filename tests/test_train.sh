#!/bin/sh
# test_train.sh TRAIN FAKE_CUDA: the training example: its loss falls; interrupted and resumed it ends at the same checkpoint and
# the same text, byte for byte, as without a pause; misuse and damaged checkpoints are refused. FAKE_CUDA: the folder of the fake
# driver, on which the GPU's host side runs. Says what did not hold, and at the end how many checks there were; exit 1 if one did
# not hold.
set -u
train=$1 fake_cuda=$2
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
text=README.md
passed=0 failed=0

# report STATUS WHAT
report() {
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else echo "test_train: $2" && failed=$((failed + 1)); fi
}

# expect CODE PATTERN ARGUMENTS...: the exit code, and a line of stderr that PATTERN matches
expect() {
    code=$1 pattern=$2
    shift 2
    timeout 300 "$train" "$@" >"$dir/out" 2>"$dir/err" </dev/null
    got=$?
    [ $got -eq "$code" ] && { [ -z "$pattern" ] || grep -q -e "$pattern" "$dir/err"; }
    report $? "train $*: exit $got, expected $code and '$pattern'"
}

expect 0 '' --help
grep -q '^usage: ' "$dir/out"
report $? 'no usage in --help'
expect 2 'unknown' --fly
expect 2 'unknown option' --fly high
expect 2 'unknown backend' --backend tpu
expect 2 'a number' --steps 0
expect 2 'a number' --seed one
expect 2 'one FILE' "$text" "$text"
expect 2 "the checkpoint's" --resume x --steps 3
expect 1 'No such file' "$dir/absent"
echo 'a short text' >"$dir/short"
expect 1 'at least' "$dir/short"

# ---- straight through
expect 0 '' "$text" --steps 16 --save "$dir/straight.safetensors"
cp "$dir/out" "$dir/straight"
awk '/^step / { sub(",", "", $6); if (n++ == 0) first = $6; last = $6 }
     END { exit !(n > 1 && first > 5 && last < first - 0.8) }' "$dir/out"
report $? 'the loss does not fall'
grep -q '^loss [0-9.]* nats a byte, the mean of the last 16 training steps' "$dir/out"
report $? 'no last loss'

# ---- interrupted after a few steps, resumed
"$train" "$text" --steps 16 --save "$dir/paused.safetensors" >"$dir/out" 2>"$dir/err" </dev/null &
pid=$!
tries=0
until grep -q '^step 4 of' "$dir/out" || [ $tries -ge 600 ]; do
    tries=$((tries + 1))
    sleep 0.1
done
kill -INT $pid
wait $pid
report $? "interrupted it exits with $?"
grep -q '^saved ' "$dir/out"
report $? 'interrupted it does not say what it saved'
cmp -s "$dir/straight.safetensors" "$dir/paused.safetensors"
[ $? -eq 1 ]
report $? 'interrupted it went to the end, or saved nothing'
cp "$dir/paused.safetensors" "$dir/good.safetensors"
expect 0 '' "$text" --resume "$dir/paused.safetensors" --save "$dir/paused.safetensors"
cmp "$dir/straight.safetensors" "$dir/paused.safetensors"
report $? 'resumed it ends at other numbers than straight through'
sed -n '/^loss /,$p' "$dir/straight" >"$dir/end"
sed -n '/^loss /,$p' "$dir/out" | cmp - "$dir/end"
report $? 'resumed it ends with another loss or text than straight through'

# ---- checkpoints that are no good
expect 1 'another text' LICENSE --resume "$dir/good.safetensors"
expect 1 'not a safetensors file' "$text" --resume "$text"
head -c 5000000 "$dir/good.safetensors" >"$dir/cut.safetensors"
expect 1 'numbers of float32' "$text" --resume "$dir/cut.safetensors"
LC_ALL=C sed 's/"adam_v.norm"/"adam_x.norm"/' "$dir/good.safetensors" >"$dir/other.safetensors"
expect 1 'lacks "adam_v.norm"' "$text" --resume "$dir/other.safetensors"

# ---- the GPU's host side: nothing computes there, but every call is right or refused
export LD_LIBRARY_PATH="$fake_cuda"
expect 0 '' "$text" --backend cuda --steps 2

echo "$passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ]
