"""What may change while a job runs, and how changes are kept."""

import contextlib
import itertools
import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from opd_governor.actors.learner.settings import LearnerSettings
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.services.job.tunables import (
    ConfigError,
    ConfigStore,
    LearnerTunables,
    RolloutTunables,
    StaleConfigError,
    Tunables,
    merge_patch,
)
from tests.disks import small_disk
from tests.services.control.fake_run import make_job

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.jsonl"


@pytest.mark.parametrize(("tunable", "settings"), [(RolloutTunables, RolloutSettings), (LearnerTunables, LearnerSettings)])
def test_a_tunable_field_has_the_type_and_range_of_the_setting_it_tunes(tunable, settings):
    for name, field in tunable.model_fields.items():
        source = settings.model_fields[name]
        assert (field.annotation, field.metadata, field.default) == (source.annotation, source.metadata, source.default)


def test_tunables_go_out_of_a_job_and_back_in():
    job = make_job(rollout={"top_k": 5, "num_actors": 2})
    tunables = Tunables.of(job)
    assert tunables.rollout.top_k == 5
    assert tunables.apply(job) == job
    hotter = tunables.model_copy(update={"rollout": tunables.rollout.model_copy(update={"temperature": 1.5})})
    assert hotter.apply(job).rollout.temperature == 1.5
    assert hotter.apply(job).rollout.num_actors == 2


def test_values_that_the_job_would_refuse_are_refused():
    job = make_job()
    tunables = Tunables.of(job)
    frozen_solid = tunables.model_copy(update={"rollout": tunables.rollout.model_copy(update={"temperature": 0.0})})
    with pytest.raises(ValidationError, match="temperature"):
        frozen_solid.apply(job)


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [  # RFC 7396, appendix A
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch_does_what_the_rfc_shows(target, patch, result):
    assert merge_patch(target, patch) == result


@given(JSON, JSON)
def test_the_same_merge_patch_twice_is_the_patch_once(target, patch):
    once = merge_patch(target, patch)
    assert merge_patch(once, patch) == once


def test_a_change_makes_the_next_generation_and_is_observed_when_the_loop_says_so(path):
    store = ConfigStore(make_job(), path, clock=lambda: 7.0)
    assert (store.generation, store.observed_generation) == (1, 0)
    changed = store.change({"rollout": {"max_new_tokens": 64}}, expected=1, source="me")
    assert [(change.pointer, change.old, change.new) for change in changed.changes] == [("/rollout/max_new_tokens", 256, 64)]
    generation, tunables = store.in_force()
    assert (generation, tunables.rollout.max_new_tokens) == (2, 64)
    assert store.observed_generation == 0
    store.observe(generation)
    assert store.observed_generation == 2


def test_an_equal_value_makes_no_generation(path):
    store = ConfigStore(make_job(), path)
    same = store.change({"rollout": {"temperature": 1, "max_new_tokens": 256}}, expected=1, source="me")
    assert (same.generation, same.changes) == (1, ())
    assert len(path.read_text().splitlines()) == 1


def test_null_returns_a_field_to_the_job_files_value(path):
    store = ConfigStore(make_job(rollout={"top_k": 5}), path)
    store.change({"rollout": {"top_k": 9, "top_p": 0.5}}, expected=1, source="me")
    store.change({"rollout": {"top_k": None}}, expected=2, source="me")
    assert store.in_force()[1].rollout.top_k == 5
    store.change({"rollout": None}, expected=3, source="me")
    assert store.in_force()[1].rollout == Tunables.of(make_job(rollout={"top_k": 5})).rollout


@pytest.mark.parametrize(
    ("patch", "pointers"),
    [
        ({"rollout": {"top_k": -1}}, ["/rollout/top_k"]),
        ({"rollout": {"top_k": "3"}}, ["/rollout/top_k"]),
        ({"rollout": {"top_k": True}}, ["/rollout/top_k"]),
        ({"rollout": {"num_actors": 2}}, ["/rollout/num_actors"]),
        ({"rollout": {"a/b~c": 2}}, ["/rollout/a~1b~0c"]),
        ({"rollout": {"top_k": -1, "top_p": 7}, "governor": {"mode": "x"}}, ["/rollout/top_p", "/rollout/top_k", "/governor/mode"]),
        ({"name": "other"}, ["/name"]),
        ({"name": None, "rollout": {"topk": None}}, ["/name", "/rollout/topk"]),
        ({"rollout": 3}, ["/rollout"]),
        ([], [""]),
        (None, [""]),
    ],
)
def test_a_bad_change_names_every_bad_field_and_changes_nothing(path, patch, pointers):
    store = ConfigStore(make_job(), path)
    before = path.read_text(), store.in_force()
    with pytest.raises(ConfigError) as caught:
        store.change(patch, expected=1, source="me")
    assert [pointer for pointer, _ in caught.value.errors] == pointers
    assert (path.read_text(), store.in_force()) == before


def test_one_bad_field_holds_back_the_good_ones_beside_it(path):
    store = ConfigStore(make_job(), path)
    with pytest.raises(ConfigError):
        store.change({"rollout": {"max_new_tokens": 64}, "learner": {"learning_rate": -1}}, expected=1, source="me")
    assert store.in_force()[1].rollout.max_new_tokens == 256


def test_a_stale_change_is_refused_and_says_who_was_first(path):
    store = ConfigStore(make_job(), path)
    store.change({"rollout": {"top_k": 1}}, expected=1, source="night shift")
    with pytest.raises(StaleConfigError, match=r"generation 1 is stale.*generation 2.*night shift"):
        store.change({"rollout": {"top_k": 2}}, expected=1, source="me")


def test_a_dry_run_shows_the_change_and_keeps_nothing(path):
    store = ConfigStore(make_job(), path)
    shown = store.change({"rollout": {"top_k": 1}}, expected=1, source="me", dry_run=True)
    assert [change.pointer for change in shown.changes] == ["/rollout/top_k"]
    assert store.generation == 1
    assert store.in_force()[1].rollout.top_k == 0


def test_every_generation_is_a_line_with_time_source_patch_and_both_values(path):
    store = ConfigStore(make_job(), path, clock=lambda: 7.0)
    store.change({"rollout": {"top_k": 1}}, expected=1, source="me")
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["generation"], first["source"]) == (1, "job")
    assert second | {"config": None} == {
        "generation": 2,
        "time": 7.0,
        "source": "me",
        "patch": {"rollout": {"top_k": 1}},
        "changes": [{"pointer": "/rollout/top_k", "from": 0, "to": 1}],
        "config": None,
    }
    assert second["config"]["rollout"]["top_k"] == 1


def test_a_resumed_run_goes_on_from_the_last_generation(path):
    store = ConfigStore(make_job(), path)
    store.change({"rollout": {"top_k": 1}}, expected=1, source="me")
    resumed = ConfigStore(make_job(), path)
    assert resumed.generation == 2
    assert resumed.in_force() == store.in_force()
    assert resumed.history() == store.history()


def test_a_resumed_run_takes_an_edited_job_file_except_where_somebody_tuned(path):
    store = ConfigStore(make_job(), path)
    store.change({"rollout": {"top_k": 1}}, expected=1, source="me")
    resumed = ConfigStore(make_job(rollout={"top_k": 50, "top_p": 0.5}), path)
    rollout = resumed.in_force()[1].rollout
    assert (rollout.top_k, rollout.top_p) == (1, 0.5)
    assert (resumed.generation, resumed.history()[-1].source) == (3, "resume")
    assert ConfigStore(make_job(rollout={"top_k": 50, "top_p": 0.5}), path).generation == 3


def test_a_line_torn_by_a_crash_is_cut_off_and_the_run_goes_on(path):
    store = ConfigStore(make_job(), path)
    store.change({"rollout": {"top_k": 1}}, expected=1, source="me")
    whole = path.read_text()
    path.write_text(whole + '{"generation": 3, "ti')
    resumed = ConfigStore(make_job(), path)
    assert resumed.generation == 2
    resumed.change({"rollout": {"top_k": 2}}, expected=2, source="me")
    assert ConfigStore(make_job(), path).in_force()[1].rollout.top_k == 2


def test_of_many_changes_against_one_generation_exactly_one_wins(path):
    store = ConfigStore(make_job(), path)
    won: list[int] = []
    start = threading.Barrier(20)

    def change(top_k: int) -> None:
        start.wait()
        try:
            store.change({"rollout": {"top_k": top_k}}, expected=1, source=str(top_k))
        except StaleConfigError:
            return
        won.append(top_k)

    threads = [threading.Thread(target=change, args=(top_k,)) for top_k in range(1, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [store.in_force()[1].rollout.top_k]
    assert [generation.generation for generation in store.history()] == [1, 2]


def test_a_change_that_finds_no_room_on_the_disk_is_not_made_and_leaves_no_half_line(tmp_path: Path):
    with small_disk(tmp_path / "disk", 64) as disk:
        store = ConfigStore(make_job(), disk / "config.jsonl")
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        top_k = itertools.count(1)

        def change_until_full() -> None:
            while True:  # the last page of the file has room for a few
                store.change({"rollout": {"top_k": next(top_k)}}, expected=None, source="test")

        with pytest.raises(OSError, match="No space left"):
            change_until_full()
        refused = next(top_k) - 1
        assert store.in_force()[1].rollout.top_k == refused - 1
        (disk / "filler").unlink()
        store.change({"rollout": {"top_k": 99}}, expected=None, source="test")
        again = ConfigStore(make_job(), disk / "config.jsonl")
        assert [generation.config["rollout"]["top_k"] for generation in again.history()] == [*range(refused), 99]
