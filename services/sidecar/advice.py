"""What to try first for each verdict, with the evidence. The sources are papers and measurements, named beside each remedy."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Advice:
    """One remedy, and why it stands where it stands."""

    what: str
    why: str


_STOP_IDS = Advice(
    "check the stop ids: does the model's own end-of-turn id stand in the engine's stop ids and in the loss?",
    "student and teacher that stop on different ids (<|endoftext|> and <|im_end|>) were 100 % cut at 7,168 tokens, and about 2,000 tokens "
    "long with the stop scored as one event (arXiv 2609.20511); pad == eos masks the stop label (TRL #6357)",
)
_RAISE_CAP = Advice(
    "raise the cap to four times its value for five steps and look at truncation and at the lengths of the answers that end",
    "TRL's old default of 256 cut 97-99 % of a 0.5B model's answers, 1,024 about 14 %; with vLLM the cap must fit max_model_len",
)
_LOOK = Advice(
    "read three of the cut answers to their end",
    "97 % of a blown-up answer is a loop at its end; a good answer that is cut is another illness",
)
_LEARNING_RATE = Advice(
    "lower the learning rate three times, from a checkpoint before it began",
    "in small reproductions a brake alone held truncation at 0 where plain runs collapsed",
)
_GOLDEN = Advice(
    "mix in complete answers that end: one for each four rollouts",
    "mixture with reference KL brought +6.0 points beyond KL alone (StableOPD, arXiv 2604.08527)",
)
_REFERENCE_KL = Advice("add a KL to the initial student, weight 0.01", "+1.7 points in the same study: weak alone, good beside the mixture")
_DENSE = Advice(
    "back-propagate a top-k KL that includes the stop ids instead of a sampled-token estimate",
    "it gives a stop gradient at every prefix: 7 of 8 such runs escaped the lock, sampled-token runs locked in 15 of 19",
)
_LOOP_STOP = Advice(
    "stop loops inside the engine (vLLM repetition detection) and drop the loss from a loop's onset on",
    "a looping answer fills the batch with tokens the teacher agrees with",
)
_SAMPLING = Advice("check temperature and repetition settings of the rollout engine", "near-greedy sampling loops by itself")
_SHORT = Advice(
    "look for what rewards short answers: length penalties, an overlong filter, a concise teacher",
    "a concise teacher or a length penalty needs a floor; without one length collapses the other way",
)
_LOG_MORE = Advice(
    "log length mean and max, truncation and the cap at every step (logging_steps=1)", "a verdict needs at least some tens of steps"
)

ADVICE: dict[str, tuple[Advice, ...]] = {
    "cap_too_low": (_RAISE_CAP, _STOP_IDS, _LOOK),
    "never_stops": (_STOP_IDS, _LOOK, _LOOP_STOP, _GOLDEN),
    "truncated_from_start": (_RAISE_CAP, _STOP_IDS, _LOOK),
    "inflating": (_STOP_IDS, _LEARNING_RATE, _GOLDEN, _REFERENCE_KL, _DENSE),
    "collapsed": (_STOP_IDS, _LEARNING_RATE, _GOLDEN, _REFERENCE_KL, _DENSE, _LOOP_STOP),
    "looping": (_LOOP_STOP, _SAMPLING, _STOP_IDS, _GOLDEN),
    "shrinking": (_SHORT, _LEARNING_RATE, _REFERENCE_KL),
    "healthy": (),
    "unknown": (_LOG_MORE,),
}
"""Verdict -> remedies, the first to try first."""
