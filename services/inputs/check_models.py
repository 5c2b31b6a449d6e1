"""Checks of the models: what they are, whether student and teacher speak the same ids, what they stop on."""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.auto import AutoHfQuantizer

from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.inputs.check_weights import check_weights
from opd_governor.services.inputs.checks import Check
from opd_governor.services.inputs.models import end_of_turn, tokenizer_difference
from opd_governor.services.inputs.refusals import is_theirs, words
from opd_governor.services.inputs.resolve import ModelFacts
from opd_governor.services.inputs.templates import QUESTION
from opd_governor.services.inputs.tokens import SAME, comparison
from opd_governor.services.job.settings import Job

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Where configs keep the number of experts."""


def check_student(facts: ModelFacts) -> Iterator[Check]:
    """What can be trained and sampled here, and what cannot."""
    where, config = f"student.model {facts.model}", facts.config
    if wrong := not_causal(facts):
        yield Check("student model", "fail", f"{where}: {wrong}", "give a decoder-only language model")
    if facts.whole is not config:
        detail = f"{where}: a multimodal wrapper ({type(facts.whole).__name__}): its weights' names are not those of a text model"
        yield Check("student model", "fail", detail, "save its text part as a model of its own and give that")
    if method := quantisation(facts):
        detail = f"{where}: its weights are quantised ({method}) and cannot be trained"
        yield Check("student model", "fail", detail, "give the model that it was made from")
    if experts := num_experts(config):
        detail = f"{where}: a mixture of {experts} experts; engines do not take new weights of experts exactly while they run"
        yield Check("student model", "fail", detail, "give a dense student; a teacher may be a mixture of experts")
    if wrong := _not_for_vllm(facts):
        yield Check("student model", "fail", f"{where}: {wrong}", "add AutoModel to auto_map in its config.json, and name its base class")
    yield from check_weights("student", where, facts)
    yield from check_ids("student", where, facts)
    yield from check_template("student", facts)


def _not_for_vllm(facts: ModelFacts) -> str:
    """Why vLLM cannot sample a model of own code; empty where it can. It knows the architecture, or makes it by AutoModel."""
    own = getattr(facts.whole, "auto_map", None) or {}
    if "AutoModelForCausalLM" not in own or "AutoModel" in own or importlib.util.find_spec("vllm") is None:
        return ""
    from vllm import ModelRegistry  # vllm takes seconds to import

    named = [str(name) for name in getattr(facts.whole, "architectures", None) or ()]
    if set(named) & set(ModelRegistry.get_supported_archs()):
        return ""
    return (
        f"its code is its own ({', '.join(named) or 'no architecture'}), and vLLM makes such models by AutoModel, which its auto_map lacks"
    )


def check_teacher(settings: TeacherSettings, facts: ModelFacts) -> Iterator[Check]:
    """What the teacher's back end can serve."""
    where = f"teacher {settings.name}: model {facts.model}"
    if wrong := not_causal(facts):
        yield Check(f"teacher model {settings.name}", "fail", f"{where}: {wrong}", "give a decoder-only language model")
    if settings.backend == "torch" and (method := quantisation(facts)):
        yield from _check_quantised(settings, facts, where, method)
    yield from check_weights(settings.name, where, facts)
    yield from check_ids(settings.name, where, facts)
    # vLLM gives log-probs by id on GPUs alone; elsewhere its scorer reads whole vocabularies, up to a size.
    no_gpu = not torch.cuda.is_available() and not os.environ.get("RAY_ADDRESS")  # a cluster may have some
    most = settings.means.cpu_vocabulary
    if most is not None and no_gpu and facts.num_rows > most:
        detail = f"teacher {settings.name}: backend {settings.backend} without a GPU takes at most {most} tokens of vocabulary"
        detail += f", not {facts.num_rows}"
        yield Check(f"teacher support {settings.name}", "fail", detail, "set its backend to torch")


def not_causal(facts: ModelFacts) -> str:
    """Why it is no causal language model; empty where it is one."""
    kind = type(facts.whole).__name__
    if getattr(facts.whole, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder, not a causal language model"
    has_own_code = "AutoModelForCausalLM" in (getattr(facts.whole, "auto_map", None) or {})
    if not has_own_code and type(facts.whole) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(facts.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"{kind} is no causal language model that transformers knows"
    return ""


def quantisation(facts: ModelFacts) -> str:
    """The method by which its weights are quantised; empty for plain weights."""
    found = getattr(facts.whole, "quantization_config", None) or getattr(facts.config, "quantization_config", None)
    if not found:
        return ""
    return str(found.get("quant_method", "unknown") if isinstance(found, dict) else getattr(found, "quant_method", "unknown"))


def num_experts(config: Any) -> int:
    """Experts of a mixture; 0 for a dense model."""
    found = [getattr(config, key, None) for key in EXPERTS]
    return next((count for count in found if isinstance(count, int) and count > 1), 0)


def _check_quantised(settings: TeacherSettings, facts: ModelFacts, where: str, method: str) -> Iterator[Check]:
    """transformers' own word on whether this machine can load it."""
    found = getattr(facts.whole, "quantization_config", None) or facts.config.quantization_config
    try:
        AutoHfQuantizer.from_config(found, pre_quantized=True).validate_environment(device_map=None)
    except BaseException as error:
        if not is_theirs(error):
            raise
        detail = f"{where}: quantised ({method}), and backend torch says: {words(error)}"
        yield Check(f"teacher model {settings.name}", "fail", detail, "install what is missing, or set its backend to vllm or http")
    else:
        yield Check(f"teacher model {settings.name}", "pass", f"quantised ({method})")


def check_ids(whose: str, where: str, facts: ModelFacts) -> Iterator[Check]:
    """The tokenizer's ids against the embedding's rows."""
    if facts.num_ids > facts.num_rows:
        detail = f"{where}: its tokenizer has ids up to {facts.num_ids - 1}, its embedding {facts.num_rows} rows"
        yield Check(f"vocabulary {whose}", "fail", detail, "give the tokenizer that belongs to the model, or resize the embedding")
    elif odd := sorted(stop for stop in facts.stops if not 0 <= stop < facts.num_rows):
        detail = f"{where}: stops on id {odd[0]} ({facts.stops[odd[0]]}), its embedding has {facts.num_rows} rows"
        yield Check(f"vocabulary {whose}", "fail", detail, "mend eos_token_id in its generation_config.json or config.json")


def check_template(whose: str, facts: ModelFacts) -> Iterator[Check]:
    """Whether the chat template takes a plain question and an answer."""
    if not facts.tokenizer.chat_template:
        return
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Two."}]
    try:
        facts.tokenizer.apply_chat_template(messages, tokenize=False)
    except BaseException as error:
        if not is_theirs(error):
            raise
        if end_of_turn(facts.tokenizer) is not None:
            return  # it wants a system message as well
        detail = f"the {whose}'s chat template, on a question and an answer, says: {words(error)}"
        yield Check("chat template", "warn", detail, "its end of turn is not known: name it in rollout.stop_token_ids")


def check_pair(settings: TeacherSettings, student: ModelFacts, read: Any, ends: Mapping[int, str], job: Job) -> Iterator[Check]:
    """Whether the teacher reads every id that the student can write, and what ends an answer.

    `read`: the tokenizer whose ids the teacher reads; `ends`: what it stops on, empty for a server's.
    """
    name, difference = settings.name, tokenizer_difference(student.tokenizer, read)
    if difference and settings.tokenizer == SAME:
        detail = f"student.model and teacher {name} have different vocabularies: {difference}"
        yield Check(f"tokenizer {name}", "fail", detail, "set its tokenizer to own, or choose models of one family")
        return
    if difference or settings.tokenizer not in (None, SAME):
        status, detail, remedy = comparison(name, difference, student.tokenizer, read, job)
        yield Check(f"tokenizer {name}", status, detail, remedy)
        return
    num, more = len(student.tokenizer.get_vocab()), len(read.get_vocab()) - len(student.tokenizer.get_vocab())
    beside = f"; the teacher has {more} more, which the student never writes" if more > 0 else ""
    yield Check(f"tokenizer {name}", "pass", f"the same {num} tokens{beside}")
    if job.rollout.stop_token_ids is not None:
        named = ", ".join(named_id(student.tokenizer, stop) for stop in job.rollout.stop_token_ids)
        yield Check(f"stop ids {name}", "pass", f"set by rollout.stop_token_ids: {named}")
        return
    described = [
        ", ".join(f"{named_id(tokenizer, stop)} ({where})" for stop, where in sorted(stops.items())) or "nothing"
        for tokenizer, stops in ((student.tokenizer, student.stops), (read, ends))
    ]
    if not student.stops and not ends:
        yield Check(f"stop ids {name}", "fail", "neither model says what it stops on", "set rollout.stop_token_ids")
    elif student.stops.keys() == ends.keys():
        yield Check(f"stop ids {name}", "pass", described[0])
    else:
        remedy = "they are scored as one event (objective.stop_event: class); rollout.stop_token_ids overrides the set"
        if job.objective.stop_event == "raw":
            remedy = "set objective.stop_event to class: raw teaches the student not to stop"
        yield Check(f"stop ids {name}", "warn", f"the student stops on {described[0]}, teacher {name} on {described[1]}", remedy)


def check_stop_ids(job: Job, student: ModelFacts) -> Iterator[Check]:
    """The job's own stop ids: some, and ids that the student can write."""
    chosen = job.rollout.stop_token_ids
    if chosen is None:
        return
    remedy = "name ids of the student's tokenizer, or leave it out: the models say what they stop on"
    if not chosen:
        yield Check("stop ids", "fail", "rollout.stop_token_ids: is empty, so no answer would ever end", remedy, exit_code=2)
    elif odd := [stop for stop in chosen if not 0 <= stop < student.num_ids]:
        detail = f"rollout.stop_token_ids: {odd[0]} is no id of the student's tokenizer, which has {student.num_ids}"
        yield Check("stop ids", "fail", detail, remedy, exit_code=2)


def check_pad(tokenizer: Any) -> Iterator[Check]:
    """One token for padding and end: fine here, asked about often."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        same = named_id(tokenizer, tokenizer.pad_token_id)
        yield Check("pad token", "pass", f"pad and eos are the same token, {same}: padding is masked by length, stops are learned")


def named_id(tokenizer: Any, token_id: int) -> str:
    """An id with its token."""
    token = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < 2**31 else None
    return f"{token_id} {token!r}"
