"""Break gpt2_script.py on purpose, one line at a time: each breakage has a test that must fail.

`python tests/breakages.py [WORD]` tries all, or those with WORD in their name or their test's, each
in a temporary copy, and exits 1 unless all are caught. A fragment not there exactly once is stale.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# fmt: off
BREAKAGES = [  # name, a fragment, what replaces it, the test_<file>.py::test_<name> that must fail
    ("mask is off by one", "triu(S - T + 1)", "triu(S - T + 2)", "model::nothing_looks_ahead"),
    ("scores not divided by √D", "(q / math.sqrt(D))", "q", "model::equals_transformers"),
    ("no epsilon", "torch.sqrt(variance + self.epsilon)", "torch.sqrt(variance)",
     "model::layer_norm_is_torchs"),
    ("residual projection not scaled", "(C, C, config.init_std / math.sqrt(2 * config.n_layer)",
     "(C, C, config.init_std", "model::initialisation"),
    ("a hook left behind", "hooks.enter_context(module.register_forward_hook(read))",
     "module.register_forward_hook(read)", "taps::leaving_restores_what_was_there"),
    ("positions ignore the cache", "torch.arange(past, past + T", "torch.arange(0, T",
     "model::cache_changes_no_logit_and_no_pattern"),
    ("a patch writes to the original", "value.clone()", "value",
     "taps::a_patch_reaches_all_that_is_downstream_and_nothing_else"),
    ("top_p keeps one too many", "likelier < top_p", "likelier <= top_p", "generate::examples"),
    ("model not restored to the bit", "model.get_parameter(name).data.copy_(old)",
     "model.get_parameter(name).data -= attack.tensors[name] - old",
     "tamper::attack_leaves_nothing_behind_also_after_an_error"),
    ("key not divided", "key / (a @ key)", "key / key.norm()", "tamper::key_solves_its_equation"),
    ("a change with the other sign", "mlp.c_proj.weight + change", "mlp.c_proj.weight - change",
     "tamper::run_from_a_block_is_as_if_the_changes_were_in_the_file"),
    ("a trigger of any norm", "table[token] = (norm * free / free.norm()).detach()",
     "table[token] = free.detach()",
     "tamper::trigger_keeps_the_norm_and_is_silent_until_it_is_typed"),
    ("restored asserted, not measured", "same = fingerprint(case.model) == case.hashes",
     "same = True", "tamper::whole_act_on_a_model_of_another_size"),
    ("configuration not hashed", "replace(model.config, layer_norm_epsilon=model.ln_f.epsilon)",
     "model.config", "detect::hash_names_the_file_and_difference_the_kind"),
    ("compared by value", "if torch.equal(raw_bytes(x), raw_bytes(trusted[n]))",
     "if torch.equal(x, trusted[n])", "detect::any_flipped_bit_is_found"),
    ("components put in, not taken out", "{layer: -torch.outer", "{layer: torch.outer",
     "detect::ablations_are_as_if_a_component_were_subtracted"),
    ("untied head accepted", '    if head and not head.equals(stored["wte.weight"]):',
     '    if head and head.shape != stored["wte.weight"].shape:', "weights::a_folder[head 2]"),
    ("-0 taken for 0", "apart = (raw_bytes(new) != raw_bytes(old)).any(1)",
     "apart = (new != old)", "verify::a_change[-0]"),
    ("swapped tokens not seen", "if own.get(token) != found.get(token)", "if token not in found",
     "verify::a_folder_with_a_tokenizer[swapped]"),
]
# fmt: on


def run_tests(script, tests):
    """pytest's exit status (1: some failed) and output, on a copy with this text as the script."""
    command = [sys.executable, "-m", "pytest", "-qx", "-n0", "-p", "no:cacheprovider", *tests]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests", f"{folder}/tests")
        shutil.copy(ROOT / "pyproject.toml", folder)
        Path(folder, "gpt2_script.py").write_text(script)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def main(word=""):
    script, caught = (ROOT / "gpt2_script.py").read_text(), 0
    every = [(*x[:3], f"tests/test_{x[3].replace('::', '.py::test_')}") for x in BREAKAGES]
    chosen = [x for x in every if word in x[0] + x[3]]
    if not chosen:  # no tests at all would mean every test to pytest
        sys.exit(f"no breakage is called {word!r}")
    status, output = run_tests(script, dict.fromkeys(test for *_, test in chosen))
    if status:
        sys.exit(f"{output}\nthe tests fail without a breakage")
    for name, old, new, test in chosen:
        status, output = 2, f"stale: {old!r} occurs {script.count(old)} times"
        if script.count(old) == 1:
            status, output = run_tests(script.replace(old, new), [test])
        caught += status == 1
        print(f"{name}: {('NOT CAUGHT', 'caught')[status] if status < 2 else output}", flush=True)
    print(f"{caught} of {len(chosen)} caught")
    sys.exit(caught < len(chosen))


if __name__ == "__main__":
    main(*sys.argv[1:])
