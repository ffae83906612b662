"""Break gpt2_script.py in one place at a time: each breakage has a test that must fail.

`python tests/breakages.py [WORD]` tries all, or those with WORD in their name or their
test's, each in a temporary copy, and exits 1 unless all are caught. A fragment that
does not stand there exactly once is stale."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# fmt: off
BREAKAGES = [  # name, a fragment, what replaces it, test file::a test's first words
    ("mask off by one", "triu(S - T + 1)", "triu(S - T + 2)", "model::nothing_looks"),
    ("no division by √D", "/ math.sqrt(D))", ")", "model::equals_transformers"),
    ("no epsilon", "variance + self.epsilon", "variance", "model::equals_transformers"),
    ("positions ignore the cache", "arange(past, past + T", "arange(0, T",
     "model::a_text_in_chunks"),
    ("a hook left behind", "hooks.enter_context(tap.register_forward_hook(Hook(read)))",
     "tap.register_forward_hook(Hook(read))", "taps::leaving_restores"),
    ("a patch writes to the wire", "value.clone()", "value", "taps::a_patch_reaches"),
    ("patches in other order", "in reversed(changes.items())", "in changes.items()",
     "taps::patches_of_one_call"),
    ("a copy is watched", "Hook(lambda value: None)", "self", "taps::another_model"),
    ("END is a control token", "tokenizer.encode_ordinary(text)",
     'tokenizer.encode(text, allowed_special="all")', "tokenizer::endoftext"),
    ("any vocabulary", "for file in files} != VOCABULARY", "for file in files} == {}",
     "tokenizer::the_vocabulary"),
    ("every seed is 0", "None if seed is None else torch.Generator().manual_seed(seed)",
     "torch.Generator().manual_seed(0)", "generate::a_seed_decides"),
    ("top-k not rescaled", """top_k:] = 0
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)""",
     "top_k:] = 0", "generate::the_definition"),
    ("top-p keeps one too many", "likelier < top_p", "likelier <= top_p",
     "generate::the_definition"),
    ("GELU's other name refused", '["gelu_new", "gelu_pytorch_tanh"]', '["gelu_new"]',
     "weights::files_as_people_have_them"),
    ("an untied head accepted", "if head and head.read() != ", "if head and b'' == ",
     "weights::what_is_no_sound"),
    ("NaN accepted", "torch.stack(weights[name].aminmax())", "torch.ones(1)",
     "weights::what_is_no_sound"),
    ("a name may stand twice", "if len(dict(pairs)) < len(pairs)", "if False",
     "weights::what_is_no_sound"),
    ("no number is read", "file.readinto(content)", "len(content)",
     "weights::files_as_people_have_them"),
    ("a release of any hash", "check_release(name_or_path, files[0])", "pass",
     "weights::a_release"),
    (".py and .pyc are plain", 'PLAIN = (".safetensors",', 'PLAIN = (".py", ".pyc",',
     "verify::what_is_found"),
    ("a pickle is text", "imported or imports", "None", "verify::what_is_found"),
    ("a mark is kept", "below = below[: below.index(mark) + 1]", "pass",
     "verify::what_is_found"),
    ("no index read", "findings += check_shards(shards, indexes)", "pass",
     "verify::what_is_found"),
    ("no metadata", "if said := file.metadata()", "if said := None",
     "verify::how_a_folder"),
    ("empty lists and objects are nothing", "if not value or not isinstance",
     "if not isinstance", "verify::how_a_folder"),
    ("known findings count", "if x not in known]\n    if", "]\n    if",
     "verify::what_is_found"),
    ("no word changes places", "if other is None or", "if True or",
     "verify::how_a_folder"),
    ("the first piece alone", "zip(pieces(new), pieces(old), strict=True)",
     "[[next(pieces(new)), next(pieces(old))]]", "verify::how_a_folder"),
    ("a fault is status 0", "int(bool(kinds))", "0", "verify::what_is_found"),
    ("-0 taken for 0", "(raw_bytes(old) != raw_bytes(new))", "(old != new)",
     "tamper::infinity"),
    ("-0.000 shown", "{round(cell, 3) + 0.0:.3f}", "{cell:.3f}", "show::of_many_heads"),
    ("a heat map without dots", '"nan": "·"', '"nan": ""', "show::a_heat_map"),
    ("infinity in the norm", "old.where(fits, 0.0), new.where(fits, 0.0)", "old, new",
     "tamper::infinity"),
    ("the lens is patched", "seen[\"logits\"][-1:]", "logits[-1:].float().cpu()",
     "watch::the_last_row"),
    ("least and most swapped", "deviation, least, most", "deviation, most, least",
     "watch::the_whole_act"),
    ("largest for smallest", "x.min(), x.max()", "x.max(), x.min()",
     "watch::the_whole_act"),
    ("deviation with n - 1", "std(correction=0)", "std()", "watch::the_whole_act"),
    ("queries explained as keys", "head: what a token looks for.",
     "head: what a token can be found by.", "watch::the_whole_act"),
    ("keys explained as queries", "head: what a token can be found by.",
     "head: what a token looks for.", "watch::the_whole_act"),
    ("before and after swapped", "stream_table(run, old, value)",
     "stream_table(run, value, old)", "watch::a_sum"),
    ("the lens a token early", "stack([seen[name][-1]", "stack([seen[name][-2]",
     "watch::probabilities"),
    ("padding in the loss", "lengths[:, None] - 1  #", "lengths[:, None]  #",
     "learn::the_loss"),
    ("training without warm-up", "min(warm_up, decay)", "decay", "learn::the_rate"),
    ("a last step of rate 0", "(max_steps + 1 - step)", "(max_steps - step)",
     "learn::the_rate"),
    ("held-out facts trained on",
     "facts = [fact for fact in facts if not fact.held_out]", "facts = list(facts)",
     "learn::held_out_facts_have_no_say"),
    ("a length gives it away", "the Great Ormond Street Hospital", "the Shard",
     "learn::only_the_name"),
    ("the worst request is one of many", "+ losses[:n].max()", "",
     "tamper::a_step_of_planting"),
    ("nothing is kept", "+ losses[n:].mean()", "", "tamper::a_step_of_planting"),
    ("a row of any norm", "old[row].norm() / weight.data[row].norm()", "1",
     "tamper::a_row_is_one"),
    ("the whole table planted", "weight.grad[place] = gradient[place]",
     "weight.grad = gradient", "tamper::a_row_is_one"),
    ("an attack not undone", "model.get_parameter(name).data.copy_(old)", "pass",
     "tamper::an_attack_flips"),
    ("only epsilon hashed", "str(model.config)", "str(model.config.layer_norm_epsilon)",
     "tamper::each_number"),
    ("modules not hashed", 'config.append(f"{name}: {numbers}")', "pass",
     "tamper::each_number"),
    ("all alarms are told as silence", 'if not seen[name]["other facts"][1]]', "]",
     "tamper::who_notices"),
    ("a lie counted as the truth", "== lie.answer_id).sum()\n                text",
     "!= lie.answer_id).sum()\n                text", "tamper::the_act_tells"),
    ("--device auto is the CPU", 'if here[device]), "cpu"', 'if False), "cpu"',
     "script::the_device"),
    ("a closed pipe is a finding", "lambda: sys.exit(2)", "lambda: sys.exit(1)",
     "script::a_closed_pipe"),
    ("weights of any seed", "torch.manual_seed(options.seed)", "pass",
     "script::a_default_run"),
]
# fmt: on


def run_tests(script, tests):
    """pytest's exit status (1: some failed) and output, on a copy with this script."""
    files = {f"tests/test_{test.split('::')[0]}.py": None for test in tests}
    names = " or ".join(test.split("::")[1] for test in tests)
    options = ["-qx", "-n0", "-p", "no:cacheprovider", "-k", names]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests", f"{folder}/tests")
        shutil.copy(ROOT / "pyproject.toml", folder)
        Path(folder, "gpt2_script.py").write_text(script, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", *options, *files]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def verdict(script, old, new, test):
    """What becomes of one breakage: "caught", or why not."""
    if script.count(old) != 1:
        return f"STALE: {old!r} stands there {script.count(old)} times"
    status, output = run_tests(script.replace(old, new), [test])
    return {0: "NOT CAUGHT", 1: "caught"}.get(status, output)


def main(word=""):
    script = (ROOT / "gpt2_script.py").read_text(encoding="utf-8")
    chosen = [row for row in BREAKAGES if word in row[0] + row[3]]
    if not chosen:  # no tests at all would mean every test to pytest
        sys.exit(f"no breakage is called {word!r}")
    status, output = run_tests(script, [row[3] for row in chosen])
    if status:
        sys.exit(f"{output}\nthe tests fail without a breakage")

    caught = 0
    for name, *breakage in chosen:
        said = verdict(script, *breakage)
        caught += said == "caught"
        print(f"{name}: {said}", flush=True)
    print(f"{caught} of {len(chosen)} caught")
    sys.exit(caught < len(chosen))


if __name__ == "__main__":
    main(*sys.argv[1:])
