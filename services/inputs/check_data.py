"""Checks of prompts and held-out problems: every row read, the refused ones named."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from opd_governor.services.inputs.checks import Check
from opd_governor.services.inputs.environments import open_environment
from opd_governor.services.inputs.prompts import PromptStream, describe_refusals, open_problems, open_prompts
from opd_governor.services.job.settings import Job, JobError


def check_data(job: Job, tokenizer: Any, window: int, teacher_tokenizers: Mapping[str, Any]) -> Iterator[Check]:
    """`window`: tokens that every model can hold."""
    if job.data.prompts.chat and not tokenizer.chat_template:
        detail = "data.prompts.chat: the student's tokenizer has no chat template"
        yield Check("chat template", "fail", detail, "set it to false, or student.tokenizer to one that has a template")
        return
    yield from _check_template_keys(job, tokenizer)
    try:
        bridge = open_environment(job, tokenizer)
    except JobError as error:
        yield Check("environment", "fail", str(error), exit_code=2)
        return
    if bridge is not None and job.environment is not None:
        yield Check("environment", "pass", job.environment.entry or f"{len(job.environment.tools)} tools")
        if job.environment.tools and not (job.data.prompts.chat and tokenizer.chat_template):
            detail = "environment.tools: a chat template tells the student of its tools, and prompts are not rendered by one"
            yield Check(
                "tools", "warn", detail, "set data.prompts.chat to true, with a tokenizer that has one, or write them into the prompts"
            )
    try:
        stream = open_prompts(job, tokenizer, window, teacher_tokenizers)
    except JobError as error:
        detail = str(error) if str(error).startswith("objective.") else f"data.prompts: {error}"
        yield Check("prompts", "fail", detail, exit_code=2)
        return
    yield from _check_prompts(job, stream, window)
    if job.objective.reward is not None:
        yield Check("reward", "pass", f"verifier {job.objective.reward.verifier}")
    if job.data.eval.path is not None:
        yield _check_evaluation(job, tokenizer, window)


def _check_template_keys(job: Job, tokenizer: Any) -> Iterator[Check]:
    if job.data.prompts.system_prompt and not job.data.prompts.chat:
        detail = "data.prompts.system_prompt: goes before text prompts in chat form only, and data.prompts.chat is false: it is not used"
        yield Check("system prompt", "warn", detail, "set chat to true, or put a system message into each row")
    template = str(tokenizer.chat_template or "")
    for key in job.data.prompts.template:
        if not re.search(rf"\b{re.escape(key)}\b", template):
            detail = f"data.prompts.template: the student's chat template does not mention {key}, which changes nothing"
            yield Check("chat template", "warn", detail, "remove the key, or mend its name")


def _check_evaluation(job: Job, tokenizer: Any, window: int) -> Check:
    """The problems, read as a run will read them, and the verifier."""
    try:
        problems = open_problems(job, tokenizer, window)
    except JobError as error:
        detail = str(error) if str(error).startswith("data.eval") else f"data.eval: {error}"
        return Check("evaluation", "fail", detail, exit_code=2)
    survey = problems.survey
    detail = f"{len(problems.prompts)} problems, verifier {job.data.eval.verifier}"
    told = list(survey.notes)
    if survey.num_refused:
        told.append(describe_refusals(survey.refused, job.rollout.min_new_tokens, survey.num_refused))
    return Check("evaluation", "warn" if told else "pass", "; ".join([detail, *told]))


def _check_prompts(job: Job, stream: PromptStream, window: int) -> Iterator[Check]:
    survey, cap = stream.survey, job.rollout.max_new_tokens
    detail = f"{len(stream)} prompts, the longest {survey.longest_tokens} tokens"
    if survey.refused:
        told = describe_refusals(survey.refused, job.rollout.min_new_tokens, survey.num_refused)
        yield Check("prompts", "warn", f"{detail}; {told}")
    else:
        yield Check("prompts", "pass", detail)
    for note in survey.notes:
        yield Check("prompt rows", "warn", note)
    if survey.longest_tokens + cap > window:
        detail = f"the longest prompt leaves {window - survey.longest_tokens} of {window} tokens, less than rollout.max_new_tokens {cap}"
        yield Check("context window", "warn", detail, "such prompts get what is left; lower the cap or shorten them")
    else:
        yield Check("context window", "pass", f"{window} tokens hold prompt and cap")
    served = {domain for teacher in job.teacher for domain in teacher.domains}
    if all(teacher.domains for teacher in job.teacher) and (orphans := survey.domains.keys() - served):
        first = min(orphans, key=lambda domain: survey.domains[domain])
        detail = f"{survey.domains[first]}: no teacher has domain {first!r}"
        remedy = f"add it to a teacher's domains (they have {', '.join(sorted(served))})"
        yield Check("domains", "fail", detail + (f", nor {len(orphans) - 1} others" if len(orphans) > 1 else ""), remedy)
    if job.objective.golden_weight > 0 and not job.data.golden.enabled and not survey.num_golden:
        detail = f"objective.golden_weight: {job.objective.golden_weight} needs golden answers, but data.golden.enabled is false"
        yield Check("golden answers", "fail", detail, "enable the golden pass, add a golden column or set the weight to 0", exit_code=2)
