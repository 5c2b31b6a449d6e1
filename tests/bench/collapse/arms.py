"""The arms of the collapse benchmark: what each changes of its scene's job, and which are drawn beside each other."""

ENFORCE = "governor.mode=enforce"
GOVERNED = (ENFORCE, "data.unfinished_by_teacher=quota")
"""The same plain objective, start and seed; only the governor acts, and it may set aside prompts that the teacher does not finish."""
DENSE = ("objective.support=student", "objective.top_k=32")
MIXED = ("objective.loss=mixed_kl", "objective.support=union", "objective.top_k=32")
"""Half forward KL: reverse KL alone keeps to what the student does already, and follows no teacher into a loop."""


GROWS = (ENFORCE, "governor.actuators=[cap_tokens]", "governor.initial_cap_tokens=48")
ENDINGS = ("objective.golden_weight=0.1", "objective.golden_ratio=1")


def only(*actuators: str) -> tuple[str, ...]:
    return (*GOVERNED, f"governor.actuators=[{', '.join(actuators)}]")


ARMS: dict[str, tuple[str, ...]] = {
    "plain-opd": (),
    "stable-opd": ("objective.golden_weight=0.1", "objective.reference_kl_weight=0.01"),
    # one remedy each
    "static-cap": ("rollout.max_new_tokens=96",),
    "overlong-penalty": ("objective.overlong_weight=1.0",),
    "stop-tilt": ("objective.stop_tilt_nats=4.0",),
    "loop-mask": ("objective.loop_tail=mask",),
    "quota": ("objective.admission_quota=0.1",),
    "mixture": ("objective.golden_weight=0.5",),
    "reference-kl": ("objective.reference_kl_weight=0.1",),
    "dense-loss": DENSE,
    "stop-raw": ("objective.stop_event=raw",),
    "teacher-finished": ("data.unfinished_by_teacher=drop",),
    # the governor on the plain objective: with all actuators, with every prompt kept, with each actuator alone
    "governed": GOVERNED,
    "governed-keep": (ENFORCE,),
    "governed-golden": only("golden_weight"),
    "governed-brake": only("lr_scale"),
    "governed-reference-kl": only("reference_kl_weight"),
    "governed-tilt": only("stop_tilt_nats"),
    "governed-loop-mask": only("loop_tail_weight"),
    "governed-unfinished": only("unfinished_quota"),
    "governed-cap": only("cap_tokens"),
    "governed-quota": only("admission_quota"),
    "governed-rollback": only("rollback"),
    # the governor on the best objective
    "governed-best": (*GOVERNED, *DENSE),
    # the price of governing: a run that stays healthy by itself
    "healthy-off": ("governor.mode=off",),
    "healthy-governed": (ENFORCE,),
    # prompts change from 3-5 to 6-9 terms at step 51 (all known to the teacher), nothing is sick
    "healthy-prompts-off": ("governor.mode=off",),
    "healthy-prompts": (ENFORCE,),
    # the horizon as treatment, measured at the whole window: a cap that grows from short (the governor moves nothing else), or the loss
    # on the first tokens and the stop; each with and without a golden answer beside every rollout, which ends
    "horizon-cap": GROWS,
    "horizon-cap-end": (*GROWS, *ENDINGS),
    "horizon-loss": ("objective.horizon_tokens=48",),
    "horizon-loss-end": ("objective.horizon_tokens=48", *ENDINGS),
    # a teacher that often gets stuck takes over at step 60
    "swap-plain": MIXED,
    "swap-governed": (*MIXED, ENFORCE),
    # a shard scored by a teacher that gets stuck in every answer, steps 80 to 91
    "poison-plain": MIXED,
    "poison-governed": (*MIXED, ENFORCE),
    "poison-rollback": (*MIXED, ENFORCE, "governor.actuators=[rollback]", "checkpoint.every_steps=10"),
    # a penalty so strong that the student answers nothing: the length collapses (a sampled loss would not see the early stop)
    "terse-plain": (*DENSE, "objective.stop_tilt_nats=16", "objective.stop_tilt_target_tokens=1", "objective.stop_tilt_width_tokens=1"),
}
SMOLLM2 = (
    "preset=plain-opd",
    "rollout.dtype=bfloat16",
    "learner.dtype=bfloat16",
    "learner.learning_rate=1e-4",
    "rollout.max_new_tokens=256",
    "rollout.max_model_len=384",
)
ARMS |= {
    # real weights: a pruned student that rambles in a tenth of its answers before the first step, and inflates within five
    "smollm2-plain": (*SMOLLM2, "governor.mode=observe"),
    "smollm2-governed": (*SMOLLM2, ENFORCE),
}
ARMS["terse-governed"] = (*ARMS["terse-plain"], ENFORCE)
PLOTS = {
    "collapse": ("plain-opd", "stable-opd", "governed", "governed-best"),
    "swap": ("swap-plain", "swap-governed"),
    "poison": ("poison-plain", "poison-governed", "poison-rollback"),
    "terse": ("terse-plain", "terse-governed"),
    "smollm2": ("smollm2-plain", "smollm2-governed"),
}
"""Picture -> arms beside each other in it."""
