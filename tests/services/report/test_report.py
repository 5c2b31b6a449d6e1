"""The summary sentence, the report page and the picture of a run."""

import json
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from opd_governor.services.job.settings import JobError
from opd_governor.services.record.rundir import Record
from opd_governor.services.report.figures import MAX_POINTS, series
from opd_governor.services.report.report import compare_reports, summarise_run, verdict, write_report

JOB: Record = {"name": "sums", "learner": {"total_steps": 120}, "governor": {"mode": "enforce"}}


def make_records(num: int, truncation: list[float] | float = 0.0, length: list[float] | float = 30.0) -> list[Record]:
    """Steps of 32 rollouts; accuracy .21 at step 1 and .84 at the last."""
    truncations = truncation if isinstance(truncation, list) else [truncation] * num
    lengths = length if isinstance(length, list) else [length] * num
    records: list[Record] = [
        {
            "step": step,
            "time": 1.76e9 + step,
            "num_rollouts": 32,
            "length_mean": lengths[step - 1],
            "length_p95": 1.5 * lengths[step - 1],
            "length_max": int(2 * lengths[step - 1]),
            "truncation": truncations[step - 1],
            "loops": truncations[step - 1] / 2,
            "cap_tokens": 192 - step // 10,
            "pressure": truncations[step - 1],
            "config_generation": 1 + step // 60,
            "kl_nats": 1 / step,
            "step_s": 0.5,
            "wait_s": 0.1,
            "tokens_per_s": 1900.0,
        }
        for step in range(1, num + 1)
    ]
    records[0]["eval_accuracy"] = 0.21
    records[-1]["eval_accuracy"] = 0.84
    return records


def make_decision(step: int, action: str = "hold", mode: str = "enforce", reason: str = "all signals within their targets") -> Record:
    return {
        "step": step,
        "mode": mode,
        "action": action,
        "signal": "" if action == "hold" else "tail_share",
        "reason": reason,
        "pressure": 0.4,
        "signals": {"reference_mean_tokens": 30.0},
    }


def write_run(
    path: Path, records: Sequence[Record], decisions: Sequence[Record] = (), samples: Sequence[Record] = (), name: str = "sums"
) -> Path:
    path.mkdir()
    (path / "job.yaml").write_text(yaml.safe_dump(JOB | {"name": name}))
    for file, lines in (("metrics", records), ("decisions", decisions), ("samples", samples)):
        (path / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class TestVerdict:
    def test_of_a_healthy_run_gives_accuracy_lengths_and_what_the_governor_did(self) -> None:
        decisions = [make_decision(step) for step in range(1, 121)]
        assert verdict(make_records(120), decisions, JOB) == (
            "Finished: held-out accuracy .21 -> .84 in 120 steps; lengths stayed healthy (truncation at most 0 %); "
            "the governor acted at 0 steps."
        )

    def test_of_an_inflated_run_names_the_step_at_which_truncation_passed_the_governors_own_threshold(self) -> None:
        rates = [0.0] * 100 + [0.1, 0.29, 0.31] + [0.95] * 17
        sentence = verdict(make_records(120, rates), [make_decision(102, "tighten")], JOB)
        assert sentence.startswith("Inflated (finished): truncation passed 30 % at step 103 and stands at 95 %; held-out accuracy")
        assert sentence.endswith("the governor acted at 1 step.")

    def test_of_a_run_that_came_back_says_so(self) -> None:
        rates = [0.0] * 50 + [0.6] * 10 + [0.02] * 60
        assert "Inflated and recovered (finished): truncation passed 30 % at step 51, reached 60 % and fell to 2 %" in verdict(
            make_records(120, rates), [], JOB
        )

    def test_one_bad_step_among_small_batches_is_no_inflation(self) -> None:
        records = [record | {"num_rollouts": 4} for record in make_records(120, [0.0] * 60 + [0.75] + [0.0] * 59)]
        assert "lengths did not inflate (truncation at most 9 %, 0 % at the end)" in verdict(records, [], JOB)

    def test_of_a_student_that_never_stopped_blames_no_step(self) -> None:
        assert verdict(make_records(120, 0.9), [], JOB).startswith("Truncated from the start (finished): truncation was never below 30 %")

    @pytest.mark.parametrize("decisions", [[], [make_decision(120)]], ids=["against its start", "against the reference"])
    def test_of_a_collapse_to_short_answers(self, decisions: list[Record]) -> None:
        sentence = verdict(make_records(120, length=[30.0] * 70 + [2.0] * 50), decisions, JOB)
        assert sentence.startswith("Collapsed short (finished): mean length fell to 2.0 tokens against 30.0 ")
        assert "short from step 71 on" in sentence

    def test_of_a_run_under_way(self) -> None:
        assert verdict(make_records(57), [], JOB, idle_s=2.0).startswith("Running, step 57 of 120: held-out accuracy")
        assert verdict(make_records(57, [0.0] * 56 + [0.5]), [], JOB).startswith("Inflated (running, step 57 of 120): truncation passed")

    def test_of_a_run_that_no_longer_writes(self) -> None:
        assert verdict(make_records(57), [], JOB, idle_s=7200.0).startswith(
            "Ended early or stuck, step 57 of 120, nothing written for 2.0 h:"
        )
        assert verdict(make_records(57), [], JOB, ended=True, idle_s=0.0).startswith("Ended early, step 57 of 120:")
        slow = [record | {"step_s": 1200.0} for record in make_records(57)]
        assert verdict(slow, [], JOB, idle_s=7200.0).startswith("Running")

    def test_of_a_run_that_the_guard_rail_stopped(self) -> None:
        records = make_records(80, [0.0] * 60 + [0.9] * 20)
        assert "(stopped by the guard rail, step 80 of 120)" in verdict(records, [make_decision(80, "stop")], JOB, ended=True)
        assert "guard rail" not in verdict(records, [make_decision(80, "stop", mode="observe")], JOB)

    def test_of_a_governor_that_only_observed(self) -> None:
        decisions = [make_decision(step, "tighten" if step > 118 else "hold", mode="observe") for step in range(1, 121)]
        assert verdict(make_records(120), decisions, JOB).endswith("the governor only observed and would have acted at 2 steps.")

    def test_without_data(self) -> None:
        assert verdict([], [], JOB) == "No data yet: no step has been recorded."
        assert verdict([{"step": 0, "eval_accuracy": 0.2}], [], {}, ended=True) == "No data: the run ended before its first step."

    def test_without_evaluation(self) -> None:
        records = [record | {"eval_accuracy": None} for record in make_records(120)]
        assert "Finished: no held-out evaluation in 120 steps; lengths" in verdict(records, [], JOB)

    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1e6)), min_size=1, max_size=40), st.booleans())
    def test_is_one_sentence_for_any_run(self, run: list[tuple[float, float]], ended: bool) -> None:
        rates, lengths = ([pair[i] for pair in run] for i in (0, 1))
        sentence = verdict(make_records(len(run), rates, lengths), [], JOB, ended=ended)
        assert sentence.endswith(".")
        assert "\n" not in sentence


class Page(HTMLParser):
    """A page's tags, its text by innermost tag, and everything it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text: defaultdict[str, str] = defaultdict(str)
        self._open = [""]
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value and not value.startswith("#")]
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text[self._open[-1]] += data


class TestReport:
    def test_stands_alone_with_every_part(self, tmp_path: Path) -> None:
        decisions = [make_decision(s, "tighten" if 50 <= s < 60 else "hold", reason=f"tail share over at {s}") for s in range(1, 121)]
        samples = [
            {"step": 9, "prompt": "1+2?", "response": "3; 3; 3;", "finish_reason": "length", "length_tokens": 8, "loop_onset_char": 2}
        ]
        run = write_run(tmp_path / "run", make_records(120), decisions, samples)
        change = {"pointer": "/rollout/max_new_tokens", "from": 192, "to": 128}
        (run / "config.jsonl").write_text(json.dumps({"generation": 2, "time": 1.76e9, "source": "opd tune", "changes": [change]}) + "\n")

        html = write_report(run).read_text()

        page = Page(html)
        assert not page.links
        assert "script" not in page.tags
        assert page.tags.count("svg") == 7, "length, truncation, accuracy, KL, pressure, knobs, step time"
        assert page.text["mark"] == " 3; 3;"
        assert "50-59" in page.text["th"]
        assert "tail share over at 50" in page.text["td"]
        assert "/rollout/max_new_tokens" in page.text["td"]
        assert "total_steps: 120" in html
        for svg in html.split("<svg")[1:]:
            ElementTree.fromstring("<svg" + svg.partition("</svg>")[0] + "</svg>")
        assert (run / "length.png").read_bytes().startswith(b"\x89PNG")

    def test_shows_what_a_student_wrote_as_text(self, tmp_path: Path) -> None:
        evil = "<script>alert(1)</script>&{{ 1 }}"
        sample = {"step": 1, "prompt": evil, "response": evil * 2, "finish_reason": evil, "length_tokens": 2, "loop_onset_char": len(evil)}
        decision = make_decision(1, "tighten", reason=evil)
        page = Page(write_report(write_run(tmp_path / "run", make_records(1), [decision], [sample])).read_text())
        assert "script" not in page.tags
        assert page.text["mark"] == evil

    @pytest.mark.parametrize(
        "records",
        [[], [{"step": 0, "eval_accuracy": 0.2}], [{"step": 1, "length_mean": 0.0, "kl_nats": None, "truncation": 0.0}], make_records(1)],
        ids=["none", "an evaluation only", "a step without a report", "one step"],
    )
    def test_of_a_run_that_has_hardly_begun(self, tmp_path: Path, records: list[Record]) -> None:
        run = write_run(tmp_path / "run", records)
        assert write_report(run, ended=True).exists()
        assert (run / "length.png").exists()

    def test_of_a_crashed_run_leaves_out_the_line_that_was_cut_short(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", make_records(5))
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "length_me')
        assert "step 5 of 120" in write_report(run).read_text()

    def test_writes_nothing_else_and_again_over_itself(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", make_records(3))
        before = {path.name for path in run.iterdir()}
        write_report(run)
        write_report(run)
        assert {path.name for path in run.iterdir()} == before | {"report.html", "length.png"}

    def test_of_a_folder_that_holds_no_run_is_the_users_mistake(self, tmp_path: Path) -> None:
        with pytest.raises(JobError, match=r"no job\.yaml in it; give the folder"):
            write_report(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_ends_a_run_in_the_terminal_with_the_verdict_and_where_to_look(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [])
        (run / "final").mkdir()
        sentence, student, page, picture = summarise_run(run, make_records(57))
        assert sentence.startswith("Ended early, step 57 of 120: held-out accuracy .21 -> .84")
        assert student.endswith("/run/final")
        assert page.endswith("/run/report.html")
        assert picture.endswith("/run/length.png")

    def test_puts_runs_side_by_side(self, tmp_path: Path) -> None:
        a = write_run(tmp_path / "a", make_records(120), name="plain")
        b = write_run(tmp_path / "b", make_records(120, [0.0] * 60 + [0.9] * 60), name="governed")
        out = compare_reports([a, b], tmp_path / "both.html")
        page = Page(out.read_text())
        assert "Inflated (finished)" in page.text["p"]
        assert "Finished: " in page.text["p"]
        assert page.tags.count("svg") == 6
        assert "0.0% → 90.0%" in page.text["td"]
        assert "total_steps" not in page.text["th"], "both have the same"
        same_name = compare_reports([a, write_run(tmp_path / "c", make_records(9), name="plain")], tmp_path / "again.html")
        assert str(a) in same_name.read_text()


def test_a_long_run_is_thinned_without_losing_its_longest_rollout() -> None:
    records: list[Record] = [{"step": step, "length_max": 1000 if step == 4321 else 10, "truncation": 0.5} for step in range(1, 10_001)]
    steps, values = series(records, "length_max")
    assert len(steps) == MAX_POINTS
    assert values.max() == 1000
    assert set(series(records, "truncation")[1]) == {0.5}
