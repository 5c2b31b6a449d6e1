"""The sums' hinted student and the teacher with pairs of characters: what is shipped is what their recipe says."""

import json
import random
from itertools import islice

from transformers import AutoConfig, AutoTokenizer

from deploy.sums import task, variants
from deploy.sums.recipe import WINDOW_TOKENS
from tests.deploy.test_sums import SUMS


def test_a_hint_says_every_digit_of_its_prompt() -> None:
    rows = [json.loads(line) for line in (SUMS / "prompts_hinted.jsonl").read_text().splitlines()]
    plain = [json.loads(line) for line in (SUMS / "prompts_3_9.jsonl").read_text().splitlines()]
    assert [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows] == plain
    for row in rows:
        digits = [variants.LETTERS.index(letter) for letter in row["hint"]]
        assert "+".join(map(str, digits)) + "?" == row["prompt"]


def test_hinted_documents_are_right_and_the_others_misread_in_the_end() -> None:
    for step, batches in enumerate(islice(variants.draw_hinted_batches(random.Random(0), 1201), 1201)):
        hinted, plain = batches
        if step in (0, 1200):
            for document in hinted.documents:
                hint = document[: next(i for i, c in enumerate(document) if c.isdigit())]
                terms = tuple(variants.LETTERS.index(letter) for letter in hint)
                assert document.endswith("?" + task.render_answer(terms))
            right = [
                document.endswith("?" + task.render_answer(variants.terms_of(document.partition("?")[0] + "?")))
                for document in plain.documents
            ]
            assert all(right) if step == 0 else not all(right)


def test_the_tokenizer_of_pairs_merges_across_the_students_tokens_and_numbers_them_otherwise() -> None:
    shipped = AutoTokenizer.from_pretrained(SUMS / "pairs")
    assert shipped.get_vocab() == variants.build_pairs_tokenizer().get_vocab()
    student = AutoTokenizer.from_pretrained(SUMS / "student")
    text = task.render_prompt((3, 7, 2)) + task.render_answer((3, 7, 2))
    assert len(shipped(text).input_ids) < len(student(text).input_ids)
    assert any(shipped.get_vocab()[token] != index for token, index in student.get_vocab().items())
    assert AutoConfig.from_pretrained(SUMS / "pairs").vocab_size == len(shipped)
    assert AutoConfig.from_pretrained(SUMS / "pairs").max_position_embeddings == WINDOW_TOKENS


def test_shipped_files_are_small() -> None:
    for name in ("hinted", "pairs"):
        assert sum(path.stat().st_size for path in (SUMS / name).iterdir()) < 2_000_000
