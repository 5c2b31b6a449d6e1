import pytest

from opd_governor.services.inputs.verifiers import Response, load_verifier, summarise
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
        ("exactly", "expected exact, regex, file.py:function or module:function"),
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
