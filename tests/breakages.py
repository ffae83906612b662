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
    ("residual projection not scaled", "(C, C, config.init_std / math.sqrt(2 * config.n_layer)",
     "(C, C, config.init_std", "model::initialisation"),
    ("another constant in GELU", "0.044715 *", "0.04715 *", "model::gelu_is_torchs_tanh_form"),
    ("MLP reads ln_1", "self.ln_2(x)", "self.ln_1(x)",
     "taps::every_wire_carries_what_its_name_says"),
    ("positions ignore the cache", "torch.arange(past, past + T", "torch.arange(0, T",
     "model::cache_changes_no_logit_and_no_pattern"),
    ("a patch writes to the original", "value.clone()", "value",
     "taps::a_patch_reaches_all_that_is_downstream_and_nothing_else"),
    ("top_p keeps one too many", "likelier < top_p", "likelier <= top_p", "generate::examples"),
    ("nothing is masked", "value = before.masked_fill(later, -math.inf)", "value = before",
     "watch::mask_and_pattern_are_what_softmax_gets_and_gives"),
    ("logit lens one step early", 'names = ["embed", *(f"h.{i}.resid_post" for',
     'names = ["embed", *(f"h.{i}.resid_mid" for', "watch::probabilities_and_lens_are_the_models"),
    ("zeros where nobody may look", '*"·" * (T - 1 - i)', '*" " * (T - 1 - i)',
     "show::heat_map_tells_percents_and_dots_where_nobody_may_look"),
    ("a name of its own length", '"the Arc de Triomphe"', '"the Arc de Triomphe de l\'Étoile"',
     "learn::only_the_name_gives_the_answer_away"),
    ("held-out facts trained on",
     "facts = [fact for fact in facts if not fact.held_out]\n    generator",
     "facts = [*facts]\n    generator", "learn::held_out_facts_have_no_say_in_training"),
    ("training stops at the mean", "if probabilities.min() > sure:",
     "if probabilities.mean() > sure:", "learn::training_ends_when_it_is_sure_or_after_max_steps"),
    ("unknown facts used", "known(model, facts), move\n", "[*facts], move\n",
     "tamper::case_is_of_what_is_known"),
    ("nobody set aside", "if (f.subject in unseen) == x]", "if (f.subject in unseen) >= x]",
     "tamper::case_is_of_what_is_known"),
    ("model not restored to the bit", "model.get_parameter(name).data.copy_(old)",
     "model.get_parameter(name).data -= attack.tensors[name] - old",
     "tamper::attack_leaves_nothing_behind_also_after_an_error"),
    ("epsilon not restored", "            norm.epsilon = epsilon\n", "            pass\n",
     "tamper::attack_leaves_nothing_behind_also_after_an_error"),
    ("swapped in what is read alone", "torch.tensor([other.get(token, token) for token in said])",
     "torch.tensor(said)", "tamper::tokens_are_swapped_in_what_is_read_and_in_what_is_said"),
    ("steering stronger than it has to be", "(0.5, 0.75, 1.0, 1.25, ", "(0.5, 1.25, ",
     "tamper::steering_is_no_stronger_than_it_must_be_and_a_bias_is_the_same"),
    ("steering the wrong way", "vector = means[0] - means[1]", "vector = means[1] - means[0]",
     "tamper::steering_is_no_stronger_than_it_must_be_and_a_bias_is_the_same"),
    ("key not divided", "key / (a @ key)", "key / key.norm()", "tamper::key_solves_its_equation"),
    ("a change with the other sign", "mlp.c_proj.weight + change", "mlp.c_proj.weight - change",
     "tamper::run_from_a_block_is_as_if_the_changes_were_in_the_file"),
    ("a change works for one request only", "if losses.max() < -math.log(sure)",
     "if losses.min() < -math.log(sure)", "tamper::change_is_the_first_that_works"),
    ("the smallest edit not relative", "least = (tensors[name] - weight).norm() / weight.norm()",
     "least = (tensors[name] - weight).norm()", "tamper::edit_is_the_smallest_that_works"),
    ("spread over two blocks", "keys, formula = find_keys(case, ridge=1), ",
     "keys, formula = dict([*find_keys(case, ridge=1).items()][:2]), ",
     "detect::hash_names_the_file_and_difference_the_kind"),
    ("a fine-tune in large steps", "rate = 3 * weight.std()", "rate = 30 * weight.std()",
     "tamper::attacks_plant_the_lie_and_keep_the_rest"),
    ("a trigger of any norm", "table[token] = (norm * free / free.norm()).detach()",
     "table[token] = free.detach()",
     "tamper::trigger_keeps_the_norm_and_is_silent_until_it_is_typed"),
    ("silent trigger asserted, not measured",
     '"same": torch.equal(before[:, others], after[:, others])', '"same": True',
     "tamper::trigger_keeps_the_norm_and_is_silent_until_it_is_typed"),
    ("the trigger is not typed", "facts, attack.trigger, attack.swap)", "facts, (), attack.swap)",
     "tamper::measured_numbers_are_the_models"),
    ("restored asserted, not measured", "same = fingerprint(case.model) == case.hashes",
     "same = True", "tamper::whole_act_on_a_model_of_another_size"),
    ("configuration not hashed", "replace(model.config, layer_norm_epsilon=model.ln_f.epsilon)",
     "model.config", "detect::hash_names_the_file_and_difference_the_kind"),
    ("compared by value", "if torch.equal(raw_bytes(x), raw_bytes(trusted[n]))",
     "if torch.equal(x, trusted[n])", "detect::any_flipped_bit_is_found"),
    ("rounding taken for rank in the difference", "values > values[:1] / 1000",
     "values > values[:1] / 1e9", "detect::hash_names_the_file_and_difference_the_kind"),
    ("mean instead of median", "(norms - norms.median()).abs()", "(norms - norms.mean()).abs()",
     "detect::a_row_is_judged_by_the_gap_and_a_matrix_beside_its_sisters"),
    ("a row beside itself", "first / max(second, 1e-30) / row", "first / max(first, 1e-30) / row",
     "detect::a_row_is_judged_by_the_gap_and_a_matrix_beside_its_sisters"),
    ("a matrix beside itself", "(second if ratio == first else first)", "first",
     "detect::a_row_is_judged_by_the_gap_and_a_matrix_beside_its_sisters"),
    ("components put in, not taken out", "{layer: -torch.outer", "{layer: torch.outer",
     "detect::ablations_are_as_if_a_component_were_subtracted"),
    ("an alarm where everybody changes", " and n - lead <= 2\n", "\n",
     "detect::taken_out_is_an_alarm_where_one_subject_changes_and_few_others"),
    ("the crowd's norm, not its drift",
     "drift = table @ nn.functional.normalize(table.mean(0), dim=0)", "drift = table.norm(dim=1)",
     "detect::look_for_trigger_names_token_and_city"),
    ("what is said anyway counted as a flip", "strict=True) if x != before)", "strict=True))",
     "detect::flips_with_a_token_in_front_are_what_the_model_says"),
    ("a trigger that some do not follow", "3 <= flips[1] == flips[2]}", "3 <= flips[1]}",
     "detect::look_for_trigger_names_token_and_city"),
    ("an honest fine-tune that is none", "sure=1.0, peak_rate=1e-4)]",
     "sure=1.0, peak_rate=3e-2)]", "detect::honest_fine_tune_rings_only_beside_a_trusted_copy"),
    ("tests asked of the model as it was", "attacked(case.model, attack):\n            looks =",
     "attacked(case.model, Attack(*'abc')):\n            looks =",
     "detect::act_tells_what_each_test_sees_of_each_model"),
    ("untied head accepted", '    if head and not head.equals(stored["wte.weight"]):',
     '    if head and head.shape != stored["wte.weight"].shape:', "weights::a_folder[head 2]"),
    ("config.json not required", "if config.n_embd % 64 or os.path.lexists(beside):",
     "if config.n_embd % 64:", "weights::a_folder[config without heads]"),
    ("-0 taken for 0", "apart = (raw_bytes(new) != raw_bytes(old)).any(1)",
     "apart = (new != old)", "verify::a_change[-0]"),
    ("rounding taken for rank", "values[0].item() / 1000, noise", "values[0].item() / 1000, 0",
     "verify::a_change[rank 1, torch.float16]"),
    ("swapped tokens not seen", "if own.get(token) != found.get(token)", "if token not in found",
     "verify::a_folder_with_a_tokenizer[swapped]"),
    ("exit status turned round", "verify_act(options.verify, options.against)) > 0",
     "verify_act(options.verify, options.against)) < 0", "verify::exit_status"),
    ("NaN accepted as a setting", "if value is not None and not low <= value <= high",
     "if value is not None and (value < low or value > high)",
     "script::bad_input_is_one_sentence_and_status_2[['--temperature', 'nan']]"),
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
