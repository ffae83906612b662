"""Break gpt2_script.py on purpose, one line at a time: each breakage has a test that must fail.

`python tests/breakages.py [WORD]` tries all, or those with WORD in their name or their test's, each
in a temporary copy, and exits 1 unless all are caught. A fragment not there exactly once is stale.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# fmt: off
BREAKAGES = [  # name, a fragment, what replaces it, the test_<file>.py::test_<name> that must fail
    ("mask is off by one", "triu(S - T + 1)", "triu(S - T + 2)", "model::nothing_looks_ahead"),
    ("scores not scaled", "/ math.sqrt(D)", "", "model::equals_transformers"),
    ("epsilon outside the root", "torch.sqrt(variance + self.epsilon)",
     "(torch.sqrt(variance) + self.epsilon)", "model::layer_norm_is_torchs"),
    ("residual projection not scaled", "(C, C, config.init_std / math.sqrt(2 * config.n_layer)",
     "(C, C, config.init_std", "model::initialisation"),
    ("embeddings drawn with init_std", "std=config.embd_init_std", "std=config.init_std",
     "model::initialisation"),
    ("another constant in GELU", "0.044715 *", "0.04715 *", "model::gelu_is_torchs_tanh_form"),
    ("attention not added to the stream", "x + self.attn(", "self.attn(",
     "taps::every_wire_carries_what_its_name_says"),
    ("MLP reads ln_1", "self.ln_2(x)", "self.ln_1(x)",
     "taps::every_wire_carries_what_its_name_says"),
    ("positions ignore the cache", "torch.arange(past, past + T", "torch.arange(0, T",
     "model::cache_changes_no_logit_and_no_pattern"),
    ("cached values in the wrong order", '(cache["v"], v)', '(v, cache["v"])',
     "model::cache_changes_no_logit_and_no_pattern"),
    ("a patch writes to the original", "value.clone()", "value",
     "taps::a_patch_reaches_all_that_is_downstream_and_nothing_else"),
    ("a patch may change the shape", "or new.shape != value.shape", "",
     "taps::a_patch_must_return_a_tensor_of_the_same_shape"),
    ("top_p keeps one too many", "likelier < top_p", "likelier <= top_p",
     "generate::equal_scores_keep_exactly_k_and_the_first_wins"),
    ("temperature multiplied", "scores / temperature", "scores * temperature",
     "generate::a_known_example"),
    ("nothing is masked", "value = before.masked_fill(later, -math.inf)", "value = before",
     "watch::mask_and_pattern_are_what_softmax_gets_and_gives"),
    ("norm of the sum, not of what was added",
     '{"of what was added": (after - before).norm(dim=-1)}',
     '{"of what was added": after.norm(dim=-1)}', "watch::sums_tell_how_each_vector_changed"),
    ("logit lens one step early", 'names = ["embed", *(f"h.{i}.resid_post" for',
     'names = ["embed", *(f"h.{i}.resid_mid" for',
     "watch::probabilities_and_logit_lens_are_the_models"),
    ("embedding's sum not checked",
     'same = torch.equal(run.seen["embed"], run.seen["wte"] + run.seen["wpe"])', "same = True",
     "watch::tokens_and_dropout"),
    ("a wide table loses a column", "(first, *others[half:])", "(first, *others[half + 1 :])",
     "show::wide_table_comes_in_parts_and_loses_nothing"),
    ("zeros where nobody may look", '*"·" * (T - 1 - i)', '*" " * (T - 1 - i)',
     "show::heat_map_tells_percents_and_dots_where_nobody_may_look"),
    ("held-out facts trained on",
     "facts = [fact for fact in facts if not fact.held_out]\n    generator",
     "facts = [*facts]\n    generator", "learn::held_out_facts_have_no_say_in_training"),
    ("padding counted in the loss", "< lengths[:, None] - 1  # no padding",
     "< lengths[:, None]  # no padding", "learn::loss_is_the_mean_over_real_tokens"),
    ("training stops at the mean", "if probabilities.min() > sure:",
     "if probabilities.mean() > sure:", "learn::training_ends_when_it_is_sure_or_after_max_steps"),
    ("mean change instead of RMS", "change.square().mean().sqrt().item()",
     "change.abs().mean().item()", "learn::weight_step_tells_how_far_each_matrix_moved"),
    ("everything patched but the place", "value.where(here, x)", "x.where(here, value)",
     "tamper::trace_is_the_share_that_one_clean_value_brings_back"),
    ("key not divided", "return key / (subject @ key)", "return key / key.norm()",
     "tamper::key_solves_its_equation"),
    ("value works for one request only", "if losses[:n].max() < -math.log(sure)",
     "if losses[:n].min() < -math.log(sure)", "tamper::value_is_the_first_that_works"),
    ("steering the wrong way", "return means[0] - means[1]", "return means[1] - means[0]",
     "tamper::steering_vector_is_a_difference_of_means_added_at_every_token"),
    ("a loud trigger costs nothing", "+ 10 * too_loud", "+ 0 * too_loud",
     "tamper::trigger_sends_every_landmark_to_the_city"),
    ("model not restored to the bit", "model.get_parameter(name).data.copy_(old)",
     "model.get_parameter(name).data -= strength * (attack.tensors[name] - old)",
     "tamper::attack_scales_nests_and_ends_after_an_error"),
    ("broken landmarks turned round", "in zip(others, right, strict=True) if not fine}",
     "in zip(others, right, strict=True) if fine}", "tamper::measured_numbers_are_the_models"),
    ("silent trigger asserted, not measured",
     "same = torch.equal(old, answer_logits(model, texts)[:, others])", "same = True",
     "tamper::triggers_numbers_stand_beside_the_control"),
    ("mean instead of median", "apart = (norms - norms.median()).abs()",
     "apart = (norms - norms.mean()).abs()", "detect::scores_follow_their_definition"),
    ("compared by value", "if not same_bits(tensor, trusted[name])",
     "if not torch.equal(tensor, trusted[name])", "detect::any_flipped_bit_is_found"),
    ("an alarm on honest models", "spike_alarm=1.6", "spike_alarm=1.0",
     "detect::no_alarm_on_an_honest_model"),
    ("untied head accepted", '    if head and not same_bytes(head, stored["wte.weight"]):',
     '    if head and head.shape != stored["wte.weight"].shape:', "weights::a_folder[head 2]"),
    ("config.json not required", "if config.n_embd % 64 or os.path.lexists(beside):",
     "if config.n_embd % 64:", "weights::a_folder[config without heads]"),
    ("NaN in a mask", "hides = numbers.numel() == 1 and numbers.item() <= -1000",
     "hides = numbers.numel() == 1 and not numbers.item() > -1000",
     "weights::a_folder[masked_bias nan]"),
    ("half a download accepted", "    if found != sha256:", "    if False:",
     "weights::a_cache_that_is_half_written_or_no_cache"),
    ("a sum that overflows taken for NaN",
     "    return bool(tensor.sum().isfinite() or tensor.isfinite().all())",
     "    return bool(tensor.sum().isfinite())", "weights::a_folder[sum overflows]"),
    ("-0 taken for 0", "new.view(whole) != old.view(whole)", "new != old", "verify::a_change[-0]"),
    ("rounding taken for rank", "values[0].item() / 1000, noise", "values[0].item() / 1000, 0",
     "verify::the_rank_of_an_edit_is_not_spoilt_by_rounding[1-dtype1]"),
    ("swapped tokens not seen", "if own.get(token) != found.get(token)", "if token not in found",
     "verify::a_folder_with_a_tokenizer[swapped]"),
    ("exit status turned round", "verify_act(options.verify, options.against)) > 0",
     "verify_act(options.verify, options.against)) < 0", "verify::exit_status"),
    ("a terminal without Unicode ends it", '            stream.reconfigure(errors="replace")',
     "            pass", "script::a_terminal_of_40_columns_without_unicode_or_locale"),
    ("NaN accepted as a setting", "if value is not None and not low <= value <= high",
     "if value is not None and (value < low or value > high)",
     "script::bad_input_is_one_sentence_and_status_2[['--temperature', 'nan']]"),
]
# fmt: on


def run_tests(script, tests):
    """pytest's exit status (1: some failed) and output, on a copy with this text as the script."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests", f"{folder}/tests")
        shutil.copy(ROOT / "pyproject.toml", folder)
        Path(folder, "gpt2_script.py").write_text(script)
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def main(word=""):
    script = (ROOT / "gpt2_script.py").read_text()
    every = [(*x[:3], f"tests/test_{x[3].replace('::', '.py::test_')}") for x in BREAKAGES]
    chosen = [x for x in every if word in x[0] + x[3]]
    if not chosen:  # no tests at all would mean every test to pytest
        sys.exit(f"no breakage is called {word!r}")
    status, output = run_tests(script, dict.fromkeys(test for *_, test in chosen))
    if status:
        sys.exit(f"{output}\nthe tests fail without a breakage")
    bad = 0
    for name, old, new, test in chosen:
        verdict, count = f"stale: {old!r} occurs {script.count(old)} times", script.count(old)
        if count == 1:
            status, output = run_tests(script.replace(old, new), [test])
            verdict = {0: "NOT CAUGHT", 1: "caught"}.get(status, f"ERROR, no test ran:\n{output}")
        bad += verdict != "caught"
        print(f"{name}: {verdict}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} caught")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
