"""The pool over fake actors: they have the methods of RayTeacher and a script of what goes wrong."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from opd_governor.actors.deadlines import CallerError, HungError
from opd_governor.actors.teacher import member
from opd_governor.actors.teacher.attempts import Events
from opd_governor.actors.teacher.member import CALL_BATCHES
from opd_governor.actors.teacher.pool import Support, TeacherPool
from opd_governor.actors.teacher.scorers import ScoreRequest
from opd_governor.actors.teacher.settings import TeacherSettings
from tests.teacher.fake_teacher import FakeTeacher, Log, build, settings, trajectory


async def test_each_request_goes_to_the_least_loaded_actor():
    busy, idle = FakeTeacher(pace_s=0.05), FakeTeacher(pace_s=0.05)
    pool = build([(settings(), [busy, idle])])
    long, short = trajectory(length=100), trajectory(length=4)
    scores = await pool.score([long, short, short, short])
    assert [score.sampled_logp_T.shape for score in scores] == [(100,), (4,), (4,), (4,)]
    assert sum(busy.calls) == 1
    assert sum(idle.calls) == 3
    assert all(member.load_tokens == 0 for member in pool.members)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
async def test_hidden_states_arrive_whole_and_one_that_is_no_number_does_not(dtype):
    class Hidden(FakeTeacher):
        async def score(self, requests):
            assert all(request.hidden for request in requests)
            process, scores = await super().score(requests)
            good = np.ones((4, 2), np.float32)
            spoiled = good.copy()
            spoiled[2, 1] = -np.inf
            states = [array if dtype == np.float32 else (array.view(np.uint32) >> 16).astype(np.uint16) for array in (good, spoiled)]
            return process, [replace(s, sampled_logp_T=s.sampled_logp_T * np.nan, hidden_TH=h) for s, h in zip(scores, states, strict=True)]

    log = Log()
    pool = TeacherPool([(settings(max_attempts=1), [Hidden()])], support=Support(hidden=True), events=Events(on_request=log.request))
    whole, spoiled = await pool.score([trajectory(), trajectory(index=1)])
    assert whole.hidden_TH.shape == (4, 2)
    assert spoiled is None
    assert log == {("teacher", "ok"): 1, ("teacher", "nonfinite"): 1}


async def test_requests_that_wait_go_together_within_a_few_batches():
    actor = FakeTeacher(pace_s=0.3)
    pool = build([(settings(batch_tokens=21), [actor])])
    first = asyncio.create_task(pool.score([trajectory()]))
    await asyncio.sleep(0.01)
    await asyncio.gather(first, *(pool.score([trajectory()]) for _ in range(14)))
    assert actor.calls == [1, 3 * CALL_BATCHES, 2]  # 7 tokens each: three to a batch


async def test_requests_stay_together_for_a_busy_actor_and_are_spread_over_idle_ones():
    actors = [FakeTeacher(pace_s=0.3) for _ in range(3)]
    pool = build([(settings(batch_tokens=28), actors)])
    first = asyncio.gather(pool.score([trajectory() for _ in range(6)]))
    await asyncio.sleep(0.01)
    assert [actor.calls for actor in actors] == [[2], [2], [2]]
    busy = asyncio.gather(pool.score([trajectory() for _ in range(6)]))
    await asyncio.sleep(0.01)
    assert [member.load_tokens for member in pool.members] == [14 + 4 * 7, 14 + 2 * 7, 14]  # what fits one batch, then the next actor
    await asyncio.gather(first, busy)
    assert [actor.calls for actor in actors] == [[2, 4], [2, 2], [2]]
    assert all(member.load_tokens == 0 for member in pool.members)


async def test_scores_keep_the_order_of_their_trajectories_whoever_made_them():
    pool = build([(settings(name=name, domains=(name,), batch_tokens=16), [FakeTeacher(), FakeTeacher()]) for name in "ab"])
    lengths, domains = [5, 3, 9, 40, 1, 7], "abbaba"
    scores = await pool.score([trajectory(domain, length=length) for domain, length in zip(domains, lengths, strict=True)])
    assert [(score.teacher, len(score.sampled_logp_T)) for score in scores] == list(zip(domains, lengths, strict=True))


async def test_what_a_back_end_gives_up_is_unscored_alone():
    class Choosy(FakeTeacher):
        async def score(self, requests):
            process, scores = await super().score(requests)
            return process, [None if len(request.token_ids) > 5 else score for request, score in zip(requests, scores, strict=True)]

    log = Log()
    pool = build([(settings(name="t"), [Choosy()])], log)
    scores = await pool.score([trajectory(length=length) for length in (4, 9, 5)])
    assert [score is None for score in scores] == [False, True, False]
    assert log == {("t", "ok"): 2, ("t", "unscored"): 1}


async def test_nobody_scores_for_a_caller_that_has_gone():
    actor = FakeTeacher(pace_s=0.02)
    pool = build([(settings(), [actor])])
    first = asyncio.create_task(pool.score([trajectory()]))
    await asyncio.sleep(0.01)
    gone = asyncio.create_task(pool.score([trajectory(), trajectory()]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gone.cancel()
    await first
    await asyncio.sleep(0.01)
    assert actor.calls == [1]
    assert pool.members[0].load_tokens == 0


async def test_a_failed_call_is_retried_on_another_actor():
    log = Log()
    sick, well = FakeTeacher(faults=[RuntimeError("out of memory")] * 99), FakeTeacher()
    pool = build([(settings(name="t"), [sick, well])], log)
    scores = await pool.score([trajectory()])
    assert [score.teacher for score in scores] == ["t"]
    assert log == {("t", "error"): 1, ("t", "ok"): 1}


async def test_a_sick_actor_is_set_aside_and_asked_less_and_less():
    sick, well = FakeTeacher(faults=[RuntimeError("sick")] * 999), FakeTeacher()
    pool = build([(settings(), [sick, well])])
    for _ in range(50):
        assert (await pool.score([trajectory()]))[0] is not None
        await asyncio.sleep(0.004)
    assert len(sick.calls) < 10  # of 50: it came first each time it was live
    await pool.close()


async def test_a_crashed_actor_comes_back_and_the_restart_is_counted():
    log = Log()
    actor = FakeTeacher(faults=[ConnectionError("actor died")])
    pool = build([(settings(name="t"), [actor])], log)
    await pool.start()
    assert None not in await pool.score([trajectory(), trajectory()])
    assert log == {("t", "error"): 2, ("t", "ok"): 2, ("t", "crash"): 1}


async def test_an_actor_that_came_back_while_nobody_asked_it_is_counted_once():
    log = Log()
    actor, other = FakeTeacher(), FakeTeacher()
    pool = build([(settings(name="t"), [actor, other])], log)
    await pool.start()
    await pool.score([trajectory(), trajectory()])
    actor.pid += 1
    for _ in range(3):
        assert None not in await pool.score([trajectory(), trajectory()])
    assert log == {("t", "ok"): 8, ("t", "crash"): 1}


async def test_a_restart_that_an_answer_tells_before_the_ping_is_counted_once():
    class Slow(FakeTeacher):
        async def ping(self):
            await asyncio.sleep(0.03)
            return str(self.pid)

    log = Log()
    actor = Slow(faults=[ConnectionError("actor died")], pace_s=0.01)
    pool = build([(settings(name="t"), [actor])], log)
    await pool.start()
    with pytest.raises(ConnectionError):
        await pool.members[0].submit([ScoreRequest((5,), (7,))])
    await pool.members[0].submit([ScoreRequest((5,), (7,))])
    assert not pool.members[0].live.is_set()
    assert log == {("t", "crash"): 1}
    await pool.members[0].live.wait()
    assert log == {("t", "crash"): 1}


async def test_a_hanging_actor_is_restarted_and_its_request_goes_elsewhere():
    log = Log()
    stuck, well = FakeTeacher(faults=[60.0]), FakeTeacher()
    pool = build([(settings(name="t", timeout_s=0.05), [stuck, well])], log)
    await pool.start()
    assert None not in await pool.score([trajectory()])
    await asyncio.sleep(0.02)
    assert stuck.restarts == 1
    assert log == {("t", "timeout"): 1, ("t", "ok"): 1, ("t", "hang"): 1}


async def test_a_slow_request_is_hedged_on_a_second_actor():
    slow, fast = FakeTeacher(logp=-5, faults=[0.3]), FakeTeacher(logp=-2)
    pool = build([(settings(hedge_after_s=0.02), [slow, fast])])
    started = asyncio.get_running_loop().time()
    scores = await pool.score([trajectory()])
    assert scores[0].sampled_logp_T[0] == -2
    assert asyncio.get_running_loop().time() - started < 0.2
    await pool.close()


async def test_when_the_hedge_fails_the_slow_answer_still_counts():
    slow, broken = FakeTeacher(logp=-5, faults=[0.1]), FakeTeacher(faults=[RuntimeError("no")])
    pool = build([(settings(hedge_after_s=0.02), [slow, broken])])
    assert (await pool.score([trajectory()]))[0].sampled_logp_T[0] == -5


async def test_a_score_that_never_arrives_is_none_and_its_batch_mates_are_not_lost():
    log = Log()
    actor = FakeTeacher(faults=[RuntimeError("a"), RuntimeError("b")])
    pool = build([(settings(name="t", max_attempts=2), [actor])], log)
    assert await pool.score([trajectory()]) == [None]
    assert None not in await pool.score([trajectory()])
    assert log == {("t", "error"): 2, ("t", "unscored"): 1, ("t", "ok"): 1}


async def test_without_a_live_actor_the_request_waits_then_is_unscored():
    class Dead(FakeTeacher):
        async def ping(self):
            raise ConnectionError("gone")

    pool = build([(settings(name="t", timeout_s=0.1, max_attempts=5), [Dead(faults=[RuntimeError("dead")] * 9)])])
    assert pool.num_live() == {"t": 1}
    assert await asyncio.wait_for(pool.score([trajectory()]), 2) == [None]
    assert pool.num_live() == {"t": 0}
    await pool.close()


async def test_nonfinite_scores_are_unscored_kept_for_inspection_and_not_retried():
    log, kept = Log(), []
    actor = FakeTeacher(faults=[np.nan])
    pool = build([(settings(name="t"), [actor])], log, on_nonfinite=lambda trajectory, scores: kept.append((trajectory, scores)))
    sample = trajectory()
    assert await pool.score([sample]) == [None]
    assert kept[0][0] is sample
    assert np.isnan(kept[0][1].sampled_logp_T).all()
    assert log == {("t", "nonfinite"): 1}


async def test_padded_support_entries_may_be_minus_infinity():
    class Padded(FakeTeacher):
        async def score(self, requests):
            process, (scores,) = await super().score(requests)
            scores.support_logp_TK[scores.support_ids_TK < 0] = -np.inf
            return process, [scores]

    pool = build([(settings(), [Padded()])], support=Support(student=True))
    sample = trajectory()
    sample.support_ids_TK[:, 1] = -1
    assert (await pool.score([sample]))[0].support_logp_TK.tolist() == [[-1.0, -np.inf]] * 4


async def test_a_users_mistake_is_raised_at_once():
    actor = FakeTeacher(faults=[CallerError("context window 16")])
    pool = build([(settings(), [actor])])
    with pytest.raises(ValueError, match="context window 16"):
        await pool.score([trajectory()])
    assert actor.calls == [1]
    assert pool.members[0].live.is_set()


async def test_each_domain_has_its_teacher():
    maths, code = FakeTeacher(logp=-1), FakeTeacher(logp=-2)
    pool = build([(settings(name="m", domains=("maths",)), [maths]), (settings(name="c", domains=("code", "sql")), [code])])
    scores = await pool.score([trajectory("sql"), trajectory("maths"), trajectory("code")])
    assert [score.teacher for score in scores] == ["c", "m", "c"]


async def test_a_domain_without_teacher_is_refused_at_construction():
    with pytest.raises(ValueError, match=r"domain 'law' has no teacher \(teacher.domains: {'m': \('maths',\)}\)"):
        build([(settings(name="m", domains=("maths",)), [FakeTeacher()])], domains={"maths", "law"})


async def test_teachers_with_the_same_actors_share_load_and_health():
    shared = FakeTeacher()
    pool = build([(settings(name="a", domains=("x",)), [shared]), (settings(name="b", domains=("y",)), [shared])])
    assert len(pool.members) == 1
    scores = await pool.score([trajectory("x"), trajectory("y")])
    assert [score.teacher for score in scores] == ["a", "b"]
    assert shared.calls == [2]


async def test_a_concise_teacher_sees_its_own_prompt():
    actor = FakeTeacher()
    await build([(settings(), [actor])]).score([trajectory(), trajectory(teacher_token_ids=(1, 2))])
    assert actor.prompts == [(5, 5, 5), (1, 2)]


async def test_a_trajectory_without_the_support_asked_for_is_refused():
    pool = build([(settings(), [FakeTeacher()])], support=Support(student=True))
    with pytest.raises(ValueError, match="carries no support_ids_TK"):
        await pool.score([replace(trajectory(), support_ids_TK=None)])


async def test_golden_answers_do_not_depend_on_the_number_of_actors():
    prompts = [trajectory(index=i, prompt_length=1 + i % 3).prompt for i in range(50)]
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 7}
    alone = await build([(settings(beams=4), [FakeTeacher()])]).golden(prompts, **options)
    actors = [FakeTeacher(), FakeTeacher(faults=[RuntimeError("once")]), FakeTeacher()]
    together = await build([(settings(beams=4), actors)]).golden(prompts, **options)
    assert alone == together
    assert alone[17] == (7 + 16, 5, 5, 5, 4)
    assert all(actor.prompts for actor in (actors[0], actors[2]))


async def test_golden_prompts_that_no_actor_answers_are_none():
    pool = build([(settings(max_attempts=1), [FakeTeacher(faults=[RuntimeError("gone")])])])
    assert await pool.golden([trajectory().prompt], max_new_tokens=8, temperature=1.0, seed=0) == [None]


async def test_alone_no_request_shares_a_call_with_another():
    teacher = FakeTeacher(pace_s=0.005)
    pool = TeacherPool([(TeacherSettings(model="m"), [teacher])], strict=True)
    scores = await pool.score([trajectory(index=index) for index in range(5)])
    assert teacher.calls == [1] * 5
    assert all(score is not None for score in scores)


async def test_a_teacher_that_does_not_come_up_is_named_with_the_seconds_waited(monkeypatch):
    class Silent(FakeTeacher):
        async def ping(self):
            await asyncio.sleep(60)

    monkeypatch.setattr(member, "START_TIMEOUT_S", 0.05)
    said = []
    with pytest.raises(HungError, match=r"waited 0\.\d s for the start of an actor of teacher big, deadline"):
        await build([(settings(name="big"), [Silent()])], say=said.append).start()
    assert "watchdog" in said[0]


async def test_an_actors_own_value_error_sets_it_aside_and_the_request_is_asked_elsewhere():
    log, sick = Log(), FakeTeacher(faults=[ValueError("setting an array element with a sequence")])
    pool = build([(settings(), [sick, FakeTeacher()])], log)
    (score,) = await pool.score([trajectory()])
    assert score is not None
    assert log["teacher", "error"] == 1
