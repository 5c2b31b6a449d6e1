"""Rows to token ids, in batches: what is asked of the template in Python, what is asked of the tokenizer on its own threads.

rows --drafts--> text of student, teacher and golden answer --tokens--> columns of a table
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_governor.actors.rollout.loops import find_loop
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.inputs.blends import teacher_weights
from opd_governor.services.inputs.messages import Messages, Notes
from opd_governor.services.inputs.models import answer_stop
from opd_governor.services.inputs.privileged import TEACHER_PROMPT, columns_named, privileged
from opd_governor.services.inputs.questions import Question, read_question
from opd_governor.services.inputs.refusals import DataError, RowError, theirs
from opd_governor.services.inputs.rows import Row
from opd_governor.services.inputs.templates import ChatForm, Encoder, stop_words
from opd_governor.services.job.settings import JobError, PromptSource

OWN_BOS = "prompts begin with the BOS token already: it is not added again"
RENDERED = "prompts were put through a chat template before: taken as they stand"
STOPS_INSIDE = "prompts hold a stop token in their own text: it stays, as that token"
LEFT_OUT = "conversations hold a message that the chat template leaves out or changes: look at its role"
GOLDEN_LOOPS = "golden answers end in a loop: left out"
GOLDEN_GOES_ON = "golden answers go on behind a stop token: left out"


@dataclass(frozen=True, slots=True)
class Terms:
    """What, beside rows and tokenizers, decides how a row is encoded. All of it is part of the cache's key."""

    source: PromptSource
    teachers: tuple[TeacherSettings, ...] = ()
    """Their domains, system prompts and templates decide what a teacher sees."""
    loop_min_repeats: int = 4
    loop_min_tokens: int = 32
    stop_ids: tuple[int, ...] | None = None
    """rollout.stop_token_ids: golden answers end with one of them."""
    tools: str = ""
    """Schemas of environment.tools as JSON: every conversation that names no tools has them."""


@dataclass(slots=True)
class Draft:
    """A row on its way: as text, then as ids."""

    row: Row
    question: Question | None = None
    error: RowError | None = None
    text: str = ""
    """What the student's tokenizer gets."""
    rendered: bool = False
    """By a chat template: no BOS is added."""
    in_chat: bool = False
    """It asks for an assistant's turn, whose end is the template's."""
    teacher_text: str | None = None
    teacher_rendered: bool = False
    privileged_text: str = ""
    token_ids: list[int] | None = None
    teacher_ids: list[int] | None = None
    privileged_ids: list[int] | None = None
    weights: str | None = None
    """Of the teachers on this row, as JSON."""
    golden_ids: list[int] | None = None


@dataclass(slots=True)
class View:
    """What a teacher sees in place of the student's prompt."""

    teacher: TeacherSettings
    form: ChatForm
    encoder: Encoder


class RowEncoder:
    """Encodes batches of rows; keeps notes of what it took otherwise than it stood."""

    def __init__(self, tokenizer: Any, terms: Terms, teacher_tokenizers: Mapping[str, Any] | None = None) -> None:
        """`teacher_tokenizers`: by teacher's name, of those that render their own prompts or read tokens of their own. Raises JobError."""
        self.notes = Notes()
        self._terms, self._source = terms, terms.source
        self._form = ChatForm(tokenizer, terms.source.template, "the student")
        self._encoder = Encoder(tokenizer, "the student")
        self._tokenizer, self._others = tokenizer, teacher_tokenizers or {}
        self._views: dict[str, View | None] = {}
        self._stops = stop_words(tokenizer)
        self._golden_stops: dict[bool, int] = {}
        self._named = {name for teacher in terms.teachers for name in columns_named(teacher.context or "")}

    def drafts(self, rows: Sequence[Row]) -> list[Draft]:
        """Read and render each row."""
        drafts = [self._draft(row) for row in rows]
        self._render([draft for draft in drafts if draft.question is not None])
        return drafts

    def tokens(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Put what `drafts` rendered into token ids."""
        live = [draft for draft in drafts if draft.error is None]
        for draft, ids in zip(live, self._encoder.ids([draft.text for draft in live]), strict=True):
            if isinstance(ids, RowError):
                draft.error = ids
            else:
                draft.token_ids = self._with_bos(draft, ids, self._encoder, draft.rendered, note=True)
                if not draft.token_ids:
                    draft.error = RowError(f"column {self._source.column!r} holds no tokens; give the prompt some text")
        self._teacher_tokens([draft for draft in live if draft.error is None and draft.teacher_text is not None])
        self._golden_tokens([d for d in live if d.error is None and d.question is not None and d.question.golden is not None])
        return list(drafts)

    # ---- text

    def _draft(self, row: Row) -> Draft:
        draft = Draft(row)
        try:
            if isinstance(row.value, RowError):
                raise row.value
            with theirs("", "the row", "mend or remove it", RowError):
                draft.question = read_question(row.value, row.place, self._source, self.notes, self._named)
            if self._terms.tools and draft.question.tools is None and not isinstance(draft.question.content, str):
                draft.question.tools = json.loads(self._terms.tools)
            if not draft.question.content:
                raise RowError(f"column {self._source.column!r} holds no tokens; give the prompt some text")
        except RowError as error:
            draft.error = error
        return draft

    def _render(self, drafts: Sequence[Draft]) -> None:
        chats = []
        for draft in drafts:
            assert draft.question is not None
            content = draft.question.content
            if (said := self._rendered_before(content)) is not None:
                draft.text, draft.in_chat = said, True
                if not isinstance(content, str):
                    draft.rendered = True
                    self.notes.add(RENDERED, draft.row.place)
            else:
                if any(stop in draft.question.text for stop in self._stops.values()):
                    self.notes.add(STOPS_INSIDE, draft.row.place)
                if isinstance(content, str):
                    draft.text = content
                elif not self._form.exists:
                    draft.error = RowError("chat messages need a chat template, which the student's tokenizer lacks; give plain text")
                else:
                    chats.append(draft)
        self._put_text(chats, self._form, {id(draft): draft.question.content for draft in chats if draft.question}, teacher=False)
        self._render_for_teachers([draft for draft in drafts if draft.error is None])

    def _rendered_before(self, content: str | Messages) -> str | None:
        """The text of a prompt that a chat template has made already, None for any other."""
        if not isinstance(content, str) and any(message["role"] != "system" for message in content[:-1]):
            return None
        text = content if isinstance(content, str) else str(content[-1]["content"])
        opening = self._form.opening
        begins = opening is not None and text.removeprefix(self._encoder.bos_token or "").lstrip().startswith(opening)
        return text if begins else None

    def _put_text(self, drafts: Sequence[Draft], form: ChatForm, contents: Mapping[int, Any], *, teacher: bool) -> None:
        texts = form.render([(contents[id(draft)], draft.question.tools if draft.question else None) for draft in drafts])
        for draft, text in zip(drafts, texts, strict=True):
            if isinstance(text, RowError):
                draft.error = text
            elif teacher:
                draft.teacher_text, draft.teacher_rendered = text, True
            else:
                draft.text, draft.rendered, draft.in_chat = text, True, True
                if any(m["role"] not in ("assistant", "tool") and m["content"].strip() not in text for m in contents[id(draft)]):
                    self.notes.add(LEFT_OUT, draft.row.place)

    def _render_for_teachers(self, drafts: Sequence[Draft]) -> None:
        chats: dict[str, list[Draft]] = {}
        contents: dict[int, Any] = {}
        for draft in drafts:
            question = draft.question
            assert question is not None
            try:
                weights = teacher_weights(question.row, [teacher.name for teacher in self._serving(question.domain)])
                draft.weights = json.dumps(weights) if weights else None
                view = self._view(question.domain, question.row)
                if view is None:
                    continue
                seen = privileged(question, view.teacher.context)
            except RowError as error:
                draft.error = error
                continue
            draft.privileged_text = seen.text
            system_prompt = view.teacher.system_prompt
            if isinstance(seen.content, str):
                draft.teacher_text = f"{system_prompt}\n\n{seen.content}" if system_prompt else seen.content
                continue
            own = [{"role": "system", "content": system_prompt}] if system_prompt else []
            others = [m for m in seen.content if m["role"] != "system"] if own else seen.content
            contents[id(draft)] = [*own, *others]
            chats.setdefault(question.domain, []).append(draft)
        for domain, group in chats.items():
            view = self._view(domain, None)
            assert view is not None
            self._put_text(group, view.form, contents, teacher=True)

    def _view(self, domain: str, row: Mapping[str, Any] | None) -> View | None:
        """What the teachers of a domain see in place of a row's prompt; None: what the student sees. `row` None: one that has a view."""
        if domain not in self._views:
            self._views[domain] = self._view_of(domain)
        view = self._views[domain]
        plain = view is not None and self._sees_the_same(view.teacher) and row is not None and not row.get(TEACHER_PROMPT)
        return None if plain else view

    def _view_of(self, domain: str) -> View | None:
        """None where the domain has no teacher. Raises DataError where its teachers do not see the same."""
        serving = self._serving(domain)
        views = {(t.system_prompt, t.context, repr(self._keys(t)), t.name if self._is_apart(t) else None): t for t in serving}
        if len(views) > 1:
            names = ", ".join(teacher.name for teacher in serving)
            raise DataError(
                f"teachers {names} serve domain {domain!r} with different system prompts, contexts, templates or tokenizers; "
                "give them the same"
            )
        if not views:
            return None
        (teacher,) = views.values()
        if self._is_apart(teacher):
            other = self._others.get(teacher.name)
            if other is None:
                raise JobError(f"teacher {teacher.name}: render is own, but its tokenizer is not here; name one, or set render to student")
            form = ChatForm(other, self._keys(teacher), f"teacher {teacher.name}")
            if not form.exists and teacher.render == "own":
                raise JobError(f"teacher {teacher.name}: render is own, but its tokenizer has no chat template; set render to student")
            if not form.exists:
                form = ChatForm(self._tokenizer, self._keys(teacher), "the student")
            return View(teacher, form, Encoder(other, f"teacher {teacher.name}"))
        return View(teacher, ChatForm(self._tokenizer, self._keys(teacher), "the student"), self._encoder)

    def _serving(self, domain: str) -> list[TeacherSettings]:
        return [teacher for teacher in self._terms.teachers if not teacher.domains or domain in teacher.domains]

    def _is_apart(self, teacher: TeacherSettings) -> bool:
        """Whether its prompts are made by its own tokenizer."""
        return teacher.render == "own" or teacher.name in self._others

    def _sees_the_same(self, teacher: TeacherSettings) -> bool:
        """As the student, of a row that has nothing for teachers alone."""
        own_words = teacher.system_prompt is not None or teacher.context is not None
        return not own_words and not self._is_apart(teacher) and self._keys(teacher) == self._source.template

    def _keys(self, teacher: TeacherSettings) -> dict[str, Any]:
        return self._source.template if teacher.template is None else teacher.template

    # ---- ids

    def _with_bos(self, draft: Draft, ids: list[int], encoder: Encoder, rendered: bool, *, note: bool = False) -> list[int]:
        if rendered or encoder.bos is None:
            return ids
        if ids[:1] == [encoder.bos]:
            if note:
                self.notes.add(OWN_BOS, draft.row.place)
            return ids
        return [encoder.bos, *ids]

    def _teacher_tokens(self, drafts: Sequence[Draft]) -> None:
        by_encoder: dict[int, tuple[Encoder, list[Draft]]] = {}
        for draft in drafts:
            assert draft.question is not None
            view = self._view(draft.question.domain, None)
            assert view is not None
            by_encoder.setdefault(id(view.encoder), (view.encoder, []))[1].append(draft)
        for encoder, group in by_encoder.values():
            for draft, ids in zip(group, encoder.ids([draft.teacher_text or "" for draft in group]), strict=True):
                if isinstance(ids, RowError):
                    draft.error = ids
                else:
                    draft.teacher_ids = self._with_bos(draft, ids, encoder, draft.teacher_rendered)
        hinted = [draft for draft in drafts if draft.privileged_text]
        for draft, ids in zip(hinted, self._encoder.ids([draft.privileged_text for draft in hinted]), strict=True):
            draft.privileged_ids = None if isinstance(ids, RowError) else ids  # what the student cannot write it cannot copy

    def _golden_tokens(self, drafts: Sequence[Draft]) -> None:
        answers = self._encoder.ids([draft.question.golden or "" for draft in drafts if draft.question])
        for draft, body in zip(drafts, answers, strict=True):
            if isinstance(body, RowError):
                draft.error = body
                continue
            stop = self._golden_stop(draft.in_chat)
            if body[-1:] == [stop]:
                body = body[:-1]
            if any(token in self._stops for token in body):
                self.notes.add(GOLDEN_GOES_ON, draft.row.place)
            elif find_loop(body, min_repeats=self._terms.loop_min_repeats, min_tokens=self._terms.loop_min_tokens):
                self.notes.add(GOLDEN_LOOPS, draft.row.place)
            else:
                draft.golden_ids = [*body, stop]

    def _golden_stop(self, chat: bool) -> int:
        if chat not in self._golden_stops:
            self._golden_stops[chat] = answer_stop(self._tokenizer, chat, self._terms.stop_ids)
        return self._golden_stops[chat]
