"""The Grafana dashboards of a run: Lengths (the one on the wall), Governor, Learner and teacher, Fleet.

`python -m deploy.grafana.dashboards` writes boards/*.json, which are committed; a test holds them against this program.
"""

import json
from pathlib import Path
from typing import Any

from deploy.grafana.panels import NATS, TOKENS, Panel, dashboard, foreign, mean, of, quantile, rate, ratio, recorded, shares
from opd_governor.actors.governor.actuators import metric_of, movable

BOARDS = Path(__file__).parent / "boards"
REFERENCE_MEAN = f"max by (run) ({of('opd_length_reference_tokens', stat='mean')})"
RELATIVE_DENSITY = f"{recorded('run:opd_stop_supervision:density_5m')} * on (run) {REFERENCE_MEAN}"


def limits(orange: float, red: float) -> tuple[tuple[float | None, str], ...]:
    """Green below `orange`, red from `red` on."""
    return (None, "green"), (orange, "orange"), (red, "red")


LENGTHS = (
    Panel(
        "Mean length over reference",
        "Above 1: answers are longer than golden or teacher answers. At 2 inflation is under way.",
        "suffix: x",
        ((f"{recorded('run:opd_rollout_length_tokens:mean_5m')} / on (run) {REFERENCE_MEAN}", "{{run}}"),),
        width=4, height=5, kind="stat", thresholds=limits(1.5, 2.0),
    ),
    Panel(
        "Truncation",
        "It comes last: length and loops tell earlier. OpdTruncationHigh fires at 20 %.",
        "percentunit",
        ((recorded("run:opd_truncation:ratio_5m"), "{{run}}"),),
        width=4, height=5, kind="stat", thresholds=limits(0.05, 0.2),
    ),
    Panel(
        "Loops",
        "Rollouts that repeat themselves to the end. OpdLoopsRising fires at 5 %.",
        "percentunit",
        ((recorded("run:opd_loops:ratio_5m"), "{{run}}"),),
        width=4, height=5, kind="stat", thresholds=limits(0.02, 0.05),
    ),
    Panel(
        "Pressure",
        "How hard the governor presses: 0 is the job's own settings, near 1 it rolls back.",
        "percentunit",
        ((of("opd_governor_pressure"), "{{run}}"),),
        width=4, height=5, kind="stat", thresholds=limits(0.3, 0.8),
    ),
    Panel(
        "Stops per reference length",
        "1 for a student that answers at the reference's length; it sinks by orders of magnitude before accuracy does.",
        "none",
        ((RELATIVE_DENSITY, "{{run}}"),),
        width=4, height=5, kind="stat", thresholds=((None, "red"), (0.25, "orange"), (0.6, "green")),
    ),
    Panel(
        "Held-out accuracy",
        "Stable length is necessary, not sufficient.",
        "percentunit",
        ((of("opd_eval_accuracy_ratio", decoding="greedy"), "{{run}}"),),
        width=4, height=5, kind="stat",
    ),
    Panel(
        "Length",
        "The longest rollout at twice the reference is the first sign, 15 to 30 steps ahead of a collapse.",
        TOKENS,
        (
            (recorded("run:opd_rollout_length_tokens:mean_5m"), "mean {{run}}"),
            (recorded("run:opd_rollout_length_tokens:p95_5m"), "p95 {{run}}"),
            (of("opd_rollout_length_max_tokens"), "longest of the step {{run}}"),
            (of("opd_governor_cap_tokens"), "cap {{run}}"),
            (of("opd_length_reference_tokens"), "reference {{stat}} {{run}}"),
            (f"exp({ratio(rate('opd_length_expected_nats_total'), rate('opd_length_scored_total'))})", "expected of these prompts {{run}}"),
        ),
        width=16, height=11,
    ),
    Panel(
        "How rollouts end",
        "Before any filter.",
        "percentunit",
        ((shares("opd_rollouts_total", "finish_reason"), "{{finish_reason}} {{run}}"),),
        width=8, height=11, stacked=True, top=1,
    ),
    Panel(
        "Lengths of rollouts",
        "All chosen runs together. A second band at the top is the cap.",
        TOKENS,
        ((f"sum by (le) (increase({of('opd_rollout_length_tokens_bucket')}[$__rate_interval]))", "{{le}}"),),
        width=12, height=9, kind="heatmap",
    ),
    Panel(
        "Truncation and loops",
        "What the governor's own lowered cap cut is the remedy, not the illness.",
        "percentunit",
        (
            (recorded("run:opd_truncation:ratio_5m"), "truncated {{run}}"),
            (recorded("run:opd_governor_cut:ratio_5m"), "of it by the governor's cap {{run}}"),
            (recorded("run:opd_loops:ratio_5m"), "looping {{run}}"),
            (ratio(rate("opd_rollout_loop_tokens_total"), rate("opd_rollout_tokens_total")), "tokens in loops {{run}}"),
        ),
        width=12, height=9, top=1,
    ),
    Panel(
        "KL to the teacher by position",
        "A low KL is no sign of health: it reads its best at total collapse. Late positions sinking while lengths grow is the sign.",
        NATS,
        ((ratio(rate("opd_kl_nats_total", "position"), rate("opd_kl_tokens_total", "position")), "{{position}} {{run}}"),),
        height=9,
    ),
    Panel(
        "Probability of a stop",
        "Mean over all tokens. The student's sinking below the teacher's is an early sign.",
        "percentunit",
        (
            (ratio(rate("opd_stop_mass_student_total"), rate("opd_stop_mass_tokens_total")), "student {{run}}"),
            (ratio(rate("opd_stop_mass_teacher_total"), rate("opd_stop_mass_tokens_total")), "teacher {{run}}"),
        ),
        height=9,
    ),
    Panel(
        "Stops per reference length over time",
        "OpdStopSupervisionStarving fires below 0.25.",
        "none",
        ((RELATIVE_DENSITY, "{{run}}"),),
        height=9, thresholds=((None, "red"), (0.25, "orange"), (0.6, "green")),
    ),
    Panel(
        "Held-out accuracy and truncation",
        "Measured at the cap people allow, whatever the governor's.",
        "percentunit",
        (
            (of("opd_eval_accuracy_ratio"), "accuracy, {{decoding}} {{run}}"),
            (of("opd_eval_truncation_ratio"), "truncation, {{decoding}} {{run}}"),
        ),
        width=12, top=1,
    ),
    Panel("Held-out length", "", TOKENS, ((of("opd_eval_length_tokens"), "{{decoding}} {{run}}"),), width=12),
)  # fmt: skip

UNITS = {"tokens": TOKENS, "nats": NATS, "share": "percentunit", "factor": "suffix: x", "": "none"}
"""Unit of an actuator -> Grafana's."""


def knobs() -> tuple[Panel, ...]:
    """A panel for each actuator that has a value; the help of its metric describes it."""
    return tuple(
        Panel(each.title.capitalize(), "", UNITS.get(each.unit, f"suffix: {each.unit}"), ((of(metric_of(name)), "{{run}}"),))
        for name, each in movable().items()
    )


GOVERNOR = (
    Panel(
        "Pressure",
        "Rises at once, falls only after a long healthy stretch.",
        "percentunit",
        ((of("opd_governor_pressure"), "{{run}}"),),
        width=12, height=9, thresholds=limits(0.3, 0.8), top=1,
    ),
    Panel(
        "Evidence against health",
        "By signal. A healthy run's comes back to 0; pressure starts at log(false_alarm_steps x signals), 10.5 by default.",
        NATS,
        ((of("opd_governor_evidence_nats"), "{{signal}} {{run}}"),),
        width=12, height=9,
    ),
    Panel(
        "Lengths over their prompts' references",
        "Mean log of length over the teacher's on the same prompt: 0 is a student as long as its teacher, .7 one twice as long.",
        NATS,
        (
            (
                ratio(f"({rate('opd_length_over_nats_total')} - {rate('opd_length_under_nats_total')})", rate("opd_length_scored_total")),
                "{{run}}",
            ),
            (of("opd_length_reference_spread_nats"), "the teacher's own spread {{run}}"),
            (f"sqrt({ratio(rate('opd_length_squares_total'), rate('opd_length_scored_total'))})", "root mean square {{run}}"),
        ),
        width=12, height=9,
    ),
    Panel(
        "Beyond the teacher's longest",
        "Share of rollouts there, or cut before; beside it the teacher's own, under the same caps.",
        "percentunit",
        (
            (ratio(rate("opd_length_tail_total"), rate("opd_length_scored_total")), "rollouts {{run}}"),
            (ratio(rate("opd_length_tail_expected_total"), rate("opd_length_scored_total")), "the teacher {{run}}"),
            (of("opd_length_reference_censored_ratio"), "teacher's answers cut {{run}}"),
            (of("opd_length_reference_loops_ratio"), "teacher's answers that loop {{run}}"),
        ),
        width=12, height=9,
    ),
    Panel(
        "Decisions so far by action",
        "hold, tighten, release, fallback (blind), rollback, stop.",
        "short",
        ((f"sum by (run, action) ({of('opd_governor_decisions_total')})", "{{action}} {{run}}"),),
        width=6, height=9,
    ),
    Panel(
        "Decisions so far by signal",
        "The worst signal of each decision; empty: none was in error.",
        "short",
        ((f"sum by (run, signal) ({of('opd_governor_decisions_total')})", "{{signal}} {{run}}"),),
        width=6, height=9,
    ),
    Panel(
        "Age of the governor's data",
        "OpdGovernorBlind fires above a minute.",
        "s",
        ((of("opd_governor_metrics_age_seconds"), "{{run}}"),),
        thresholds=limits(30, 60),
    ),
    Panel(
        "Rollouts cut by the governor's cap",
        "Counted apart from truncation at the cap people set.",
        "percentunit",
        ((recorded("run:opd_governor_cut:ratio_5m"), "{{run}}"),),
    ),
    Panel(
        "Settings generation",
        "In force below newest: a change waits for the next step border.",
        "none",
        ((of("opd_config_generation"), "newest {{run}}"), (of("opd_config_observed_generation"), "in force {{run}}")),
    ),
)  # fmt: skip

LEARNER = (
    Panel("Loss", "", NATS, ((of("opd_learner_loss"), "{{run}}"),)),
    Panel("Gradient norm", "Before clipping. It vanishes in a finished collapse.", "short", ((of("opd_learner_grad_norm"), "{{run}}"),)),
    Panel("Student entropy", "", NATS, ((of("opd_student_entropy_nats"), "{{run}}"),)),
    Panel(
        "KL to the teacher",
        "Over all positions.",
        NATS,
        ((ratio(rate("opd_kl_nats_total"), rate("opd_kl_tokens_total")), "{{run}}"),),
    ),
    Panel(
        "Steps",
        "Skipped: loss or gradient was not finite.",
        "cpm",
        (
            (f"60 * {rate('opd_learner_steps_total')}", "taken {{run}}"),
            (f"60 * {rate('opd_learner_skipped_steps_total')}", "skipped {{run}}"),
        ),
    ),
    Panel(
        "Tokens a second",
        "",
        "suffix: tokens/s",
        ((rate("opd_rollout_tokens_total"), "sampled {{run}}"), (rate("opd_learner_tokens_total"), "learned from {{run}}")),
    ),
    Panel(
        "Time of a step by phase",
        "Rollout and score run while earlier steps learn: the phases may add up to more than the total.",
        "s",
        ((mean("opd_step_seconds", "phase"), "{{phase}} {{run}}"),),
        width=12,
    ),
    Panel(
        "Time since the last step",
        "OpdLearnerStalled fires at two minutes and five mean steps. A paused run shows none.",
        "s",
        ((f"(time() - {of('opd_heartbeat_timestamp_seconds')}) unless on (run) {of('opd_run_paused')} == 1", "{{run}}"),),
        width=12,
    ),
    Panel(
        "Staleness",
        "Learner steps between sampling and learning; staleness alone lengthens answers.",
        "suffix: steps",
        ((mean("opd_sample_staleness_steps"), "mean {{run}}"),),
    ),
    Panel(
        "Weight version",
        "Engines are behind while a sync is under way. A teacher's: the step that last changed one that follows.",
        "none",
        ((of("opd_weight_version"), "{{role}} {{run}}"),),
    ),
    Panel(
        "Weight sync",
        "",
        "s",
        ((mean("opd_weight_sync_seconds"), "mean {{run}}"), (quantile(0.95, "opd_weight_sync_seconds"), "p95 {{run}}")),
    ),
    Panel(
        "Weight sync gap",
        "Above the tolerance the run ends itself: the engines do not hold the student. OpdWeightSyncGap fires before.",
        NATS,
        ((of("opd_weight_sync_gap_nats"), "{{run}}"),),
    ),
    Panel(
        "What becomes of rollouts",
        "A filter can fake a low truncation rate: see the admitted share beside it.",
        "percentunit",
        ((shares("opd_admitted_rollouts_total", "outcome"), "{{outcome}} {{run}}"),),
        stacked=True, top=1,
    ),
    Panel(
        "Teacher's log-prob at sampled stops",
        "Median. Raw far below class: student and teacher stop on different ids (OpdStopTokenMismatch).",
        NATS,
        ((quantile(0.5, "opd_stop_teacher_logprob", "form"), "{{form}} {{run}}"),),
    ),
    Panel(
        "Teacher requests",
        "",
        "reqps",
        ((rate("opd_teacher_requests_total", "teacher", "result"), "{{teacher}} {{result}} {{run}}"),),
    ),
    Panel(
        "Time of a scoring request",
        "",
        "s",
        (
            (quantile(0.5, "opd_teacher_request_seconds", "teacher"), "median {{teacher}} {{run}}"),
            (quantile(0.95, "opd_teacher_request_seconds", "teacher"), "p95 {{teacher}} {{run}}"),
        ),
    ),
    Panel(
        "Other views and other tokens",
        "copied: share of tokens copied from what only the teacher sees. With another tokenizer: spans per token (1: both cut alike), "
        "share of unaligned tokens, unaligned bytes a response, share of responses that the student's tokenizer would cut otherwise.",
        "none",
        ((of("opd_scores"), "{{field}} {{run}}"),),
    ),
    Panel(
        "Reward",
        "Right: the share of judged rollouts. Nothing without objective.reward.",
        "none",
        (
            (of("opd_reward_mean"), "mean score {{run}}"),
            (of("opd_reward_spread"), "spread {{run}}"),
            (ratio(rate("opd_rewards_passed_total"), rate("opd_rewards_judged_total")), "right {{run}}"),
        ),
    ),
    Panel(
        "Teacher and reward",
        "What each asks of a token. A share near 1 or 0: one of them drives alone.",
        NATS,
        (
            (of("opd_signal_spread_nats"), "spread, {{signal}} {{run}}"),
            (of("opd_signal_mean_nats"), "mean, {{signal}} {{run}}"),
            (of("opd_signal_share_ratio"), "share, {{signal}} {{run}}"),
        ),
    ),
    Panel(
        "Conversations",
        "Where an environment answers the student. A student that makes the same call again and again loops, whatever its tokens say.",
        "none",
        (
            (of("opd_conversation_turns"), "turns {{run}}"),
            (ratio(rate("opd_repeated_calls_total"), rate("opd_turns_total")), "turns that repeat the one before, share {{run}}"),
            (ratio(rate("opd_observed_tokens_total"), rate("opd_turns_total")), "environment's tokens a turn {{run}}"),
        ),
    ),
    Panel(
        "Conversations without an answer so far",
        "The environment raised, gave something that is no answer, took too long or died; each costs its conversation alone.",
        "short",
        ((f"sum by (run, reason) ({of('opd_environment_failures_total')})", "{{reason}} {{run}}"),),
    ),
    Panel(
        "Rollouts without a verdict so far",
        "The verifier raised, hung, gave no number, ran out of memory or died; each costs its rollout alone.",
        "short",
        ((f"sum by (run, reason) ({of('opd_verifier_failures_total')})", "{{reason}} {{run}}"),),
    ),
    Panel(
        "Actors restarted so far",
        "",
        "short",
        ((f"sum by (run, role) ({of('opd_actor_restarts_total')})", "{{role}} {{run}}"),),
    ),
    Panel(
        "Samples with NaN or infinity so far",
        "By who found it; they are kept out and written to nonfinite.jsonl.",
        "short",
        ((f"sum by (run, source) ({of('opd_nonfinite_samples_total')})", "{{source}} {{run}}"),),
    ),
)  # fmt: skip


def _ray(title: str, unit: str, name: str, by: str = "instance", description: str = "") -> Panel:
    return Panel(title, description, unit, ((f"sum by ({by}) ({foreign(name)})", f"{{{{{by}}}}}"),))


FLEET = (
    _ray("CPU", "percent", "ray_node_cpu_utilization"),
    Panel(
        "Memory",
        "Ray kills workers when a node is nearly full.",
        "percentunit",
        ((f"sum by (instance) ({foreign('ray_node_mem_used')}) / sum by (instance) ({foreign('ray_node_mem_total')})", "{{instance}}"),),
        thresholds=limits(0.8, 0.95), top=1,
    ),
    _ray("Actors", "short", "ray_actors", by="State", description="DEAD actors of finished runs stay listed."),
    Panel(
        "GPU", "", "percent", ((f"avg by (instance, GpuIndex) ({foreign('ray_node_gpus_utilization')})", "{{instance}} GPU {{GpuIndex}}"),)
    ),
    _ray("GPU memory", "mbytes", "ray_node_gram_used"),
    _ray("Object store", "bytes", "ray_object_store_memory", by="Location", description="SPILLED: the store is too small."),
    _ray("Free disk", "bytes", "ray_node_disk_free", description="Checkpoints need it."),
    _ray("Network in", "Bps", "ray_node_network_receive_speed"),
    Panel(
        "Teacher servers: requests",
        "vLLM servers behind `backend: http`.",
        "short",
        ((foreign("vllm:num_requests_running"), "running {{instance}}"), (foreign("vllm:num_requests_waiting"), "waiting {{instance}}")),
    ),
    Panel(
        "Teacher servers: tokens a second",
        "Scoring costs prompt tokens, the golden pass generated ones.",
        "suffix: tokens/s",
        (
            (f"sum by (instance) (rate({foreign('vllm:prompt_tokens_total')}[$__rate_interval]))", "prompt {{instance}}"),
            (f"sum by (instance) (rate({foreign('vllm:generation_tokens_total')}[$__rate_interval]))", "generated {{instance}}"),
        ),
    ),
    Panel("Teacher servers: KV cache", "", "percentunit", ((foreign("vllm:kv_cache_usage_perc"), "{{instance}}"),), top=1),
)  # fmt: skip


def dashboards() -> dict[str, dict[str, Any]]:
    """File name -> dashboard."""
    return {
        "lengths.json": dashboard("opd-lengths", "Lengths", LENGTHS),
        "governor.json": dashboard("opd-governor", "Governor", (*GOVERNOR, *knobs())),
        "learner.json": dashboard("opd-learner", "Learner and teacher", LEARNER),
        "fleet.json": dashboard("opd-fleet", "Fleet", FLEET, of_runs=False),
    }


def render(board: dict[str, Any]) -> str:
    """A dashboard as its file holds it."""
    return json.dumps(board, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    BOARDS.mkdir(exist_ok=True)
    for name, board in dashboards().items():
        (BOARDS / name).write_text(render(board))
