from decimal import Decimal

import pytest

from opd_governor.services.inputs.verifiers import VERIFIERS, Response, last_number, load_verifier, summarise
from opd_governor.services.job.settings import JobError


def test_exact_ignores_the_space_around():
    verify = load_verifier("exact")
    assert verify(" 42\n", "42")
    assert not verify("42.", "42")


def test_regex_searches_the_answer_s_pattern():
    verify = load_verifier("regex")
    assert verify("the answer is 42", r"\b42$")
    assert not verify("421", r"\b42\b")


def test_a_function_of_a_file_or_a_module_verifies(tmp_path):
    path = tmp_path / "verifier.py"
    path.write_text("def ends(response, answer):\n    return response.endswith(answer)\n")
    assert load_verifier(f"{path}:ends")("so 7", "7")
    assert load_verifier("operator:eq")("7", "7")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            "exactly",
            "expected exact, regex, number, math-verify, json-schema, unit-tests, an http(s) address, file.py:function or module:function",
        ),
        ("absent.py:f", "absent.py does not load (FileNotFoundError: no such file)"),
        ("absent_module:f", "No module named 'absent_module'"),
        ("operator:absent", "operator has no function absent"),
        ("broken.py:f", "ZeroDivisionError"),
    ],
)
def test_a_verifier_that_does_not_load_is_one_line(tmp_path, monkeypatch, spec, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(JobError) as caught:
        load_verifier(spec)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"data.eval.verifier {spec}")


def test_a_summary_is_means_over_the_responses():
    right, wrong = Response("4", "4", num_tokens=2, truncated=False), Response("5", "4", num_tokens=8, truncated=True)
    summary = summarise([right, right, wrong, wrong], load_verifier("exact"))
    assert (summary.accuracy_ratio, summary.length_tokens, summary.truncation_ratio, summary.num_problems) == (0.5, 5, 0.5, 4)
    assert summary.length_p95_tokens == 8


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7", "7"), ("it is 1,234.50.", "1234.50"), ("#### -18", "-18"), ("none", None), ("1e3", "1E+3"), ("about 50%", "50"),
        ("from 3 to 4.", "4"), ("1, 2, 3", "3"), ("$.5", "0.5"), ("", None), ("...", None), ("2024-11-05", "-05"),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text, number):
    found = last_number(text)
    assert (found is None) == (number is None)
    assert found is None or found == Decimal(number)


def test_numbers_are_compared_as_numbers():
    verify = load_verifier("number")
    assert verify("I think it is 1,000.0.", "#### 1000")
    assert not verify("I think it is 1,001.", "1000")
    assert not verify("no idea", "1000")


def test_a_verifier_that_raises_costs_its_own_response_and_is_named():
    def picky(response, answer):
        return 1 / int(response) > 0

    responses = [Response(text, "a", num_tokens=2, truncated=False) for text in ("1", "0", "x", "1")]
    summary = summarise(responses, picky)
    assert (summary.accuracy_ratio, summary.num_unjudged, summary.num_problems) == (1.0, 2, 4)
    assert summary.shortfall() == "the verifier failed on 2 of 4 responses (first: answer 'a': ZeroDivisionError: division by zero)"


def test_an_evaluation_without_answers_has_no_values_instead_of_zeros():
    summary = summarise([], load_verifier("exact"), num_unanswered=3)
    assert (summary.accuracy_ratio, summary.length_tokens, summary.truncation_ratio) == (None, None, None)
    assert summary.shortfall() == "3 of 3 problems got no answer"


def test_a_verifier_from_outside_is_known_by_its_name():
    VERIFIERS.add("starts-with")(lambda response, answer: response.startswith(answer))
    assert load_verifier("starts-with")("seven", "sev")


def test_math_verify_is_named_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(JobError, match="pip install math-verify"):
        load_verifier("math-verify")
