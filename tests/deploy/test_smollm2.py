import json
import re
from collections import Counter
from pathlib import Path

from opd_governor.services.inputs.prompts import open_problems, open_prompts
from opd_governor.services.job.load import load_job
from tests.tiny import tiny_tokenizer

JOB = Path("deploy/jobs/smollm2.yaml")


def test_the_job_opens_the_prompts_that_ship():
    job = load_job(JOB)
    stream = open_prompts(job, tiny_tokenizer(chat=True), context_tokens=512)
    problems = open_problems(job, tiny_tokenizer(chat=True), context_tokens=512).prompts
    assert (len(stream), len(problems)) == (419, 64)
    assert len(stream.survey.domains) == 12


def test_prompts_are_different_and_held_out_ones_are_not_among_them():
    prompts, held_out = (
        [json.loads(line)["prompt"] for line in Path(f"deploy/prompts/{name}.jsonl").read_text().splitlines()]
        for name in ("questions", "questions_eval")
    )
    assert Counter(prompts + held_out).most_common(1)[0][1] == 1


def test_an_eval_answer_is_not_given_away_by_its_question():
    rows = [json.loads(line) for line in Path("deploy/prompts/questions_eval.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows if re.search(row["answer"], row["prompt"])] == []
