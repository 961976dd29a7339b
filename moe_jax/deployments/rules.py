"""The rule table: which mesh axes split which logical dim. The same for every deployment."""

BATCH_AXES = ("data", "expert")
"""Sequences are split over these; parameters they replicate are split over them at rest."""

RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "layers": ("pipe",),
    "experts": ("expert",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # Whole wherever they are: every device needs the full vector, and routes over all experts.
    "embed": (),
    "head_width": (),
    "router_experts": (),
}
