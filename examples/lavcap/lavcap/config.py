"""Everything that can be set, as frozen dataclasses: one class per section, one per kind of choice.

A choice with settings of its own (kind of fusion, of tuning, of front end, where a model comes from) is a section
whose ``kind`` names the class. :mod:`lavcap.config_file` reads them from YAML and ``--set key.sub=value``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar


@dataclass(frozen=True)
class Freeze:
    """No weight of the module is trained."""

    kind: ClassVar[str] = "freeze"


@dataclass(frozen=True)
class FullTuning:
    """Every weight of the module is trained ("fine-tune" in Table IV)."""

    kind: ClassVar[str] = "full"


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates of the query and value projections; the paper's numbers are the defaults."""

    kind: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1


Tuning = Freeze | FullTuning | LoRA


class CEDSize(Enum):
    """Published sizes of CED, and one of ours for tests."""

    TINY = "tiny"
    MINI = "mini"
    SMALL = "small"
    BASE = "base"
    NANO = "nano"  # ours: 2 blocks of width 64; no weights exist for it


class BatchNorm(Enum):
    """What the batch norm over mel bins does while training."""

    FROZEN = "frozen"  # the checkpoint's statistics, whatever train() says
    ADAPT = "adapt"  # statistics follow the data


class KaldiPadding(Enum):
    """What lies behind a clip's end in the 1024 frames."""

    MASKED = "masked"  # silence, and its tokens take no part
    PUBLIC_CODE = "public_code"  # zeros before normalising: loud (+1.0), and its tokens take part


@dataclass(frozen=True)
class CEDFrontEnd:
    """The log-mel spectrogram that CED was trained on."""

    kind: ClassVar[str] = "ced"
    batch_norm: BatchNorm = BatchNorm.FROZEN
    momentum: float = 0.01  # of adapting statistics; CED's own


@dataclass(frozen=True)
class KaldiFrontEnd:
    """LAVCap's Kaldi filter bank, 1024 frames; CED's batch norm has to adapt to it."""

    kind: ClassVar[str] = "kaldi"
    batch_norm: BatchNorm = BatchNorm.ADAPT
    momentum: float = 0.01
    padding: KaldiPadding = KaldiPadding.MASKED


class Fill(Enum):
    """What stands where SpecAugment hides the spectrogram."""

    MEAN = "mean"  # of the clip
    PUBLIC_CODE = "public_code"  # zero before normalising


@dataclass(frozen=True)
class SpecAugment:
    """Masks on the spectrogram while training: widths are drawn from 0 up to those named here."""

    time_masks: int = 1
    time_width: int = 192  # frames
    mel_masks: int = 1
    mel_width: int = 24  # bins of 64; the public code's 48 was meant for 128
    fill: Fill = Fill.MEAN


@dataclass(frozen=True)
class AudioConfig:
    size: CEDSize = CEDSize.BASE
    checkpoint: str | None = None  # file of weights, original or Hugging Face keys; None: random
    seed: int = 0  # of random weights
    front_end: CEDFrontEnd | KaldiFrontEnd = field(default_factory=CEDFrontEnd)
    pool_frequency: bool = True  # 4 rows of tokens averaged to one
    tuning: Tuning = field(default_factory=LoRA)
    spec_augment: SpecAugment | None = field(default_factory=SpecAugment)


class Precision(Enum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True)
class PretrainedCLIP:
    """A CLIP of a local folder or of the Hugging Face hub; always frozen."""

    kind: ClassVar[str] = "pretrained"
    name: str = "openai/clip-vit-large-patch14"
    projection: int = 768  # width of its features; loading checks it
    precision: Precision = Precision.BFLOAT16


@dataclass(frozen=True)
class RandomCLIP:
    """A small CLIP with random weights: for tests and for machines without weights."""

    kind: ClassVar[str] = "random"
    width: int = 64
    depth: int = 2
    heads: int = 2
    patch: int = 32
    projection: int = 64
    precision: Precision = Precision.FLOAT32
    seed: int = 0


@dataclass(frozen=True)
class PretrainedLanguage:
    """A causal language model of a local folder or of the Hugging Face hub."""

    kind: ClassVar[str] = "pretrained"
    name: str = "meta-llama/Llama-2-7b-hf"
    precision: Precision = Precision.BFLOAT16
    tuning: Tuning = field(default_factory=LoRA)


@dataclass(frozen=True)
class RandomLlama:
    """A small Llama with random weights and a tokenizer trained on the run's own captions."""

    kind: ClassVar[str] = "random_llama"
    width: int = 128
    depth: int = 2
    heads: int = 4
    mlp: int = 256
    vocabulary: int = 512  # at most; fewer if the captions have fewer pieces
    precision: Precision = Precision.FLOAT32
    tuning: Tuning = field(default_factory=FullTuning)
    seed: int = 0


@dataclass(frozen=True)
class AudioOnly:
    kind: ClassVar[str] = "audio_only"


@dataclass(frozen=True)
class VisualOnly:
    kind: ClassVar[str] = "visual_only"


@dataclass(frozen=True)
class Concatenation:
    """Both sequences one after the other, untouched."""

    kind: ClassVar[str] = "concatenation"


class Weights(Enum):
    """The map by which a token attends: the plan itself, or its rows and columns scaled to one."""

    PLAN = "plan"
    BARYCENTRIC = "barycentric"


@dataclass(frozen=True)
class OTAtt:
    """OT-Att: both sequences attended through the transport plan (Eq. 5)."""

    kind: ClassVar[str] = "ot_att"
    weights: Weights = Weights.PLAN
    normalise: bool = False  # public code: tokens scaled to length one before they are attended


@dataclass(frozen=True)
class QFormer:
    """Learned queries that attend to both sequences."""

    kind: ClassVar[str] = "q_former"
    queries: int = 32
    depth: int = 2
    heads: int = 12


@dataclass(frozen=True)
class JointEncoder:
    """A transformer over both sequences together."""

    kind: ClassVar[str] = "joint_encoder"
    depth: int = 2
    heads: int = 12


@dataclass(frozen=True)
class CrossAttention:
    """Each sequence attends to the other with learned projections."""

    kind: ClassVar[str] = "cross_attention"
    heads: int = 12


class Gradient(Enum):
    UNROLL = "unroll"
    IMPLICIT = "implicit"
    DETACH = "detach"


class Similarity(Enum):
    COSINE = "cosine"
    DOT = "dot"


@dataclass(frozen=True)
class SolverConfig:
    """The transport problem that OT-Att and the OT loss share."""

    epsilon: float = 0.1
    num_iters: int = 50
    similarity: Similarity = Similarity.COSINE
    gradient: Gradient = Gradient.UNROLL
    backend: str = "auto"  # a name of otfuse.backends()


class Assignment(Enum):
    PLAN = "plan"
    LOG_PLAN = "log_plan"
    BARYCENTRIC = "barycentric"


class Contrast(Enum):
    SIMILARITY = "similarity"
    ASSIGNMENT = "assignment"


class Reduction(Enum):
    MEAN = "mean"
    SUM = "sum"


class Average(Enum):
    """Of the cross-entropy: over a caption's tokens, then over captions (Eq. 8); or over all tokens of a batch."""

    ITEM = "item"
    TOKEN = "token"  # public code


@dataclass(frozen=True)
class LossConfig:
    """``ce_weight * CE + ot_weight * OT``; what follows ``ot_weight`` is :func:`otfuse.ot_alignment_loss`'s."""

    ce_weight: float = 1.0
    ce_average: Average = Average.ITEM
    ot_weight: float = 1.0  # 0: no OT loss
    temperature: float = 0.07
    assignment: Assignment = Assignment.BARYCENTRIC
    contrast: Contrast = Contrast.SIMILARITY
    reduction: Reduction = Reduction.MEAN
    learn_temperature: bool = False  # public code: the scale 1 / temperature is a weight


class PromptSet(Enum):
    """Table V, and several wordings of prompt I drawn at random while training."""

    I = "i"  # noqa: E741
    II = "ii"
    III = "iii"
    MULTI = "multi"


@dataclass(frozen=True)
class DataConfig:
    """The prepared set and its splits (``lavcap prepare`` makes it)."""

    folder: str = "prepared"
    train_split: str = "train"
    validation_split: str = "val"
    test_split: str = "test"
    workers: int = 2


class Engine(Enum):
    """Whose Trainer runs the loop."""

    TRANSFORMERS = "transformers"  # CPU, GPUs, and Gaudi by its own HPU branches
    OPTIMUM_HABANA = "optimum_habana"  # Gaudi; an environment of its own, see the README


class Tracker(Enum):
    """Where the log goes besides the terminal and the checkpoints."""

    NONE = "none"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"


@dataclass(frozen=True)
class TrainConfig:
    output: str = "runs/lavcap"
    epochs: float = 100.0
    batch_size: int = 4  # clips a device and step
    accumulation: int = 1  # steps whose gradients are added before an update
    learning_rate: float = 5e-6
    warmup_epochs: float = 2.0
    weight_decay: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.999
    max_gradient_norm: float | None = None
    precision: Precision = Precision.BFLOAT16
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    engine: Engine = Engine.TRANSFORMERS
    tracker: Tracker = Tracker.NONE
    log_steps: int = 10  # updates between two lines of the log
    validate_epochs: int = 1  # epochs between two validations, each of which ends in a checkpoint
    checkpoint_steps: int | None = None  # updates between two further checkpoints, for long epochs
    keep_checkpoints: int = 2  # the newest ones; the best on validation stays besides
    sample_captions: int = 4  # validation clips whose captions stand in the log


@dataclass(frozen=True)
class GenerationConfig:
    beams: int = 4
    max_new_tokens: int = 200
    length_penalty: float = 1.0
    batch_size: int = 8


@dataclass(frozen=True)
class Config:
    audio: AudioConfig = field(default_factory=AudioConfig)
    visual: PretrainedCLIP | RandomCLIP = field(default_factory=PretrainedCLIP)
    language: PretrainedLanguage | RandomLlama = field(default_factory=PretrainedLanguage)
    fusion: AudioOnly | VisualOnly | Concatenation | OTAtt | QFormer | JointEncoder | CrossAttention = field(
        default_factory=OTAtt
    )
    solver: SolverConfig = field(default_factory=SolverConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    prompts: PromptSet = PromptSet.I
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        """Raise ValueError where sections contradict each other."""
        alone = isinstance(self.fusion, (AudioOnly, VisualOnly))
        if alone and self.loss.ot_weight:
            raise ValueError(f"fusion {self.fusion.kind} has nothing to align: set loss.ot_weight=0")
        apart = isinstance(self.fusion, (OTAtt, Concatenation, JointEncoder))
        if self.prompts is PromptSet.III and not apart:
            raise ValueError(
                f"prompts iii needs sound and picture tokens apart, which fusion {self.fusion.kind} does not give; "
                f"those that do: {OTAtt.kind}, {Concatenation.kind}, {JointEncoder.kind}"
            )
