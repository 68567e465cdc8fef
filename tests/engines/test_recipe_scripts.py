"""Scripts as their words: what a shell would pass is read, what only a shell knows is said to be unknown."""

import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engines.test_recipes import read

from poise.engines.recipes.shell import commands, expand, known_names
from poise.util.errors import OptionError, PoiseError

UNKNOWN = [
    'if [ "$X" = 1 ]; then EP=" --enable-expert-parallel"; fi\nvllm serve $MODEL -tp 8 $EP',
    'if [[ -n "$A" && "$B" ]]; then\nTP=8\nelse\nTP=4\nfi\nvllm serve m --enable-expert-parallel -tp $TP $TP',
    "ARGS=(--tp 8)\nARGS+=(--enable-eplb)\npython -m sglang.launch_server \"${ARGS[@]}\"",
    "python -m sglang.launch_server --tp 8 --trust-remote-code $EXTRA",
    'vllm serve m --enable-expert-parallel -tp 8 "$@"',
    "E=' --enable-eplb'\nsource env.sh\nvllm serve m -tp 8 $E",
    "read E\nE=\nvllm serve m -tp 8 $E",
    "[ $X ] && E=\nvllm serve m -tp 8 $E",
    "vllm serve m -tp 8 $(flags)",
    "vllm serve m -tp 8 `flags`",
    "E=--enable-eplb\nE=\nvllm serve m -tp 8 --enable-expert-parallel $E",
    "vllm serve $FLAGS",
    "vllm serve m -tp 8 --enable-sleep-mode $E",
    "trtllm-serve m --tp_size 8 --ep_size 8 --extra_llm_api_options e.yaml",
    "python -m sglang.launch_server --config a.yaml --ep-size 8 --tp 8",
]  # fmt: skip


@pytest.mark.parametrize("script", UNKNOWN)
def test_what_a_variable_may_hold_is_unknown(tmp_path, script):
    (one,) = read(tmp_path, script, "r.sh")
    assert one.doubtful and (one.ranks, one.redundant, one.slots, one.own) == (None,) * 4
    assert "is unknown" in one.sentence() and one.doubtful[0] in one.sentence()


def test_a_size_that_two_branches_set_is_unknown(tmp_path):
    script = "if a; then\nTP=8\nelse\nTP=4\nfi\nvllm serve m --enable-expert-parallel --enable-eplb -tp $TP -dp 1"
    (one,) = read(tmp_path, script, "r.sh")
    assert (one.ranks, one.own, one.redundant) == (None, True, 0)
    assert one.notes == ("the tensor parallel size is $TP, which the recipe does not set",)


KNOWN = [
    "ARGS=(--tp 8 --ep-size 8\n  # it's a comment\n  --enable-eplb --port $PORT)\npython3 -m sglang.launch_server \"${ARGS[@]}\"",
    'E="--enable-eplb --ep-size 8"\nMODEL=m\nCMD="python -m sglang.launch_server --model-path $MODEL --tp 8 $E"\neval "$CMD" > l 2>&1 &',
    "if x; then\n  sglang serve --model-path \"$M\" --tp 8 --ep-size 8 --enable-eplb --port $PORT\nfi",
    "# no continuation \\\npython -m sglang.launch_server --tp 8 \\\n --ep-size \\\n8 --enable-eplb --model-path \"a\\\nb\"",
    "docker run i bash -lc 'python -m sglang.launch_server --tp=8 --ep=8 --enable_eplb'",
    "TP=${TP:-8}\ncat > s.sh <<EOF\npython -m sglang.launch_server --tp $TP --ep-size $TP --enable-eplb\nEOF\nbash s.sh",
    "for i in 1 2; do TP=4; done\nwait_for x || { echo no; exit 1; }\nnohup python -m sglang.launch_server --tp 8 --ep-size 8 --enable-eplb",
]  # fmt: skip


@pytest.mark.parametrize("script", KNOWN)
def test_what_the_script_sets_is_read(tmp_path, script):
    (one,) = read(tmp_path, script, "r.sh")
    assert (one.engine, one.ranks, one.own, one.redundant, one.doubtful) == ("sglang", 8, True, 0, ())


@pytest.mark.parametrize(
    "line",
    [
        "pkill -f sglang.launch_server || true",
        'echo "starting vllm serve"',
        "echo vllm serve m",
        "while ! pgrep -f vllm serve; do sleep 1; done",
        "ps aux | grep trtllm-serve | xargs kill",
        'log "vllm serve is up"',
        "cat <<EOF\nit's vllm serve\nEOF",
        "# vllm serve x",
    ],
)
def test_what_names_an_engine_starts_none(tmp_path, line):
    (one,) = read(tmp_path, f"{line}\nvllm serve m -tp 4 --enable-expert-parallel\n{line}\n", "r.sh")
    assert one.ranks == 4


PIECES = st.sampled_from(
    ["$A", "${A}", '"$A"', '"${L[@]}"', "${L[@]}", "$L", "'$A'", ".x", "-y", " ", "'a b'", '"q $A"', "\\ ", "${N:-d}", '"${L[*]}"', "''", "$N2", "\\\n", '"\\\n"']
)  # fmt: skip


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@settings(max_examples=40, deadline=None)
@given(st.lists(PIECES, max_size=8))
def test_words_are_those_of_bash(pieces):
    head = "A='one two'\nL=(p 'q r' $A)\nN2=''\n"
    line = "show " + "".join(pieces)
    said = subprocess.run(
        ["bash", "-c", head + "show() { for w in \"$@\"; do printf '%s\\0' \"$w\"; done; }\n" + line],
        capture_output=True, text=True, check=True, env={},
    ).stdout  # fmt: skip
    every = commands(head + line)
    words = [one.text for raw in every[-1].words for one in expand(raw, known_names(every))]
    assert words[1:] == said.split("\0")[:-1]


def test_a_script_of_doublings_is_refused(tmp_path):
    lines = ["A0=aaaaaaaaaaaaaaaa"] + [f'A{n + 1}="$A{n}$A{n}"' for n in range(64)]
    with pytest.raises(OptionError, match="more than 8192 characters"):
        read(tmp_path, "\n".join([*lines, "vllm serve $A64"]), "r.sh")
    for deep in ("vllm serve " + "$(" * 5000, "cat <<A\n" * 5000 + "vllm serve m", "vllm serve " + '"$(' * 5000):
        try:
            read(tmp_path, deep, "r.sh")
        except PoiseError:
            pass


def test_dotted_flags_are_those_of_the_config(tmp_path):
    line = "vllm serve m -tp 8 --enable-expert-parallel --enable-eplb --eplb-config.num_redundant_experts 32"
    (one,) = read(tmp_path, line, "r.sh")
    assert (one.redundant, one.unknown) == (32, ())
    with pytest.raises(OptionError, match="num_redundant_experts is 8 in --eplb-config and '32'"):
        read(tmp_path, line + " --eplb-config '{\"num_redundant_experts\": 8}'", "r.sh")
    (other,) = read(tmp_path, line.replace("--eplb-config.num", "--other.num"), "r.sh")
    assert other.redundant is None and other.unknown and "unknown number of slots" in other.sentence()
    for odd in ("--eplb-config $C", "--eplb-config.num_redundant_experts $R", "--enable-eplb=$B"):
        (one,) = read(tmp_path, f"vllm serve m -tp 8 --enable-expert-parallel {odd}", "r.sh")
        assert None in (one.redundant, one.own) and one.notes
