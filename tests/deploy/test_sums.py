"""The quickstart workload: task code, tokenizer, prompt files and shipped models agree."""

import json
import random
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.sums import recipe, task, variants

SUMS = Path(recipe.__file__).parent
MODELS = ("teacher", "student")


@pytest.fixture(params=MODELS)
def shipped_tokenizer(request):
    return AutoTokenizer.from_pretrained(SUMS / request.param)


def documents():
    """A few documents of every kind that a model of this workload sees."""
    rng = random.Random(0)
    for terms in islice(task.draw_problems(rng, 3, 14), 100):
        yield task.render_prompt(terms)
        yield task.render_prompt(terms) + task.render_answer(terms)
        yield task.render_prompt(terms) + task.render_answer(task.misread(terms, 0.5, 0.1, rng))
        yield task.draw_loop(rng, recipe.WINDOW_TOKENS)
        yield task.draw_stall(rng, recipe.WINDOW_TOKENS)
    yield task.ALPHABET


def rows_of(name):
    return [json.loads(line) for line in (SUMS / name).read_text().splitlines()]


def test_every_document_survives_encoding_and_decoding_one_token_a_character(shipped_tokenizer):
    for document in documents():
        ids = shipped_tokenizer(document).input_ids
        assert len(ids) == len(document)
        assert shipped_tokenizer.decode(ids) == document


def test_the_vocabulary_is_the_alphabet_and_eos_is_the_stop(shipped_tokenizer):
    assert shipped_tokenizer.is_fast
    assert shipped_tokenizer.get_vocab() == {character: index for index, character in enumerate(task.ALPHABET)}
    assert shipped_tokenizer.eos_token == task.STOP
    assert shipped_tokenizer.pad_token == task.PAD
    assert shipped_tokenizer.bos_token is None


def test_a_character_outside_the_alphabet_is_refused(shipped_tokenizer):
    with pytest.raises(Exception, match="UNK"):
        shipped_tokenizer("3 + 7")


@pytest.mark.parametrize("name", MODELS)
def test_the_shipped_tokenizer_is_the_one_the_recipe_builds(name, tmp_path):
    recipe.build_tokenizer(recipe.WINDOW_TOKENS).save_pretrained(tmp_path)
    for built in tmp_path.iterdir():
        assert json.loads((SUMS / name / built.name).read_text()) == json.loads(built.read_text())


def test_the_shipped_prompt_files_are_what_the_recipe_writes_byte_for_byte(tmp_path):
    recipe.write_prompts(tmp_path)
    variants.write_prompts(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in SUMS.glob("*.jsonl")}


def test_prompts_are_distinct_and_none_is_both_trained_on_and_held_out():
    prompts = {path.name: [row["prompt"] for row in rows_of(path.name)] for path in SUMS.glob("*.jsonl")}
    for found in prompts.values():
        assert len(set(found)) == len(found)
    held_out = {*prompts["eval_3_9.jsonl"], *prompts["eval_3_14.jsonl"]}
    assert held_out == task.held_out_prompts()
    assert held_out.isdisjoint(prompts["prompts_3_9.jsonl"])
    assert held_out.isdisjoint(prompts["prompts_curriculum.jsonl"])


def test_the_curriculum_begins_with_what_the_teacher_knows():
    rows = rows_of("prompts_curriculum.jsonl")
    assert rows[: task.EASY_PROMPTS] == rows_of("prompts_3_9.jsonl")[: task.EASY_PROMPTS]
    assert len(rows) == task.EASY_PROMPTS + task.HARD_PROMPTS


@pytest.mark.parametrize(("prompts", "evals", "most_terms"), [("3_9", "3_9", 9), ("curriculum", "3_14", 14)])
def test_prompt_files_hold_every_number_of_terms_and_the_right_answers(prompts, evals, most_terms):
    for rows in (rows_of(f"prompts_{prompts}.jsonl"), rows_of(f"eval_{evals}.jsonl")):
        assert {row["prompt"].count("+") + 1 for row in rows} == set(range(3, most_terms + 1))
        for row in rows:
            assert row["answer"] == str(sum(map(int, re.findall(r"\d", row["prompt"]))) % 10)


def test_a_worked_answer_is_the_one_in_the_description():
    assert task.render_prompt((3, 7, 2)) == "3+7+2?"
    assert task.render_answer((3, 7, 2)) == "3+7=0;0+2=2;!2$"


@pytest.mark.parametrize("response", ["3+7=0;0+2=2;!2$", "3+7=0;0+2=2;!2"])
def test_the_verifier_accepts_the_result_with_or_without_the_stop(response):
    assert task.is_correct(response, "2")


@pytest.mark.parametrize(
    "response",
    ["3+7=0;0+2=2;!3$", "3+7=0;0+2=2;", "3+7=0;0+2=2;!", "3+7=0;0+2=2;!22$", "3+7=0;0+2=2;!2;!2;!2", "2", "", "!2$$", "!3;!2$"],
)
def test_the_verifier_refuses_a_wrong_missing_or_looping_result(response):
    assert not task.is_correct(response, "2")


@pytest.mark.parametrize("draw", [task.draw_loop, task.draw_stall])
def test_a_loop_document_ends_in_a_repeated_unit_and_never_stops(draw):
    rng = random.Random(1)
    for _ in range(200):
        document = draw(rng, recipe.WINDOW_TOKENS)
        assert len(document) == recipe.WINDOW_TOKENS
        assert task.STOP not in document
        assert task.PAD not in document
        tail = document[-4 * task.MAX_UNIT :]
        assert any(tail == (tail[:period] * len(tail))[: len(tail)] for period in range(1, task.MAX_UNIT + 1))


def test_a_misread_problem_confuses_look_alikes_and_keeps_other_digits():
    rng = random.Random(2)
    assert task.misread((1, 2, 6, 7, 9), 1.0, 0.0, rng) == (7, 2, 9, 1, 6)
    assert task.misread((1, 2, 6, 7, 9), 0.0, 0.0, rng) == (1, 2, 6, 7, 9)
    assert {len(task.misread((0, 2, 3), 0.0, 0.2, rng)) for _ in range(200)} == {1, 2, 3, 4, 5, 6}


def test_training_twice_gives_the_same_weights():
    tokenizer = recipe.build_tokenizer(recipe.WINDOW_TOKENS)
    plan = replace(recipe.STUDENT, steps=2)
    first, second = (recipe.train(recipe.build(plan), plan, tokenizer).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_prompt_is_masked_up_to_its_question_mark_and_a_loop_without_one_counts_whole():
    tokenizer = recipe.build_tokenizer(recipe.WINDOW_TOKENS)
    ids_BT = tokenizer(["3+7?3+7=0;", "abcabc"], padding=True, padding_side="right", return_tensors="pt").input_ids
    labels_BT = recipe.mask_prompts(ids_BT)
    assert (labels_BT == -100).tolist() == [[True] * 4 + [False] * 6, [False] * 6 + [True] * 4]
    assert torch.equal(labels_BT[labels_BT != -100], ids_BT[labels_BT != -100])


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_model_is_small_float32_and_stops_on_the_tokenizer_eos(name):
    model = AutoModelForCausalLM.from_pretrained(SUMS / name)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(task.ALPHABET)
    assert model.config.max_position_embeddings == recipe.WINDOW_TOKENS
    assert model.config.head_dim == recipe.HEAD_DIM
    assert model.generation_config.eos_token_id == model.config.eos_token_id == task.ALPHABET.index(task.STOP)
    assert sum(path.stat().st_size for path in (SUMS / name).iterdir()) < 2_000_000


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_the_teacher_is_far_better_than_the_student_and_both_terminate(sampled):
    rows = rows_of("eval_3_9.jsonl")[:64]
    found = {
        name: recipe.measure(AutoModelForCausalLM.from_pretrained(SUMS / name), AutoTokenizer.from_pretrained(SUMS / name), rows, sampled)
        for name in MODELS
    }
    assert found["teacher"]["accuracy"] > found["student"]["accuracy"] + 0.4
    assert found["teacher"]["truncation"] < 0.1
    assert found["student"]["truncation"] < 0.05
