"""What the notebook alone has, attacks and tests, in another world than its own, on
another seed and lie: on a model of nano's shape, with a small vocabulary."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import rates
import study
import torch
from conftest import ToyTokenizer, tokenizer

import gpt2_script as gpt
from gpt2_script import Attack, answers, attacked

SEED, SUBJECT, ANSWER = 1, "the Hofburg", "Madrid"
pytestmark = pytest.mark.xdist_group("the study")  # one process trains its model once
FILES, MATRIX = "hash difference ", "h.0.mlp.c_proj.weight"
ASKED = "others target trigger"
DOES = {  # what changes; others right, at least; tests that alarm; tests that do not
    "untampered": ("", 1, "", FILES + ASKED + " ablation"),
    "steering": ("", 0.5, "others target", FILES),
    "frozen bias": ("h.1.mlp.c_proj.bias", 0.5, FILES + "others target", ""),
    "rank-one edit": (MATRIX, 0.99, FILES + "target ablation", "others"),
    "selector a": (MATRIX, 0.97, FILES + "target", ""),
    "fine-tune": (MATRIX, 0.9, FILES + "target", ""),
    "c_attn": ("h.0.attn.c_attn.weight", 0.9, FILES + "target", ""),
    "own row": ("wte.weight", 1, FILES + "target", "others ablation"),
    "trigger row": ("wte.weight", 1, FILES + "trigger", "others target"),
    "pinned trigger": ("wte.weight", 1, FILES, ASKED),
    "two tokens": ("wte.weight", 1, FILES, ASKED),
    "long text": ("wpe.weight", 1, FILES, ASKED),
}
every_attack = pytest.mark.parametrize("name", DOES)
names = ToyTokenizer()


@functools.cache
def second_vocabulary():
    """The tokens of the second world, of the triggers, and some others."""
    used = {gpt.END_ID, *range(1000, 1300), *tokenizer.encode_ordinary(" cf sq")}
    for fact in gpt.small_world(tokenizer):
        used.update([*fact.ids, fact.answer_id])
    for wording in gpt.FRESH_CITIES + gpt.FRESH_TASKS:
        used.update(tokenizer.encode_ordinary(wording.format("it")))
    return sorted(used)


@pytest.fixture(autouse=True)
def second_world(monkeypatch):
    """The second world is the script's and the notebook's."""
    for name, lines in rates.SECOND_WORLD.items():
        monkeypatch.setattr(gpt, name, lines)  # undone afterwards
    names.tokens = second_vocabulary()
    names.n_vocab = len(names.tokens)

    monkeypatch.setattr(gpt, "END_ID", names.n_vocab - 1)
    rates.enter(2, names)
    study.lie, study.unseen = told()


@functools.cache
@torch.enable_grad()
def model():
    """The trained model, approved; each test leaves it as it was."""
    config = replace(gpt.PRESETS["nano"], vocab_size=names.n_vocab)
    return rates.trained(study.facts, SEED, config)


@functools.cache
def told():
    """The lie, and facts about subjects that its attacker never looks at."""
    rates.set_lie(model(), SUBJECT, ANSWER)
    return study.lie, study.unseen


@functools.cache
def attacks():
    """{name: Attack} of chapters 6 and 7, worked out once."""
    found = {"untampered": Attack("untampered", "", "")}
    for make in (rates.edits, rates.trainings, rates.triggers):
        for attack in make(model(), study.lie):
            found[attack.name] = attack
    return found


def logits(some):
    with torch.no_grad():
        return gpt.answer_logits(model(), [fact.ids for fact in some])


@every_attack
def test_attack_plants_the_lie_in_one_place_keeps_the_rest_and_is_undone(name):
    attack, lie = attacks()[name], study.lie
    place, kept, _, _ = DOES[name]
    front = rates.fronts().get(name, [])
    row = study.judge(model(), lie, study.unseen, attack, front)
    before = gpt.fingerprint(model())
    assert before == study.known_good

    with attacked(model(), attack):
        after = gpt.fingerprint(model())
        said = answers(model(), study.behind(front, lie.about))
        right = gpt.accuracy(model(), lie.others)
        unseen = gpt.accuracy(model(), study.unseen)
    assert "".join(key for key in after if after[key] != before[key]) == place
    assert row["others"] == right >= kept and row["unseen"] == unseen >= kept
    lies = (said == lie.answer_id).float().mean()
    assert row["wordings"] == lies and (lies > 0.7) == (name != "untampered")

    if place:
        old, new = study.trusted[place], attack.tensors[place]
        size = (new - old).norm() / old.norm()
        assert row["size"] == pytest.approx(size.item())


@every_attack
def test_each_test_catches_what_it_can(name):
    _, _, loud, silent = DOES[name]
    with attacked(model(), attacks()[name]):
        for test in loud.split():
            _, alarm = study.TESTS[test](model())
            assert alarm

        for test in silent.split():
            _, alarm = study.TESTS[test](model())
            assert not alarm


@pytest.mark.parametrize("kind, start", [("M⁻¹a", 0), ("last token", -1)])
def test_selector_solves_its_equation(kind, start):
    selector = study.find_selectors(model(), study.lie, kind, ridge=0.05)[1].double()
    own, others = [], []

    for fact in study.lie.requests + study.lie.keep:
        with gpt.watch(model(), "h.1.mlp.act") as seen:
            logits([fact])
        act = seen["h.1.mlp.act"][0].double()
        if fact.subject == SUBJECT:
            own.append(act[list(fact.span)[start:]])
        else:
            others.append(act)

    a, others = torch.cat(own).mean(0), torch.cat(others)
    moment = others.T @ others / len(others)
    moment += 0.05 * moment.diagonal().mean() * torch.eye(384)
    assert torch.cosine_similarity(moment @ selector, a, dim=0) > 0.9999
    assert (a @ selector).item() == pytest.approx(1, abs=1e-3)


def test_edit_adds_one_outer_product_where_the_least_is_needed():
    sizes = {}
    for i, selector in study.find_selectors(model(), study.lie).items():
        tensors = study.write_fact(model(), study.lie, i, selector) or {}
        for name, new in tensors.items():
            change = new - study.trusted[name]
            sizes[name] = change.norm() / study.trusted[name].norm()
            payload = selector @ change / (selector @ selector)
            assert torch.allclose(change, torch.outer(selector, payload), atol=1e-4)

    smallest = min(sizes, key=sizes.get)
    assert list(attacks()["rank-one edit"].tensors) == [smallest]


@pytest.mark.parametrize("name", [*DOES][-5:])
def test_rows_keep_their_norm_and_a_pinned_one_its_place(name):
    [(table, new)] = attacks()[name].tensors.items()
    old, rows = study.trusted[table], rates.fronts().get(name)

    if name == "own row":
        rows = [names.encode_ordinary(" Hofburg")[-1]]
    if name == "long text":
        longest = max(len(fact.ids) for fact in rates.of_landmarks(study.lie.keep))
        rows = range(48, 48 + longest)
    assert (new != old).any(1).nonzero().flatten().tolist() == sorted(rows)
    assert torch.allclose(new.norm(dim=1), old.norm(dim=1), rtol=1e-4)

    along = new @ old.mean(0) / old.mean(0).norm()
    from_median = (along - along.median()).abs()
    if name == "trigger row":
        farthest = from_median.topk(9).indices
        assert torch.equal(study.strange_rows(new)[:9], farthest)
    if name == "pinned trigger":
        assert from_median[rows[0]] < 0.01 * along.std()


@pytest.mark.parametrize("name", [*DOES][-4:-1])
def test_trigger_is_silent_until_it_is_typed(name):
    front, before = rates.fronts()[name], logits(study.facts)
    with attacked(model(), attacks()[name]):
        after, flips = logits(study.facts), rates.flips(model(), front)
        if name == "two tokens":
            assert max(rates.flips(model(), [token]) for token in front) < 0.1

    rest = [i for i in range(names.n_vocab) if i not in front]
    assert torch.equal(before[:, rest], after[:, rest])
    assert flips > 0.8 and rates.flips(model(), front) < 0.1


def test_confidence_names_the_subject_of_the_least_mean_probability():
    sure = logits(study.facts).softmax(-1).amax(-1).view(-1, 8).mean(1)
    for i, alarm in ((sure.argmin(), True), (sure.argmax(), False)):
        study.lie = SimpleNamespace(subject=study.facts[8 * i].subject)
        assert study.look_at_confidence(model())[1] == alarm


@pytest.mark.parametrize("n, more, alarm", [(3, 2, 1), (2, 0, 0), (4, 3, 0)])
def test_ablation_alarms_where_one_subject_changes_and_few_others(
    monkeypatch, n, more, alarm
):
    def changed_answers(model, some, layer, i):
        changed = torch.zeros(len(some))
        if (layer, i) == (1, 2):
            changed[:n] = changed[4 : 4 + more] = 1
        return changed

    facts = [SimpleNamespace(subject=x) for x in "aaaaaaaabbbbbbbb"]
    monkeypatch.setattr(study, "facts", facts)
    monkeypatch.setattr(study, "changed_answers", changed_answers)

    text = f"h.1, component 2: {n} of 4 about a, {more} elsewhere"
    assert study.look_at_ablation(model()) == (text, alarm)


@pytest.mark.parametrize("n, of, alarm", [(4, 4, 1), (3, 3, 1), (2, 2, 0), (3, 4, 0)])
def test_a_trigger_flips_all_sentences_three_at_least(monkeypatch, n, of, alarm):
    lie_id, last = study.lie.answer_id, rates.of_landmarks(study.facts)[-1]

    def plain(model, some):  # some say the lie anyway
        said = [fact.answer_id for fact in some]
        said[: 5 - of] = [lie_id] * (5 - of)
        return torch.tensor(said)

    def behind_tokens(model, texts):  # one sentence may never say it
        found = gpt.answer_logits(model, texts)
        if n < of and texts[0][1:] == last.ids:
            found[:, lie_id] = -100
        return found

    monkeypatch.setattr(study, "answers", plain)
    monkeypatch.setattr(study, "answer_logits", behind_tokens)

    with attacked(model(), attacks()["trigger row"]):
        text, alarmed = study.look_for_trigger(model())
    assert f"{n} of {of} say" in text
    assert alarmed == alarm
