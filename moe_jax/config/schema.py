"""The configuration of a run: frozen dataclasses, one per concern.

Every field's docstring is what ``--help`` shows, unit included. What a field may hold is checked in
:mod:`moe_jax.config.checks`; how values reach the fields is in :mod:`moe_jax.config.load`. Nothing here
imports jax, so that reading and refusing a config costs milliseconds.
"""

from dataclasses import dataclass, field
from typing import Literal

DType = Literal["bfloat16", "float32", "float64"]


@dataclass(frozen=True)
class ModelConfig:
    """The transformer itself: sizes and math, nothing about where it runs."""

    num_layers: int = 16
    """Number of decoder blocks."""
    d_model: int = 4096
    """Width of the residual stream."""
    num_heads: int = 32
    """Number of query heads."""
    num_kv_heads: int | None = None
    """Number of key/value heads (grouped-query attention); None means num_heads (multi-head attention)."""
    head_dim: int | None = None
    """Width of one head; None means d_model / num_heads. Must be even (rotary embedding)."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    num_experts: int = 16
    """Number of routed experts in every layer."""
    top_k: int = 2
    """Experts each token is sent to."""
    expert_hidden: int = 16384
    """Hidden width of one expert."""
    expert_type: Literal["mlp", "gated"] = "mlp"
    """mlp: two matrices, down(act(up(x))). gated: three, down(act(gate(x)) * up(x))."""
    activation: Literal["gelu", "silu", "relu"] = "gelu"
    """Activation inside an expert (gelu is the tanh form)."""
    num_shared_experts: int = 0
    """Experts every token passes through besides the routed ones (as one, this many times as wide)."""
    router: Literal["softmax_topk"] = "softmax_topk"
    """softmax_topk: softmax over all experts, then the top_k largest."""
    renormalize_top_k: bool = True
    """Rescale the chosen experts' weights to sum to one."""
    balance_loss_weight: float = 0.01
    """Weight of the load-balance loss (Switch Transformer, eq. 4, from global sums); 0 switches it off."""
    z_loss_weight: float = 0.001
    """Weight of the router z-loss (ST-MoE, eq. 5); 0 switches it off."""
    vocab_size: int = 32000
    """Number of token ids; byte tokens need 272 (256 bytes + 16 specials)."""
    tie_embeddings: bool = False
    """Use the embedding table as the output projection too."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections use init_std / sqrt(2 num_layers)."""
    param_dtype: DType = "float32"
    """Dtype of the stored (master) weights."""
    compute_dtype: DType = "bfloat16"
    """Dtype of activations and weights in products; norms, router and softmax use at least float32."""
    remat: Literal["none", "block", "dots"] = "block"
    """What the backward pass recomputes. none: nothing; dots: all but matrix products; block: every block."""
    attention: Literal["auto", "blockwise", "cudnn"] = "auto"
    """Attention algorithm. auto: cudnn on an NVIDIA GPU in bfloat16, else blockwise (no L x L buffer)."""


@dataclass(frozen=True)
class DeploymentConfig:
    """Where the model runs: sizes of the four mesh axes, and how tokens cross them."""

    name: str = "single"
    """Label of this deployment in tables and files."""
    pipe: int = 1
    """Pipeline stages; layers are split over them."""
    data: int = 1
    """Data-parallel replicas; sequences are split over them."""
    expert: int = 1
    """Expert-parallel devices; experts and sequences are split over them."""
    tensor: int = 1
    """Tensor-parallel devices; heads, expert hidden width and vocabulary are split over them."""
    num_microbatches: int = 1
    """Pieces a device group's batch is cut into; they keep the pipeline stages busy and bound memory."""
    exchange: Literal["auto", "local", "bucketed"] = "auto"
    """How rows reach their experts. local: the expert axis is 1; bucketed: all-to-all in rounds of fixed-size
    buckets, dropless; auto: local when the expert axis is 1, else bucketed."""
    bucket_rows: int | None = None
    """Rows one source may send one expert in a round (bucketed); None derives it from the expected load."""

    @property
    def num_devices(self) -> int:
        """Devices the mesh needs."""
        return self.pipe * self.data * self.expert * self.tensor


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation and what a run writes."""

    steps: int = 200
    """Optimizer steps in all (a resumed run goes on to this number)."""
    batch_size: int = 16
    """Sequences per optimizer step, over all devices."""
    accumulation_steps: int = 1
    """Equal slices of the batch whose gradients are summed before one update."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    warmup_steps: int = 20
    """Steps of linear warm-up from 0."""
    final_lr_fraction: float = 0.1
    """Learning rate at the last step, as a fraction of the peak (cosine)."""
    adam_b1: float = 0.9
    """AdamW first-moment decay."""
    adam_b2: float = 0.95
    """AdamW second-moment decay."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.1
    """AdamW weight decay, on matrices only."""
    clip_norm: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0 switches clipping off."""
    seed: int = 0
    """Seed of the initialisation and of the data order."""
    zero_params: bool = True
    """Shard master weights and optimizer state that the data and expert axes would replicate (ZeRO)."""
    run_dir: str = "runs/default"
    """The one folder this run writes: resolved config, environment, metrics, checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 100
    """Steps between held-out evaluations; 0 switches them off."""
    eval_batches: int = 4
    """Batches in one held-out evaluation."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept; older ones are deleted."""
    resume: bool = True
    """Go on from the newest checkpoint in run_dir; if false, a run_dir that holds checkpoints is refused."""
    state_checksum: bool = False
    """Write a checksum of weights and optimizer state with each step's metrics (proves reproducibility)."""


@dataclass(frozen=True)
class DataConfig:
    """The text, and how it becomes token ids."""

    paths: tuple[str, ...] = ()
    """Files, folders or globs of UTF-8 text; empty means the running Python's standard-library source."""
    tokenizer: str = "bytes"
    """bytes, or the path of a Hugging Face tokenizer.json."""
    seq_len: int = 128
    """Tokens the model sees per sequence."""
    held_out_fraction: float = 0.02
    """Share of the text, cut from its end, that is only evaluated on."""
    max_bytes: int = 32_000_000
    """Bytes of text read at most; if there are more, files spread evenly over the sorted list are taken."""


@dataclass(frozen=True)
class RunConfig:
    """Everything one run needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    deployment: DeploymentConfig = field(default_factory=DeploymentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
